// The launchers of launch.h: which kernel a call takes and with which grid.
#include "backward.h"
#include "launch.h"
#include "losses.h"

namespace dpo_fast {

DPO_FAST_ROW_KERNELS(extern template, Float32)
DPO_FAST_ROW_KERNELS(extern template, Float64)
DPO_FAST_ROW_KERNELS(extern template, BFloat16)
DPO_FAST_ROW_KERNELS(extern template, Float16)

namespace {

// Blocks that the forward kernel should have: enough to fill a large GPU a few times over, so the last
// blocks to run cost little, and not more, because each begins and ends with some microseconds of waiting.
constexpr int64_t kEnoughBlocks = 2048;
// Positions within a piece, and in the padding, are 32-bit numbers.
constexpr int64_t kMaxVocab = (int64_t)1 << 34, kMaxPadding = (int64_t)1 << 30;

// How many of a row's pieces a block takes.
int pieces_per_block(const Rows& rows) {
  const int pieces = pieces_of(rows.vocab).count;
  if (rows.n_rows >= kEnoughBlocks) return pieces;
  const int64_t share = rows.n_rows * pieces / kEnoughBlocks;
  return share > 1 ? (int)share : 1;
}

bool is_split(const Rows& rows) { return pieces_per_block(rows) < pieces_of(rows.vocab).count; }

// Calls `launch<T, kCapped>(args, stream)`, or another function of that form, for the rows' type and transform.
template <class Args>
using Launch = int (*)(Args, void*);

template <class Args>
int launch_for(const Rows& rows, const Launch<Args> (&table)[kLogitTypes][2], const Args& args, void* stream) {
  if (rows.logit_type < 0 || rows.logit_type >= kLogitTypes) return cudaErrorInvalidValue;
  if (rows.vocab >= kMaxVocab || rows.width - rows.vocab >= kMaxPadding) return cudaErrorInvalidValue;
  return table[rows.logit_type][rows.transform.softcap > 0](args, stream);
}

constexpr Launch<ForwardArgs> kForward[kLogitTypes][2] = {
    {launch_forward<Float32, false>, launch_forward<Float32, true>},
    {launch_forward<Float64, false>, launch_forward<Float64, true>},
    {launch_forward<BFloat16, false>, launch_forward<BFloat16, true>},
    {launch_forward<Float16, false>, launch_forward<Float16, true>},
};

constexpr Launch<BackwardArgs> kBackward[kLogitTypes][2] = {
    {launch_backward<Float32, false>, launch_backward<Float32, true>},
    {launch_backward<Float64, false>, launch_backward<Float64, true>},
    {launch_backward<BFloat16, false>, launch_backward<BFloat16, true>},
    {launch_backward<Float16, false>, launch_backward<Float16, true>},
};

BatchArgs batch_of_rows(const Rows* rows, const Sequences* seqs, void* seq_logps, double* seq_saved) {
  BatchArgs a{};
  a.rows = *rows;
  a.seqs = *seqs;
  a.seq_logps = seq_logps;
  a.seq_saved = seq_saved;
  a.wide = a.seq_logps_double = is_wide(*rows);
  return a;
}

}  // namespace
}  // namespace dpo_fast

using namespace dpo_fast;

int64_t dpo_fast_forward_scratch_bytes(const Rows* rows) {
  return is_split(*rows) ? rows->n_rows * pieces_of(rows->vocab).count * (int64_t)sizeof(RowPart) : 0;
}

int dpo_fast_forward(const Rows* rows, const TokenArrays* out, void* scratch, void* stream) {
  if (rows->n_rows == 0) return 0;
  RowPart* parts = is_split(*rows) ? (RowPart*)scratch : nullptr;
  const ForwardArgs a{*rows, *out, parts, pieces_of(rows->vocab), pieces_per_block(*rows), 0};
  return launch_for(*rows, kForward, a, stream);
}

int dpo_fast_sequences(const Rows* rows, const Sequences* seqs, const void* logps, void* seq_logps,
                       int seq_logps_double, double* seq_saved, void* stream) {
  if (seqs->n_seqs == 0) return 0;
  BatchArgs a = batch_of_rows(rows, seqs, seq_logps, seq_saved);
  a.tokens.logps = (void*)logps;
  a.seq_logps_double = a.seq_logps_double || seq_logps_double;
  return launch_batch(a, stream);
}

int dpo_fast_sequences_and_losses(const Rows* rows, const Sequences* seqs, const Pairs* pairs,
                                  const LossOptions* options, const TokenArrays* tokens, int wpo, const void* ref_logps,
                                  int ref_double, void* seq_logps, double* seq_saved, const Losses* out, void* stream) {
  BatchArgs a = batch_of_rows(rows, seqs, seq_logps, seq_saved);
  a.tokens = *tokens;
  a.wpo = wpo;
  a.pairs = *pairs;
  a.options = *options;
  a.numbers = SequenceNumbers{seq_saved + kSeqGrad,
                              reads_lengths(*options) ? seq_saved + kLength : nullptr,
                              wpo ? seq_saved + kSeqWeight : nullptr,
                              kSeqSaved,
                              seqs->n_seqs,
                              ref_logps,
                              true,
                              ref_double != 0,
                              !a.wide,
                              any_term(*options, kUnpaired)};
  a.out = *out;
  return launch_batch(a, stream);
}

int dpo_fast_losses(const Pairs* pairs, const LossOptions* options, int wide, int round_sums, int64_t n_seqs,
                    const void* logps, const void* ref_logps, int ref_double, const double* lengths, const Losses* out,
                    void* stream) {
  BatchArgs a{};
  a.pairs = *pairs;
  a.options = *options;
  a.numbers = SequenceNumbers{logps,           lengths,
                              nullptr,         1,
                              n_seqs,          ref_logps,
                              wide != 0,       ref_double != 0,
                              round_sums != 0, any_term(*options, kUnpaired)};
  a.out = *out;
  a.wide = wide;
  return launch_batch(a, stream);
}

int dpo_fast_losses_backward(const Pairs* pairs, int wide, int64_t n_seqs, const double* pair_grads, const Grads* grads,
                             void* grad_logps, void* stream) {
  if (n_seqs == 0) return 0;
  return launch_seq_grads(SeqGradArgs{*pairs, *grads, n_seqs, pair_grads, grad_logps, wide != 0, wide != 0, 0}, stream);
}

int dpo_fast_backward(const Rows* rows, const Sequences* seqs, const Pairs* pairs, const TokenArrays* saved,
                      const double* seq_saved, const double* pair_grads, const Grads* grads, const GradTensor* out,
                      double* scratch, void* stream) {
  if (rows->n_rows == 0) return 0;
  BackwardArgs a{};
  a.rows = *rows;
  a.saved = *saved;
  a.grads = *grads;
  a.out = *out;
  a.pieces = pieces_of(rows->vocab);
  a.unit = unit_scale(rows->transform);
  if (seqs) {
    a.seqs = *seqs;
    a.seq_saved = seq_saved;
  }
  if (grads->losses && seqs) {
    const int status = launch_seq_grads(
        SeqGradArgs{*pairs, *grads, seqs->n_seqs, pair_grads, scratch, is_wide(*rows), true, 0}, stream);
    if (status != 0) return status;
    a.seq_grads = scratch;
  }
  return launch_for(*rows, kBackward, a, stream);
}

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

// As many blocks of the forward kernel there should be: enough to fill a large GPU a few times over, so that the last
// blocks to run cost little, and not more, because each begins and ends with some microseconds of waiting.
constexpr int64_t kEnoughBlocks = 2048;
// Positions within a piece are 32-bit numbers.
constexpr int64_t kMaxVocab = (int64_t)1 << 34;

// How many of a row's pieces a block takes.
int pieces_per_block(const CudaRows& rows) {
  const int pieces = pieces_of(rows.vocab).count;
  if (rows.n_rows >= kEnoughBlocks) return pieces;
  const int64_t share = rows.n_rows * pieces / kEnoughBlocks;
  return share > 1 ? (int)share : 1;
}

bool is_split(const CudaRows& rows) { return pieces_per_block(rows) < pieces_of(rows.vocab).count; }

// Calls `launch<T, kCapped>(args, stream)`, or another function of that form, for the rows' type and transform.
template <class Args>
using Launch = int (*)(Args, void*);

template <class Args>
int launch_for(const CudaRows& rows, const Launch<Args> (&table)[kLogitTypes][2], const Args& args, void* stream) {
  if (rows.logit_type < 0 || rows.logit_type >= kLogitTypes || rows.vocab >= kMaxVocab) return cudaErrorInvalidValue;
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

BatchArgs batch_of_rows(const CudaRows* rows, const CudaSeqs* seqs, void* seq_logps, double* seq_saved) {
  BatchArgs a{};
  a.rows = *rows;
  a.seqs = *seqs;
  a.seq_logps = seq_logps;
  a.seq_saved = seq_saved;
  a.wide = a.seq_logps_double = rows->logit_type == kFloat64;
  return a;
}

void set_losses(BatchArgs& a, const CudaPairs* pairs, const LossOptions* options, const void* ref_logps, int ref_double,
                const CudaLosses* out) {
  a.pairs = *pairs;
  a.options = *options;
  a.ref_logps = ref_logps;
  a.ref_double = ref_double;
  a.out = *out;
  for (int i = 0; i < options->n_terms; ++i) a.unpaired = a.unpaired || loss_flags(options->types[i]) & kUnpaired;
}

}  // namespace
}  // namespace dpo_fast

using namespace dpo_fast;

int64_t dpo_fast_forward_scratch_bytes(const CudaRows* rows) {
  return is_split(*rows) ? rows->n_rows * pieces_of(rows->vocab).count * (int64_t)sizeof(RowPart) : 0;
}

int dpo_fast_forward(const CudaRows* rows, const TokenArrays* out, void* scratch, void* stream) {
  if (rows->n_rows == 0) return 0;
  RowPart* parts = is_split(*rows) ? (RowPart*)scratch : nullptr;
  const ForwardArgs a{*rows, *out, parts, pieces_of(rows->vocab), pieces_per_block(*rows), 0};
  return launch_for(*rows, kForward, a, stream);
}

int dpo_fast_sequences(const CudaRows* rows, const CudaSeqs* seqs, const void* logps, void* seq_logps,
                       int seq_logps_double, double* seq_saved, void* stream) {
  if (seqs->n_seqs == 0) return 0;
  BatchArgs a = batch_of_rows(rows, seqs, seq_logps, seq_saved);
  a.tokens.logps = (void*)logps;
  a.seq_logps_double = a.seq_logps_double || seq_logps_double;
  return launch_batch(a, stream);
}

int dpo_fast_sequences_and_losses(const CudaRows* rows, const CudaSeqs* seqs, const CudaPairs* pairs,
                                  const LossOptions* options, const TokenArrays* tokens, const void* ref_logps,
                                  int ref_double, void* seq_logps, double* seq_saved, const CudaLosses* out,
                                  void* stream) {
  BatchArgs a = batch_of_rows(rows, seqs, seq_logps, seq_saved);
  a.tokens = *tokens;
  a.wpo = tokens->log_sum_sq_probs != nullptr;
  set_losses(a, pairs, options, ref_logps, ref_double, out);
  return launch_batch(a, stream);
}

int dpo_fast_losses(const CudaPairs* pairs, const LossOptions* options, int wide, int64_t n_seqs, const void* logps,
                    const void* ref_logps, int ref_double, const double* lengths, const CudaLosses* out, void* stream) {
  BatchArgs a{};
  a.seqs.n_seqs = n_seqs;
  a.logps = logps;
  a.lengths = lengths;
  a.wide = wide;
  set_losses(a, pairs, options, ref_logps, ref_double, out);
  return launch_batch(a, stream);
}

int dpo_fast_losses_backward(const CudaPairs* pairs, int wide, int64_t n_seqs, const double* pair_grads,
                             const void* grad_loss, const void* grad_losses, void* grad_logps, void* stream) {
  if (n_seqs == 0) return 0;
  return launch_seq_grads(
      SeqGradArgs{*pairs, n_seqs, pair_grads, grad_loss, grad_losses, grad_logps, wide != 0, wide != 0, 0}, stream);
}

int dpo_fast_backward(const CudaRows* rows, const CudaSeqs* seqs, const CudaPairs* pairs, const TokenArrays* saved,
                      const double* seq_saved, const double* pair_grads, const CudaGrads* grads, const GradTensor* out,
                      double* scratch, void* stream) {
  if (rows->n_rows == 0) return 0;
  BackwardArgs a{};
  a.rows = *rows;
  a.saved = *saved;
  a.grads = *grads;
  a.out = *out;
  a.pieces = pieces_of(rows->vocab);
  if (seqs) {
    a.seqs = *seqs;
    a.seq_saved = seq_saved;
  }
  if (grads->losses && seqs) {
    const bool wide = rows->logit_type == kFloat64;
    const int status = launch_seq_grads(
        SeqGradArgs{*pairs, seqs->n_seqs, pair_grads, grads->loss, grads->losses, scratch, wide, true, 0}, stream);
    if (status != 0) return status;
    a.seq_grads = scratch;
  }
  return launch_for(*rows, kBackward, a, stream);
}

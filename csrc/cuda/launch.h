// The CUDA launchers: what dpo_fast/_cuda.pyx calls. Each one puts its kernels on a stream and returns the launch's
// cudaError_t; none allocates, copies or waits, so that a CUDA graph can hold them. All pointers are device memory.
// Float arrays beside the logits are float32, or float64 when the logits are (`wide`), unless a struct says otherwise.
#pragma once

#include <stdint.h>

#include "../cpu/rows.h"
#include "../preference_loss.h"

namespace dpo_fast {

// The rows of one call, as Rows in cpu/rows.h.
struct CudaRows {
  const void* logits;
  const int64_t* targets;   // [rows, n_targets]
  const uint8_t* row_mask;  // [rows], null: every row counts
  const void* weights;      // [rows], null: 1; a row of weight 0 is ignored
  LogitTransform transform;
  int64_t seq_stride, row_stride, vocab_stride;  // in elements
  int64_t rows_per_seq, n_rows, vocab, n_targets;
  int64_t ignore_index;    // kIgnoreNothing: no target
  int32_t logit_type;      // LogitType
  int32_t weights_double;  // weights are float64, else float32
};

// Which rows a sequence is made of.
struct CudaSeqs {
  const void* cu_seqlens;  // [n_seqs + 1], null: rows_per_seq each
  int64_t n_seqs;
  int32_t cu_int64;  // cu_seqlens are int64, else int32
  int32_t average;   // by the sum of the weights
};

// Which sequences a pair is made of, and how pairs add up.
struct CudaPairs {
  const int64_t* pairs;  // [n_pairs, 2], null: first half chosen, second half rejected; -1 in it: no such side
  int64_t n_pairs;
  const double* weights;   // [n_pairs], null: 1
  const double* baseline;  // [], null: that of the options
  double divisor;          // of the sum over pairs
};

// What the losses leave, [n_pairs] or [n_pairs, 2]; `wide` types but for pair_grads.
struct CudaLosses {
  void* loss;  // []
  void* losses;
  void* chosen_rewards;
  void* rejected_rewards;
  double* pair_grads;  // [n_pairs, 2]
};

// Incoming gradients; null: none.
struct CudaGrads {
  const void* token_logps;    // [rows, n_targets]
  const void* token_entropy;  // [rows]
  const void* seq_logps;      // [n_seqs]
  const void* loss;           // []
  const void* losses;         // [n_pairs]
};

// Columns of seq_saved: by what a sum of log-probs is multiplied (`average`), dloss/dlogp of the reduced loss, and what
// only the losses read: the number of targets and the weight of WPO.
enum SeqSaved { kFactor, kSeqGrad, kLength, kSeqWeight, kSeqSaved };

}  // namespace dpo_fast

extern "C" {
// Bytes of scratch that dpo_fast_forward needs for these rows; may be 0.
int64_t dpo_fast_forward_scratch_bytes(const dpo_fast::CudaRows* rows);

// Fills the arrays of `out` that are not null; logps and stats always are there.
int dpo_fast_forward(const dpo_fast::CudaRows* rows, const dpo_fast::TokenArrays* out, void* scratch, void* stream);

// seq_logps [n_seqs] from token log-probs. seq_saved [n_seqs, kSeqSaved] (float64) keeps what backward needs.
int dpo_fast_sequences(const dpo_fast::CudaRows* rows, const dpo_fast::CudaSeqs* seqs, const void* logps,
                       void* seq_logps, int seq_logps_double, double* seq_saved, void* stream);

// The same, the losses and their derivatives in one launch. ref_logps [n_seqs]: float64 if ref_double, null: none.
// tokens->log_sum_sq_probs not null: each pair weighs as in WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2).
int dpo_fast_sequences_and_losses(const dpo_fast::CudaRows* rows, const dpo_fast::CudaSeqs* seqs,
                                  const dpo_fast::CudaPairs* pairs, const dpo_fast::LossOptions* options,
                                  const dpo_fast::TokenArrays* tokens, const void* ref_logps, int ref_double,
                                  void* seq_logps, double* seq_saved, const dpo_fast::CudaLosses* out, void* stream);

// The losses alone, from log-probs [n_seqs]; lengths [n_seqs] (float64) where the loss reads them.
int dpo_fast_losses(const dpo_fast::CudaPairs* pairs, const dpo_fast::LossOptions* options, int wide, int64_t n_seqs,
                    const void* logps, const void* ref_logps, int ref_double, const double* lengths,
                    const dpo_fast::CudaLosses* out, void* stream);

// grad_logps [n_seqs] from the incoming gradients of loss and losses.
int dpo_fast_losses_backward(const dpo_fast::CudaPairs* pairs, int wide, int64_t n_seqs, const double* pair_grads,
                             const void* grad_loss, const void* grad_losses, void* grad_logps, void* stream);

// The gradient of the logits; out may be the logits. seqs null: gradients of tokens only. pairs, pair_grads and
// scratch (float64 [n_seqs]) are read only with grads->losses, which cost one launch more.
int dpo_fast_backward(const dpo_fast::CudaRows* rows, const dpo_fast::CudaSeqs* seqs, const dpo_fast::CudaPairs* pairs,
                      const dpo_fast::TokenArrays* saved, const double* seq_saved, const double* pair_grads,
                      const dpo_fast::CudaGrads* grads, const dpo_fast::GradTensor* out, double* scratch, void* stream);
}

// The CUDA launchers: what dpo_fast/_cuda.pyx calls. Each one puts its kernels on a stream and returns the launch's
// cudaError_t; none allocates, copies or waits, so a CUDA graph can hold them. All pointers are device memory; the
// structs, and the types that they point to, are those of ../sequence_math.h.
#pragma once

#include <stdint.h>

#include "../sequence_math.h"

namespace dpo_fast {

// Columns of seq_saved: the number that the sum of log-probs was divided by; the sequence's log-prob until the losses
// are known, dloss/dlogp of the reduced loss from then on; and what only the losses read, the number of targets and the
// weight of WPO.
enum SeqSaved { kNorm, kSeqGrad, kLength, kSeqWeight, kSeqSaved };

}  // namespace dpo_fast

extern "C" {
// Bytes of scratch that dpo_fast_forward needs for these rows; may be 0.
int64_t dpo_fast_forward_scratch_bytes(const dpo_fast::Rows* rows);

// Fills the arrays of `out` that are not null; logps always is there.
int dpo_fast_forward(const dpo_fast::Rows* rows, const dpo_fast::TokenArrays* out, void* scratch, void* stream);

// seq_logps [n_seqs] from token log-probs. seq_saved [n_seqs, kSeqSaved] (float64) keeps what backward needs.
int dpo_fast_sequences(const dpo_fast::Rows* rows, const dpo_fast::Sequences* seqs, const void* logps, void* seq_logps,
                       int seq_logps_double, double* seq_saved, void* stream);

// The same, the losses and their derivatives in one launch. ref_logps [n_seqs]: float64 if ref_double, null: none. wpo:
// each pair weighs as in WPO (Zhou et al. 2024, arXiv:2406.11827, eq. 2), by the log_sum_sq_probs of tokens. Pairs that
// are named need `order` and `offsets`.
int dpo_fast_sequences_and_losses(const dpo_fast::Rows* rows, const dpo_fast::Sequences* seqs,
                                  const dpo_fast::Pairs* pairs, const dpo_fast::LossOptions* options,
                                  const dpo_fast::TokenArrays* tokens, int wpo, const void* ref_logps, int ref_double,
                                  void* seq_logps, double* seq_saved, const dpo_fast::Losses* out, void* stream);

// The losses alone, from log-probs [n_seqs] (float64 if `wide`); lengths [n_seqs] (float64) where the loss reads them.
// round_sums: see SequenceNumbers.
int dpo_fast_losses(const dpo_fast::Pairs* pairs, const dpo_fast::LossOptions* options, int wide, int round_sums,
                    int64_t n_seqs, const void* logps, const void* ref_logps, int ref_double, const double* lengths,
                    const dpo_fast::Losses* out, void* stream);

// grad_logps [n_seqs] from the incoming gradients of loss and losses. Pairs that are named need `order` and `offsets`.
int dpo_fast_losses_backward(const dpo_fast::Pairs* pairs, int wide, int64_t n_seqs, const double* pair_grads,
                             const dpo_fast::Grads* grads, void* grad_logps, void* stream);

// The gradient of the logits; out may be the logits. seqs null: gradients of tokens only. pairs (with `order` and
// `offsets` if they are named), pair_grads and scratch (float64 [n_seqs]) are read only with grads->losses, which cost
// one launch more.
int dpo_fast_backward(const dpo_fast::Rows* rows, const dpo_fast::Sequences* seqs, const dpo_fast::Pairs* pairs,
                      const dpo_fast::TokenArrays* saved, const double* seq_saved, const double* pair_grads,
                      const dpo_fast::Grads* grads, const dpo_fast::GradTensor* out, double* scratch, void* stream);
}

// A whole batch on the CPU: loops over rows, sequences and pairs, in parallel where they are long. Each function is one
// fused operation. Values (targets, cu_seqlens, pairs) are checked before anything is read or written
// through them. They throw std::bad_alloc, and nothing else.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace dpo_fast {

enum Fault {
  kNoFault,
  kBadTarget,        // row `index`, its target number `k`
  kBadPair,          // entry `index` of pairs
  kSeqlensStart,     // cu_seqlens[0] is not 0
  kSeqlensDecrease,  // cu_seqlens[index + 1] < cu_seqlens[index]
  kSeqlensEnd,       // the last of cu_seqlens is not the number of rows
};

// The first value that was found wrong; nothing has been written then.
struct BatchStatus {
  int fault;  // Fault
  int64_t index, k;
};

// The end of a call at the level of the loss: what it reads beside the pairs.
struct References {
  const void* logps;  // [n_seqs], null: none
  bool is_double;     // else float32
};

// OpenMP's threads do not live on in a forked child: from here on, work in the calling thread.
void after_fork_in_child();
bool is_forked_child();

// Fills the arrays of `out` that are not null; logps has to be there, stats is what backward reads.
BatchStatus token_forward(const RowKernels& isa, const Rows& rows, int threads, const TokenArrays& out);

// The same and seq_logps [n_seqs] (float64 with double_sums).
BatchStatus sequence_forward(const RowKernels& isa, const Rows& rows, const Sequences& seqs, int threads,
                             const TokenArrays& tokens, void* seq_logps, bool double_sums);

// The same, the losses, and the derivatives by each pair's log-probs if losses.pair_grads is not null. With wpo, tokens
// has log_sum_sq_probs.
BatchStatus dpo_forward(const RowKernels& isa, const Rows& rows, const Sequences& seqs, const Pairs& pairs,
                        LossOptions options, int threads, bool wpo, const References& ref, const TokenArrays& tokens,
                        void* seq_logps, const Losses& losses);

// The gradient of the logits from what forward left and the incoming gradients; seqs and pairs may be null.
BatchStatus backward(const RowKernels& isa, const Rows& rows, const Sequences* seqs, const Pairs* pairs, int threads,
                     const TokenArrays& saved, const double* pair_grads, const Grads& grads, const GradTensor& out);

// As the end of dpo_forward, from log-probs [n_seqs] (float64 if `wide`) and lengths [n_seqs], null where no term reads
// them. round_sums: see SequenceNumbers.
BatchStatus preference_forward(const Pairs& pairs, LossOptions options, bool wide, bool round_sums, int64_t n_seqs,
                               const void* logps, const References& ref, const double* lengths, const Losses& losses);

// grad_logps [n_seqs] from the gradients of loss and losses.
BatchStatus preference_backward(const Pairs& pairs, bool wide, int64_t n_seqs, const double* pair_grads,
                                const Grads& grads, void* grad_logps);

}  // namespace dpo_fast

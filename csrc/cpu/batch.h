// Whole batches on the CPU: the loops over rows, sequences and pairs, in parallel where that pays. Each function is one
// fused operation; `backward` goes from gradients at any level to that of the logits. Functions whose input has values
// to check return a Fault, before anything is read or written through them.
#pragma once

#include "rows.h"

namespace dpo_fast {

enum FaultKind { kNoFault, kNoMemory, kTarget, kFirstBound, kFallingBound, kLastBound, kPairIndex };

// What is wrong with a value: where it is, and the value.
struct Fault {
  FaultKind kind = kNoFault;
  int64_t place = 0, second = 0, value = 0;
};

struct LossBatch {
  Sequences seqs;
  Pairs pairs;
  LossOptions options;
  Reference reference;
  LossOutputs out;
};

// A forked child has none of its parent's threads: it works in the calling one.
void set_forked();

Fault check_sequences(const Rows& rows, const Sequences& seqs);
Fault check_pairs(const Pairs& pairs, int64_t n_seqs, bool may_be_absent);

// Fills the arrays of `out` that are not null; logps always is there.
Fault forward_tokens(const Rows& rows, const TokenArrays& out, int threads);
// The same and seq_logps [n_seqs].
Fault forward_sequences(const Rows& rows, const Sequences& seqs, const TokenArrays& out, void* seq_logps,
                        bool seq_logps_double, int threads);
// The same and the losses. wpo: each pair weighs as in WPO; tokens.statistics[kStat_log_sum_sq_probs] is there then.
Fault forward_losses(const Rows& rows, const LossBatch& batch, const TokenArrays& tokens, bool wpo, void* seq_logps,
                     int threads);
// The losses from logps [n_seqs] alone; lengths [n_seqs] where the loss reads them.
Fault losses_of_logps(const LossBatch& batch, const void* logps, const double* lengths, bool wide);

// The gradient of the logits; out may be the logits. seqs null: gradients of tokens only. pairs null: none of losses.
Fault backward(const Rows& rows, const Sequences* seqs, const Pairs* pairs, const SavedArrays& saved,
               const double* pair_grads, const GradArrays& grads, const GradTensor& out, int threads);
// grad_logps [n_seqs] from the gradients of loss and losses.
Fault losses_backward(const Pairs& pairs, const double* pair_grads, const GradArrays& grads, int64_t n_seqs, bool wide,
                      void* grad_logps);

}  // namespace dpo_fast

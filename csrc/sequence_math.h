// From tokens to sequences to pairs: which rows count and with which weight, sums over sequences, which sequences make
// a pair, and what a pair contributes. The arithmetic of one row, sequence or pair, shared by the CPU and CUDA kernels;
// their loops are in cpu/batch.cpp and cuda/losses.cu.
#pragma once

#include <math.h>
#include <stdint.h>

#include "preference_loss.h"
#include "row_math.h"

namespace dpo_fast {

enum LogitType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kLogitTypes = 4;
constexpr int64_t kIgnoreNothing = INT64_MIN;

// The rows of one call: sequence s, position t starts at logits + (s * seq_stride + t * row_stride) elements.
// All float arrays beside the logits are float32, or float64 when the logits are (`wide`), unless it says otherwise.
struct RowBatch {
  void* logits;
  const int64_t* targets;   // [rows, n_targets]
  const uint8_t* row_mask;  // [rows], null: every row counts
  const void* weights;      // [rows], null: 1; a row of weight 0 is ignored
  LogitTransform transform;
  int64_t seq_stride, row_stride, vocab_stride;  // in elements
  int64_t rows_per_seq, n_rows, n_targets;
  int64_t vocab;         // columns that are read
  int64_t width;         // columns in memory: those from vocab on are padding, minus infinity
  int64_t ignore_index;  // kIgnoreNothing: no target
  int32_t logit_type;    // LogitType
  int32_t weights_double;
};

// Which rows a sequence is made of.
struct Sequences {
  const void* cu_seqlens;  // [n_seqs + 1], null: rows_per_seq each
  int64_t n_seqs;
  int32_t cu_int64;  // cu_seqlens are int64, else int32
  int32_t average;   // by the sum of the weights
};

// Which sequences a pair is made of, and how pairs add up.
struct Pairs {
  const int64_t* pairs;  // [n_pairs, 2], null: first half chosen, second half rejected; -1 in it: no such side
  int64_t n_pairs;
  const double* numbers[kPairNumbers];  // [n_pairs] each, or null
  const double* baseline;               // [], null: 0
  double divisor;                       // of the sum over pairs
  const int64_t* order;    // [2 n_pairs], the places in `pairs` sorted by sequence, and where each sequence's begin
  const int64_t* offsets;  // [n_seqs + 1]; both null where nobody reads them
};

// What the losses leave, [n_pairs] or [n_pairs, 2].
struct LossOutputs {
  void* loss;  // []
  void* losses;
  void* chosen_rewards;
  void* rejected_rewards;
  double* pair_grads;  // [n_pairs, 2]; may be null on the CPU
};

// Where backward writes: logits' own memory, or a fresh tensor with vocab_stride 1.
struct GradTensor {
  char* data;
  int64_t seq_stride, row_stride, vocab_stride;
};

// Incoming gradients; null: none.
struct GradArrays {
  const void* token_logps;  // [rows, n_targets]
  const void* entropy;      // [rows]
  const void* lse;          // [rows]
  const void* seq_logps;    // [n_seqs]
  const void* loss;         // []
  const void* losses;       // [n_pairs]
};

DPO_FAST_HD double load_number(const void* array, int64_t i, bool wide) {
  return wide ? ((const double*)array)[i] : ((const float*)array)[i];
}

DPO_FAST_HD void store_number(void* array, int64_t i, double x, bool wide) {
  if (wide)
    ((double*)array)[i] = x;
  else
    ((float*)array)[i] = (float)x;
}

// --- rows ------------------------------------------------------------------------------------------------------------

DPO_FAST_HD double row_weight(const RowBatch& rows, int64_t row) {
  return rows.weights ? load_number(rows.weights, row, rows.weights_double) : 1;
}

DPO_FAST_HD bool in_vocab(const RowBatch& rows, int64_t target) { return target >= 0 && target < rows.vocab; }

enum RowState { kIgnored, kKept, kBadTarget };

DPO_FAST_HD RowState row_state(const RowBatch& rows, int64_t row) {
  if (rows.row_mask && !rows.row_mask[row]) return kIgnored;
  if (rows.weights && row_weight(rows, row) == 0) return kIgnored;
  RowState state = kKept;
  for (int64_t k = 0; k < rows.n_targets; ++k) {
    const int64_t target = rows.targets[row * rows.n_targets + k];
    if (target == rows.ignore_index && rows.ignore_index != kIgnoreNothing) return kIgnored;
    if (!in_vocab(rows, target)) state = kBadTarget;
  }
  return state;
}

// --- sequences -------------------------------------------------------------------------------------------------------

DPO_FAST_HD int64_t seq_bound(const Sequences& seqs, int64_t s) {
  return seqs.cu_int64 ? ((const int64_t*)seqs.cu_seqlens)[s] : ((const int32_t*)seqs.cu_seqlens)[s];
}

struct RowRange {
  int64_t start, end;
};

// The rows of a sequence, none of them beyond the batch's, whatever cu_seqlens says.
DPO_FAST_HD RowRange rows_of(const RowBatch& rows, const Sequences& seqs, int64_t s) {
  if (!seqs.cu_seqlens) return RowRange{s * rows.rows_per_seq, (s + 1) * rows.rows_per_seq};
  RowRange range = {seq_bound(seqs, s), seq_bound(seqs, s + 1)};
  if (range.start < 0) range.start = 0;
  if (range.end > rows.n_rows) range.end = rows.n_rows;
  return range;
}

// Sums over the rows of a sequence.
struct SequenceSums {
  double logps;    // of w_n * logp_n
  double weights;  // of w_n
  double length;   // targets that are not ignore_index, whatever their weight
  double excess;   // of logp_n - log sum_v p_v^2
  double kept;     // rows that count
};

// Adds a row. log_sum_sq: null unless WPO reads it.
DPO_FAST_HD void add_row(SequenceSums& sums, const RowBatch& rows, int64_t row, const void* logps,
                         const void* log_sum_sq, bool wide) {
  sums.length += rows.targets[row * rows.n_targets] != rows.ignore_index;
  if (row_state(rows, row) == kIgnored) return;
  const double logp = load_number(logps, row, wide), weight = row_weight(rows, row);
  sums.logps += rows.weights ? logp * weight : logp;
  sums.weights += weight;
  sums.kept += 1;
  if (log_sum_sq) sums.excess += logp - load_number(log_sum_sq, row, wide);
}

// By what a sum of weighted log-probs, and its gradient, is multiplied. A sequence without weights has log-prob 0.
DPO_FAST_HD double sequence_factor(const SequenceSums& sums, const Sequences& seqs) {
  if (!seqs.average) return 1;
  return sums.weights != 0 ? 1 / sums.weights : 0;
}

DPO_FAST_HD double sequence_logp(const SequenceSums& sums, const Sequences& seqs) {
  if (!seqs.average) return sums.logps;
  return sums.weights != 0 ? sums.logps / sums.weights : 0;
}

// exp(mean_n(logp_n - log sum_v p_v^2)) (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2)
DPO_FAST_HD double wpo_weight(const SequenceSums& sums) { return sums.kept > 0 ? exp(sums.excess / sums.kept) : 1; }

// --- pairs -----------------------------------------------------------------------------------------------------------

struct PairIndex {
  int64_t chosen, rejected;
};

DPO_FAST_HD PairIndex pair_index(const Pairs& pairs, int64_t p) {
  if (!pairs.pairs) return PairIndex{p, p + pairs.n_pairs};
  return PairIndex{pairs.pairs[2 * p], pairs.pairs[2 * p + 1]};
}

DPO_FAST_HD double pair_number(const Pairs& pairs, int which, int64_t p, double absent) {
  return pairs.numbers[which] ? pairs.numbers[which][p] : absent;
}

// The reference's log-probs of sequences.
struct Reference {
  const void* logps;  // [n_seqs], null: none
  bool is_double;     // float64, else float32
  bool round_sums;    // the policy's sums come from logits below float64
};

// A side that is there. The policy's sum is rounded to float32 where the reference's was: equal models then give
// rewards of exactly 0. This is the one place of that rule.
DPO_FAST_HD Side present_side(double logp, int64_t s, const Reference& ref, double length) {
  if (ref.logps && ref.round_sums && !ref.is_double) logp = (float)logp;
  const double ratio = ref.logps ? logp - load_number(ref.logps, s, ref.is_double) : logp;
  return Side{true, logp, ratio, length, 0, 0};
}

DPO_FAST_HD Side absent_side() { return Side{false, 0, 0, 0, 0, 0}; }

DPO_FAST_HD Pair make_pair_of(const Side& chosen, const Side& rejected, const Pairs& pairs, int64_t p, double beta) {
  return Pair{chosen, rejected, pair_number(pairs, kPair_beta, p, beta), pair_number(pairs, kPair_margin, p, 0)};
}

// Writes what belongs to pair p; returns its weighted loss. A pair of weight 0 counts as none, whatever its numbers
// are.
DPO_FAST_HD double store_pair(const LossOutputs& out, int64_t p, const Pair& pair, PairLoss result, double weight,
                              bool wide) {
  double chosen = pair.chosen.present ? pair.beta * pair.chosen.ratio : NAN;
  double rejected = pair.rejected.present ? pair.beta * pair.rejected.ratio : NAN;
  if (weight == 0) {
    result = PairLoss{0, 0, 0};
    if (pair.chosen.present) chosen = 0;
    if (pair.rejected.present) rejected = 0;
  }
  store_number(out.losses, p, weight * result.loss, wide);
  store_number(out.chosen_rewards, p, chosen, wide);
  store_number(out.rejected_rewards, p, rejected, wide);
  if (out.pair_grads) {
    out.pair_grads[2 * p] = weight * result.d_chosen;
    out.pair_grads[2 * p + 1] = weight * result.d_rejected;
  }
  return weight * result.loss;
}

// g * the derivative of a pair; without a gradient 0, also where the derivative is NaN.
DPO_FAST_HD double pair_gradient(const double* pair_grads, int64_t place, double g) {
  return g != 0 ? g * pair_grads[place] : 0;
}

}  // namespace dpo_fast

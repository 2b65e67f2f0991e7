// Rows, sequences and pairs of a batch: the arrays of one call, and the arithmetic between a token's log-prob and the
// loss of a pair, both ways, shared by the CPU and CUDA kernels. Loops and the order of sums are the kernels' own.
//
// Float arrays beside the logits are float32, or float64 when the logits are (`wide`), unless a struct says otherwise;
// a null pointer is an array that was not given.
#pragma once

#include <math.h>
#include <stdint.h>

#include "preference_loss.h"
#include "row_math.h"

namespace dpo_fast {

enum LogitType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kLogitTypes = 4;

constexpr int64_t kIgnoreNothing = INT64_MIN;

// --- arrays ----------------------------------------------------------------------------------------------------------

// The rows of logits: sequence s, position t starts at logits + (s * seq_stride + t * row_stride) elements.
struct Rows {
  const void* logits;
  const int64_t* targets;   // [rows, n_targets]
  const uint8_t* row_mask;  // [rows], null: every row counts
  const void* weights;      // [rows], null: 1; a row of weight 0 is ignored
  LogitTransform transform;
  int64_t seq_stride, row_stride, vocab_stride;  // in elements
  int64_t rows_per_seq, n_rows, n_targets;
  int64_t width;           // columns in memory
  int64_t vocab;           // of these, columns that count: the rest is padding, minus infinity
  int64_t ignore_index;    // kIgnoreNothing: no target
  int32_t logit_type;      // LogitType
  int32_t weights_double;  // weights are float64, else float32
};

// The options of the logits, in the order of LogitOptions in dpo_fast/_checks.py: the name, whether it is a whole
// number, and where in Rows it is.
#define DPO_FAST_LOGIT_OPTIONS(X)                    \
  X(ignore_index, true, ignore_index)                \
  X(temperature, false, transform.temperature)       \
  X(logit_scale, false, transform.logit_scale)       \
  X(softcap, false, transform.softcap) /* 0: none */ \
  X(valid_vocab, true, vocab)          /* 0: width */

enum LogitOption {
#define DPO_FAST_OPTION(name, is_whole, place) kLogitOption_##name,
  DPO_FAST_LOGIT_OPTIONS(DPO_FAST_OPTION)
#undef DPO_FAST_OPTION
      kLogitOptions
};

struct LogitOptionTraits {
  const char* name;
  bool is_whole;
};

DPO_FAST_HD LogitOptionTraits logit_option_traits(int option) {
  switch (option) {
#define DPO_FAST_OPTION(name, is_whole, place) \
  case kLogitOption_##name: return LogitOptionTraits{#name, is_whole};
    DPO_FAST_LOGIT_OPTIONS(DPO_FAST_OPTION)
#undef DPO_FAST_OPTION
    default: return LogitOptionTraits{"", false};
  }
}

// One of the two values is the option's, by `is_whole`.
DPO_FAST_HD void set_logit_option(Rows& rows, int option, int64_t whole, double number) {
  switch (option) {
#define DPO_FAST_OPTION(name, is_whole, place) \
  case kLogitOption_##name: rows.place = is_whole ? (decltype(rows.place))whole : (decltype(rows.place))number; break;
    DPO_FAST_LOGIT_OPTIONS(DPO_FAST_OPTION)
#undef DPO_FAST_OPTION
  }
}

// The results of forward for each row; null where not wanted.
struct TokenArrays {
  void* logps;                    // [rows, n_targets]
  void* stats;                    // [rows, 2]: shift and 1 / sum
  void* statistics[kStatistics];  // [rows]; is_top1: uint8 [rows, n_targets]
};

// Which rows a sequence has.
struct Sequences {
  const void* cu_seqlens;  // [n_seqs + 1], null: rows_per_seq each
  int64_t n_seqs;
  int32_t cu_int64;  // cu_seqlens are int64, else int32
  int32_t average;   // log-probs are averages, by the sum of the weights
};

// Which sequences a pair has, and how pairs add up.
struct Pairs {
  const int64_t* pairs;  // [n_pairs, 2], null: first half chosen, second half rejected; -1 in it: no such side
  int64_t n_pairs;
  const double* numbers[kPairNumbers];  // [n_pairs] each
  const double* baseline;               // []
  double divisor;                       // of the sum over pairs
  // The entries 2 p + side of `pairs` sorted by sequence, and where each sequence's begin; CUDA only.
  const int64_t* order;    // [2 n_pairs]
  const int64_t* offsets;  // [n_seqs + 1]
};

// The results of the losses, [n_pairs] but for loss [] and pair_grads [n_pairs, 2].
struct Losses {
  void* loss;
  void* losses;
  void* chosen_rewards;
  void* rejected_rewards;
  double* pair_grads;  // derivatives of each pair's loss by its two log-probs
};

// Incoming gradients.
struct Grads {
  const void* token_logps;              // [rows, n_targets]
  const void* statistics[kStatistics];  // [rows], of those that have a gradient
  const void* seq_logps;                // [n_seqs]
  const void* loss;                     // []
  const void* losses;                   // [n_pairs]
};

// Where the gradient of the logits goes: their own memory, or a tensor of the same shape and type.
struct GradTensor {
  char* data;
  int64_t seq_stride, row_stride, vocab_stride;
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

DPO_FAST_HD bool is_wide(const Rows& rows) { return rows.logit_type == kFloat64; }

// Where in memory row `row` starts, in elements.
DPO_FAST_HD int64_t row_offset(int64_t row, int64_t rows_per_seq, int64_t seq_stride, int64_t row_stride) {
  const int64_t seq = row / rows_per_seq;
  return seq * seq_stride + (row - seq * rows_per_seq) * row_stride;
}

// Whether a statistic is asked for that takes more of a RowPart than shift and sum.
DPO_FAST_HD bool wants_extras(const TokenArrays& out) {
  for (int i = 0; i < kStatistics; ++i)
    if (out.statistics[i] && statistic_traits(i).takes_extras) return true;
  return false;
}

// --- rows ------------------------------------------------------------------------------------------------------------

DPO_FAST_HD double row_weight(const Rows& rows, int64_t row) {
  return rows.weights ? load_number(rows.weights, row, rows.weights_double) : 1;
}

DPO_FAST_HD bool in_vocab(const Rows& rows, int64_t target) { return target >= 0 && target < rows.vocab; }

enum { kRowIgnored = 0, kRowKept = 1 };

// Whether a row counts; -1 - k: it would, but its target k lies outside the vocabulary.
DPO_FAST_HD int64_t row_state(const Rows& rows, int64_t row) {
  if (rows.row_mask && !rows.row_mask[row]) return kRowIgnored;
  if (rows.weights && row_weight(rows, row) == 0) return kRowIgnored;
  int64_t state = kRowKept;
  for (int64_t k = 0; k < rows.n_targets; ++k) {
    const int64_t target = rows.targets[row * rows.n_targets + k];
    if (target == rows.ignore_index && rows.ignore_index != kIgnoreNothing) return kRowIgnored;
    if (!in_vocab(rows, target) && state == kRowKept) state = -1 - k;
  }
  return state;
}

// The gradient that comes in for target i (of all rows) of a row whose sequence gives each of its log-probs `from_seq`;
// NaN for a target outside the vocabulary.
DPO_FAST_HD double target_incoming(const Rows& rows, const Grads& grads, int64_t i, double from_seq) {
  if (!in_vocab(rows, rows.targets[i])) return NAN;
  return from_seq + (grads.token_logps ? load_number(grads.token_logps, i, is_wide(rows)) : 0);
}

DPO_FAST_HD RowIncoming row_incoming(const Rows& rows, const Grads& grads, int64_t row, double from_seq) {
  RowIncoming in = {0, 0, 0, false};
  for (int64_t i = row * rows.n_targets; i < (row + 1) * rows.n_targets; ++i) {
    const double g = target_incoming(rows, grads, i, from_seq);
    in.logps += g;
    in.any = in.any || g != 0;
  }
  const void* entropy = grads.statistics[kStatistic_entropy];
  const void* lse = grads.statistics[kStatistic_lse];
  if (entropy) in.entropy = load_number(entropy, row, is_wide(rows));
  if (lse) in.lse = load_number(lse, row, is_wide(rows));
  in.any = in.any || in.entropy != 0 || in.lse != 0;
  return in;
}

// --- sequences -------------------------------------------------------------------------------------------------------

DPO_FAST_HD int64_t seq_bound(const Sequences& seqs, int64_t s) {
  return seqs.cu_int64 ? ((const int64_t*)seqs.cu_seqlens)[s] : ((const int32_t*)seqs.cu_seqlens)[s];
}

struct RowRange {
  int64_t start, end;
};

// The rows of sequence s, within those there are whatever cu_seqlens say: CUDA does not check them.
DPO_FAST_HD RowRange seq_rows(const Rows& rows, const Sequences& seqs, int64_t s) {
  if (!seqs.cu_seqlens) return RowRange{s * rows.rows_per_seq, (s + 1) * rows.rows_per_seq};
  const int64_t start = seq_bound(seqs, s), end = seq_bound(seqs, s + 1);
  return RowRange{start < 0 ? 0 : start, end > rows.n_rows ? rows.n_rows : end};
}

// Sums over a sequence's rows. Those that are ignored count in `length` alone, and there only if they have a target.
struct SequenceSums {
  double logp;      // of weight * log-prob
  double weight;    // of the weights
  double length;    // targets that are not ignore_index, whatever their weight
  double surprise;  // of log p - log sum_v p_v^2 (only with wpo)
  double kept;      // rows
};

DPO_FAST_HD void add_row(SequenceSums& sums, const Rows& rows, const TokenArrays& tokens, int64_t row, bool wpo) {
  const double logp = load_number(tokens.logps, row, is_wide(rows)), weight = row_weight(rows, row);
  const double squares = wpo ? load_number(tokens.statistics[kStatistic_log_sum_sq_probs], row, is_wide(rows)) : 0;
  sums.length += rows.targets[row] != rows.ignore_index;
  if (row_state(rows, row) == kRowIgnored) return;
  sums.logp += logp * weight;
  sums.weight += weight;
  sums.surprise += logp - squares;
  sums.kept += 1;
}

// The number that a sequence's sum of log-probs is divided by.
DPO_FAST_HD double seq_norm(const SequenceSums& sums, bool average) { return average ? sums.weight : 1; }

// 0 for a sequence without rows that count.
DPO_FAST_HD double seq_logp(const SequenceSums& sums, double norm) { return norm != 0 ? sums.logp / norm : 0; }

// exp(mean_n(log p_n - log sum_v p_v^2)) (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2)
DPO_FAST_HD double wpo_weight(const SequenceSums& sums) { return sums.kept > 0 ? exp(sums.surprise / sums.kept) : 1; }

// A sequence's gradient as it reaches each log-prob of a row. One of 0 is dropped, whatever norm and weight are.
DPO_FAST_HD double grad_from_seq(double grad_seq, double norm, double weight) {
  return grad_seq == 0 || norm == 0 ? 0 : grad_seq / norm * weight;
}

// --- pairs -----------------------------------------------------------------------------------------------------------

struct PairIndex {
  int64_t chosen, rejected;
};

DPO_FAST_HD PairIndex pair_index(const Pairs& pairs, int64_t p) {
  if (!pairs.pairs) return PairIndex{p, p + pairs.n_pairs};
  return PairIndex{pairs.pairs[2 * p], pairs.pairs[2 * p + 1]};
}

// The numbers of sequences that losses read. Those of sequence s are at s * stride.
struct SequenceNumbers {
  const void* logps;
  const double* lengths;  // null: 0
  const double* weights;  // of WPO, null: 1
  int64_t stride;
  int64_t n_seqs;
  const void* ref_logps;  // [n_seqs], null: none
  bool logps_double;      // logps are float64, else float32
  bool ref_double;        // ref_logps are float64, else float32
  bool round_sums;        // logps are sums for logits of a type below float64
  bool unpaired;          // a side of -1 is absent, else an error
};

// The length of sequence s, 0 for a side that is absent; NaN where there should be one and is none.
DPO_FAST_HD double length_of(const SequenceNumbers& q, int64_t s) {
  if (s == -1 && q.unpaired) return 0;
  if (s < 0 || s >= q.n_seqs) return NAN;
  return q.lengths ? q.lengths[s * q.stride] : 0;
}

DPO_FAST_HD Side side_of(const SequenceNumbers& q, int64_t s) {
  if (s == -1 && q.unpaired) return Side{false, 0, 0, 0, 0, 0};
  Side side = {true, NAN, NAN, length_of(q, s), 0, 0};
  if (s < 0 || s >= q.n_seqs) return side;
  side.logp = load_number(q.logps, s * q.stride, q.logps_double);
  // rounded as the reference's were: equal models give rewards of exactly 0
  if (q.ref_logps && !q.ref_double && q.round_sums) side.logp = (float)side.logp;
  side.ratio = q.ref_logps ? side.logp - load_number(q.ref_logps, s, q.ref_double) : side.logp;
  return side;
}

// Pair p as the loss reads it. Of a pair of weight 0 nothing is read but its numbers.
DPO_FAST_HD Pair pair_of(const Pairs& pairs, const LossOptions& o, const SequenceNumbers& q, int64_t p) {
  Pair pair = {};
#define DPO_FAST_NUMBER(name, otherwise) \
  pair.name = pairs.numbers[kNumber_##name] ? pairs.numbers[kNumber_##name][p] : otherwise;
  DPO_FAST_PAIR_NUMBERS(DPO_FAST_NUMBER)
#undef DPO_FAST_NUMBER
  pair.present = pair.weight != 0;
  if (!pair.present) return pair;
  const PairIndex index = pair_index(pairs, p);
  pair.chosen = side_of(q, index.chosen);
  pair.rejected = side_of(q, index.rejected);
  if (q.weights && pair.chosen.present && pair.rejected.present) {
    const bool inside =
        index.chosen >= 0 && index.chosen < q.n_seqs && index.rejected >= 0 && index.rejected < q.n_seqs;
    pair.weight *= inside ? q.weights[index.chosen * q.stride] * q.weights[index.rejected * q.stride] : NAN;
  }
  return pair;
}

DPO_FAST_HD double pair_reward(const Pair& pair, const Side& side) {
  if (!pair.present) return 0;
  return side.present ? pair.beta * side.ratio : NAN;
}

// Writes the results of pair p; returns its weighted loss. A weight of 0 wins over an infinite or undefined loss.
DPO_FAST_HD double store_pair(const Losses& out, const Pair& pair, const PairLoss& result, int64_t p, bool wide) {
  const double loss = vanishing(pair.weight, result.loss);
  store_number(out.losses, p, loss, wide);
  store_number(out.chosen_rewards, p, pair_reward(pair, pair.chosen), wide);
  store_number(out.rejected_rewards, p, pair_reward(pair, pair.rejected), wide);
  if (out.pair_grads) {
    out.pair_grads[2 * p] = vanishing(pair.weight, result.d_chosen);
    out.pair_grads[2 * p + 1] = vanishing(pair.weight, result.d_rejected);
  }
  return loss;
}

// The part of every pair's incoming gradient that comes by way of the reduced loss, and all of pair p's. It multiplies
// the pair's derivatives by `vanishing`: where it is 0 they are dropped, for one may be NaN.
DPO_FAST_HD double common_incoming(const Pairs& pairs, const Grads& grads, bool wide) {
  return grads.loss ? load_number(grads.loss, 0, wide) / pairs.divisor : 0;
}

DPO_FAST_HD double pair_incoming(double common, const Grads& grads, int64_t p, bool wide) {
  return common + (grads.losses ? load_number(grads.losses, p, wide) : 0);
}

}  // namespace dpo_fast

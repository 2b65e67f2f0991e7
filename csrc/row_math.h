// Per-row formulas that the CPU and CUDA kernels share: how a row of logits is transformed, how partial sums over
// pieces of a row merge, how merged sums become log-probability, entropy and the other per-token statistics, and what
// the backward pass makes of them. A new statistic is one line in DPO_FAST_STATISTICS and one in row_statistic.
//
// The partial sums are those of the online softmax (Milakov & Gimelshein, 2018, arXiv:1805.02867): everything is
// relative to a `shift` near the maximum, so that exp neither overflows nor loses the largest term.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define DPO_FAST_HD __host__ __device__ inline
#else
#define DPO_FAST_HD static inline
#endif

namespace dpo_fast {

// z = softcap * tanh(x * logit_scale / softcap) / temperature, without the tanh when softcap is 0.
struct LogitTransform {
  double logit_scale;
  double temperature;
  double softcap;  // 0: none
};

// Kernels work in a "shift domain" in which subtracting the shift is exact: the raw logits x when the transform is a
// plain scaling, the transformed z when it is not. unit_scale leads from there to z.
DPO_FAST_HD double unit_scale(const LogitTransform& t) { return t.softcap > 0 ? 1.0 : t.logit_scale / t.temperature; }

// Sums over a piece of a row, with d = z - shift and e = exp(d).
struct RowPart {
  double shift;    // in the shift domain
  double sum;      // of e
  double sum_ed;   // of e * d        (only with extras)
  double sum_sq;   // of e^2          (only with extras)
  double sum_z;    // of z            (only with extras)
  double max;      // in the domain of the raw logits; NaNs are passed over
  int64_t argmax;  // first position of the maximum (only with extras)
};

DPO_FAST_HD RowPart empty_part() { return RowPart{-INFINITY, 0, 0, 0, 0, -INFINITY, -1}; }

// Expresses the part's sums relative to a larger shift.
DPO_FAST_HD void reshift(RowPart& part, double shift, double unit) {
  if (part.shift == shift) return;
  const double d = (part.shift - shift) * unit;
  const double f = exp(d);
  // An empty sum has shift -inf: 0 * -inf would make it NaN.
  part.sum_ed = part.sum == 0 ? 0 : (part.sum_ed + part.sum * d) * f;
  part.sum *= f;
  part.sum_sq *= f * f;
  part.shift = shift;
}

// Appends `next`, the piece that follows `part` in the row.
DPO_FAST_HD void merge_parts(RowPart& part, RowPart next, double unit) {
  const double shift = next.shift > part.shift ? next.shift : part.shift;
  reshift(part, shift, unit);
  reshift(next, shift, unit);
  part.sum += next.sum;
  part.sum_ed += next.sum_ed;
  part.sum_sq += next.sum_sq;
  part.sum_z += next.sum_z;
  if (next.max > part.max) {  // strictly: ties stay with the first position
    part.max = next.max;
    part.argmax = next.argmax;
  }
}

// The per-token statistics beside the log-prob: the name, whether it takes more of a RowPart than shift and sum, and
// whether it has a gradient.
#define DPO_FAST_STATISTICS(X)     \
  X(entropy, true, true)           \
  X(mean_logits, true, false)      \
  X(is_top1, true, false)          \
  X(log_sum_sq_probs, true, false) \
  X(lse, false, true)

enum Statistic {
#define DPO_FAST_STATISTIC(name, extras, has_gradient) kStatistic_##name,
  DPO_FAST_STATISTICS(DPO_FAST_STATISTIC)
#undef DPO_FAST_STATISTIC
      kStatistics
};

struct StatisticTraits {
  const char* name;
  bool takes_extras, has_gradient;
};

DPO_FAST_HD StatisticTraits statistic_traits(int statistic) {
  switch (statistic) {
#define DPO_FAST_STATISTIC(name, extras, has_gradient) \
  case kStatistic_##name: return StatisticTraits{#name, extras, has_gradient};
    DPO_FAST_STATISTICS(DPO_FAST_STATISTIC)
#undef DPO_FAST_STATISTIC
    default: return StatisticTraits{"", false, false};
  }
}

// log p of an entry whose value in the shift domain is `value`.
DPO_FAST_HD double row_logp(const RowPart& part, double value, double unit) {
  return (value - part.shift) * unit - log(part.sum);
}

// The value of a statistic that is one number per row; all but is_top1, which is a bool per target.
DPO_FAST_HD double row_statistic(int statistic, const RowPart& part, double unit, int64_t vocab) {
  switch (statistic) {
    case kStatistic_entropy:  // H = -sum_v p_v log p_v
      return log(part.sum) - part.sum_ed / part.sum;
    case kStatistic_mean_logits: return part.sum_z / (double)vocab;
    case kStatistic_log_sum_sq_probs:  // log sum_v p_v^2
      return log(part.sum_sq) - 2 * log(part.sum);
    case kStatistic_lse:  // log sum_v exp(z_v)
      return part.shift * unit + log(part.sum);
    default: return NAN;
  }
}

// Whether `target` is the first of the row's largest logits. Without a largest one (all -inf, which a soft-cap makes
// finite) the first logit counts.
DPO_FAST_HD bool row_is_top1(const RowPart& part, int64_t target) {
  return (part.argmax < 0 ? 0 : part.argmax) == target && part.sum > 0;
}

// The gradients that come in for one row.
struct RowIncoming {
  double logps;    // the sum over the row's targets
  double entropy;  // of its statistics
  double lse;
  bool any;  // one of them all is not 0; otherwise the row's gradient is 0, whatever its logits
};

// A row's coefficients in the backward pass:
//   dz_v = e_v * (coef + entropy_coef * (d_v - mean_d))  + the true-class terms.
struct RowGrad {
  double shift;
  double coef;          // (gradient of the lse - sum of the gradients of the log-probs) / sum
  double entropy_coef;  // -(gradient of the entropy) / sum
  double mean_d;        // sum_v p_v d_v
};

// `entropy` is read only where its gradient is not 0.
DPO_FAST_HD RowGrad row_grad(double shift, double inv_sum, double entropy, const RowIncoming& in) {
  // entropy = log(sum) - mean_d
  return RowGrad{shift, (in.lse - in.logps) * inv_sum, -in.entropy * inv_sum, -log(inv_sum) - entropy};
}

// dz at a target: g is the gradient of the log-probs of this very entry, part of in.logps. 1 - p is formed by expm1, so
// that a confident token keeps its small gradient.
DPO_FAST_HD double target_grad(double logp, double g, double entropy, const RowIncoming& in) {
  const double p = exp(logp);
  double dz = -g * expm1(logp);
  if (in.logps != g) dz -= (in.logps - g) * p;
  if (in.lse != 0) dz += in.lse * p;
  if (in.entropy != 0 && p > 0) dz -= in.entropy * p * (logp + entropy);
  return dz;
}

// dz/dx of the transform at the raw logit x.
DPO_FAST_HD double transform_slope(const LogitTransform& t, double x) {
  const double slope = t.logit_scale / t.temperature;
  if (t.softcap <= 0) return slope;
  const double u = tanh(x * t.logit_scale / t.softcap);
  return slope * (1 - u * u);
}

}  // namespace dpo_fast

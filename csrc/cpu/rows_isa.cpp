// The SIMD row functions. setup.py compiles this file once per instruction set, with DPO_FAST_ISA naming it.
#include "rows.h"
#include "simd.h"
#include "transform.h"

namespace dpo_fast {
namespace DPO_FAST_ISA {
namespace {

// A block stays in the first-level cache: it may be read twice, and sums in float cover at most one block.
constexpr int64_t kBlockLogits = 2048;
// Vectors per loop turn: independent accumulators hide the latency of the additions.
constexpr int kUnroll = 4;
// The shift follows the maximum only when it is passed by this much (in z): fewer restarts, and exp(kSlack) is far from
// overflow. It stays small because the rounding of x - shift grows with it. One rule with and without extras: a
// log-prob's bits must not depend on the statistics asked for beside it.
constexpr double kSlack = 8;
// Entropy is a difference of two numbers that grow with the distance from the shift to the maximum, too much for it:
// e * d is summed with d from the largest logit so far (`top`), and the difference to the shift is added in double.
constexpr int kPrefetchBytes = 8192;

template <class V>
struct BlockSums {
  V sum[kUnroll], max[kUnroll], sum_ed[kUnroll], sum_sq[kUnroll], sum_z[kUnroll];
};

// Means are summed over z / 1024, so that logits near float's limit do not overflow a block's sum.
constexpr double kMeanScale = 1024;

template <class Io>
constexpr int64_t kTurn = kUnroll / Io::kVectors * Io::kElements;

// Asks for cache lines that will be read some kPrefetchBytes later: with some 20 instructions between two lines, too
// few of them are in flight without it. Lines of both halves of the block ahead take turns: two streams, each in its
// own pages, are fetched faster than one (docs/performance.md). An address beyond the logits does no harm.
template <class Io>
DPO_FAST_INLINE void prefetch_turn(const typename Io::Storage* x) {
  constexpr int kBytes = kTurn<Io> * sizeof(*x);
  const char* p = (const char*)x + kPrefetchBytes - (uintptr_t)x % kPrefetchBytes / 2;
  for (int i = 0; i < kBytes; i += 128) {
    __builtin_prefetch(p + i / 2);
    __builtin_prefetch(p + i / 2 + kPrefetchBytes / 2);
  }
}

// From values + n on: zeros and then n ones, as forward_turn's `inside`.
template <class Io>
struct Last {
  typename Io::Storage values[2 * kTurn<Io>];
  constexpr Last() : values() {
    for (int64_t i = kTurn<Io>; i < 2 * kTurn<Io>; ++i) values[i] = Io::kOne;
  }
};
template <class Io>
constexpr Last<Io> kLast;

// Adds one turn of kUnroll vectors. In the row's last turn (kTail) only the lanes that `inside` marks count.
template <class Io, TransformKind kKind, bool kExtras, bool kTail>
DPO_FAST_INLINE void forward_turn(const typename Io::Storage* x, const typename Io::Storage* inside,
                                  typename Io::Vec shift, typename Io::Vec top, const Consts<typename Io::Vec>& c,
                                  BlockSums<typename Io::Vec>& s) {
  using V = typename Io::Vec;
  V v[kUnroll], in[kUnroll];
  for (int k = 0; k < kUnroll; k += Io::kVectors) {
    Io::load(x + k / Io::kVectors * Io::kElements, v + k);
    if constexpr (kTail) Io::load(inside + k / Io::kVectors * Io::kElements, in + k);
  }
  for (int k = 0; k < kUnroll; ++k) {
    s.max[k] = maximum(v[k], s.max[k]);
    const V y = shift_domain<kKind>(v[k], c);
    V d = to_z<kKind>(y - shift, c);
    if constexpr (kTail) d = in[k] > splat<V>(0) ? d : splat<V>(-INFINITY);
    const V e = exponential<Io::kShortExp>(d);
    s.sum[k] += e;
    if constexpr (kExtras) {
      // bounded below: 0 * -inf would be NaN
      s.sum_ed[k] = multiply_add(e, maximum(splat<V>(kExpLow<V>), to_z<kKind>(y - top, c)), s.sum_ed[k]);
      s.sum_sq[k] = multiply_add(e, e, s.sum_sq[k]);
      V z = to_z<kKind>(y, c);
      if constexpr (kTail) z = in[k] > splat<V>(0) ? z : splat<V>(0);
      s.sum_z[k] = multiply_add(z, splat<V>(1 / kMeanScale), s.sum_z[k]);
    }
  }
}

// Sums over one block of n <= kBlockLogits contiguous logits relative to `shift`, but sum_ed has d relative to `top`;
// max is of the raw logits.
template <class Io, TransformKind kKind, bool kExtras>
RowPart forward_block(const typename Io::Storage* x, int64_t n, double shift, double top,
                      const Consts<typename Io::Vec>& c) {
  using V = typename Io::Vec;
  using Scalar = typename VecTraits<V>::Scalar;
  BlockSums<V> s;
  for (int k = 0; k < kUnroll; ++k) {
    s.sum[k] = s.sum_ed[k] = s.sum_sq[k] = s.sum_z[k] = splat<V>(0);
    s.max[k] = splat<V>(-INFINITY);
  }
  // Before any finite logit every difference must be -inf or NaN, which 0 as shift gives.
  const V vector_shift = splat<V>(shift == -INFINITY ? 0 : (Scalar)shift);
  const V vector_top = splat<V>(top == -INFINITY ? 0 : (Scalar)top);
  int64_t i = 0;
  for (; i + kTurn<Io> <= n; i += kTurn<Io>) {
    prefetch_turn<Io>(x + i);
    forward_turn<Io, kKind, kExtras, false>(x + i, nullptr, vector_shift, vector_top, c, s);
  }
  // The last turn also reads logits that were counted, which leave the maximum as it is.
  if (i < n && n >= kTurn<Io>) {
    forward_turn<Io, kKind, kExtras, true>(x + n - kTurn<Io>, kLast<Io>.values + (n - i), vector_shift, vector_top, c,
                                           s);
  } else if (i < n) {
    typename Io::Storage padded[kTurn<Io>];
    for (auto& p : padded) p = x[0];
    memcpy(padded + kTurn<Io> - n, x, n * sizeof(*x));
    forward_turn<Io, kKind, kExtras, true>(padded, kLast<Io>.values + n, vector_shift, vector_top, c, s);
  }
  RowPart part = empty_part();
  part.shift = shift;
  part.sum = horizontal_sum((s.sum[0] + s.sum[1]) + (s.sum[2] + s.sum[3]));
  part.max = horizontal_max(maximum(maximum(s.max[0], s.max[1]), maximum(s.max[2], s.max[3])));
  if constexpr (kExtras) {
    part.sum_ed = horizontal_sum((s.sum_ed[0] + s.sum_ed[1]) + (s.sum_ed[2] + s.sum_ed[3]));
    part.sum_sq = horizontal_sum((s.sum_sq[0] + s.sum_sq[1]) + (s.sum_sq[2] + s.sum_sq[3]));
    part.sum_z = kMeanScale * horizontal_sum((s.sum_z[0] + s.sum_z[1]) + (s.sum_z[2] + s.sum_z[3]));
  }
  return part;
}

// The largest of n contiguous logits, NaNs passed over.
template <class Io>
double largest(const typename Io::Storage* x, int64_t n) {
  using V = typename Io::Vec;
  typename Io::Storage padded[Io::kElements];
  if (n < Io::kElements) {
    for (auto& p : padded) p = x[0];
    memcpy(padded, x, n * sizeof(*x));
    x = padded;
    n = Io::kElements;
  }
  V top = splat<V>(-INFINITY), v[Io::kVectors];
  for (int64_t i = 0; i < n; i += Io::kElements) {
    Io::load(i + Io::kElements <= n ? x + i : x + n - Io::kElements, v);
    for (int k = 0; k < Io::kVectors; ++k) top = maximum(v[k], top);
  }
  return horizontal_max(top);
}

// A logit as a raw number, and in the shift domain by the same arithmetic as the vectors.
template <class Io>
double raw_value(const typename Io::Storage* x) {
  typename Io::Storage one[Io::kElements] = {*x};
  typename Io::Vec v[Io::kVectors];
  Io::load(one, v);
  return v[0][0];
}

template <class Io, TransformKind kKind>
double value(const void* x, const LogitTransform& transform) {
  using V = typename Io::Vec;
  typename Io::Storage one[Io::kElements] = {*(const typename Io::Storage*)x};
  V v[Io::kVectors];
  Io::load(one, v);
  return shift_domain<kKind>(v[0], Consts<V>(transform))[0];
}

// Where the largest of n contiguous logits comes first; it is looked for by whole vectors.
template <class Io>
int64_t first_position(const typename Io::Storage* x, int64_t n, double max) {
  using V = typename Io::Vec;
  int64_t i = 0;
  for (; i + Io::kElements <= n; i += Io::kElements) {
    V top = splat<V>(-INFINITY), v[Io::kVectors];
    Io::load(x + i, v);
    for (int k = 0; k < Io::kVectors; ++k) top = maximum(v[k], top);
    if (horizontal_max(top) == max) break;
  }
  for (; i < n; ++i)
    if (raw_value<Io>(x + i) == max) return i;
  return -1;  // a block of NaNs
}

template <class Storage>
void gather(const Storage* x, int64_t stride, int64_t n, Storage* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i * stride];
}

template <class Io, TransformKind kKind, bool kExtras>
RowPart forward(const void* logits, int64_t stride, int64_t n, const LogitTransform& transform) {
  using Storage = typename Io::Storage;
  using V = typename Io::Vec;
  const Storage* x = (const Storage*)logits;
  const Consts<V> c(transform);
  const double unit = kKind == kPlain ? 1 : unit_scale(transform);
  RowPart total = empty_part();
  double largest_so_far = -INFINITY;  // in the shift domain
  Storage packed[kBlockLogits];
  for (int64_t start = 0; start < n; start += kBlockLogits) {
    const int64_t size = n - start < kBlockLogits ? n - start : kBlockLogits;
    const Storage* block = x + start * stride;
    if (stride != 1) {
      gather(block, stride, size, packed);
      block = packed;
    }
    if (total.shift == -INFINITY) {  // a first guess, from a few logits
      const int64_t few = size < 256 ? size : 256;
      total.shift = largest<Io>(block, few);
      if constexpr (kKind == kCapped) total.shift = shift_domain<kKind>(splat<V>(total.shift), c)[0];
      largest_so_far = total.shift;
    }
    RowPart part = forward_block<Io, kKind, kExtras>(block, size, total.shift, largest_so_far, c);
    double top = part.max;
    if constexpr (kKind == kCapped) top = shift_domain<kKind>(splat<V>(top), c)[0];
    const double shift = top > total.shift + kSlack / unit ? top : total.shift;
    const bool again = kExtras ? top > largest_so_far : shift != total.shift;
    if (top > largest_so_far) largest_so_far = top;
    if (again) part = forward_block<Io, kKind, kExtras>(block, size, shift, largest_so_far, c);
    if constexpr (kExtras) {
      if (largest_so_far != shift) part.sum_ed += part.sum * (largest_so_far - shift) * unit;
      if (part.max > total.max) part.argmax = start + first_position<Io>(block, size, part.max);
    }
    merge_parts(total, part, unit);
  }
  return total;
}

template <class Io, TransformKind kKind, bool kEntropy>
DPO_FAST_INLINE void backward_turn(const typename Io::Storage* x, typename Io::Storage* dx,
                                   const Consts<typename Io::Vec>& c, typename Io::Vec shift, typename Io::Vec coef,
                                   typename Io::Vec entropy_coef, typename Io::Vec mean_d) {
  using V = typename Io::Vec;
  V v[kUnroll];
  for (int k = 0; k < kUnroll; k += Io::kVectors) Io::load(x + k / Io::kVectors * Io::kElements, v + k);
  for (int k = 0; k < kUnroll; ++k) {
    V y, slope;
    if constexpr (kKind == kCapped) {
      const V u = hyperbolic_tangent(v[k] * c.pre);
      y = u * c.post;
      slope = c.slope - c.slope * u * u;
    } else {
      y = v[k];
    }
    const V d = to_z<kKind>(y - shift, c);
    const V e = exponential<Io::kShortExp>(d);
    V factor = coef;
    if constexpr (kEntropy) factor = multiply_add(entropy_coef, maximum(splat<V>(kExpLow<V>), d) - mean_d, coef);
    V dz = e * factor;
    if constexpr (kKind == kCapped) dz *= slope;
    v[k] = dz;
  }
  for (int k = 0; k < kUnroll; k += Io::kVectors) Io::store(dx + k / Io::kVectors * Io::kElements, v + k);
}

// A NaN without payload, which rounding to bfloat16 cannot carry away.
template <class Scalar>
Scalar plain_nan(Scalar x) {
  return x == x ? x : (Scalar)NAN;
}

template <class Io, TransformKind kKind, bool kEntropy>
void backward(const void* logits, int64_t stride, void* grad_logits, int64_t dx_stride, int64_t n,
              const LogitTransform& transform, const RowGrad& grad) {
  using Storage = typename Io::Storage;
  using V = typename Io::Vec;
  using Scalar = typename VecTraits<V>::Scalar;
  const Storage* x = (const Storage*)logits;
  Storage* dx = (Storage*)grad_logits;
  const Consts<V> c(transform);
  // without a soft-cap dz/dx is one number, which the coefficients take in
  const double slope = kKind == kScaled ? transform.logit_scale / transform.temperature : 1;
  const V shift = splat<V>((Scalar)grad.shift);
  const V coef = splat<V>(plain_nan((Scalar)(grad.coef * slope)));
  const V entropy_coef = splat<V>(plain_nan((Scalar)(grad.entropy_coef * slope)));
  const V mean_d = splat<V>(plain_nan((Scalar)grad.mean_d));
  const bool contiguous = stride == 1 && dx_stride == 1;
  Storage packed[kTurn<Io>];
  int64_t i = 0;
  for (; contiguous && i + kTurn<Io> <= n; i += kTurn<Io>) {
    prefetch_turn<Io>(x + i);
    backward_turn<Io, kKind, kEntropy>(x + i, dx + i, c, shift, coef, entropy_coef, mean_d);
  }
  for (; i < n; i += kTurn<Io>) {  // the end of the row, and rows whose logits are not adjacent
    const int64_t size = n - i < kTurn<Io> ? n - i : kTurn<Io>;
    for (int64_t j = 0; j < kTurn<Io>; ++j) packed[j] = j < size ? x[(i + j) * stride] : 0;
    backward_turn<Io, kKind, kEntropy>(packed, packed, c, shift, coef, entropy_coef, mean_d);
    for (int64_t j = 0; j < size; ++j) dx[(i + j) * dx_stride] = packed[j];
  }
}

void exp_float(const float* x, float* y, int64_t n, bool half) {
  constexpr int kLanes = VecTraits<VecF>::kLanes;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t size = n - i < kLanes ? n - i : kLanes;
    VecF v = splat<VecF>(0);
    memcpy(&v, x + i, size * sizeof(float));
    v = half ? exponential<true>(v) : exponential<false>(v);
    memcpy(y + i, &v, size * sizeof(float));
  }
}

void exp_double(const double* x, double* y, int64_t n) {
  constexpr int kLanes = VecTraits<VecD>::kLanes;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t size = n - i < kLanes ? n - i : kLanes;
    VecD v = splat<VecD>(0);
    memcpy(&v, x + i, size * sizeof(double));
    v = exponential<false>(v);
    memcpy(y + i, &v, size * sizeof(double));
  }
}

template <class Io>
constexpr TypeKernels type_kernels() {
  return {
      {{forward<Io, kPlain, false>, forward<Io, kPlain, true>},
       {forward<Io, kScaled, false>, forward<Io, kScaled, true>},
       {forward<Io, kCapped, false>, forward<Io, kCapped, true>}},
      {{backward<Io, kPlain, false>, backward<Io, kPlain, true>},
       {backward<Io, kScaled, false>, backward<Io, kScaled, true>},
       {backward<Io, kCapped, false>, backward<Io, kCapped, true>}},
      {value<Io, kPlain>, value<Io, kScaled>, value<Io, kCapped>},
  };
}

#define DPO_FAST_STRING_(x) #x
#define DPO_FAST_STRING(x) DPO_FAST_STRING_(x)

}  // namespace

extern const RowKernels kKernels;
const RowKernels kKernels = {
    DPO_FAST_STRING(DPO_FAST_ISA),
    {type_kernels<Float32>(), type_kernels<Float64>(), type_kernels<BFloat16>(), type_kernels<Float16>()},
    exp_float,
    exp_double,
};

}  // namespace DPO_FAST_ISA
}  // namespace dpo_fast

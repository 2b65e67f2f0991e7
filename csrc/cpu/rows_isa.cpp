// The SIMD row functions. setup.py compiles this file once per instruction set, with DPO_FAST_ISA naming it.
#include "exponential.h"
#include "rows.h"
#include "simd.h"
#include "transform.h"

namespace dpo_fast {
namespace DPO_FAST_ISA {
namespace {

// A block stays in the first-level cache: it may be read twice, and sums in float cover at most one block.
constexpr int64_t kBlockLogits = 2048;
// Vectors per loop turn, and accumulators, which are independent to hide the latency of the additions. With few
// instructions there are registers for three of them beside exp's constants, and a turn is too long to need more.
template <class Io>
constexpr bool kFewInstructions = Exp<typename Io::Vec, Io::kShortExp>::kTakesShift;
template <class Io>
constexpr int kUnroll = kFewInstructions<Io> ? 8 : 4;
template <class Io>
constexpr int kSums = kFewInstructions<Io> ? 2 : 4;
template <class Io>
constexpr int kMaxima = kFewInstructions<Io> ? 1 : 4;

// The shift follows the maximum only when it is passed by this much (in z): fewer restarts, and exp(kSlack) is far from
// overflow. It stays small because the rounding of x - shift grows with it. One rule with and without extras: a
// log-prob's bits must not depend on the statistics asked for beside it.
constexpr double kSlack = 8;
// Entropy is a difference of two numbers that grow with the distance from the shift to the maximum, too much for it:
// e * d is summed with d from the largest logit so far (`top`), and the difference to the shift is added in double.
constexpr int kPrefetchBytes = 8192;

// Exp with a row's shift, which is in the shift domain.
template <class Io, TransformKind kKind>
struct ShiftedExp {
  using V = typename Io::Vec;
  using Form = Exp<V, Io::kShortExp>;
  static constexpr bool kTakesShift = kKind == kPlain && Form::kTakesShift;
  V shift;
  Form form;

  // Before any finite logit every difference must be -inf or NaN, which 0 as shift gives.
  explicit ShiftedExp(double s)
      : shift(splat<V>((typename VecTraits<V>::Scalar)(s == -INFINITY ? 0 : s))),
        form(kTakesShift && s != -INFINITY ? s : 0) {}

  static double taken(double s) { return kTakesShift ? Form::taken(s) : s; }

  // Whether a plain row has to go the way of a scaled one.
  static bool too_large(double s) {
    if constexpr (kTakesShift) return s != -INFINITY && !(fabs(s) <= Form::kMaxShift);
    return false;
  }
};

// What Exp takes for y.
template <class Io, TransformKind kKind>
DPO_FAST_INLINE typename Io::Vec exp_argument(typename Io::Vec y, const ShiftedExp<Io, kKind>& e,
                                              const Consts<typename Io::Vec>& c) {
  if constexpr (ShiftedExp<Io, kKind>::kTakesShift) return y;
  return to_z<kKind>(y - e.shift, c);
}

template <class Io>
struct BlockSums {
  using V = typename Io::Vec;
  V sum[kSums<Io>], max[kMaxima<Io>], sum_ed[kSums<Io>], sum_sq[kSums<Io>], sum_z[kSums<Io>];
};

template <class V, int kCount>
typename VecTraits<V>::Scalar total_of(const V (&sums)[kCount]) {
  V total = sums[0] + sums[1];
  if constexpr (kCount == 4) total += sums[2] + sums[3];
  return horizontal_sum(total);
}

// Means are summed over z / 1024, so that logits near float's limit do not overflow a block's sum.
constexpr double kMeanScale = 1024;

template <class Io>
constexpr int64_t kTurn = kUnroll<Io> / Io::kVectors * Io::kElements;

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

// Whether loading a vector three times costs less than a load that stands alone.
template <class Io, TransformKind kKind, bool kExtras, bool kCareful, bool kTail>
constexpr bool kReloads =
    ShiftedExp<Io, kKind>::kTakesShift && Io::kShortExp == false && !kExtras && !kCareful && !kTail;

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

// The same address, which the compiler must take for another: what is loaded from it is loaded again, as an operand of
// an instruction, and takes none of its own.
template <class T>
DPO_FAST_INLINE const T* reloaded(const T* p) {
#if DPO_FAST_FEW_INSTRUCTIONS
  asm("" : "+r"(p));
#endif
  return p;
}

// Adds one turn of kUnroll vectors. In the row's last turn (kTail) only the lanes that `inside` marks count.
template <class Io, TransformKind kKind, bool kExtras, bool kCareful, bool kTail>
DPO_FAST_INLINE void forward_turn(const typename Io::Storage* x, const typename Io::Storage* inside,
                                  const ShiftedExp<Io, kKind>& e, typename Io::Vec top,
                                  const Consts<typename Io::Vec>& c, BlockSums<Io>& s) {
  using V = typename Io::Vec;
  using Form = Exp<V, Io::kShortExp>;
  const typename Io::Storage *first = reloaded(x), *second = reloaded(first);
  for (int k = 0; k < kUnroll<Io>; ++k) {
    const int j = k % Io::kVectors;
    const int64_t offset = k / Io::kVectors * Io::kElements;
    V v[Io::kVectors], in[Io::kVectors], bounded[Io::kVectors];
    Io::load(x + offset, v);
    V &max = s.max[k % kMaxima<Io>], &sum = s.sum[k % kSums<Io>];
    if constexpr (kReloads<Io, kKind, kExtras, kCareful, kTail>) {
      Io::load(first + offset, bounded);
      max = maximum(max, bounded[j]);  // a NaN would undo it, and makes the sum NaN
      Io::load(second + offset, bounded);
      sum = Form::added(e.form, bounded[j], v[j], sum);
      continue;
    }
    max = maximum(v[j], max);
    const V y = shift_domain<kKind>(v[j], c);
    V d = exp_argument<Io, kKind>(y, e, c);
    if constexpr (kTail) {
      Io::load(inside + offset, in);
      d = in[j] > splat<V>(0) ? d : splat<V>(-INFINITY);
    }
    sum = Form::template added < kCareful || kTail > (e.form, d, sum);
    if constexpr (kExtras) {
      const V value = Form::template value < kCareful || kTail > (e.form, d);
      // bounded below: 0 * -inf would be NaN
      const V from_top = maximum(splat<V>(kExpLow<V>), to_z<kKind>(y - top, c));
      V z = to_z<kKind>(y, c);
      if constexpr (kTail) z = in[j] > splat<V>(0) ? z : splat<V>(0);
      s.sum_ed[k % kSums<Io>] = multiply_add(value, from_top, s.sum_ed[k % kSums<Io>]);
      s.sum_sq[k % kSums<Io>] = multiply_add(value, value, s.sum_sq[k % kSums<Io>]);
      s.sum_z[k % kSums<Io>] = multiply_add(z, splat<V>(1 / kMeanScale), s.sum_z[k % kSums<Io>]);
    }
  }
}

// Sums over one block of n <= kBlockLogits contiguous logits relative to `shift`, a taken one, but sum_ed has d
// relative to `top`; max is of the raw logits. Without kCareful the sum may be NaN where it should not (exponential.h),
// and max is right only where the sum is not NaN.
template <class Io, TransformKind kKind, bool kExtras, bool kCareful>
RowPart forward_block(const typename Io::Storage* x, int64_t n, double shift, double top,
                      const Consts<typename Io::Vec>& c) {
  using V = typename Io::Vec;
  using Scalar = typename VecTraits<V>::Scalar;
  if (ShiftedExp<Io, kKind>::too_large(shift))
    return forward_block<Io, kScaled, kExtras, kCareful>(x, n, shift, top, c);
  BlockSums<Io> s;
  for (int k = 0; k < kSums<Io>; ++k) s.sum[k] = s.sum_ed[k] = s.sum_sq[k] = s.sum_z[k] = splat<V>(0);
  for (int k = 0; k < kMaxima<Io>; ++k) s.max[k] = splat<V>(-INFINITY);
  const ShiftedExp<Io, kKind> e(shift);
  const V vector_top = splat<V>(top == -INFINITY ? 0 : (Scalar)top);
  int64_t i = 0;
  for (; i + kTurn<Io> <= n; i += kTurn<Io>) {
    prefetch_turn<Io>(x + i);
    forward_turn<Io, kKind, kExtras, kCareful, false>(x + i, nullptr, e, vector_top, c, s);
  }
  // The last turn also reads logits that were counted, which leave the maximum as it is.
  if (i < n && n >= kTurn<Io>) {
    forward_turn<Io, kKind, kExtras, kCareful, true>(x + n - kTurn<Io>, kLast<Io>.values + (n - i), e, vector_top, c,
                                                     s);
  } else if (i < n) {
    typename Io::Storage padded[kTurn<Io>];
    for (auto& p : padded) p = x[0];
    memcpy(padded + kTurn<Io> - n, x, n * sizeof(*x));
    forward_turn<Io, kKind, kExtras, kCareful, true>(padded, kLast<Io>.values + n, e, vector_top, c, s);
  }
  RowPart part = empty_part();
  part.shift = shift;
  constexpr double factor = 1.0 / Exp<V, Io::kShortExp>::kUnit;
  part.sum = factor * total_of(s.sum);
  V max = s.max[0];
  for (int k = 1; k < kMaxima<Io>; ++k) max = maximum(max, s.max[k]);
  part.max = horizontal_max(max);
  if constexpr (kExtras) {
    part.sum_ed = factor * total_of(s.sum_ed);
    part.sum_sq = factor * factor * total_of(s.sum_sq);
    part.sum_z = kMeanScale * total_of(s.sum_z);
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

// Where the shift is not a logit, the largest logit's exp has an error. Without it, relative to the others, log-probs
// near 0 keep their last digits, and none is above 0.
template <class Io, TransformKind kKind>
void exact_at_maximum(RowPart& part) {
  using Shifted = ShiftedExp<Io, kKind>;
  using Form = typename Shifted::Form;
  if constexpr (Shifted::kTakesShift) {
    if (part.max == -INFINITY || Shifted::too_large(part.shift)) return;
    const auto max = splat<typename Io::Vec>(part.max);
    const double found = Form::template value<true>(Shifted(part.shift).form, max)[0];
    const double ratio = exp(part.max - part.shift) * Form::kUnit / found;
    part.sum *= ratio;
    part.sum_ed *= ratio;
    part.sum_sq *= ratio * ratio;
  }
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
  constexpr bool kCarefulAtOnce = kExtras || !Exp<V, Io::kShortExp>::kTakesShift;
  const auto careful = forward_block<Io, kKind, kExtras, true>;
  auto sums = forward_block<Io, kKind, kExtras, kCarefulAtOnce>;
  auto summed = [&](const Storage* block, int64_t size, double shift) {
    const RowPart part = sums(block, size, shift, largest_so_far, c);
    if (part.sum == part.sum || sums == careful) return part;
    sums = careful;  // what one block holds, the next ones often hold
    return sums(block, size, shift, largest_so_far, c);
  };
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
      largest_so_far = largest<Io>(block, few);
      if constexpr (kKind == kCapped) largest_so_far = shift_domain<kKind>(splat<V>(largest_so_far), c)[0];
      total.shift = ShiftedExp<Io, kKind>::taken(largest_so_far);
    }
    RowPart part = summed(block, size, total.shift);
    double top = part.max;
    if constexpr (kKind == kCapped) top = shift_domain<kKind>(splat<V>(top), c)[0];
    const double shift = top > total.shift + kSlack / unit ? ShiftedExp<Io, kKind>::taken(top) : total.shift;
    const bool again = kExtras ? top > largest_so_far : shift != total.shift;
    if (top > largest_so_far) largest_so_far = top;
    if (again) part = summed(block, size, shift);
    if constexpr (kExtras) {
      if (largest_so_far != shift) part.sum_ed += part.sum * (largest_so_far - shift) * unit;
      if (part.max > total.max) part.argmax = start + first_position<Io>(block, size, part.max);
    }
    merge_parts(total, part, unit);
  }
  exact_at_maximum<Io, kKind>(total);
  return total;
}

template <class Io, TransformKind kKind, bool kEntropy>
DPO_FAST_INLINE typename Io::Vec backward_vector(typename Io::Vec x, const Consts<typename Io::Vec>& c,
                                                 const ShiftedExp<Io, kKind>& e, typename Io::Vec coef,
                                                 typename Io::Vec entropy_coef, typename Io::Vec mean_d) {
  using V = typename Io::Vec;
  V y = x, slope;
  if constexpr (kKind == kCapped) {
    const V u = hyperbolic_tangent(x * c.pre);
    y = u * c.post;
    slope = c.slope - c.slope * u * u;
  }
  const V value = Exp<V, Io::kShortExp>::template value<true>(e.form, exp_argument<Io, kKind>(y, e, c));
  V factor = coef;
  if constexpr (kEntropy) {
    const V d = maximum(splat<V>(kExpLow<V>), to_z<kKind>(y - e.shift, c));
    factor = multiply_add(entropy_coef, d - mean_d, coef);
  }
  V dz = value * factor;
  if constexpr (kKind == kCapped) dz *= slope;
  return dz;
}

template <class Io, TransformKind kKind, bool kEntropy>
DPO_FAST_INLINE void backward_turn(const typename Io::Storage* x, typename Io::Storage* dx,
                                   const Consts<typename Io::Vec>& c, const ShiftedExp<Io, kKind>& e,
                                   typename Io::Vec coef, typename Io::Vec entropy_coef, typename Io::Vec mean_d) {
  using V = typename Io::Vec;
  // There are no registers to keep several steps' results in.
  constexpr int kAtOnce = kFewInstructions<Io> ? Io::kVectors : kUnroll<Io>;
  V v[kAtOnce];
  for (int start = 0; start < kUnroll<Io>; start += kAtOnce) {
    const int64_t offset = start / Io::kVectors * Io::kElements;
    for (int k = 0; k < kAtOnce; k += Io::kVectors) Io::load(x + offset + k / Io::kVectors * Io::kElements, v + k);
    for (V& each : v) each = backward_vector<Io, kKind, kEntropy>(each, c, e, coef, entropy_coef, mean_d);
    for (int k = 0; k < kAtOnce; k += Io::kVectors) Io::store(dx + offset + k / Io::kVectors * Io::kElements, v + k);
  }
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
  using Shifted = ShiftedExp<Io, kKind>;
  if (Shifted::too_large(grad.shift))
    return backward<Io, kScaled, kEntropy>(logits, stride, grad_logits, dx_stride, n, transform, grad);
  const Storage* x = (const Storage*)logits;
  Storage* dx = (Storage*)grad_logits;
  const Consts<V> c(transform);
  // without a soft-cap dz/dx is one number, which the coefficients take in
  double slope = kKind == kScaled ? transform.logit_scale / transform.temperature : 1;
  const double taken = Shifted::taken(grad.shift);
  if (taken != grad.shift) slope *= exp(taken - grad.shift);
  slope /= Exp<V, Io::kShortExp>::kUnit;
  const Shifted e(grad.shift);
  const V coef = splat<V>(plain_nan((Scalar)(grad.coef * slope)));
  const V entropy_coef = splat<V>(plain_nan((Scalar)(grad.entropy_coef * slope)));
  const V mean_d = splat<V>(plain_nan((Scalar)grad.mean_d));
  const bool contiguous = stride == 1 && dx_stride == 1;
  Storage packed[kTurn<Io>];
  int64_t i = 0;
  for (; contiguous && i + kTurn<Io> <= n; i += kTurn<Io>) {
    prefetch_turn<Io>(x + i);
    backward_turn<Io, kKind, kEntropy>(x + i, dx + i, c, e, coef, entropy_coef, mean_d);
  }
  for (; i < n; i += kTurn<Io>) {  // the end of the row, and rows whose logits are not adjacent
    const int64_t size = n - i < kTurn<Io> ? n - i : kTurn<Io>;
    for (int64_t j = 0; j < kTurn<Io>; ++j) packed[j] = j < size ? x[(i + j) * stride] : 0;
    backward_turn<Io, kKind, kEntropy>(packed, packed, c, e, coef, entropy_coef, mean_d);
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

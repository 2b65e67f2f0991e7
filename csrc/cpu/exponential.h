// exp and tanh on vectors, and exp(x - shift) as the row kernels sum and scale it. Included by rows_isa.cpp alone.
//
// exp(d) = 2^n e^r, n = round(d / ln 2), |r| <= ln 2 / 2. Adding 1.5 * 2^23 (and what n is biased by) rounds to an
// integer and leaves it in the low bits. The polynomials are minimax fits found by Remez exchange.
#pragma once

#include "simd.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define DPO_FAST_FEW_INSTRUCTIONS 1
#else
#define DPO_FAST_FEW_INSTRUCTIONS 0
#endif

namespace dpo_fast {
namespace DPO_FAST_ISA {

// Below this exp is taken as 0: 2^n would leave the normal numbers.
template <class V>
constexpr typename VecTraits<V>::Scalar kExpLow = -87.0f;
template <>
constexpr double kExpLow<VecD> = -708.0;

DPO_FAST_INLINE VecD scaled_or_zero(VecD p, VecD n, VecD y, VecD d, VecD low) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(d, low, _CMP_NLT_UQ), p, n);
#else
  return (VecD)((VecL)(p * (VecD)((VecL)y << 52)) & ~(d < low));
#endif
}

// In double precision: exp(d) for d <= 80, 0 below kExpLow, NaN for NaN. Degree 12, relative error 5.4e-20.
template <bool kShort>
DPO_FAST_INLINE VecD exponential(VecD d) {
  const double kMagic = 6755399441055744.0 + 1023.0;
  const VecD y = multiply_add(d, splat<VecD>(1.442695040888963407), splat<VecD>(kMagic));
  const VecD n = y - splat<VecD>(kMagic);
  // ln 2 in two parts, the first with 21 trailing zero bits, so that n times it is exact.
  VecD r = multiply_add(n, splat<VecD>(-0.693147180369123816490), d);
  r = multiply_add(n, splat<VecD>(-1.90821492927058770002e-10), r);
  const VecD p =
      polynomial(r, splat<VecD>(2.08266236276164033e-9), 2.51120367668376367e-8, 2.75575818593379412e-7,
                 2.75572348621610978e-6, 2.48015869266205751e-5, 1.98412698963835372e-4, 1.3888888889115634e-3,
                 8.33333333331703438e-3, 0.0416666666666660943, 0.166666666666666834, 0.500000000000000004, 1.0, 1.0);
  return scaled_or_zero(p, n, y, d, splat<VecD>(kExpLow<VecD>));
}

#if !DPO_FAST_FEW_INSTRUCTIONS

// p * 2^n where d >= low or d is NaN, 0 where d < low. y has the biased exponent of 2^n in its low bits.
DPO_FAST_INLINE VecF scaled_or_zero(VecF p, VecF n, VecF y, VecF d, VecF low) {
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(d, low, _CMP_NLT_UQ), p, n);
#else
  return (VecF)((VecI)(p * (VecF)((VecU)y << 23)) & ~(d < low));
#endif
}

// exp(d) for d <= 80, 0 below kExpLow, NaN for NaN. The polynomials fit e^r - 1 - r in relative error: 3.1e-9 (degree
// 6) and 5.4e-6 (degree 4: kShort, for half-precision logits, whose own rounding is 2^-9 or 2^-12). Without FMA,
// n * ln 2 is taken off in two steps, the first exact.
template <bool kShort>
DPO_FAST_INLINE VecF exponential(VecF d) {
  const float kMagic = 12582912.0f + 127.0f;
  const VecF y = multiply_add(d, splat<VecF>(1.44269504088896341f), splat<VecF>(kMagic));
  const VecF n = y - splat<VecF>(kMagic);
  VecF r;
  if constexpr (kHasFma) {
    r = multiply_add(n, splat<VecF>(-0.693147180559945309f), d);
  } else {
    r = (d - n * splat<VecF>(0.693359375f)) + n * splat<VecF>(2.12194440054690583e-4f);
  }
  VecF p;
  if constexpr (kShort) {
    p = polynomial(r, splat<VecF>(0.0412776729808936973f), 0.167535312609709913f, 0.500051180328715057f, 1.0f, 1.0f);
  } else {
    p = polynomial(r, splat<VecF>(0.00138145986466640345f), 0.00836871687972813995f, 0.0416683880453139967f,
                   0.166665206317094969f, 0.499999934477964868f, 1.0f, 1.0f);
  }
  return scaled_or_zero(p, n, y, d, splat<VecF>(kExpLow<VecF>));
}

#endif

// kUnit * e^(x - taken(shift)): as a value, or added to a sum. Without kTakesShift, x is the difference.
template <class V, bool kShort>
struct Exp {
  static constexpr bool kTakesShift = false;
  static constexpr int kUnit = 1;
  explicit Exp(double) {}
  static double taken(double shift) { return shift; }
  template <bool kCareful>
  DPO_FAST_INLINE V value(const Exp&, V d) {
    return exponential<kShort>(d);
  }
  template <bool kCareful>
  DPO_FAST_INLINE V added(const Exp&, V d, V sum) {
    return sum + exponential<kShort>(d);
  }
};

#if DPO_FAST_FEW_INSTRUCTIONS

// With AVX2 the arithmetic takes longer than the memory, so every instruction counts:
// - The shift is taken off n, as an integer, and is a multiple of ln 2 therefore: no subtraction from x.
// - The polynomial is multiplied by kUnit, which makes its leading coefficient 1 and its first step an addition:
//   degree 6 with 1 / 1024 (relative error 2.8e-8), or, for half-precision logits, degree 2 with 1 / 2 (3.5e-6) on
//   steps of ln 2 / 8, with 2^(i / 8) from a table of 8.
// - Logits are bounded below by `low`, where 2^n becomes 0: no mask.
// - Only n is that of the bounded logit. So e^r may be infinite, and the value NaN in place of 0, below some -1e6:
//   without kCareful such a logit, minus infinity for one, makes the sum NaN.
template <bool kShort>
struct Exp<VecF, kShort> {
  static constexpr bool kTakesShift = true;
  static constexpr int kSteps = kShort ? 8 : 1;
  static constexpr int kUnit = kShort ? 2 : 1024;
  static constexpr float kStep = 0.693147180559945309f / kSteps;
  static constexpr double kMaxShift = 32768.0 * kSteps * kStep;      // n and low are exact enough up to there
  static constexpr float kMagic = 12582912.0f + (kShort ? 0 : 127);  // the table has the bias
  VecF low, magic;

  // |shift| <= kMaxShift
  explicit Exp(double shift) {
    const double n = nearbyint(shift / kStep);
    low = splat<VecF>((float)((n - 127 * kSteps) * kStep));
    magic = splat<VecF>((float)(kMagic - n));
  }
  // Exact, and taken(taken(shift)) = taken(shift).
  static double taken(double shift) { return fabs(shift) <= kMaxShift ? nearbyint(shift / kStep) * kStep : shift; }

  struct Parts {
    VecF p, scale;
  };

  template <bool kCareful>
  DPO_FAST_INLINE Parts parts(const Exp& e, VecF x, VecF same) {
    const VecF bounded = maximum(e.low, same);
    const VecF y = multiply_add(bounded, splat<VecF>(1.44269504088896341f * kSteps), e.magic);
    const VecF n = y - e.magic;
    const VecF r = multiply_add(n, splat<VecF>(-kStep), kCareful ? bounded : x);
    if constexpr (kShort) {
      const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                              0x3f7744fd, 0x3f7ac0c7);  // 2^(i / 8), less i in its place
      const VecI scale = (VecI)_mm256_permutevar8x32_epi32(table, (__m256i)y) + ((VecI)y << 20);
      return {polynomial(r, r + splat<VecF>(2.000469446182251f), 2.0f), (VecF)scale};
    } else {
      const VecF p = polynomial(r, r + splat<VecF>(8.549005508422852f), 42.74059295654297f, 170.6684112548828f,
                                511.99688720703125f, 1023.9998779296875f, 1024.0f);
      return {p, (VecF)((VecI)y << 23)};
    }
  }

  template <bool kCareful>
  DPO_FAST_INLINE VecF value(const Exp& e, VecF x) {
    const Parts of = parts<kCareful>(e, x, x);
    return of.p * of.scale;
  }

  // `same`: x, loaded once more.
  DPO_FAST_INLINE VecF added(const Exp& e, VecF same, VecF x, VecF sum) {
    const Parts of = parts<false>(e, x, same);
    return multiply_add(of.p, of.scale, sum);
  }

  template <bool kCareful>
  DPO_FAST_INLINE VecF added(const Exp& e, VecF x, VecF sum) {
    const Parts of = parts<kCareful>(e, x, x);
    return multiply_add(of.p, of.scale, sum);
  }
};

// exp(d) for d <= 80, 0 from -88.1 down, NaN for NaN.
template <bool kShort>
DPO_FAST_INLINE VecF exponential(VecF d) {
  const Exp<VecF, kShort> e(0);
  return Exp<VecF, kShort>::template value<true>(e, d) * splat<VecF>(1.0f / Exp<VecF, kShort>::kUnit);
}

#endif

// tanh(u): below 0.625 an odd polynomial (relative error 4.4e-9), which keeps small arguments exact; above it
// 1 - 2 / (exp(2|u|) + 1).
DPO_FAST_INLINE VecF hyperbolic_tangent(VecF u) {
  const VecI sign = (VecI)u & (VecI)splat<VecF>(-0.0f);
  const VecF a = (VecF)((VecI)u ^ sign);
  const VecF t = u * u;
  const VecF q = polynomial(t, splat<VecF>(-0.00570498699345520288f), 0.0206390872447291735f, -0.0537397150858249591f,
                            0.133314421981758076f, -0.33333281942012773f);
  const VecF small = multiply_add(u * t, q, u);
  // beyond 10, tanh is 1 to float's last bit; a NaN passes the comparison
  const VecF bounded = a > splat<VecF>(10.0f) ? splat<VecF>(10.0f) : a;
  const VecF e = exponential<false>(bounded + bounded);
  const VecF large = splat<VecF>(1.0f) - splat<VecF>(2.0f) / (e + splat<VecF>(1.0f));
  return a < splat<VecF>(0.625f) ? small : (VecF)((VecI)large | sign);
}

DPO_FAST_INLINE VecD hyperbolic_tangent(VecD u) {
  VecD t;
  for (int i = 0; i < VecTraits<VecD>::kLanes; ++i) t[i] = tanh(u[i]);
  return t;
}

}  // namespace DPO_FAST_ISA
}  // namespace dpo_fast

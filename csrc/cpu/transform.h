// The logit transform (row_math.h) on vectors of one instruction set. As simd.h, private to the objects compiled for
// it.
#pragma once

#include "exponential.h"
#include "rows.h"
#include "simd.h"

namespace dpo_fast {
namespace DPO_FAST_ISA {

// The transform in the precision of the vectors.
template <class V>
struct Consts {
  using Scalar = typename VecTraits<V>::Scalar;
  V scale;                  // kScaled: from the shift domain to z
  V pre, cap, post, slope;  // kCapped: u = x * pre, z = tanh(u) * post, dz/dx = slope * (1 - tanh(u)^2)
  explicit Consts(const LogitTransform& t)
      : scale(splat<V>((Scalar)(t.logit_scale / t.temperature))),
        pre(splat<V>((Scalar)(t.softcap > 0 ? t.logit_scale / t.softcap : 0))),
        post(splat<V>((Scalar)(t.softcap / t.temperature))),
        slope(splat<V>((Scalar)(t.logit_scale / t.temperature))) {}
};

// Raw logit -> shift domain.
template <TransformKind kKind, class V>
DPO_FAST_INLINE V shift_domain(V x, const Consts<V>& c) {
  if constexpr (kKind == kCapped) return hyperbolic_tangent(x * c.pre) * c.post;
  return x;
}

// Difference in the shift domain -> difference in z.
template <TransformKind kKind, class V>
DPO_FAST_INLINE V to_z(V d, const Consts<V>& c) {
  if constexpr (kKind == kScaled) return d * c.scale;
  return d;
}

}  // namespace DPO_FAST_ISA
}  // namespace dpo_fast

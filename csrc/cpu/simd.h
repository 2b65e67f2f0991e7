// Vectors of float and double for one instruction set, and the few functions on them that the row kernels need.
//
// Written with the vector extensions of GCC and Clang, so that the same source is SSE2, AVX2+FMA, AVX-512 or NEON by
// compiler flags; intrinsics stand only where the generic form compiles to something slower. Included by rows_isa.cpp
// alone: everything here is private to the object compiled for that instruction set (no std:: templates, which the
// linker could share with objects that must run on older processors).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dpo_fast {
namespace DPO_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecL __attribute__((vector_size(kVectorBytes)));

#define DPO_FAST_INLINE static inline __attribute__((always_inline))

template <class V>
struct VecTraits;
template <>
struct VecTraits<VecF> {
  using Scalar = float;
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct VecTraits<VecD> {
  using Scalar = double;
  static constexpr int kLanes = kVectorBytes / 8;
};

template <class V>
DPO_FAST_INLINE V splat(typename VecTraits<V>::Scalar x) {
  return x - V{};  // x - 0 keeps the sign of zero and NaNs
}

template <class V>
DPO_FAST_INLINE V load_vector(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
DPO_FAST_INLINE void store_vector(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

// a * b + c, in one rounding where the instruction set has it.
DPO_FAST_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

DPO_FAST_INLINE VecD multiply_add(VecD a, VecD b, VecD c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__) && defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// x > y ? x : y. A NaN in x gives y: maxima pass over NaNs.
DPO_FAST_INLINE VecF maximum(VecF x, VecF y) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, y);
#elif defined(__SSE2__)
  return _mm_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

DPO_FAST_INLINE VecD maximum(VecD x, VecD y) {
#if defined(__AVX512F__)
  return _mm512_max_pd(x, y);
#elif defined(__AVX2__)
  return _mm256_max_pd(x, y);
#elif defined(__SSE2__)
  return _mm_max_pd(x, y);
#else
  return x > y ? x : y;
#endif
}

// Over the lanes, by halves: a chain of kLanes additions would take longer than a small row.
template <class V>
DPO_FAST_INLINE typename VecTraits<V>::Scalar horizontal_sum(V v) {
  typename VecTraits<V>::Scalar s[VecTraits<V>::kLanes];
  memcpy(s, &v, sizeof v);
  for (int half = VecTraits<V>::kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

template <class V>
DPO_FAST_INLINE typename VecTraits<V>::Scalar horizontal_max(V v) {
  typename VecTraits<V>::Scalar m[VecTraits<V>::kLanes];
  memcpy(m, &v, sizeof v);
  for (int half = VecTraits<V>::kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) m[i] = m[i + half] > m[i] ? m[i + half] : m[i];
  return m[0];
}

// Polynomials by Horner's rule, highest coefficient first.
template <class V>
DPO_FAST_INLINE V polynomial(V, V acc) {
  return acc;
}
template <class V, class... Rest>
DPO_FAST_INLINE V polynomial(V x, V acc, typename VecTraits<V>::Scalar next, Rest... rest) {
  return polynomial(x, multiply_add(acc, x, splat<V>(next)), rest...);
}

// How each type of logits is read into, and written from, vectors. One step covers kElements consecutive elements and
// gives kVectors vectors; which lane holds which element is the type's own affair, the same for load and store.
struct Float32 {
  using Storage = float;
  using Vec = VecF;
  static constexpr int kVectors = 1, kElements = VecTraits<VecF>::kLanes;
  static constexpr Storage kOne = 1.0f;
  static constexpr bool kShortExp = false;
  DPO_FAST_INLINE void load(const Storage* p, Vec* v) { v[0] = load_vector<VecF>(p); }
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) { store_vector(p, v[0]); }
};

struct Float64 {
  using Storage = double;
  using Vec = VecD;
  static constexpr int kVectors = 1, kElements = VecTraits<VecD>::kLanes;
  static constexpr Storage kOne = 1.0;
  static constexpr bool kShortExp = false;
  DPO_FAST_INLINE void load(const Storage* p, Vec* v) { v[0] = load_vector<VecD>(p); }
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) { store_vector(p, v[0]); }
};

// Two bfloat16 share a 32-bit lane: the even elements go to one vector, the odd ones to the other, without a shuffle.
struct BFloat16 {
  using Storage = uint16_t;
  using Vec = VecF;
  static constexpr int kVectors = 2, kElements = 2 * VecTraits<VecF>::kLanes;
  static constexpr Storage kOne = 0x3f80;
  static constexpr bool kShortExp = true;
  DPO_FAST_INLINE void load(const Storage* p, Vec* v) {
    const VecU w = load_vector<VecU>(p);
    v[0] = (VecF)(w << 16);
    v[1] = (VecF)(w & 0xffff0000u);
  }
  // Round to nearest even. NaNs come from bfloat16 input or plain_nan and have no low bits set, so the addition cannot
  // carry them away.
  DPO_FAST_INLINE VecU round(VecF v) {
    const VecU u = (VecU)v;
    return u + ((u >> 16) & 1) + 0x7fffu;
  }
#if defined(__AVX512BF16__)
  // The instruction gives the even elements' vector and then the odd ones'.
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) {
    alignas(64) static const uint16_t kInTurn[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInTurn), halves));
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) {
    store_vector(p, _mm256_blend_epi16((__m256i)(round(v[0]) >> 16), (__m256i)round(v[1]), 0xaa));
  }
#else
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) {
    store_vector(p, (round(v[0]) >> 16) | (round(v[1]) & 0xffff0000u));
  }
#endif
};

struct Float16 {
  using Storage = uint16_t;
  using Vec = VecF;
  static constexpr int kVectors = 1, kElements = VecTraits<VecF>::kLanes;
  static constexpr Storage kOne = 0x3c00;
  static constexpr bool kShortExp = true;
#if defined(__AVX512F__)
  DPO_FAST_INLINE void load(const Storage* p, Vec* v) { v[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__) && defined(__AVX2__)
  DPO_FAST_INLINE void load(const Storage* p, Vec* v) { v[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));
  // The exponent is moved by a multiplication by 2^112, which is exact and also normalises subnormal numbers.
  DPO_FAST_INLINE void load(const Storage* p, Vec* v) {
    const VecU h = __builtin_convertvector(load_vector<VecH>(p), VecU);
    const VecU magnitude = (h & 0x7fffu) << 13;
    const VecF scaled = (VecF)magnitude * splat<VecF>(5.192296858534828e33f);
    const VecU special = (VecU)(magnitude >= 0x0f800000u);  // infinity and NaN
    v[0] = (VecF)(((VecU)scaled & ~special) | ((magnitude | 0x7f800000u) & special) | ((h & 0x8000u) << 16));
  }
  // Round to nearest even, as the F16C instruction does.
  DPO_FAST_INLINE void store(Storage* p, const Vec* v) {
    const VecU u = (VecU)v[0];
    const VecU magnitude = u & 0x7fffffffu;
    // normal: rebias the exponent by -112 and round at bit 13
    const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    // subnormal: adding 0.5 aligns the value's last half-precision bit with float's last bit and rounds there
    const VecU subnormal = (VecU)((VecF)magnitude + splat<VecF>(0.5f)) - 0x3f000000u;
    VecU h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? (VecU)splat<VecF>(0.0f) + 0x7c00u : h;  // rounds to infinity
    h = magnitude > 0x7f800000u ? (VecU)splat<VecF>(0.0f) + 0x7e00u : h;   // NaN
    store_vector(p, __builtin_convertvector(h | ((u >> 16) & 0x8000u), VecH));
  }
#endif
};

}  // namespace DPO_FAST_ISA
}  // namespace dpo_fast

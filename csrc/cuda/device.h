// What the CUDA kernels are written in: the types of logits, 16-byte pieces of memory, reductions over a warp, and the
// launch. Compiled by g++ as well, for the runner in tests/cuda_host, which brings its own DPO_FAST_LAUNCH.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <string.h>

#include "launch.h"

#ifndef DPO_FAST_LAUNCH
#define DPO_FAST_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel<<<blocks, threads, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__), (int)cudaGetLastError())
#endif

namespace dpo_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class To, class From>
DPO_FAST_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The compiler takes x for a new value and forms again whatever follows from it, which needs no registers until then.
__device__ inline void conceal(double& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(x));
#endif
}

__device__ inline void conceal(int64_t& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(x));
#endif
}

// --- memory ----------------------------------------------------------------------------------------------------------

struct alignas(16) Vec16 {
  uint32_t w[4];
};

// Logits that forward reads once: they stay out of the first-level cache.
__device__ inline Vec16 load_once(const Vec16* p) {
#ifdef __CUDA_ARCH__
  Vec16 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(p));
  return v;
#else
  return *p;
#endif
}

// The same for logits that this kernel may overwrite: not by the read-only path.
__device__ inline Vec16 load_once_mutable(const Vec16* p) {
#ifdef __CUDA_ARCH__
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
#else
  return *p;
#endif
}

// 16 bytes from the middle of 32: starting at word 0..3 and bit 0..31 of it.
__device__ inline Vec16 shifted(const Vec16& a, const Vec16& b, int word, int bit) {
  uint32_t t[6], r[5];
  const uint32_t c[8] = {a.w[0], a.w[1], a.w[2], a.w[3], b.w[0], b.w[1], b.w[2], b.w[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) t[i] = word & 2 ? c[i + 2] : c[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) r[i] = word & 1 ? t[i + 1] : t[i];
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.w[i] = (uint32_t)((((uint64_t)r[i + 1] << 32) | r[i]) >> bit);
  return v;
}

// --- types of logits -------------------------------------------------------------------------------------------------

DPO_FAST_HD uint32_t pack_halves(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }

struct Float32 {
  using Storage = uint32_t;
  using Compute = float;
  static constexpr int kType = kFloat32;
  static constexpr uint32_t kMinusInf[2] = {0xff800000u, 0xff800000u};
  __device__ static float value(uint32_t bits) { return bits_as<float>(bits); }
  __device__ static uint32_t storage(float x) { return bits_as<uint32_t>(x); }
};

struct Float64 {
  using Storage = uint64_t;
  using Compute = double;
  static constexpr int kType = kFloat64;
  static constexpr uint32_t kMinusInf[2] = {0, 0xfff00000u};
  __device__ static double value(uint64_t bits) { return bits_as<double>(bits); }
  __device__ static uint64_t storage(double x) { return bits_as<uint64_t>(x); }
};

struct BFloat16 {
  using Storage = uint16_t;
  using Compute = float;
  static constexpr int kType = kBFloat16;
  static constexpr uint32_t kMinusInf[2] = {0xff80ff80u, 0xff80ff80u};
  __device__ static float value(uint16_t bits) { return bits_as<float>((uint32_t)bits << 16); }
  __device__ static uint16_t storage(float x) { return bits_as<uint16_t>(__float2bfloat16_rn(x)); }
  __device__ static uint32_t pack(float a, float b) { return bits_as<uint32_t>(__floats2bfloat162_rn(a, b)); }
  __device__ static uint32_t max_pair(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
};

struct Float16 {
  using Storage = uint16_t;
  using Compute = float;
  static constexpr int kType = kFloat16;
  static constexpr uint32_t kMinusInf[2] = {0xfc00fc00u, 0xfc00fc00u};
  __device__ static float value(uint16_t bits) { return __half2float(bits_as<__half>(bits)); }
  __device__ static uint16_t storage(float x) { return bits_as<uint16_t>(__float2half_rn(x)); }
  __device__ static uint32_t pack(float a, float b) { return bits_as<uint32_t>(__floats2half2_rn(a, b)); }
  __device__ static uint32_t max_pair(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
};

template <class T>
constexpr int kVecLogits = 16 / sizeof(typename T::Storage);

template <class T>
__device__ inline typename T::Storage element(const Vec16& v, int i) {
  if constexpr (sizeof(typename T::Storage) == 2) return (uint16_t)(v.w[i / 2] >> (16 * (i % 2)));
  if constexpr (sizeof(typename T::Storage) == 4) return v.w[i];
  if constexpr (sizeof(typename T::Storage) == 8) return v.w[2 * i] | (uint64_t)v.w[2 * i + 1] << 32;
}

template <class T>
__device__ inline void set_element(Vec16& v, int i, typename T::Storage bits) {
  if constexpr (sizeof(bits) == 2)
    v.w[i / 2] = i % 2 ? (v.w[i / 2] & 0xffffu) | (uint32_t)bits << 16 : (v.w[i / 2] & 0xffff0000u) | bits;
  if constexpr (sizeof(bits) == 4) v.w[i] = bits;
  if constexpr (sizeof(bits) == 8) {
    v.w[2 * i] = (uint32_t)bits;
    v.w[2 * i + 1] = (uint32_t)(bits >> 32);
  }
}

// Moves all elements one place up and puts one first.
template <class T>
__device__ inline void push_front(Vec16& v, typename T::Storage bits) {
  if constexpr (sizeof(bits) == 2) {
#pragma unroll
    for (int i = 3; i > 0; --i) v.w[i] = v.w[i] << 16 | v.w[i - 1] >> 16;
    v.w[0] = v.w[0] << 16 | bits;
  } else {
#pragma unroll
    for (int i = kVecLogits<T> - 1; i > 0; --i) set_element<T>(v, i, element<T>(v, i - 1));
    set_element<T>(v, 0, bits);
  }
}

template <class T>
__device__ inline Vec16 minus_infinities() {
  return Vec16{{T::kMinusInf[0], T::kMinusInf[1], T::kMinusInf[0], T::kMinusInf[1]}};
}

template <class T>
__device__ inline Vec16 pack_vec(const typename T::Compute* x) {
  Vec16 v;
  if constexpr (sizeof(typename T::Storage) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v.w[i] = T::pack(x[2 * i], x[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < kVecLogits<T>; ++i) set_element<T>(v, i, T::storage(x[i]));
  }
  return v;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// NaNs are passed over.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Largest logit of a vector, NaNs passed over.
template <class T>
__device__ inline typename T::Compute max_of(const Vec16& v) {
  if constexpr (sizeof(typename T::Storage) == 2) {
    Vec16 m = v;
    m.w[0] = T::max_pair(T::max_pair(v.w[0], v.w[1]), T::max_pair(v.w[2], v.w[3]));
    return larger(T::value(element<T>(m, 0)), T::value(element<T>(m, 1)));
  } else {
    typename T::Compute m = T::value(element<T>(v, 0));
#pragma unroll
    for (int i = 1; i < kVecLogits<T>; ++i) m = larger(m, T::value(element<T>(v, i)));
    return m;
  }
}

// exp of a difference d in z, as exp_scaled(d * kExpScale). float32 goes by powers of 2, which is one instruction.
template <class Compute>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr double kScale = 1.4426950408889634;  // log2(e)
  static constexpr float kLow = -150;                   // 0 from here on
  __device__ static float of(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
  }
};

template <>
struct Exponential<double> {
  static constexpr double kScale = 1;
  static constexpr double kLow = -746;
  __device__ static double of(double x) { return exp(x); }
};

__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

// The transform of the logits in the kernels' precision; capped or one factor.
template <class Compute, bool kCapped>
struct Transform {
  Compute factor;            // from the shift domain to the exponential's argument
  Compute pre, post, slope;  // u = x * pre, z = tanh(u) * post, dz/dx = slope * (1 - tanh(u)^2)
  __device__ explicit Transform(const LogitTransform& t)
      : factor((Compute)(unit_scale(t) * Exponential<Compute>::kScale)),
        pre((Compute)(kCapped ? t.logit_scale / t.softcap : 0)),
        post((Compute)(t.softcap / t.temperature)),
        slope((Compute)(t.logit_scale / t.temperature)) {}
  // Raw logit -> shift domain.
  __device__ Compute operator()(Compute x) const {
    if constexpr (kCapped) return hyperbolic_tangent(x * pre) * post;
    return x;
  }
};

template <class X>
__device__ inline X warp_max(X x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

// The same tree in every lane: all hold the same bits.
template <class X>
__device__ inline X warp_sum(X x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

__device__ inline int64_t warp_min(int64_t x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, x, lane);
    x = other < x ? other : x;
  }
  return x;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// How a row is cut: pieces of at most kSmallPiece logits, more in a very long row. Nothing but V decides.
constexpr int64_t kSmallPiece = 16384;
constexpr int kMaxPieces = 16;
constexpr int64_t kPieceMultiple = 64;  // keeps the pieces of an aligned row aligned

struct Pieces {
  int64_t size;
  int count;
};

DPO_FAST_HD Pieces pieces_of(int64_t vocab) {
  if (vocab < 1) return Pieces{kPieceMultiple, 1};
  int64_t count = (vocab + kSmallPiece - 1) / kSmallPiece;
  if (count > kMaxPieces) count = kMaxPieces;
  int64_t size = (vocab + count - 1) / count;
  size = (size + kPieceMultiple - 1) / kPieceMultiple * kPieceMultiple;
  return Pieces{size, (int)((vocab + size - 1) / size)};
}

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;
// 16-byte loads that a thread issues together, before it uses the first of them.
constexpr int kLoads = 4;

// A stretch of a row's logits as vectors of 16 bytes, the last one filled up with -inf. Vector j holds the same logits
// wherever the row starts in memory, so sums do not depend on its alignment.
template <class T, bool kMutable>
struct Stretch {
  using Storage = typename T::Storage;
  const Storage* x;
  int64_t stride;
  int n_logits;
  int n_vecs;
  int n_whole;  // vectors that are read 16 bytes at a time

  // n logits, of `rest` that the row has from here on.
  __device__ Stretch(const Storage* start, int64_t vocab_stride, int n, int64_t rest)
      : x(start),
        stride(vocab_stride),
        n_logits(n),
        n_vecs((n + kVecLogits<T> - 1) / kVecLogits<T>),
        n_whole(n / kVecLogits<T>) {
    if (!aligned()) {  // read as 32 bytes, which must not reach past the row
      const int64_t inside = (rest * (int64_t)sizeof(Storage) + byte()) / 16 - 1;
      if (inside < n_whole) n_whole = (int)inside;
    }
    if (stride != 1) n_whole = 0;
  }

  __device__ int byte() const { return (int)((uintptr_t)x % 16); }  // where in its 16 bytes x starts
  __device__ bool aligned() const { return byte() == 0; }

  __device__ Vec16 whole(int j) const {
    return kMutable ? load_once_mutable((const Vec16*)x + j) : load_once((const Vec16*)x + j);
  }

  __device__ Vec16 straddling(int j) const {
    const Vec16* p = (const Vec16*)((uintptr_t)x - byte()) + j;
    return shifted(p[0], p[1], byte() / 4, byte() % 4 * 8);
  }

  // The logits one by one; a loop, not unrolled, because registers count more than this seldom path.
  __device__ Vec16 gathered(int j) const {
    Vec16 v = minus_infinities<T>();
    int i = n_logits - j * kVecLogits<T>;
    if (i > kVecLogits<T>) i = kVecLogits<T>;
    const Storage* p = x + (j * (int64_t)kVecLogits<T> + i) * stride;
#pragma unroll 1
    for (; i > 0; --i) {
      p -= stride;
      push_front<T>(v, *p);
    }
    return v;
  }

  // Whether vectors j, j + kRowThreads, ... of a turn are all read 16 bytes at a time.
  __device__ bool turn_is_whole(int j) const { return j + (kLoads - 1) * kRowThreads < n_whole; }

  __device__ void load_turn(int j, Vec16* v) const {
    if (aligned() && turn_is_whole(j)) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) v[i] = whole(j + i * kRowThreads);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (j + i * kRowThreads < n_whole)
        v[i] = aligned() ? whole(j + i * kRowThreads) : straddling(j + i * kRowThreads);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (j + i * kRowThreads >= n_whole) v[i] = gathered(j + i * kRowThreads);
  }
};

}  // namespace dpo_fast

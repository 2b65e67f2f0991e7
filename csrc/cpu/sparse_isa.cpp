// The SIMD functions of sparse_head.h. setup.py compiles this file once per instruction set, with DPO_FAST_ISA naming
// it.
#include "sparse_head.h"
#include "transform.h"

namespace dpo_fast {
namespace DPO_FAST_ISA {
namespace {

constexpr int kLanes = VecTraits<VecF>::kLanes;
// Accumulators of one slice of a row: with a factor and a load they fit the registers.
constexpr int kSlice = kVectorBytes == 64 ? 24 : 12;

typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));

// kLanes adjacent elements as floats, in their order.
DPO_FAST_INLINE VecF load_bfloat16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (VecF)(__builtin_convertvector(load_vector<VecH>(p), VecU) << 16);
#endif
}

template <class Io>
DPO_FAST_INLINE VecF load_floats(const typename Io::Storage* p) {
  if constexpr (Io::kVectors == 1) {
    VecF v;
    Io::load(p, &v);
    return v;
  } else {
    return load_bfloat16(p);
  }
}

// The first n < kLanes of them, zeros behind.
template <class Io>
DPO_FAST_INLINE VecF load_few(const typename Io::Storage* p, int64_t n) {
  typename Io::Storage padded[kLanes] = {};
  memcpy(padded, p, n * sizeof(*p));
  return load_floats<Io>(padded);
}

// --- candidates ------------------------------------------------------------------------------------------------------

// Vectors looked at together where lanes cannot be written out in one instruction: few hold a candidate.
constexpr int kGroup = 4;

// One bit a lane: above the cut. Of kGroup vectors at once.
DPO_FAST_INLINE uint32_t lanes_above(const VecF* v, VecF cut) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  (void)v, (void)cut;  // see `candidates`
#elif defined(__AVX2__)
  for (int k = 0; k < kGroup; ++k)
    bits |= (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v[k], cut, _CMP_GT_OQ)) << (k * kLanes);
#elif defined(__SSE2__)
  for (int k = 0; k < kGroup; ++k) bits |= (uint32_t)_mm_movemask_ps(_mm_cmpgt_ps(v[k], cut)) << (k * kLanes);
#else
  const VecI any = (v[0] > cut) | (v[1] > cut) | (v[2] > cut) | (v[3] > cut);
  const VecL halves = (VecL)any;
  if ((halves[0] | halves[1]) == 0) return 0;
  for (int k = 0; k < kGroup; ++k)
    for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(v[k][i] > cut[0]) << (k * kLanes + i);
#endif
  return bits;
}

template <class Io>
int64_t candidates(const void* logits, int64_t n, float cut, int32_t* columns, float* values) {
  const typename Io::Storage* x = (const typename Io::Storage*)logits;
  const VecF limit = splat<VecF>(cut);
  int64_t found = 0, i = 0;
#if defined(__AVX512F__)
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch((const char*)(x + i) + 2048);
    const VecF v = load_floats<Io>(x + i);
    const __mmask16 above = _mm512_cmp_ps_mask(v, limit, _CMP_GT_OQ);
    if (above) {
      _mm512_storeu_ps(values + found, _mm512_maskz_compress_ps(above, v));
      _mm512_storeu_si512(columns + found, _mm512_maskz_compress_epi32(above, column));
      found += __builtin_popcount(above);
    }
    column = _mm512_add_epi32(column, _mm512_set1_epi32(kLanes));
  }
#else
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    __builtin_prefetch((const char*)(x + i) + 2048);
    VecF v[kGroup];
    for (int k = 0; k < kGroup; ++k) v[k] = load_floats<Io>(x + i + k * kLanes);
    uint32_t bits = lanes_above(v, limit);
    if (!bits) continue;
    float all[kGroup * kLanes];
    memcpy(all, v, sizeof all);
    for (; bits; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      columns[found] = (int32_t)(i + lane);
      values[found++] = all[lane];
    }
  }
#endif
  for (; i < n; i += kLanes) {
    const int64_t rest = n - i < kLanes ? n - i : kLanes;
    const VecF v = load_few<Io>(x + i, rest);
    for (int lane = 0; lane < rest; ++lane)
      if (v[lane] > cut) {
        columns[found] = (int32_t)(i + lane);
        values[found++] = v[lane];
      }
  }
  return found;
}

// --- probabilities ---------------------------------------------------------------------------------------------------

template <TransformKind kKind, bool kShort>
DPO_FAST_INLINE VecF unscaled(VecF x, const Consts<VecF>& c, VecF shift, VecF* slope) {
  VecF y = x;
  *slope = c.slope;
  if constexpr (kKind == kCapped) {
    const VecF u = hyperbolic_tangent(x * c.pre);
    y = u * c.post;
    *slope = c.slope - c.slope * u * u;
  }
  return exponential<kShort>(to_z<kKind>(y - shift, c));
}

template <TransformKind kKind, bool kShort>
void all_probabilities(const float* x, int64_t n, const LogitTransform& transform, double shift, double inv_sum,
                       float* p, float* slopes) {
  using Form = Exp<VecF, kShort>;
  const Consts<VecF> c(transform);
  const VecF shifts = splat<VecF>((float)shift);
  // the shift as the row kernels take it: a float is not exact enough
  bool takes_shift = false;
  if constexpr (kKind == kPlain && Form::kTakesShift) takes_shift = fabs(shift) <= Form::kMaxShift;
  const Form form(takes_shift ? shift : 0);
  const VecF factor = splat<VecF>((float)inv_sum / (takes_shift ? Form::kUnit : 1));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t size = n - i < kLanes ? n - i : kLanes;
    VecF v = splat<VecF>(0), slope;
    memcpy(&v, x + i, size * sizeof(float));
    if (kKind == kPlain && takes_shift) {
      slope = c.slope;
      v = Form::template value<true>(form, v);
    } else {
      v = unscaled<kKind, kShort>(v, c, shifts, &slope);
    }
    v *= factor;
    memcpy(p + i, &v, size * sizeof(float));
    memcpy(slopes + i, &slope, size * sizeof(float));
  }
}

template <TransformKind kKind>
void probabilities(const float* x, int64_t n, const LogitTransform& transform, double shift, double inv_sum, bool half,
                   float* p, float* slopes) {
  if (half)
    all_probabilities<kKind, true>(x, n, transform, shift, inv_sum, p, slopes);
  else
    all_probabilities<kKind, false>(x, n, transform, shift, inv_sum, p, slopes);
}

// --- sums of rows of a table -----------------------------------------------------------------------------------------

template <class Io, int kVectors>
DPO_FAST_INLINE void gather_slice(const int32_t* index, const float* values, int64_t n,
                                  const typename Io::Storage* table, int64_t stride, float* out, bool add) {
  // unrolled, or the sums would live in memory
  VecF sum[kVectors];
#pragma GCC unroll 32
  for (int k = 0; k < kVectors; ++k) sum[k] = add ? load_vector<VecF>(out + k * kLanes) : splat<VecF>(0);
  for (int64_t i = 0; i < n; ++i) {
    const typename Io::Storage* row = table + index[i] * stride;
    const VecF value = splat<VecF>(values[i]);
#pragma GCC unroll 32
    for (int k = 0; k < kVectors; ++k) sum[k] = multiply_add(value, load_floats<Io>(row + k * kLanes), sum[k]);
  }
#pragma GCC unroll 32
  for (int k = 0; k < kVectors; ++k) store_vector(out + k * kLanes, sum[k]);
}

template <class Io>
void gather(const int32_t* index, const float* values, int64_t n, const void* rows, int64_t stride, int64_t width,
            float* out, bool add) {
  const typename Io::Storage* table = (const typename Io::Storage*)rows;
  int64_t at = 0;
#define DPO_FAST_SLICES(kVectors)                                      \
  for (; at + (kVectors) * kLanes <= width; at += (kVectors) * kLanes) \
  gather_slice<Io, (kVectors)>(index, values, n, table + at, stride, out + at, add)
  DPO_FAST_SLICES(kSlice);
  DPO_FAST_SLICES(kSlice / 2);
  DPO_FAST_SLICES(kSlice / 4);
  DPO_FAST_SLICES(1);
#undef DPO_FAST_SLICES
  if (at == width) return;
  const int64_t rest = width - at;
  VecF sum = splat<VecF>(0);
  if (add) memcpy(&sum, out + at, rest * sizeof(float));
  for (int64_t i = 0; i < n; ++i)
    sum = multiply_add(splat<VecF>(values[i]), load_few<Io>(table + index[i] * stride + at, rest), sum);
  memcpy(out + at, &sum, rest * sizeof(float));
}

#define DPO_FAST_STRING_(x) #x
#define DPO_FAST_STRING(x) DPO_FAST_STRING_(x)

}  // namespace

extern const SparseKernels kSparseKernels;
const SparseKernels kSparseKernels = {
    DPO_FAST_STRING(DPO_FAST_ISA),
    {candidates<Float32>, nullptr, candidates<BFloat16>, candidates<Float16>},
    {probabilities<kPlain>, probabilities<kScaled>, probabilities<kCapped>},
    {gather<Float32>, nullptr, gather<BFloat16>, gather<Float16>},
};

}  // namespace DPO_FAST_ISA
}  // namespace dpo_fast

// Rows as the loops of batch.cpp see them: which kernel a row takes, what happens to its targets, and where the results
// go. Compiled for the baseline processor; the arithmetic on whole rows is in rows_isa.cpp.
#include "rows.h"

#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dpo_fast {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const RowKernels kKernels;
}
namespace avx512 {
extern const RowKernels kKernels;
}
namespace avx2 {
extern const RowKernels kKernels;
}
#endif
namespace portable {
extern const RowKernels kKernels;
}

const RowKernels* compiled_kernels(int i) {
  static const RowKernels* const list[] = {
#if defined(__x86_64__)
      &avx512_bf16::kKernels, &avx512::kKernels, &avx2::kKernels,
#endif
      &portable::kKernels, nullptr};
  return list[i];
}

bool processor_supports(const RowKernels* kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
  if (kernels == &avx512_bf16::kKernels) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (kernels == &avx512::kKernels) return avx512;
  if (kernels == &avx2::kKernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return kernels == &portable::kKernels;
}

CpuRows::CpuRows(const Rows& rows, const RowKernels& isa)
    : Rows(rows),
      kernels(&isa.types[logit_type]),
      transform_kind(transform.softcap > 0                                ? kCapped
                     : transform.logit_scale / transform.temperature != 1 ? kScaled
                                                                          : kPlain),
      logit_bytes(logit_type == kFloat64   ? 8
                  : logit_type == kFloat32 ? 4
                                           : 2),
      wide(logit_type == kFloat64) {}

namespace {

uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

uint16_t to_bfloat16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}

uint16_t to_float16(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;
  if (magnitude >= 0x38800000u) return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13);
  float m;  // subnormal: adding 0.5 rounds at half precision's last bit
  memcpy(&m, &magnitude, sizeof m);
  return sign | (float_bits(m + 0.5f) - 0x3f000000u);
}

void store_logit(void* p, int logit_type, double x) {
  switch (logit_type) {
    case kFloat32: *(float*)p = (float)x; break;
    case kFloat64: *(double*)p = x; break;
    case kBFloat16: *(uint16_t*)p = to_bfloat16((float)x); break;
    case kFloat16: *(uint16_t*)p = to_float16((float)x); break;
  }
}

const char* row_logits(const CpuRows& rows, int64_t row) {
  return (const char*)rows.logits +
         row_offset(row, rows.rows_per_seq, rows.seq_stride, rows.row_stride) * rows.logit_bytes;
}

char* row_grad_logits(const CpuRows& rows, int64_t row, const GradTensor& out) {
  return out.data + row_offset(row, rows.rows_per_seq, out.seq_stride, out.row_stride) * rows.logit_bytes;
}

// The logit of token v in the shift domain.
double logit_value(const CpuRows& rows, const char* x, int64_t v) {
  return rows.kernels->value[rows.transform_kind](x + v * rows.vocab_stride * rows.logit_bytes, rows.transform);
}

// The logit of token v itself.
double raw_logit(const CpuRows& rows, const char* x, int64_t v) {
  return rows.kernels->value[kPlain](x + v * rows.vocab_stride * rows.logit_bytes, rows.transform);
}

}  // namespace

void forward_piece(const CpuRows& rows, int64_t row, int64_t piece, const TokenArrays& out, RowPart* part) {
  const int64_t start = piece * kPieceLogits, size = std::min(kPieceLogits, rows.vocab - start);
  const char* x = row_logits(rows, row);
  *part = rows.kernels->forward[rows.transform_kind][wants_extras(out)](
      x + start * rows.vocab_stride * rows.logit_bytes, rows.vocab_stride, size, rows.transform);
  if (part->argmax >= 0) part->argmax += start;
  // while the piece is in a cache; logps' type holds the value exactly
  for (int64_t i = row * rows.n_targets; i < (row + 1) * rows.n_targets; ++i)
    if (rows.targets[i] >= start && rows.targets[i] < start + size)
      store_number(out.logps, i, logit_value(rows, x, rows.targets[i]), rows.wide);
}

void finish_row(const CpuRows& rows, int64_t row, const RowPart* parts, const TokenArrays& out) {
  const double unit = unit_scale(rows.transform);
  uint8_t* is_top1 = (uint8_t*)out.statistics[kStatistic_is_top1];
  RowPart total = empty_part();
  for (int64_t i = 0; i < pieces_per_row(rows); ++i) merge_parts(total, parts[i], unit);
  for (int64_t i = row * rows.n_targets; i < (row + 1) * rows.n_targets; ++i) {
    store_number(out.logps, i, row_logp(total, load_number(out.logps, i, rows.wide), unit), rows.wide);
    if (is_top1) is_top1[i] = row_is_top1(total, rows.targets[i]);
  }
  for (int i = 0; i < kStatistics; ++i)
    if (out.statistics[i] && i != kStatistic_is_top1)
      store_number(out.statistics[i], row, row_statistic(i, total, unit, rows.vocab), rows.wide);
  if (out.stats) {
    reshift(total, rows.wide ? total.shift : (float)total.shift, unit);  // the sum has to fit the stored shift
    store_number(out.stats, 2 * row, total.shift, rows.wide);
    store_number(out.stats, 2 * row + 1, 1 / total.sum, rows.wide);
  }
}

void finish_ignored_row(const CpuRows& rows, int64_t row, const TokenArrays& out) {
  uint8_t* is_top1 = (uint8_t*)out.statistics[kStatistic_is_top1];
  for (int64_t i = row * rows.n_targets; i < (row + 1) * rows.n_targets; ++i) {
    store_number(out.logps, i, 0, rows.wide);
    if (is_top1) is_top1[i] = 0;
  }
  if (out.stats) {
    store_number(out.stats, 2 * row, 0, rows.wide);
    store_number(out.stats, 2 * row + 1, 0, rows.wide);
  }
  for (int i = 0; i < kStatistics; ++i)
    if (out.statistics[i] && i != kStatistic_is_top1) store_number(out.statistics[i], row, 0, rows.wide);
}

// Zeros past the caches: an ordinary store would first read the line that it overwrites.
static void stream_zeros(char* x, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = std::min<int64_t>(-reinterpret_cast<uintptr_t>(x) & 15, bytes);
  memset(x, 0, head);
  char* const end = x + bytes;
  for (x += head; end - x >= 16; x += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(x), _mm_setzero_si128());
  memset(x, 0, end - x);
  _mm_sfence();  // streaming stores are not ordered before what another thread is told by ordinary ones
#else
  memset(x, 0, bytes);
#endif
}

namespace {

void zero_columns(const CpuRows& rows, int64_t row, int64_t start, int64_t end, const GradTensor& out) {
  char* dx = row_grad_logits(rows, row, out) + start * out.vocab_stride * rows.logit_bytes;
  const int64_t size = end - start;
  if (out.vocab_stride == 1) {
    char* const dx_end = dx + size * rows.logit_bytes;
    const bool in_place = out.data == rows.logits;
    if (in_place && rows.n_rows * rows.width * rows.logit_bytes > kStreamBytes) {
      stream_zeros(dx, dx_end - dx);
    } else {  // but for what is zero as it is
      char* const start = std::clamp(rows.zeros.start, dx, dx_end);
      char* const end = std::clamp(rows.zeros.end, start, dx_end);
      memset(dx, 0, start - dx);
      memset(end, 0, dx_end - end);
    }
    return;
  }
  for (int64_t i = 0; i < size; ++i) memset(dx + i * out.vocab_stride * rows.logit_bytes, 0, rows.logit_bytes);
}

// The gradient of columns [start, end) of a row that counts.
void grad_columns(const CpuRows& rows, int64_t row, int64_t start, int64_t end, const TokenArrays& saved,
                  const Grads& grads, double from_seq, const RowIncoming& in, const GradTensor& out) {
  const int64_t n_targets = rows.n_targets, first = row * n_targets;
  const int64_t* targets = rows.targets + first;
  const char* x = row_logits(rows, row);
  char* dx = row_grad_logits(rows, row, out);
  const double entropy = in.entropy != 0 ? load_number(saved.statistics[kStatistic_entropy], row, rows.wide) : 0;
  const RowGrad grad = row_grad(load_number(saved.stats, 2 * row, rows.wide),
                                load_number(saved.stats, 2 * row + 1, rows.wide), entropy, in);

  // The true-class terms, formed before the kernel may overwrite the logits they need. A target named several times
  // is rounded once.
  std::vector<std::pair<int64_t, double>> terms;
  auto term = [&](int64_t k, double g) {
    return target_grad(load_number(saved.logps, first + k, rows.wide), g, entropy, in) *
           (rows.transform_kind == kPlain ? 1 : transform_slope(rows.transform, raw_logit(rows, x, targets[k])));
  };
  std::pair<int64_t, double> single{-1, 0};
  if (n_targets == 1) {
    if (targets[0] >= start && targets[0] < end) single = {targets[0], term(0, in.logps)};
  } else {
    std::vector<std::pair<int64_t, int64_t>> order;
    for (int64_t k = 0; k < n_targets; ++k)
      if (targets[k] >= start && targets[k] < end) order.push_back({targets[k], k});
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size();) {
      const auto [target, k] = order[i];
      double g = 0;
      for (; i < order.size() && order[i].first == target; ++i)
        g += target_incoming(rows, grads, first + order[i].second, from_seq);
      terms.push_back({target, term(k, g)});
    }
  }

  rows.kernels->backward[rows.transform_kind][in.entropy != 0](
      x + start * rows.vocab_stride * rows.logit_bytes, rows.vocab_stride,
      dx + start * out.vocab_stride * rows.logit_bytes, out.vocab_stride, end - start, rows.transform, grad);

  auto put = [&](const std::pair<int64_t, double>& t) {
    store_logit(dx + t.first * out.vocab_stride * rows.logit_bytes, rows.logit_type, t.second);
  };
  if (single.first >= 0) put(single);
  for (const auto& t : terms) put(t);
}

}  // namespace

void backward_piece(const CpuRows& rows, int64_t row, int64_t piece, const TokenArrays& saved, const Grads& grads,
                    double from_seq, const GradTensor& out) {
  const int64_t start = piece * kPieceLogits, end = std::min(start + kPieceLogits, rows.vocab);
  const int64_t columns_end = end == rows.vocab ? rows.width : end;  // with the padding
  RowIncoming in = {0, 0, 0, false};
  if (row_state(rows, row) == kRowKept) in = row_incoming(rows, grads, row, from_seq);
  if (!in.any) {
    zero_columns(rows, row, start, columns_end, out);
    return;
  }
  grad_columns(rows, row, start, end, saved, grads, from_seq, in, out);
  if (columns_end > end) zero_columns(rows, row, end, columns_end, out);
}

}  // namespace dpo_fast

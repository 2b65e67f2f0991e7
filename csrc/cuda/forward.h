// The forward row kernel: one read of each kept row. A row is cut into pieces by V alone (device.h); a block takes a
// whole row, or some of its pieces when the rows are few. Either way a piece's sums come from the same threads in the
// same order, and pieces merge in the same tree, so both ways give the same bits.
#pragma once

#include "device.h"

namespace dpo_fast {

struct ForwardArgs {
  Rows rows;
  TokenArrays out;
  RowPart* parts;  // [rows, pieces], null: a block takes a whole row
  Pieces pieces;
  int pieces_per_block;
  int64_t first_row;  // of this launch
};

// A thread's sums over its logits of one piece, relative to `shift`.
template <class T, bool kCapped>
struct ThreadSums {
  using Compute = typename T::Compute;
  Compute shift;
  Compute max;                    // of the raw logits
  Compute sum[2];                 // two chains of additions
  Compute sum_et, sum_sq, sum_z;  // t: the exponential's argument; z: in the shift domain, over kMeanScale
  Vec16 top;                      // the first vector that holds max
  int top_index;

  __device__ explicit ThreadSums(const Transform<Compute, kCapped>& transform)
      : shift(transform((Compute)-INFINITY)),
        max(-INFINITY),
        sum{0, 0},
        sum_et(0),
        sum_sq(0),
        sum_z(0),
        top(minus_infinities<T>()),
        top_index(-1) {}
};

// z is summed over this, so logits near float's limit do not overflow.
constexpr double kMeanScale = 1024;

// Moves the shift to the raw maximum `max`, when that is larger than all before.
template <class T, bool kCapped, bool kExtras>
__device__ inline void follow_max(ThreadSums<T, kCapped>& s, typename T::Compute max,
                                  const Transform<typename T::Compute, kCapped>& transform) {
  using Compute = typename T::Compute;
  const Compute shift = transform(max);
  // bounded where its exponential is 0: 0 * -inf would be NaN
  const Compute d = larger((s.shift - shift) * transform.factor, Exponential<Compute>::kLow);
  const Compute f = Exponential<Compute>::of(d);
  if constexpr (kExtras) {
    s.sum_et = (s.sum_et + (s.sum[0] + s.sum[1]) * d) * f;
    s.sum_sq *= f * f;
  }
  s.sum[0] *= f;
  s.sum[1] *= f;
  s.shift = shift;
}

// Adds kLoads vectors, j and on. kTail: some lie beyond the end, as -inf, which all sums but that of z leave out by
// themselves.
template <class T, bool kCapped, bool kExtras, bool kTail>
__device__ inline void add_turn(const Vec16* v, int j, int n, const Transform<typename T::Compute, kCapped>& transform,
                                ThreadSums<T, kCapped>& s) {
  using Compute = typename T::Compute;
  Compute max = s.max;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const Compute m = max_of<T>(v[i]);
    if constexpr (kExtras) {
      if (m > max) {
        s.top = v[i];
        s.top_index = j + i * kRowThreads;
      }
    }
    max = larger(max, m);
  }
  if (max > s.max) {
    s.max = max;
    follow_max<T, kCapped, kExtras>(s, max, transform);
  }
  const Compute shift = s.shift == (Compute)-INFINITY ? 0 : s.shift;  // -inf - -inf would be NaN
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
#pragma unroll
    for (int e = 0; e < kVecLogits<T>; ++e) {
      const Compute y = transform(T::value(element<T>(v[i], e)));
      // subtracted before the factor, which rounds: a common offset of the row must not reach the exponent
      Compute t = (y - shift) * transform.factor;
      if (kCapped && kTail && (j + i * kRowThreads) * kVecLogits<T> + e >= n) t = -INFINITY;
      const Compute p = Exponential<Compute>::of(t);
      s.sum[e % 2] += p;
      if constexpr (kExtras) {
        s.sum_et = fma(p, larger(t, Exponential<Compute>::kLow), s.sum_et);
        s.sum_sq = fma(p, p, s.sum_sq);
        if (!kTail || (j + i * kRowThreads) * kVecLogits<T> + e < n)
          s.sum_z = fma(y, (Compute)(1 / kMeanScale), s.sum_z);
      }
    }
  }
}

template <class T, bool kCapped, bool kExtras>
__device__ inline void add_stretch(const Stretch<T, false>& logits,
                                   const Transform<typename T::Compute, kCapped>& transform,
                                   ThreadSums<T, kCapped>& s) {
  for (int j = threadIdx.x; j < logits.n_vecs; j += kLoads * kRowThreads) {
    Vec16 v[kLoads];
    logits.load_turn(j, v);
    // a turn that is not whole may still be complete: then the bounds change nothing
    if ((kExtras || kCapped) && !logits.turn_is_whole(j))
      add_turn<T, kCapped, kExtras, true>(v, j, logits.n_logits, transform, s);
    else
      add_turn<T, kCapped, kExtras, false>(v, j, logits.n_logits, transform, s);
  }
}

// The warp's sums, in lane 0.
template <class T, bool kCapped, bool kExtras>
__device__ inline RowPart warp_part(const ThreadSums<T, kCapped>& s,
                                    const Transform<typename T::Compute, kCapped>& transform, double unit,
                                    int64_t piece_start) {
  using Compute = typename T::Compute;
  const Compute shift = warp_max(s.shift);
  const Compute d = s.shift == shift ? 0 : larger((s.shift - shift) * transform.factor, Exponential<Compute>::kLow);
  const Compute f = Exponential<Compute>::of(d);
  const Compute sum = s.sum[0] + s.sum[1];
  RowPart part = empty_part();
  part.shift = shift;
  part.sum = warp_sum(sum * f);
  if constexpr (kExtras) {
    const double nats = 1 / Exponential<Compute>::kScale;
    part.sum_ed = nats * warp_sum((s.sum_et + sum * d) * f);
    part.sum_sq = warp_sum(s.sum_sq * (f * f));
    part.sum_z = kMeanScale * unit * warp_sum((double)s.sum_z);
    const Compute max = warp_max(s.max);
    int64_t first = INT64_MAX;
    if (s.top_index >= 0 && s.max == max) {
      int e = kVecLogits<T> - 1;
#pragma unroll
      for (int i = kVecLogits<T> - 2; i >= 0; --i)
        if (T::value(element<T>(s.top, i)) == max) e = i;
      first = piece_start + (int64_t)s.top_index * kVecLogits<T> + e;
    }
    first = warp_min(first);
    part.max = max;
    part.argmax = first == INT64_MAX ? -1 : first;
  }
  return part;
}

// Merges the lanes' parts, of stretches in any order that `argmax` tells; the result is in every lane.
__device__ inline RowPart merge_lanes(RowPart part, double unit, bool extras) {
  reshift(part, warp_max(part.shift), unit);
  part.sum = warp_sum(part.sum);
  if (extras) {
    part.sum_ed = warp_sum(part.sum_ed);
    part.sum_sq = warp_sum(part.sum_sq);
    part.sum_z = warp_sum(part.sum_z);
    const double max = warp_max(part.max);
    const int64_t first = warp_min(part.max == max && part.argmax >= 0 ? part.argmax : INT64_MAX);
    part.max = max;
    part.argmax = first == INT64_MAX ? -1 : first;
  }
  return part;
}

template <class T>
__device__ inline const typename T::Storage* row_logits(const Rows& rows, int64_t row) {
  return (const typename T::Storage*)rows.logits + row_offset(row, rows.rows_per_seq, rows.seq_stride, rows.row_stride);
}

// Writes a kept row's outputs from its merged sums, which every lane of the calling warp holds.
template <class T, bool kCapped>
__device__ inline void finish_row(const Rows& rows, int64_t row, const RowPart& total, const TokenArrays& out,
                                  int lane) {
  using Compute = typename T::Compute;
  constexpr bool kWide = T::kType == kFloat64;
  const Transform<Compute, kCapped> transform(rows.transform);
  const double unit = unit_scale(rows.transform);
  const typename T::Storage* x = row_logits<T>(rows, row);
  uint8_t* is_top1 = (uint8_t*)out.statistics[kStatistic_is_top1];
  for (int64_t k = lane; k < rows.n_targets; k += kWarp) {
    const int64_t i = row * rows.n_targets + k, target = rows.targets[i];
    const bool valid = in_vocab(rows, target);
    const double value = valid ? (double)transform(T::value(x[target * rows.vocab_stride])) : NAN;
    store_number(out.logps, i, row_logp(total, value, unit), kWide);
    if (is_top1) is_top1[i] = valid && row_is_top1(total, target);
  }
  if (lane != 0) return;
  if (out.stats) {
    store_number(out.stats, 2 * row, total.shift, kWide);
    store_number(out.stats, 2 * row + 1, 1 / total.sum, kWide);
  }
#pragma unroll
  for (int i = 0; i < kStatistics; ++i)
    if (out.statistics[i] && i != kStatistic_is_top1)
      store_number(out.statistics[i], row, row_statistic(i, total, unit, rows.vocab), kWide);
}

__device__ inline void finish_ignored_row(const Rows& rows, int64_t row, const TokenArrays& out, int lane) {
  const bool wide = is_wide(rows);
  uint8_t* is_top1 = (uint8_t*)out.statistics[kStatistic_is_top1];
  for (int64_t k = lane; k < rows.n_targets; k += kWarp) {
    store_number(out.logps, row * rows.n_targets + k, 0, wide);
    if (is_top1) is_top1[row * rows.n_targets + k] = 0;
  }
  if (lane != 0) return;
  if (out.stats) {
    store_number(out.stats, 2 * row, 0, wide);
    store_number(out.stats, 2 * row + 1, 0, wide);
  }
#pragma unroll
  for (int i = 0; i < kStatistics; ++i)
    if (out.statistics[i] && i != kStatistic_is_top1) store_number(out.statistics[i], row, 0, wide);
}

// Blocks per multiprocessor that the registers must allow: as many as go without spilling.
template <class T, bool kExtras>
constexpr int kForwardBlocks = T::kType == kFloat64 ? 1
                               : kExtras            ? 3
                                                    : 4;

template <class T, bool kCapped, bool kExtras>
__global__ void __launch_bounds__(kRowThreads, (kForwardBlocks<T, kExtras>)) forward_kernel(ForwardArgs a) {
  __shared__ RowPart warp_parts[kMaxPieces * kRowWarps];
  __shared__ RowPart piece_parts[kMaxPieces];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool split = a.parts != nullptr;
  const Transform<typename T::Compute, kCapped> transform(a.rows.transform);
  const double unit = unit_scale(a.rows.transform);
  const int64_t row = a.first_row + blockIdx.x;
  const int first = blockIdx.y * a.pieces_per_block, left = a.pieces.count - first;
  const int count = left < a.pieces_per_block ? left : a.pieces_per_block;
  if (row_state(a.rows, row) == kRowIgnored) {
    if (!split && warp == 0) finish_ignored_row(a.rows, row, a.out, lane);
    return;
  }
  const typename T::Storage* x = row_logits<T>(a.rows, row);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int64_t start = (first + i) * a.pieces.size, rest = a.rows.vocab - start;
    const int n = (int)(rest < a.pieces.size ? rest : a.pieces.size);
    ThreadSums<T, kCapped> sums(transform);
    add_stretch<T, kCapped, kExtras>(Stretch<T, false>(x + start * a.rows.vocab_stride, a.rows.vocab_stride, n, rest),
                                     transform, sums);
    const RowPart part = warp_part<T, kCapped, kExtras>(sums, transform, unit, start);
    if (lane == 0) warp_parts[i * kRowWarps + warp] = part;
  }
  __syncthreads();
  for (int i = warp; i < count; i += kRowWarps) {
    const RowPart part = merge_lanes(lane < kRowWarps ? warp_parts[i * kRowWarps + lane] : empty_part(), unit, kExtras);
    if (lane == 0) (split ? a.parts[row * a.pieces.count + first + i] : piece_parts[i]) = part;
  }
  if (split) return;
  __syncthreads();
  if (warp == 0)
    finish_row<T, kCapped>(a.rows, row, merge_lanes(lane < count ? piece_parts[lane] : empty_part(), unit, kExtras),
                           a.out, lane);
}

// The rows that were cut: a warp merges the pieces of one.
template <class T, bool kCapped>
__global__ void __launch_bounds__(kRowThreads, 2) finish_kernel(ForwardArgs a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool extras = wants_extras(a.out);
  const int64_t row = a.first_row + (int64_t)blockIdx.x * kRowWarps + warp;
  if (row >= a.rows.n_rows) return;
  if (row_state(a.rows, row) == kRowIgnored) {
    finish_ignored_row(a.rows, row, a.out, lane);
    return;
  }
  const RowPart part = lane < a.pieces.count ? a.parts[row * a.pieces.count + lane] : empty_part();
  finish_row<T, kCapped>(a.rows, row, merge_lanes(part, unit_scale(a.rows.transform), extras), a.out, lane);
}

constexpr int64_t kMaxBlocks = 1 << 30;

// Calls launch(first, blocks) until all units of work have a block: once, short of a thousand million.
template <class Launch>
int launch_all(int64_t units, const Launch& launch) {
  int status = 0;
  for (int64_t first = 0; first < units && status == 0; first += kMaxBlocks)
    status = launch(first, (unsigned)(units - first < kMaxBlocks ? units - first : kMaxBlocks));
  return status;
}

template <class T, bool kCapped>
int launch_forward(ForwardArgs a, void* stream) {
  const bool extras = wants_extras(a.out);
  auto* kernel = extras ? forward_kernel<T, kCapped, true> : forward_kernel<T, kCapped, false>;
  const unsigned split = (a.pieces.count + a.pieces_per_block - 1) / a.pieces_per_block;
  const int status = launch_all(a.rows.n_rows, [&](int64_t first, unsigned blocks) {
    a.first_row = first;
    return DPO_FAST_LAUNCH(kernel, dim3(blocks, split), kRowThreads, stream, a);
  });
  if (status != 0 || !a.parts) return status;
  auto* finish = finish_kernel<T, kCapped>;
  return launch_all((a.rows.n_rows + kRowWarps - 1) / kRowWarps, [&](int64_t first, unsigned blocks) {
    a.first_row = first * kRowWarps;
    return DPO_FAST_LAUNCH(finish, blocks, kRowThreads, stream, a);
  });
}

}  // namespace dpo_fast

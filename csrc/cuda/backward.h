// The backward row kernel: one read and one write per logit of the rows that have a gradient, zeros for the others and
// for the padding. A block takes one piece of one row; the gradient may go into the logits' own memory.
#pragma once

#include "forward.h"

namespace dpo_fast {

struct BackwardArgs {
  Rows rows;
  Sequences seqs;
  TokenArrays saved;
  Grads grads;
  GradTensor out;
  Pieces pieces;
  int64_t first_row;        // of this launch
  const double* seq_saved;  // [n_seqs, kSeqSaved], null: gradients of tokens only
  const double* seq_grads;  // [n_seqs], null: dloss/dlogp times the gradient of the loss
  double unit;              // unit_scale: a division that would need registers here
};

// The sequence that holds a row; n_seqs: none does.
__device__ inline int64_t seq_of(const Rows& rows, const Sequences& seqs, int64_t row) {
  if (!seqs.cu_seqlens) return row / rows.rows_per_seq;
  int64_t low = 0, high = seqs.n_seqs;  // the last s with bound(s) <= row
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (seq_bound(seqs, middle) <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return seq_bound(seqs, 0) > row ? seqs.n_seqs : low;
}

// The sequence's gradient as it reaches each of the row's log-probs.
__device__ inline double row_grad_from_seq(const BackwardArgs& a, int64_t row) {
  if (!a.seq_saved) return 0;
  const int64_t s = seq_of(a.rows, a.seqs, row);
  if (s >= a.seqs.n_seqs) return 0;
  const bool wide = is_wide(a.rows);
  double g = a.grads.seq_logps ? load_number(a.grads.seq_logps, s, wide) : 0;
  if (a.seq_grads)
    g += a.seq_grads[s];
  else if (a.grads.loss)
    g += vanishing(load_number(a.grads.loss, 0, wide), a.seq_saved[kSeqSaved * s + kSeqGrad]);
  return grad_from_seq(g, a.seq_saved[kSeqSaved * s + kNorm], row_weight(a.rows, row));
}

// A row's coefficients in the kernels' precision; the slope of a plain scaling is part of them.
template <class Compute>
struct RowCoefs {
  Compute shift, coef, entropy_coef, mean_t;  // t: the exponential's argument
};

template <class T, bool kCapped, bool kEntropy>
struct PieceGrad {
  using Compute = typename T::Compute;
  static constexpr bool kWide = T::kType == kFloat64;

  // Without kEntropy the compiler knows that there is no gradient of the entropy.
  __device__ static RowIncoming incoming(const BackwardArgs& a, int64_t row) {
    Grads grads = a.grads;
    if constexpr (!kEntropy) grads.statistics[kStatistic_entropy] = nullptr;
    return row_incoming(a.rows, grads, row, row_grad_from_seq(a, row));
  }

  // Read only where its gradient is not 0.
  __device__ static double entropy_of(const BackwardArgs& a, int64_t row, const RowIncoming& in) {
    return kEntropy && in.entropy != 0 ? load_number(a.saved.statistics[kStatistic_entropy], row, kWide) : 0;
  }

  __device__ static RowCoefs<Compute> coefs(const BackwardArgs& a, int64_t row, const RowIncoming& in) {
    const RowGrad r = row_grad(load_number(a.saved.stats, 2 * row, kWide),
                               load_number(a.saved.stats, 2 * row + 1, kWide), entropy_of(a, row, in), in);
    const double slope = kCapped ? 1 : a.unit;
    if constexpr (!kEntropy) return {(Compute)r.shift, (Compute)(r.coef * slope), 0, 0};
    // entropy_coef is that of t, whose unit differs from that of d
    return {(Compute)r.shift, (Compute)(r.coef * slope),
            (Compute)(r.entropy_coef * slope / Exponential<Compute>::kScale),
            (Compute)(r.mean_d * Exponential<Compute>::kScale)};
  }

  __device__ static Compute grad(Compute x, const RowCoefs<Compute>& c, const Transform<Compute, kCapped>& transform) {
    Compute y = x, slope = 1;
    if constexpr (kCapped) {
      const Compute u = hyperbolic_tangent(x * transform.pre);
      y = u * transform.post;
      slope = transform.slope - transform.slope * (u * u);
    }
    const Compute t = (y - c.shift) * transform.factor;
    Compute factor = c.coef;
    if constexpr (kEntropy) factor = fma(c.entropy_coef, larger(t, Exponential<Compute>::kLow) - c.mean_t, factor);
    Compute dz = Exponential<Compute>::of(t) * factor;
    if constexpr (kCapped) dz *= slope;
    return dz;
  }

  __device__ static void store_grad(typename T::Storage* dx, const typename T::Storage* x, const RowCoefs<Compute>& c,
                                    const Transform<Compute, kCapped>& transform) {
    *dx = T::storage(grad(T::value(*x), c, transform));
  }

  // The true-class term of the target that is first of its value among the row's: formed in float64, rounded once.
  __device__ static typename T::Storage target_term(const BackwardArgs& a, int64_t row, int64_t k) {
    conceal(row);
    const RowIncoming in = incoming(a, row);
    const double from_seq = row_grad_from_seq(a, row);
    const int64_t* targets = a.rows.targets + row * a.rows.n_targets;
    double g = 0;
#pragma unroll 1
    for (int64_t i = k; i < a.rows.n_targets; ++i)
      if (targets[i] == targets[k]) g += target_incoming(a.rows, a.grads, row * a.rows.n_targets + i, from_seq);
    const double logp = load_number(a.saved.logps, row * a.rows.n_targets + k, kWide);
    const double entropy = entropy_of(a, row, in);
    double slope = a.unit;
    if constexpr (kCapped) {
      // z from its log-prob: the logit may be overwritten by now
      const double z =
          load_number(a.saved.stats, 2 * row, kWide) + logp - log(load_number(a.saved.stats, 2 * row + 1, kWide));
      const LogitTransform& t = a.rows.transform;
      const double u = z * t.temperature / t.softcap;
      slope = t.logit_scale / t.temperature * (1 - u * u);
    }
    return T::storage((Compute)(target_grad(logp, g, entropy, in) * slope));
  }
};

// Which thread of the block writes the i-th logit of a piece, given how the piece is cut: `head` logits up to the first
// 16-byte boundary, whole vectors, the rest.
template <class T>
struct Owners {
  int head = 0, n_vecs = 0;
  // n logits from dx on; whole vectors only where they follow each other (`dense`).
  __device__ Owners(const typename T::Storage* dx, bool dense, int n) {
    if (!dense) return;
    head = (int)((16 - (uintptr_t)dx % 16) % 16 / sizeof(typename T::Storage));
    if (head > n) head = n;
    n_vecs = (n - head) / kVecLogits<T>;
  }
  __device__ int operator()(int64_t i) const {
    if (i < head) return (int)i;
    i -= head;
    if (i < (int64_t)n_vecs * kVecLogits<T>) return (int)(i / kVecLogits<T> % kRowThreads);
    return (int)((i - (int64_t)n_vecs * kVecLogits<T>) % kRowThreads);
  }
};

template <class T>
__device__ inline void store_vec(typename T::Storage* p, const Vec16& v) {
  *(uint4*)p = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

// Zeros for n logits.
template <class T>
__device__ inline void zero_piece(typename T::Storage* dx, int64_t stride, int n, Owners<T> owners) {
  const int vec_logits = owners.n_vecs * kVecLogits<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < owners.head; i += kRowThreads) dx[i * stride] = 0;
  for (int j = threadIdx.x; j < owners.n_vecs; j += kRowThreads)
    store_vec<T>(dx + owners.head + j * kVecLogits<T>, Vec16{{0, 0, 0, 0}});
#pragma unroll 1
  for (int i = owners.head + vec_logits + threadIdx.x; i < n; i += kRowThreads) dx[i * stride] = 0;
}

// The gradient of n logits, but for the true-class terms.
template <class T, bool kCapped, bool kEntropy>
__device__ inline void grad_piece(const BackwardArgs& a, int64_t row, const RowIncoming& in,
                                  const typename T::Storage* x, typename T::Storage* dx, int n, Owners<T> owners) {
  using Compute = typename T::Compute;
  using Piece = PieceGrad<T, kCapped, kEntropy>;
  const Transform<Compute, kCapped> transform(a.rows.transform);
  const int64_t stride = a.rows.vocab_stride, dx_stride = a.out.vocab_stride;
  const int vec_logits = owners.n_vecs * kVecLogits<T>, tail = owners.head + vec_logits;
  const Stretch<T, true> logits(x + owners.head, stride, vec_logits, vec_logits);
  Vec16 v[kLoads];
  int j = threadIdx.x;
  if (j < owners.n_vecs) logits.load_turn(j, v);  // on their way while the coefficients are formed
  const RowCoefs<Compute> c = Piece::coefs(a, row, in);
  while (j < owners.n_vecs) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Compute dz[kVecLogits<T>];
#pragma unroll
      for (int e = 0; e < kVecLogits<T>; ++e) dz[e] = Piece::grad(T::value(element<T>(v[i], e)), c, transform);
      if (j + i * kRowThreads < owners.n_vecs)
        store_vec<T>(dx + owners.head + (j + i * kRowThreads) * kVecLogits<T>, pack_vec<T>(dz));
    }
    j += kLoads * kRowThreads;
    if (j < owners.n_vecs) logits.load_turn(j, v);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < owners.head; i += kRowThreads)
    Piece::store_grad(dx + i * dx_stride, x + i * stride, c, transform);
#pragma unroll 1
  for (int i = tail + threadIdx.x; i < n; i += kRowThreads)
    Piece::store_grad(dx + i * dx_stride, x + i * stride, c, transform);
}

__device__ inline int64_t row_of_block(const BackwardArgs& a) { return a.first_row + blockIdx.x; }

// The thread that wrote a target's gradient writes the right one over it.
template <class T, bool kCapped, bool kEntropy>
__device__ inline void write_target_grads(const BackwardArgs& a, typename T::Storage* dx, int64_t start, int n,
                                          const Owners<T>& owners) {
  int64_t row = row_of_block(a);
  conceal(row);
  const int64_t* targets = a.rows.targets + row * a.rows.n_targets;
#pragma unroll 1
  for (int64_t k = 0; k < a.rows.n_targets; ++k) {
    const int64_t i = targets[k] - start;
    if (i < 0 || i >= n || owners(i) != (int)threadIdx.x) continue;
    bool first = true;
#pragma unroll 1
    for (int64_t earlier = 0; earlier < k; ++earlier) first = first && targets[earlier] != targets[k];
    if (first) dx[i * a.out.vocab_stride] = PieceGrad<T, kCapped, kEntropy>::target_term(a, row, k);
  }
}

template <class T, bool kCapped, bool kEntropy>
constexpr int kBackwardBlocks = T::kType == kFloat64 ? 1
                                : !kEntropy          ? 4
                                : kCapped            ? 2
                                                     : 3;

template <class T, bool kCapped, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, (kBackwardBlocks<T, kCapped, kEntropy>))
    backward_kernel(BackwardArgs a) {
  using Storage = typename T::Storage;
  const int64_t row = row_of_block(a), start = blockIdx.y * a.pieces.size, rest = a.rows.vocab - start;
  const int n = (int)(rest < a.pieces.size ? rest : a.pieces.size);
  Storage* dx = (Storage*)a.out.data + row_offset(row, a.rows.rows_per_seq, a.out.seq_stride, a.out.row_stride) +
                start * a.out.vocab_stride;
  const int padding = (int)(a.rows.width - a.rows.vocab);
  if (padding > 0 && blockIdx.y == a.pieces.count - 1) {
    typename T::Storage* end = dx + n * a.out.vocab_stride;
    zero_piece<T>(end, a.out.vocab_stride, padding, Owners<T>(end, a.out.vocab_stride == 1, padding));
  }
  const Owners<T> owners(dx, a.out.vocab_stride == 1 && a.rows.vocab_stride == 1, n);
  // loaded beside what row_state looks at
  const RowIncoming in = PieceGrad<T, kCapped, kEntropy>::incoming(a, row);
  if (row_state(a.rows, row) == kRowIgnored || !in.any) {
    zero_piece<T>(dx, a.out.vocab_stride, n, owners);
    return;
  }
  grad_piece<T, kCapped, kEntropy>(a, row, in, row_logits<T>(a.rows, row) + start * a.rows.vocab_stride, dx, n, owners);
  write_target_grads<T, kCapped, kEntropy>(a, dx, start, n, owners);
}

template <class T, bool kCapped>
int launch_backward(BackwardArgs a, void* stream) {
  auto* kernel =
      a.grads.statistics[kStatistic_entropy] ? backward_kernel<T, kCapped, true> : backward_kernel<T, kCapped, false>;
  return launch_all(a.rows.n_rows, [&](int64_t first, unsigned blocks) {
    a.first_row = first;
    return DPO_FAST_LAUNCH(kernel, dim3(blocks, a.pieces.count), kRowThreads, stream, a);
  });
}

// `declaration` is `template` in the one file that compiles a type's kernels, `extern template` where they are used.
#define DPO_FAST_ROW_KERNELS(declaration, T)                      \
  declaration int launch_forward<T, false>(ForwardArgs, void*);   \
  declaration int launch_forward<T, true>(ForwardArgs, void*);    \
  declaration int launch_backward<T, false>(BackwardArgs, void*); \
  declaration int launch_backward<T, true>(BackwardArgs, void*);

}  // namespace dpo_fast

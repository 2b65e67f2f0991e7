// Sequence sums, the preference loss with its derivatives, and gradients of pairs to sequences.
#include "losses.h"

#include "backward.h"

namespace dpo_fast {
namespace {

struct Side {
  int64_t chosen, rejected;
};

__device__ Side pair_of(const CudaPairs& pairs, int64_t p) {
  if (!pairs.pairs) return Side{p, p + pairs.n_pairs};
  return Side{pairs.pairs[2 * p], pairs.pairs[2 * p + 1]};
}

// A sequence's sum of weighted log-probs and its factor of `average`, by one warp.
__device__ void sum_sequence(const BatchArgs& a, int64_t s, int lane) {
  const CudaRows& rows = a.rows;
  int64_t start = s * rows.rows_per_seq, end = start + rows.rows_per_seq;
  if (a.seqs.cu_seqlens) {  // its values are not checked: no read beyond the rows
    start = seq_bound(a.seqs, s);
    end = seq_bound(a.seqs, s + 1);
    start = start < 0 ? 0 : start;
    end = end > rows.n_rows ? rows.n_rows : end;
  }
  double total = 0, weights = 0;
#pragma unroll 4
  for (int64_t row = start + lane; row < end; row += kWarp) {
    const double logp = load_number(a.token_logps, row, a.wide), weight = row_weight(rows, row);
    if (row_state_of(rows, row) == kIgnored) continue;
    total += logp * weight;
    weights += weight;
  }
  total = warp_sum(total);
  weights = warp_sum(weights);
  if (lane != 0) return;
  double factor = 1;
  if (a.seqs.average) {
    total = weights != 0 ? total / weights : 0;
    factor = weights != 0 ? 1 / weights : 0;
  }
  store_number(a.seq_logps, s, total, a.seq_logps_double);
  a.seq_saved[2 * s] = factor;
  a.seq_saved[2 * s + 1] = total;  // for the pairs; the derivative takes its place
}

// log pi(y|x) - log pi_ref(y|x) of sequence s; NaN where there is no such sequence.
__device__ double log_ratio(const BatchArgs& a, int64_t s) {
  if (s < 0 || s >= a.seqs.n_seqs) return NAN;
  const double logp = a.logps ? load_number(a.logps, s, a.wide) : a.seq_saved[2 * s + 1];
  return a.ref_logps ? logp - load_number(a.ref_logps, s, a.ref_double) : logp;
}

// Writes what belongs to pair p; returns its loss.
__device__ double lose_pair(const BatchArgs& a, int64_t p) {
  const Side side = pair_of(a.pairs, p);
  const double chosen = log_ratio(a, side.chosen), rejected = log_ratio(a, side.rejected);
  const PairLoss pair = preference_loss(chosen, rejected, a.pairs.options);
  store_number(a.out.losses, p, pair.loss, a.wide);
  store_number(a.out.chosen_rewards, p, a.pairs.options.beta * chosen, a.wide);
  store_number(a.out.rejected_rewards, p, a.pairs.options.beta * rejected, a.wide);
  a.out.pair_grads[2 * p] = pair.d_chosen;
  a.out.pair_grads[2 * p + 1] = pair.d_rejected;
  return pair.loss;
}

// Sum over the pairs of sequence s of g_p dloss_p/dlogp_s, by one warp; `gradient(p)` gives g_p.
template <class Gradient>
__device__ double sum_pairs(const CudaPairs& pairs, const double* pair_grads, int64_t s, int lane,
                            const Gradient& gradient) {
  auto part = [&](int64_t i, double g) { return g != 0 ? g * pair_grads[i] : 0; };  // 0: the derivative may be NaN
  if (!pairs.pairs) {
    const bool rejected = s >= pairs.n_pairs;
    const int64_t p = rejected ? s - pairs.n_pairs : s;
    return p < pairs.n_pairs ? part(2 * p + rejected, gradient(p)) : 0;
  }
  double total = 0;
  for (int64_t p = lane; p < pairs.n_pairs; p += kWarp) {
    const Side side = pair_of(pairs, p);
    if (side.chosen == s) total += part(2 * p, gradient(p));
    if (side.rejected == s) total += part(2 * p + 1, gradient(p));
  }
  return warp_sum(total);
}

__global__ void __launch_bounds__(kBatchThreads, 1) batch_kernel(BatchArgs a) {
  __shared__ double sums[kBatchWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (!a.logps)
    for (int64_t s = warp; s < a.seqs.n_seqs; s += kBatchWarps) sum_sequence(a, s, lane);
  if (!a.out.loss) return;
  __syncthreads();
  double total = 0;
  for (int64_t p = threadIdx.x; p < a.pairs.n_pairs; p += kBatchThreads) total += lose_pair(a, p);
  total = warp_sum(total);
  if (lane == 0) sums[warp] = total;
  __syncthreads();
  const double share = a.pairs.mean ? 1.0 / a.pairs.n_pairs : 1;
  if (threadIdx.x == 0) {
    for (int i = 1; i < kBatchWarps; ++i) total += sums[i];
    store_number(a.out.loss, 0, a.pairs.mean ? total / a.pairs.n_pairs : total, a.wide);
  }
  if (!a.seq_saved) return;
  for (int64_t s = warp; s < a.seqs.n_seqs; s += kBatchWarps) {
    const double grad = sum_pairs(a.pairs, a.out.pair_grads, s, lane, [=](int64_t) { return share; });
    if (lane == 0) a.seq_saved[2 * s + 1] = grad;
  }
}

__global__ void __launch_bounds__(kBatchThreads, 1) seq_grad_kernel(SeqGradArgs a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double common = a.grad_loss ? load_number(a.grad_loss, 0, a.wide) : 0;
  if (a.pairs.mean) common /= a.pairs.n_pairs;
  const int64_t s = a.first_seq + (int64_t)blockIdx.x * kBatchWarps + warp;
  if (s >= a.n_seqs) return;
  const double grad = sum_pairs(a.pairs, a.pair_grads, s, lane, [&](int64_t p) {
    return common + (a.grad_losses ? load_number(a.grad_losses, p, a.wide) : 0);
  });
  if (lane == 0) store_number(a.grad_seqs, s, grad, a.grad_double);
}

}  // namespace

int launch_batch(const BatchArgs& a, void* stream) {
  return DPO_FAST_LAUNCH(batch_kernel, 1, kBatchThreads, stream, a);
}

int launch_seq_grads(SeqGradArgs a, void* stream) {
  return launch_all((a.n_seqs + kBatchWarps - 1) / kBatchWarps, [&](int64_t first, unsigned blocks) {
    a.first_seq = first * kBatchWarps;
    return DPO_FAST_LAUNCH(seq_grad_kernel, blocks, kBatchThreads, stream, a);
  });
}

}  // namespace dpo_fast

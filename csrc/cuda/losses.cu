// Sequence sums, the preference loss with its derivatives, and gradients of pairs to sequences.
#include "backward.h"
#include "losses.h"

namespace dpo_fast {
namespace {

struct PairIndex {
  int64_t chosen, rejected;
};

__device__ PairIndex pair_index(const CudaPairs& pairs, int64_t p) {
  if (!pairs.pairs) return PairIndex{p, p + pairs.n_pairs};
  return PairIndex{pairs.pairs[2 * p], pairs.pairs[2 * p + 1]};
}

// Fills a sequence's row of seq_saved and its log-prob, by one warp. The sum of weighted log-probs stands in column
// kSeqGrad until the derivative takes its place.
__device__ void sum_sequence(const BatchArgs& a, int64_t s, int lane) {
  const CudaRows& rows = a.rows;
  int64_t start = s * rows.rows_per_seq, end = start + rows.rows_per_seq;
  if (a.seqs.cu_seqlens) {  // its values are not checked: no read beyond the rows
    start = seq_bound(a.seqs, s);
    end = seq_bound(a.seqs, s + 1);
    start = start < 0 ? 0 : start;
    end = end > rows.n_rows ? rows.n_rows : end;
  }
  double total = 0, weights = 0, length = 0, surprise = 0, kept = 0;
#pragma unroll 4
  for (int64_t row = start + lane; row < end; row += kWarp) {
    const double logp = load_number(a.tokens.logps, row, a.wide), weight = row_weight(rows, row);
    const double squares = a.wpo ? load_number(a.tokens.log_sum_sq_probs, row, a.wide) : 0;
    length += rows.targets[row] != rows.ignore_index;
    if (row_state_of(rows, row) == kIgnored) continue;
    total += logp * weight;
    weights += weight;
    surprise += logp - squares;
    kept += 1;
  }
  total = warp_sum(total);
  weights = warp_sum(weights);
  length = warp_sum(length);
  surprise = warp_sum(surprise);
  kept = warp_sum(kept);
  if (lane != 0) return;
  double factor = 1;
  if (a.seqs.average) {
    total = weights != 0 ? total / weights : 0;
    factor = weights != 0 ? 1 / weights : 0;
  }
  store_number(a.seq_logps, s, total, a.seq_logps_double);
  double* saved = a.seq_saved + kSeqSaved * s;
  saved[kFactor] = factor;
  saved[kSeqGrad] = total;
  saved[kLength] = length;
  saved[kSeqWeight] = a.wpo && kept > 0 ? exp(surprise / kept) : 1;
}

// Column i of a sequence that may not exist.
__device__ double saved_of(const BatchArgs& a, int64_t s, int i) {
  return s < 0 || s >= a.seqs.n_seqs ? NAN : a.seq_saved[kSeqSaved * s + i];
}

__device__ double length_of(const BatchArgs& a, int64_t s) {
  if (s == -1 && a.unpaired) return 0;
  if (!a.logps) return saved_of(a, s, kLength);
  return a.lengths && s >= 0 && s < a.seqs.n_seqs ? a.lengths[s] : 0;
}

// What the loss reads of sequence s; NaN where there is none and there should be.
__device__ Side side_of(const BatchArgs& a, int64_t s) {
  Side side = {true, NAN, NAN, 0, 0, 0};
  if (s >= 0 && s < a.seqs.n_seqs) {
    side.logp = a.logps ? load_number(a.logps, s, a.wide) : saved_of(a, s, kSeqGrad);
    // rounded as the reference's were: equal models give rewards of exactly 0
    if (a.ref_logps && !a.ref_double && !a.wide) side.logp = (float)side.logp;
    side.ratio = a.ref_logps ? side.logp - load_number(a.ref_logps, s, a.ref_double) : side.logp;
    side.length = length_of(a, s);
  } else if (s == -1 && a.unpaired) {
    side = Side{false, 0, 0, 0, 0, 0};
  }
  return side;
}

// The compiler takes x for a new value.
__device__ void conceal(double& x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(x));
#endif
}

// One term of the loss, of a type known to the compiler. What terms have in common is concealed from it: lifted out of
// the choice between them and the loop over them, it would need more registers than there are.
template <int kType>
__device__ PairLoss loss_of_term(Pair pair, const LossOptions& options, double weight) {
  LossOptions term = options;
  term.n_terms = 1;
  term.types[0] = kType;
  term.weights[0] = weight;
  if (!(loss_flags(kType) & kDivergence)) term.divergence = kReverseKL;  // not read
  conceal(pair.chosen.logp);
  conceal(pair.chosen.ratio);
  conceal(pair.chosen.length);
  conceal(pair.rejected.logp);
  conceal(pair.rejected.ratio);
  conceal(pair.rejected.length);
  conceal(term.beta);
  conceal(term.label_smoothing);
  return pair_loss(pair, term);
}

// pair_loss
__device__ PairLoss loss_of_pair(const Pair& pair, const LossOptions& options) {
  PairLoss sum = {0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < options.n_terms; ++i) {
    PairLoss part = {NAN, NAN, NAN};
    switch (options.types[i]) {
#define DPO_FAST_LOSS(name, flags) \
  case k_##name: part = loss_of_term<k_##name>(pair, options, options.weights[i]); break;
      DPO_FAST_LOSSES(DPO_FAST_LOSS)
#undef DPO_FAST_LOSS
    }
    sum.loss += part.loss;
    sum.d_chosen += part.d_chosen;
    sum.d_rejected += part.d_rejected;
  }
  return sum;
}

// Writes what belongs to pair p; returns its weighted loss.
__device__ double lose_pair(const BatchArgs& a, const LossOptions& options, int64_t p) {
  const PairIndex index = pair_index(a.pairs, p);
  const Pair pair = {side_of(a, index.chosen), side_of(a, index.rejected)};
  PairLoss result = loss_of_pair(pair, options);
  double weight = a.pairs.weights ? a.pairs.weights[p] : 1;
  if (a.wpo && index.chosen >= 0 && index.rejected >= 0)
    weight *= saved_of(a, index.chosen, kSeqWeight) * saved_of(a, index.rejected, kSeqWeight);
  if (weight == 0) result = PairLoss{0, 0, 0};  // switched off, also where its loss is infinite
  store_number(a.out.losses, p, weight * result.loss, a.wide);
  store_number(a.out.chosen_rewards, p, pair.chosen.present ? options.beta * pair.chosen.ratio : NAN, a.wide);
  store_number(a.out.rejected_rewards, p, pair.rejected.present ? options.beta * pair.rejected.ratio : NAN, a.wide);
  a.out.pair_grads[2 * p] = weight * result.d_chosen;
  a.out.pair_grads[2 * p + 1] = weight * result.d_rejected;
  return weight * result.loss;
}

// The sum over the block's threads, in every one of them.
__device__ double block_sum(double x, double* warp_sums) {
  x = warp_sum(x);
  __syncthreads();  // the sums before may still be read
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kBatchWarps; ++i) total += warp_sums[i];
  return total;
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
    const PairIndex index = pair_index(pairs, p);
    if (index.chosen == s) total += part(2 * p, gradient(p));
    if (index.rejected == s) total += part(2 * p + 1, gradient(p));
  }
  return warp_sum(total);
}

__global__ void __launch_bounds__(kBatchThreads, 1) batch_kernel(BatchArgs a) {
  __shared__ double warp_sums[kBatchWarps];
  __shared__ LossOptions options;  // not in registers: its arrays are indexed
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (!a.logps)
    for (int64_t s = warp; s < a.seqs.n_seqs; s += kBatchWarps) sum_sequence(a, s, lane);
  if (!a.out.loss) return;
  __syncthreads();
  double tokens = 0;
#pragma unroll 1
  for (int64_t p = threadIdx.x; p < a.pairs.n_pairs; p += kBatchThreads)
    tokens += length_of(a, pair_index(a.pairs, p).chosen);
  tokens = block_sum(tokens, warp_sums);
  if (threadIdx.x == 0) {
    options = a.options;
    if (a.pairs.baseline) options.baseline = *a.pairs.baseline;
    if (options.tokens_per_pair == 0) options.tokens_per_pair = tokens / a.pairs.n_pairs;
  }
  __syncthreads();
  double total = 0;
#pragma unroll 1
  for (int64_t p = threadIdx.x; p < a.pairs.n_pairs; p += kBatchThreads) total += lose_pair(a, options, p);
  total = block_sum(total, warp_sums);
  if (threadIdx.x == 0) store_number(a.out.loss, 0, total / a.pairs.divisor, a.wide);
  if (!a.seq_saved) return;
  for (int64_t s = warp; s < a.seqs.n_seqs; s += kBatchWarps) {
    const double share = 1 / a.pairs.divisor;
    const double grad = sum_pairs(a.pairs, a.out.pair_grads, s, lane, [=](int64_t) { return share; });
    if (lane == 0) a.seq_saved[kSeqSaved * s + kSeqGrad] = grad;
  }
}

__global__ void __launch_bounds__(kBatchThreads, 1) seq_grad_kernel(SeqGradArgs a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const double common = a.grad_loss ? load_number(a.grad_loss, 0, a.wide) / a.pairs.divisor : 0;
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

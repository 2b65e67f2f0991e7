// Sequence sums, the preference loss with its derivatives, and gradients of pairs to sequences.
#include "backward.h"
#include "losses.h"

namespace dpo_fast {
namespace {

// Fills a sequence's row of seq_saved and its log-prob, by one warp.
__device__ void sum_sequence(const BatchArgs& a, int64_t s, int lane) {
  const RowRange range = seq_rows(a.rows, a.seqs, s);
  SequenceSums sums = {0, 0, 0, 0, 0};
#pragma unroll 4
  for (int64_t row = range.start + lane; row < range.end; row += kWarp) add_row(sums, a.rows, a.tokens, row, a.wpo);
  sums.logp = warp_sum(sums.logp);
  sums.weight = warp_sum(sums.weight);
  sums.length = warp_sum(sums.length);
  sums.surprise = warp_sum(sums.surprise);
  sums.kept = warp_sum(sums.kept);
  if (lane != 0) return;
  const double norm = seq_norm(sums, a.seqs.average), logp = seq_logp(sums, norm);
  store_number(a.seq_logps, s, logp, a.seq_logps_double);
  double* saved = a.seq_saved + kSeqSaved * s;
  saved[kNorm] = norm;
  saved[kSeqGrad] = logp;
  saved[kLength] = sums.length;
  saved[kSeqWeight] = a.wpo ? wpo_weight(sums) : 1;
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
  conceal(pair.beta);
  conceal(pair.margin);
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

// Writes the results of pair p; returns its weighted loss.
__device__ double finish_pair(const BatchArgs& a, const LossOptions& options, int64_t p) {
  const Pair pair = pair_of(a.pairs, options, a.numbers, p);
  const PairLoss result = pair.present ? loss_of_pair(pair, options) : PairLoss{0, 0, 0};
  return store_pair(a.out, pair, result, p, a.wide);
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
__device__ double sum_pairs(const Pairs& pairs, const double* pair_grads, int64_t s, int lane,
                            const Gradient& gradient) {
  if (!pairs.pairs) {
    const bool rejected = s >= pairs.n_pairs;
    const int64_t p = rejected ? s - pairs.n_pairs : s;
    return p < pairs.n_pairs ? vanishing(gradient(p), pair_grads[2 * p + rejected]) : 0;
  }
  double total = 0;
  for (int64_t i = pairs.offsets[s] + lane; i < pairs.offsets[s + 1]; i += kWarp) {
    const int64_t entry = pairs.order[i];
    total += vanishing(gradient(entry / 2), pair_grads[entry]);
  }
  return warp_sum(total);
}

__global__ void __launch_bounds__(kBatchThreads, 1) batch_kernel(BatchArgs a) {
  __shared__ double warp_sums[kBatchWarps];
  __shared__ LossOptions options;  // not in registers: its arrays are indexed
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (a.seq_saved)
    for (int64_t s = warp; s < a.seqs.n_seqs; s += kBatchWarps) sum_sequence(a, s, lane);
  if (!a.out.loss) return;
  __syncthreads();
  double tokens = 0;  // of the chosen completions
#pragma unroll 1
  for (int64_t p = threadIdx.x; p < a.pairs.n_pairs; p += kBatchThreads)
    tokens += length_of(a.numbers, pair_index(a.pairs, p).chosen);
  tokens = block_sum(tokens, warp_sums);
  if (threadIdx.x == 0) {
    options = a.options;
    if (a.pairs.baseline) options.baseline = *a.pairs.baseline;
    if (options.tokens_per_pair == 0) options.tokens_per_pair = tokens / a.pairs.n_pairs;
  }
  __syncthreads();
  double total = 0;
#pragma unroll 1
  for (int64_t p = threadIdx.x; p < a.pairs.n_pairs; p += kBatchThreads) total += finish_pair(a, options, p);
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
  const double common = common_incoming(a.pairs, a.grads, a.wide);
  const int64_t s = a.first_seq + (int64_t)blockIdx.x * kBatchWarps + warp;
  if (s >= a.n_seqs) return;
  const double grad =
      sum_pairs(a.pairs, a.pair_grads, s, lane, [&](int64_t p) { return pair_incoming(common, a.grads, p, a.wide); });
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

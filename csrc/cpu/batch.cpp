// The loops of batch.h.
#include "batch.h"

#include <algorithm>
#include <new>
#include <vector>

namespace dpo_fast {
namespace {

// Below this many logits a second thread costs more than it saves (docs/performance.md).
constexpr int64_t kSerialLogits = 1 << 16;
// A thread takes up to this many logits at a time: rows that follow each other in memory stream faster.
constexpr int64_t kTaskLogits = 1 << 19;

bool forked = false;

int threads_for(int64_t logits, int threads) { return forked || logits < kSerialLogits ? 1 : threads; }

// How many pieces of rows a thread takes at a time: enough tasks for threads that do not run alike.
int64_t pieces_per_task(const Rows& rows, int64_t pieces, int threads) {
  const int64_t by_size = kTaskLogits * pieces_per_row(rows) / rows.vocab, by_count = pieces / (8 * threads);
  return std::max<int64_t>(std::min(by_size, by_count), 1);
}

// The rows that count, by number.
Fault find_kept(const Rows& rows, std::vector<int64_t>& kept) {
  for (int64_t row = 0; row < rows.n_rows; ++row) {
    const RowState state = row_state(rows, row);
    if (state == kKept) kept.push_back(row);
    if (state != kBadTarget) continue;
    int64_t k = 0;
    while (in_vocab(rows, rows.targets[row * rows.n_targets + k])) ++k;
    return Fault{kTarget, row, k, rows.targets[row * rows.n_targets + k]};
  }
  return Fault{};
}

void forward_rows(const Rows& rows, const std::vector<int64_t>& kept, RowPart* parts, const TokenArrays& out,
                  int threads) {
  const int64_t pieces = pieces_per_row(rows), n_kept = (int64_t)kept.size();
  if (threads == 1) {  // not even a team of one
    for (int64_t i = 0; i < n_kept * pieces; ++i) forward_piece(rows, kept[i / pieces], i % pieces, out, &parts[i]);
    for (int64_t i = 0; i < n_kept; ++i) finish_row(rows, kept[i], &parts[i * pieces], out);
  } else {
    const int64_t chunk = pieces_per_task(rows, n_kept * pieces, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t i = 0; i < n_kept * pieces; ++i) forward_piece(rows, kept[i / pieces], i % pieces, out, &parts[i]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n_kept; ++i) finish_row(rows, kept[i], &parts[i * pieces], out);
  }
  int64_t next = 0;
  for (int64_t row = 0; row < rows.n_rows; ++row) {
    if (next < n_kept && kept[next] == row)
      ++next;
    else
      finish_ignored_row(rows, row, out);
  }
}

Fault run_forward(const Rows& rows, const TokenArrays& out, int threads) {
  std::vector<int64_t> kept;
  kept.reserve(rows.n_rows);
  const Fault fault = find_kept(rows, kept);
  if (fault.kind != kNoFault) return fault;
  const int64_t n_kept = (int64_t)kept.size();
  std::vector<RowPart> parts(n_kept * pieces_per_row(rows));
  forward_rows(rows, kept, parts.data(), out, threads_for(n_kept * rows.vocab, threads));
  return fault;
}

void backward_unit(const Rows& rows, int64_t row, int64_t piece, const SavedArrays& saved, const TokenGrads& grads,
                   const GradTensor& out) {
  if (has_gradient(rows, row, grads))
    backward_piece(rows, row, piece, saved, grads, out);
  else
    zero_piece(rows, row, piece, out);
}

void backward_rows(const Rows& rows, const SavedArrays& saved, const TokenGrads& grads, const GradTensor& out,
                   int threads) {
  const int64_t pieces = pieces_per_row(rows), n_units = rows.n_rows * pieces;
  if (threads == 1) {
    for (int64_t i = 0; i < n_units; ++i) backward_unit(rows, i / pieces, i % pieces, saved, grads, out);
    return;
  }
  const int64_t chunk = pieces_per_task(rows, n_units, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t i = 0; i < n_units; ++i) backward_unit(rows, i / pieces, i % pieces, saved, grads, out);
}

SequenceSums sequence_sums(const Rows& rows, const Sequences& seqs, int64_t s, const void* logps,
                           const void* log_sum_sq) {
  SequenceSums sums = {0, 0, 0, 0, 0};
  const RowRange range = rows_of(rows, seqs, s);
  for (int64_t row = range.start; row < range.end; ++row) add_row(sums, rows, row, logps, log_sum_sq, rows.wide);
  return sums;
}

// What a loss reads of each sequence, [n_seqs] each; the last two may be null.
struct SequenceNumbers {
  const double* logps;
  const double* lengths;
  const double* weights;
};

Side side_of(int64_t s, const SequenceNumbers& seqs, const Reference& reference) {
  if (s < 0) return absent_side();
  return present_side(seqs.logps[s], s, reference, seqs.lengths ? seqs.lengths[s] : 0);
}

double chosen_tokens(const Pairs& pairs, const double* lengths) {
  double total = 0;
  for (int64_t p = 0; p < pairs.n_pairs; ++p) {
    const int64_t chosen = pair_index(pairs, p).chosen;
    if (chosen >= 0) total += lengths[chosen];
  }
  return total;
}

void pair_losses(const LossBatch& batch, const SequenceNumbers& seqs, bool wide) {
  const Pairs& pairs = batch.pairs;
  LossOptions options = batch.options;
  options.baseline = pairs.baseline ? *pairs.baseline : 0;
  if (options.tokens_per_pair == 0 && seqs.lengths && pairs.n_pairs > 0)
    options.tokens_per_pair = chosen_tokens(pairs, seqs.lengths) / pairs.n_pairs;
  double total = 0;
  for (int64_t p = 0; p < pairs.n_pairs; ++p) {
    const PairIndex index = pair_index(pairs, p);
    const Pair pair = make_pair_of(side_of(index.chosen, seqs, batch.reference),
                                   side_of(index.rejected, seqs, batch.reference), pairs, p, options.beta);
    double weight = pair_number(pairs, kPair_weight, p, 1);
    if (weight != 0 && seqs.weights && index.chosen >= 0 && index.rejected >= 0)
      weight *= seqs.weights[index.chosen] * seqs.weights[index.rejected];
    total += store_pair(batch.out, p, pair, pair_loss(pair, options), weight, wide);
  }
  store_number(batch.out.loss, 0, total / pairs.divisor, wide);
}

// grad_seqs[s]: of the loss and the losses, and of the log-prob itself.
void gradients_of_sequences(const Pairs* pairs, const double* pair_grads, const GradArrays& grads, int64_t n_seqs,
                            bool wide, double* grad_seqs) {
  for (int64_t s = 0; s < n_seqs; ++s) grad_seqs[s] = grads.seq_logps ? load_number(grads.seq_logps, s, wide) : 0;
  if (!pairs) return;
  const double common = grads.loss ? load_number(grads.loss, 0, wide) / pairs->divisor : 0;
  for (int64_t p = 0; p < pairs->n_pairs; ++p) {
    const double g = common + (grads.losses ? load_number(grads.losses, p, wide) : 0);
    const PairIndex index = pair_index(*pairs, p);
    if (index.chosen >= 0) grad_seqs[index.chosen] += pair_gradient(pair_grads, 2 * p, g);
    if (index.rejected >= 0) grad_seqs[index.rejected] += pair_gradient(pair_grads, 2 * p + 1, g);
  }
}

// grad_rows[n] = w_n grad_seqs[s(n)], over sum_n w_n for averages.
void spread_to_rows(const Rows& rows, const Sequences& seqs, const double* grad_seqs, double* grad_rows) {
  for (int64_t s = 0; s < seqs.n_seqs; ++s) {
    const RowRange range = rows_of(rows, seqs, s);
    double g = grad_seqs[s];
    if (seqs.average && g != 0) {
      SequenceSums sums = {0, 0, 0, 0, 0};
      for (int64_t row = range.start; row < range.end; ++row)
        if (row_state(rows, row) == kKept) sums.weights += row_weight(rows, row);
      g *= sequence_factor(sums, seqs);
    }
    for (int64_t row = range.start; row < range.end; ++row)
      grad_rows[row] = g != 0 && rows.weights ? g * row_weight(rows, row) : g;
  }
}

}  // namespace

void set_forked() { forked = true; }

Fault check_sequences(const Rows& rows, const Sequences& seqs) {
  if (!seqs.cu_seqlens) return Fault{};
  if (seq_bound(seqs, 0) != 0) return Fault{kFirstBound, 0, 0, seq_bound(seqs, 0)};
  for (int64_t s = 0; s < seqs.n_seqs; ++s)
    if (seq_bound(seqs, s + 1) < seq_bound(seqs, s))
      return Fault{kFallingBound, s + 1, seq_bound(seqs, s), seq_bound(seqs, s + 1)};
  const int64_t last = seq_bound(seqs, seqs.n_seqs);
  return last == rows.n_rows ? Fault{} : Fault{kLastBound, seqs.n_seqs, rows.n_rows, last};
}

Fault check_pairs(const Pairs& pairs, int64_t n_seqs, bool may_be_absent) {
  for (int64_t i = 0; pairs.pairs && i < 2 * pairs.n_pairs; ++i)
    if (pairs.pairs[i] >= n_seqs || pairs.pairs[i] < (may_be_absent ? -1 : 0))
      return Fault{kPairIndex, i, n_seqs, pairs.pairs[i]};
  return Fault{};
}

Fault forward_tokens(const Rows& rows, const TokenArrays& out, int threads) try {
  return run_forward(rows, out, threads);
} catch (const std::bad_alloc&) {
  return Fault{kNoMemory};
}

Fault forward_sequences(const Rows& rows, const Sequences& seqs, const TokenArrays& out, void* seq_logps,
                        bool seq_logps_double, int threads) try {
  const Fault fault = run_forward(rows, out, threads);
  for (int64_t s = 0; fault.kind == kNoFault && s < seqs.n_seqs; ++s)
    store_number(seq_logps, s, sequence_logp(sequence_sums(rows, seqs, s, out.logps, nullptr), seqs),
                 rows.wide || seq_logps_double);
  return fault;
} catch (const std::bad_alloc&) {
  return Fault{kNoMemory};
}

Fault forward_losses(const Rows& rows, const LossBatch& batch, const TokenArrays& tokens, bool wpo, void* seq_logps,
                     int threads) try {
  const Fault fault = run_forward(rows, tokens, threads);
  if (fault.kind != kNoFault) return fault;
  const int64_t n_seqs = batch.seqs.n_seqs;
  std::vector<double> numbers(3 * n_seqs);
  double *logps = numbers.data(), *lengths = logps + n_seqs, *weights = lengths + n_seqs;
  for (int64_t s = 0; s < n_seqs; ++s) {
    const SequenceSums sums =
        sequence_sums(rows, batch.seqs, s, tokens.logps, wpo ? tokens.statistics[kStat_log_sum_sq_probs] : nullptr);
    logps[s] = sequence_logp(sums, batch.seqs);
    lengths[s] = sums.length;
    weights[s] = wpo ? wpo_weight(sums) : 1;
    store_number(seq_logps, s, logps[s], rows.wide);
  }
  pair_losses(batch, SequenceNumbers{logps, lengths, wpo ? weights : nullptr}, rows.wide);
  return fault;
} catch (const std::bad_alloc&) {
  return Fault{kNoMemory};
}

Fault losses_of_logps(const LossBatch& batch, const void* logps, const double* lengths, bool wide) try {
  std::vector<double> values(batch.seqs.n_seqs);
  for (int64_t s = 0; s < batch.seqs.n_seqs; ++s) values[s] = load_number(logps, s, wide);
  pair_losses(batch, SequenceNumbers{values.data(), lengths, nullptr}, wide);
  return Fault{};
} catch (const std::bad_alloc&) {
  return Fault{kNoMemory};
}

Fault backward(const Rows& rows, const Sequences* seqs, const Pairs* pairs, const SavedArrays& saved,
               const double* pair_grads, const GradArrays& grads, const GradTensor& out, int threads) try {
  TokenGrads of_tokens = {grads.token_logps, grads.entropy, grads.lse, nullptr};
  std::vector<double> grad_seqs, grad_rows;
  if (seqs) {
    grad_seqs.resize(seqs->n_seqs);
    grad_rows.resize(rows.n_rows);
    gradients_of_sequences(pairs, pair_grads, grads, seqs->n_seqs, rows.wide, grad_seqs.data());
    spread_to_rows(rows, *seqs, grad_seqs.data(), grad_rows.data());
    of_tokens.row = grad_rows.data();
  }
  backward_rows(rows, saved, of_tokens, out, threads_for(rows.n_rows * rows.vocab, threads));
  return Fault{};
} catch (const std::bad_alloc&) {
  return Fault{kNoMemory};
}

Fault losses_backward(const Pairs& pairs, const double* pair_grads, const GradArrays& grads, int64_t n_seqs, bool wide,
                      void* grad_logps) try {
  std::vector<double> grad_seqs(n_seqs);
  gradients_of_sequences(&pairs, pair_grads, grads, n_seqs, wide, grad_seqs.data());
  for (int64_t s = 0; s < n_seqs; ++s) store_number(grad_logps, s, grad_seqs[s], wide);
  return Fault{};
} catch (const std::bad_alloc&) {
  return Fault{kNoMemory};
}

}  // namespace dpo_fast

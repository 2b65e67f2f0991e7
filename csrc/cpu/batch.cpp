// The loops of batch.h. Whatever the number of threads, every sum is formed in the same order: results keep each bit.
#include "batch.h"

#include <algorithm>
#include <memory>

namespace dpo_fast {
namespace {

// Below this many logits a second thread costs more than it saves (docs/performance.md).
constexpr int64_t kSerialLogits = 1 << 16;
// A thread takes up to this many logits at a time: rows that follow each other in memory stream faster.
constexpr int64_t kTaskLogits = 1 << 19;

bool forked = false;

constexpr BatchStatus kFine = {kNoFault, 0, 0};

// Memory that is not set to anything.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

int threads_for(int64_t logits, int threads) { return forked || logits < kSerialLogits ? 1 : threads; }

// How many pieces of rows a thread takes at a time: enough tasks for threads that do not run alike.
int64_t units_per_task(const CpuRows& rows, int64_t units, int threads) {
  const int64_t by_size = kTaskLogits * pieces_per_row(rows) / rows.vocab;
  return std::max<int64_t>(1, std::min(by_size, units / (8 * threads)));
}

// work(row, piece) for all pieces of n_rows rows, `row` counted from 0.
template <class Work>
void for_pieces(const CpuRows& rows, int64_t n_rows, int threads, const Work& work) {
  const int64_t pieces = pieces_per_row(rows), units = n_rows * pieces;
  if (units == 0) return;
  if (threads == 1) {  // not even a team of one
    for (int64_t unit = 0; unit < units; ++unit) work(unit / pieces, unit % pieces);
    return;
  }
  [[maybe_unused]] const int64_t chunk = units_per_task(rows, units, threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
#endif
  for (int64_t unit = 0; unit < units; ++unit) work(unit / pieces, unit % pieces);
}

// --- checks ----------------------------------------------------------------------------------------------------------

BatchStatus check_sequences(const Rows& rows, const Sequences& seqs) {
  if (!seqs.cu_seqlens) return kFine;
  if (seq_bound(seqs, 0) != 0) return {kSeqlensStart, 0, 0};
  for (int64_t s = 0; s < seqs.n_seqs; ++s)
    if (seq_bound(seqs, s + 1) < seq_bound(seqs, s)) return {kSeqlensDecrease, s, 0};
  if (seq_bound(seqs, seqs.n_seqs) != rows.n_rows) return {kSeqlensEnd, seqs.n_seqs, 0};
  return kFine;
}

BatchStatus check_pairs(const Pairs& pairs, int64_t n_seqs, bool unpaired) {
  if (!pairs.pairs) return kFine;
  for (int64_t i = 0; i < 2 * pairs.n_pairs; ++i)
    if (pairs.pairs[i] >= n_seqs || pairs.pairs[i] < (unpaired ? -1 : 0)) return {kBadPair, i, 0};
  return kFine;
}

// Writes the numbers of the rows that count, n_kept of them.
BatchStatus find_kept(const Rows& rows, int64_t* kept, int64_t* n_kept) {
  *n_kept = 0;
  for (int64_t row = 0; row < rows.n_rows; ++row) {
    const int64_t state = row_state(rows, row);
    if (state < 0) return {kBadTarget, row, -1 - state};
    if (state == kRowKept) kept[(*n_kept)++] = row;
  }
  return kFine;
}

// --- forward ---------------------------------------------------------------------------------------------------------

BatchStatus rows_forward(const CpuRows& rows, int threads, const TokenArrays& out) {
  const auto kept = uninitialized<int64_t>(rows.n_rows);
  int64_t n_kept;
  const BatchStatus status = find_kept(rows, kept.get(), &n_kept);
  if (status.fault) return status;
  const int64_t pieces = pieces_per_row(rows);
  const auto parts = uninitialized<RowPart>(n_kept * pieces);
  threads = threads_for(n_kept * rows.vocab, threads);
  for_pieces(rows, n_kept, threads,
             [&](int64_t i, int64_t piece) { forward_piece(rows, kept[i], piece, out, &parts[i * pieces + piece]); });
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
  for (int64_t i = 0; i < n_kept; ++i) finish_row(rows, kept[i], &parts[i * pieces], out);
  for (int64_t row = 0, next = 0; row < rows.n_rows; ++row) {
    if (next < n_kept && kept[next] == row)
      ++next;
    else
      finish_ignored_row(rows, row, out);
  }
  return kFine;
}

SequenceSums sum_rows(const CpuRows& rows, const Sequences& seqs, const TokenArrays& tokens, int64_t s, bool wpo) {
  SequenceSums sums = {0, 0, 0, 0, 0};
  const RowRange range = seq_rows(rows, seqs, s);
  for (int64_t row = range.start; row < range.end; ++row) add_row(sums, rows, tokens, row, wpo);
  return sums;
}

// The results of all pairs. q: what they read of the sequences.
void losses_forward(const Pairs& pairs, LossOptions options, const SequenceNumbers& q, const Losses& out, bool wide) {
  if (pairs.baseline) options.baseline = *pairs.baseline;
  if (options.tokens_per_pair == 0 && q.lengths) {
    double tokens = 0;
    for (int64_t p = 0; p < pairs.n_pairs; ++p) tokens += length_of(q, pair_index(pairs, p).chosen);
    options.tokens_per_pair = tokens / pairs.n_pairs;
  }
  double total = 0;
  for (int64_t p = 0; p < pairs.n_pairs; ++p) {
    const Pair pair = pair_of(pairs, options, q, p);
    total += store_pair(out, pair, pair_loss(pair, options), p, wide);
  }
  store_number(out.loss, 0, total / pairs.divisor, wide);
}

// --- backward --------------------------------------------------------------------------------------------------------

// grad_seq[s]: the gradient of each sequence's log-prob; pairs may be null.
void pairs_backward(const Pairs* pairs, const double* pair_grads, const Grads& grads, int64_t n_seqs, bool wide,
                    double* grad_seq) {
  for (int64_t s = 0; s < n_seqs; ++s) grad_seq[s] = grads.seq_logps ? load_number(grads.seq_logps, s, wide) : 0;
  if (!pairs) return;
  const double common = common_incoming(*pairs, grads, wide);
  for (int64_t p = 0; p < pairs->n_pairs; ++p) {
    const double g = pair_incoming(common, grads, p, wide);
    const PairIndex index = pair_index(*pairs, p);
    if (index.chosen >= 0) grad_seq[index.chosen] += vanishing(g, pair_grads[2 * p]);
    if (index.rejected >= 0) grad_seq[index.rejected] += vanishing(g, pair_grads[2 * p + 1]);
  }
}

bool is_contiguous(const CpuRows& rows, const GradTensor& out) {
  return out.vocab_stride == 1 && out.row_stride == rows.width && out.seq_stride == rows.rows_per_seq * rows.width;
}

void spread_to_rows(const CpuRows& rows, const Sequences& seqs, const double* grad_seq, double* grad_rows) {
  for (int64_t s = 0; s < seqs.n_seqs; ++s) {
    const RowRange range = seq_rows(rows, seqs, s);
    double weights = 1;
    if (seqs.average) {
      weights = 0;
      for (int64_t row = range.start; row < range.end; ++row)
        if (row_state(rows, row) == kRowKept) weights += row_weight(rows, row);
    }
    for (int64_t row = range.start; row < range.end; ++row)
      grad_rows[row] = grad_from_seq(grad_seq[s], weights, row_weight(rows, row));
  }
}

}  // namespace

void after_fork_in_child() { forked = true; }

bool is_forked_child() { return forked; }

BatchStatus token_forward(const RowKernels& isa, const Rows& given, int threads, const TokenArrays& out) {
  return rows_forward(CpuRows(given, isa), threads, out);
}

BatchStatus sequence_forward(const RowKernels& isa, const Rows& given, const Sequences& seqs, int threads,
                             const TokenArrays& tokens, void* seq_logps, bool double_sums) {
  const CpuRows rows(given, isa);
  BatchStatus status = check_sequences(rows, seqs);
  if (!status.fault) status = rows_forward(rows, threads, tokens);
  if (status.fault) return status;
  for (int64_t s = 0; s < seqs.n_seqs; ++s) {
    const SequenceSums sums = sum_rows(rows, seqs, tokens, s, false);
    store_number(seq_logps, s, seq_logp(sums, seq_norm(sums, seqs.average)), rows.wide || double_sums);
  }
  return kFine;
}

BatchStatus dpo_forward(const RowKernels& isa, const Rows& given, const Sequences& seqs, const Pairs& pairs,
                        LossOptions options, int threads, bool wpo, const References& ref, const TokenArrays& tokens,
                        void* seq_logps, const Losses& losses) {
  const CpuRows rows(given, isa);
  const bool unpaired = any_term(options, kUnpaired);
  BatchStatus status = check_sequences(rows, seqs);
  if (!status.fault) status = check_pairs(pairs, seqs.n_seqs, unpaired);
  if (!status.fault) status = rows_forward(rows, threads, tokens);
  if (status.fault) return status;
  constexpr int64_t kNumbers = 3;  // log-prob, length, WPO's weight
  const auto numbers = uninitialized<double>(kNumbers * seqs.n_seqs);
  for (int64_t s = 0; s < seqs.n_seqs; ++s) {
    const SequenceSums sums = sum_rows(rows, seqs, tokens, s, wpo);
    double* of_seq = &numbers[kNumbers * s];
    of_seq[0] = seq_logp(sums, seq_norm(sums, seqs.average));
    of_seq[1] = sums.length;
    of_seq[2] = wpo ? wpo_weight(sums) : 1;
    store_number(seq_logps, s, of_seq[0], rows.wide);
  }
  const double* first = numbers.get();
  const SequenceNumbers q = {first,
                             reads_lengths(options) ? first + 1 : nullptr,
                             wpo ? first + 2 : nullptr,
                             kNumbers,
                             seqs.n_seqs,
                             ref.logps,
                             true,
                             ref.is_double,
                             !rows.wide,
                             unpaired};
  losses_forward(pairs, options, q, losses, rows.wide);
  return kFine;
}

BatchStatus backward(const RowKernels& isa, const Rows& given, const Sequences* seqs, const Pairs* pairs, int threads,
                     const TokenArrays& saved, const double* pair_grads, const Grads& grads, const GradTensor& out) {
  CpuRows rows(given, isa);
  std::unique_ptr<double[]> grad_rows;
  if (seqs) {
    BatchStatus status = check_sequences(rows, *seqs);
    if (!status.fault && pairs) status = check_pairs(*pairs, seqs->n_seqs, true);
    if (status.fault) return status;
    const auto grad_seq = uninitialized<double>(seqs->n_seqs);
    grad_rows = uninitialized<double>(rows.n_rows);
    pairs_backward(pairs, pair_grads, grads, seqs->n_seqs, rows.wide, grad_seq.get());
    spread_to_rows(rows, *seqs, grad_seq.get(), grad_rows.get());
  }
  if (out.data != rows.logits && is_contiguous(rows, out))
    rows.zeros = untouched(out.data, rows.n_rows * rows.width * rows.logit_bytes);
  for_pieces(rows, rows.n_rows, threads_for(rows.n_rows * rows.vocab, threads), [&](int64_t row, int64_t piece) {
    backward_piece(rows, row, piece, saved, grads, grad_rows ? grad_rows[row] : 0, out);
  });
  return kFine;
}

BatchStatus preference_forward(const Pairs& pairs, LossOptions options, bool wide, bool round_sums, int64_t n_seqs,
                               const void* logps, const References& ref, const double* lengths, const Losses& losses) {
  const bool unpaired = any_term(options, kUnpaired);
  const BatchStatus status = check_pairs(pairs, n_seqs, unpaired);
  if (status.fault) return status;
  const SequenceNumbers q = {logps, lengths, nullptr, 1, n_seqs, ref.logps, wide, ref.is_double, round_sums, unpaired};
  losses_forward(pairs, options, q, losses, wide);
  return kFine;
}

BatchStatus preference_backward(const Pairs& pairs, bool wide, int64_t n_seqs, const double* pair_grads,
                                const Grads& grads, void* grad_logps) {
  const BatchStatus status = check_pairs(pairs, n_seqs, true);
  if (status.fault) return status;
  const auto grad_seq = uninitialized<double>(n_seqs);
  pairs_backward(&pairs, pair_grads, grads, n_seqs, wide, grad_seq.get());
  for (int64_t s = 0; s < n_seqs; ++s) store_number(grad_logps, s, grad_seq[s], wide);
  return kFine;
}

}  // namespace dpo_fast

// The loops of sparse_head.h: which entries of a row are kept, and which thread takes what. Compiled for the baseline
// processor; the arithmetic on whole rows is in sparse_isa.cpp.
#include "sparse_head.h"

#include <string.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "batch.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace dpo_fast {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const SparseKernels kSparseKernels;
}
namespace avx512 {
extern const SparseKernels kSparseKernels;
}
namespace avx2 {
extern const SparseKernels kSparseKernels;
}
#endif
namespace portable {
extern const SparseKernels kSparseKernels;
}

const SparseKernels& sparse_kernels(const RowKernels& isa) {
#if defined(__x86_64__)
  for (const SparseKernels* each : {&avx512_bf16::kSparseKernels, &avx512::kSparseKernels, &avx2::kSparseKernels})
    if (strcmp(each->isa, isa.isa) == 0) return *each;
#endif
  return portable::kSparseKernels;
}

namespace {

// How far the kept mass, a sum of float32 numbers, may be from the truth: the sum of the forward pass (float32 over
// 2048 logits), 1 / sum and every p; half types' p come from the shorter exponential (docs/accuracy.md).
constexpr double kMassError = 1e-5, kHalfMassError = 3e-5;
// Candidates are at first those above the allowed mass times this: at most 1024 more than are kept. Where they do not
// hold enough, the next cut is guessed for this part of the allowed mass.
constexpr double kFirstCut = 1.0 / 1024, kSafety = 0.8;
// Rows looked at before all others.
constexpr int64_t kSampleRows = 16;
// Bins of the histogram: exponent and three more bits of p, down to 2^-63.
constexpr int kBins = 64 * 8;

template <class T>
std::unique_ptr<T[]> uninitialized(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

// What one thread needs for one row.
struct Scratch {
  std::unique_ptr<int32_t[]> columns;
  std::unique_ptr<float[]> raw, p;
  double mass[kBins];
  explicit Scratch(int64_t vocab)
      : columns(uninitialized<int32_t>(vocab + kCandidateSlack)),
        raw(uninitialized<float>(vocab + kCandidateSlack)),
        p(uninitialized<float>(vocab + kCandidateSlack)) {}
};

// Larger p, larger bin; 0 for everything below 2^-63.
int bin_of(float p) {
  uint32_t bits;
  memcpy(&bits, &p, sizeof bits);
  const int bin = (int)(bits >> 20) - ((127 - 63) << 3);
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// The raw logit whose probability is `p`, or a lower one.
double raw_logit_of(const LogitTransform& t, double p, double shift, double inv_sum) {
  const double above = shift + std::log(p / inv_sum) / unit_scale(t);
  if (t.softcap <= 0) return above;
  const double u = above * t.temperature / t.softcap;
  return u >= 1 ? INFINITY : u <= -1 ? -INFINITY : std::atanh(u) * t.softcap / t.logit_scale;
}

// One row's selection.
struct RowSelection {
  const CpuRows& rows;
  const SparseKernels& kernels;
  const SparseInput& in;
  const SelectedRows& out;
  double error;  // of the mass

  const char* logits(int64_t row) const {
    return (const char*)rows.logits +
           row_offset(row, rows.rows_per_seq, rows.seq_stride, rows.row_stride) * rows.logit_bytes;
  }

  void probabilities(int64_t row, int64_t n, const float* raw, float* p, float* slopes) const {
    kernels.probabilities[rows.transform_kind](raw, n, rows.transform, in.stats[2 * row], in.stats[2 * row + 1],
                                               rows.logit_type != kFloat32, p, slopes);
  }

  // Candidates without the target, among which are the largest bins that hold `needed`: the lowest of these bins and
  // the mass of all of them; -1 where the row does not hold so much, or not in as few entries as it may keep.
  int find_cut(int64_t row, double needed, double allowed, Scratch& s, int64_t* n, double* kept) const {
    const int64_t target = rows.targets[row];
    const double lowest = allowed / (4.0 * rows.vocab);
    for (double cut = std::max(allowed * kFirstCut, lowest);;) {
      const double raw = raw_logit_of(rows.transform, cut, in.stats[2 * row], in.stats[2 * row + 1]);
      const float bound = std::nextafterf((float)raw, -INFINITY);
      *n = kernels.candidates[rows.logit_type](logits(row), rows.vocab, bound, s.columns.get(), s.raw.get());
      // those that the row may do without have each more than `cut` of the allowed mass
      if (*n > out.most + (int64_t)(allowed / cut)) return -1;
      probabilities(row, *n, s.raw.get(), s.p.get(), s.raw.get());
      memset(s.mass, 0, sizeof s.mass);
      for (int64_t i = 0; i < *n; ++i) s.mass[bin_of(s.p[i])] += s.columns[i] == target ? 0 : s.p[i];
      // below the bin of the bound itself not all entries are candidates
      const int last = cut == lowest ? 0 : bin_of((float)cut) + 1;
      *kept = 0;
      for (int bin = kBins - 1; bin >= last; --bin) {
        *kept += s.mass[bin];
        if (*kept >= needed) return bin;
      }
      if (cut == lowest || *n > out.most) return -1;  // all candidates are kept, and more
      cut = std::max(looser_cut(cut, *n, needed + allowed - *kept, allowed), lowest);
    }
  }

  // If n entries lie above a cut, and the rest has the mass `rest`, where the rest would have `allowed` were p a power
  // of the entry's rank: p = c n^-s, rest = c n^(1 - s) / (s - 1).
  static double looser_cut(double cut, int64_t n, double rest, double allowed) {
    const double t = cut * (double)std::max<int64_t>(n, 1) / rest;  // s - 1
    const double factor = std::pow(rest / (kSafety * allowed), -(1 + t) / t);
    return cut * std::min(std::max(factor, 1.0 / 64), 0.5);
  }

  // Writes the candidates from `bin` on, and the target in its place; false where there are too many.
  bool write(int64_t row, int bin, int64_t n, const Scratch& s) const {
    const double g = in.grads[row];
    const int64_t target = rows.targets[row], blocks = column_blocks(rows.vocab), first = row * out.most;
    float raw = (float)rows.kernels->value[kPlain](logits(row) + target * rows.logit_bytes, rows.transform), p, slope;
    probabilities(row, 1, &raw, &p, &slope);
    const RowIncoming incoming = {g, 0, 0, true};
    const float at_target = (float)(target_grad(in.logps[row], g, 0, incoming) * slope);
    int32_t* counts = out.counts + row * blocks;
    int64_t at = 0;
    memset(counts, 0, blocks * sizeof *counts);
    auto put = [&](int64_t column, float value) {
      out.columns[first + at] = (int32_t)column;
      out.values[first + at++] = value;
      ++counts[column / kBlockColumns];
    };
    bool placed = false;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t column = s.columns[i];
      if (column == target || bin_of(s.p[i]) < bin) continue;
      if (at + 2 > out.most) return false;
      if (column > target && !placed) {
        put(target, at_target);
        placed = true;
      }
      put(column, (float)-g * s.p[i] * s.raw[i]);
    }
    if (!placed) put(target, at_target);
    return true;
  }

  bool leave_dense(int64_t row) const {
    int32_t* counts = out.counts + row * column_blocks(rows.vocab);
    memset(counts, 0, column_blocks(rows.vocab) * sizeof *counts);
    *counts = -1;
    return false;
  }

  // Whether the row became sparse.
  bool select(int64_t row, Scratch& s) const {
    const double allowed = in.allowed[row], p = std::exp((double)in.logps[row]), inv_sum = in.stats[2 * row + 1];
    out.skipped[row] = 0;
    if (in.grads[row] == 0) {  // no entry, whatever its logits hold
      memset(out.counts + row * column_blocks(rows.vocab), 0, column_blocks(rows.vocab) * sizeof *out.counts);
      return true;
    }
    if (!(allowed >= 0) || !std::isfinite(in.grads[row]) || !std::isfinite(in.logps[row]) || !(inv_sum > 0) ||
        !std::isfinite(inv_sum) || !std::isfinite(in.stats[2 * row]))
      return leave_dense(row);
    double kept = 0;
    int64_t n = 0;
    int bin = kBins;
    const double needed = 1 - p - allowed + error;
    if (needed > 0 && allowed < 1) bin = find_cut(row, needed, allowed, s, &n, &kept);
    if (bin < 0 || !write(row, bin, n, s)) return leave_dense(row);
    out.skipped[row] = (float)std::max(0.0, 1 - p - kept);
    return true;
  }
};

int team(int threads) { return is_forked_child() ? 1 : threads; }

int this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

bool select_sparse(const RowKernels& isa, const Rows& given, const SparseInput& in, int threads,
                   const SelectedRows& out) {
  const CpuRows rows(given, isa);
  const RowSelection selection = {rows, sparse_kernels(isa), in, out,
                                  rows.logit_type == kFloat32 ? kMassError : kHalfMassError};
  const int64_t step = std::max<int64_t>(1, rows.n_rows / kSampleRows);
  threads = team(threads);
  std::vector<Scratch> scratch;
  scratch.reserve(threads);
  for (int t = 0; t < threads; ++t) scratch.emplace_back(rows.vocab);
  int64_t looked_at = 0, dense = 0;
  for (int64_t row = step / 2; row < rows.n_rows; row += step, ++looked_at) dense += !selection.select(row, scratch[0]);
  if (2 * dense > looked_at) return false;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
#endif
  for (int64_t row = 0; row < rows.n_rows; ++row) selection.select(row, scratch[this_thread()]);
  return true;
}

int64_t count_entries(const SelectedRows& rows) {
  const int64_t blocks = column_blocks(rows.vocab);
  int64_t total = 0;
  for (int64_t row = 0; row < rows.n_rows; ++row)
    for (int64_t b = 0; b < blocks; ++b) total += std::max(rows.counts[row * blocks + b], 0);
  return total;
}

void pack_sparse(const SelectedRows& rows, int threads, const SparseRows& out) {
  const int64_t blocks = column_blocks(rows.vocab), n_rows = rows.n_rows;
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t row = 0; row < n_rows; ++row) {
      out.positions[b * n_rows + row] = total;
      total += std::max(rows.counts[row * blocks + b], 0);
    }
  out.positions[blocks * n_rows] = total;
  [[maybe_unused]] const int n_threads = team(threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
#endif
  for (int64_t row = 0; row < n_rows; ++row) {
    int64_t from = row * rows.most;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t to = out.positions[b * n_rows + row], size = std::max(rows.counts[row * blocks + b], 0);
      for (int64_t i = 0; i < size; ++i) {
        out.columns[to + i] = rows.columns[from + i];
        out.values[to + i] = rows.values[from + i];
      }
      from += size;
    }
  }
}

void sparse_times_table(const RowKernels& isa, const SparseRows& rows, int logit_type, const void* table,
                        int64_t stride, int64_t width, int threads, float* out) {
  const auto gather = sparse_kernels(isa).gather[logit_type];
  const int64_t blocks = column_blocks(rows.vocab), n_rows = rows.n_rows;
  threads = team(threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
#endif
  for (int t = 0; t < threads; ++t) {
    for (int64_t row = t; row < n_rows; row += threads) memset(out + row * width, 0, width * sizeof(float));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t row = t; row < n_rows; row += threads) {
        const int64_t start = rows.positions[block * n_rows + row], end = rows.positions[block * n_rows + row + 1];
        if (end > start)
          gather(rows.columns + start, rows.values + start, end - start, table, stride, width, out + row * width, true);
      }
  }
}

namespace {

// The entries of a block of columns, by column: those of column c end at ends[c].
struct BlockByColumn {
  std::unique_ptr<int32_t[]> row;
  std::unique_ptr<float[]> value;
  int32_t ends[kBlockColumns + 1];
  explicit BlockByColumn(int64_t most) : row(uninitialized<int32_t>(most)), value(uninitialized<float>(most)) {}

  // A counting sort: entries of a column stay in the order of rows.
  void sort(const SparseRows& rows, int64_t block) {
    memset(ends, 0, sizeof ends);
    const int64_t base = block * kBlockColumns, *positions = rows.positions + block * rows.n_rows;
    for (int64_t i = positions[0]; i < positions[rows.n_rows]; ++i) ++ends[rows.columns[i] - base + 1];
    for (int64_t c = 0; c < kBlockColumns; ++c) ends[c + 1] += ends[c];
    for (int64_t n = 0; n < rows.n_rows; ++n)
      for (int64_t i = positions[n]; i < positions[n + 1]; ++i) {
        const int32_t at = ends[rows.columns[i] - base]++;
        row[at] = (int32_t)n;
        value[at] = rows.values[i];
      }
  }
};

int64_t largest_block(const SparseRows& rows) {
  int64_t most = 0;
  for (int64_t block = 0; block < column_blocks(rows.vocab); ++block)
    most = std::max(most, rows.positions[(block + 1) * rows.n_rows] - rows.positions[block * rows.n_rows]);
  return most;
}

}  // namespace

void sparse_transposed_times_table(const RowKernels& isa, const SparseRows& rows, int logit_type, const void* table,
                                   int64_t stride, int64_t width, bool add, int threads, float* out) {
  const auto gather = sparse_kernels(isa).gather[logit_type];
  const int64_t blocks = column_blocks(rows.vocab), most = largest_block(rows);
  threads = team(threads);
  std::vector<BlockByColumn> scratch;
  scratch.reserve(threads);
  for (int t = 0; t < threads; ++t) scratch.emplace_back(most);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
#endif
  for (int64_t block = 0; block < blocks; ++block) {
    BlockByColumn& entries = scratch[this_thread()];
    entries.sort(rows, block);
    const int64_t base = block * kBlockColumns, columns = std::min(kBlockColumns, rows.vocab - base);
    for (int64_t c = 0, start = 0; c < columns; ++c) {
      const int64_t end = entries.ends[c];
      float* sum = out + (base + c) * width;
      if (end > start)
        gather(&entries.row[start], &entries.value[start], end - start, table, stride, width, sum, add);
      else if (!add)
        memset(sum, 0, width * sizeof(float));
      start = end;
    }
  }
}

void sparse_column_sums(const SparseRows& rows, bool add, int threads, float* out) {
  const int64_t blocks = column_blocks(rows.vocab);
  threads = team(threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
#endif
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t base = block * kBlockColumns, columns = std::min(kBlockColumns, rows.vocab - base);
    if (!add) memset(out + base, 0, columns * sizeof(float));
    for (int64_t i = rows.positions[block * rows.n_rows]; i < rows.positions[(block + 1) * rows.n_rows]; ++i)
      out[rows.columns[i]] += rows.values[i];
  }
}

}  // namespace dpo_fast

// The gradient of a head's logits as sparse rows, and the products with them that replace the dense ones of the head.
//
//   dz[n, v] = g_n * (1[v = y_n] - p[n, v]) * dz/dx      p = softmax(z[n])
//
// A trained model's p is almost all 0. Of each row the largest entries are kept, as many as it takes for the mass of
// the rest, m_n = sum of the p[n, v] left out, to be within what the row may skip; y_n is always kept.
//
// a) The mass left out is 1 minus the mass kept: only the kept entries' exponentials are needed, and the pass over the
//    logits is one comparison. What that difference loses to rounding (kMassError) is taken off the allowance.
// b) The cut is found on a histogram of p by exponent and its next bits, over candidates whose bound is loosened until
//    they hold enough mass. It depends on the row alone.
// c) Rows that would keep too much (flat ones), or whose numbers are not finite, are left dense: `counts` says so and
// the
//    caller takes them through the dense product.
// d) The products take entries by blocks of columns: a block of the head, or of its gradient, stays in the second-level
//    cache while all rows use it. Entries are packed in that order, or every visit of a row would cost pages.
// e) Sums over entries are float32, in the order of columns (dHidden) and of rows (dWeight), whatever the threads.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace dpo_fast {

// Columns in a block of SparseRows.
constexpr int64_t kBlockColumns = 512;
// Room behind n candidates that vectors may write into.
constexpr int64_t kCandidateSlack = 64;

inline int64_t column_blocks(int64_t vocab) { return (vocab + kBlockColumns - 1) / kBlockColumns; }

// The functions of one instruction set. Of types they exist for float32, bfloat16 and float16 (null for float64).
struct SparseKernels {
  const char* isa;
  // Columns and values (float32) of those of n adjacent logits above `cut`; returns their number. Both arrays have room
  // for n + kCandidateSlack.
  int64_t (*candidates[kLogitTypes])(const void* x, int64_t n, float cut, int32_t* columns, float* values);
  // p and dz/dx of n raw logits; p may not be `x`, slopes may. half: the shorter exponential, as the row kernels take
  // it.
  void (*probabilities[kTransformKinds])(const float* x, int64_t n, const LogitTransform& transform, double shift,
                                         double inv_sum, bool half, float* p, float* slopes);
  // out[0, width) = (add: out +) sum_i values[i] * table[index[i]], rows of a table of `stride` elements.
  void (*gather[kLogitTypes])(const int32_t* index, const float* values, int64_t n, const void* table, int64_t stride,
                              int64_t width, float* out, bool add);
};

// Those of a set of row kernels.
const SparseKernels& sparse_kernels(const RowKernels& isa);

// Rows as selection leaves them, in slots of `most` entries, each in the order of columns.
struct SelectedRows {
  int32_t* columns;  // [rows, most]
  float* values;     // [rows, most]
  int32_t* counts;   // [rows, blocks]: entries in each block of columns; -1 in a dense row's first
  float* skipped;    // [rows]: the mass that each row leaves out
  int64_t n_rows, vocab, most;
};

// The same packed: block after block, in each row after row.
struct SparseRows {
  int32_t* columns;    // [entries]
  float* values;       // [entries]
  int64_t* positions;  // [blocks * rows + 1]: where block b's entries of row n begin, at b * rows + n
  int64_t n_rows, vocab;
};

// What selection reads beside the logits, which have one target a row, all of them kept.
struct SparseInput {
  const float* logps;  // [rows] of the targets
  const float* stats;  // [rows, 2]: shift and 1 / sum
  const float* grads;  // [rows], of the log-probs
  const float*
      allowed;  // [rows], the mass that a row may skip; 1 or more: all but the target, below 0: the row is dense
};

// Fills `out`. False, with nothing promised about it: of some rows looked at first most are dense, so that all may as
// well be.
bool select_sparse(const RowKernels& isa, const Rows& rows, const SparseInput& in, int threads,
                   const SelectedRows& out);

// How many entries there are.
int64_t count_entries(const SelectedRows& rows);

// Fills `out`, which has room for them.
void pack_sparse(const SelectedRows& rows, int threads, const SparseRows& out);

// out [rows, width] = rows @ table [vocab, width] (type `logit_type`, rows of `stride` elements); dense rows get 0.
void sparse_times_table(const RowKernels& isa, const SparseRows& rows, int logit_type, const void* table,
                        int64_t stride, int64_t width, int threads, float* out);

// out [vocab, width] = (add: out +) rows^T @ table [rows, width]; dense rows take no part.
void sparse_transposed_times_table(const RowKernels& isa, const SparseRows& rows, int logit_type, const void* table,
                                   int64_t stride, int64_t width, bool add, int threads, float* out);

// out [vocab] = (add: out +) the sum of the rows; dense rows take no part.
void sparse_column_sums(const SparseRows& rows, bool add, int threads, float* out);

}  // namespace dpo_fast

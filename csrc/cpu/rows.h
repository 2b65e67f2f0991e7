// The CPU row functions: what Cython's parallel loops call. A row of logits is worked on in pieces of kPieceLogits, a
// place that depends on nothing but the vocabulary's size, so that any thread may take any piece and the merged result
// keeps every bit.
#pragma once

#include <stdint.h>

#include "../row_math.h"

namespace dpo_fast {

enum LogitType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kLogitTypes = 4;

// kPlain: z = x. kScaled: z = x * scale. kCapped: the tanh soft-cap as well.
enum TransformKind { kPlain = 0, kScaled = 1, kCapped = 2 };
constexpr int kTransformKinds = 3;

constexpr int64_t kPieceLogits = 32768;
constexpr int64_t kIgnoreNothing = INT64_MIN;

// The functions for one type of logits, by transform. Strides are in elements.
struct TypeKernels {
  // Partial sums over n logits; the last index: with those for entropy, mean, argmax and squares.
  RowPart (*forward[kTransformKinds][2])(const void* x, int64_t stride, int64_t n, const LogitTransform& transform);
  // dx[i] for n logits, without the true-class terms. dx may be x. The last index: with an entropy gradient.
  void (*backward[kTransformKinds][2])(const void* x, int64_t stride, void* dx, int64_t dx_stride, int64_t n,
                                       const LogitTransform& transform, const RowGrad& grad);
  // One logit in the shift domain.
  double (*value[kTransformKinds])(const void* x, const LogitTransform& transform);
};

// The functions of one instruction set.
struct RowKernels {
  const char* isa;
  TypeKernels types[kLogitTypes];
  // y[i] = exp(x[i]) for n floats or doubles, as the kernels compute it (half: the shorter polynomial); for tests.
  void (*exp_float)(const float* x, float* y, int64_t n, bool half);
  void (*exp_double)(const double* x, double* y, int64_t n);
};

// The i-th compiled set, widest first, null past the last; whether this processor can run one.
const RowKernels* compiled_kernels(int i);
bool processor_supports(const RowKernels* kernels);

// The rows of one call: sequence s, position t starts at logits + (s * seq_stride + t * row_stride) elements.
// All float arrays beside the logits are float32, or float64 when the logits are (`wide`).
struct Rows {
  const RowKernels* kernels;
  char* logits;
  const int64_t* targets;   // [rows, n_targets]
  const uint8_t* row_mask;  // [rows], null: every row counts
  const double* weights;    // [rows], null: 1; a row of weight 0 is ignored
  LogitTransform transform;
  int64_t seq_stride, row_stride, vocab_stride;
  int64_t rows_per_seq, n_rows, vocab, n_targets;
  int64_t ignore_index;  // kIgnoreNothing: no target
  int logit_type, transform_kind, logit_bytes;
  bool wide;
};

// What forward leaves for each row, [rows] or [rows, n_targets]; null where not wanted.
struct TokenArrays {
  void* logps;             // [rows, n_targets]
  void* stats;             // [rows, 2]: shift and 1 / sum
  void* entropy;           // [rows]
  void* mean_logits;       // [rows]
  uint8_t* is_top1;        // [rows, n_targets]
  void* log_sum_sq_probs;  // [rows]
};

// Incoming gradients of a row.
struct TokenGrads {
  const void* logps;    // [rows, n_targets], null: none
  const void* entropy;  // [rows], null: none
  const double* row;    // [rows], null: none: added to the gradient of each of the row's log-probs
};

// Where backward writes: logits' own memory, or a fresh tensor with vocab_stride 1.
struct GradTensor {
  char* data;
  int64_t seq_stride, row_stride, vocab_stride;
};

inline int64_t pieces_per_row(const Rows& rows) { return (rows.vocab + kPieceLogits - 1) / kPieceLogits; }

void finish_rows_setup(Rows& rows);  // fills kind, bytes and wide from the rest

double load_float(const void* array, int64_t i, bool wide);
void store_float(void* array, int64_t i, double x, bool wide);

// Whether a row counts; -1 - k when its target k lies outside the vocabulary.
int row_state(const Rows& rows, int64_t row);

bool wants_extras(const TokenArrays& out);  // anything but logps and stats

// One piece of one row, forward, which also leaves the values of the targets inside it in out.logps; the merge of a
// row's pieces into its outputs; an ignored row's outputs.
void forward_piece(const Rows& rows, int64_t row, int64_t piece, const TokenArrays& out, RowPart* part);
void finish_row(const Rows& rows, int64_t row, const RowPart* parts, const TokenArrays& out);
void finish_ignored_row(const Rows& rows, int64_t row, const TokenArrays& out);

// One piece of one row, backward: its gradient, or zeros for an ignored row.
void backward_piece(const Rows& rows, int64_t row, int64_t piece, const TokenArrays& saved, const TokenGrads& grads,
                    const GradTensor& out);
void zero_piece(const Rows& rows, int64_t row, int64_t piece, const GradTensor& out);

// Before the first write to fresh memory, if it is large: its pages may come 2 MiB at a time (Linux).
void advise_huge_pages(char* x, int64_t bytes);

}  // namespace dpo_fast

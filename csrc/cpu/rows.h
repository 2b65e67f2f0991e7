// The CPU row functions, which the loops of batch.cpp call. A row of logits is worked on in pieces of kPieceLogits.
// Where they lie depends on nothing but the vocabulary's size: any thread may take any piece, and the merged result
// keeps every bit.
#pragma once

#include <stdint.h>

#include "../sequence_math.h"
#include "fresh_memory.h"

namespace dpo_fast {

// kPlain: z = x. kScaled: z = x * scale. kCapped: the tanh soft-cap as well.
enum TransformKind { kPlain = 0, kScaled = 1, kCapped = 2 };
constexpr int kTransformKinds = 3;

constexpr int64_t kPieceLogits = 32768;

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

// The rows of one call, with the functions that work on them.
struct CpuRows : Rows {
  const TypeKernels* kernels;
  TransformKind transform_kind;
  int64_t logit_bytes;
  bool wide;
  MemoryRange zeros = {nullptr, nullptr};  // of the gradient, before anything is written to it
  CpuRows(const Rows& rows, const RowKernels& isa);
};

inline int64_t pieces_per_row(const CpuRows& rows) { return (rows.vocab + kPieceLogits - 1) / kPieceLogits; }

// One piece of one row, forward, which also leaves the values of the targets inside it in out.logps; the merge of a
// row's pieces into its outputs; an ignored row's outputs.
void forward_piece(const CpuRows& rows, int64_t row, int64_t piece, const TokenArrays& out, RowPart* part);
void finish_row(const CpuRows& rows, int64_t row, const RowPart* parts, const TokenArrays& out);
void finish_ignored_row(const CpuRows& rows, int64_t row, const TokenArrays& out);

// One piece of one row, backward; from_seq: what the sequence adds to the gradient of each of the row's log-probs. A
// row that is ignored, or whose incoming gradients are all 0, is not read and gets zeros, as does the padding of every
// row.
void backward_piece(const CpuRows& rows, int64_t row, int64_t piece, const TokenArrays& saved, const Grads& grads,
                    double from_seq, const GradTensor& out);

}  // namespace dpo_fast

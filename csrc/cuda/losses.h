// The kernels of whole batches: token log-probs to sequences, sequences to pairs and their loss, and the way back to
// sequences. A warp sums one sequence, its lanes taking rows by their place in the sequence; nothing is added up in an
// order that other sequences or the clock could change.
#pragma once

#include "device.h"

namespace dpo_fast {

constexpr int kBatchThreads = 256;
constexpr int kBatchWarps = kBatchThreads / kWarp;

struct BatchArgs {
  Rows rows;
  Sequences seqs;
  Pairs pairs;
  LossOptions options;
  TokenArrays tokens;
  SequenceNumbers numbers;  // what the losses read of the sequences
  void* seq_logps;          // [n_seqs]
  double* seq_saved;        // [n_seqs, kSeqSaved], null: log-probs of sequences are given, in `numbers`
  Losses out;               // loss null: sequences only
  bool wide, seq_logps_double;
  bool wpo;
};

struct SeqGradArgs {
  Pairs pairs;
  Grads grads;  // of loss and losses
  int64_t n_seqs;
  const double* pair_grads;  // [n_pairs, 2]
  void* grad_seqs;           // [n_seqs]
  bool wide;                 // of the incoming gradients
  bool grad_double;
  int64_t first_seq;  // of this launch
};

int launch_batch(const BatchArgs& a, void* stream);
int launch_seq_grads(SeqGradArgs a, void* stream);

}  // namespace dpo_fast

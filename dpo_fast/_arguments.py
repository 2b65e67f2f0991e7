"""The kernels' arguments by name, for torch and NumPy alike: numbers, and addresses as int or None for "not given".

The order of the fields is that in which the bindings read them (dpo_fast/_parse.pxi).
"""

from __future__ import annotations

from typing import NamedTuple


class KernelRows(NamedTuple):
    """Logits and what is asked of their rows; strides in elements."""

    logit_type: int
    n_seqs: int
    rows_per_seq: int
    width: int  # columns in memory
    seq_stride: int
    row_stride: int
    vocab_stride: int
    n_targets: int
    ignore_index: int
    temperature: float
    logit_scale: float
    softcap: float  # 0: none
    valid_vocab: int  # columns from here on are padding; 0: none is
    logits: int
    targets: int  # int64
    row_mask: int | None  # bool
    token_weights: int | None
    weights_double: bool  # float64, else float32


class KernelSequences(NamedTuple):
    """Which rows make a sequence."""

    cu_seqlens: int | None
    cu_int64: bool  # else int32
    n_seqs: int
    average: bool


class KernelPairs(NamedTuple):
    """Which sequences make a pair."""

    pairs: int | None  # int64 [P, 2]
    n_pairs: int
    divisor: float  # of the sum over pairs; 0: n_pairs
    baseline: int | None  # float64 []
    numbers: tuple[int | None, ...]  # float64 [P] each, in the order of DPO_FAST_PAIR_NUMBERS
    order: int | None = None  # for CUDA: the places in `pairs` sorted by sequence, [2 P] int64,
    offsets: int | None = None  # and where each sequence's begin, [n_seqs + 1] int64


class KernelLosses(NamedTuple):
    """Where the losses go."""

    loss: int
    losses: int
    chosen_rewards: int
    rejected_rewards: int
    pair_grads: int | None  # float64 [P, 2]


class KernelSaved(NamedTuple):
    """What forward left."""

    logps: int
    stats: int
    entropy: int | None
    pair_grads: int | None
    seq_saved: int | None = None  # of the CUDA kernels


class KernelGrads(NamedTuple):
    """Incoming gradients."""

    token_logps: int | None = None
    entropy: int | None = None
    lse: int | None = None
    seq_logps: int | None = None
    loss: int | None = None
    losses: int | None = None


class KernelOut(NamedTuple):
    """Where the gradient of the logits goes."""

    data: int
    seq_stride: int
    row_stride: int
    vocab_stride: int

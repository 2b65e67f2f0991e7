"""The arguments of the kernels, by group, as the bindings `_cpu` and `_cuda` take them.

An address is an int, or None for an array that is not given; where there are elements, 0 is refused. Strides and sizes
are in elements. Arrays are contiguous, the logits and their gradient apart. Float arrays beside the logits are float32,
or float64 where the logits are, unless a line says otherwise; integers are int64.
"""

from __future__ import annotations

from typing import NamedTuple

Address = int | None


class KernelRows(NamedTuple):
    """The rows of logits [n_seqs, rows_per_seq, width]; packed ones are one sequence."""

    logit_type: int  # enum LogitType in csrc/sequence_math.h
    n_seqs: int
    rows_per_seq: int
    width: int  # columns in memory
    seq_stride: int
    row_stride: int
    vocab_stride: int
    n_targets: int
    options: tuple[float, ...]  # LogitOptions, in the order of `_cpu.logit_options()`
    logits: Address
    targets: Address  # [rows, n_targets]
    row_mask: Address  # uint8 [rows]; None: every row counts
    token_weights: Address  # [rows], float64 with weights_double, else float32; None: 1
    weights_double: bool


class KernelSelected(NamedTuple):
    """Sparse rows in slots of `most` entries, as selection leaves them; a block is `column_blocks` columns."""

    columns: Address  # int32 [rows, most]
    values: Address  # float32 [rows, most]
    counts: Address  # int32 [rows, blocks]: entries in each block; -1 in a dense row's first
    skipped: Address  # float32 [rows]
    n_rows: int
    vocab: int
    most: int


class KernelSparse(NamedTuple):
    """The same packed: block after block of columns, in each row after row."""

    columns: Address  # int32 [entries]
    values: Address  # float32 [entries]
    positions: Address  # [blocks * rows + 1]: where the entries of block b and row n begin, at b * rows + n
    n_rows: int
    vocab: int
    n_entries: int


class KernelSequences(NamedTuple):
    """Which rows a sequence has."""

    cu_seqlens: Address  # [n_seqs + 1], int64 with cu_int64, else int32; None: rows_per_seq rows each
    cu_int64: bool
    n_seqs: int
    average: bool  # over the sum of the weights


class KernelPairs(NamedTuple):
    """Which sequences a pair has."""

    pairs: Address  # [n_pairs, 2], -1: no such side; None: first half chosen, second half rejected
    n_pairs: int
    divisor: float  # of the sum of the losses; 0: n_pairs
    baseline: Address  # float64 []
    numbers: tuple[Address, ...]  # float64 [n_pairs] each, in the order of `_cpu.pair_numbers()`
    order: Address = None  # [2 n_pairs]: the entries 2 p + side of `pairs`, sorted by sequence; CUDA only
    offsets: Address = None  # [n_seqs + 1]: where each sequence's entries begin in `order`


class KernelLosses(NamedTuple):
    """Results of the losses, [n_pairs] each but for `loss` []."""

    loss: Address
    losses: Address
    chosen_rewards: Address
    rejected_rewards: Address
    pair_grads: Address  # float64 [n_pairs, 2], derivatives by the two log-probs; on the CPU None: no backward


class KernelSaved(NamedTuple):
    """The results of forward that backward reads."""

    logps: Address  # [rows, n_targets]
    stats: Address  # [rows, 2]
    entropy: Address  # [rows], read beside its gradient
    pair_grads: Address  # float64 [n_pairs, 2], read beside pairs
    seq_saved: Address = None  # float64 [n_seqs, _cuda.SEQ_SAVED], CUDA only


class KernelGrads(NamedTuple):
    """Incoming gradients; None: none."""

    token_logps: Address  # [rows, n_targets]
    statistics: tuple[Address, ...]  # [rows] each, in the order of `_cpu.token_statistics()`; empty: none
    seq_logps: Address  # [n_seqs]
    loss: Address  # []
    losses: Address  # [n_pairs]


class KernelOut(NamedTuple):
    """The gradient of the logits, which may be the logits' own memory."""

    data: Address
    seq_stride: int
    row_stride: int
    vocab_stride: int

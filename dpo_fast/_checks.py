"""What the torch and the NumPy functions check alike: options, shapes and layouts, without either library's types.

Every message names the argument, what was found and what was expected.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

# The optional statistics of a token, beside its log-probability.
TOKEN_OUTPUTS = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")

REDUCTIONS = ("mean", "sum", "none")

# The ignore_index by which no target is ignored (kIgnoreNothing in csrc/cpu/rows.h).
IGNORE_NOTHING = -(2**63)


class LogitOptions(NamedTuple):
    """Which targets are ignored, and z = softcap * tanh(x * logit_scale / softcap) / temperature (softcap 0: none)."""

    ignore_index: int = -100
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0


class Layout(NamedTuple):
    """Logits as n_seqs sequences of rows_per_seq rows; strides in elements."""

    n_seqs: int
    rows_per_seq: int
    vocab: int
    seq_stride: int
    row_stride: int
    vocab_stride: int


def logit_options(ignore_index: int, temperature: float, logit_scale: float, softcap: float | None) -> LogitOptions:
    """Checks the options that say how logits become z and which rows count."""
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, found {value}")
    return LogitOptions(operator.index(ignore_index), float(temperature), float(logit_scale), float(softcap or 0.0))


def check_reduction(reduction: str) -> None:
    """Checks the name of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, found {reduction!r}")


def check_token_outputs(outputs: Sequence[str]) -> None:
    """Checks the names of the statistics asked for."""
    for name in outputs:
        if name not in TOKEN_OUTPUTS:
            raise ValueError(f"outputs must be among {', '.join(map(repr, TOKEN_OUTPUTS))}, found {name!r}")


def check_shape(name: str, found: Sequence[int], expected: Sequence[int], reason: str) -> None:
    """Raises ValueError unless the shapes are equal; `reason` says where the expectation comes from."""
    if tuple(found) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} {reason}, found {tuple(found)}")


def is_integer_type(name: str) -> bool:
    """Whether a type's name is that of integers that fit int64."""
    return name.startswith(("int", "uint")) and name != "uint64"


def check_logits_shape(logits: Sequence[int], name: str = "logits") -> None:
    """Checks for [S, T, V] or [N, V]."""
    if len(logits) not in (2, 3):
        raise ValueError(f"{name} must have shape [S, T, V], or [N, V] when packed, found {tuple(logits)}")
    if logits[-1] < 1:
        raise ValueError(f"{name} must have at least one token in the vocabulary, found shape {tuple(logits)}")


def row_layout(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """The layout of logits [S, T, V] or [N, V]; packed rows are one sequence."""
    if len(shape) == 2:
        return Layout(1, shape[0], shape[1], 0, strides[0], strides[1])
    return Layout(shape[0], shape[1], shape[2], strides[0], strides[1], strides[2])


def overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a strided array may share memory (as in an expanded one)."""
    reach = 0
    for stride, size in sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def sequence_count(shape: Sequence[int], cu_seqlens: Sequence[int] | None, name: str = "logits") -> int:
    """The number of sequences of logits (or hidden states): the first dimension, or by cu_seqlens for packed rows."""
    last = "V" if name == "logits" else "H"
    if cu_seqlens is None:
        if len(shape) != 3:
            raise ValueError(
                f"packed {name} [N, {last}] need cu_seqlens [S + 1]; without it {name} must have shape [S, T, {last}], "
                f"found {tuple(shape)}"
            )
        return shape[0]
    if len(shape) == 3 and shape[0] != 1:
        raise ValueError(f"with cu_seqlens {name} must have shape [N, {last}] or [1, N, {last}], found {tuple(shape)}")
    if len(cu_seqlens) != 1 or cu_seqlens[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1], found {tuple(cu_seqlens)}")
    return cu_seqlens[0] - 1


def pair_count(n_seqs: int, pairs: Sequence[int] | None) -> int:
    """The number of pairs: those given, or half the sequences."""
    if pairs is None:
        if n_seqs % 2:
            raise ValueError(
                f"without pairs the first half of the sequences is chosen and the second half rejected: their number "
                f"must be even, found {n_seqs}"
            )
        count = n_seqs // 2
    else:
        if len(pairs) != 2 or pairs[1] != 2:
            raise ValueError(f"pairs must have shape [P, 2] (chosen, rejected), found {tuple(pairs)}")
        count = pairs[0]
    if count == 0:
        raise ValueError(f"there are no pairs (sequences: {n_seqs}): the loss of nothing is not defined")
    return count


@functools.lru_cache(maxsize=256)
def rows_head(
    logit_type: int, shape: tuple[int, ...], strides: tuple[int, ...], n_targets: int, options: LogitOptions
) -> tuple[int | float, ...]:
    """What the kernels' `rows` begins with; the addresses of logits, targets, row_mask and weights follow (make_rows in
    dpo_fast/_cpu.pyx)."""
    return (logit_type, *row_layout(shape, strides), n_targets, *options)

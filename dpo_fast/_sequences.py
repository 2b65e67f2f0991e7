"""From tokens to sequences and back, in plain torch: which rows count, by what factor, and their sums.

Tensors of the targets' size; for the paths that do not run through the fused CPU kernels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of log-probs, losses and statistics for logits of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def kept_rows(targets: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
    """Rows that count: the target is not ignore_index and the weight is not 0."""
    kept = targets != ignore_index
    return kept if weights is None else kept & (weights != 0)


def check_cu_seqlens(cu_seqlens: Tensor, n_rows: int) -> list[int]:
    """The bounds of packed sequences, on the host.

    Raises:
        ValueError: they do not rise from 0 to n_rows.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != n_rows or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {n_rows}, found {bounds}")
    return bounds


def check_pair_numbers(pairs: Tensor, n_seqs: int) -> list[list[int]]:
    """Chosen and rejected sequence of each pair, on the host.

    Raises:
        IndexError: a number outside [0, n_seqs).
    """
    numbers: list[list[int]] = pairs.tolist()
    for p, pair in enumerate(numbers):
        for k, s in enumerate(pair):
            if not 0 <= s < n_seqs:
                raise IndexError(f"pairs[{p}, {k}] = {s} is outside [0, {n_seqs})")
    return numbers


def sum_by_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums [S, T] over T, or packed values by sequence."""
    if cu_seqlens is None:
        return values.sum(-1)
    values = values.reshape(-1)
    check_cu_seqlens(cu_seqlens, values.shape[0])
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


def spread_to_rows(values: Tensor, cu_seqlens: Tensor | None, shape: torch.Size) -> Tensor:
    """One number per sequence -> one per row."""
    if cu_seqlens is None:
        return values.unsqueeze(-1).expand(shape)
    return torch.repeat_interleave(values, cu_seqlens.long().diff()).reshape(shape)


def token_factors(
    kept: Tensor, weights: Tensor | None, cu_seqlens: Tensor | None, average: bool, dtype: torch.dtype
) -> Tensor:
    """By what each row's log-prob is multiplied in its sequence's sum: w_n, over sum_n w_n for `average`, or 0."""
    if weights is None:
        factors = kept.to(dtype)
    else:
        factors = torch.where(kept, weights.to(dtype), torch.zeros((), dtype=dtype, device=kept.device))
    if not average:
        return factors
    total = sum_by_sequence(factors, cu_seqlens)
    inverse = torch.where(total == 0, torch.zeros_like(total), 1 / total)
    return factors * spread_to_rows(inverse, cu_seqlens, factors.shape)

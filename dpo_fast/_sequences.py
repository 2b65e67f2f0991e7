"""From tokens to sequences and back, in plain torch: which rows count, by what factor, and their sums.

Tensors of the targets' size; for the paths that do not run through the fused CPU kernels.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from dpo_fast._checks import pair_count
from dpo_fast._native import has_cuda_kernels


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of log-probs, losses and statistics for logits of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def kept_rows(targets: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
    """Rows that count: the target is not ignore_index and the weight is not 0."""
    kept = targets != ignore_index
    return kept if weights is None else kept & (weights != 0)


_HAS_CUDA_KERNELS = has_cuda_kernels()


def looks_at_values(tensor: Tensor) -> bool:
    """Whether values may be checked on the host here: not in a compiled graph, and not where the CUDA kernels run (they
    stay in bounds by themselves), unless DPO_FAST_CHECK=1 asks for it."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and _HAS_CUDA_KERNELS) or os.environ.get("DPO_FAST_CHECK") == "1"


def check_cu_seqlens(cu_seqlens: Tensor, n_rows: int) -> list[int]:
    """The bounds of packed sequences, on the host.

    Raises:
        ValueError: they do not rise from 0 to n_rows.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != n_rows or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {n_rows}, found {bounds}")
    return bounds


def check_pair_numbers(pairs: Tensor, n_seqs: int, absent: bool = False) -> list[list[int]]:
    """Chosen and rejected sequence of each pair, on the host; `absent`: -1 stands for a side that is not there.

    Raises:
        IndexError: a number outside [0, n_seqs).
    """
    numbers: list[list[int]] = pairs.tolist()
    for p, pair in enumerate(numbers):
        for k, s in enumerate(pair):
            if not (-1 if absent else 0) <= s < n_seqs:
                raise IndexError(f"pairs[{p}, {k}] = {s} is outside [0, {n_seqs})")
    return numbers


def sum_by_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums [S, T] over T, or packed values by sequence."""
    if cu_seqlens is None:
        return values.sum(-1)
    values = values.reshape(-1)
    if looks_at_values(cu_seqlens):
        check_cu_seqlens(cu_seqlens, values.shape[0])
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


def spread_to_rows(values: Tensor, cu_seqlens: Tensor | None, shape: torch.Size) -> Tensor:
    """One number per sequence -> one per row."""
    if cu_seqlens is None:
        return values.unsqueeze(-1).expand(shape)
    counts = cu_seqlens.long().diff()
    return torch.repeat_interleave(values, counts, output_size=shape.numel()).reshape(shape)


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


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, kept: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """exp(mean_n(logp_n - log sum_v p_v^2)) of each sequence (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2)."""
    total = sum_by_sequence((logps - log_sum_sq_probs).double(), cu_seqlens)
    return torch.exp(total / sum_by_sequence(kept.double(), cu_seqlens).clamp(min=1))


def _completion_positions(kept: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """1, 2, ... for the tokens of a sequence that count; the others repeat the number before them."""
    if cu_seqlens is None:
        return kept.cumsum(-1)
    numbers = kept.reshape(-1).cumsum(0)
    before = torch.cat([numbers.new_zeros(1), numbers])[cu_seqlens[:-1].long()]
    return (numbers - torch.repeat_interleave(before, cu_seqlens.long().diff(), output_size=numbers.shape[0])).reshape(
        kept.shape
    )


def ld_dpo_weights(
    targets: Tensor,
    ld_alpha: float,
    *,
    pairs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Token weights of length-desensitized DPO (LD-DPO, Liu et al. 2024, arXiv:2409.06411, eq. 9).

    The first tokens of a completion, as many as the shorter one of its pair has, weigh 1; those past them ld_alpha.

    Args:
        targets: [S, T], or packed [N] (or [1, N]) with cu_seqlens.
        ld_alpha: in [0, 1].
        pairs, cu_seqlens, ignore_index: as for `dpo_loss`.

    Returns:
        Like targets, float64.

    Raises:
        ValueError: ld_alpha outside [0, 1]; a sequence in several pairs whose shorter lengths differ.
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], found {ld_alpha}")
    if cu_seqlens is None and targets.dim() != 2:
        raise ValueError(f"targets must have shape [S, T], or [N] with cu_seqlens, found {tuple(targets.shape)}")
    if cu_seqlens is not None and looks_at_values(cu_seqlens):
        check_cu_seqlens(cu_seqlens, targets.numel())
    kept = targets != ignore_index
    positions = _completion_positions(kept, cu_seqlens)
    lengths = sum_by_sequence(kept.double(), cu_seqlens).long()
    if pairs is None:
        pair_count(lengths.shape[0], None)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    else:
        if looks_at_values(pairs):  # otherwise the operator that follows does
            pair_count(lengths.shape[0], pairs.shape)
            check_pair_numbers(pairs, lengths.shape[0])
        numbers = pairs.long()
        shorter = lengths[numbers].amin(-1, keepdim=True).expand(-1, 2).reshape(-1)
        index = numbers.reshape(-1)
        # a sequence in no pair keeps its own length
        shared = lengths.scatter_reduce(0, index, shorter, "amin", include_self=False)
        largest = lengths.scatter_reduce(0, index, shorter, "amax", include_self=False)
        if looks_at_values(pairs) and not torch.equal(shared, largest):
            raise ValueError(
                "ld_alpha: a sequence is in several pairs whose shorter completions have different lengths, so that "
                "its log-prob is not one number; write such pairs out as sequences of their own"
            )
    tail = positions > spread_to_rows(shared, cu_seqlens, positions.shape)
    return torch.ones(targets.shape, dtype=torch.float64, device=targets.device).masked_fill(tail, ld_alpha)

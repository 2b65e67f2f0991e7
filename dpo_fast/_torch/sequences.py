"""From tokens to sequences and pairs and back, in plain torch: which rows count, by which factor, and their sums.

Tensors of the targets' size, for the paths that do not run through the fused kernels.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from dpo_fast._checks import IGNORE_NOTHING, LogitOptions
from dpo_fast._native import has_cuda_kernels
from dpo_fast._torch.operators import Rows


def vocab_size(width: int, options: LogitOptions) -> int:
    """The columns that count."""
    return options.valid_vocab or width


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of log-probs, losses and statistics for logits of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def accurate_type(device: torch.device) -> torch.dtype:
    """The type of sums and derivatives beside the logits: float64, but where a device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def count_sequences(targets: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences of checked rows."""
    return targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def count_targets(targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """The tokens of each sequence that are not ignored, whatever their weight, as the losses read lengths."""
    kept = (targets != ignore_index).to(accurate_type(targets.device))
    return sum_by_sequence(kept, cu_seqlens)


def live_sequences(n_seqs: int, pairs: Tensor | None, pair_weights: Tensor | None) -> Tensor | None:
    """Which sequences are in a pair of a weight other than 0, [S] bool; None: all are."""
    if pairs is None:
        if pair_weights is None:
            return None
        live = (pair_weights != 0).repeat(2)
        return torch.nn.functional.pad(live, (0, n_seqs - live.shape[0]))
    numbers = pairs.long() if pair_weights is None else torch.where((pair_weights != 0).unsqueeze(-1), pairs.long(), -1)
    # one place more, for absent sides
    counts = torch.zeros(n_seqs + 1, dtype=torch.bool, device=pairs.device)
    return counts.index_fill(0, torch.where(numbers < 0, n_seqs, numbers).reshape(-1), True)[:n_seqs]


def live_rows(
    targets: Tensor, kept: Tensor, cu_seqlens: Tensor | None, pairs: Tensor | None, pair_weights: Tensor | None
) -> Tensor:
    """Which of the rows that count are of a sequence that takes part."""
    live = live_sequences(count_sequences(targets, cu_seqlens), pairs, pair_weights)
    return kept if live is None else kept & spread_to_rows(live, cu_seqlens, targets.shape)


def kept_rows(targets: Tensor, ignore_index: int, weights: Tensor | None) -> Tensor:
    """Rows that count: the target is not ignore_index and the weight is not 0."""
    kept = targets != ignore_index if ignore_index != IGNORE_NOTHING else torch.ones_like(targets, dtype=torch.bool)
    return kept if weights is None else kept & (weights != 0)


_HAS_CUDA_KERNELS = has_cuda_kernels()


def looks_at_values(tensor: Tensor) -> bool:
    """Whether values may be checked on the host here: not in a compiled graph, and not where the CUDA kernels run (they
    stay in bounds by themselves), unless DPO_FAST_CHECK=1 asks for it."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and _HAS_CUDA_KERNELS) or os.environ.get("DPO_FAST_CHECK") == "1"


def counted_rows(logits: Tensor, rows: Rows) -> Tensor:
    """Which rows of logits count, [S, T] or [N]: no target of theirs is ignored, and neither mask nor weight is 0."""
    kept = kept_rows(rows.targets.long(), rows.options.ignore_index, None)  # narrow types would wrap ignore_index
    kept = kept.all(-1) if rows.targets.dim() == logits.dim() else kept
    for mask in (rows.row_mask, rows.token_weights):
        kept = kept if mask is None else kept & (mask != 0)
    return kept


def refuse_bad_targets(targets: Tensor, kept: Tensor, vocab: int) -> None:
    """Raises IndexError for a target outside [0, vocab) of a row that counts; looks at values."""
    bad = kept & ((targets < 0) | (targets >= vocab))
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target {targets[tuple(place)].item()} at position {place} is outside [0, {vocab}) and is not ignore_index"
        )


def refuse_bad_rows(logits: Tensor, rows: Rows) -> None:
    """The same for checked rows of logits."""
    kept = counted_rows(logits, rows)
    kept = kept.unsqueeze(-1) if rows.targets.dim() == logits.dim() else kept
    refuse_bad_targets(rows.targets, kept, vocab_size(logits.shape[-1], rows.options))


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
    """Chosen and rejected sequence of each pair, on the host; `absent`: -1 is a side that is not there.

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


def sum_in_order(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The same, token after token: tokens that add 0 may be left out without changing a bit."""
    if cu_seqlens is None:
        cu_seqlens = torch.arange(values.shape[0] + 1, device=values.device) * values.shape[-1]
        return torch.segment_reduce(values.reshape(-1), "sum", offsets=cu_seqlens, initial=0)
    return sum_by_sequence(values, cu_seqlens)


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
    accurate = accurate_type(logps.device)
    total = sum_by_sequence((logps - log_sum_sq_probs).to(accurate), cu_seqlens)
    return torch.exp(total / sum_by_sequence(kept.to(accurate), cu_seqlens).clamp(min=1))

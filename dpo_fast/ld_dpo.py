"""Token weights of length-desensitized DPO."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast._checks import integer, number, pair_count
from dpo_fast._torch.checks import check_device, check_integers, plain_tensors
from dpo_fast._torch.sequences import (
    accurate_type,
    check_cu_seqlens,
    check_pair_numbers,
    count_targets,
    looks_at_values,
    spread_to_rows,
)


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
    ld_alpha = number("ld_alpha", ld_alpha)
    ignore_index = integer("ignore_index", ignore_index)
    targets, pairs, cu_seqlens = plain_tensors(("targets", "pairs", "cu_seqlens"), (targets, pairs, cu_seqlens))
    for name, tensor in (("pairs", pairs), ("cu_seqlens", cu_seqlens)):
        if tensor is not None:
            check_integers(name, tensor)
            check_device(name, tensor, targets, "targets")
    if cu_seqlens is None and targets.dim() != 2:
        raise ValueError(f"targets must have shape [S, T], or [N] with cu_seqlens, found {tuple(targets.shape)}")
    if cu_seqlens is not None and looks_at_values(cu_seqlens):
        check_cu_seqlens(cu_seqlens, targets.numel())
    kept = targets != ignore_index
    positions = _completion_positions(kept, cu_seqlens)
    lengths = count_targets(targets, cu_seqlens, ignore_index).long()
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
                "ld_alpha: a sequence is in several pairs whose shorter completions have different lengths: "
                "its log-prob is not one number; write such pairs out as sequences of their own"
            )
    tail = positions > spread_to_rows(shared, cu_seqlens, positions.shape)
    return torch.ones(targets.shape, dtype=accurate_type(targets.device), device=targets.device).masked_fill(
        tail, ld_alpha
    )

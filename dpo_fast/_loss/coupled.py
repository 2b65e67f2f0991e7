"""Losses that are not sums over pairs: alignment via optimal transport, which sorts the batch, and the user's own.

Plain torch over the [S] log-probs of the sequences; autograd gives their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast._loss.options import LossFunction


def sides(values: Tensor, n_pairs: int, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected sequences' values, [P] each."""
    if pairs is None:
        return values[:n_pairs], values[n_pairs : 2 * n_pairs]
    numbers = pairs.long()  # a uint8 tensor as index would be a mask
    return values[numbers[:, 0]], values[numbers[:, 1]]


def _smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    loss = -(1 - label_smoothing) * F.logsigmoid(x)
    return loss - label_smoothing * F.logsigmoid(-x) if label_smoothing else loss


def aot(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """The policy's margins against the reference's, both sorted (AOT, Melnyk et al. 2024, arXiv:2406.05882)."""
    margins = torch.sort(chosen - rejected, stable=True).values
    ref_margins = torch.sort(ref_chosen - ref_rejected, stable=True).values
    return _smoothed_logistic(beta * (margins - ref_margins), label_smoothing)


def aot_unpaired(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """The chosen ratios against the rejected ones, both sorted (the same, unpaired)."""
    chosen_ratios = torch.sort(chosen - ref_chosen, stable=True).values
    rejected_ratios = torch.sort(rejected - ref_rejected, stable=True).values
    return _smoothed_logistic(beta * (chosen_ratios - rejected_ratios), label_smoothing)


_FUNCTIONS = {"aot": aot, "aot_unpaired": aot_unpaired}


def coupled_losses(
    terms: Sequence[tuple[str | LossFunction, float]],
    logps: Tensor,
    ref_logps: Tensor | None,
    n_pairs: int,
    pairs: Tensor | None,
    beta: float,
    label_smoothing: float,
    pair_weights: Tensor | None,
) -> Tensor:
    """The weighted sum of the terms times pair_weights, [P] in float64; the terms see zeros for a pair of weight 0.

    Raises:
        ValueError: a user's function returns another shape.
    """
    wide = logps.double()
    ref = torch.zeros_like(wide) if ref_logps is None else ref_logps.double()
    if any(callable(term) for term, _ in terms):  # which may work in place
        wide, ref = wide.clone(), ref.clone()
    each = [*sides(wide, n_pairs, pairs), *sides(ref, n_pairs, pairs)]
    if pair_weights is not None:
        each = [torch.where(pair_weights == 0, torch.zeros_like(side), side) for side in each]
    chosen, rejected, ref_chosen, ref_rejected = each
    total = torch.zeros_like(chosen)
    for term, weight in terms:
        if isinstance(term, str):
            losses = _FUNCTIONS[term](chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing)
        else:
            losses = term(chosen, rejected, ref_chosen, ref_rejected)
            if not isinstance(losses, Tensor) or losses.shape != (n_pairs,) or not losses.is_floating_point():
                found = (tuple(losses.shape), losses.dtype) if isinstance(losses, Tensor) else type(losses)
                raise ValueError(f"a loss function must return one number per pair, [{n_pairs}], found {found}")
        total = total + weight * losses
    if pair_weights is None:
        return total
    return torch.where(pair_weights == 0, torch.zeros_like(total), total * pair_weights)

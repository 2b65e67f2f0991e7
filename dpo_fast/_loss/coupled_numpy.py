"""The losses of coupled.py for NumPy arrays, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_fast._loss.options import LossFunction

Array = NDArray[Any]


def _smoothed_logistic(x: Array, label_smoothing: float) -> tuple[Array, Array]:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x) and its derivative."""
    e = label_smoothing
    loss = (1 - e) * np.logaddexp(0, -x)
    slope = -(1 - e) * np.exp(-np.logaddexp(0, x))
    if e:
        loss += e * np.logaddexp(0, x)
        slope += e * np.exp(-np.logaddexp(0, -x))
    return loss, slope


def _sorted_margins(name: str, chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array) -> Any:
    """The margins between two sorted lists, and the places of their chosen and rejected log-probs."""
    if name == "aot":
        order = other = np.argsort(chosen - rejected, kind="stable")
        return (chosen - rejected)[order] - np.sort(ref_chosen - ref_rejected), order, other
    order = np.argsort(chosen - ref_chosen, kind="stable")
    other = np.argsort(rejected - ref_rejected, kind="stable")
    return (chosen - ref_chosen)[order] - (rejected - ref_rejected)[other], order, other


def _term(
    term: str | LossFunction, values: Sequence[Array], beta: float, label_smoothing: float, cotangent: Array
) -> tuple[Array, Array | None, Array | None]:
    """[P] losses, and the gradient of sum(cotangent * losses) by the chosen and the rejected log-probs."""
    if isinstance(term, str):
        margins, order, other = _sorted_margins(term, *values)
        losses, slope = _smoothed_logistic(beta * margins, label_smoothing)
        d_chosen, d_rejected = np.zeros_like(losses), np.zeros_like(losses)
        d_chosen[order] = beta * slope * cotangent
        d_rejected[other] = -beta * slope * cotangent
        return losses, d_chosen, d_rejected
    found = term(*values)
    losses, *derivatives = (np.asarray(a) for a in (found if isinstance(found, tuple) else (found,)))
    if len(derivatives) not in (0, 2) or any(np.shape(a) != cotangent.shape for a in (losses, *derivatives)):
        raise ValueError(
            f"a loss function must return [{len(cotangent)}] losses, or (losses, derivatives by the chosen log-probs, "
            f"derivatives by the rejected), found {[np.shape(a) for a in (losses, *derivatives)]}"
        )
    if not derivatives:
        return losses, None, None
    return losses, cotangent * derivatives[0], cotangent * derivatives[1]


def coupled_losses(
    terms: Sequence[tuple[str | LossFunction, float]],
    logps: Array,
    ref_logps: Array | None,
    pairs: Array,
    beta: float,
    label_smoothing: float,
    cotangent: Array,
) -> tuple[Array, Array | None]:
    """The weighted sum of the terms, [P], and the gradient of sum(cotangent * it) by logps [S], both in float64.

    The gradient is None when a user's function gives no derivatives. pairs: [P, 2]. A pair whose cotangent is 0 takes
    no part: the terms see zeros in its place.
    """
    wide = logps.astype(np.float64)
    ref = np.zeros_like(wide) if ref_logps is None else ref_logps
    values = [np.where(cotangent == 0, 0, side[pairs[:, k]]) for side in (wide, ref) for k in (0, 1)]
    total, grad = np.zeros(len(pairs)), np.zeros(len(wide))
    complete = True
    for term, weight in terms:
        losses, *derivatives = _term(term, values, beta, label_smoothing, cotangent)
        total += weight * losses
        for k, derivative in enumerate(derivatives):
            if derivative is None:
                complete = False
            else:
                np.add.at(grad, pairs[:, k], np.where(cotangent == 0, 0, weight * derivative))
    return total, grad if complete else None

"""The preference losses of dpo_fast.reference, from sequence log-probs.

Written for real and complex arrays alike: their derivatives are taken by the complex step (Squire & Trapp, 1998, "Using
complex variables to estimate derivatives of real functions"), f'(x) = Im f(x + ih) / h, exact to rounding for tiny h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_fast.outputs import DPOOutput

Float64 = NDArray[np.float64]


def softplus(x: Any) -> Any:
    """log(1 + exp(x))."""
    positive = np.real(x) > 0
    small = np.exp(np.where(positive, -x, x))
    return np.where(positive, x, 0) + np.log1p(small)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    positive = np.real(x) > 0
    small = np.exp(np.where(positive, -x, x))
    return np.where(positive, 1, small) / (1 + small)


def xlogy(x: Any, log_y: Any) -> Any:
    """x * log_y, 0 where x is 0."""
    return np.where(x == 0, 0, x * np.where(x == 0, 0, log_y))


def log1mexp(x: Any) -> Any:
    """log(1 - exp(x)) for x <= 0."""
    return np.log(-np.expm1(x))


def divergence_score(ratio: Any, f_divergence: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5) -> Any:
    """f'(t) for t = exp(ratio) (Wang et al. 2023, arXiv:2309.16240), exponents cut off at 80."""
    if f_divergence == "js_divergence":
        return np.log(2) - softplus(-ratio)
    a = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(f_divergence, f_alpha_divergence_coef)
    if abs(a - 1) < 1e-6:
        return ratio
    x = (a - 1) * ratio
    return np.expm1(np.where(np.real(x) > 80, 80, x)) / (a - 1)


class PairSide:
    """One side of all pairs: log-probs, log-ratios, scores and lengths, [P] each."""

    def __init__(self, logps: Any, ratios: Any, lengths: Any, divergence: dict[str, Any]) -> None:
        self.logps, self.ratios, self.lengths = logps, ratios, lengths
        self.scores = divergence_score(ratios, **divergence)
        self.average_scores = self.scores / np.maximum(lengths, 1)


def score_margin(c: PairSide, d: PairSide, beta: Any, o: dict[str, Any]) -> Any:
    """beta times the difference of the scores, with the terms of DPO-Positive (Pal et al. 2024, arXiv:2402.13228),
    R-DPO (Park et al. 2024, arXiv:2403.19159) and ODPO (Amini et al. 2024, arXiv:2402.10571)."""
    shortfall = np.where(np.real(c.ratios) < 0, -c.ratios, 0)  # max(0, log pi_ref - log pi) of the chosen completion
    x = beta * (c.scores - d.scores - o.get("dpop_lambda", 0.0) * shortfall)
    return x + o.get("length_penalty", 0.0) * (c.lengths - d.lengths) - np.asarray(o.get("margin", 0.0), np.float64)


def pair_losses(name: str, c: PairSide, d: PairSide, beta: Any, e: float, o: dict[str, Any]) -> Any:
    """[P] losses of one type; c chosen, d rejected, e label smoothing. See docs/losses.md for the sources."""
    x = score_margin(c, d, beta, o)
    match name:
        case "sigmoid":
            return (1 - e) * softplus(-x) + (e * softplus(x) if e else 0)
        case "hinge":
            return np.where(np.real(x) < 1, 1 - x, 0)
        case "ipo":
            return (c.average_scores - d.average_scores - 1 / (2 * beta)) ** 2
        case "exo_pair":
            return xlogy(sigmoid(x), -softplus(-x) - np.log1p(-e)) + xlogy(sigmoid(-x), -softplus(x) - np.log(e))
        case "nca_pair":
            return softplus(-beta * c.ratios) + (softplus(beta * c.ratios) + softplus(beta * d.ratios)) / 2
        case "robust":
            return ((1 - e) * softplus(-x) - (e * softplus(x) if e else 0)) / (1 - 2 * e)
        case "bco_pair":
            return softplus(-beta * c.ratios) + softplus(beta * d.ratios)
        case "sppo_hard":
            return (c.ratios - 0.5 / beta) ** 2 + (d.ratios + 0.5 / beta) ** 2
        case "apo_zero":
            return sigmoid(-beta * c.ratios) + sigmoid(beta * d.ratios)
        case "apo_down":
            return sigmoid(beta * c.ratios) + sigmoid(-beta * (c.ratios - d.ratios))
        case "discopop":
            tau = o.get("discopop_tau", 0.05)
            # m exp(-x) with m = sigmoid(x / tau), as one exponential
            return xlogy(sigmoid(-x / tau), softplus(-x)) + np.exp(-x - softplus(-x / tau))
        case "sigmoid_norm":
            return softplus(-beta * (c.average_scores - d.average_scores))
        case "sft":
            # the mean over the chosen tokens of the batch, once pairs are averaged
            n_pairs = o.get("num_pairs", len(c.lengths))
            tokens = o.get("num_chosen_tokens", c.lengths.sum())
            sums = c.logps * (c.lengths if o["average"] else 1)
            return -sums * n_pairs / tokens if tokens else 0 * sums
        case "simpo":
            y = beta * (c.logps - d.logps) - o.get("simpo_gamma", 0.5)
            return (1 - e) * softplus(-y) + (e * softplus(y) if e else 0)
        case "cpo":
            y = beta * (c.logps - d.logps)
            return (1 - e) * softplus(-y) + (e * softplus(y) if e else 0) - c.logps
        case "orpo":
            x, y = (np.where(np.real(side) > -1e-12, -1e-12, side) for side in (c.logps, d.logps))
            return beta * softplus(-(x - y - (log1mexp(x) - log1mexp(y)))) - c.logps
        case "aot":
            margins = sort_by_real(c.logps - d.logps) - np.sort((c.logps - c.ratios - d.logps + d.ratios).real)
            return (1 - e) * softplus(-beta * margins) + e * softplus(beta * margins)
        case "aot_unpaired":
            margins = sort_by_real(c.ratios) - sort_by_real(d.ratios)
            return (1 - e) * softplus(-beta * margins) + e * softplus(beta * margins)
    raise ValueError(f"no loss {name!r}")


def sort_by_real(x: Any) -> Any:
    """Ascending, ties in their order."""
    return x[np.argsort(np.real(x), kind="stable")]


def single_losses(name: str, ratios: Any, desirable: Any, beta: Any, baseline: float, o: dict[str, Any]) -> Any:
    """[S] losses of completions that are alone."""
    sign = np.where(desirable, 1.0, -1.0)
    if name == "bco":
        return softplus(-sign * (beta * ratios - baseline))
    weights = np.where(desirable, o.get("desirable_weight", 1.0), o.get("undesirable_weight", 1.0))
    return weights * sigmoid(-sign * beta * (ratios - baseline))


def pair_index(n_seqs: int, pairs: ArrayLike | None) -> NDArray[np.int64]:
    """[P, 2]: chosen and rejected sequence of each pair; by default first and second half."""
    if pairs is None:
        return np.arange(n_seqs).reshape(2, -1).T
    return np.asarray(pairs, np.int64)


def preference_losses(
    logps: Any,
    ref_logps: ArrayLike | None = None,
    *,
    beta: ArrayLike = 0.1,
    loss_type: Any = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    pair_weights: ArrayLike | None = None,
    desirable: ArrayLike | None = None,
    baseline: float = 0.0,
    lengths: ArrayLike | None = None,
    wpo_weights: ArrayLike | None = None,
    average: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    **o: Any,
) -> Any:
    """[P] losses of real or complex logps [S]; the options of `dpo_fast.preference_loss`, and wpo_weights [P].

    beta and margin are [] or [P]. A pair of weight 0 counts as none: its loss is 0, also where it would be NaN.
    """
    beta = np.asarray(beta, np.float64)
    ratios = logps - (0 if ref_logps is None else np.asarray(ref_logps, np.float64))
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if names[0] in ("kto", "bco"):
        n = len(logps)
        good = np.arange(n) < n // 2 if desirable is None else np.asarray(desirable, bool)
        losses = single_losses(names[0], ratios, good, beta, float(baseline), o)
        return weighted(losses, pair_weights)
    tokens = np.zeros(len(logps)) if lengths is None else np.asarray(lengths, np.float64)
    divergence = {"f_divergence": f_divergence, "f_alpha_divergence_coef": f_alpha_divergence_coef}
    chosen, rejected = (PairSide(logps[k], ratios[k], tokens[k], divergence) for k in pair_index(len(logps), pairs).T)
    total: Any = 0
    for name, weight in zip(names, loss_weights or [1] * len(names), strict=True):
        total = total + weight * pair_losses(name, chosen, rejected, beta, label_smoothing, {**o, "average": average})
    return weighted(total if wpo_weights is None else total * wpo_weights, pair_weights)


def weighted(losses: Any, pair_weights: ArrayLike | None) -> Any:
    """losses * pair_weights, 0 where the weight is 0."""
    if pair_weights is None:
        return losses
    w = np.asarray(pair_weights, np.float64)
    return np.where(w == 0, 0, losses * w)


def _reduced(losses: Any, reduction: str, num_pairs: float | None) -> Any:
    return {"mean": losses.sum() / (num_pairs or max(len(losses), 1)), "sum": losses.sum(), "none": losses}[reduction]


def preference_loss(
    logps: ArrayLike, ref_logps: ArrayLike | None = None, *, reduction: str = "mean", **options: Any
) -> DPOOutput:
    """DPO (Rafailov et al. 2023, eq. 7), softplus(-beta r), r = lr_chosen - lr_rejected, lr = logps - ref_logps, and
    the rest of its family; see docs/losses.md. Rewards are beta lr, 0 for both sides of a pair of weight 0."""
    logps = np.asarray(logps, np.float64)
    ratios = logps if ref_logps is None else logps - np.asarray(ref_logps, np.float64)
    losses = preference_losses(logps, ref_logps, **options)
    beta = np.asarray(options.get("beta", 0.1), np.float64)
    pairs, weights = (None if options.get(k) is None else np.asarray(options[k]) for k in ("pairs", "pair_weights"))
    unpaired = options.get("loss_type") in ("kto", "bco")
    if unpaired:
        n = len(logps)
        desirable = options.get("desirable")
        good = np.arange(n) < n // 2 if desirable is None else np.asarray(desirable, bool)
        chosen, rejected = (np.where(side, beta * ratios, np.nan) for side in (good, ~good))
        numbers = np.arange(n)
        pairs = np.stack([np.where(good, numbers, -1), np.where(good, -1, numbers)], -1)
    else:
        chosen, rejected = (beta * ratios[k] for k in pair_index(len(logps), pairs).T)
    if weights is not None:
        chosen, rejected = (np.where(weights == 0, 0, rewards) for rewards in (chosen, rejected))
    loss = _reduced(losses, reduction, options.get("num_pairs"))
    arrays: Any = (loss, losses, chosen, rejected, logps, pairs, unpaired, None, None, weights)
    return DPOOutput(*arrays)


def preference_loss_grad(
    logps: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    reduction: str = "mean",
    grad_losses: ArrayLike | None = None,
    **options: Any,
) -> Float64:
    """dloss/dlogps [S]; for reduction "none" of sum(grad_losses * losses), by default of their sum."""
    logps = np.asarray(logps, np.float64)
    g = 1.0 if grad_losses is None else np.asarray(grad_losses, np.float64)
    grad = np.zeros(len(logps))
    h = 1e-200
    with np.errstate(over="ignore", invalid="ignore"):
        for s in range(len(logps)):
            moved = logps.astype(np.complex128)
            moved[s] += 1j * h
            losses = g * preference_losses(moved, ref_logps, **options)
            total = _reduced(losses, "sum" if reduction == "none" else reduction, options.get("num_pairs"))
            grad[s] = np.imag(total) / h
    return grad

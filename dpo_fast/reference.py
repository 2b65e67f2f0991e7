"""Slow, obvious float64 versions of everything, in plain NumPy: what the kernels are judged by.

Nothing here is fused, blocked or rearranged. Each function takes what its namesake takes and converts it to float64.
`*_grad` functions take the gradients that come in from above and return the gradient of the first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_fast.outputs import DPOOutput, TokenOutput

Float64 = NDArray[np.float64]


def transform(
    logits: ArrayLike, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Float64:
    """z = softcap * tanh(x * logit_scale / softcap) / temperature; without softcap x * logit_scale / temperature."""
    z = np.asarray(logits, dtype=np.float64) * logit_scale
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    return z / temperature


def transform_grad(
    logits: ArrayLike, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Float64:
    """dz/dx of `transform`."""
    x = np.asarray(logits, dtype=np.float64)
    slope = np.full_like(x, logit_scale / temperature)
    if softcap is not None:
        slope *= 1 - np.tanh(x * logit_scale / softcap) ** 2
    return slope


def log_softmax(z: Float64) -> Float64:
    """log p_v = z_v - log sum_v exp(z_v), over the last axis."""
    with np.errstate(invalid="ignore", over="ignore"):
        shifted: Float64 = z - z.max(axis=-1, keepdims=True)
        log_sum: Float64 = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - log_sum


def kept_rows(
    targets: ArrayLike, ignore_index: int = -100, token_weights: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Rows that count: the target is not ignore_index and the weight is not 0."""
    kept: NDArray[np.bool_] = np.asarray(targets) != ignore_index
    if token_weights is not None:
        kept &= np.asarray(token_weights) != 0
    return kept


def entropy_terms(logp: Float64) -> Float64:
    """p log p, 0 where p is 0."""
    p = np.exp(logp)
    return p * np.where(p == 0, 0, logp)


def selective_log_softmax(
    logits: ArrayLike, index: ArrayLike, temperature: float = 1.0, row_mask: ArrayLike | None = None
) -> Float64:
    """log_softmax(logits / temperature) gathered at index (...) or (..., K); 0 where row_mask is 0."""
    logp = log_softmax(transform(logits, temperature))
    index = np.asarray(index)
    if index.ndim == logp.ndim:
        out = np.take_along_axis(logp, index, axis=-1)
    else:
        out = np.take_along_axis(logp, index[..., None], axis=-1)[..., 0]
    return out if row_mask is None else np.where(np.asarray(row_mask) == 0, 0, out)


def token_logps(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    token_weights: ArrayLike | None = None,
) -> TokenOutput:
    """Every statistic of each token; see `dpo_fast.outputs.TokenOutput`. Columns from valid_vocab on do not exist."""
    targets = np.asarray(targets)
    kept = kept_rows(targets, ignore_index, token_weights)
    x = np.asarray(logits)[kept][:, :valid_vocab]
    z = transform(x, temperature, logit_scale, softcap)
    logp = log_softmax(z)
    rows, y = np.arange(len(z)), targets[kept]

    def scatter(values: Any, dtype: Any = np.float64) -> Any:
        out = np.zeros(targets.shape, dtype)
        out[kept] = values
        return out

    return TokenOutput(
        logps=scatter(logp[rows, y]),
        entropy=scatter(-entropy_terms(logp).sum(-1)),
        mean_logits=scatter(z.mean(-1)),
        # no answer where there is no distribution
        is_top1=scatter((x.astype(np.float64).argmax(-1) == y) & ~np.isnan(logp[:, 0]), np.bool_),
        log_sum_sq_probs=scatter(np.log(np.exp(2 * logp).sum(-1))),
        lse=scatter((z - logp)[rows, logp.argmax(-1)]),
    )


def token_logps_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    grad_logps: ArrayLike,
    grad_entropy: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    token_weights: ArrayLike | None = None,
) -> Float64:
    """d/dx of sum(grad_logps * logps) + sum(grad_entropy * entropy) + sum(grad_lse * lse).

    dlogp_y/dz_v = 1[v = y] - p_v, dH/dz_v = -p_v (log p_v + H), dlse/dz_v = p_v. A row whose gradients are all 0 takes
    no part: its gradient is 0, whatever its logits are.
    """
    targets = np.asarray(targets)
    kept = kept_rows(targets, ignore_index, token_weights)
    incoming = [np.asarray(g, np.float64) for g in (grad_logps, grad_entropy, grad_lse) if g is not None]
    kept &= np.any([g != 0 for g in incoming], axis=0)
    x = np.asarray(logits)[kept][:, :valid_vocab]
    logp = log_softmax(transform(x, temperature, logit_scale, softcap))
    p = np.exp(logp)
    one_hot = np.arange(p.shape[-1]) == targets[kept][:, None]
    dz = np.asarray(grad_logps, np.float64)[kept][:, None] * (one_hot - p)
    if grad_entropy is not None:
        entropy = -entropy_terms(logp).sum(-1, keepdims=True)
        dz -= np.asarray(grad_entropy, np.float64)[kept][:, None] * (entropy_terms(logp) + p * entropy)
    if grad_lse is not None:
        dz += np.asarray(grad_lse, np.float64)[kept][:, None] * p
    out = np.zeros(np.shape(logits))
    out[kept, : p.shape[-1]] = dz * transform_grad(x, temperature, logit_scale, softcap)
    return out


def sequence_bounds(targets: ArrayLike, cu_seqlens: ArrayLike | None) -> list[Any]:
    """For each sequence the index of its tokens."""
    targets = np.asarray(targets)
    if cu_seqlens is None:
        return [(s, slice(None)) for s in range(targets.shape[0])]
    cu = np.asarray(cu_seqlens).tolist()
    lead = () if targets.ndim == 1 else (0,)
    return [(*lead, slice(start, end)) for start, end in pairwise(cu)]


def token_factors(
    targets: ArrayLike,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Float64:
    """By what each token's log-prob is multiplied in its sequence's sum: w_n, over sum_n w_n for `average`, or 0."""
    kept = kept_rows(targets, ignore_index, token_weights)
    w = np.where(kept, 1.0 if token_weights is None else np.asarray(token_weights, np.float64), 0)
    if average:
        for index in sequence_bounds(targets, cu_seqlens):
            total = w[index].sum()
            w[index] = w[index] / total if total != 0 else 0
    return w


def sequence_logps(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    average: bool = False,
    ignore_index: int = -100,
    **transform_options: Any,
) -> Float64:
    """logp[s] = sum over the tokens of s of w_n logp[n], over sum_n w_n for `average`."""
    factors = token_factors(targets, cu_seqlens, token_weights, average, ignore_index)
    logps = token_logps(
        logits, targets, ignore_index=ignore_index, token_weights=token_weights, **transform_options
    ).logps
    return np.array([(factors[i] * logps[i]).sum() for i in sequence_bounds(targets, cu_seqlens)], np.float64)


def sequence_logps_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    grad_logps: ArrayLike,
    *,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    average: bool = False,
    ignore_index: int = -100,
    **transform_options: Any,
) -> Float64:
    """d/dx of sum(grad_logps * sequence_logps)."""
    factors = token_factors(targets, cu_seqlens, token_weights, average, ignore_index)
    for g, index in zip(np.asarray(grad_logps, np.float64), sequence_bounds(targets, cu_seqlens), strict=True):
        factors[index] = factors[index] * g if g != 0 else 0
    return token_logps_grad(
        logits, targets, factors, ignore_index=ignore_index, token_weights=token_weights, **transform_options
    )


# --- losses -----------------------------------------------------------------------------------------------------------
#
# Written for real and complex arrays alike: their derivatives are taken by the complex step (Squire & Trapp, 1998,
# "Using complex variables to estimate derivatives of real functions"), f'(x) = Im f(x + ih) / h, exact to rounding for
# tiny h.


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
    """beta times the difference of the scores, with the terms of DPO-Positive (Pal et al. 2024, arXiv:2402.13228, eq.
    3), R-DPO (Park et al. 2024, arXiv:2403.19159, eq. 9) and ODPO (Amini et al. 2024, arXiv:2402.10571, eq. 5)."""
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
    average: bool = False,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    **o: Any,
) -> Any:
    """[P] losses of real or complex logps [S]; the options of `dpo_fast.preference_loss`; beta and margin [] or [P]."""
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
    total = 0
    for name, weight in zip(names, loss_weights or [1] * len(names), strict=True):
        total = total + weight * pair_losses(name, chosen, rejected, beta, label_smoothing, {**o, "average": average})
    return weighted(total, pair_weights)


def weighted(losses: Any, pair_weights: ArrayLike | None) -> Any:
    """losses * pair_weights; a pair of weight 0 counts as none, also where its loss is NaN."""
    if pair_weights is None:
        return losses
    w = np.asarray(pair_weights, np.float64)
    return np.where(w == 0, 0, losses * np.where(w == 0, 0, w))


def _reduced(losses: Any, reduction: str, num_pairs: float | None) -> Any:
    return {"mean": losses.sum() / (num_pairs or max(len(losses), 1)), "sum": losses.sum(), "none": losses}[reduction]


def preference_loss(
    logps: ArrayLike, ref_logps: ArrayLike | None = None, *, reduction: str = "mean", **options: Any
) -> DPOOutput:
    """DPO (Rafailov et al. 2023, eq. 7), softplus(-beta r), r = lr_chosen - lr_rejected, lr = logps - ref_logps, and
    the rest of its family; see docs/losses.md."""
    logps = np.asarray(logps, np.float64)
    ratios = logps if ref_logps is None else logps - np.asarray(ref_logps, np.float64)
    losses = preference_losses(logps, ref_logps, **options)
    beta, pairs, weights = np.asarray(options.get("beta", 0.1)), options.get("pairs"), options.get("pair_weights")
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
    if weights is not None:  # a pair of weight 0 has no rewards, but NaN marks an absent side
        off = np.asarray(weights) == 0
        chosen, rejected = (
            np.where(off & (pair_index(len(logps), pairs)[:, k] >= 0), 0, side)
            for k, side in enumerate((chosen, rejected))
        )
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


LOSS_OPTIONS = (
    *("beta", "loss_type", "loss_weights", "label_smoothing", "pairs", "pair_weights", "desirable", "baseline"),
    *("reduction", "f_divergence", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma"),
    *("desirable_weight", "undesirable_weight", "num_pairs", "num_chosen_tokens"),
    *("dpop_lambda", "length_penalty", "margin"),
)


def ld_dpo_weights(
    targets: ArrayLike,
    ld_alpha: float,
    *,
    pairs: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    ignore_index: int = -100,
) -> Float64:
    """1 for as many tokens as the shorter completion of a pair has, ld_alpha past them (arXiv:2409.06411, eq. 9)."""
    targets = np.asarray(targets)
    weights = np.ones(targets.shape)
    bounds = sequence_bounds(targets, cu_seqlens)
    kept = [targets[index] != ignore_index for index in bounds]
    for pair in pair_index(len(bounds), pairs):
        shared = min(kept[s].sum() for s in pair)
        for s in pair:
            weights[bounds[s]] = np.where(np.cumsum(kept[s]) > shared, ld_alpha, 1)
    return weights


def _split(
    logits: ArrayLike, targets: ArrayLike, ref_logits: ArrayLike | None, ref_logps: ArrayLike | None, options: Any
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Options of the log-probs, options of the loss, and the reference's log-probs."""
    options = dict(options)
    loss = {k: options.pop(k) for k in LOSS_OPTIONS if k in options}
    loss["average"] = options.setdefault("average", loss.get("loss_type") in ("simpo", "orpo"))
    ld_alpha, wpo = options.pop("ld_alpha", None), options.pop("wpo", False)
    options.pop("z_loss_weight", None)  # of the logits, beside the pairs: see z_loss
    layout = {k: options[k] for k in ("cu_seqlens", "ignore_index") if k in options}
    if ld_alpha is not None:
        weights = ld_dpo_weights(targets, ld_alpha, pairs=loss.get("pairs"), **layout)
        given = options.get("token_weights")
        options["token_weights"] = weights if given is None else weights * np.asarray(given)
    bounds = sequence_bounds(targets, options.get("cu_seqlens"))
    ignore = options.get("ignore_index", -100)
    loss["lengths"] = [(np.asarray(targets)[index] != ignore).sum() for index in bounds]
    if wpo:  # WPO, arXiv:2406.11827, eq. 2
        tokens = token_logps(
            logits, targets, **{k: v for k, v in options.items() if k not in ("average", "cu_seqlens")}
        )
        kept = kept_rows(targets, ignore, options.get("token_weights"))
        aligned = tokens.logps - tokens.log_sum_sq_probs
        weights = np.array([np.exp(aligned[i][kept[i]].sum() / max(kept[i].sum(), 1)) for i in bounds])
        pair_weights = weights[pair_index(len(bounds), loss.get("pairs"))].prod(-1)
        given = loss.get("pair_weights")
        loss["pair_weights"] = weighted(pair_weights, given)
    if ref_logits is not None:
        ref_logps = sequence_logps(ref_logits, targets, **options)
    return options, loss, ref_logps


def dpo_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: ArrayLike | None = None,
    **options: Any,
) -> DPOOutput:
    """`preference_loss` of `sequence_logps`; takes the options of both, and ld_alpha, wpo and z_loss_weight."""
    z_loss_weight = options.get("z_loss_weight", 0.0)
    options, loss, ref_logps = _split(logits, targets, ref_logits, ref_logps, options)
    out = preference_loss(sequence_logps(logits, targets, **options), ref_logps, **loss)
    return out._replace(loss=out.loss + z_loss(logits, targets, z_loss_weight, options, loss)[0])


def dpo_loss_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: ArrayLike | None = None,
    grad_losses: ArrayLike | None = None,
    **options: Any,
) -> Float64:
    """dloss/dlogits of `dpo_loss`."""
    z_loss_weight = options.get("z_loss_weight", 0.0)
    options, loss, ref_logps = _split(logits, targets, ref_logits, ref_logps, options)
    grad = preference_loss_grad(sequence_logps(logits, targets, **options), ref_logps, grad_losses=grad_losses, **loss)
    grad_lse = z_loss(logits, targets, z_loss_weight, options, loss)[1]
    tokens = {k: v for k, v in options.items() if k not in ("average", "cu_seqlens")}
    from_lse = token_logps_grad(logits, targets, np.zeros(np.shape(targets)), None, grad_lse, **tokens)
    return sequence_logps_grad(logits, targets, grad, **options) + from_lse


def z_loss(
    logits: ArrayLike, targets: ArrayLike, weight: float, options: dict[str, Any], loss: dict[str, Any]
) -> tuple[Any, Float64]:
    """weight times the mean of lse^2 over the tokens that count, of sequences that take part, and its gradient by lse.

    As though it were added to each pair's loss: P times that for a sum, P / num_pairs times for shares of a batch.
    """
    lse = token_logps(logits, targets, **{k: v for k, v in options.items() if k not in ("average", "cu_seqlens")}).lse
    if not weight:
        return 0.0, np.zeros(lse.shape)
    bounds = sequence_bounds(targets, options.get("cu_seqlens"))
    pairs = pair_index(len(bounds), loss.get("pairs"))
    weights = np.ones(len(pairs)) if loss.get("pair_weights") is None else np.asarray(loss["pair_weights"])
    live = np.zeros(np.shape(targets), bool)
    for s in set(pairs[weights != 0].reshape(-1).tolist()):
        live[bounds[s]] = True
    live &= kept_rows(targets, options.get("ignore_index", -100), options.get("token_weights"))
    times = {"mean": len(pairs) / loss.get("num_pairs", len(pairs)), "sum": len(pairs)}[loss.get("reduction", "mean")]
    scale = weight * times / max(live.sum(), 1)
    lse = np.where(live, lse, 0)
    return scale * (lse**2).sum(), 2 * scale * lse


__all__: Sequence[str] = (
    "dpo_loss",
    "dpo_loss_grad",
    "ld_dpo_weights",
    "preference_loss",
    "preference_loss_grad",
    "selective_log_softmax",
    "sequence_logps",
    "sequence_logps_grad",
    "token_logps",
    "token_logps_grad",
)

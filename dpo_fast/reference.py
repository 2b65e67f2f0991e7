"""Slow, obvious float64 versions of everything, in plain NumPy: what the kernels are judged by.

Nothing here is fused, blocked or rearranged. Each function takes what its namesake takes and converts it to float64.
`*_grad` functions take the gradients that come in from above and return the gradient of the first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_fast._reference_losses import pair_index, preference_loss, preference_loss_grad
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


def log_sum_exp(z: Float64) -> Float64:
    """log sum_v exp(z_v), over the last axis; -inf where all of it is -inf."""
    largest: Float64 = z.max(axis=-1, keepdims=True)
    shift: Float64 = np.where(largest == -np.inf, 0, largest)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        log_sum: Float64 = np.log(np.exp(z - shift).sum(axis=-1))
    return shift[..., 0] + log_sum


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
    """Every statistic of each token; see `dpo_fast.outputs.TokenOutput`. Columns from valid_vocab on are not read."""
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
        lse=scatter(log_sum_exp(z)),
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

    dlogp_y/dz_v = 1[v = y] - p_v, dH/dz_v = -p_v (log p_v + H), dlse/dz_v = p_v. A row whose
    incoming gradients are all 0 is not read: its gradient is 0, whatever its logits are. So is that of the columns from
    valid_vocab on.
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


class _Problem(NamedTuple):
    """The arguments of dpo_loss, by which of its parts reads them."""

    tokens: dict[str, Any]  # options of the tokens' log-probs
    sequences: dict[str, Any]  # how they add up
    loss: dict[str, Any]  # options of the loss
    ref_logps: Any
    all_tokens: dict[str, Any]  # tokens, without the weights of ld_alpha
    z_loss_weight: float


def _split(
    logits: ArrayLike, targets: ArrayLike, ref_logits: ArrayLike | None, ref_logps: ArrayLike | None, options: Any
) -> _Problem:
    tokens = dict(options)
    loss = {k: tokens.pop(k) for k in LOSS_OPTIONS if k in tokens}
    z_loss_weight, ld_alpha, wpo = (tokens.pop(k, None) for k in ("z_loss_weight", "ld_alpha", "wpo"))
    cu_seqlens, ignore = tokens.pop("cu_seqlens", None), tokens.get("ignore_index", -100)
    loss["average"] = tokens.pop("average", loss.get("loss_type") in ("simpo", "orpo"))
    sequences = {"cu_seqlens": cu_seqlens, "average": loss["average"]}
    all_tokens = dict(tokens)  # for WPO and the z-loss, which look at them also where ld_alpha is 0
    if ld_alpha is not None:
        layout = {"cu_seqlens": cu_seqlens, "ignore_index": ignore}
        weights = ld_dpo_weights(targets, ld_alpha, pairs=loss.get("pairs"), **layout)
        given = tokens.get("token_weights")
        tokens["token_weights"] = weights if given is None else weights * np.asarray(given)
    bounds = sequence_bounds(targets, cu_seqlens)
    loss["lengths"] = [(np.asarray(targets)[index] != ignore).sum() for index in bounds]
    if wpo:  # WPO, arXiv:2406.11827, eq. 2
        found = token_logps(logits, targets, **all_tokens)
        kept = kept_rows(targets, ignore, all_tokens.get("token_weights"))
        aligned = found.logps - found.log_sum_sq_probs
        weights = np.array([np.exp(aligned[i][kept[i]].sum() / max(kept[i].sum(), 1)) for i in bounds])
        loss["wpo_weights"] = weights[pair_index(len(bounds), loss.get("pairs"))].prod(-1)
    if ref_logits is not None:
        ref_logps = sequence_logps(ref_logits, targets, **sequences, **tokens)
    return _Problem(tokens, sequences, loss, ref_logps, all_tokens, z_loss_weight or 0.0)


def dpo_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: ArrayLike | None = None,
    **options: Any,
) -> DPOOutput:
    """`preference_loss` of `sequence_logps`; takes the options of both, and ld_alpha, wpo and z_loss_weight."""
    a = _split(logits, targets, ref_logits, ref_logps, options)
    out = preference_loss(sequence_logps(logits, targets, **a.sequences, **a.tokens), a.ref_logps, **a.loss)
    return out._replace(loss=out.loss + _z_loss(logits, targets, a)[0]) if a.z_loss_weight else out


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
    a = _split(logits, targets, ref_logits, ref_logps, options)
    logps = sequence_logps(logits, targets, **a.sequences, **a.tokens)
    grad_logps = preference_loss_grad(logps, a.ref_logps, grad_losses=grad_losses, **a.loss)
    grad = sequence_logps_grad(logits, targets, grad_logps, **a.sequences, **a.tokens)
    if a.z_loss_weight:
        nothing = np.zeros(np.shape(targets))
        grad += token_logps_grad(logits, targets, nothing, grad_lse=_z_loss(logits, targets, a)[1], **a.all_tokens)
    return grad


def _z_loss(logits: ArrayLike, targets: ArrayLike, a: _Problem) -> tuple[Any, Float64]:
    """z_loss_weight * mean of lse^2, and its gradient by lse in the shape of targets.

    The mean is over the tokens that count, of the sequences in a pair of weight != 0. It is reduced as though it were
    added to each pair's loss: P times that for "sum", P / num_pairs times with num_pairs.
    """
    bounds = sequence_bounds(targets, a.sequences["cu_seqlens"])
    alone = a.loss.get("loss_type") in ("kto", "bco")
    pairs = np.arange(len(bounds))[:, None] if alone else pair_index(len(bounds), a.loss.get("pairs"))
    weights, n_pairs = a.loss.get("pair_weights"), len(pairs)
    reduction, num_pairs = a.loss.get("reduction", "mean"), a.loss.get("num_pairs") or max(n_pairs, 1)
    if reduction == "none":
        raise ValueError("z_loss_weight is for reductions 'mean' and 'sum': the z-loss is not one of pairs")
    reads = np.zeros(np.shape(targets), np.bool_)
    for p in range(n_pairs):
        if weights is None or np.asarray(weights)[p] != 0:
            for s in pairs[p]:
                reads[bounds[s]] = True
    reads &= kept_rows(targets, a.all_tokens.get("ignore_index", -100), a.all_tokens.get("token_weights"))
    lse = np.where(reads, token_logps(logits, targets, **a.all_tokens).lse, 0)
    scale = a.z_loss_weight / max(reads.sum(), 1) * (n_pairs if reduction == "sum" else n_pairs / num_pairs)
    return scale * (lse**2).sum(), scale * 2 * lse


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

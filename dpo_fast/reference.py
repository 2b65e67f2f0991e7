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
    token_weights: ArrayLike | None = None,
) -> TokenOutput:
    """Every statistic of each token; see `dpo_fast.outputs.TokenOutput`."""
    targets = np.asarray(targets)
    kept = kept_rows(targets, ignore_index, token_weights)
    x = np.asarray(logits)[kept]
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
    )


def token_logps_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    grad_logps: ArrayLike,
    grad_entropy: ArrayLike | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weights: ArrayLike | None = None,
) -> Float64:
    """d/dx of sum(grad_logps * logps) + sum(grad_entropy * entropy).

    dlogp_y/dz_v = 1[v = y] - p_v and dH/dz_v = -p_v (log p_v + H).
    """
    targets = np.asarray(targets)
    kept = kept_rows(targets, ignore_index, token_weights)
    x = np.asarray(logits)[kept]
    logp = log_softmax(transform(x, temperature, logit_scale, softcap))
    p = np.exp(logp)
    one_hot = np.arange(p.shape[-1]) == targets[kept][:, None]
    dz = np.asarray(grad_logps, np.float64)[kept][:, None] * (one_hot - p)
    if grad_entropy is not None:
        entropy = -entropy_terms(logp).sum(-1, keepdims=True)
        dz -= np.asarray(grad_entropy, np.float64)[kept][:, None] * (entropy_terms(logp) + p * entropy)
    out = np.zeros(np.shape(logits))
    out[kept] = dz * transform_grad(x, temperature, logit_scale, softcap)
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
        factors[index] *= g
    return token_logps_grad(
        logits, targets, factors, ignore_index=ignore_index, token_weights=token_weights, **transform_options
    )


def softplus(x: Float64) -> Float64:
    """log(1 + exp(x))."""
    return np.logaddexp(0, x)


def sigmoid(x: Float64) -> Float64:
    """1 / (1 + exp(-x))."""
    return np.exp(-softplus(-x))


def pair_index(n_seqs: int, pairs: ArrayLike | None) -> NDArray[np.int64]:
    """[P, 2]: chosen and rejected sequence of each pair; by default first and second half."""
    if pairs is None:
        return np.arange(n_seqs).reshape(2, -1).T
    return np.asarray(pairs, np.int64)


def preference_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    reduction: str = "mean",
) -> DPOOutput:
    """DPO (Rafailov et al. 2023, eq. 7): softplus(-beta r), r = lr_chosen - lr_rejected, lr = logps - ref_logps.

    With label smoothing e, conservative DPO: (1 - e) softplus(-beta r) + e softplus(beta r).
    """
    assert loss_type == "sigmoid"
    logps = np.asarray(logps, np.float64)
    ratios = logps if ref_logps is None else logps - np.asarray(ref_logps, np.float64)
    chosen, rejected = ratios[pair_index(len(logps), pairs)].T
    x = beta * (chosen - rejected)
    losses = (
        softplus(-x) if label_smoothing == 0 else (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)
    )
    loss = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    return DPOOutput(loss, losses, beta * chosen, beta * rejected, logps, pairs)


def preference_loss_grad(
    logps: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    reduction: str = "mean",
    grad_losses: ArrayLike | None = None,
) -> Float64:
    """dloss/dlogps [S]; for reduction "none" of sum(grad_losses * losses), by default of their sum."""
    out = preference_loss(logps, ref_logps, beta=beta, loss_type=loss_type, pairs=pairs)
    x = out.chosen_rewards - out.rejected_rewards
    slope = -(1 - label_smoothing) * sigmoid(-x) + label_smoothing * sigmoid(x)
    dr = beta * slope * (1 if grad_losses is None else np.asarray(grad_losses, np.float64))
    if reduction == "mean":
        dr = dr / len(x)
    grad = np.zeros(len(out.logps))
    index = pair_index(len(grad), pairs)
    np.add.at(grad, index[:, 0], dr)
    np.add.at(grad, index[:, 1], -dr)
    return grad


LOSS_OPTIONS = ("beta", "loss_type", "label_smoothing", "pairs", "reduction")


def dpo_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: ArrayLike | None = None,
    **options: Any,
) -> DPOOutput:
    """`preference_loss` of `sequence_logps`; takes the options of both."""
    loss = {k: options.pop(k) for k in LOSS_OPTIONS if k in options}
    if ref_logits is not None:
        ref_logps = sequence_logps(ref_logits, targets, **options)
    return preference_loss(sequence_logps(logits, targets, **options), ref_logps, **loss)


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
    loss = {k: options.pop(k) for k in LOSS_OPTIONS if k in options}
    if ref_logits is not None:
        ref_logps = sequence_logps(ref_logits, targets, **options)
    grad = preference_loss_grad(sequence_logps(logits, targets, **options), ref_logps, grad_losses=grad_losses, **loss)
    return sequence_logps_grad(logits, targets, grad, **options)


__all__: Sequence[str] = (
    "dpo_loss",
    "dpo_loss_grad",
    "preference_loss",
    "preference_loss_grad",
    "selective_log_softmax",
    "sequence_logps",
    "sequence_logps_grad",
    "token_logps",
    "token_logps_grad",
)

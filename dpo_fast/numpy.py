"""The same functions for NumPy arrays: values and, on request, gradients. Does not import torch.

Arrays of logits are float32, float64, float16 or `ml_dtypes.bfloat16`, with any strides. Log-probs and losses come out
in float32 (float64 for float64 logits), gradients in the logits' type. Gradients are asked for by giving the gradients
that come in (`grad_logps`, `grad_entropy`, `grad_lse`), or with `with_grad=True` where there is a loss; the result is
then the pair (output, gradient). Threads: see `dpo_fast.get_num_threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike

from dpo_fast import _checks, _cpu
from dpo_fast._checks import (
    IGNORE_NOTHING,
    TOKEN_OUTPUTS,
    LogitKeywords,
    LogitOptions,
    check_shape,
    integer,
    number,
    only_logit_keywords,
    refuse_unknown,
    split_logit_keywords,
    truth,
    wanted_statistics,
)
from dpo_fast._loss.options import (
    TINY_WEIGHT,
    Given,
    Loss,
    LossKeywords,
    LossType,
    PairNumbers,
    choose_loss,
    split_pair_numbers,
)
from dpo_fast._native import get_num_threads, set_num_threads
from dpo_fast._numpy_rows import LOGIT_TYPES, Array, Bounds, PairLosses, Rows, address, floats, floats_or_none, integers
from dpo_fast.outputs import DPOOutput, TokenOutput

__all__ = [
    "DPOOutput",
    "TokenOutput",
    "dpo_loss",
    "get_num_threads",
    "ld_dpo_weights",
    "preference_loss",
    "selective_log_softmax",
    "sequence_logps",
    "set_num_threads",
    "token_logps",
]


class DPOKeywords(LossKeywords, LogitKeywords, total=False):
    """Options of a loss and of the logits; see `LossKeywords` and `LogitKeywords`."""


def token_logps(
    logits: Array,
    targets: ArrayLike,
    *,
    outputs: Sequence[str] = ("logps",),
    grad_logps: ArrayLike | None = None,
    grad_entropy: ArrayLike | None = None,
    grad_lse: ArrayLike | None = None,
    inplace_backward: bool = False,
    **options: Unpack[LogitKeywords],
) -> Any:
    """As `dpo_fast.token_logps`, for arrays.

    Args:
        logits, targets, outputs, options: as there.
        grad_logps, grad_entropy, grad_lse: in the targets' shape; gradients coming in. With any of them the result is
            (TokenOutput, gradient of the sum of each times its output, with respect to logits).
        inplace_backward: write that gradient over the logits.
    """
    wanted_statistics(outputs)
    inplace = truth("inplace_backward", inplace_backward)
    rows = Rows(logits, targets, only_logit_keywords("token_logps", options))
    shape = rows.logits.shape[:-1]
    check_shape("targets", rows.targets.shape, shape, f"to fit logits of shape {rows.logits.shape}")
    grads = {
        name: floats_or_none(f"grad_{name}", values, rows.wide, shape, "as targets have")
        for name, values in (("logps", grad_logps), ("entropy", grad_entropy), ("lse", grad_lse))
    }
    saved = rows.saved()
    made, addresses = rows.statistics({*outputs} | ({"entropy"} if grad_entropy is not None else set()))
    _cpu.token_forward(rows.kernel(), get_num_threads(), address(saved[0]), address(saved[1]), addresses)
    out = TokenOutput(
        saved[0] if "logps" in outputs else None, *[made.get(k) if k in outputs else None for k in TOKEN_OUTPUTS[1:]]
    )
    if all(grad is None for grad in grads.values()):
        return out
    entropy = made.get("entropy") if grad_entropy is not None else None
    incoming: dict[str, Any] = {"token_logps": grads["logps"], "entropy": grads["entropy"], "lse": grads["lse"]}
    return out, rows.backward(inplace, saved, saved_entropy=entropy, **incoming)


def selective_log_softmax(
    logits: Array,
    index: ArrayLike,
    temperature: float = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    dtype: Any = None,
    grad_logps: ArrayLike | None = None,
) -> Any:
    """As `dpo_fast.selective_log_softmax`, for arrays: logits (..., V), index (...) or (..., K).

    The result has the logits' type, or `dtype`, one of the types of logits. With grad_logps, in the index's shape, it
    is (log-probs, gradient with respect to logits).
    """
    options = LogitOptions(IGNORE_NOTHING, number("temperature", temperature))
    logits = np.asanyarray(logits)
    own = logits.dtype if dtype is None else _float_type(dtype)
    index = integers("index", index)
    if logits.ndim < 1 or index.ndim not in (logits.ndim - 1, logits.ndim):
        raise ValueError(
            f"index must have shape (...) or (..., K) to fit logits of shape {logits.shape}, found {index.shape}"
        )
    n_index = () if index.ndim == logits.ndim - 1 else index.shape[-1:]
    check_shape("index", index.shape, (*logits.shape[:-1], *n_index), "to fit the logits")
    mask = None if row_mask is None else np.asarray(row_mask) != 0
    rows_kept = None
    if mask is not None:
        check_shape("row_mask", mask.shape, index.shape, "as index has")
        index = np.where(mask, index, 0)
        rows_kept = np.ascontiguousarray(mask.any(-1) if n_index else mask).reshape(-1)
    flat = logits if logits.ndim in (2, 3) else logits.reshape(-1, logits.shape[-1])
    rows = Rows(flat, index.reshape(*flat.shape[:-1], *n_index), options, row_mask=rows_kept)
    saved = rows.saved()
    _cpu.token_forward(rows.kernel(), get_num_threads(), address(saved[0]), address(saved[1]), None)
    logps = saved[0].reshape(index.shape)
    if mask is not None:
        logps = np.where(mask, logps, logps.dtype.type(0))
    logps = logps.astype(own)
    if grad_logps is None:
        return logps
    grad = floats("grad_logps", grad_logps, rows.wide)
    check_shape("grad_logps", grad.shape, index.shape, "as index has")
    if mask is not None:
        grad = np.where(mask, grad, grad.dtype.type(0))
    return logps, rows.backward(False, saved, token_logps=grad).reshape(logits.shape)


def _float_type(dtype: Any) -> np.dtype[Any]:
    """A type that log-probs can be given in."""
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        found = np.dtype(np.bool_)
    if found.name not in LOGIT_TYPES:
        raise TypeError(f"dtype must be a floating-point type, one of {', '.join(LOGIT_TYPES)}, found {dtype!r}")
    return found


def _sequence_forward(rows: Rows, bounds: Bounds, double_sums: bool = False) -> tuple[Array, tuple[Array, Array]]:
    saved = rows.saved()
    out = np.empty(bounds.n_seqs, np.float64 if double_sums else rows.wide)
    addresses = (address(saved[0]), address(saved[1]), address(out))
    _cpu.sequence_forward(rows.kernel(), bounds.kernel, get_num_threads(), *addresses, double_sums)
    return out, saved


def sequence_logps(
    logits: Array,
    targets: ArrayLike,
    *,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    average: bool = False,
    grad_logps: ArrayLike | None = None,
    inplace_backward: bool = False,
    **options: Unpack[LogitKeywords],
) -> Any:
    """As `dpo_fast.sequence_logps`, for arrays.

    With grad_logps [S] the result is (log-probs, gradient of sum(grad_logps * log-probs) with respect to logits);
    inplace_backward writes it over the logits.
    """
    inplace = truth("inplace_backward", inplace_backward)
    rows = Rows(logits, targets, only_logit_keywords("sequence_logps", options), token_weights=token_weights)
    bounds = Bounds(rows, cu_seqlens, truth("average", average))
    out, saved = _sequence_forward(rows, bounds)
    if grad_logps is None:
        return out
    grad = floats("grad_logps", grad_logps, rows.wide)
    check_shape("grad_logps", grad.shape, (bounds.n_seqs,), "with one number per sequence")
    return out, rows.backward(inplace, saved, seqs=bounds.kernel, seq_logps=grad)


def ld_dpo_weights(
    targets: ArrayLike,
    ld_alpha: float,
    *,
    pairs: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    ignore_index: int = -100,
) -> Array:
    """As `dpo_fast.ld_dpo_weights`, for arrays."""
    ld_alpha, ignore_index = number("ld_alpha", ld_alpha), integer("ignore_index", ignore_index)
    kept = integers("targets", targets) != ignore_index
    rows = kept.reshape(-1)
    if cu_seqlens is None:
        if kept.ndim != 2:
            raise ValueError(f"targets must have shape [S, T], or [N] with cu_seqlens, found {kept.shape}")
        bounds = np.arange(kept.shape[0] + 1) * kept.shape[-1]
    else:
        bounds = integers("cu_seqlens", cu_seqlens)
        if bounds.ndim != 1 or not len(bounds) or bounds[0] or bounds[-1] != rows.size or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {rows.size}, found {bounds.tolist()}")
    before = np.concatenate([[0], rows.cumsum()])
    lengths = before[bounds[1:]] - before[bounds[:-1]]
    if pairs is None:
        numbers = np.arange(2 * _checks.pair_count(len(lengths), None)).reshape(2, -1).T
    else:
        numbers = integers("pairs", pairs)
        _checks.pair_count(len(lengths), numbers.shape)
        if numbers.min() < 0 or numbers.max() >= len(lengths):
            raise IndexError(f"pairs must be in [0, {len(lengths)}), found {numbers.min()} to {numbers.max()}")
    shared = np.full(len(lengths), -1)
    for pair in numbers:
        shorter = lengths[pair].min()
        if ((shared[pair] != -1) & (shared[pair] != shorter)).any():
            raise ValueError(
                "ld_alpha: a sequence is in several pairs whose shorter completions have different lengths: "
                "its log-prob is not one number; write such pairs out as sequences of their own"
            )
        shared[pair] = shorter
    shared = np.where(shared == -1, lengths, shared)
    limits = np.repeat(before[bounds[:-1]] + shared, np.diff(bounds))
    return np.where(before[1:] > limits, ld_alpha, 1.0).reshape(kept.shape)


def _choose(
    options: dict[str, Any],
    beta: Any,
    pair_weights: Any,
    *,
    reference: Any,
    baseline: Any,
    token_weights: Any,
    **names: Any,
) -> tuple[Loss, PairNumbers]:
    """A checked loss, and its numbers of pairs; beta: one number, or an array."""
    beta_of_pairs = None
    if isinstance(beta, (np.ndarray, list, tuple)):
        beta_of_pairs, beta = beta, 1.0
    numbers = split_pair_numbers(options, pair_weights, beta_of_pairs)
    given = Given.of(reference, baseline, token_weights, numbers)
    return choose_loss(beta=beta, given=given, **names, **options), numbers


def _visible_weights(loss: Loss, rows: Rows, bounds: Bounds, weights: Array, given: Array | float) -> Array:
    """LD-DPO's weights of 0 as tiny ones, because WPO and the z-loss look at all tokens."""
    visible = np.maximum(weights, TINY_WEIGHT) * given
    if loss.options.average:  # over nothing but tiny weights it would be one of these tokens, and no longer 0
        visible = visible * bounds.by_token(bounds.some(weights * given), visible.shape)
    return np.asarray(visible)


def dpo_loss(
    logits: Array,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: Array | None = None,
    beta: float | ArrayLike = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    pair_weights: ArrayLike | None = None,
    desirable: ArrayLike | None = None,
    baseline: float | None = None,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    average: bool | None = None,
    reduction: str = "mean",
    with_grad: bool = False,
    inplace_backward: bool = False,
    **options: Unpack[DPOKeywords],
) -> Any:
    """As `dpo_fast.dpo_loss`, for arrays; without `outputs` (see `token_logps`).

    With with_grad the result is (DPOOutput, gradient of the loss with respect to logits), for reduction "none" that of
    the losses' sum; inplace_backward writes it over the logits. A function as loss_type then has to return (losses,
    derivatives by the chosen log-probs, derivatives by the rejected), [P] each.
    """
    refuse_unknown("dpo_loss", options.keys() - DPOKeywords.__annotations__.keys(), DPOKeywords.__annotations__)
    logit_options, keywords = split_logit_keywords(options), dict(**options)
    wpo, with_grad, inplace = (
        truth("wpo", wpo),
        truth("with_grad", with_grad),
        truth("inplace_backward", inplace_backward),
    )
    loss, numbers = _choose(
        keywords, beta, pair_weights, reference=ref_logps if ref_logits is None else ref_logits, baseline=baseline,
        token_weights=token_weights if ld_alpha is None else ld_alpha, loss_type=loss_type,
        label_smoothing=label_smoothing, average=average, reduction=reduction, wpo=wpo,
    )  # fmt: skip
    rows = Rows(logits, targets, logit_options, token_weights=token_weights)
    bounds = Bounds(rows, cu_seqlens, loss.options.average)
    if ld_alpha is not None:
        loss.check_completions(ld_alpha=True)
        ignore_index = logit_options.ignore_index
        weights = ld_dpo_weights(targets, ld_alpha, pairs=pairs, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
        given: Array | float = 1.0 if rows.weights is None else rows.weights
        token_weights = weights * given
        if ld_alpha == 0 and (wpo or loss.z_loss_weight):
            token_weights = _visible_weights(loss, rows, bounds, weights, given)
        rows = Rows(logits, targets, logit_options, token_weights=token_weights)
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_logits exclude each other: give one of them")
        ref_rows = Rows(ref_logits, targets, logit_options, token_weights=token_weights, name="ref_logits")
        # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
        ref_logps = _sequence_forward(ref_rows, Bounds(ref_rows, cu_seqlens, loss.options.average), double_sums=True)[0]
    out = PairLosses(loss, numbers, bounds.n_seqs, ref_logps, pairs, desirable, baseline, rows.wide, reduction)
    saved = rows.saved()
    logps = rows.new((bounds.n_seqs,))
    wanted = ({"log_sum_sq_probs"} if wpo else set()) | ({"lse"} if loss.z_loss_weight else set())
    made, addresses = rows.statistics(wanted)
    _cpu.dpo_forward(
        rows.kernel(),
        bounds.kernel,
        out.kernel,
        loss.options,
        get_num_threads(),
        wpo,
        address(out.ref_logps),
        out.ref_double,
        address(saved[0]),
        address(saved[1]),
        addresses,
        address(logps),
        out.losses_kernel(),
    )
    coupled = out.add_coupled(logps)
    grad_lse = out.add_z_loss(made["lse"], rows.kept, bounds) if loss.z_loss_weight else None
    if not with_grad:
        return out.output(logps)
    grad = rows.backward(
        inplace,
        saved,
        seqs=bounds.kernel,
        pairs=out.kernel,
        pair_grads=out.pair_grads,
        loss=out.grad_loss,
        lse=grad_lse,
        seq_logps=out.coupled_gradient(coupled),
    )
    return out.output(logps), grad


def preference_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    beta: float | ArrayLike = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    pair_weights: ArrayLike | None = None,
    desirable: ArrayLike | None = None,
    baseline: float | None = None,
    lengths: ArrayLike | None = None,
    average: bool | None = None,
    reduction: str = "mean",
    with_grad: bool = False,
    **options: Unpack[LossKeywords],
) -> Any:
    """As `dpo_fast.preference_loss`, for arrays: logps [S], float32 or float64 (half types are converted to float32).

    With with_grad the result is (DPOOutput, gradient of the loss with respect to logps), for reduction "none" that of
    the losses' sum; a function as loss_type then has to return derivatives too, see `dpo_loss`.
    """
    given = np.asarray(logps)
    if given.dtype.kind in "iucbSUOMm":
        raise TypeError(f"logps must be floating-point numbers, found {given.dtype}")
    if given.ndim != 1:
        raise ValueError(f"logps must have shape [S], found {given.shape}")
    loss, numbers = _choose(
        dict(**options), beta, pair_weights, reference=ref_logps, baseline=baseline, token_weights=None,
        loss_type=loss_type, label_smoothing=label_smoothing, average=average, reduction=reduction,
    )  # fmt: skip
    loss.check_lengths(lengths is not None)
    if loss.z_loss_weight:
        raise ValueError("z_loss_weight needs the logits: there is no log-sum-exp in sequence log-probs")
    wide = np.dtype(np.float64 if given.dtype.itemsize >= 8 else np.float32)
    values = np.asarray(given, wide, order="C")
    n_seqs, is_wide = values.shape[0], bool(wide == np.float64)
    tokens = floats_or_none("lengths", lengths, np.float64, (n_seqs,), "with one number per sequence")
    out = PairLosses(loss, numbers, n_seqs, ref_logps, pairs, desirable, baseline, wide, reduction)
    reference = (address(out.ref_logps), out.ref_double)
    results = out.losses_kernel()
    _cpu.preference_forward(
        out.kernel, loss.options, is_wide, False, n_seqs, address(values), *reference, address(tokens), results
    )
    coupled = out.add_coupled(values)
    if not truth("with_grad", with_grad):
        return out.output(values)
    grad = np.empty(n_seqs, wide)
    incoming = (address(out.pair_grads), address(out.grad_loss), None)
    _cpu.preference_backward(out.kernel, is_wide, n_seqs, *incoming, address(grad))
    extra = out.coupled_gradient(coupled)
    return out.output(values), grad if extra is None else grad + extra

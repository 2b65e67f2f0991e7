"""The same functions for NumPy arrays: values and, on request, gradients. Does not import torch.

Arrays of logits are float32, float64, float16 or `ml_dtypes.bfloat16`, with any strides. Log-probs and losses come out
in float32 (float64 for float64 logits), gradients in the logits' type. Gradients are asked for by giving the gradients
that come in (`grad_logps`, `grad_entropy`), or with `with_grad=True` where there is a loss; the result is then the pair
(output, gradient). Threads: see `dpo_fast.get_num_threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_fast import _checks, _cpu
from dpo_fast._checks import (
    IGNORE_NOTHING,
    TOKEN_OUTPUTS,
    LogitOptions,
    check_logits_shape,
    check_shape,
    check_token_outputs,
    logit_options,
)
from dpo_fast._coupled_numpy import coupled_losses
from dpo_fast._loss_options import TINY_WEIGHT, Loss, LossKeywords, LossType, choose_loss
from dpo_fast._native import get_num_threads, set_num_threads
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

_LOGIT_TYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}

Array = NDArray[Any]


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.__array_interface__["data"][0])


def _strides(array: Array) -> tuple[int, ...]:
    """In elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def _some(values: Array, cu_seqlens: ArrayLike | None) -> Array:
    """Whether a sequence has anything but zeros, [S]."""
    if cu_seqlens is None:
        some: Array = np.any(values != 0, axis=-1)
    else:
        before = np.concatenate([[0], np.cumsum(values.reshape(-1) != 0)])
        some = np.diff(before[np.asarray(cu_seqlens)]) > 0
    return some


def _by_token(values: Array, cu_seqlens: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """One value per sequence -> one per token."""
    if cu_seqlens is None:
        return np.broadcast_to(values[:, None], shape)
    return np.repeat(values, np.diff(np.asarray(cu_seqlens))).reshape(shape)


def _integers(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values)
    if not array.size:  # an empty list has no type of its own
        array = array.astype(np.int64)
    if not _checks.is_integer_type(array.dtype.name):
        raise TypeError(f"{name} must be integers, found {array.dtype}")
    return np.asarray(array, np.int64, order="C")


def _floats(name: str, values: ArrayLike, dtype: Any) -> Array:
    array = np.asarray(values)
    if array.dtype.kind in "cSUOMm" or array.dtype.names:
        raise TypeError(f"{name} must be real numbers, found {array.dtype}")
    return np.asarray(array, dtype, order="C")


def _floats_or_none(
    name: str, values: ArrayLike | None, dtype: Any, shape: tuple[int, ...], reason: str
) -> Array | None:
    if values is None:
        return None
    array = _floats(name, values, dtype)
    check_shape(name, array.shape, shape, reason)
    return array


class _Rows:
    """Checked logits and targets of one call, with the addresses that the kernels take."""

    def __init__(
        self,
        logits: Array,
        targets: ArrayLike,
        options: LogitOptions,
        *,
        row_mask: Array | None = None,
        token_weights: ArrayLike | None = None,
        name: str = "logits",
    ) -> None:
        self.logits = logits = np.asanyarray(logits)
        if logits.dtype.name not in _LOGIT_TYPES:
            raise TypeError(f"{name} must be one of {', '.join(_LOGIT_TYPES)}, found {logits.dtype}")
        check_logits_shape(logits.shape, name)
        if any(stride % logits.itemsize for stride in logits.strides):
            raise ValueError(f"{name} must have strides of whole elements, found {logits.strides} bytes")
        if not logits.dtype.isnative or not logits.flags.aligned:
            raise ValueError(f"{name} must be aligned and in native byte order")
        self.targets = _integers("targets", targets)
        lead = logits.shape[:-1]
        if self.targets.ndim == logits.ndim:
            lead = (*lead, self.targets.shape[-1])
        check_shape("targets", self.targets.shape, lead, f"to fit {name} of shape {logits.shape}")
        self.wide = np.dtype(np.float64 if logits.dtype == np.float64 else np.float32)
        self.weights = _floats_or_none("token_weights", token_weights, np.float64, lead, "as targets have")
        self.row_mask = row_mask
        self.options = options
        self.spec = self._spec()

    def _spec(self) -> tuple[int | float, ...]:
        n_targets = self.targets.shape[-1] if self.targets.ndim == self.logits.ndim else 1
        head = _checks.rows_head(
            _LOGIT_TYPES[self.logits.dtype.name], self.logits.shape, _strides(self.logits), n_targets, self.options
        )
        return (*head, *map(_address, (self.logits, self.targets, self.row_mask, self.weights)))

    def new(self, shape: tuple[int, ...]) -> Array:
        return np.empty(shape, self.wide)

    def saved(self) -> tuple[Array, Array]:
        """Room for the log-probs and statistics that backward needs."""
        return self.new(self.targets.shape), self.new((*self.logits.shape[:-1], 2))

    def backward(
        self,
        inplace: bool,
        saved: tuple[Array, Array],
        *,
        seqs: tuple[int, int, bool] | None = None,
        pairs: tuple[int | float, ...] | None = None,
        entropy: Array | None = None,
        pair_grads: Array | None = None,
        grad_logps: Array | None = None,
        grad_entropy: Array | None = None,
        grad_seq_logps: Array | None = None,
        grad_loss: Array | None = None,
    ) -> Array:
        if inplace:
            grad = self.logits
            if not grad.flags.writeable:
                raise ValueError("inplace_backward needs logits that can be written")
            if _checks.overlaps(grad.shape, grad.strides):
                raise ValueError(
                    f"inplace_backward needs logits whose elements do not share memory, found strides {grad.strides} "
                    f"bytes for shape {grad.shape} (broadcast?)"
                )
        else:
            grad = np.empty(self.logits.shape, self.logits.dtype)
        layout = _checks.row_layout(grad.shape, _strides(grad))
        logps, stats = saved
        _cpu.backward(
            self.spec,
            seqs,
            pairs,
            get_num_threads(),
            _address(logps),
            _address(stats),
            _address(entropy),
            _address(pair_grads),
            _address(grad_logps),
            _address(grad_entropy),
            _address(grad_seq_logps),
            _address(grad_loss),
            0,
            _address(grad),
            layout.seq_stride,
            layout.row_stride,
            layout.vocab_stride,
        )
        return grad


def token_logps(
    logits: Array,
    targets: ArrayLike,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = ("logps",),
    grad_logps: ArrayLike | None = None,
    grad_entropy: ArrayLike | None = None,
    inplace_backward: bool = False,
) -> Any:
    """As `dpo_fast.token_logps`, for arrays.

    Args:
        logits, targets, ignore_index, temperature, logit_scale, softcap, outputs: as there.
        grad_logps, grad_entropy: in the targets' shape; gradients coming in. With any of them the result is
            (TokenOutput, gradient of sum(grad_logps * logps) + sum(grad_entropy * entropy) with respect to logits).
        inplace_backward: write that gradient over the logits.
    """
    check_token_outputs(outputs)
    rows = _Rows(logits, targets, logit_options(ignore_index, temperature, logit_scale, softcap))
    shape = rows.logits.shape[:-1]
    check_shape("targets", rows.targets.shape, shape, f"to fit logits of shape {rows.logits.shape}")
    g_logps = _floats_or_none("grad_logps", grad_logps, rows.wide, shape, "as targets have")
    g_entropy = _floats_or_none("grad_entropy", grad_entropy, rows.wide, shape, "as targets have")
    saved = rows.saved()
    made = {name: rows.new(shape) for name in TOKEN_OUTPUTS[1:] if name in outputs}
    if g_entropy is not None and "entropy" not in made:
        made["entropy"] = rows.new(shape)
    if "is_top1" in made:
        made["is_top1"] = np.empty(shape, np.bool_)
    extras = [_address(made.get(name)) for name in TOKEN_OUTPUTS[1:]]
    _cpu.token_forward(rows.spec, get_num_threads(), _address(saved[0]), _address(saved[1]), *extras)
    out = TokenOutput(
        saved[0] if "logps" in outputs else None, *[made.get(k) if k in outputs else None for k in TOKEN_OUTPUTS[1:]]
    )
    if g_logps is None and g_entropy is None:
        return out
    entropy = made.get("entropy") if g_entropy is not None else None
    return out, rows.backward(inplace_backward, saved, entropy=entropy, grad_logps=g_logps, grad_entropy=g_entropy)


def selective_log_softmax(
    logits: Array,
    index: ArrayLike,
    temperature: float = 1.0,
    row_mask: ArrayLike | None = None,
    *,
    grad_logps: ArrayLike | None = None,
) -> Any:
    """As `dpo_fast.selective_log_softmax`, for arrays: logits (..., V), index (...) or (..., K).

    With grad_logps, in the index's shape, the result is (log-probs, gradient with respect to logits).
    """
    options = logit_options(IGNORE_NOTHING, temperature, 1.0, None)
    logits = np.asanyarray(logits)
    index = _integers("index", index)
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
    rows = _Rows(flat, index.reshape(*flat.shape[:-1], *n_index), options, row_mask=rows_kept)
    saved = rows.saved()
    _cpu.token_forward(rows.spec, get_num_threads(), _address(saved[0]), _address(saved[1]), 0, 0, 0, 0)
    logps = saved[0].reshape(index.shape)
    if mask is not None:
        logps = np.where(mask, logps, logps.dtype.type(0))
    if grad_logps is None:
        return logps
    grad = _floats("grad_logps", grad_logps, rows.wide)
    check_shape("grad_logps", grad.shape, index.shape, "as index has")
    if mask is not None:
        grad = np.where(mask, grad, grad.dtype.type(0))
    return logps, rows.backward(False, saved, grad_logps=grad).reshape(logits.shape)


def _sequences(rows: _Rows, cu_seqlens: ArrayLike | None, average: bool) -> tuple[tuple[int, int, bool], Array | None]:
    """The kernels' `seqs` tuple, and the array that it points to."""
    check_shape("targets", rows.targets.shape, rows.logits.shape[:-1], f"to fit logits of shape {rows.logits.shape}")
    cu = None if cu_seqlens is None else _integers("cu_seqlens", cu_seqlens)
    n_seqs = _checks.sequence_count(rows.logits.shape, None if cu is None else cu.shape)
    return (_address(cu), n_seqs, average), cu


def _sequence_forward(
    rows: _Rows, seqs: tuple[int, int, bool], _alive: Array | None, double_sums: bool = False
) -> tuple[Array, tuple[Array, Array]]:
    saved = rows.saved()
    out = np.empty(seqs[1], np.float64 if double_sums else rows.wide)
    logps, stats = map(_address, saved)
    _cpu.sequence_forward(rows.spec, seqs, get_num_threads(), logps, stats, _address(out), double_sums)
    return out, saved


def sequence_logps(
    logits: Array,
    targets: ArrayLike,
    *,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    average: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_logps: ArrayLike | None = None,
    inplace_backward: bool = False,
) -> Any:
    """As `dpo_fast.sequence_logps`, for arrays.

    With grad_logps [S] the result is (log-probs, gradient of sum(grad_logps * log-probs) with respect to logits);
    inplace_backward writes it over the logits.
    """
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    rows = _Rows(logits, targets, options, token_weights=token_weights)
    seqs, alive = _sequences(rows, cu_seqlens, average)
    out, saved = _sequence_forward(rows, seqs, alive)
    if grad_logps is None:
        return out
    grad = _floats("grad_logps", grad_logps, rows.wide)
    check_shape("grad_logps", grad.shape, (seqs[1],), "with one number per sequence")
    gradient = rows.backward(inplace_backward, saved, seqs=seqs, grad_seq_logps=grad)
    del alive
    return out, gradient


class _PairLosses:
    """A checked loss over n_seqs log-probs: room for what it returns, and what the kernels are told."""

    def __init__(
        self,
        loss: Loss,
        n_seqs: int,
        ref_logps: ArrayLike | None,
        pairs: ArrayLike | None,
        pair_weights: ArrayLike | None,
        desirable: ArrayLike | None,
        baseline: float | None,
        wide: Any,
        reduction: str,
    ) -> None:
        self.chosen_loss, self.reduction = loss, reduction
        self.pairs = self._pairs(loss, n_seqs, pairs, desirable)
        # rounded sums of the policy for a rounded reference: equal models give rewards of exactly 0
        self.float_sums = wide == np.float32 and getattr(ref_logps, "dtype", None) in (np.float32, np.float16)
        self.ref_logps = _floats_or_none(
            "ref_logps", ref_logps, np.float64, (n_seqs,), "with one log-prob per sequence"
        )
        n_pairs = _checks.pair_count(n_seqs, None if self.pairs is None else self.pairs.shape)
        self.weights = _floats_or_none("pair_weights", pair_weights, np.float64, (n_pairs,), "with one number per pair")
        self.baseline = _floats_or_none("baseline", baseline, np.float64, (), "as one number")
        if self.baseline is not None and not np.isfinite(self.baseline):
            raise ValueError(f"baseline must be finite, found {baseline}")
        self.divisor = loss.num_pairs or loss.divisor or n_pairs
        self.pairs_spec = (
            _address(self.pairs),
            n_pairs,
            _address(self.weights),
            _address(self.baseline),
            self.divisor,
        )
        self.loss = np.empty((), wide)
        self.losses, self.chosen_rewards, self.rejected_rewards = (np.empty(n_pairs, wide) for _ in range(3))
        self.pair_grads = np.empty((n_pairs, 2), np.float64)
        self.grad_loss = np.ones((), wide)

    @staticmethod
    def _pairs(loss: Loss, n_seqs: int, pairs: ArrayLike | None, desirable: ArrayLike | None) -> Array | None:
        loss.check_completions(pairs=pairs is not None, desirable=desirable is not None)
        if not loss.unpaired:
            return None if pairs is None else _integers("pairs", pairs)
        numbers = np.arange(n_seqs)
        if desirable is None:
            good = numbers < _checks.pair_count(n_seqs, None)
        else:
            good = np.asarray(desirable) != 0
            check_shape("desirable", good.shape, (n_seqs,), "with one truth value per sequence")
        return np.stack([np.where(good, numbers, -1), np.where(good, -1, numbers)], -1)

    def addresses(self) -> list[int]:
        arrays = (self.loss, self.losses, self.chosen_rewards, self.rejected_rewards, self.pair_grads)
        return [_address(array) for array in arrays]

    def add_coupled(self, logps: Array) -> Array | None:
        """Adds the terms that couple the batch; returns their part of the loss's gradient by logps, None if unknown."""
        terms, options = self.chosen_loss.coupled, self.chosen_loss.options
        if not terms:
            return np.zeros(0)
        n_pairs = len(self.losses)
        pairs = np.arange(2 * n_pairs).reshape(2, -1).T if self.pairs is None else self.pairs
        weights = np.ones(n_pairs) if self.weights is None else self.weights
        extra, grad = coupled_losses(
            terms, logps, self.ref_logps, pairs, options.beta, options.label_smoothing, weights / self.divisor
        )
        losses = self.losses + extra * weights
        self.losses = losses.astype(self.losses.dtype)
        self.loss = np.asarray(losses.sum() / self.divisor, self.losses.dtype)
        return grad

    def grad_seq_logps(self, coupled: Array | None) -> Array | None:
        """The gradient of the terms that couple the batch, as the kernels take it."""
        if coupled is None:
            raise ValueError(
                "with_grad needs a loss function that returns (losses, derivatives by the chosen log-probs, "
                "derivatives by the rejected)"
            )
        return coupled.astype(self.losses.dtype) if len(coupled) else None

    def output(self, logps: Array) -> DPOOutput:
        loss = self.losses if self.reduction == "none" else self.loss[()]
        rewards = (self.chosen_rewards, self.rejected_rewards)
        arrays: Any = (loss, self.losses, *rewards, logps, self.pairs, self.chosen_loss.unpaired)
        return DPOOutput(*arrays)


def ld_dpo_weights(
    targets: ArrayLike,
    ld_alpha: float,
    *,
    pairs: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    ignore_index: int = -100,
) -> Array:
    """As `dpo_fast.ld_dpo_weights`, for arrays."""
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], found {ld_alpha}")
    kept = _integers("targets", targets) != ignore_index
    rows = kept.reshape(-1)
    if cu_seqlens is None:
        if kept.ndim != 2:
            raise ValueError(f"targets must have shape [S, T], or [N] with cu_seqlens, found {kept.shape}")
        bounds = np.arange(kept.shape[0] + 1) * kept.shape[-1]
    else:
        bounds = _integers("cu_seqlens", cu_seqlens)
        if bounds.ndim != 1 or not len(bounds) or bounds[0] or bounds[-1] != rows.size or (np.diff(bounds) < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {rows.size}, found {bounds.tolist()}")
    before = np.concatenate([[0], rows.cumsum()])
    lengths = before[bounds[1:]] - before[bounds[:-1]]
    if pairs is None:
        numbers = np.arange(2 * _checks.pair_count(len(lengths), None)).reshape(2, -1).T
    else:
        numbers = _integers("pairs", pairs)
        _checks.pair_count(len(lengths), numbers.shape)
        if numbers.min() < 0 or numbers.max() >= len(lengths):
            raise IndexError(f"pairs must be in [0, {len(lengths)}), found {numbers.min()} to {numbers.max()}")
    shared = np.full(len(lengths), -1)
    for pair in numbers:
        shorter = lengths[pair].min()
        if ((shared[pair] != -1) & (shared[pair] != shorter)).any():
            raise ValueError(
                "ld_alpha: a sequence is in several pairs whose shorter completions have different lengths, so that "
                "its log-prob is not one number; write such pairs out as sequences of their own"
            )
        shared[pair] = shorter
    shared = np.where(shared == -1, lengths, shared)
    limits = np.repeat(before[bounds[:-1]] + shared, np.diff(bounds))
    return np.where(before[1:] > limits, ld_alpha, 1.0).reshape(kept.shape)


def dpo_loss(
    logits: Array,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: Array | None = None,
    beta: float = 0.1,
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
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_grad: bool = False,
    inplace_backward: bool = False,
    **options: Unpack[LossKeywords],
) -> Any:
    """As `dpo_fast.dpo_loss`, for arrays; without `outputs` (see `token_logps`).

    With with_grad the result is (DPOOutput, gradient of the loss with respect to logits), for reduction "none" that of
    the losses' sum; inplace_backward writes it over the logits. A function as loss_type then has to return (losses,
    derivatives by the chosen log-probs, derivatives by the rejected), [P] each.
    """
    logit_opts = logit_options(ignore_index, temperature, logit_scale, softcap)
    loss = choose_loss(
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        average=average,
        reduction=reduction,
        with_reference=ref_logps is not None or ref_logits is not None,
        with_pair_weights=pair_weights is not None,
        with_baseline=baseline is not None,
        with_token_weights=token_weights is not None or ld_alpha is not None,
        wpo=wpo,
        **options,
    )
    if ld_alpha is not None:
        loss.check_completions(ld_alpha=True)
        weights = ld_dpo_weights(targets, ld_alpha, pairs=pairs, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
        given: Array | float = 1.0
        if token_weights is not None:
            given = _floats("token_weights", token_weights, np.float64)
            check_shape("token_weights", given.shape, weights.shape, "as targets have")
        token_weights = weights * given
        if ld_alpha == 0 and wpo:
            visible = np.maximum(weights, TINY_WEIGHT) * given
            if loss.options.average:  # over nothing but tiny weights it would be one of these tokens, and no longer 0
                visible = visible * _by_token(_some(token_weights, cu_seqlens), cu_seqlens, visible.shape)
            token_weights = visible
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_logits exclude each other: give one of them")
        ref_rows = _Rows(ref_logits, targets, logit_opts, token_weights=token_weights, name="ref_logits")
        # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
        ref_logps = _sequence_forward(
            ref_rows, *_sequences(ref_rows, cu_seqlens, loss.options.average), double_sums=True
        )[0]
    rows = _Rows(logits, targets, logit_opts, token_weights=token_weights)
    seqs, alive = _sequences(rows, cu_seqlens, loss.options.average)
    out = _PairLosses(loss, seqs[1], ref_logps, pairs, pair_weights, desirable, baseline, rows.wide, reduction)
    saved = rows.saved()
    logps = rows.new((seqs[1],))
    log_sum_sq_probs = rows.new(rows.targets.shape) if wpo else None
    _cpu.dpo_forward(
        rows.spec,
        seqs,
        out.pairs_spec,
        tuple(loss.options),
        get_num_threads(),
        wpo,
        out.float_sums,
        _address(out.ref_logps),
        True,
        _address(saved[0]),
        _address(saved[1]),
        0,
        0,
        0,
        _address(log_sum_sq_probs),
        _address(logps),
        *out.addresses(),
    )
    coupled = out.add_coupled(logps)
    if not with_grad:
        return out.output(logps)
    grad = rows.backward(
        inplace_backward,
        saved,
        seqs=seqs,
        pairs=out.pairs_spec,
        pair_grads=out.pair_grads,
        grad_loss=out.grad_loss,
        grad_seq_logps=out.grad_seq_logps(coupled),
    )
    del alive
    return out.output(logps), grad


def preference_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    beta: float = 0.1,
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
    loss = choose_loss(
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        average=average,
        reduction=reduction,
        with_reference=ref_logps is not None,
        with_pair_weights=pair_weights is not None,
        with_baseline=baseline is not None,
        **options,
    )
    loss.check_lengths(lengths is not None)
    wide = np.dtype(np.float64 if given.dtype.itemsize >= 8 else np.float32)
    values = np.asarray(given, wide, order="C")
    n_seqs = values.shape[0]
    tokens = _floats_or_none("lengths", lengths, np.float64, (n_seqs,), "with one number per sequence")
    out = _PairLosses(loss, n_seqs, ref_logps, pairs, pair_weights, desirable, baseline, wide, reduction)
    is_wide = wide == np.float64
    _cpu.preference_forward(
        out.pairs_spec,
        tuple(loss.options),
        is_wide,
        n_seqs,
        _address(values),
        _address(out.ref_logps),
        True,
        _address(tokens),
        *out.addresses(),
    )
    coupled = out.add_coupled(values)
    if not with_grad:
        return out.output(values)
    grad = np.empty(n_seqs, wide)
    _cpu.preference_backward(
        out.pairs_spec, is_wide, n_seqs, _address(out.pair_grads), _address(out.grad_loss), 0, _address(grad)
    )
    extra = out.grad_seq_logps(coupled)
    return out.output(values), grad if extra is None else grad + extra

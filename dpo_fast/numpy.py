"""The same functions for NumPy arrays: values and, on request, gradients. Does not import torch.

Arrays of logits are float32, float64, float16 or `ml_dtypes.bfloat16`, with any strides. Log-probs and losses come out
in float32 (float64 for float64 logits), gradients in the logits' type. Gradients are asked for by giving the gradients
that come in (`grad_logps`, `grad_entropy`), or with `with_grad=True` where there is a loss; the result is then the pair
(output, gradient). Threads: see `dpo_fast.get_num_threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_fast import _checks, _cpu
from dpo_fast._checks import (
    IGNORE_NOTHING,
    TOKEN_OUTPUTS,
    LogitOptions,
    check_logits_shape,
    check_reduction,
    check_shape,
    check_token_outputs,
    logit_options,
    loss_options,
)
from dpo_fast._native import get_num_threads, set_num_threads
from dpo_fast.outputs import DPOOutput, TokenOutput

__all__ = [
    "DPOOutput",
    "TokenOutput",
    "dpo_loss",
    "get_num_threads",
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

    def _layout(self, array: Array) -> _checks.Layout:
        return _checks.row_layout(array.shape, [stride // array.itemsize for stride in array.strides])

    def _spec(self) -> tuple[int | float, ...]:
        return _checks.rows_spec(
            _LOGIT_TYPES[self.logits.dtype.name],
            _address(self.logits),
            self._layout(self.logits),
            _address(self.targets),
            self.targets.shape[-1] if self.targets.ndim == self.logits.ndim else 1,
            _address(self.row_mask),
            _address(self.weights),
            self.options,
        )

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
        loss: tuple[int | float, ...] | None = None,
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
        layout = self._layout(grad)
        logps, stats = saved
        _cpu.backward(
            self.spec,
            seqs,
            loss,
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


class _Loss:
    """Room for what a loss returns, and the kernels' `loss` tuple."""

    def __init__(
        self,
        n_seqs: int,
        ref_logps: ArrayLike | None,
        pairs: ArrayLike | None,
        wide: Any,
        loss_type: str,
        beta: float,
        label_smoothing: float,
        reduction: str,
    ) -> None:
        check_reduction(reduction)
        options = loss_options(loss_type, beta, label_smoothing)
        self.reduction = reduction
        self.pairs = None if pairs is None else _integers("pairs", pairs)
        self.ref_logps = _floats_or_none(
            "ref_logps", ref_logps, np.float64, (n_seqs,), "with one log-prob per sequence"
        )
        n_pairs = _checks.pair_count(n_seqs, None if self.pairs is None else self.pairs.shape)
        self.spec = (_address(self.pairs), n_pairs, *options, reduction == "mean")
        self.loss = np.empty((), wide)
        self.losses, self.chosen_rewards, self.rejected_rewards = (np.empty(n_pairs, wide) for _ in range(3))
        self.pair_grads = np.empty((n_pairs, 2), np.float64)
        self.grad_loss = np.ones((), wide)

    def addresses(self) -> list[int]:
        arrays = (self.loss, self.losses, self.chosen_rewards, self.rejected_rewards, self.pair_grads)
        return [_address(array) for array in arrays]

    def output(self, logps: Array) -> DPOOutput:
        loss = self.losses if self.reduction == "none" else self.loss[()]
        return DPOOutput(loss, self.losses, self.chosen_rewards, self.rejected_rewards, logps, self.pairs)


def dpo_loss(
    logits: Array,
    targets: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    ref_logits: Array | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    average: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_grad: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """As `dpo_fast.dpo_loss`, for arrays.

    With with_grad the result is (DPOOutput, gradient of the loss with respect to logits), for reduction "none" that of
    the losses' sum; inplace_backward writes it over the logits.
    """
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_logits exclude each other: give one of them")
        ref_rows = _Rows(ref_logits, targets, options, token_weights=token_weights, name="ref_logits")
        # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
        ref_logps = _sequence_forward(ref_rows, *_sequences(ref_rows, cu_seqlens, average), double_sums=True)[0]
    rows = _Rows(logits, targets, options, token_weights=token_weights)
    seqs, alive = _sequences(rows, cu_seqlens, average)
    loss = _Loss(seqs[1], ref_logps, pairs, rows.wide, loss_type, beta, label_smoothing, reduction)
    saved = rows.saved()
    logps = rows.new((seqs[1],))
    _cpu.dpo_forward(
        rows.spec,
        seqs,
        loss.spec,
        get_num_threads(),
        _address(loss.ref_logps),
        _address(saved[0]),
        _address(saved[1]),
        _address(logps),
        *loss.addresses(),
    )
    if not with_grad:
        return loss.output(logps)
    grad = rows.backward(
        inplace_backward, saved, seqs=seqs, loss=loss.spec, pair_grads=loss.pair_grads, grad_loss=loss.grad_loss
    )
    del alive
    return loss.output(logps), grad


def preference_loss(
    logps: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: ArrayLike | None = None,
    reduction: str = "mean",
    with_grad: bool = False,
) -> Any:
    """As `dpo_fast.preference_loss`, for arrays: logps [S], float32 or float64 (half types are converted to float32).

    With with_grad the result is (DPOOutput, gradient of the loss with respect to logps), for reduction "none" that of
    the losses' sum.
    """
    given = np.asarray(logps)
    if given.dtype.kind in "iucbSUOMm":
        raise TypeError(f"logps must be floating-point numbers, found {given.dtype}")
    if given.ndim != 1:
        raise ValueError(f"logps must have shape [S], found {given.shape}")
    wide = np.dtype(np.float64 if given.dtype.itemsize >= 8 else np.float32)
    values = np.asarray(given, wide, order="C")
    n_seqs = values.shape[0]
    loss = _Loss(n_seqs, ref_logps, pairs, wide, loss_type, beta, label_smoothing, reduction)
    is_wide = wide == np.float64
    _cpu.preference_forward(loss.spec, is_wide, n_seqs, _address(values), _address(loss.ref_logps), *loss.addresses())
    if not with_grad:
        return loss.output(values)
    grad = np.empty(n_seqs, wide)
    _cpu.preference_backward(
        loss.spec, is_wide, n_seqs, _address(loss.pair_grads), _address(loss.grad_loss), 0, _address(grad)
    )
    return loss.output(values), grad

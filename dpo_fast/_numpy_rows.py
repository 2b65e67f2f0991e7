"""Arrays as the kernels take them: checked rows of logits, pairs and their losses, for dpo_fast.numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_fast import _checks, _cpu
from dpo_fast._arguments import (
    KernelGrads,
    KernelLosses,
    KernelOut,
    KernelPairs,
    KernelRows,
    KernelSaved,
    KernelSequences,
)
from dpo_fast._checks import STATISTICS, LogitOptions, check_shape
from dpo_fast._loss.coupled_numpy import coupled_losses
from dpo_fast._loss.options import Loss, PairNumbers
from dpo_fast._native import get_num_threads
from dpo_fast.outputs import DPOOutput

LOGIT_TYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}

Array = NDArray[Any]


def address(array: Array | None) -> Any:
    """Where an array's numbers are; None where it is not given."""
    return None if array is None else int(array.__array_interface__["data"][0])


def _strides(array: Array) -> tuple[int, ...]:
    """In elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def integers(name: str, values: ArrayLike) -> Array:
    """int64, contiguous."""
    array = np.asarray(values)
    if not array.size:  # an empty list has no type of its own
        array = array.astype(np.int64)
    if not _checks.is_integer_type(array.dtype.name):
        raise TypeError(f"{name} must be integers, found {array.dtype}")
    return np.asarray(array, np.int64, order="C")


def floats(name: str, values: ArrayLike, dtype: Any) -> Array:
    """Real numbers of a type, contiguous."""
    if getattr(values, "requires_grad", False):
        raise TypeError(f"{name} must be an array, found a tensor that requires a gradient")
    array = np.asarray(values)
    if array.dtype.kind in "cSUOMm" or array.dtype.names:
        raise TypeError(f"{name} must be real numbers, found {array.dtype}")
    return np.asarray(array, dtype, order="C")


def floats_or_none(
    name: str, values: ArrayLike | None, dtype: Any, shape: tuple[int, ...], reason: str
) -> Array | None:
    """`floats` of a shape, or None where they are not given."""
    if values is None:
        return None
    array = floats(name, values, dtype)
    check_shape(name, array.shape, shape, reason)
    return array


def reference_logps(ref_logps: ArrayLike | None, n_seqs: int) -> Array | None:
    """[S], in float64 where they are that or lists, else in float32: the kernels round the policy's sums alike."""
    if ref_logps is None:
        return None
    array = np.asarray(ref_logps)
    wide = np.float64 if array.dtype.kind in "iub" or array.dtype.itemsize >= 8 else np.float32
    return floats_or_none("ref_logps", array, wide, (n_seqs,), "with one log-prob per sequence")


class Rows:
    """Checked logits and targets of one call."""

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
        if logits.dtype.name not in LOGIT_TYPES:
            raise TypeError(f"{name} must be one of {', '.join(LOGIT_TYPES)}, found {logits.dtype}")
        _checks.check_logits_shape(logits.shape, name)
        _checks.check_options(options, logits.shape[-1])
        if any(stride % logits.itemsize for stride in logits.strides):
            raise ValueError(f"{name} must have strides of whole elements, found {logits.strides} bytes")
        if not logits.dtype.isnative or not logits.flags.aligned:
            raise ValueError(f"{name} must be aligned and in native byte order")
        self.targets = integers("targets", targets)
        lead = logits.shape[:-1]
        if self.targets.ndim == logits.ndim:
            lead = (*lead, self.targets.shape[-1])
        check_shape("targets", self.targets.shape, lead, f"to fit {name} of shape {logits.shape}")
        self.wide = np.dtype(np.float64 if logits.dtype == np.float64 else np.float32)
        self.weights = floats_or_none("token_weights", token_weights, np.float64, lead, "as targets have")
        self.row_mask = row_mask
        self.options = options
        self.kept = self.targets != options.ignore_index
        if self.weights is not None:
            self.kept &= self.weights != 0

    def kernel(self) -> KernelRows:
        """As the kernels take them."""
        shape, strides, several = self.logits.shape, _strides(self.logits), self.logits.ndim == 3
        return KernelRows(
            LOGIT_TYPES[self.logits.dtype.name],
            shape[0] if several else 1,
            shape[-2],
            shape[-1],
            strides[0] if several else 0,
            strides[-2],
            strides[-1],
            self.targets.shape[-1] if self.targets.ndim == self.logits.ndim else 1,
            self.options,
            address(self.logits),
            address(self.targets),
            address(self.row_mask),
            address(self.weights),
            True,
        )

    def new(self, shape: tuple[int, ...]) -> Array:
        """Memory in the type of log-probs."""
        return np.empty(shape, self.wide)

    def statistics(self, wanted: set[str]) -> tuple[dict[str, Array], tuple[int | None, ...]]:
        """Memory for the statistics wanted, and its addresses in the order of all."""
        rows = self.logits.shape[:-1]
        made = {
            each.name: np.empty(
                self.targets.shape if each.per_target else rows, np.bool_ if each.is_truth else self.wide
            )
            for each in STATISTICS
            if each.name in wanted
        }
        return made, tuple(address(made.get(each.name)) for each in STATISTICS)

    def saved(self) -> tuple[Array, Array]:
        """Memory for the log-probs and sums that backward needs."""
        return self.new(self.targets.shape), self.new((*self.logits.shape[:-1], 2))

    def backward(
        self,
        inplace: bool,
        saved: tuple[Array, Array],
        *,
        seqs: KernelSequences | None = None,
        pairs: KernelPairs | None = None,
        saved_entropy: Array | None = None,
        pair_grads: Array | None = None,
        **grads: Array | None,
    ) -> Array:
        """The gradient of the logits from those of KernelGrads."""
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
        strides = _strides(grad)
        _cpu.backward(
            self.kernel(),
            seqs,
            pairs,
            get_num_threads(),
            KernelSaved(address(saved[0]), address(saved[1]), address(saved_entropy), address(pair_grads)),
            KernelGrads(
                address(grads.get("token_logps")),
                tuple([address(grads.get(each.name)) for each in STATISTICS]),
                *[address(grads.get(name)) for name in KernelGrads._fields[2:]],
            ),
            KernelOut(address(grad), strides[0] if grad.ndim == 3 else 0, strides[-2], strides[-1]),
        )
        return grad


class Bounds:
    """Checked bounds of sequences."""

    def __init__(self, rows: Rows, cu_seqlens: ArrayLike | None, average: bool) -> None:
        shape = rows.logits.shape
        check_shape("targets", rows.targets.shape, shape[:-1], f"to fit logits of shape {shape}")
        self.cu_seqlens = None if cu_seqlens is None else integers("cu_seqlens", cu_seqlens)
        self.n_seqs = _checks.sequence_count(shape, None if self.cu_seqlens is None else self.cu_seqlens.shape)
        self.kernel = KernelSequences(address(self.cu_seqlens), True, self.n_seqs, average)

    def by_token(self, values: Array, shape: tuple[int, ...]) -> Array:
        """One value per sequence -> one per token."""
        if self.cu_seqlens is None:
            return np.broadcast_to(values[:, None], shape)
        return np.repeat(values, np.diff(self.cu_seqlens)).reshape(shape)

    def some(self, values: Array) -> Array:
        """Whether a sequence has anything but zeros, [S]."""
        if self.cu_seqlens is None:
            found: Array = np.any(values != 0, axis=-1)
        else:
            before = np.concatenate([[0], np.cumsum(values.reshape(-1) != 0)])
            found = np.diff(before[self.cu_seqlens]) > 0
        return found


class PairLosses:
    """A checked loss over n_seqs log-probs: memory for its results, and what the kernels are told."""

    def __init__(
        self,
        loss: Loss,
        numbers: PairNumbers,
        n_seqs: int,
        ref_logps: ArrayLike | None,
        pairs: ArrayLike | None,
        desirable: ArrayLike | None,
        baseline: float | None,
        wide: Any,
        reduction: str,
    ) -> None:
        self.chosen_loss, self.reduction, self.n_seqs = loss, reduction, n_seqs
        self.pairs = self._pairs(loss, n_seqs, pairs, desirable)
        self.ref_logps = reference_logps(ref_logps, n_seqs)
        self.ref_double = self.ref_logps is not None and self.ref_logps.dtype == np.float64
        may_be_none = loss.num_pairs is not None
        n_pairs = _checks.pair_count(n_seqs, None if self.pairs is None else self.pairs.shape, may_be_none)
        self.numbers = PairNumbers(*[_pair_number(*item, n_pairs) for item in numbers._asdict().items()])
        self.baseline = floats_or_none("baseline", baseline, np.float64, (), "as one number")
        if self.baseline is not None and not np.isfinite(self.baseline):
            raise ValueError(f"baseline must be finite, found {baseline}")
        self.divisor = loss.num_pairs or loss.divisor or n_pairs
        numbers_at = tuple(address(array) for array in self.numbers)
        self.kernel = KernelPairs(address(self.pairs), n_pairs, self.divisor, address(self.baseline), numbers_at)
        self.loss = np.empty((), wide)
        self.losses, self.chosen_rewards, self.rejected_rewards = (np.empty(n_pairs, wide) for _ in range(3))
        self.pair_grads = np.empty((n_pairs, 2), np.float64)
        self.grad_loss = np.ones((), wide)

    @staticmethod
    def _pairs(loss: Loss, n_seqs: int, pairs: ArrayLike | None, desirable: ArrayLike | None) -> Array | None:
        loss.check_completions(pairs=pairs is not None, desirable=desirable is not None)
        if not loss.unpaired:
            return None if pairs is None else integers("pairs", pairs)
        numbers = np.arange(n_seqs)
        if desirable is None:
            good = numbers < _checks.pair_count(n_seqs, None)
        else:
            good = np.asarray(desirable) != 0
            check_shape("desirable", good.shape, (n_seqs,), "with one truth value per sequence")
        return np.stack([np.where(good, numbers, -1), np.where(good, -1, numbers)], -1)

    def losses_kernel(self) -> KernelLosses:
        """Where the losses go."""
        arrays = (self.loss, self.losses, self.chosen_rewards, self.rejected_rewards, self.pair_grads)
        return KernelLosses(*map(address, arrays))

    def explicit(self) -> Array:
        """[P, 2], also where the first half is chosen."""
        n_pairs = len(self.losses)
        return np.arange(2 * n_pairs).reshape(2, -1).T if self.pairs is None else self.pairs

    def live_sequences(self) -> Array:
        """Which sequences are in a pair of a weight other than 0, [S]."""
        pairs, weights = self.explicit(), self.numbers.pair_weights
        members = (pairs if weights is None else pairs[weights != 0]).reshape(-1)
        live = np.zeros(self.n_seqs, np.bool_)
        live[members[members >= 0]] = True
        return live

    def add_z_loss(self, lse: Array, kept: Array, bounds: Bounds) -> Array | None:
        """Adds the z-loss; returns its gradient by lse."""
        weight = self.chosen_loss.z_loss_weight
        if not weight:
            return None
        live = kept & bounds.by_token(self.live_sequences(), kept.shape)
        values = np.where(live, lse.astype(np.float64), 0)
        share = weight * len(self.losses) / self.divisor / max(int(live.sum()), 1)
        self.loss = np.asarray(self.loss + share * np.square(values).sum(), self.loss.dtype)
        return (2 * share * values).astype(lse.dtype)

    def add_coupled(self, logps: Array) -> Array | None:
        """Adds the terms that couple the batch; returns their part of the loss's gradient by logps, None if unknown."""
        loss = self.chosen_loss
        if not loss.coupled:
            return np.zeros(0)
        weights = np.ones(len(self.losses)) if self.numbers.pair_weights is None else self.numbers.pair_weights
        reference = None if self.ref_logps is None else self.ref_logps.astype(np.float64)
        extra, grad = coupled_losses(
            loss.coupled, logps, reference, self.explicit(), loss.beta, loss.label_smoothing, weights / self.divisor
        )
        extra = np.where(weights == 0, 0, extra * weights)
        self.losses = (self.losses + extra).astype(self.losses.dtype)
        self.loss = np.asarray(self.loss + extra.sum() / self.divisor, self.losses.dtype)
        return grad

    def coupled_gradient(self, coupled: Array | None) -> Array | None:
        """The gradient of the terms that couple the batch, as the kernels take it."""
        if coupled is None:
            raise ValueError(
                "with_grad needs a loss function that returns (losses, derivatives by the chosen log-probs, "
                "derivatives by the rejected)"
            )
        return coupled.astype(self.losses.dtype) if len(coupled) else None

    def output(self, logps: Array) -> DPOOutput:
        """What the public functions return."""
        loss = self.losses if self.reduction == "none" else self.loss[()]
        rewards = (self.chosen_rewards, self.rejected_rewards)
        arrays: Any = (loss, self.losses, *rewards, logps, self.pairs, self.chosen_loss.unpaired, None, None)
        found: Any = (*arrays, self.numbers.pair_weights)
        return DPOOutput(*found)


def _pair_number(name: str, values: ArrayLike | None, n_pairs: int) -> Array | None:
    if values is None:
        return None
    name = "beta" if name == "pair_beta" else name
    array = floats(name, values, np.float64)
    if name == "beta":
        if not ((array >= 0) & np.isfinite(array)).all():
            raise ValueError("beta must be at least 0 and finite for every pair")
        array = np.ascontiguousarray(np.broadcast_to(array, (n_pairs,))) if array.ndim == 0 else array
    check_shape(name, array.shape, (n_pairs,), "with one number per pair")
    return array

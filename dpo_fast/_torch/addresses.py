"""Tensors as the kernels take them: addresses, sizes and strides, in the order of dpo_fast/_arguments.py.

What every small call needs is a plain tuple: it takes a third of the time of a NamedTuple to make.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dpo_fast._arguments import (
    KernelGrads,
    KernelLosses,
    KernelOut,
    KernelPairs,
    KernelRows,
    KernelSaved,
    KernelSequences,
)
from dpo_fast._checks import STATISTIC_BITS
from dpo_fast._loss.options import NO_NUMBERS
from dpo_fast._torch.checks import LOGIT_TYPES
from dpo_fast._torch.operators import PLAIN, Grads, Pairs, PreferenceResult, Rows, Saved, Sequences

_NO_NUMBERS = (None,) * len(NO_NUMBERS)
_NO_STATISTICS = (None,) * len(STATISTIC_BITS)
_FLOATS = (torch.float32, torch.float64)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor of ours, None where it is not there."""
    return None if tensor is None else tensor.data_ptr()


class Addresses:
    """Addresses of a call's tensors; what had to be converted lives as long as this does."""

    __slots__ = ("alive",)

    def __init__(self) -> None:
        self.alive: list[Tensor] = []

    def __call__(self, name: str, tensor: Tensor | None, *types: torch.dtype) -> int | None:
        """The address of a tensor, contiguous and of one of the types, converted to the first of them if it is not."""
        if tensor is None:
            return None
        if tensor.__class__ not in PLAIN:
            raise TypeError(f"{name} must be a plain tensor, found {type(tensor).__name__}")
        if tensor.dtype not in types or not tensor.is_contiguous() or tensor.is_neg():
            if tensor.is_complex():
                raise TypeError(f"{name} must be real numbers, found {tensor.dtype}")
            dtype = tensor.dtype if tensor.dtype in types else types[0]
            tensor = tensor.to(dtype).contiguous().resolve_neg()
            self.alive.append(tensor)
        return tensor.data_ptr()

    def rows(self, logits: Tensor, rows: Rows) -> KernelRows:
        """Logits, their targets and options."""
        targets, row_mask, weights, options = rows
        several = logits.dim() == 3
        n_seqs, rows_per_seq, width = logits.shape if several else (1, *logits.shape)
        arguments = (
            LOGIT_TYPES[logits.dtype],
            n_seqs,
            rows_per_seq,
            width,
            *(logits.stride() if several else (0, *logits.stride())),
            targets.shape[-1] if targets.dim() == logits.dim() else 1,
            options,
            logits.data_ptr(),
            self("targets", targets, torch.int64),
            None if row_mask is None else self("row_mask", row_mask, torch.bool),
            None if weights is None else self("token_weights", weights, *_FLOATS),
            weights is not None and weights.dtype is torch.float64,
        )
        return cast(KernelRows, arguments)

    def sequences(self, seqs: Sequences, n_seqs: int) -> KernelSequences:
        """Bounds of sequences."""
        bounds, average = seqs
        if bounds is None:
            return cast(KernelSequences, (None, True, n_seqs, average))
        address = self("cu_seqlens", bounds, torch.int64, torch.int32)
        return KernelSequences(address, bounds.dtype is not torch.int32, n_seqs, average)

    def pairs(self, pairs: Pairs, n_pairs: int) -> KernelPairs:
        """Pairs and their numbers."""
        index, numbers, baseline, _, divisor = pairs
        places: tuple[int | None, ...] = _NO_NUMBERS
        if numbers is not NO_NUMBERS:
            places = tuple([self(name, x, torch.float64) for name, x in numbers._asdict().items()])
        return KernelPairs(
            None if index is None else self("pairs", index, torch.int64),
            n_pairs,
            divisor,
            None if baseline is None else self("baseline", baseline, torch.float64),
            places,
        )

    def pairs_backward(self, pairs: Tensor | None, pair_grads: Tensor, divisor: float) -> KernelPairs:
        """Pairs as backward reads them: their numbers are in pair_grads."""
        return KernelPairs(self("pairs", pairs, torch.int64), pair_grads.shape[0], divisor, None, _NO_NUMBERS)

    def reference(self, ref_logps: Tensor | None) -> tuple[int | None, bool]:
        """The reference's log-probs, float32 or float64, and whether they are float64."""
        if ref_logps is None:
            return None, False
        return self("ref_logps", ref_logps, *_FLOATS), ref_logps.dtype is torch.float64

    def losses(self, losses: PreferenceResult) -> KernelLosses:
        """Results of the losses."""
        loss, each, chosen, rejected, grads = losses
        last = None if grads is None else grads.data_ptr()
        arguments = (loss.data_ptr(), each.data_ptr(), chosen.data_ptr(), rejected.data_ptr(), last)
        return cast(KernelLosses, arguments)

    def saved(self, saved: Saved, wide: torch.dtype) -> KernelSaved:
        """What forward left."""
        logps, stats, entropy, pair_grads, seq_saved = saved
        return KernelSaved(
            self("logps", logps, wide),
            self("stats", stats, wide),
            None if entropy is None else self("entropy", entropy, wide),
            None if pair_grads is None else self("pair_grads", pair_grads, torch.float64),
            None if seq_saved is None else self("seq_saved", seq_saved, torch.float64),
        )

    def grads(self, grad: Grads, wide: torch.dtype) -> KernelGrads:
        """Incoming gradients."""
        name, (logps, statistics, seq_logps, loss, losses) = "an incoming gradient", grad
        return KernelGrads(
            None if logps is None else self(name, logps, wide),
            tuple([self(name, g, wide) for g in statistics]) if statistics else (),
            None if seq_logps is None else self(name, seq_logps, wide),
            None if loss is None else self(name, loss, wide),
            None if losses is None else self(name, losses, wide),
        )


def statistics(wanted: int, tensors: list[Tensor]) -> tuple[int | None, ...]:
    """Addresses of the statistics that are wanted, in the order of all."""
    if not wanted:
        return _NO_STATISTICS
    found = iter(tensors)
    return tuple([next(found).data_ptr() if bit & wanted else None for bit in STATISTIC_BITS.values()])


def gradient(grad: Tensor) -> KernelOut:
    """Where backward writes."""
    strides = grad.stride()
    return KernelOut(grad.data_ptr(), strides[0] if grad.dim() == 3 else 0, strides[-2], strides[-1])


def wpo_statistics(a_wpo: bool, wanted: int, like: Tensor, tensors: list[Tensor]) -> tuple[int, list[Tensor]]:
    """The statistics with the one that WPO reads, in memory of its own where nobody asked for it."""
    bit = STATISTIC_BITS["log_sum_sq_probs"]
    if not a_wpo or wanted & bit:
        return wanted, tensors
    before = (wanted & (bit - 1)).bit_count()
    return wanted | bit, [*tensors[:before], torch.empty_like(like), *tensors[before:]]

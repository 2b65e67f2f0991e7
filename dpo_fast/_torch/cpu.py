"""The operators on CPU tensors: each checks and allocates (shapes.py), takes addresses and calls one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_fast import _cpu
from dpo_fast._torch import shapes
from dpo_fast._torch.addresses import Addresses, gradient, pointer, statistics, wpo_statistics
from dpo_fast._torch.operators import (
    DPOForward,
    DPOResult,
    PreferenceBackward,
    PreferenceForward,
    PreferenceResult,
    RowsBackward,
    SequenceForward,
    SequenceResult,
    TokenForward,
    TokenResult,
)
from dpo_fast._torch.sequences import count_sequences, refuse_bad_rows, wide_type


def _naming_targets(function: Callable[..., Any]) -> Callable[..., Any]:
    """Says where a bad target is in the caller's tensor; the kernel knows rows and sequences only."""

    @functools.wraps(function)
    def wrapper(logits: Tensor, a: Any) -> Any:
        try:
            return function(logits, a)
        except IndexError:
            refuse_bad_rows(logits, a.rows)
            raise

    return wrapper


@_naming_targets
def token_forward(logits: Tensor, a: TokenForward) -> TokenResult:
    out, at = shapes.token_forward(logits, a), Addresses()
    kernel = (at.rows(logits, a.rows), torch.get_num_threads(), out.logps.data_ptr(), pointer(out.stats))
    _cpu.token_forward(*kernel, statistics(a.wanted, out.statistics))
    return out


@_naming_targets
def sequence_forward(logits: Tensor, a: SequenceForward) -> SequenceResult:
    out, at = shapes.sequence_forward(logits, a), Addresses()
    kernel = (at.rows(logits, a.rows), at.sequences(a.seqs, out.seq_logps.shape[0]), torch.get_num_threads())
    logps, stats, _ = out.tokens
    _cpu.sequence_forward(*kernel, logps.data_ptr(), pointer(stats), out.seq_logps.data_ptr(), a.double_sums)
    return out


@_naming_targets
def dpo_forward(logits: Tensor, a: DPOForward) -> DPOResult:
    out, at = shapes.dpo_forward(logits, a), Addresses()
    logps, stats, found = out.tokens
    wanted, found = wpo_statistics(a.wpo, a.wanted, logps, found)
    _cpu.dpo_forward(
        at.rows(logits, a.rows),
        at.sequences(a.seqs, out.seq_logps.shape[0]),
        at.pairs(a.pairs, out.losses.losses.shape[0]),
        a.pairs.loss,
        torch.get_num_threads(),
        a.wpo,
        *at.reference(a.ref_logps),
        logps.data_ptr(),
        pointer(stats),
        statistics(wanted, found),
        out.seq_logps.data_ptr(),
        at.losses(out.losses),
    )
    return out


def rows_backward_into(grad: Tensor, logits: Tensor, a: RowsBackward) -> None:
    at, g, wide = Addresses(), a.grad, wide_type(logits.dtype)
    if grad is not logits:
        _cpu.expect_writes(grad.data_ptr(), grad.nbytes)
    seqs = pairs = None
    if g.loss is not None or g.losses is not None:
        pairs = at.pairs_backward(a.pairs, a.saved.pair_grads, a.divisor)  # type: ignore[arg-type]
    if pairs is not None or g.seq_logps is not None:
        seqs = at.sequences(a.seqs, count_sequences(a.rows.targets, a.seqs.cu_seqlens))
    threads = torch.get_num_threads()
    _cpu.backward(
        at.rows(logits, a.rows), seqs, pairs, threads, at.saved(a.saved, wide), at.grads(g, wide), gradient(grad)
    )


def preference_forward(logps: Tensor, a: PreferenceForward) -> PreferenceResult:
    out, at = shapes.preference_forward(logps, a), Addresses()
    _cpu.preference_forward(
        at.pairs(a.pairs, out.losses.shape[0]),
        a.pairs.loss,
        logps.dtype is torch.float64,
        a.round_sums,
        logps.shape[0],
        at("logps", logps, logps.dtype),
        *at.reference(a.ref_logps),
        at("lengths", a.lengths, torch.float64),
        at.losses(out),
    )
    return out


def preference_backward(logps: Tensor, a: PreferenceBackward) -> Tensor:
    grad, at = shapes.preference_backward(logps, a), Addresses()
    pairs = at.pairs_backward(a.pairs, a.pair_grads, a.divisor)
    incoming = (at("grad_loss", a.grad.loss, logps.dtype), at("grad_losses", a.grad.losses, logps.dtype))
    saved = at("pair_grads", a.pair_grads, torch.float64)
    _cpu.preference_backward(pairs, logps.dtype is torch.float64, logps.shape[0], saved, *incoming, grad.data_ptr())
    return grad

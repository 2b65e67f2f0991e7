"""The operators on CUDA tensors: each puts the kernels of dpo_fast._cuda on the current stream and waits for nothing.

An extension that was built and does not load raises: nothing switches silently. Values are not looked at: a target
outside the vocabulary gives NaN for its token and sequence, unless DPO_FAST_CHECK=1 asks for the CPU's checks, which
wait.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dpo_fast._arguments import KernelPairs
from dpo_fast._torch import shapes
from dpo_fast._torch.addresses import Addresses, gradient, pointer, statistics, wpo_statistics
from dpo_fast._torch.operators import (
    DPOForward,
    DPOResult,
    PreferenceBackward,
    PreferenceForward,
    PreferenceResult,
    Rows,
    RowsBackward,
    SequenceForward,
    SequenceResult,
    TokenForward,
    TokenResult,
)
from dpo_fast._torch.sequences import check_cu_seqlens, check_pair_numbers, count_sequences, refuse_bad_rows, wide_type


def _kernels() -> Any:
    from dpo_fast import _cuda

    return _cuda


def _place(tensor: Tensor) -> tuple[int, int]:
    stream = torch.cuda.current_stream(tensor.device)
    return stream.cuda_stream, stream.device_index


def _scratch(at: Addresses, like: Tensor, n_bytes: int) -> int | None:
    if not n_bytes:
        return None
    at.alive.append(torch.empty(n_bytes, dtype=torch.uint8, device=like.device))
    return at.alive[-1].data_ptr()


def _by_sequence(at: Addresses, pairs: KernelPairs, tensor: Tensor | None, n_seqs: int) -> KernelPairs:
    """With the pairs' entries sorted by sequence, so each sequence adds up its own."""
    if tensor is None:
        return pairs
    entries = tensor.reshape(-1).long()
    order = torch.argsort(entries, stable=True)
    offsets = torch.searchsorted(entries[order], torch.arange(n_seqs + 1, device=tensor.device))
    at.alive += [order, offsets]
    return pairs._replace(order=order.data_ptr(), offsets=offsets.data_ptr())


def _check_values(logits: Tensor, rows: Rows, cu_seqlens: Tensor | None, pairs: Tensor | None, n_seqs: int) -> None:
    """With DPO_FAST_CHECK=1, what the CPU checks always."""
    if os.environ.get("DPO_FAST_CHECK") != "1":
        return
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, rows.targets.numel())
    if pairs is not None:
        check_pair_numbers(pairs, n_seqs, absent=True)
    refuse_bad_rows(logits, rows)


def token_forward(logits: Tensor, a: TokenForward) -> TokenResult:
    out, at = shapes.token_forward(logits, a), Addresses()
    _check_values(logits, a.rows, None, None, 0)
    rows = at.rows(logits, a.rows)
    scratch = _scratch(at, logits, _kernels().forward_scratch_bytes(rows))
    found = statistics(a.wanted, out.statistics)
    _kernels().token_forward(rows, _place(logits), scratch, out.logps.data_ptr(), pointer(out.stats), found)
    return out


def sequence_forward(logits: Tensor, a: SequenceForward) -> SequenceResult:
    out, at = shapes.sequence_forward(logits, a), Addresses()
    n_seqs = out.seq_logps.shape[0]
    _check_values(logits, a.rows, a.seqs.cu_seqlens, None, n_seqs)
    rows = at.rows(logits, a.rows)
    _kernels().sequence_forward(
        rows,
        at.sequences(a.seqs, n_seqs),
        _place(logits),
        _scratch(at, logits, _kernels().forward_scratch_bytes(rows)),
        out.tokens.logps.data_ptr(),
        pointer(out.tokens.stats),
        out.seq_logps.data_ptr(),
        a.double_sums,
        pointer(out.seq_saved),
    )
    return out


def dpo_forward(logits: Tensor, a: DPOForward) -> DPOResult:
    out, at = shapes.dpo_forward(logits, a), Addresses()
    n_seqs, (logps, stats, found) = out.seq_logps.shape[0], out.tokens
    _check_values(logits, a.rows, a.seqs.cu_seqlens, a.pairs.pairs, n_seqs)
    wanted, found = wpo_statistics(a.wpo, a.wanted, logps, found)
    rows, pairs = at.rows(logits, a.rows), at.pairs(a.pairs, out.losses.losses.shape[0])
    _kernels().dpo_forward(
        rows,
        at.sequences(a.seqs, n_seqs),
        _by_sequence(at, pairs, a.pairs.pairs, n_seqs),
        a.pairs.loss,
        _place(logits),
        _scratch(at, logits, _kernels().forward_scratch_bytes(rows)),
        a.wpo,
        *at.reference(a.ref_logps),
        logps.data_ptr(),
        pointer(stats),
        statistics(wanted, found),
        out.seq_logps.data_ptr(),
        at.losses(out.losses),
        pointer(out.seq_saved),
    )
    return out


def rows_backward_into(grad: Tensor, logits: Tensor, a: RowsBackward) -> None:
    at, g, wide = Addresses(), a.grad, wide_type(logits.dtype)
    seqs = pairs = scratch = None
    n_seqs = count_sequences(a.rows.targets, a.seqs.cu_seqlens)
    if g.loss is not None or g.losses is not None:
        pairs = at.pairs_backward(a.pairs, a.saved.pair_grads, a.divisor)  # type: ignore[arg-type]
    if g.losses is not None and pairs is not None:
        pairs = _by_sequence(at, pairs, a.pairs, n_seqs)
        scratch = _scratch(at, logits, 8 * n_seqs)
    if pairs is not None or g.seq_logps is not None:
        seqs = at.sequences(a.seqs, n_seqs)
    kernel = (at.rows(logits, a.rows), seqs, pairs, _place(logits), scratch)
    _kernels().backward(*kernel, at.saved(a.saved, wide), at.grads(g, wide), gradient(grad))


def preference_forward(logps: Tensor, a: PreferenceForward) -> PreferenceResult:
    out, at = shapes.preference_forward(logps, a), Addresses()
    n_seqs = logps.shape[0]
    if os.environ.get("DPO_FAST_CHECK") == "1" and a.pairs.pairs is not None:
        check_pair_numbers(a.pairs.pairs, n_seqs, absent=True)
    _kernels().preference_forward(
        at.pairs(a.pairs, out.losses.shape[0]),
        a.pairs.loss,
        logps.dtype is torch.float64,
        a.round_sums,
        n_seqs,
        _place(logps),
        at("logps", logps, logps.dtype),
        *at.reference(a.ref_logps),
        at("lengths", a.lengths, torch.float64),
        at.losses(out),
    )
    return out


def preference_backward(logps: Tensor, a: PreferenceBackward) -> Tensor:
    grad, at = shapes.preference_backward(logps, a), Addresses()
    pairs = at.pairs_backward(a.pairs, a.pair_grads, a.divisor)
    pairs = _by_sequence(at, pairs, a.pairs, logps.shape[0])
    incoming = (at("grad_loss", a.grad.loss, logps.dtype), at("grad_losses", a.grad.losses, logps.dtype))
    saved = at("pair_grads", a.pair_grads, torch.float64)
    place, wide = _place(logps), logps.dtype is torch.float64
    _kernels().preference_backward(pairs, wide, logps.shape[0], place, saved, *incoming, grad.data_ptr())
    return grad

"""The operators on CUDA tensors: each puts the kernels of dpo_fast._cuda on the current stream, and waits for nothing.

Registered where the CUDA extension was built; without it CUDA tensors take the path of other devices (fallback.py). An
extension that is there and does not load raises: nothing switches silently. Values are not looked at: a target outside
the vocabulary gives NaN for its token and sequence, unless DPO_FAST_CHECK=1 asks for the CPU's checks, which wait.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dpo_fast import _checks, fallback, ops
from dpo_fast._checks import LogitOptions
from dpo_fast._sequences import check_cu_seqlens, check_pair_numbers, kept_rows, wide_type


def _kernels() -> Any:
    from dpo_fast import _cuda

    return _cuda


class _CudaCall(ops.Call):
    """A call's tensors as the CUDA kernels take them, and where its kernels go."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.dtype)
        self.device = logits.device
        stream = torch.cuda.current_stream(logits.device)
        self.place = (stream.cuda_stream, stream.device_index)

    def cuda_rows(
        self, logits: Tensor, targets: Tensor, row_mask: Tensor | None, weights: Tensor | None, options: LogitOptions
    ) -> tuple[int | float, ...]:
        double = weights is not None and weights.dtype is torch.float64
        return (*self.rows(logits, targets, row_mask, weights, options, double), double)

    def weights_address(self, weights: Tensor | None, double: bool) -> int:
        """In float64 or float32, as they come."""
        return self._as(weights, torch.float64 if double else torch.float32)

    def seqs(self, cu_seqlens: Tensor | None, n_seqs: int, average: bool) -> tuple[int, int, bool, bool]:
        if cu_seqlens is not None and cu_seqlens.dtype is torch.int32:
            return self._as(cu_seqlens, torch.int32), n_seqs, average, False
        return self.integers(cu_seqlens), n_seqs, average, True

    def scratch(self, n_bytes: int) -> int:
        if not n_bytes:
            return 0
        self.alive.append(torch.empty(n_bytes, dtype=torch.uint8, device=self.device))
        return self.alive[-1].data_ptr()

    def cuda_backward(
        self,
        grad: Tensor,
        rows: tuple[int | float, ...],
        seqs: tuple[Any, ...] | None,
        pairs: tuple[Any, ...] | None,
        saved: tuple[Tensor | None, ...],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """saved: logps, stats, entropy, seq_saved, pair_grads; grads: of token log-probs and entropy, of sequence
        log-probs, of the loss and the losses."""
        logps, stats, entropy, seq_saved, pair_grads = saved
        layout = _checks.row_layout(grad.shape, grad.stride())
        scratch = 8 * seqs[1] if seqs is not None and grads[4] is not None else 0
        _kernels().backward(
            rows, seqs, pairs, *self.place, self.scratch(scratch), self.floats(logps), self.floats(stats),
            self.floats(entropy), self.doubles(seq_saved), self.doubles(pair_grads), *map(self.floats, grads),
            grad.data_ptr(), layout.seq_stride, layout.row_stride, layout.vocab_stride,
        )  # fmt: skip


def _check_values(
    logits: Tensor,
    targets: Tensor,
    options: LogitOptions,
    weights: Tensor | None = None,
    row_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    n_seqs: int = 0,
) -> None:
    """With DPO_FAST_CHECK=1, what the CPU checks always."""
    if os.environ.get("DPO_FAST_CHECK") != "1":
        return
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, targets.numel())
    if pairs is not None:
        check_pair_numbers(pairs, n_seqs, absent=True)
    y = fallback.with_k(targets, logits)
    kept = fallback.counts(y, options.ignore_index).all(-1)
    if weights is not None:
        kept &= kept_rows(targets, options.ignore_index, weights)
    if row_mask is not None:
        kept &= row_mask != 0
    fallback.bad_targets(logits, y, kept)


def seq_saved_shape(n_seqs: int) -> tuple[int, int]:
    """The shape of what forward keeps of each sequence."""
    return n_seqs, _kernels().SEQ_SAVED


def _token_forward(
    logits: Tensor, targets: Tensor, row_mask: Tensor | None, *options_and_want: Any
) -> tuple[Tensor, ...]:
    options, want = LogitOptions(*options_and_want[:4]), options_and_want[4:]
    out = ops.token_outputs(logits, targets, row_mask, *options_and_want)
    _check_values(logits, targets, options, row_mask=row_mask)
    call = _CudaCall(logits)
    rows = call.cuda_rows(logits, targets, row_mask, None, options)
    extras = [t.data_ptr() if wanted else 0 for t, wanted in zip(out[2:], want, strict=True)]
    scratch = call.scratch(_kernels().forward_scratch_bytes(rows))
    _kernels().token_forward(rows, *call.place, scratch, out[0].data_ptr(), out[1].data_ptr(), *extras)
    return out


def _token_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logps: Tensor,
    stats: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    call = _CudaCall(logits)
    options = LogitOptions(ignore_index, temperature, logit_scale, softcap)
    rows = call.cuda_rows(logits, targets, row_mask, None, options)
    grads = (grad_logps, grad_entropy, None, None, None)
    call.cuda_backward(grad, rows, None, None, (logps, stats, entropy, None, None), grads)


def _sequence_forward(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options, double_sums = LogitOptions(*rest[:4]), rest[4]
    out = ops.sequence_outputs(logits, targets, cu_seqlens, token_weights, average, *rest)
    seq_logps, logps, stats, seq_saved = out
    n_seqs = seq_logps.shape[0]
    _check_values(logits, targets, options, token_weights, cu_seqlens=cu_seqlens)
    call = _CudaCall(logits)
    rows = call.cuda_rows(logits, targets, None, token_weights, options)
    scratch = call.scratch(_kernels().forward_scratch_bytes(rows))
    _kernels().sequence_forward(
        rows, call.seqs(cu_seqlens, n_seqs, average), *call.place, scratch, logps.data_ptr(), stats.data_ptr(),
        seq_logps.data_ptr(), double_sums, seq_saved.data_ptr(),
    )  # fmt: skip
    return out


def _sequence_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logps: Tensor,
    stats: Tensor,
    grad_seq_logps: Tensor,
    seq_saved: Tensor | None = None,
) -> None:
    call = _CudaCall(logits)
    options = LogitOptions(ignore_index, temperature, logit_scale, softcap)
    rows = call.cuda_rows(logits, targets, None, token_weights, options)
    seqs = call.seqs(cu_seqlens, grad_seq_logps.shape[0], average)
    saved = (logps, stats, None, seq_saved, None)
    call.cuda_backward(grad, rows, seqs, None, saved, (None, None, grad_seq_logps, None, None))


def _dpo_forward(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    out = ops.dpo_outputs(
        logits, targets, ref_logps, cu_seqlens, token_weights, average, pairs, pair_weights, baseline, *rest
    )
    loss, losses, chosen_rewards, rejected_rewards, seq_logps, logps, stats, pair_grads, *extras, seq_saved = out
    logit_opts, loss_options, divisor, (wpo, *want) = ops.split_loss_arguments(rest)
    options = LogitOptions(*logit_opts)
    n_seqs = seq_logps.shape[0]
    _check_values(logits, targets, options, token_weights, None, cu_seqlens, pairs, n_seqs)
    log_sum_sq_probs = torch.empty_like(logps) if wpo else None
    call = _CudaCall(logits)
    rows = call.cuda_rows(logits, targets, None, token_weights, options)
    scratch = call.scratch(_kernels().forward_scratch_bytes(rows))
    results = (seq_logps, loss, losses, chosen_rewards, rejected_rewards, pair_grads, seq_saved)
    _kernels().dpo_forward(
        rows, call.seqs(cu_seqlens, n_seqs, average),
        call.pairs(losses.shape[0], pairs, divisor, pair_weights, baseline), loss_options, *call.place, scratch,
        wpo, *call.reference(ref_logps), logps.data_ptr(), stats.data_ptr(),
        *[extra.data_ptr() if wanted else 0 for extra, wanted in zip(extras, want, strict=True)],
        0 if log_sum_sq_probs is None else log_sum_sq_probs.data_ptr(), *[t.data_ptr() for t in results],
    )  # fmt: skip
    return out


def _dpo_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    divisor: float,
    logps: Tensor,
    stats: Tensor,
    pair_grads: Tensor,
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_seq_logps: Tensor | None,
    seq_saved: Tensor | None = None,
) -> None:
    n_seqs = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    call = _CudaCall(logits)
    options = LogitOptions(ignore_index, temperature, logit_scale, softcap)
    rows = call.cuda_rows(logits, targets, None, token_weights, options)
    pair_spec = call.pairs(pair_grads.shape[0], pairs, divisor)
    saved = (logps, stats, None, seq_saved, pair_grads)
    grads = (None, None, grad_seq_logps, grad_loss, grad_losses)
    call.cuda_backward(grad, rows, call.seqs(cu_seqlens, n_seqs, average), pair_spec, saved, grads)


def _preference_forward(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    out = ops.preference_outputs(logps, ref_logps, lengths, pairs, pair_weights, baseline)
    if os.environ.get("DPO_FAST_CHECK") == "1" and pairs is not None:
        check_pair_numbers(pairs, logps.shape[0], absent=True)
    *loss_options, divisor = rest
    call = _CudaCall(logps)
    _kernels().preference_forward(
        call.pairs(out[1].shape[0], pairs, divisor, pair_weights, baseline), tuple(loss_options),
        logps.dtype is torch.float64, logps.shape[0], *call.place, call.floats(logps), *call.reference(ref_logps),
        call.doubles(lengths), *[t.data_ptr() for t in out],
    )  # fmt: skip
    return out


def _preference_backward(
    logps: Tensor,
    pairs: Tensor | None,
    divisor: float,
    pair_grads: Tensor,
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
) -> Tensor:
    grad = ops.preference_backward_output(logps, pairs, divisor, pair_grads, grad_loss, grad_losses)
    call = _CudaCall(logps)
    _kernels().preference_backward(
        call.pairs(pair_grads.shape[0], pairs, divisor), wide_type(logps.dtype) is torch.float64, logps.shape[0],
        *call.place, call.doubles(pair_grads), call.floats(grad_loss), call.floats(grad_losses), grad.data_ptr(),
    )  # fmt: skip
    return grad


def register() -> None:
    """Makes these the operators' implementations for CUDA tensors."""
    ops.implement("token_forward", _token_forward, "CUDA")
    ops.implement("sequence_forward", _sequence_forward, "CUDA")
    ops.implement("dpo_forward", _dpo_forward, "CUDA")
    ops.implement("preference_forward", _preference_forward, "CUDA")
    ops.implement("preference_backward", _preference_backward, "CUDA")
    ops.implement_backward("token_backward", _token_backward_into, "CUDA")
    ops.implement_backward("sequence_backward", _sequence_backward_into, "CUDA")
    ops.implement_backward("dpo_backward", _dpo_backward_into, "CUDA")

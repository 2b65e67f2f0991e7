"""Token and sequence log-probabilities from logits: the public functions and their autograd.

log p[n] = z[n, y_n] - log sum_v exp z[n, v]          z = softcap * tanh(x * logit_scale / softcap) / temperature
log p[s] = sum over the tokens n of sequence s of w_n log p[n]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_fast import ops
from dpo_fast._autograd import differentiable_once, inplace_allowed, run
from dpo_fast._checks import (
    IGNORE_NOTHING,
    TOKEN_OUTPUTS,
    LogitOptions,
    check_logits_shape,
    check_shape,
    check_token_outputs,
    logit_options,
)
from dpo_fast.outputs import TokenOutput


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        row_mask: Tensor | None,
        options: LogitOptions,
        want: tuple[bool, bool, bool, bool],
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        out = ops.call("token_forward", logits, targets, row_mask, *options, *want, keep=ctx is not None)
        logps, stats, entropy, mean_logits, is_top1, log_sum_sq_probs = out
        if ctx is None:
            return logps, entropy, mean_logits, is_top1, log_sum_sq_probs
        ctx.save_for_backward(logits, targets, row_mask, logps, stats, entropy)
        ctx.options, ctx.inplace_backward, ctx.has_entropy = options, inplace_backward, want[0]
        ctx.mark_non_differentiable(mean_logits, is_top1, log_sum_sq_probs)
        ctx.set_materialize_grads(False)
        # copies of [N] numbers: what is saved stays whole when the caller changes the output in place
        return logps.clone(), entropy.clone(), mean_logits, is_top1, log_sum_sq_probs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        logits, targets, row_mask, logps, stats, entropy = ctx.saved_tensors
        if not ctx.has_entropy:  # torch.compile gives zeros where there was no gradient
            entropy = grad_entropy = None
        if grad_logps is None and grad_entropy is None:
            return (None,) * 6
        args = (logits, targets, row_mask, *ctx.options, logps, stats, entropy, grad_logps, grad_entropy)
        if ctx.inplace_backward:
            ops.call("token_backward_", *args)
            return (logits.detach(), *(None,) * 5)
        return (ops.call("token_backward", *args), *(None,) * 5)


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        average: bool,
        options: LogitOptions,
        inplace_backward: bool,
    ) -> Tensor:
        args = (targets, cu_seqlens, token_weights, average, *options, False)
        out = ops.call("sequence_forward", logits, *args, keep=ctx is not None)
        seq_logps, logps, stats, seq_saved = out
        if ctx is None:
            return seq_logps  # type: ignore[no-any-return]
        ctx.save_for_backward(logits, targets, cu_seqlens, token_weights, logps, stats, seq_saved)
        ctx.average, ctx.options, ctx.inplace_backward = average, options, inplace_backward
        return seq_logps  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_seq_logps: Tensor) -> tuple[Any, ...]:
        logits, targets, cu_seqlens, token_weights, logps, stats, seq_saved = ctx.saved_tensors
        args = (logits, targets, cu_seqlens, token_weights, ctx.average, *ctx.options, logps, stats, grad_seq_logps)
        args = (*args, seq_saved)
        if ctx.inplace_backward:
            ops.call("sequence_backward_", *args)
            return (logits.detach(), *(None,) * 6)
        return (ops.call("sequence_backward", *args), *(None,) * 6)


def check_no_grad(name: str, tensor: Tensor | None) -> None:
    """Refuses a tensor that expects a gradient which it would never get."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name} gets no gradient, but requires one: detach it")


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = ("logps",),
    inplace_backward: bool = False,
) -> TokenOutput:
    """Log-probability of each target under softmax(logits), and other statistics of the same rows, in one pass.

    Args:
        logits: [S, T, V] or packed [N, V]; float32, float64, bfloat16 or float16, any strides (views are not copied).
        targets: [S, T] or [N], integers; row t predicts targets[:, t] (see `completion_targets`).
        ignore_index: rows with this target are not read, and give 0 and no gradient.
        temperature, logit_scale, softcap: z = softcap * tanh(logits * logit_scale / softcap) / temperature, without
            the tanh when softcap is None.
        outputs: names of the statistics wanted, among "logps", "entropy", "mean_logits", "is_top1",
            "log_sum_sq_probs"; see `TokenOutput`.
        inplace_backward: the backward pass writes the gradient over the logits instead of allocating it. Any later
            use of the logits by autograd then raises. Under torch.compile, which has no such guard, the gradient is
            allocated.

    Returns:
        TokenOutput of tensors in the targets' shape: float32 (float64 for float64 logits), is_top1 bool; None where
        not asked for. logps and entropy (nats) are differentiable, once.

    Raises:
        ValueError: shapes or devices that do not fit, an option out of its range.
        TypeError: logits or targets of another type.
        IndexError: a target outside [0, V) that is not ignore_index.
    """
    check_token_outputs(outputs)
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    check_logits_shape(logits.shape)
    check_shape("targets", targets.shape, logits.shape[:-1], f"to fit logits of shape {tuple(logits.shape)}")
    want = tuple(name in outputs for name in TOKEN_OUTPUTS[1:])
    logps, *extras = run(_TokenLogps, logits, targets, None, options, want, inplace_allowed(inplace_backward))
    return TokenOutput(
        logps if "logps" in outputs else None,
        *(value if wanted else None for value, wanted in zip(extras, want, strict=True)),
    )


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log_softmax(logits / temperature, -1) gathered at index; TRL's function of this name, fused.

    Args:
        logits: (..., V); float32, float64, bfloat16 or float16.
        index: (...) for one entry of each row, or (..., K) for K of them; integers.
        temperature: positive.
        row_mask: like index; entries where it is zero give 0, and rows that are zero throughout are not read.

    Returns:
        Like index, float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError, IndexError: as `token_logps`; no index is ignored, whatever its value.
    """
    options = logit_options(IGNORE_NOTHING, temperature, 1.0, None)
    if logits.dim() < 1 or index.dim() not in (logits.dim() - 1, logits.dim()):
        raise ValueError(
            f"index must have shape (...) or (..., K) to fit logits of shape {tuple(logits.shape)}, found "
            f"{tuple(index.shape)}"
        )
    gathers_one = index.dim() == logits.dim() - 1
    ops.check_integers("index", index)
    lead = logits.shape[:-1]
    check_shape("index", index.shape, lead if gathers_one else (*lead, index.shape[-1]), "to fit the logits")
    if row_mask is not None:
        check_shape("row_mask", row_mask.shape, index.shape, "as index has")
    rows_kept = None
    if row_mask is not None:
        index = index.long()
        rows_kept = row_mask != 0 if gathers_one else (row_mask != 0).any(-1)
        if not gathers_one:  # an entry masked out may hold any index
            index = index.masked_fill(row_mask == 0, 0)
    shape = index.shape
    if logits.dim() == 1:
        logits, index = logits.unsqueeze(0), index.unsqueeze(0)
        rows_kept = None if rows_kept is None else rows_kept.unsqueeze(0)
    elif logits.dim() > 3:
        logits = logits.flatten(0, -2)
        index = index.flatten() if gathers_one else index.flatten(0, -2)
        rows_kept = None if rows_kept is None else rows_kept.flatten()
    logps = run(_TokenLogps, logits, index, rows_kept, options, (False,) * 4, False)[0].reshape(shape)
    if row_mask is not None and not gathers_one:
        logps = logps.masked_fill(row_mask == 0, 0)
    return logps  # type: ignore[no-any-return]


def sequence_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probability of each sequence: the (weighted) sum or mean of its tokens' log-probabilities, in one call.

    Args:
        logits: [S, T, V], or packed [N, V] (or [1, N, V]) with cu_seqlens.
        targets: [S, T] or [N] (or [1, N]), as for `token_logps`.
        cu_seqlens: [S + 1] integers, rising from 0 to N: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1].
        token_weights: like targets; multiplies each token's log-prob. A token of weight 0 is ignored. No gradient.
        average: divide by the sum of the weights of the tokens that count (without weights, their number).
        ignore_index, temperature, logit_scale, softcap, inplace_backward: as for `token_logps`.

    Returns:
        [S], float32 (float64 for float64 logits), differentiable once. A sequence whose tokens are all ignored has
        log-probability 0 and gradient 0.

    Raises:
        ValueError, TypeError, IndexError: as `token_logps`; also for cu_seqlens that does not rise from 0 to N.
    """
    check_no_grad("token_weights", token_weights)
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    return run(  # type: ignore[no-any-return]
        _SequenceLogps, logits, targets, cu_seqlens, token_weights, average, options, inplace_allowed(inplace_backward)
    )

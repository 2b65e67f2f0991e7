"""Preference losses, from logits or from sequence log-probabilities: the public functions and their autograd.

    r[p] = (logp[c_p] - ref[c_p]) - (logp[d_p] - ref[d_p])        c chosen, d rejected
    loss[p] = softplus(-beta r[p]) = -log sigmoid(beta r[p])      (DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7)

The losses themselves stand in csrc/preference_loss.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_fast import ops
from dpo_fast._autograd import differentiable_once, inplace_allowed
from dpo_fast._checks import LogitOptions, LossOptions, check_reduction, logit_options, loss_options
from dpo_fast.logps import check_no_grad
from dpo_fast.outputs import DPOOutput


class _DPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ref_logps: Tensor | None,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        average: bool,
        pairs: Tensor | None,
        options: LogitOptions,
        loss_options: LossOptions,
        mean: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        out = torch.ops.dpo_fast.dpo_forward(
            logits, targets, ref_logps, cu_seqlens, token_weights, average, pairs, *options, *loss_options, mean
        )
        loss, losses, chosen_rewards, rejected_rewards, seq_logps, logps, stats, pair_grads = out
        ctx.save_for_backward(logits, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads)
        ctx.average, ctx.options, ctx.mean, ctx.inplace_backward = average, options, mean, inplace_backward
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.set_materialize_grads(False)
        return loss, losses, chosen_rewards, rejected_rewards, seq_logps

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any,
        grad_loss: Tensor | None,
        grad_losses: Tensor | None,
        grad_chosen: Any,
        grad_rejected: Any,
        grad_seq_logps: Tensor | None,
    ) -> tuple[Any, ...]:
        logits, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads = ctx.saved_tensors
        if grad_loss is None and grad_losses is None and grad_seq_logps is None:
            return (None,) * 11
        args = (logits, targets, cu_seqlens, token_weights, ctx.average, pairs, *ctx.options, ctx.mean)
        args = (*args, logps, stats, pair_grads, grad_loss, grad_losses, grad_seq_logps)
        if ctx.inplace_backward:
            torch.ops.dpo_fast.dpo_backward_(*args)
            return (logits.detach(), *(None,) * 10)
        return (torch.ops.dpo_fast.dpo_backward(*args), *(None,) * 10)


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        ref_logps: Tensor | None,
        pairs: Tensor | None,
        loss_options: LossOptions,
        mean: bool,
    ) -> tuple[Tensor, ...]:
        out = torch.ops.dpo_fast.preference_forward(logps, ref_logps, pairs, *loss_options, mean)
        loss, losses, chosen_rewards, rejected_rewards, pair_grads = out
        ctx.save_for_backward(logps, pairs, pair_grads)
        ctx.mean = mean
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.set_materialize_grads(False)
        return loss, losses, chosen_rewards, rejected_rewards

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Any, ...]:
        logps, pairs, pair_grads = ctx.saved_tensors
        if grad_loss is None and grad_losses is None:
            return (None,) * 5
        grad = torch.ops.dpo_fast.preference_backward(logps, pairs, ctx.mean, pair_grads, grad_loss, grad_losses)
        return (grad, *(None,) * 4)


def dpo_loss(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_logits: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    average: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> DPOOutput:
    """A preference loss from logits, in one fused call forward and one backward.

    Args:
        logits: [S, T, V], or packed [N, V] (or [1, N, V]) with cu_seqlens; float32, float64, bfloat16 or float16, any
            strides.
        targets: [S, T] or [N] (or [1, N]), integers; row t predicts targets[:, t] (see `completion_targets`).
        ref_logps: [S], the reference model's sequence log-probs. Without it and ref_logits the loss is reference-free.
        ref_logits: like logits, the reference model's logits, instead of ref_logps. Neither ever gets a gradient.
        beta: strength of the pull towards the reference.
        loss_type: "sigmoid" (DPO, eq. 7).
        label_smoothing: in [0, 0.5]; probability that a pair's labels are swapped (conservative DPO).
        pairs: [P, 2] integers, numbers of the chosen and rejected sequences; by default the first half of the
            sequences is chosen and the second half rejected.
        cu_seqlens, token_weights, average: as for `sequence_logps`.
        reduction: "mean" or "sum" over the pairs, or "none".
        ignore_index, temperature, logit_scale, softcap, inplace_backward: as for `token_logps`.

    Returns:
        DPOOutput: loss [] (or [P] for "none"), losses [P], chosen_rewards and rejected_rewards [P], logps [S];
        float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, devices or options that do not fit; no pairs.
        TypeError: tensors of another type.
        IndexError: a target outside [0, V) that is not ignore_index, or a pair outside the sequences.
    """
    check_reduction(reduction)
    check_no_grad("token_weights", token_weights)
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    loss = loss_options(loss_type, beta, label_smoothing)
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_logits exclude each other: give one of them")
        ops.check_rows(ref_logits, targets, name="ref_logits")
        # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
        ref_logps = torch.ops.dpo_fast.sequence_forward(
            ref_logits.detach(), targets, cu_seqlens, token_weights, average, *options, True
        )[0]
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
    reduced, losses, chosen_rewards, rejected_rewards, logps = _DPOLoss.apply(
        logits,
        targets,
        ref_logps,
        cu_seqlens,
        token_weights,
        average,
        pairs,
        options,
        loss,
        reduction == "mean",
        inplace_allowed(inplace_backward),
    )
    return DPOOutput(losses if reduction == "none" else reduced, losses, chosen_rewards, rejected_rewards, logps, pairs)


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: Tensor | None = None,
    reduction: str = "mean",
) -> DPOOutput:
    """A preference loss from sequence log-probabilities.

    Args:
        logps: [S], log-probs of the policy; float32, float64, or a half type, which is converted to float32.
        ref_logps: [S], log-probs of the reference; never gets a gradient. None: reference-free.
        beta, loss_type, label_smoothing, pairs, reduction: as for `dpo_loss`.

    Returns:
        DPOOutput, as `dpo_loss`; logps are the given ones (half types as float32).

    Raises:
        ValueError, TypeError, IndexError: as `dpo_loss`.
    """
    check_reduction(reduction)
    loss = loss_options(loss_type, beta, label_smoothing)
    values = logps.float() if logps.dtype in (torch.bfloat16, torch.float16) else logps
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
    reduced, losses, chosen_rewards, rejected_rewards = _PreferenceLoss.apply(
        values, ref_logps, pairs, loss, reduction == "mean"
    )
    return DPOOutput(
        losses if reduction == "none" else reduced, losses, chosen_rewards, rejected_rewards, values, pairs
    )

"""Preference losses, from logits or from sequence log-probabilities: the public functions and their autograd.

    r[p] = (logp[c_p] - ref[c_p]) - (logp[d_p] - ref[d_p])        c chosen, d rejected
    loss[p] = softplus(-beta r[p]) = -log sigmoid(beta r[p])      (DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7)

That loss and the others that are sums over pairs stand in csrc/preference_loss.h, those that couple the batch in
_coupled.py, the checks of their options in _loss_options.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from dpo_fast import ops
from dpo_fast._autograd import differentiable_once, inplace_allowed, run
from dpo_fast._checks import TOKEN_OUTPUTS, LogitOptions, check_shape, check_token_outputs, logit_options, pair_count
from dpo_fast._coupled import coupled_losses
from dpo_fast._loss_options import (
    REMEMBERED_TYPES,
    TINY_WEIGHT,
    Loss,
    LossKeywords,
    LossOptions,
    LossType,
    choose_loss,
    remembered_loss,
)
from dpo_fast._sequences import kept_rows, ld_dpo_weights, spread_to_rows, sum_by_sequence
from dpo_fast.logps import check_no_grad
from dpo_fast.outputs import DPOOutput, TokenOutput


class _DPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ref_logps: Tensor | None,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        pairs: Tensor | None,
        pair_weights: Tensor | None,
        baseline: Tensor | None,
        options: LogitOptions,
        loss_options: LossOptions,
        divisor: float,
        wpo: bool,
        want: tuple[bool, bool, bool, bool],
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        average = loss_options.average
        out = ops.call(
            "dpo_forward", logits, targets, ref_logps, cu_seqlens, token_weights, average, pairs, pair_weights,
            baseline, *options, *loss_options, divisor, wpo, *want[1:], keep=ctx is not None,
        )  # fmt: skip
        loss, losses, chosen_rewards, rejected_rewards, seq_logps, logps, stats, pair_grads, *extras, seq_saved = out
        no_grads = (chosen_rewards, rejected_rewards, *((logps.clone(), *extras) if want[0] else ()))
        if ctx is not None:
            saved = (cu_seqlens, token_weights, pairs, logps, stats, pair_grads, seq_saved)
            ctx.save_for_backward(logits, targets, *saved)
            ctx.average, ctx.options, ctx.divisor, ctx.inplace_backward = average, options, divisor, inplace_backward
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*no_grads)
        return loss, losses, seq_logps, *no_grads

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, grad_seq_logps: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        logits, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads, seq_saved = ctx.saved_tensors
        if grad_loss is None and grad_losses is None and grad_seq_logps is None:
            return (None,) * 14
        args = (logits, targets, cu_seqlens, token_weights, ctx.average, pairs, *ctx.options, ctx.divisor)
        args = (*args, logps, stats, pair_grads, grad_loss, grad_losses, grad_seq_logps, seq_saved)
        if ctx.inplace_backward:
            ops.call("dpo_backward_", *args)
            return (logits.detach(), *(None,) * 13)
        return (ops.call("dpo_backward", *args), *(None,) * 13)


class _PreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        ref_logps: Tensor | None,
        lengths: Tensor | None,
        pairs: Tensor | None,
        pair_weights: Tensor | None,
        baseline: Tensor | None,
        loss_options: LossOptions,
        divisor: float,
    ) -> tuple[Tensor, ...]:
        out = ops.call(
            "preference_forward", logps, ref_logps, lengths, pairs, pair_weights, baseline, *loss_options, divisor,
            keep=ctx is not None,
        )  # fmt: skip
        loss, losses, chosen_rewards, rejected_rewards, pair_grads = out
        if ctx is not None:
            ctx.save_for_backward(logps, pairs, pair_grads)
            ctx.divisor = divisor
            ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
            ctx.set_materialize_grads(False)
        return loss, losses, chosen_rewards, rejected_rewards

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, *_: Any) -> tuple[Any, ...]:
        logps, pairs, pair_grads = ctx.saved_tensors
        if grad_loss is None and grad_losses is None:
            return (None,) * 8
        grad = ops.call("preference_backward", logps, pairs, ctx.divisor, pair_grads, grad_loss, grad_losses)
        return (grad, *(None,) * 7)


# --- what all levels share --------------------------------------------------------------------------------------------


def baseline_tensor(value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A baseline as the operators take it: 0-d, float64, without gradient."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_no_grad("baseline", value)
        return value.reshape(()) if value.numel() == 1 else value
    if not -math.inf < value < math.inf:
        raise ValueError(f"baseline must be finite, found {value}")
    return torch.full((), value, dtype=torch.float64, device=like.device)  # no copy from the host


def check_tensors(**arguments: Any) -> None:
    """Raises TypeError for arguments that are given and are not tensors."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, found {type(value).__name__}")


def loss_pairs(
    loss: Loss, n_seqs: int, pairs: Tensor | None, desirable: Tensor | None, device: torch.device
) -> Tensor | None:
    """The pairs of a loss; for completions that stand alone, one "pair" each whose other side is -1.

    Raises:
        ValueError: `pairs` for a loss of single completions, `desirable` for one of pairs, or of another shape.
    """
    loss.check_completions(pairs=pairs is not None, desirable=desirable is not None)
    if not loss.unpaired:
        return pairs
    numbers = torch.arange(n_seqs, device=device)
    if desirable is None:
        good = numbers < pair_count(n_seqs, None)
    else:
        check_shape("desirable", desirable.shape, (n_seqs,), "with one truth value per sequence")
        ops.check_device("desirable", desirable, numbers, "the log-probs")
        good = desirable != 0
    absent = torch.full_like(numbers, -1)
    return torch.stack([torch.where(good, numbers, absent), torch.where(good, absent, numbers)], -1)


def token_weights_of(
    loss: Loss,
    token_weights: Tensor | None,
    ld_alpha: float | None,
    targets: Tensor,
    pairs: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    looks_at_all: bool,
) -> Tensor | None:
    """The weights given, times those of LD-DPO; looks_at_all: WPO or statistics are over all tokens."""
    check_no_grad("token_weights", token_weights)
    if ld_alpha is None:
        return token_weights
    loss.check_completions(ld_alpha=True)
    weights = ld_dpo_weights(targets, ld_alpha, pairs=pairs, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    given: Tensor | float = 1.0 if token_weights is None else token_weights
    if ld_alpha or not looks_at_all:
        return weights * given
    visible = weights.clamp(min=TINY_WEIGHT) * given
    if not loss.options.average:
        return visible
    # an average over nothing but tiny weights would be one of these tokens, and no longer 0
    total = sum_by_sequence(weights * given, cu_seqlens)
    return torch.where(spread_to_rows(total, cu_seqlens, weights.shape) == 0, torch.zeros_like(visible), visible)


def replaced(out: DPOOutput, **changes: Any) -> DPOOutput:
    """`out._replace(**changes)`, which the compiler of torch 2.6 does not trace."""
    return DPOOutput(*[changes.get(name, value) for name, value in zip(DPOOutput._fields, out, strict=True)])


def reduced_output(
    out: DPOOutput, loss: Loss, ref_logps: Tensor | None, pair_weights: Tensor | None, reduction: str
) -> DPOOutput:
    """Adds the terms that couple the batch, and reduces anew."""
    if loss.coupled:
        n_pairs = out.losses.shape[0]
        options = loss.options
        extra = coupled_losses(
            loss.coupled, out.logps, ref_logps, n_pairs, out.pairs, options.beta, options.label_smoothing
        )
        if pair_weights is not None:
            extra = extra * pair_weights.detach()
        losses = (out.losses.double() + extra).to(out.losses.dtype)
        out = replaced(out, losses=losses, loss=losses.double().sum().to(losses.dtype) / (loss.divisor or n_pairs))
    if reduction == "none":
        return replaced(out, loss=out.losses)
    return out if loss.num_pairs is None else replaced(out, loss=out.loss / loss.num_pairs)


def losses_of_log_probs(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    loss: Loss,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses, chosen and rejected rewards of the terms that are sums over pairs, from checked arguments."""
    args = (ref_logps, lengths, pairs, pair_weights, baseline, loss.options, loss.divisor)
    return run(_PreferenceLoss, logps, *args)  # type: ignore[no-any-return]


def with_tokens(
    out: DPOOutput,
    outputs: Sequence[str],
    tokens: Sequence[Tensor],
    targets: Tensor,
    ignore_index: int,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> DPOOutput:
    """Adds the statistics of tokens that were asked for, and their sums over sequences for `metrics()`."""
    if not outputs:
        return out
    logps, *extras = tokens
    asked = {name: extra for name, extra in zip(TOKEN_OUTPUTS[1:4], extras, strict=True) if name in outputs}
    found = TokenOutput(logps if "logps" in outputs else None, **asked)
    sums = {"lengths": kept_rows(targets, ignore_index, token_weights), **asked}
    by_sequence = {name: sum_by_sequence(values.to(logps.dtype), cu_seqlens) for name, values in sums.items()}
    return replaced(out, tokens=found, token_sums=by_sequence)


def checked_loss(**options: Any) -> Loss:
    """`choose_loss`, remembered in eager mode."""
    if torch.compiler.is_compiling() or not REMEMBERED_TYPES.issuperset(map(type, options.values())):
        return choose_loss(**options)
    return remembered_loss(**options)


def check_loss_outputs(outputs: Sequence[str]) -> tuple[bool, bool, bool, bool]:
    """Which statistics of tokens a loss is asked for; log-probs, where any is."""
    check_token_outputs(outputs)
    if not outputs:
        return (False,) * 4
    if "log_sum_sq_probs" in outputs:
        raise ValueError("a loss gives no 'log_sum_sq_probs': see token_logps")
    return (True, *(name in outputs for name in TOKEN_OUTPUTS[1:4]))  # type: ignore[return-value]


# --- public functions -------------------------------------------------------------------------------------------------


def dpo_loss(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_logits: Tensor | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: Tensor | None = None,
    pair_weights: Tensor | None = None,
    desirable: Tensor | None = None,
    baseline: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    average: bool | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    inplace_backward: bool = False,
    **options: Unpack[LossKeywords],
) -> DPOOutput:
    """A preference loss from logits, in one fused call forward and one backward.

    Args:
        logits: [S, T, V], or packed [N, V] (or [1, N, V]) with cu_seqlens; float32, float64, bfloat16 or float16, any
            strides.
        targets: [S, T] or [N] (or [1, N]), integers; row t predicts targets[:, t] (see `completion_targets`).
        ref_logps: [S], the reference model's sequence log-probs. Without it and ref_logits the loss is reference-free.
        ref_logits: like logits, the reference model's logits, instead of ref_logps. Neither ever gets a gradient.
        beta: strength of the pull towards the reference.
        loss_type: a name from the table in docs/losses.md ("sigmoid" is DPO, eq. 7), a function
            f(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps) -> [P] of float64 [P] tensors, or
            several of these, whose weighted sum is the loss.
        label_smoothing: in [0, 0.5]; probability that a pair's labels are swapped, for the losses that know it.
        pairs: [P, 2] integers, numbers of the chosen and rejected sequences; by default the first half of the
            sequences is chosen and the second half rejected. A sequence may be in several pairs, or in none.
        pair_weights: [P], multiplies the losses. No gradient.
        desirable: [S] truth values, for "kto" and "bco", whose losses are one per sequence (P = S); by default the
            first half is desirable.
        baseline: a number or 0-d tensor without gradient; "kto": the estimate of the KL divergence; "bco": the running
            mean of the rewards.
        cu_seqlens, token_weights: as for `sequence_logps`.
        ld_alpha: weight, in [0, 1], of the tokens past the shorter completion of a pair (LD-DPO, see
            `ld_dpo_weights`); times token_weights.
        wpo: weigh each pair by how likely the policy is to write it (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2);
            no gradient goes through the weight.
        average: log-probs of sequences are averages over tokens; by default what the loss is defined on.
        reduction: "mean" or "sum" over the pairs, or "none".
        ignore_index, temperature, logit_scale, softcap, inplace_backward: as for `token_logps`.
        outputs: statistics of tokens for DPOOutput.tokens and its metrics, among "logps", "entropy", "mean_logits",
            "is_top1"; no gradient.
        options: see `LossKeywords`: loss_weights, f_divergence, f_alpha_divergence_coef, discopop_tau, simpo_gamma,
            desirable_weight, undesirable_weight, num_pairs, num_chosen_tokens.

    Returns:
        DPOOutput: loss [] (or [P] for "none"), losses [P], chosen_rewards and rejected_rewards [P], logps [S];
        float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, devices or options that do not fit, or that the loss does not read; no pairs.
        TypeError: tensors of another type.
        IndexError: a target outside [0, V) that is not ignore_index, or a pair outside the sequences.
    """
    check_tensors(
        logits=logits, targets=targets, ref_logps=ref_logps, ref_logits=ref_logits, pairs=pairs, desirable=desirable,
        pair_weights=pair_weights, cu_seqlens=cu_seqlens, token_weights=token_weights,
    )  # fmt: skip
    logit_opts = logit_options(ignore_index, temperature, logit_scale, softcap)
    loss = checked_loss(
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
    want = check_loss_outputs(outputs)
    if loss.unpaired or desirable is not None or ld_alpha is not None:
        n_seqs = ops.check_sequences(logits, targets, cu_seqlens, token_weights)
        pairs = loss_pairs(loss, n_seqs, pairs, desirable, logits.device)
        ops.check_pairs(logits, n_seqs, pairs)
    looks_at_all = wpo or bool(outputs)
    weights = token_weights_of(loss, token_weights, ld_alpha, targets, pairs, cu_seqlens, ignore_index, looks_at_all)
    check_no_grad("pair_weights", pair_weights)
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_logits exclude each other: give one of them")
        ops.check_rows(ref_logits, targets, name="ref_logits")
        # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
        ref_logps = ops.call(
            "sequence_forward",
            ref_logits.detach(),
            targets,
            cu_seqlens,
            weights,
            loss.options.average,
            *logit_opts,
            True,
            keep=False,
        )[0]
    if ref_logps is not None and ref_logps.requires_grad:
        ref_logps = ref_logps.detach()
    reduced, losses, logps, chosen_rewards, rejected_rewards, *tokens = run(
        _DPOLoss,
        logits,
        targets,
        ref_logps,
        cu_seqlens,
        weights,
        pairs,
        pair_weights,
        baseline_tensor(baseline, logits),
        logit_opts,
        loss.options,
        loss.divisor,
        wpo,
        want,
        inplace_allowed(inplace_backward),
    )
    out = DPOOutput(reduced, losses, chosen_rewards, rejected_rewards, logps, pairs, loss.unpaired)
    out = with_tokens(out, outputs, tokens, targets, ignore_index, weights, cu_seqlens)
    return reduced_output(out, loss, ref_logps, pair_weights, reduction)


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: Tensor | None = None,
    pair_weights: Tensor | None = None,
    desirable: Tensor | None = None,
    baseline: float | Tensor | None = None,
    lengths: Tensor | None = None,
    average: bool | None = None,
    reduction: str = "mean",
    **options: Unpack[LossKeywords],
) -> DPOOutput:
    """A preference loss from sequence log-probabilities.

    Args:
        logps: [S], log-probs of the policy; float32, float64, or a half type, which is converted to float32.
        ref_logps: [S], log-probs of the reference; never gets a gradient. None: reference-free.
        lengths: [S], number of tokens of each sequence; for "ipo", "sigmoid_norm" and "sft". No gradient.
        average: whether the given log-probs are averages over tokens; by default what the loss is defined on.
        all others: as for `dpo_loss`.

    Returns:
        DPOOutput, as `dpo_loss`; logps are the given ones (half types as float32).

    Raises:
        ValueError, TypeError, IndexError: as `dpo_loss`; also for a loss that needs lengths without them.
    """
    check_tensors(
        logps=logps, ref_logps=ref_logps, pairs=pairs, pair_weights=pair_weights, desirable=desirable, lengths=lengths
    )
    loss = checked_loss(
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
    check_no_grad("pair_weights", pair_weights)
    check_no_grad("lengths", lengths)
    if logps.dim() != 1:
        raise ValueError(f"logps must have shape [S], found {tuple(logps.shape)}")
    values = logps.float() if logps.dtype in (torch.bfloat16, torch.float16) else logps
    if ref_logps is not None and ref_logps.requires_grad:
        ref_logps = ref_logps.detach()
    if loss.unpaired or desirable is not None:
        pairs = loss_pairs(loss, logps.shape[0], pairs, desirable, logps.device)
    reduced, losses, chosen_rewards, rejected_rewards = losses_of_log_probs(
        values, ref_logps, lengths, pairs, pair_weights, baseline_tensor(baseline, values), loss
    )
    out = DPOOutput(reduced, losses, chosen_rewards, rejected_rewards, values, pairs, loss.unpaired)
    return reduced_output(out, loss, ref_logps, pair_weights, reduction)

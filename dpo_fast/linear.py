"""Token and sequence log-probs and preference losses from hidden states and the LM head: logits never built whole.

    logits = hidden @ weight.T + bias, a tile of rows at a time, within `memory_budget` bytes

Ignored rows are dropped before any product. `linear_token_logps` keeps as many logits as the budget allows for its
backward pass and recomputes the rest. `linear_dpo_loss` takes groups of whole pairs that fit the budget through logits,
log-probs, loss, gradient of the logits (over the logits) and gradient products while the tile is there: three products,
not four; backward then only scales. Results do not depend on the budget beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from dpo_fast import linear_ops, ops  # noqa: F401  (they define torch.ops.dpo_fast)
from dpo_fast._autograd import differentiable_once
from dpo_fast._checks import (
    TOKEN_OUTPUTS,
    LogitOptions,
    check_token_outputs,
    logit_options,
)
from dpo_fast._coupled import sides
from dpo_fast._head import (
    LinearPlan,
    default_budget,
    plan_rows,
)
from dpo_fast._loss_options import Loss, LossKeywords, LossOptions, LossType
from dpo_fast._sequences import kept_rows, spread_to_rows, sum_by_sequence, token_factors, wpo_weights
from dpo_fast._zero3 import gathered
from dpo_fast.logps import check_no_grad
from dpo_fast.losses import (
    baseline_tensor,
    check_loss_outputs,
    check_tensors,
    checked_loss,
    loss_pairs,
    losses_of_log_probs,
    reduced_output,
    token_weights_of,
    with_tokens,
)
from dpo_fast.outputs import DPOOutput, TokenOutput

Lora = tuple[Tensor, Tensor, float]


def linear_plan(
    n_rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    memory_budget: int | None = None,
    device: str | torch.device = "cpu",
    requires_grad: bool = True,
) -> LinearPlan:
    """What `linear_token_logps` does with n_rows rows that count: tile size, rows kept for backward, bytes used.

    Raises:
        ValueError: memory_budget is not positive.
    """
    budget = default_budget(torch.device(device), memory_budget)
    return plan_rows(n_rows, vocab, dtype.itemsize, budget, requires_grad)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _optional(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scaling: float,
        targets: Tensor,
        options: LogitOptions,
        want: tuple[bool, ...],
        budget: int,
        compact: bool,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        head = (hidden, weight, bias, lora_a, lora_b, lora_scaling, targets)
        out = torch.ops.dpo_fast.linear_token_forward(*head, *options, *want, budget, keep, compact)
        logps, stats, entropy, mean_logits, is_top1, log_sum_sq_probs, buffer = out
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, targets, logps, stats, entropy)
        ctx.buffer = buffer if keep else None
        ctx.lora_scaling, ctx.options, ctx.budget, ctx.compact = lora_scaling, options, budget, compact
        ctx.has_entropy = want[0]
        ctx.mark_non_differentiable(mean_logits, is_top1, log_sum_sq_probs)
        ctx.set_materialize_grads(False)
        return logps.clone(), entropy.clone(), mean_logits, is_top1, log_sum_sq_probs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        hidden, weight, bias, lora_a, lora_b, targets, logps, stats, entropy = ctx.saved_tensors
        if not ctx.has_entropy:
            entropy = grad_entropy = None
        if grad_logps is None and grad_entropy is None:
            return (None,) * 12
        needs = ctx.needs_input_grad[:5]
        # the kept logits are written over: a second backward makes them again
        buffer, ctx.buffer = ctx.buffer, None
        with gathered(weight, bias, lora_a, lora_b):
            grads = torch.ops.dpo_fast.linear_token_backward(
                hidden, weight, bias, lora_a, lora_b, ctx.lora_scaling, targets, *ctx.options, logps, stats, entropy,
                buffer, grad_logps, grad_entropy, ctx.budget, ctx.compact, *needs,
            )  # fmt: skip
        return (*_optional(grads, needs), *(None,) * 7)


class _LinearDPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scaling: float,
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
        budget: int,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        average = loss_options.average
        out = torch.ops.dpo_fast.linear_dpo_forward(
            hidden, weight, bias, lora_a, lora_b, lora_scaling, targets, ref_logps, cu_seqlens, token_weights, average,
            pairs, pair_weights, baseline, *options, *loss_options, divisor, wpo, *want[1:], budget, *needs,
        )  # fmt: skip
        loss, losses, chosen_rewards, rejected_rewards, seq_logps, logps, stats, pair_grads = out[:8]
        extras, grads = out[8:11], out[11:]
        ctx.save_for_backward(
            hidden, weight, bias, lora_a, lora_b, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads
        )
        ctx.lora_scaling, ctx.average, ctx.options, ctx.divisor = lora_scaling, average, options, divisor
        ctx.budget, ctx.n_seqs = budget, seq_logps.shape[0]
        ctx.grads = list(grads) if any(needs) else None
        tokens = logps.clone() if want[0] else logps.new_empty(0)
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards, tokens, *extras)
        ctx.set_materialize_grads(False)
        return loss, losses, seq_logps, chosen_rewards, rejected_rewards, tokens, *extras

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, grad_seq_logps: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        hidden, weight, bias, lora_a, lora_b, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads = (
            saved
        )
        needs = ctx.needs_input_grad[:5]
        if grad_loss is None and grad_losses is None and grad_seq_logps is None:
            return (None,) * 20
        grads, ctx.grads = ctx.grads, None
        if grads is not None and grad_loss is not None and grad_losses is None and grad_seq_logps is None:
            # made in forward, for a gradient of 1
            if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
                grads = [grad.mul_(grad_loss) for grad in grads]
            grads = [grad.to(hidden.dtype) for grad in grads]
            return (*_optional(grads, needs), *(None,) * 15)
        del grads
        like = logps.new_empty(ctx.n_seqs)
        g = torch.ops.dpo_fast.preference_backward(like, pairs, ctx.divisor, pair_grads, grad_loss, grad_losses)
        if grad_seq_logps is not None:
            g = g + grad_seq_logps
        kept = kept_rows(targets, ctx.options.ignore_index, token_weights)
        factors = token_factors(kept, token_weights, cu_seqlens, ctx.average, logps.dtype)
        grad_logps = factors * spread_to_rows(g, cu_seqlens, factors.shape)
        targets = targets.masked_fill(~kept, ctx.options.ignore_index)
        with gathered(weight, bias, lora_a, lora_b):
            out = torch.ops.dpo_fast.linear_token_backward(
                hidden, weight, bias, lora_a, lora_b, ctx.lora_scaling, targets, *ctx.options, logps, stats, None,
                None, grad_logps, None, ctx.budget, True, *needs,
            )  # fmt: skip
        return (*_optional(out, needs), *(None,) * 15)


# --- public functions -------------------------------------------------------------------------------------------------


def gather(tensor: Any) -> Any:
    """A sharded parameter (DTensor, FSDP2) as a whole tensor, gathered once.

    Ranks hold different data: its gradient is averaged over them and scattered, as FSDP does with its own parameters.
    """
    if tensor is None or not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """The inputs as the operators take them: gathered where sharded, in autocast's type where that is on."""
    lora_a, lora_b, scaling = lora if lora is not None else (None, None, 1.0)
    tensors: list[Any] = [hidden, *(gather(tensor) for tensor in (weight, bias, lora_a, lora_b))]
    kind = hidden.device.type
    # the compiler of torch 2.6 does not trace the first question
    if (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    x, w, b, a_, b_ = tensors
    return x, w, b, a_, b_, float(scaling)


def _any_requires_grad(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = ("logps",),
    memory_budget: int | None = None,
    compact: bool = True,
) -> TokenOutput:
    """`token_logps` of logits = hidden @ weight.T + bias, which are never built whole.

    Args:
        hidden: [S, T, H] or packed [N, H]; float32, float64, bfloat16 or float16.
        weight: [V, H], the LM head, in hidden's type (under autocast both are converted); a DTensor is gathered once.
        targets: [S, T] or [N], integers; row t predicts targets[:, t] (see `completion_targets`).
        bias: [V].
        lora: (A [r, H], B [V, r], scaling): adds scaling * (hidden @ A.T) @ B.T to the logits.
        ignore_index, temperature, logit_scale, softcap, outputs: as for `token_logps`.
        memory_budget: bytes for tiles of logits (default 256 MiB on the CPU, 1 GiB elsewhere; at least 32 rows are
            taken at a time). Logits that fit stay until backward, the rest is computed again; see `linear_plan`.
        compact: drop ignored rows before the products. False keeps all shapes independent of the data and reads nothing
            on the host, for CUDA graphs (of padded batches).

    Returns:
        TokenOutput as from `token_logps`. Gradients: hidden, weight, bias, A and B, as far as they require them;
        weight and bias gradients are summed in float32 over tiles.

    Raises:
        ValueError, TypeError, IndexError: as `token_logps`, also for a head that does not fit hidden.
    """
    check_token_outputs(outputs)
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    budget = default_budget(hidden.device, memory_budget)
    want = tuple(name in outputs for name in TOKEN_OUTPUTS[1:])
    with gathered(weight, bias, *(lora or ())):
        head = _prepare(hidden, weight, bias, lora)
        keep = _any_requires_grad(*head)
        logps, *extras = _LinearTokenLogps.apply(*head, targets, options, want, budget, compact, keep)
    return TokenOutput(
        logps if "logps" in outputs else None,
        *(value if wanted else None for value, wanted in zip(extras, want, strict=True)),
    )


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    compact: bool = True,
) -> Tensor:
    """`sequence_logps` of logits = hidden @ weight.T + bias, which are never built whole.

    Args: as for `linear_token_logps` and `sequence_logps`.

    Returns:
        [S], float32 (float64 for float64 hidden), differentiable.

    Raises:
        ValueError, TypeError, IndexError: as these.
    """
    tokens, sums = _linear_sequence_sums(
        hidden,
        weight,
        targets,
        bias,
        lora=lora,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        average=average,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        memory_budget=memory_budget,
        compact=compact,
    )
    return sums.to(tokens.logps.dtype)


def _linear_sequence_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    ignore_index: int,
    **options: Any,
) -> tuple[TokenOutput, Tensor]:
    """Token log-probs (with what else is in `outputs`) and their sums over sequences, these in float64."""
    check_no_grad("token_weights", token_weights)
    ops.check_sequence_arguments(hidden, targets, cu_seqlens, token_weights, "hidden")
    kept = kept_rows(targets, ignore_index, token_weights)
    tokens = linear_token_logps(
        hidden, weight, targets.masked_fill(~kept, ignore_index), bias, ignore_index=ignore_index, **options
    )
    factors = token_factors(kept, token_weights, cu_seqlens, average, torch.float64)
    return tokens, sum_by_sequence(tokens.logps.double() * factors, cu_seqlens)


def _uncompacted_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    loss: Loss,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    weights: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    ignore_index: int,
    wpo: bool,
    outputs: Sequence[str],
    **options: Any,
) -> DPOOutput:
    """The loss level by level, with shapes that depend on no value: what `compact=False` asks for."""
    names = {"logps", *outputs} | ({"log_sum_sq_probs"} if wpo else set())
    tokens, sums = _linear_sequence_sums(
        hidden, weight, targets, bias, cu_seqlens=cu_seqlens, token_weights=weights, average=loss.options.average,
        ignore_index=ignore_index, outputs=tuple(names), compact=False, **options,
    )  # fmt: skip
    wide = tokens.logps.dtype
    if ops.rounds_sums(hidden, ref_logps):
        sums = sums.float().double()
    n_pairs = ops.check_pairs(hidden, sums.shape[0], pairs, ref_logps, pair_weights, baseline)
    if wpo:
        kept = kept_rows(targets, ignore_index, weights)
        each = wpo_weights(tokens.logps.detach(), tokens.log_sum_sq_probs, kept, cu_seqlens)
        chosen, rejected = sides(each, n_pairs, pairs)
        pair_weights = chosen * rejected if pair_weights is None else chosen * rejected * pair_weights
    lengths = sum_by_sequence((targets != ignore_index).double(), cu_seqlens)
    found = losses_of_log_probs(sums, ref_logps, lengths, pairs, pair_weights, baseline, loss)
    reduced, losses, chosen_rewards, rejected_rewards, logps = (value.to(wide) for value in (*found, sums))
    out = DPOOutput(reduced, losses, chosen_rewards, rejected_rewards, logps, pairs, loss.unpaired)
    nothing = logps.new_empty(0)
    statistics = [nothing if value is None else value.detach() for value in tokens[:4]]
    return with_tokens(out, outputs, statistics, targets, ignore_index, weights, cu_seqlens)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
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
    memory_budget: int | None = None,
    compact: bool = True,
    **options: Unpack[LossKeywords],
) -> DPOOutput:
    """`dpo_loss` of logits = hidden @ weight.T + bias, which are never built whole.

    With gradients wanted, they are computed here, while a group's logits are there; backward scales them by the
    gradient that comes in. When gradients come into `losses` or `logps` besides `loss`, backward computes the logits
    again instead.

    Args:
        hidden, weight, targets, bias, lora, memory_budget, compact: as for `linear_token_logps`.
        ref_logps: [S], the reference model's sequence log-probs; or
        ref_hidden: like hidden, the reference model's hidden states, with ref_weight [V, H'] (default: weight) and
            ref_bias [V]. No gradient goes to any of them.
        all others: as for `dpo_loss`.

    Returns:
        DPOOutput, as `dpo_loss`.

    Raises:
        ValueError, TypeError, IndexError: as `dpo_loss` and `linear_token_logps`.
    """
    check_tensors(
        hidden=hidden, weight=weight, targets=targets, ref_logps=ref_logps, ref_hidden=ref_hidden, pairs=pairs,
        pair_weights=pair_weights, desirable=desirable, cu_seqlens=cu_seqlens, token_weights=token_weights,
    )  # fmt: skip
    logit_opts = logit_options(ignore_index, temperature, logit_scale, softcap)
    loss = checked_loss(
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        average=average,
        reduction=reduction,
        with_reference=ref_logps is not None or ref_hidden is not None,
        with_pair_weights=pair_weights is not None,
        with_baseline=baseline is not None,
        with_token_weights=token_weights is not None or ld_alpha is not None,
        wpo=wpo,
        **options,
    )
    want = check_loss_outputs(outputs)
    if loss.unpaired or desirable is not None or ld_alpha is not None:
        n_seqs = ops.check_sequence_arguments(hidden, targets, cu_seqlens, token_weights, "hidden")
        pairs = loss_pairs(loss, n_seqs, pairs, desirable, hidden.device)
        ops.check_pairs(hidden, n_seqs, pairs)
    looks_at_all = wpo or bool(outputs)
    weights = token_weights_of(loss, token_weights, ld_alpha, targets, pairs, cu_seqlens, ignore_index, looks_at_all)
    check_no_grad("pair_weights", pair_weights)
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    if ref_hidden is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_hidden exclude each other: give one of them")
        with torch.no_grad():
            # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
            _, ref_logps = _linear_sequence_sums(
                ref_hidden,
                weight if ref_weight is None else ref_weight,
                targets,
                ref_bias,
                cu_seqlens=cu_seqlens,
                token_weights=weights,
                average=loss.options.average,
                ignore_index=ignore_index,
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                memory_budget=memory_budget,
                compact=compact,
            )
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
    if not compact:
        head_options = {"lora": lora, "memory_budget": memory_budget}
        logit_keywords = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
        out = _uncompacted_loss(
            hidden, weight, targets, bias, loss, ref_logps, cu_seqlens, weights, pairs, pair_weights,
            baseline_tensor(baseline, hidden), ignore_index, wpo, outputs, **head_options, **logit_keywords,
        )  # fmt: skip
        return reduced_output(out, loss, ref_logps, pair_weights, reduction)
    budget = default_budget(hidden.device, memory_budget)
    with gathered(weight, bias, *(lora or ())):
        head = _prepare(hidden, weight, bias, lora)
        grad = torch.is_grad_enabled()
        needs = tuple(grad and isinstance(t, Tensor) and t.requires_grad for t in head[:5])
        reduced, losses, logps, chosen_rewards, rejected_rewards, *tokens = _LinearDPOLoss.apply(
            *head,
            targets,
            ref_logps,
            cu_seqlens,
            weights,
            pairs,
            pair_weights,
            baseline_tensor(baseline, hidden),
            logit_opts,
            loss.options,
            loss.divisor,
            wpo,
            want,
            budget,
            # gradients of "none" and of losses that couple the batch are made in backward
            needs if reduction != "none" and not loss.coupled else (False,) * 5,
        )
    out = DPOOutput(reduced, losses, chosen_rewards, rejected_rewards, logps, pairs, loss.unpaired)
    out = with_tokens(out, outputs, tokens, targets, ignore_index, weights, cu_seqlens)
    return reduced_output(out, loss, ref_logps, pair_weights, reduction)


__all__ = ["linear_dpo_loss", "linear_plan", "linear_sequence_logps", "linear_token_logps"]

"""The autograd functions, one for each level: `forward(ctx, tensors that may get a gradient, record)`.

A call that wants no gradient runs `forward` alone, with None as context (see `run`); that is much cheaper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_fast._checks import STATISTICS, named_statistics, only_statistic, statistic
from dpo_fast._torch.operators import (
    DPO_FORWARD,
    LINEAR_DPO_FORWARD,
    LINEAR_TOKEN_BACKWARD,
    LINEAR_TOKEN_FORWARD,
    PREFERENCE_BACKWARD,
    PREFERENCE_FORWARD,
    ROWS_BACKWARD,
    ROWS_BACKWARD_INPLACE,
    SEQUENCE_FORWARD,
    TOKEN_FORWARD,
    DPOForward,
    Grads,
    Head,
    LinearTokenBackward,
    Pairs,
    PreferenceBackward,
    PreferenceForward,
    Rows,
    RowsBackward,
    Saved,
    SequenceForward,
    Sequences,
    TokenForward,
    call,
)
from dpo_fast._torch.sequences import kept_rows, live_rows, spread_to_rows, token_factors
from dpo_fast._torch.zero3 import gathered

Maybe = Tensor | None
Tensors = tuple[Tensor, ...]


class _Refuse(torch.autograd.Function):
    """Hands gradients through and raises when they are differentiated.

    `sources`, which the gradients were made from, connect them with what these depend on: without such a path a second
    derivative would pass them by and come out as zero.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *sources: Tensor) -> Tensors:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the gradients of dpo_fast's functions cannot be differentiated again")


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorates a backward pass: a second derivative raises instead of coming out as zero.

    torch's once_differentiable sees only incoming gradients that require a gradient; the logits do so always.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        compiling = torch.compiler.is_compiling()
        tensors = () if compiling else (*ctx.saved_tensors, *grads)
        sources = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        with torch.no_grad():
            out = backward(ctx, *grads)
        if compiling:
            return out
        made = [grad.detach() for grad in out if grad is not None]
        refusing = iter(_Refuse.apply(made, *sources)) if made else iter(())
        return tuple(None if grad is None else next(refusing) for grad in out)

    return wrapper


def inplace_allowed(inplace_backward: bool) -> bool:
    """Whether backward may write over the logits: not in a compiled graph, where version counters guard nothing."""
    return inplace_backward and not torch.compiler.is_compiling()


def wants_gradient(*tensors: Maybe) -> bool:
    """Whether a backward pass may follow."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def run(function: Any, with_gradient: bool, *args: Any) -> Any:
    """The function with autograd, or its forward alone."""
    return function.apply(*args) if with_gradient else function.forward(None, *args)


# --- from logits ------------------------------------------------------------------------------------------------------


def _save(ctx: Any, logits: Tensor, a: SequenceForward | DPOForward, pairs: Pairs | None, saved: Saved) -> None:
    rows, numbers = a.rows, None if pairs is None else pairs.pairs
    ctx.save_for_backward(logits, rows.targets, rows.row_mask, rows.token_weights, a.seqs.cu_seqlens, numbers, *saved)
    ctx.options, ctx.average, ctx.divisor = rows.options, a.seqs.average, 1.0 if pairs is None else pairs.divisor
    ctx.set_materialize_grads(False)


def _logits_gradient(ctx: Any, grad: Grads) -> Tensor:
    """The gradient of the logits, written over them where that was asked for."""
    logits, targets, row_mask, weights, cu_seqlens, pairs, *saved = ctx.saved_tensors
    rows, seqs = Rows(targets, row_mask, weights, ctx.options), Sequences(cu_seqlens, ctx.average)
    a = RowsBackward(rows, seqs, pairs, ctx.divisor, Saved(*saved), grad)
    if ctx.inplace_backward:
        call(ROWS_BACKWARD_INPLACE, logits, a)
        return logits.detach()  # type: ignore[no-any-return]
    return call(ROWS_BACKWARD, logits, a)  # type: ignore[no-any-return]


class TokenLogps(torch.autograd.Function):
    """Token log-probs and the statistics wanted, from logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, a: TokenForward, inplace_backward: bool) -> Tensors:
        logps, stats, statistics = call(TOKEN_FORWARD, logits, a)
        if ctx is None:
            return logps, *statistics
        ctx.wanted, ctx.inplace_backward = a.wanted, inplace_backward
        entropy = statistic("entropy", a.wanted, statistics)
        sequence = SequenceForward(a.rows, Sequences(None, False), False, True)
        _save(ctx, logits, sequence, None, Saved(logps, stats, entropy, None, None))
        return _token_outputs(ctx, a.wanted, logps, statistics, entropy)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: Maybe, *grad_statistics: Maybe) -> tuple[Any, ...]:
        grad = Grads(grad_logps, _differentiable(ctx.wanted, grad_statistics))
        if grad_logps is None and not grad.statistics:
            return None, None, None
        return _logits_gradient(ctx, grad), None, None


def _token_outputs(ctx: Any, wanted: int, logps: Tensor, statistics: list[Tensor], entropy: Any) -> Tensors:
    """Log-probs and statistics as a function gives them away, marked for autograd."""
    named = zip(named_statistics(wanted), statistics, strict=True)
    ctx.mark_non_differentiable(*[tensor for each, tensor in named if not each.differentiable])
    # copies of [N] numbers: the saved ones stay whole when the caller changes an output in place
    return logps.clone(), *[tensor.clone() if tensor is entropy else tensor for tensor in statistics]


def _differentiable(wanted: int, grads: Sequence[Maybe]) -> tuple[Maybe, ...]:
    """The gradients of the statistics wanted, of all in order; empty where none has one."""
    found = tuple([statistic(each.name, wanted, grads) if each.differentiable else None for each in STATISTICS])
    return found if any(g is not None for g in found) else ()


class SequenceLogps(torch.autograd.Function):
    """Sequence log-probs from logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, a: SequenceForward, inplace_backward: bool) -> Tensor:
        seq_logps, (logps, stats, _), seq_saved = call(SEQUENCE_FORWARD, logits, a)
        if ctx is not None:
            ctx.inplace_backward = inplace_backward
            _save(ctx, logits, a, None, Saved(logps, stats, None, None, seq_saved))
        return seq_logps  # type: ignore[no-any-return]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_seq_logps: Maybe) -> tuple[Any, ...]:
        if grad_seq_logps is None:
            return None, None, None
        return _logits_gradient(ctx, Grads(seq_logps=grad_seq_logps)), None, None


class DPOLoss(torch.autograd.Function):
    """Loss, losses, sequence log-probs, rewards, token log-probs and the statistics wanted, from logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, a: DPOForward, inplace_backward: bool, tokens_too: bool) -> Tensors:
        losses, seq_logps, (logps, stats, statistics), seq_saved = call(DPO_FORWARD, logits, a)
        loss, each, chosen_rewards, rejected_rewards, pair_grads = losses
        if ctx is None:
            tokens = (logps, *statistics) if tokens_too else ()
        else:
            ctx.wanted, ctx.inplace_backward = a.wanted, inplace_backward
            _save(ctx, logits, a, a.pairs, Saved(logps, stats, None, pair_grads, seq_saved))
            tokens, others = (), []
            if tokens_too:
                tokens = (logps.clone(), *statistics)
                named = zip(named_statistics(a.wanted), statistics, strict=True)
                others = [tokens[0], *[tensor for each, tensor in named if each.name != "lse"]]
            ctx.mark_non_differentiable(chosen_rewards, rejected_rewards, *others)
        return loss, each, seq_logps, chosen_rewards, rejected_rewards, *tokens

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, loss: Maybe, losses: Maybe, seq_logps: Maybe, *others: Maybe) -> tuple[Any, ...]:
        # of the statistics lse alone, for the z-loss: in a compiled graph the others have zeros
        lse = statistic("lse", ctx.wanted, others[3:]) if ctx.wanted else None
        statistics = () if lse is None else only_statistic("lse", lse)
        grad = Grads(None, statistics, seq_logps, loss, losses)
        if loss is None and losses is None and seq_logps is None and not statistics:
            return None, None, None, None
        return _logits_gradient(ctx, grad), None, None, None


# --- from log-probs ---------------------------------------------------------------------------------------------------


class PreferenceLoss(torch.autograd.Function):
    """Loss, losses and rewards from sequence log-probs."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, a: PreferenceForward) -> Tensors:
        *losses, pair_grads = call(PREFERENCE_FORWARD, logps, a)
        if ctx is not None:
            ctx.save_for_backward(logps, a.pairs.pairs, pair_grads)
            ctx.divisor = a.pairs.divisor
            ctx.mark_non_differentiable(*losses[2:])
            ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Maybe, grad_losses: Maybe, *_: Any) -> tuple[Any, ...]:
        logps, pairs, pair_grads = ctx.saved_tensors
        if grad_loss is None and grad_losses is None:
            return None, None
        grad = Grads(loss=grad_loss, losses=grad_losses)
        return call(PREFERENCE_BACKWARD, logps, PreferenceBackward(pairs, ctx.divisor, pair_grads, grad)), None


# --- from hidden states -----------------------------------------------------------------------------------------------


class LinearTokenLogps(torch.autograd.Function):
    """Token log-probs and the statistics wanted, from hidden states and the head."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Maybe, lora_a: Maybe, lora_b: Maybe, a: Any, skipped: Maybe
    ) -> Tensors:
        a = _with_head(a, w, b, lora_a, lora_b)
        wanted = a.tokens.wanted
        (logps, stats, statistics), buffer = call(LINEAR_TOKEN_FORWARD, x, a)
        if ctx is None:
            return logps, *statistics
        entropy = statistic("entropy", wanted, statistics)
        _save_head(ctx, x, a.head, a.tokens.rows, Saved(logps, stats, entropy, None, None))
        ctx.buffer, ctx.wanted, ctx.compact = buffer if a.tokens.keep else None, wanted, a.compact
        ctx.skipped = skipped
        return _token_outputs(ctx, wanted, logps, statistics, entropy)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logps: Maybe, *grad_statistics: Maybe) -> tuple[Any, ...]:
        grad = Grads(grad_logps, _differentiable(ctx.wanted, grad_statistics))
        if grad_logps is None and not grad.statistics:
            return (None,) * 7
        # the kept logits are written over: a second backward makes them again
        buffer, ctx.buffer = ctx.buffer, None
        return (*_head_gradient(ctx, grad, buffer, ctx.compact), None, None)


def _with_head(a: Any, weight: Tensor, bias: Maybe, lora_a: Maybe, lora_b: Maybe) -> Any:
    """The arguments with the head's tensors, which autograd has to see one by one."""
    return a._replace(head=a.head._replace(weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b))


def _save_head(ctx: Any, hidden: Tensor, head: Head, rows: Rows, saved: Saved) -> None:
    ctx.save_for_backward(hidden, *head[:4], rows.targets, rows.token_weights, *saved)
    ctx.options, ctx.head_numbers = rows.options, head[4:]
    ctx.set_materialize_grads(False)


def _head_gradient(ctx: Any, grad: Grads, buffer: Maybe, compact: bool) -> list[Maybe]:
    """Gradients of hidden, weight, bias, lora_a and lora_b from those of the tokens."""
    hidden, weight, bias, lora_a, lora_b, targets, weights, *saved = ctx.saved_tensors
    head, needs = Head(weight, bias, lora_a, lora_b, *ctx.head_numbers), tuple(ctx.needs_input_grad[:5])
    rows = Rows(targets, None, weights, ctx.options)
    a = LinearTokenBackward(head, rows, Saved(*saved), buffer, grad, compact, needs)
    with gathered(weight, bias, lora_a, lora_b):
        found, skipped = call(LINEAR_TOKEN_BACKWARD, hidden, a)
    if ctx.skipped is not None:
        ctx.skipped.copy_(skipped)
    return [g if needed else None for g, needed in zip(found, needs, strict=True)]


class LinearDPOLoss(torch.autograd.Function):
    """As DPOLoss, from hidden states and the head; gradients are made in forward where `a.needs` says so."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Maybe, lora_a: Maybe, lora_b: Maybe, a: Any, tokens: Any, skipped: Maybe
    ) -> Tensors:
        a = _with_head(a, w, b, lora_a, lora_b)
        (losses, seq_logps, (logps, stats, statistics), _), grads, left_out = call(LINEAR_DPO_FORWARD, x, a)
        loss, each, chosen_rewards, rejected_rewards, pair_grads = losses
        of_tokens = [logps if ctx is None else logps.clone(), *statistics] if tokens else []
        if ctx is not None:
            _save_head(ctx, x, a.head, a.dpo.rows, Saved(logps, stats, None, pair_grads, None))
            # the z-loss is read off lse again where the gradients are not made in forward
            ctx.lse = statistic("lse", a.dpo.wanted, statistics)
            ctx.n_seqs = seq_logps.shape[0]
            ctx.seqs, ctx.pairs, ctx.z_loss_weight = a.dpo.seqs, a.dpo.pairs, a.z_loss_weight
            ctx.grads = list(grads) if any(a.needs) else None
            ctx.skipped = skipped
            if skipped is not None and any(a.needs):
                skipped.copy_(left_out)
            ctx.mark_non_differentiable(chosen_rewards, rejected_rewards, *of_tokens)
        return loss, each, seq_logps, chosen_rewards, rejected_rewards, *of_tokens

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, loss: Maybe, losses: Maybe, seq_logps: Maybe, *_: Any) -> tuple[Any, ...]:
        if loss is None and losses is None and seq_logps is None:
            return (None,) * 8
        grads, ctx.grads = ctx.grads, None
        if grads is not None and loss is not None and losses is None and seq_logps is None:
            return (*_early_gradients(ctx, grads, loss), None, None, None)
        del grads
        of_tokens = _token_gradients(ctx, loss, losses, seq_logps)
        return (*_head_gradient(ctx, of_tokens, None, True), None, None, None)


def _early_gradients(ctx: Any, grads: list[Maybe], loss: Tensor) -> list[Maybe]:
    """Gradients made in forward, for an incoming gradient of 1."""
    hidden = ctx.saved_tensors[0]
    found: list[Maybe] = []
    for grad, needed in zip(grads, ctx.needs_input_grad, strict=False):
        if grad is not None and needed:
            if loss.device.type != "cpu" or loss.item() != 1:
                grad = grad.mul_(loss)
            found.append(grad.to(hidden.dtype))
        else:
            found.append(None)
    return found


def _token_gradients(ctx: Any, loss: Maybe, losses: Maybe, seq_logps: Maybe) -> Grads:
    """The gradients of the tokens' log-probs and lse, from those of the loss, the losses and the sequences."""
    _, _, _, _, _, targets, weights, logps, _, _, pair_grads, _ = ctx.saved_tensors
    pairs, cu_seqlens, n_seqs = ctx.pairs, ctx.seqs.cu_seqlens, ctx.n_seqs
    g = logps.new_zeros(n_seqs)
    if loss is not None or losses is not None:
        b = PreferenceBackward(pairs.pairs, pairs.divisor, pair_grads, Grads(loss=loss, losses=losses))
        g = call(PREFERENCE_BACKWARD, g, b)
    if seq_logps is not None:
        g = g + seq_logps
    kept = kept_rows(targets, ctx.options.ignore_index, weights)
    factors = token_factors(kept, weights, cu_seqlens, ctx.seqs.average, logps.dtype)
    g = spread_to_rows(g, cu_seqlens, factors.shape)
    # 0 also against an infinite factor's NaN: no gradient, no part in it
    g = torch.where(g == 0, torch.zeros_like(g), g * factors)
    if not ctx.z_loss_weight or loss is None or ctx.lse is None:
        return Grads(logps=g)
    live = live_rows(targets, kept, cu_seqlens, pairs.pairs, pairs.numbers.pair_weights)
    n_pairs = pair_grads.shape[0]
    share = 2 * ctx.z_loss_weight * n_pairs / (pairs.divisor or n_pairs)
    lse = torch.where(live, ctx.lse, torch.zeros_like(ctx.lse))
    g_lse = lse * (loss * share / live.sum().clamp(min=1))
    return Grads(g, only_statistic("lse", g_lse))

"""What the losses of all levels share in torch: completions and weights before the operator, reductions after it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast import _checks
from dpo_fast._checks import check_shape, named_statistics
from dpo_fast._loss.coupled import coupled_losses
from dpo_fast._loss.options import (
    NO_NUMBERS,
    TINY_WEIGHT,
    Given,
    Loss,
    LossType,
    choose_loss,
    split_pair_numbers,
)
from dpo_fast._torch.checks import check_device, check_no_grad, check_pair_tensor, plain_tensor
from dpo_fast._torch.operators import Pairs, Sequences
from dpo_fast._torch.sequences import (
    accurate_type,
    kept_rows,
    live_rows,
    looks_at_values,
    spread_to_rows,
    sum_by_sequence,
)
from dpo_fast.ld_dpo import ld_dpo_weights
from dpo_fast.outputs import DPOOutput, TokenOutput


class Choice(NamedTuple):
    """A loss, and what is one number for each of its pairs."""

    loss: Loss
    operand: Pairs  # with the default pairs
    reduction: str

    def pairs(self, pairs: Tensor | None) -> Pairs:
        """As the operators take them."""
        return self.operand if pairs is None else self.operand._replace(pairs=pairs)


def choose(
    options: dict[str, Any],
    like: Tensor,
    beta: float | Tensor,
    pair_weights: Tensor | None,
    baseline: float | Tensor | None,
    reduction: str,
    token_weights: Any,
    reference: Any,
    loss_type: LossType,
    label_smoothing: float,
    average: bool | None,
    wpo: bool = False,
) -> Choice:
    """Checks a loss and everything that is one number for each of its pairs."""
    names = (loss_type, label_smoothing, average, wpo)
    if not options and pair_weights is None and baseline is None and type(beta) is float and type(loss_type) is str:
        try:
            if not torch.compiler.is_compiling():
                return _remembered_choice(beta, reduction, reference is not None, token_weights is not None, *names)
        except TypeError:  # a list cannot be remembered, or something is wrong: it is said below
            pass
    beta_of_pairs = None
    if isinstance(beta, Tensor):
        check_no_grad("beta", beta)
        beta_of_pairs, beta = plain_tensor("beta", beta), 1.0
        if beta_of_pairs.is_complex() or beta_of_pairs.dtype is torch.bool:
            raise TypeError(f"beta must be real numbers, found {beta_of_pairs.dtype}")
        check_device("beta", beta_of_pairs, like, "logits, hidden or logps")
        if looks_at_values(beta_of_pairs) and not bool(((beta_of_pairs >= 0) & beta_of_pairs.isfinite()).all()):
            raise ValueError("beta must be at least 0 and finite for every pair")
    numbers = split_pair_numbers(options, pair_weights, beta_of_pairs)
    if numbers is not NO_NUMBERS:
        check_no_grad("pair_weights", pair_weights)
        for name, tensor in zip(numbers._fields[2:], numbers[2:], strict=True):
            if tensor is not None:
                numbers = numbers._replace(**{name: plain_tensor(name, tensor)})
                check_no_grad(name, tensor)
    given = Given.of(reference, baseline, token_weights, numbers)
    loss = choose_loss(*names, beta=beta, reduction=reduction, given=given, **options)
    pairs = Pairs(None, numbers, _baseline_tensor(baseline, like), loss.options, loss.divisor)
    return Choice(loss, pairs, reduction)


@functools.lru_cache(maxsize=64, typed=True)
def _remembered_choice(
    beta: float, reduction: str, with_reference: bool, with_token_weights: bool, *names: Any
) -> Choice:
    """A choice that depends on names and numbers only: small calls gain some time."""
    given = Given(with_reference, False, with_token_weights)
    loss = choose_loss(*names, beta=beta, reduction=reduction, given=given)
    pairs = Pairs(None, NO_NUMBERS, None, loss.options, loss.divisor)
    return Choice(loss, pairs, reduction)


def _baseline_tensor(value: float | Tensor | None, like: Tensor) -> Tensor | None:
    """A baseline as the operators take it: 0-d, without gradient."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_no_grad("baseline", value)
        tensor: Tensor = plain_tensor("baseline", value)
        return tensor.reshape(()) if tensor.numel() == 1 else tensor
    found = _checks.number("baseline", value)
    return torch.full((), found, dtype=accurate_type(like.device), device=like.device)  # no copy from the host


def with_pairs(
    choice: Choice, n_seqs: int, pairs: Tensor | None, desirable: Tensor | None, like: Tensor
) -> tuple[Choice, Tensor | None]:
    """The pairs of a loss, and its numbers of pairs one for each of them.

    For completions that are alone there is one "pair" each, whose other side is -1.

    Raises:
        ValueError: `pairs` for a loss of single completions, `desirable` for one of pairs, or of another shape.
    """
    loss, beta = choice.loss, choice.operand.numbers.pair_beta
    if loss.unpaired or desirable is not None:
        pairs = _single_completions(loss, n_seqs, pairs, desirable, like.device)
    if pairs is not None:
        check_device("pairs", pairs, like, "logits, hidden or logps")
    if beta is not None and beta.dim() == 0:
        n_pairs = check_pair_tensor(pairs, like, n_seqs, loss.num_pairs is not None)
        numbers = choice.operand.numbers._replace(pair_beta=beta.expand(n_pairs))
        choice = choice._replace(operand=choice.operand._replace(numbers=numbers))
    return choice, pairs


def _single_completions(
    loss: Loss, n_seqs: int, pairs: Tensor | None, desirable: Tensor | None, device: torch.device
) -> Tensor | None:
    loss.check_completions(pairs=pairs is not None, desirable=desirable is not None)
    numbers = torch.arange(n_seqs, device=device)
    if desirable is None:
        good = numbers < _checks.pair_count(n_seqs, None)
    else:
        check_shape("desirable", desirable.shape, (n_seqs,), "with one truth value per sequence")
        check_device("desirable", desirable, numbers, "logits, hidden or logps")
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
    """The weights given, times those of LD-DPO; looks_at_all: WPO, the z-loss or statistics are over all tokens."""
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


def _replaced(out: DPOOutput, **changes: Any) -> DPOOutput:
    """`out._replace(**changes)`, which the compiler of torch 2.6 does not trace."""
    return DPOOutput(*[changes.get(name, value) for name, value in zip(DPOOutput._fields, out, strict=True)])


def output(found: Sequence[Tensor], choice: Choice, pairs: Tensor | None) -> DPOOutput:
    """The results of an autograd function: loss, losses, log-probs, rewards."""
    loss, losses, logps, chosen_rewards, rejected_rewards = found[:5]
    weights = choice.operand.numbers.pair_weights
    return DPOOutput(
        loss, losses, chosen_rewards, rejected_rewards, logps, pairs, choice.loss.unpaired, None, None, weights
    )


def reduced(out: DPOOutput, choice: Choice, ref_logps: Tensor | None) -> DPOOutput:
    """Adds the terms that couple the batch, and reduces anew."""
    loss, n_pairs, weights = choice.loss, out.losses.shape[0], choice.operand.numbers.pair_weights
    if n_pairs == 0 and loss.num_pairs is None:
        _checks.pair_count(out.logps.shape[0], (0, 2))
    if loss.coupled:
        extra = coupled_losses(
            loss.coupled, out.logps, ref_logps, n_pairs, out.pairs, loss.beta, loss.label_smoothing, weights
        )
        losses = (out.losses.double() + extra).to(out.losses.dtype)
        total = out.loss.double() + extra.sum() / (loss.divisor or n_pairs)
        out = _replaced(out, losses=losses, loss=total.to(losses.dtype))
    if choice.reduction == "none":
        return _replaced(out, loss=out.losses)
    return out if loss.num_pairs is None else _replaced(out, loss=out.loss / loss.num_pairs)


def with_z_loss(
    out: DPOOutput, lse: Tensor, choice: Choice, targets: Tensor, kept: Tensor, seqs: Sequences
) -> DPOOutput:
    """Adds z_loss_weight times the mean of lse^2, as though to each pair's loss; lse: like targets, differentiable."""
    loss, n_pairs = choice.loss, out.losses.shape[0]
    live = live_rows(targets, kept, seqs.cu_seqlens, out.pairs, choice.operand.numbers.pair_weights)
    accurate = accurate_type(lse.device)
    squares = torch.where(live, lse, torch.zeros_like(lse)).to(accurate).square().sum()
    mean = squares / live.sum().clamp(min=1)
    extra = loss.z_loss_weight * mean * (n_pairs / (loss.divisor or max(n_pairs, 1)))
    return _replaced(out, loss=(out.loss.to(accurate) + extra).to(out.loss.dtype))


def with_tokens(
    out: DPOOutput,
    wanted: int,
    outputs: Sequence[str],
    tokens: Sequence[Tensor],
    targets: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
) -> DPOOutput:
    """Adds the statistics of tokens that were asked for, and their sums over sequences for `metrics()`."""
    if not outputs:
        return out
    logps, *extras = tokens
    names = [each.name for each in named_statistics(wanted)]
    asked = {name: extra.detach() for name, extra in zip(names, extras, strict=True) if name in outputs}
    found = TokenOutput(logps if "logps" in outputs else None, **asked)
    sums = {"lengths": kept, **asked}
    by_sequence = {name: sum_by_sequence(values.to(logps.dtype), cu_seqlens) for name, values in sums.items()}
    return _replaced(out, tokens=found, token_sums=by_sequence)


def loss_statistics(outputs: Sequence[str]) -> int:
    """The statistics of tokens that a loss is asked for."""
    wanted = _checks.wanted_statistics(outputs)
    if "log_sum_sq_probs" in outputs:
        raise ValueError("a loss gives no 'log_sum_sq_probs': see token_logps")
    return wanted


__all__ = [
    "Choice",
    "choose",
    "kept_rows",
    "loss_statistics",
    "output",
    "reduced",
    "token_weights_of",
    "with_pairs",
    "with_tokens",
    "with_z_loss",
]

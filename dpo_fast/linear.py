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

from dpo_fast._checks import (
    STATISTIC_BITS,
    LogitKeywords,
    grad_tolerances,
    named_statistics,
    number,
    only_logit_keywords,
    split_logit_keywords,
    truth,
    wanted_statistics,
)
from dpo_fast._loss.coupled import sides
from dpo_fast._loss.levels import (
    Choice,
    choose,
    loss_statistics,
    output,
    reduced,
    token_weights_of,
    with_pairs,
    with_tokens,
    with_z_loss,
)
from dpo_fast._loss.options import LossType
from dpo_fast._torch import register  # noqa: F401  (it defines torch.ops.dpo_fast)
from dpo_fast._torch.autograd import LinearDPOLoss, LinearTokenLogps, PreferenceLoss, run, wants_gradient
from dpo_fast._torch.checks import check_no_grad, check_sequences, plain_tensor, plain_tensors
from dpo_fast._torch.operators import (
    DPOForward,
    Head,
    LinearDPOForward,
    LinearTokenForward,
    PreferenceForward,
    Rows,
    Sequences,
    TokenForward,
)
from dpo_fast._torch.sequences import (
    accurate_type,
    count_targets,
    kept_rows,
    sum_in_order,
    token_factors,
    wpo_weights,
)
from dpo_fast._torch.tiles import LinearPlan, default_budget, plan_rows
from dpo_fast._torch.zero3 import gathered
from dpo_fast.losses import DPOKeywords
from dpo_fast.outputs import DPOOutput, TokenOutput

Lora = tuple[Tensor, Tensor, float]
Tolerance = float | tuple[float, float]


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


def gather(name: str, tensor: Any) -> Any:
    """A sharded parameter (DTensor, FSDP2) as a whole tensor, gathered once; others as plain tensors.

    Ranks hold different data: its gradient is averaged over them and scattered, as FSDP does with its own parameters.
    """
    if tensor is None:
        return None
    if hasattr(tensor, "ds_status"):  # DeepSpeed's, whole by now; backward asks for it again by this object
        return tensor
    if not hasattr(tensor, "full_tensor"):
        return plain_tensor(name, tensor)
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


_PARAMETERS = ("weight", "bias", "lora A", "lora B")


def _parameters(weight: Tensor, bias: Tensor | None, lora: Lora | None) -> tuple[Any, ...]:
    """The head's parameters as they are given, for DeepSpeed to gather."""
    if lora is None:
        return weight, bias
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"lora must be (A, B, scaling), found {type(lora).__name__}")
    return weight, bias, *lora[:2]


def _prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """The inputs as the operators take them: gathered where sharded, in autocast's type where that is on."""
    lora_a, lora_b, scaling = lora if lora is not None else (None, None, 1.0)
    if weight is None:
        raise TypeError("weight must be a tensor, found None")
    parameters = [gather(name, x) for name, x in zip(_PARAMETERS, (weight, bias, lora_a, lora_b), strict=True)]
    tensors: list[Any] = [hidden, *parameters]
    kind = hidden.device.type
    # the compiler of torch 2.6 does not trace the first question
    if (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    x, w, b, a_, b_ = tensors
    return x, w, b, a_, b_, number("lora scaling", scaling)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    lora: Lora | None = None,
    outputs: Sequence[str] = ("logps",),
    grad_tolerance: Tolerance = 0.0,
    memory_budget: int | None = None,
    compact: bool = True,
    **options: Unpack[LogitKeywords],
) -> TokenOutput:
    """`token_logps` of logits = hidden @ weight.T + bias, which are never built whole.

    Args:
        hidden: [S, T, H] or packed [N, H]; float32, float64, bfloat16 or float16.
        weight: [V, H], the LM head, in hidden's type (under autocast both are converted); a DTensor is gathered once.
        targets: [S, T] or [N], integers; row t predicts targets[:, t] (see `completion_targets`).
        bias: [V].
        lora: (A [r, H], B [V, r], scaling): adds scaling * (hidden @ A.T) @ B.T to the logits.
        outputs, options: as for `token_logps`.
        grad_tolerance: at least 0 and below 1: the softmax mass that gradients may leave out, never the target's. With
            g_n the gradient that comes in for a log-prob and m_n the mass left out of its row,
            sum_n |g_n| m_n <= grad_tolerance * sum_n |g_n|. One number, or a pair: for the gradients of hidden and A,
            and for those of weight, bias and B. Exact are 0 (the default), float64, compact=False, and calls with
            gradients of other statistics. docs/accuracy.md says what error follows; `skipped` what was left out.
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
    hidden, targets = plain_tensors(("hidden", "targets"), (hidden, targets))
    rows = Rows(targets, None, None, only_logit_keywords("linear_token_logps", options))
    found = _tokens(
        hidden, weight, bias, lora, rows, wanted_statistics(outputs), memory_budget, compact, grad_tolerance
    )
    return TokenOutput(**{name: found[name] for name in found if name != "logps" or "logps" in outputs})


def _tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    rows: Rows,
    wanted: int,
    memory_budget: int | None,
    compact: bool,
    grad_tolerance: Tolerance,
) -> dict[str, Tensor]:
    """Token log-probs and the statistics wanted, by name, and `skipped`; rows of weight 0 do not count."""
    budget, compact = default_budget(hidden.device, memory_budget), truth("compact", compact)
    with gathered(*_parameters(weight, bias, lora)):
        *tensors, scaling = _prepare(hidden, weight, bias, lora)
        keep, tolerances = wants_gradient(*tensors), grad_tolerances(grad_tolerance)
        head, skipped = _head(scaling, budget, tolerances), _skipped(hidden, keep, tolerances)
        # torch.compile's answer above is yes in any case; logits are kept for a backward that really follows
        follows = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        a = LinearTokenForward(head, TokenForward(rows, wanted, follows), compact)
        found = run(LinearTokenLogps, keep, *tensors, a, skipped)
    names = ("logps", *(each.name for each in named_statistics(wanted)))
    by_name = dict(zip(names, found, strict=True))
    return by_name if skipped is None else by_name | {"skipped": skipped}


def _head(scaling: float, budget: int, tolerances: tuple[float, float]) -> Head:
    """The head without its tensors, which autograd has to see one by one."""
    return Head(None, None, None, None, scaling, budget, *tolerances)  # type: ignore[arg-type]


def _skipped(hidden: Tensor, keep: bool, tolerances: tuple[float, float]) -> Tensor | None:
    """Where a backward pass says what it has left out; it cannot in a compiled graph."""
    if not keep or not any(tolerances) or torch.compiler.is_compiling():
        return None
    return torch.full((), float("nan"), device=hidden.device)


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
    grad_tolerance: Tolerance = 0.0,
    memory_budget: int | None = None,
    compact: bool = True,
    **options: Unpack[LogitKeywords],
) -> Tensor:
    """`sequence_logps` of logits = hidden @ weight.T + bias, which are never built whole.

    Args: as for `linear_token_logps` and `sequence_logps`.

    Returns:
        [S], float32 (float64 for float64 hidden), differentiable.

    Raises:
        ValueError, TypeError, IndexError: as these.
    """
    names = ("hidden", "targets", "cu_seqlens", "token_weights")
    hidden, targets, cu_seqlens, token_weights = plain_tensors(names, (hidden, targets, cu_seqlens, token_weights))
    check_no_grad("token_weights", token_weights)
    rows = Rows(targets, None, token_weights, only_logit_keywords("linear_sequence_logps", options))
    seqs = Sequences(cu_seqlens, truth("average", average))
    tokens, sums = _sums(hidden, weight, bias, lora, rows, seqs, 0, memory_budget, compact, grad_tolerance)
    return sums.to(tokens["logps"].dtype)


def _sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    rows: Rows,
    seqs: Sequences,
    wanted: int,
    memory_budget: int | None,
    compact: bool,
    grad_tolerance: Tolerance = 0.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Token log-probs and statistics, and the log-probs' sums over sequences, these in float64."""
    check_sequences(hidden, rows, seqs, "hidden")
    tokens = _tokens(hidden, weight, bias, lora, rows, wanted, memory_budget, compact, grad_tolerance)
    kept, accurate = (
        kept_rows(rows.targets, rows.options.ignore_index, rows.token_weights),
        accurate_type(hidden.device),
    )
    factors = token_factors(kept, rows.token_weights, seqs.cu_seqlens, seqs.average, accurate)
    # in the order of the loss's own sums: equal models give rewards of exactly 0, also in float64
    return tokens, sum_in_order(tokens["logps"].to(accurate) * factors, seqs.cu_seqlens)


def _reference(
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    rows: Rows,
    seqs: Sequences,
    memory_budget: int | None,
    compact: bool,
) -> Tensor:
    """The reference's log-probs [S], unrounded as the policy's own sums are: equal models give rewards of exactly 0."""
    try:
        return _sums(ref_hidden, ref_weight, ref_bias, None, rows, seqs, 0, memory_budget, compact)[1]
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the reference (ref_hidden, ref_weight, ref_bias): {error}") from error


def _level_by_level(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    rows: Rows,
    seqs: Sequences,
    choice: Choice,
    pairs: Tensor | None,
    ref_logps: Tensor | None,
    wpo: bool,
    wanted: int,
    outputs: Sequence[str],
    memory_budget: int | None,
) -> DPOOutput:
    """The loss level by level, with shapes that depend on no value: for `compact=False`."""
    all_wanted = wanted | (STATISTIC_BITS["log_sum_sq_probs"] if wpo else 0)
    tokens, sums = _sums(hidden, weight, bias, lora, rows, seqs, all_wanted, memory_budget, False)
    targets, ignore_index = rows.targets, rows.options.ignore_index
    kept = kept_rows(targets, ignore_index, rows.token_weights)
    operand = choice.pairs(pairs)
    if wpo:
        n_pairs = sums.shape[0] // 2 if pairs is None else pairs.shape[0]
        each = wpo_weights(tokens["logps"].detach(), tokens["log_sum_sq_probs"], kept, seqs.cu_seqlens)
        chosen, rejected = sides(each, n_pairs, pairs)
        weights, given = chosen * rejected, choice.operand.numbers.pair_weights
        if given is not None:  # a weight of 0 also against NaN
            weights = torch.where(given == 0, torch.zeros_like(weights), weights * given)
        operand = operand._replace(numbers=operand.numbers._replace(pair_weights=weights))
    lengths = count_targets(targets, seqs.cu_seqlens, ignore_index)
    keep = wants_gradient(sums)
    a = PreferenceForward(operand, ref_logps, lengths, hidden.dtype is not torch.float64, keep)
    wide = tokens["logps"].dtype
    loss, losses, *rewards = (value.to(wide) for value in run(PreferenceLoss, keep, sums, a))
    out = output((loss, losses, sums.to(wide), *rewards), choice, pairs)
    names = [each.name for each in named_statistics(wanted)]
    statistics = [tokens["logps"].detach(), *(tokens[name] for name in names)]
    out = with_tokens(out, wanted, outputs, statistics, targets, kept, seqs.cu_seqlens)
    return with_z_loss(out, tokens["lse"], choice, targets, kept, seqs) if choice.loss.z_loss_weight else out


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
    beta: float | Tensor = 0.1,
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
    outputs: Sequence[str] = (),
    grad_tolerance: Tolerance = 0.0,
    memory_budget: int | None = None,
    compact: bool = True,
    **options: Unpack[DPOKeywords],
) -> DPOOutput:
    """`dpo_loss` of logits = hidden @ weight.T + bias, which are never built whole.

    With gradients wanted, they are computed here, while a group's logits are there; backward scales them by the
    gradient that comes in. When gradients come into `losses` or `logps` besides `loss`, backward computes the logits
    again instead.

    Args:
        hidden, weight, targets, bias, lora, grad_tolerance, memory_budget, compact: as for `linear_token_logps`.
        ref_logps: [S], the reference model's sequence log-probs; or
        ref_hidden: like hidden, the reference model's hidden states, with ref_weight [V, H'] (default: weight) and
            ref_bias [V]. No gradient goes to any of them.
        all others: as for `dpo_loss`.

    Returns:
        DPOOutput, as `dpo_loss`.

    Raises:
        ValueError, TypeError, IndexError: as `dpo_loss` and `linear_token_logps`.
    """
    hidden, targets, ref_logps, ref_hidden, pairs, pair_weights, desirable, cu_seqlens, token_weights = plain_tensors(
        _TENSORS, (hidden, targets, ref_logps, ref_hidden, pairs, pair_weights, desirable, cu_seqlens, token_weights)
    )
    logit_options, keywords = split_logit_keywords(options), dict(**options)
    wpo, compact, wanted = truth("wpo", wpo), truth("compact", compact), loss_statistics(outputs)
    tolerances = grad_tolerances(grad_tolerance)
    choice = choose(
        keywords, hidden, beta, pair_weights, baseline, reduction, token_weights if ld_alpha is None else ld_alpha,
        ref_logps if ref_hidden is None else ref_hidden, loss_type, label_smoothing, average, wpo,
    )  # fmt: skip
    loss, seqs = choice.loss, Sequences(cu_seqlens, choice.loss.options.average)
    rows = Rows(targets, None, token_weights, logit_options)
    if loss.unpaired or desirable is not None or ld_alpha is not None or choice.operand.numbers.pair_beta is not None:
        n_seqs = check_sequences(hidden, rows, seqs, "hidden")
        choice, pairs = with_pairs(choice, n_seqs, pairs, desirable, hidden)
    looks_at_all = wpo or bool(outputs) or loss.z_loss_weight > 0
    weights = token_weights_of(
        loss, token_weights, ld_alpha, targets, pairs, cu_seqlens, logit_options.ignore_index, looks_at_all
    )
    rows = rows._replace(token_weights=weights)
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    if ref_hidden is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_hidden exclude each other: give one of them")
        with torch.no_grad():
            ref_logps = _reference(
                ref_hidden, weight if ref_weight is None else ref_weight, ref_bias, rows, seqs, memory_budget, compact
            )
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
    z_loss = loss.z_loss_weight > 0
    all_wanted = wanted | (STATISTIC_BITS["lse"] if z_loss else 0)
    if not compact:
        out = _level_by_level(
            hidden, weight, bias, lora, rows, seqs, choice, pairs, ref_logps, wpo, all_wanted, outputs, memory_budget
        )
        return reduced(out, choice, ref_logps)
    budget = default_budget(hidden.device, memory_budget)
    with gathered(*_parameters(weight, bias, lora)):
        *tensors, scaling = _prepare(hidden, weight, bias, lora)
        grad = torch.is_grad_enabled()
        needs = tuple([grad and isinstance(t, Tensor) and t.requires_grad for t in tensors])
        # gradients of "none" and of losses that couple the batch are made in backward
        early = needs if reduction != "none" and not loss.coupled else (False,) * len(needs)
        head, skipped = _head(scaling, budget, tolerances), _skipped(hidden, wants_gradient(*tensors), tolerances)
        dpo = DPOForward(rows, seqs, choice.pairs(pairs), ref_logps, wpo, all_wanted, True)
        a = LinearDPOForward(head, dpo, loss.z_loss_weight, early)
        found = run(LinearDPOLoss, wants_gradient(*tensors), *tensors, a, bool(outputs), skipped)
    out = output(found, choice, pairs)
    kept = kept_rows(targets, logit_options.ignore_index, weights) if outputs else targets
    out = with_tokens(out, all_wanted, outputs, found[5:], targets, kept, cu_seqlens)
    out = reduced(out, choice, ref_logps)
    return out if skipped is None else out._replace(skipped=skipped)


_TENSORS = (
    "hidden", "targets", "ref_logps", "ref_hidden", "pairs", "pair_weights", "desirable", "cu_seqlens", "token_weights"
)  # fmt: skip

__all__ = ["linear_dpo_loss", "linear_plan", "linear_sequence_logps", "linear_token_logps"]

"""Token and sequence log-probs and preference losses from hidden states and the LM head: logits never built whole.

    logits = hidden @ weight.T + bias, a tile of rows at a time, within `memory_budget` bytes

Ignored rows are dropped before any product. `linear_token_logps` keeps as many logits as the budget allows for its
backward pass and recomputes the rest. `linear_dpo_loss` takes groups of whole pairs that fit the budget through logits,
log-probs, loss, gradient of the logits (over the logits) and gradient products while the tile is there: three products,
not four; backward then only scales. Results do not depend on the budget beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast import ops
from dpo_fast._checks import (
    TOKEN_OUTPUTS,
    LogitOptions,
    LossOptions,
    check_reduction,
    check_shape,
    check_token_outputs,
    logit_options,
    loss_options,
)
from dpo_fast._head import (
    Head,
    HeadGrads,
    LinearPlan,
    Needs,
    default_budget,
    head_logits,
    plan_rows,
    tile_bounds,
)
from dpo_fast._sequences import check_cu_seqlens, kept_rows, spread_to_rows, sum_by_sequence, token_factors
from dpo_fast.logps import check_no_grad
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


# --- rows -------------------------------------------------------------------------------------------------------------


def _kept_index(kept: Tensor, compact: bool) -> Tensor | None:
    """Numbers of the rows that count; None: all of them (or, without compaction, all whatever their target)."""
    if not compact:
        return None
    index = kept.reshape(-1).nonzero().squeeze(-1)
    return None if index.shape[0] == kept.numel() else index


def _rows(index: Tensor | None, start: int, end: int) -> Tensor | slice:
    return slice(start, end) if index is None else index[start:end]


def _size(index: Tensor | None, n_rows: int) -> int:
    return n_rows if index is None else index.shape[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# --- token log-probs as operators -------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scaling, Tensor targets"
_OPTIONS = "int ignore_index, float temperature, float logit_scale, float softcap"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias, bool need_lora_a, bool need_lora_b"
_GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_lora_a, Tensor grad_lora_b"

SCHEMAS = {
    "linear_token_forward": f"({_HEAD}, {_OPTIONS}, bool entropy, bool mean_logits, bool is_top1, "
    "bool log_sum_sq_probs, int memory_budget, bool keep, bool compact) -> (Tensor logps, Tensor stats, "
    "Tensor entropy, Tensor mean_logits, Tensor is_top1, Tensor log_sum_sq_probs, Tensor buffer)",
    "linear_token_backward": f"({_HEAD}, {_OPTIONS}, Tensor logps, Tensor stats, Tensor? entropy, "
    "Tensor(a!)? buffer, Tensor? grad_logps, Tensor? grad_entropy, int memory_budget, bool compact, "
    f"{_NEEDS}) -> ({_GRADS})",
    "linear_dpo_forward": f"({_HEAD}, Tensor? ref_logps, Tensor? cu_seqlens, Tensor? token_weights, bool average, "
    f"Tensor? pairs, {_OPTIONS}, int loss_type, float beta, float label_smoothing, bool mean, int memory_budget, "
    f"bool compact, {_NEEDS}) -> (Tensor loss, Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, "
    f"Tensor seq_logps, Tensor logps, Tensor stats, Tensor pair_grads, {_GRADS})",
}


def _check_head(head: Head, hidden: Tensor, targets: Tensor) -> None:
    """Checks hidden [S, T, H] or [N, H], targets [S, T] or [N], and the head."""
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must have shape [S, T, H], or [N, H] when packed, found {tuple(hidden.shape)}")
    if hidden.dtype not in ops.LOGIT_TYPES:
        raise TypeError(f"hidden must be one of {', '.join(str(t) for t in ops.LOGIT_TYPES)}, found {hidden.dtype}")
    V = head.weight.shape[0] if head.weight.dim() else 0
    H = hidden.shape[-1]
    for name, tensor, shape in (
        ("weight", head.weight, (V, H)),
        ("bias", head.bias, (V,)),
        ("lora_a", head.lora_a, (head.lora_a.shape[0] if head.lora_a is not None else 0, H)),
        ("lora_b", head.lora_b, (V, head.lora_a.shape[0] if head.lora_a is not None else 0)),
    ):
        if tensor is None:
            continue
        check_shape(name, tensor.shape, shape, f"to fit hidden of shape {tuple(hidden.shape)} and the vocabulary")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} and hidden must have one type, found {tensor.dtype} and {hidden.dtype}")
        ops.check_device(name, tensor, hidden, "hidden")
    if V < 1:
        raise ValueError(f"weight must have at least one token in the vocabulary, found {tuple(head.weight.shape)}")
    ops.check_integers("targets", targets)
    ops.check_device("targets", targets, hidden, "hidden")
    check_shape("targets", targets.shape, hidden.shape[:-1], f"to fit hidden of shape {tuple(hidden.shape)}")


def _token_outputs(hidden: Tensor, targets: Tensor, want: tuple[bool, ...]) -> list[Tensor]:
    """Zeros for ignored rows: logps, stats and the statistics wanted."""
    wide, shape = _wide(hidden.dtype), tuple(targets.shape)
    out = [hidden.new_zeros(shape, dtype=wide), hidden.new_zeros((*shape, 2), dtype=wide)]
    for i, wanted in enumerate(want):
        out.append(hidden.new_zeros(shape if wanted else (0,), dtype=torch.bool if i == 2 else wide))
    return out


def _linear_token_forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    lora_a: Any,
    lora_b: Any,
    lora_scaling: float,
    targets: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _check_head(Head(weight, bias, lora_a, lora_b, lora_scaling), hidden, targets)
    want, (budget, keep, _) = rest[4:8], rest[8:]
    plan = plan_rows(targets.numel(), weight.shape[0], hidden.dtype.itemsize, budget, keep)
    buffer = hidden.new_empty((plan.buffer_rows if keep else 0, weight.shape[0]))
    return (*_token_outputs(hidden, targets, want), buffer)


def _linear_token_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    lora_a: Any,
    lora_b: Any,
    lora_scaling: float,
    targets: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, lora_a, lora_b, lora_scaling)
    _check_head(head, hidden, targets)
    options, want, (budget, keep, compact) = rest[:4], rest[4:8], rest[8:]
    V, itemsize = weight.shape[0], hidden.dtype.itemsize
    outputs = _token_outputs(hidden, targets, want)
    flat = [out.view(-1, 2) if i == 1 else out.view(-1) for i, out in enumerate(outputs)]
    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    index = _kept_index(y != options[0], compact)
    plan = plan_rows(_size(index, y.shape[0]), V, itemsize, budget, keep)
    # the buffer that is kept has a size that does not depend on which rows count
    size = plan_rows(y.shape[0], V, itemsize, budget, keep).buffer_rows if keep else plan.buffer_rows
    buffer = hidden.new_empty((size, V))
    for start, end, place in tile_bounds(plan):
        rows = _rows(index, start, end)
        z = buffer[place : place + end - start]
        head_logits(head, x[rows], z)
        tile = torch.ops.dpo_fast.token_forward(z, y[rows], None, *options, *want)
        for i, values in enumerate(tile):
            if i < 2 or want[i - 2]:
                flat[i][rows] = values
    return (*outputs, buffer if keep else buffer.new_empty((0, V)))


def _linear_token_backward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    lora_a: Any,
    lora_b: Any,
    lora_scaling: float,
    targets: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _grads_fake(hidden, Head(weight, bias, lora_a, lora_b, lora_scaling), Needs(*rest[-5:]), hidden.dtype)


def _early_grad_type(hidden: Tensor) -> torch.dtype:
    """The type of gradients made before the gradient that comes in is known: float16 waits for its loss scale."""
    return torch.float32 if hidden.dtype is torch.float16 else hidden.dtype


def _grads_fake(hidden: Tensor, head: Head, needs: Needs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    parameters = (hidden, head.weight, head.bias, head.lora_a, head.lora_b)
    return tuple(
        hidden.new_empty(p.shape, dtype=dtype) if need and p is not None else hidden.new_empty(0)
        for p, need in zip(parameters, needs, strict=True)
    )


def _linear_token_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scaling: float,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logps: Tensor,
    stats: Tensor,
    entropy: Tensor | None,
    buffer: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    budget: int,
    compact: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, lora_a, lora_b, lora_scaling)
    _check_head(head, hidden, targets)
    check_shape("logps", logps.shape, targets.shape, "as targets have")
    check_shape("stats", stats.shape, (*targets.shape, 2), "to fit the targets")
    options = (ignore_index, temperature, logit_scale, softcap)
    V = weight.shape[0]
    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    index = _kept_index(y != ignore_index, compact)
    plan = plan_rows(_size(index, y.shape[0]), V, hidden.dtype.itemsize, budget, buffer is not None)
    if buffer is None:
        buffer = hidden.new_empty((plan.buffer_rows, V))
    check_shape("buffer", buffer.shape, (max(plan.buffer_rows, buffer.shape[0]), V), "as forward left it")
    tiles = tile_bounds(plan)
    grads = HeadGrads(head, x, Needs(*needs), len(tiles), hidden.dtype)
    flat = [None if t is None else t.reshape(-1) for t in (logps, entropy, grad_logps, grad_entropy)]
    stats = stats.reshape(-1, 2)
    for start, end, place in tiles:
        rows = _rows(index, start, end)
        z, h = buffer[place : place + end - start], x[rows]
        if start >= plan.kept_rows:
            head_logits(head, h, z)
        lp, ent, g, g_ent = (None if t is None else t[rows] for t in flat)
        torch.ops.dpo_fast.token_backward_(z, y[rows], None, *options, lp, stats[rows], ent, g, g_ent)
        grads.add(z, h, rows)
    grad_hidden, *others = grads.result()
    return (grad_hidden.view(hidden.shape) if needs[0] else grad_hidden, *others)


# --- the loss as an operator ------------------------------------------------------------------------------------------


def _groups(pairs: list[tuple[int, int]], counts: list[int], fit: int) -> list[tuple[list[int], list[int]]]:
    """Groups of whole pairs, (sequences, pairs), whose rows fit; sequences that share a pair stay together.

    A group that cannot be split stands alone, however large. Sequences in no pair form the last groups.
    """
    parent = list(range(len(counts)))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for chosen, rejected in pairs:
        parent[root(rejected)] = root(chosen)
    components: dict[int, tuple[list[int], list[int]]] = {}
    for s in range(len(counts)):
        components.setdefault(root(s), ([], []))[0].append(s)
    for p, (chosen, _) in enumerate(pairs):
        components[root(chosen)][1].append(p)

    groups: list[tuple[list[int], list[int]]] = []
    size = fit + 1
    for seqs, pair_numbers in components.values():
        rows = sum(counts[s] for s in seqs)
        if size + rows > fit:
            groups.append(([], []))
            size = 0
        groups[-1][0].extend(seqs)
        groups[-1][1].extend(pair_numbers)
        size += rows
    return groups


def _check_dpo(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    pairs: Tensor | None,
) -> tuple[int, int]:
    """Returns the numbers of sequences and pairs."""
    _check_head(head, hidden, targets)
    n_seqs = ops.check_sequence_arguments(hidden, targets, cu_seqlens, token_weights, "hidden")
    return n_seqs, ops.check_pairs(hidden, n_seqs, pairs, ref_logps)


def _linear_dpo_forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    lora_a: Any,
    lora_b: Any,
    lora_scaling: float,
    targets: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, lora_a, lora_b, lora_scaling)
    n_seqs, n_pairs = _check_dpo(head, hidden, targets, ref_logps, cu_seqlens, token_weights, pairs)
    wide = _wide(hidden.dtype)
    return (
        *[hidden.new_empty(shape, dtype=wide) for shape in ((), (n_pairs,), (n_pairs,), (n_pairs,), (n_seqs,))],
        hidden.new_empty(targets.shape, dtype=wide),
        hidden.new_empty((*targets.shape, 2), dtype=wide),
        hidden.new_empty((n_pairs, 2), dtype=torch.float64),
        *_grads_fake(hidden, head, Needs(*rest[-5:]), _early_grad_type(hidden)),
    )


def _linear_dpo_forward(
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
    average: bool,
    pairs: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    loss_type: int,
    beta: float,
    label_smoothing: float,
    mean: bool,
    budget: int,
    compact: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, lora_a, lora_b, lora_scaling)
    n_seqs, n_pairs = _check_dpo(head, hidden, targets, ref_logps, cu_seqlens, token_weights, pairs)
    options, loss = (ignore_index, temperature, logit_scale, softcap), (loss_type, beta, label_smoothing)
    wide, V = _wide(hidden.dtype), weight.shape[0]
    outputs = _token_outputs(hidden, targets, ())
    logps, stats = outputs[0].view(-1), outputs[1].view(-1, 2)
    losses, chosen_rewards, rejected_rewards = (hidden.new_empty(n_pairs, dtype=wide) for _ in range(3))
    seq_logps = hidden.new_empty(n_seqs, dtype=wide)
    pair_grads = hidden.new_empty((n_pairs, 2), dtype=torch.float64)

    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = kept_rows(targets, ignore_index, token_weights)
    factors = token_factors(kept, token_weights, cu_seqlens, average, torch.float64).reshape(-1)
    index = _kept_index(kept, compact)
    if index is None:
        index = torch.arange(y.shape[0], device=y.device)
    T = targets.shape[-1] if cu_seqlens is None else 0
    bounds = [s * T for s in range(n_seqs + 1)] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, y.shape[0])
    places = torch.searchsorted(index, torch.tensor(bounds, device=index.device)).tolist()
    counts = [b - a for a, b in pairwise(places)]
    if pairs is None:
        pair_list = [(p, p + n_pairs) for p in range(n_pairs)]
    else:
        pair_list = [(c, d) for c, d in pairs.tolist()]
        for p, pair in enumerate(pair_list):
            for k, s in enumerate(pair):
                if not 0 <= s < n_seqs:
                    raise IndexError(f"pairs[{p}, {k}] = {s} is outside [0, {n_seqs})")

    wanted = any(needs)
    whole = plan_rows(index.shape[0], V, hidden.dtype.itemsize, budget, False)
    fit = whole.buffer_rows if index.shape[0] else 1
    groups = _groups(pair_list, counts, fit)
    sizes = [sum(counts[s] for s in seqs) for seqs, _ in groups]
    buffer = hidden.new_empty((min(fit, max(sizes)), V))
    n_tiles = sum(math.ceil(size / fit) for size in sizes)
    grads = HeadGrads(head, x, Needs(*needs), n_tiles, _early_grad_type(hidden))
    one = torch.ones((), dtype=wide, device=hidden.device)
    for (seqs, pair_numbers), size in zip(groups, sizes, strict=True):
        rows = torch.cat([index[places[s] : places[s + 1]] for s in seqs])
        tiles = [(a, min(a + fit, size)) for a in range(0, size, fit)]
        for a, b in tiles:
            z = buffer[: b - a]
            head_logits(head, x[rows[a:b]], z)
            tile = torch.ops.dpo_fast.token_forward(z, y[rows[a:b]], None, *options, False, False, False, False)
            logps[rows[a:b]], stats[rows[a:b]] = tile[0], tile[1]
        lengths = torch.tensor([counts[s] for s in seqs], device=hidden.device)
        weighted = logps[rows].double() * factors[rows]
        # a row that is not dropped but ignored has log-prob 0
        values = torch.segment_reduce(weighted, "sum", lengths=lengths, initial=0).to(wide)
        members = torch.tensor(seqs, device=hidden.device)
        seq_logps[members] = values
        if not pair_numbers:
            continue
        local = {s: i for i, s in enumerate(seqs)}
        local_pairs = torch.tensor([[local[s] for s in pair_list[p]] for p in pair_numbers], device=hidden.device)
        numbers = torch.tensor(pair_numbers, device=hidden.device)
        ref = None if ref_logps is None else ref_logps[members]
        found = torch.ops.dpo_fast.preference_forward(values, ref, local_pairs, *loss, False)
        for out, value in zip((losses, chosen_rewards, rejected_rewards, pair_grads), found[1:], strict=True):
            out[numbers] = value
        if not wanted:
            continue
        g = torch.ops.dpo_fast.preference_backward(values, local_pairs, False, found[4], one, None)
        row_grads = (torch.repeat_interleave(g.double() / (n_pairs if mean else 1), lengths) * factors[rows]).to(wide)
        scale = 1.0
        if hidden.dtype is torch.float16 and size:  # the loss scale of mixed precision comes only later: no underflow
            scale = 2.0 ** max(0, -math.frexp(row_grads.abs().max().item())[1])
        for a, b in tiles:
            z, h = buffer[: b - a], x[rows[a:b]]
            if len(tiles) > 1:  # a pair too large for the budget: its logits are made again
                head_logits(head, h, z)
            torch.ops.dpo_fast.token_backward_(
                z, y[rows[a:b]], None, *options, logps[rows[a:b]], stats[rows[a:b]], None, row_grads[a:b] * scale, None
            )
            grads.add(z, h, rows[a:b], 1 / scale)
    total = losses.double().sum()
    grad_hidden, *others = grads.result()
    return (
        (total / n_pairs if mean else total).to(wide),
        losses,
        chosen_rewards,
        rejected_rewards,
        seq_logps,
        *outputs,
        pair_grads,
        grad_hidden.view(hidden.shape) if needs[0] else grad_hidden,
        *others,
    )


ops.define("linear_token_forward", SCHEMAS["linear_token_forward"], _linear_token_forward, _linear_token_forward_fake)
ops.define(
    "linear_token_backward", SCHEMAS["linear_token_backward"], _linear_token_backward, _linear_token_backward_fake
)
ops.define("linear_dpo_forward", SCHEMAS["linear_dpo_forward"], _linear_dpo_forward, _linear_dpo_forward_fake)


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
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        hidden, weight, bias, lora_a, lora_b, targets, logps, stats, entropy = ctx.saved_tensors
        if not ctx.has_entropy:
            entropy = grad_entropy = None
        if grad_logps is None and grad_entropy is None:
            return (None,) * 12
        needs = ctx.needs_input_grad[:5]
        # the kept logits are written over: a second backward makes them again
        buffer, ctx.buffer = ctx.buffer, None
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
        average: bool,
        pairs: Tensor | None,
        options: LogitOptions,
        loss_options: LossOptions,
        mean: bool,
        budget: int,
        compact: bool,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        out = torch.ops.dpo_fast.linear_dpo_forward(
            hidden, weight, bias, lora_a, lora_b, lora_scaling, targets, ref_logps, cu_seqlens, token_weights, average,
            pairs, *options, *loss_options, mean, budget, compact, *needs,
        )  # fmt: skip
        loss, losses, chosen_rewards, rejected_rewards, seq_logps, logps, stats, pair_grads, *grads = out
        ctx.save_for_backward(
            hidden, weight, bias, lora_a, lora_b, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads
        )
        ctx.lora_scaling, ctx.average, ctx.options, ctx.mean = lora_scaling, average, options, mean
        ctx.budget, ctx.compact, ctx.grads, ctx.n_seqs = budget, compact, grads, seq_logps.shape[0]
        ctx.mark_non_differentiable(chosen_rewards, rejected_rewards)
        ctx.set_materialize_grads(False)
        return loss, losses, chosen_rewards, rejected_rewards, seq_logps

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_loss: Tensor | None,
        grad_losses: Tensor | None,
        grad_chosen: Any,
        grad_rejected: Any,
        grad_seq_logps: Tensor | None,
    ) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        hidden, weight, bias, lora_a, lora_b, targets, cu_seqlens, token_weights, pairs, logps, stats, pair_grads = (
            saved
        )
        needs = ctx.needs_input_grad[:5]
        if grad_loss is None and grad_losses is None and grad_seq_logps is None:
            return (None,) * 18
        grads, ctx.grads = ctx.grads, None
        if grads is not None and grad_loss is not None and grad_losses is None and grad_seq_logps is None:
            # made in forward, for a gradient of 1
            if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
                grads = [grad.mul_(grad_loss) for grad in grads]
            grads = [grad.to(hidden.dtype) for grad in grads]
            return (*_optional(grads, needs), *(None,) * 13)
        del grads
        like = logps.new_empty(ctx.n_seqs)
        g = torch.ops.dpo_fast.preference_backward(like, pairs, ctx.mean, pair_grads, grad_loss, grad_losses)
        if grad_seq_logps is not None:
            g = g + grad_seq_logps
        kept = kept_rows(targets, ctx.options.ignore_index, token_weights)
        factors = token_factors(kept, token_weights, cu_seqlens, ctx.average, logps.dtype)
        grad_logps = factors * spread_to_rows(g, cu_seqlens, factors.shape)
        targets = targets.masked_fill(~kept, ctx.options.ignore_index)
        out = torch.ops.dpo_fast.linear_token_backward(
            hidden, weight, bias, lora_a, lora_b, ctx.lora_scaling, targets, *ctx.options, logps, stats, None, None,
            grad_logps, None, ctx.budget, ctx.compact, *needs,
        )  # fmt: skip
        return (*_optional(out, needs), *(None,) * 13)


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
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
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
        compact: drop ignored rows before the products. False keeps all shapes independent of the data (CUDA graphs).

    Returns:
        TokenOutput as from `token_logps`. Gradients: hidden, weight, bias, A and B, as far as they require them;
        weight and bias gradients are summed in float32 over tiles.

    Raises:
        ValueError, TypeError, IndexError: as `token_logps`, also for a head that does not fit hidden.
    """
    check_token_outputs(outputs)
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    head = _prepare(hidden, weight, bias, lora)
    budget = default_budget(hidden.device, memory_budget)
    want = tuple(name in outputs for name in TOKEN_OUTPUTS[1:])
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
    check_no_grad("token_weights", token_weights)
    ops.check_sequence_arguments(hidden, targets, cu_seqlens, token_weights, "hidden")
    kept = kept_rows(targets, ignore_index, token_weights)
    logps = linear_token_logps(
        hidden,
        weight,
        targets.masked_fill(~kept, ignore_index),
        bias,
        lora=lora,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        memory_budget=memory_budget,
        compact=compact,
    ).logps
    factors = token_factors(kept, token_weights, cu_seqlens, average, torch.float64)
    return sum_by_sequence(logps.double() * factors, cu_seqlens).to(logps.dtype)


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
    memory_budget: int | None = None,
    compact: bool = True,
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
    check_reduction(reduction)
    check_no_grad("token_weights", token_weights)
    options = logit_options(ignore_index, temperature, logit_scale, softcap)
    loss = loss_options(loss_type, beta, label_smoothing)
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden")
    if ref_hidden is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_hidden exclude each other: give one of them")
        with torch.no_grad():
            ref_logps = linear_sequence_logps(
                ref_hidden,
                weight if ref_weight is None else ref_weight,
                targets,
                ref_bias,
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
    head = _prepare(hidden, weight, bias, lora)
    budget = default_budget(hidden.device, memory_budget)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and isinstance(t, Tensor) and t.requires_grad for t in head[:5])
    reduced, losses, chosen_rewards, rejected_rewards, logps = _LinearDPOLoss.apply(
        *head,
        targets,
        None if ref_logps is None else ref_logps.detach(),
        cu_seqlens,
        token_weights,
        average,
        pairs,
        options,
        loss,
        reduction == "mean",
        budget,
        compact,
        # the gradient of "none" is not one number: it is made in backward
        needs if reduction != "none" else (False,) * 5,
    )
    return DPOOutput(losses if reduction == "none" else reduced, losses, chosen_rewards, rejected_rewards, logps, pairs)


__all__ = ["linear_dpo_loss", "linear_plan", "linear_sequence_logps", "linear_token_logps"]

"""The operators of the linear head, `torch.ops.dpo_fast.linear_*`: tiles of logits between products and row kernels.

    linear_token_forward   hidden, head, targets -> token log-probs and statistics, and the logits kept for backward
    linear_token_backward  incoming gradients -> gradients of hidden, weight, bias and LoRA
    linear_dpo_forward     ... -> losses, and these gradients already, a group of whole pairs at a time

One implementation for all devices: the products are torch's, the rest goes through the operators of ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast import ops
from dpo_fast._checks import LogitOptions, check_shape
from dpo_fast._head import Head, HeadGrads, Needs, head_logits, plan_rows, tile_bounds
from dpo_fast._loss_options import PAIR_LOSSES, LossFlags, LossOptions
from dpo_fast._sequences import (
    check_cu_seqlens,
    check_pair_numbers,
    kept_rows,
    sum_by_sequence,
    token_factors,
    wide_type,
    wpo_weights,
)

PAIR_FLAGS = [flags for _, flags in PAIR_LOSSES.values()]

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


# --- token log-probs as operators -------------------------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float lora_scaling, Tensor targets"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias, bool need_lora_a, bool need_lora_b"
_GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor grad_lora_a, Tensor grad_lora_b"

SCHEMAS = {
    "linear_token_forward": f"({_HEAD}, {ops.OPTIONS}, bool entropy, bool mean_logits, bool is_top1, "
    "bool log_sum_sq_probs, int memory_budget, bool keep, bool compact) -> (Tensor logps, Tensor stats, "
    "Tensor entropy, Tensor mean_logits, Tensor is_top1, Tensor log_sum_sq_probs, Tensor buffer)",
    "linear_token_backward": f"({_HEAD}, {ops.OPTIONS}, Tensor logps, Tensor stats, Tensor? entropy, "
    "Tensor(a!)? buffer, Tensor? grad_logps, Tensor? grad_entropy, int memory_budget, bool compact, "
    f"{_NEEDS}) -> ({_GRADS})",
    "linear_dpo_forward": f"({_HEAD}, Tensor? ref_logps, Tensor? cu_seqlens, Tensor? token_weights, bool average, "
    f"{ops.PAIRS}, {ops.OPTIONS}, {ops.LOSS}, bool wpo, bool entropy, bool mean_logits, bool is_top1, "
    f"int memory_budget, {_NEEDS}) -> (Tensor loss, Tensor losses, Tensor chosen_rewards, "
    "Tensor rejected_rewards, Tensor seq_logps, Tensor logps, Tensor stats, Tensor pair_grads, Tensor entropy, "
    f"Tensor mean_logits, Tensor is_top1, {_GRADS})",
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
    wide, shape = wide_type(hidden.dtype), tuple(targets.shape)
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
        if chosen >= 0 and rejected >= 0:
            parent[root(rejected)] = root(chosen)
    components: dict[int, tuple[list[int], list[int]]] = {}
    for s in range(len(counts)):
        components.setdefault(root(s), ([], []))[0].append(s)
    for p, (chosen, rejected) in enumerate(pairs):
        components[root(chosen if chosen >= 0 else rejected)][1].append(p)

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


class _Arguments(NamedTuple):
    """What stands behind the targets in linear_dpo_forward."""

    ref_logps: Tensor | None
    cu_seqlens: Tensor | None
    token_weights: Tensor | None
    average: bool
    pairs: Tensor | None
    pair_weights: Tensor | None
    baseline: Tensor | None
    options: LogitOptions
    loss: LossOptions
    divisor: float
    wpo: bool
    want: tuple[bool, bool, bool]
    budget: int
    needs: Needs

    @classmethod
    def parse(cls, args: Sequence[Any]) -> _Arguments:
        n = 11 + ops.N_LOSS
        loss = LossOptions(*args[11:n])
        divisor, wpo, entropy, mean_logits, is_top1, budget = args[n : n + 6]
        want = (entropy, mean_logits, is_top1)
        needs = Needs(*args[n + 6 :])
        return cls(*args[:7], LogitOptions(*args[7:11]), loss, divisor, wpo, want, budget, needs)  # type: ignore[call-arg]

    def check(self, head: Head, hidden: Tensor, targets: Tensor) -> tuple[int, int]:
        """Returns the numbers of sequences and pairs."""
        _check_head(head, hidden, targets)
        n_seqs = ops.check_sequence_arguments(hidden, targets, self.cu_seqlens, self.token_weights, "hidden")
        return n_seqs, ops.check_pairs(hidden, n_seqs, self.pairs, self.ref_logps, self.pair_weights, self.baseline)


def _linear_dpo_forward_fake(
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
    args = _Arguments.parse(rest)
    n_seqs, n_pairs = args.check(head, hidden, targets)
    wide = wide_type(hidden.dtype)
    return (
        *[hidden.new_empty(shape, dtype=wide) for shape in ((), (n_pairs,), (n_pairs,), (n_pairs,), (n_seqs,))],
        hidden.new_empty(targets.shape, dtype=wide),
        hidden.new_empty((*targets.shape, 2), dtype=wide),
        hidden.new_empty((n_pairs, 2), dtype=torch.float64),
        *_token_outputs(hidden, targets, args.want)[2:],
        *_grads_fake(hidden, head, args.needs, _early_grad_type(hidden)),
    )


class _Batch:
    """The rows that count of one call, by sequence and group."""

    def __init__(self, args: _Arguments, targets: Tensor, n_seqs: int, n_pairs: int, fit_rows: int) -> None:
        kept = kept_rows(targets, args.options.ignore_index, args.token_weights)
        factors = token_factors(kept, args.token_weights, args.cu_seqlens, args.average, torch.float64)
        self.factors = factors.reshape(-1)
        self.index = kept.reshape(-1).nonzero().squeeze(-1)
        T = targets.shape[-1]
        if args.cu_seqlens is None:
            bounds = [s * T for s in range(n_seqs + 1)]
        else:
            bounds = check_cu_seqlens(args.cu_seqlens, targets.numel())
        self.places = torch.searchsorted(self.index, torch.tensor(bounds, device=targets.device)).tolist()
        self.counts = [b - a for a, b in pairwise(self.places)]
        if args.pairs is None:
            self.pairs = [(p, p + n_pairs) for p in range(n_pairs)]
        else:
            self.pairs = [(c, d) for c, d in check_pair_numbers(args.pairs, n_seqs, absent=True)]
        self.fit = min(fit_rows, self.index.shape[0]) or 1
        self.groups = _groups(self.pairs, self.counts, self.fit)
        self.sizes = [sum(self.counts[s] for s in seqs) for seqs, _ in self.groups]
        # tokens, also those of weight 0, as the losses count them
        self.lengths = sum_by_sequence((targets != args.options.ignore_index).double(), args.cu_seqlens)

    def rows(self, seqs: Sequence[int]) -> Tensor:
        """Numbers of the rows of these sequences."""
        return torch.cat([self.index[self.places[s] : self.places[s + 1]] for s in seqs])

    def loss(self, args: _Arguments) -> LossOptions:
        """The loss's options with what couples its pairs, chosen tokens per pair, counted over the whole batch."""
        if args.loss.tokens_per_pair != 0 or not any(PAIR_FLAGS[t] & LossFlags.LENGTHS for t in args.loss.types):
            return args.loss
        lengths = self.lengths.tolist()
        return args.loss._replace(tokens_per_pair=sum(lengths[c] for c, _ in self.pairs) / len(self.pairs))


def _group_losses(
    args: _Arguments,
    loss: LossOptions,
    batch: _Batch,
    group: tuple[list[int], list[int]],
    values: Tensor,
    seq_weights: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Numbers of a group's pairs, in the batch and as pairs of its sequences, and what preference_forward says."""
    seqs, pair_numbers = group
    local = {s: i for i, s in enumerate(seqs)} | {-1: -1}
    device = values.device
    local_pairs = torch.tensor([[local[s] for s in batch.pairs[p]] for p in pair_numbers], device=device)
    numbers = torch.tensor(pair_numbers, device=device)
    members = torch.tensor(seqs, device=device)
    weights = None if args.pair_weights is None else args.pair_weights[numbers]
    if seq_weights is not None:
        wpo = seq_weights[local_pairs[:, 0]] * seq_weights[local_pairs[:, 1]]
        weights = wpo if weights is None else wpo * weights
    ref = None if args.ref_logps is None else args.ref_logps[members]
    found = torch.ops.dpo_fast.preference_forward(
        values, ref, batch.lengths[members], local_pairs, weights, args.baseline, *loss, 1.0
    )
    return numbers, local_pairs, found


def _underflow_scale(row_grads: Tensor) -> float:
    """A power of 2 that keeps float16 gradients from vanishing: mixed precision's loss scale comes only later."""
    if not row_grads.numel():
        return 1.0
    return 2.0 ** max(0, -math.frexp(row_grads.abs().max().item())[1])


def _linear_dpo_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scaling: float,
    targets: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    head = Head(weight, bias, lora_a, lora_b, lora_scaling)
    args = _Arguments.parse(rest)
    n_seqs, n_pairs = args.check(head, hidden, targets)
    wide, V, options = wide_type(hidden.dtype), weight.shape[0], args.options
    outputs = _token_outputs(hidden, targets, (*args.want, args.wpo))
    flat = [out.view(-1, 2) if i == 1 else out.view(-1) for i, out in enumerate(outputs)]
    logps, stats = flat[:2]
    losses, chosen_rewards, rejected_rewards = (hidden.new_empty(n_pairs, dtype=wide) for _ in range(3))
    seq_logps = hidden.new_empty(n_seqs, dtype=wide)
    pair_grads = hidden.new_empty((n_pairs, 2), dtype=torch.float64)

    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    fit_rows = plan_rows(y.shape[0], V, hidden.dtype.itemsize, args.budget, False).buffer_rows
    batch = _Batch(args, targets, n_seqs, n_pairs, fit_rows)
    fit, loss = batch.fit, batch.loss(args)
    divisor = args.divisor or n_pairs
    buffer = hidden.new_empty((min(fit, max(batch.sizes)), V))
    n_tiles = sum(math.ceil(size / fit) for size in batch.sizes)
    grads = HeadGrads(head, x, args.needs, n_tiles, _early_grad_type(hidden))
    one = torch.ones((), dtype=torch.float64, device=hidden.device)
    for group, size in zip(batch.groups, batch.sizes, strict=True):
        seqs = group[0]
        rows = batch.rows(seqs)
        tiles = [(a, min(a + fit, size)) for a in range(0, size, fit)]
        for a, b in tiles:
            z = buffer[: b - a]
            head_logits(head, x[rows[a:b]], z)
            tile = torch.ops.dpo_fast.token_forward(z, y[rows[a:b]], None, *options, *args.want, args.wpo)
            for i, found in enumerate(tile):
                if i < 2 or (*args.want, args.wpo)[i - 2]:
                    flat[i][rows[a:b]] = found
        counts = torch.tensor([batch.counts[s] for s in seqs], device=hidden.device)
        weighted = logps[rows].double() * batch.factors[rows]
        values = torch.segment_reduce(weighted, "sum", lengths=counts, initial=0)
        if ops.rounds_sums(hidden, args.ref_logps):
            values = values.float().double()
        seq_logps[torch.tensor(seqs, device=hidden.device)] = values.to(wide)
        if not group[1]:
            continue
        seq_weights = None
        if args.wpo:
            cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            counted = torch.ones_like(rows, dtype=torch.bool)
            seq_weights = wpo_weights(logps[rows], flat[5][rows], counted, cu_seqlens)
        numbers, local_pairs, found = _group_losses(args, loss, batch, group, values, seq_weights)
        for out, value in zip((losses, chosen_rewards, rejected_rewards, pair_grads), found[1:], strict=True):
            out[numbers] = value.to(out.dtype)
        if not any(args.needs):
            continue
        g = torch.ops.dpo_fast.preference_backward(values, local_pairs, 1.0, found[4], one, None)
        row_grads = (torch.repeat_interleave(g.double() / divisor, counts) * batch.factors[rows]).to(wide)
        scale = _underflow_scale(row_grads) if hidden.dtype is torch.float16 else 1.0
        for a, b in tiles:
            z, h = buffer[: b - a], x[rows[a:b]]
            if len(tiles) > 1:  # a pair too large for the budget: its logits are made again
                head_logits(head, h, z)
            torch.ops.dpo_fast.token_backward_(
                z, y[rows[a:b]], None, *options, logps[rows[a:b]], stats[rows[a:b]], None, row_grads[a:b] * scale, None
            )
            grads.add(z, h, rows[a:b], 1 / scale)
    grad_hidden, *others = grads.result()
    return (
        (losses.double().sum() / divisor).to(wide),
        losses,
        chosen_rewards,
        rejected_rewards,
        seq_logps,
        *outputs[:2],
        pair_grads,
        *outputs[2:5],
        grad_hidden.view(hidden.shape) if args.needs.hidden else grad_hidden,
        *others,
    )


ops.define("linear_token_forward", SCHEMAS["linear_token_forward"], _linear_token_forward, _linear_token_forward_fake)
ops.define(
    "linear_token_backward", SCHEMAS["linear_token_backward"], _linear_token_backward, _linear_token_backward_fake
)
ops.define("linear_dpo_forward", SCHEMAS["linear_dpo_forward"], _linear_dpo_forward, _linear_dpo_forward_fake)

"""The operators of the linear head, for every device: tiles of logits between products and row kernels.

The products are torch's, everything else goes through the operators of logits. Rows that do not count are dropped
before any product, rows without a gradient before any product of gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpo_fast._checks import STATISTIC_BITS, named_statistics, only_statistic
from dpo_fast._loss.options import LossOptions, PairNumbers, tokens_per_pair
from dpo_fast._torch import shapes
from dpo_fast._torch.head import HeadSums, early_type, head_logits, range_scale, trimmed
from dpo_fast._torch.operators import (
    PREFERENCE_BACKWARD,
    PREFERENCE_FORWARD,
    ROWS_BACKWARD_INPLACE,
    TOKEN_FORWARD,
    DPOForward,
    Grads,
    LinearDPOForward,
    LinearDPOResult,
    LinearTokenBackward,
    LinearTokenForward,
    LinearTokenGradients,
    LinearTokenResult,
    Pairs,
    PreferenceBackward,
    PreferenceForward,
    PreferenceResult,
    Rows,
    RowsBackward,
    Saved,
    Sequences,
    TokenForward,
    TokenResult,
    call,
)
from dpo_fast._torch.sequences import (
    check_cu_seqlens,
    check_pair_numbers,
    count_targets,
    kept_rows,
    refuse_bad_targets,
    token_factors,
    wpo_weights,
)
from dpo_fast._torch.sparse_head import Allowance, Skipped, Tile, add_tile, allowance
from dpo_fast._torch.tiles import plan_rows, tile_bounds

_NO_SEQUENCES = Sequences(None, False)


def _part(rows: Rows, index: Tensor | slice) -> Rows:
    """Some rows of a trimmed head; weights decide only which rows count, which `kept_rows` has looked at."""
    return Rows(rows.targets.reshape(-1)[index], None, None, rows.options._replace(valid_vocab=0))


def _kept(rows: Rows) -> Tensor:
    return kept_rows(rows.targets, rows.options.ignore_index, rows.token_weights).reshape(-1)


def _numbers(chosen: Tensor, compact: bool) -> Tensor | None:
    """Numbers of the chosen rows; None: all of them (or, without compaction, all whichever are chosen)."""
    if not compact:
        return None
    index = chosen.nonzero().squeeze(-1)
    return None if index.shape[0] == chosen.numel() else index


def _tile(index: Tensor | None, start: int, end: int) -> Tensor | slice:
    return slice(start, end) if index is None else index[start:end]


def _zeros(result: TokenResult) -> TokenResult:
    """The results of all rows, flat, to be filled by tiles; rows that do not count keep their zeros."""
    for tensor in (result.logps, result.stats, *result.statistics):
        tensor.zero_()
    return TokenResult(result.logps.view(-1), result.stats.view(-1, 2), [each.view(-1) for each in result.statistics])


def _fill(tokens: TokenResult, z: Tensor, rows: Rows, index: Tensor | slice, wanted: int) -> None:
    """Fills in the rows of a tile of logits."""
    try:
        found = call(TOKEN_FORWARD, z, TokenForward(_part(rows, index), wanted, True))
    except IndexError:  # its position is one in the tile: say where it is among the caller's
        kept = kept_rows(rows.targets, rows.options.ignore_index, rows.token_weights)
        refuse_bad_targets(rows.targets, kept, z.shape[-1])
        raise
    tokens.logps[index], tokens.stats[index] = found.logps, found.stats
    for all_rows, values in zip(tokens.statistics, found.statistics, strict=True):
        all_rows[index] = values


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The types are chosen here: autocast would take float32 products back to the type whose range they left."""

    @functools.wraps(function)
    def wrapper(hidden: Tensor, a: Any) -> Any:
        kind = hidden.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(hidden, a)
        with torch.autocast(kind, enabled=False):
            return function(hidden, a)

    return wrapper


@_without_autocast
def linear_token_forward(hidden: Tensor, a: LinearTokenForward) -> LinearTokenResult:
    out, (rows, wanted, keep) = shapes.linear_token_forward(hidden, a), a.tokens
    head = trimmed(a.head, rows.options)
    vocab, tokens = head.weight.shape[0], _zeros(out.tokens)
    x = hidden.reshape(-1, hidden.shape[-1])
    kept = _kept(rows)
    rows = rows._replace(targets=rows.targets.masked_fill(~kept.view(rows.targets.shape), rows.options.ignore_index))
    index = _numbers(kept, a.compact)
    n_rows = x.shape[0] if index is None else index.shape[0]
    plan = plan_rows(n_rows, vocab, hidden.dtype.itemsize, head.budget, keep)
    buffer = hidden.new_empty((plan.buffer_rows, vocab)) if out.buffer is None else out.buffer
    for start, end, place in tile_bounds(plan):
        part, z = _tile(index, start, end), buffer[place : place + end - start]
        head_logits(head, x[part], z)
        _fill(tokens, z, rows, part, wanted)
    return out


@_without_autocast
def linear_token_backward(hidden: Tensor, a: LinearTokenBackward) -> LinearTokenGradients:
    shapes.linear_token_backward(hidden, a)
    head, options = trimmed(a.head, a.rows.options), a.rows.options
    vocab, x = head.weight.shape[0], hidden.reshape(-1, hidden.shape[-1])
    incoming = [None if g is None else g.reshape(-1) for g in (a.grad.logps, *a.grad.statistics)]
    kept = _kept(a.rows)
    skipped = Skipped(head, hidden)
    allowed = None
    if a.compact and incoming[0] is not None:  # without compaction nothing is read on the host
        of_kept = Grads(torch.where(kept, incoming[0], 0), tuple(incoming[1:]))
        allowed = allowance(head, a.needs, of_kept, kept.sum().clamp(min=1))
    moved = torch.zeros_like(kept)
    for g in incoming:
        moved = moved if g is None else moved | (g != 0)
    rows = a.rows._replace(targets=a.rows.targets.reshape(-1).masked_fill(~kept, options.ignore_index))
    # kept logits lie by the rows that count, whether they have a gradient or not
    index = _numbers(kept if a.buffer is not None else kept & moved, a.compact)
    n_rows = x.shape[0] if index is None else index.shape[0]
    plan = plan_rows(n_rows, vocab, hidden.dtype.itemsize, head.budget, a.buffer is not None)
    buffer = hidden.new_empty((plan.buffer_rows, vocab)) if a.buffer is None else a.buffer
    if buffer.shape[0] < plan.buffer_rows or buffer.shape[1] != vocab:
        raise ValueError(
            f"buffer must be as forward left it, [{plan.buffer_rows}, {vocab}], found {tuple(buffer.shape)}"
        )
    tiles = tile_bounds(plan)
    sums = HeadSums(head, x, a.needs, len(tiles), hidden.dtype)
    scale, unscaled = range_scale(incoming, hidden.dtype), incoming[0]
    if unscaled is not None:
        skipped.count(unscaled[kept])
    if scale is not None:
        incoming = [None if g is None else g * scale for g in incoming]
    saved = [None if t is None else t.reshape(-1) for t in (a.saved.logps, a.saved.entropy)]
    stats = a.saved.stats.reshape(-1, 2)
    for start, end, place in tiles:
        part, z = _tile(index, start, end), buffer[place : place + end - start]
        if start >= plan.kept_rows:
            head_logits(head, x[part], z)
        if allowed is not None and unscaled is not None:
            saved_rows = saved[0][part], stats[part]  # type: ignore[index]
            tile = Tile(z, x[part], _row_numbers(part, x), _part(rows, part), *saved_rows, unscaled[part], scale)
            if skipped.add(add_tile(sums, tile, allowed.of(part), _logits_gradient)):
                continue
        logps, entropy, g, *of_statistics = (None if t is None else t[part] for t in (*saved, *incoming))
        _logits_gradient(z, _part(rows, part), logps, stats[part], entropy, Grads(g, tuple(of_statistics)))
        # a row without a gradient takes no part in the products, whatever its numbers are
        sums.add(z, x[part].masked_fill(~moved[part].unsqueeze(-1), 0), part, 1.0 if scale is None else 1 / scale)
    found = sums.result(a.head)
    found = found if found.hidden is None else found._replace(hidden=found.hidden.view(hidden.shape))
    return LinearTokenGradients(found, skipped.share())


def _row_numbers(part: Tensor | slice, x: Tensor) -> Tensor:
    return part if isinstance(part, Tensor) else torch.arange(part.start, part.stop, device=x.device)


def _logits_gradient(z: Tensor, rows: Rows, logps: Any, stats: Tensor, entropy: Tensor | None, grad: Grads) -> None:
    """Writes a tile's gradient over its logits."""
    saved = Saved(logps, stats, entropy, None, None)
    call(ROWS_BACKWARD_INPLACE, z, RowsBackward(rows, _NO_SEQUENCES, None, 1.0, saved, grad))


# --- the loss ---------------------------------------------------------------------------------------------------------


def _groups(pairs: dict[int, tuple[int, int]], counts: list[int], fit: int) -> list[tuple[list[int], list[int]]]:
    """Groups of whole pairs, (sequences, pairs), whose rows fit; sequences that share a pair stay together.

    A group that cannot be split is alone, however large. Sequences in no pair form the last groups.
    """
    parent = list(range(len(counts)))

    def root(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for chosen, rejected in pairs.values():
        if chosen >= 0 and rejected >= 0:
            parent[root(rejected)] = root(chosen)
    components: dict[int, tuple[list[int], list[int]]] = {}
    paired = {s for pair in pairs.values() for s in pair}
    for s in sorted(range(len(counts)), key=lambda s: s not in paired):
        components.setdefault(root(s), ([], []))[0].append(s)
    for p, (chosen, rejected) in pairs.items():
        components[root(chosen if chosen >= 0 else rejected)][1].append(p)

    groups: list[tuple[list[int], list[int]]] = []
    size, with_pairs = fit + 1, True
    for seqs, pair_numbers in components.values():
        rows = sum(counts[s] for s in seqs)
        # a group without pairs makes no gradient: it stays apart from those that do
        if size + rows > fit or bool(pair_numbers) != with_pairs:
            groups.append(([], []))
            size, with_pairs = 0, bool(pair_numbers)
        groups[-1][0].extend(seqs)
        groups[-1][1].extend(pair_numbers)
        size += rows
    return groups


class _Batch:
    """The rows that count of one call, by sequence and group."""

    def __init__(self, hidden: Tensor, a: DPOForward, budget: int, n_seqs: int, n_pairs: int, vocab: int) -> None:
        rows, targets, pairs = a.rows, a.rows.targets, a.pairs
        kept = _kept(rows).view(targets.shape)
        factors = token_factors(kept, rows.token_weights, a.seqs.cu_seqlens, a.seqs.average, torch.float64)
        self.factors = factors.reshape(-1)
        self.index = kept.reshape(-1).nonzero().squeeze(-1)
        length = targets.shape[-1]
        if a.seqs.cu_seqlens is None:
            bounds = [s * length for s in range(n_seqs + 1)]
        else:
            bounds = check_cu_seqlens(a.seqs.cu_seqlens, targets.numel())
        self.places = torch.searchsorted(self.index, torch.tensor(bounds, device=targets.device)).tolist()
        self.counts = [after - before for before, after in pairwise(self.places)]
        if pairs.pairs is None:
            numbers = [(p, p + n_pairs) for p in range(n_pairs)]
        else:
            numbers = [(c, d) for c, d in check_pair_numbers(pairs.pairs, n_seqs, absent=True)]
        weights = pairs.numbers.pair_weights
        live = [True] * n_pairs if weights is None else (weights != 0).tolist()
        self.pairs = {p: pair for p, pair in enumerate(numbers) if live[p]}
        fit = plan_rows(targets.numel(), vocab, hidden.dtype.itemsize, budget, False).buffer_rows
        self.fit = min(fit, self.index.shape[0]) or 1
        self.groups = _groups(self.pairs, self.counts, self.fit)
        self.sizes = [sum(self.counts[s] for s in seqs) for seqs, _ in self.groups]
        self.n_tokens = sum(size for (_, pairs), size in zip(self.groups, self.sizes, strict=True) if pairs)
        self.lengths = count_targets(targets, a.seqs.cu_seqlens, rows.options.ignore_index)
        # with the chosen tokens per pair counted over the whole batch
        self.loss = tokens_per_pair(
            pairs.loss, lambda: sum(self.lengths[[c for c, _ in numbers]].tolist()) / max(n_pairs, 1)
        )

    def rows(self, seqs: Sequence[int]) -> Tensor:
        """Numbers of the rows of these sequences."""
        return torch.cat([self.index[self.places[s] : self.places[s + 1]] for s in seqs])


class _Group:
    """A group's pairs: as numbers in the batch, and as pairs of its own sequences."""

    def __init__(self, a: DPOForward, batch: _Batch, group: tuple[list[int], list[int]]) -> None:
        seqs, pair_numbers = group
        device = a.rows.targets.device
        local = {s: i for i, s in enumerate(seqs)} | {-1: -1}
        self.pairs = torch.tensor([[local[s] for s in batch.pairs[p]] for p in pair_numbers], device=device)
        self.numbers = torch.tensor(pair_numbers, device=device)
        self.members = torch.tensor(seqs, device=device)
        self.options = a.pairs
        self.ref = None if a.ref_logps is None else a.ref_logps[self.members]
        self.lengths = batch.lengths[self.members]

    def losses(self, sums: Tensor, loss: LossOptions, seq_weights: Tensor | None, round_sums: bool) -> PreferenceResult:
        """The losses of sums of log-probs [S], in float64."""
        numbers = PairNumbers(*[None if x is None else x[self.numbers] for x in self.options.numbers])
        if seq_weights is not None:
            wpo = seq_weights[self.pairs[:, 0]] * seq_weights[self.pairs[:, 1]]
            numbers = numbers._replace(pair_weights=wpo if numbers.pair_weights is None else wpo * numbers.pair_weights)
        pairs = Pairs(self.pairs, numbers, self.options.baseline, loss, 1.0)
        a = PreferenceForward(pairs, self.ref, self.lengths, round_sums, True)
        return call(PREFERENCE_FORWARD, sums, a)  # type: ignore[no-any-return]

    def gradient(self, sums: Tensor, pair_grads: Tensor) -> Tensor:
        """Of the sum of the losses by the sums of log-probs."""
        one = Grads(loss=torch.ones((), dtype=sums.dtype, device=sums.device))
        a = PreferenceBackward(self.pairs, 1.0, pair_grads, one)
        return call(PREFERENCE_BACKWARD, sums, a)  # type: ignore[no-any-return]


@_without_autocast
def linear_dpo_forward(hidden: Tensor, arguments: LinearDPOForward) -> LinearDPOResult:
    whole_head, a, z_loss_weight, needs = arguments
    result = shapes.linear_dpo_forward(hidden, arguments)
    out, head = result.dpo, trimmed(whole_head, a.rows.options)
    n_pairs, n_seqs = out.losses.losses.shape[0], out.seq_logps.shape[0]
    batch = _Batch(hidden, a, head.budget, n_seqs, n_pairs, head.weight.shape[0])
    x, divisor = hidden.reshape(-1, hidden.shape[-1]), a.pairs.divisor or n_pairs
    wanted = a.wanted | STATISTIC_BITS["log_sum_sq_probs"] * a.wpo | STATISTIC_BITS["lse"] * (z_loss_weight > 0)
    made = iter(out.tokens.statistics)
    statistics = {
        each.name: next(made) if STATISTIC_BITS[each.name] & a.wanted else torch.empty_like(out.tokens.logps)
        for each in named_statistics(wanted)
    }
    tokens = _zeros(out.tokens._replace(statistics=list(statistics.values())))
    for tensor in out.losses:
        tensor.zero_()  # of pairs that take no part
    buffer = hidden.new_empty((min(batch.fit, max(batch.sizes, default=0)), head.weight.shape[0]))
    n_tiles = sum(
        math.ceil(size / batch.fit) for (_, pairs), size in zip(batch.groups, batch.sizes, strict=True) if pairs
    )
    sums = HeadSums(head, x, needs, n_tiles, early_type(hidden.dtype))
    squares = torch.zeros((), dtype=torch.float64, device=hidden.device)
    skipped = Skipped(head, hidden)
    for group, size in zip(batch.groups, batch.sizes, strict=True):
        rows = batch.rows(group[0])
        tiles = [rows[start : start + batch.fit] for start in range(0, size, batch.fit)]
        for part in tiles:
            z = buffer[: part.shape[0]]
            head_logits(head, x[part], z)
            _fill(tokens, z, a.rows, part, wanted)
        counts = torch.tensor([batch.counts[s] for s in group[0]], device=hidden.device)
        weighted = tokens.logps[rows].double() * batch.factors[rows]
        values = torch.segment_reduce(weighted, "sum", lengths=counts, initial=0)
        out.seq_logps[torch.tensor(group[0], device=hidden.device)] = values.to(out.seq_logps.dtype)
        if not group[1]:
            continue
        seq_weights = None
        if a.wpo:
            cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            log_sum_sq = statistics["log_sum_sq_probs"].view(-1)[rows]
            seq_weights = wpo_weights(
                tokens.logps[rows], log_sum_sq, torch.ones_like(rows, dtype=torch.bool), cu_seqlens
            )
        pairs = _Group(a, batch, group)
        found = pairs.losses(values, batch.loss, seq_weights, hidden.dtype is not torch.float64)
        for all_pairs, value in zip(out.losses[1:], found[1:], strict=True):
            all_pairs[pairs.numbers] = value.to(all_pairs.dtype)
        lse = statistics["lse"].view(-1)[rows] if z_loss_weight > 0 else None
        if lse is not None:
            squares += lse.double().square().sum()
        if not any(needs):
            continue
        g = pairs.gradient(values, found.pair_grads)
        by_row = torch.repeat_interleave(g / divisor, counts) * batch.factors[rows]
        z_share = 2 * z_loss_weight / max(batch.n_tokens, 1) * n_pairs / divisor
        of_statistics = () if lse is None else only_statistic("lse", lse * z_share)
        row_grads = Grads(by_row.to(tokens.logps.dtype), of_statistics)
        allowed = allowance(head, needs, row_grads, size)
        skipped.count(by_row)
        _group_gradients(sums, x, tiles, buffer, a.rows, tokens, row_grads, allowed, skipped)
    total = out.losses.losses.double().sum() + squares * (z_loss_weight / max(batch.n_tokens, 1) * n_pairs)
    out.losses.loss.copy_(total / divisor)
    grads = sums.result(whole_head)
    grads = grads if grads.hidden is None else grads._replace(hidden=grads.hidden.view(hidden.shape))
    return LinearDPOResult(out, grads, skipped.share())


def _group_gradients(
    sums: HeadSums,
    x: Tensor,
    tiles: list[Tensor],
    buffer: Tensor,
    rows: Rows,
    tokens: TokenResult,
    grad: Grads,
    allowed: Allowance | None,
    skipped: Skipped,
) -> None:
    """Adds a group's gradients; grad: of its rows, in the tiles' order. Logits of a single tile are still there."""
    incoming = (grad.logps, *grad.statistics)
    scale = range_scale(incoming, x.dtype)
    start = 0
    for part in tiles:
        z, h, end = buffer[: part.shape[0]], x[part], start + part.shape[0]
        if len(tiles) > 1:  # a pair too large for the budget: its logits are made again
            head_logits(sums.head, h, z)
        here = slice(start, end)
        if allowed is not None and grad.logps is not None:
            tile = Tile(z, h, part, _part(rows, part), tokens.logps[part], tokens.stats[part], grad.logps[here], scale)
            if skipped.add(add_tile(sums, tile, allowed.of(here), _logits_gradient)):
                start = end
                continue
        local = [None if g is None else g[start:end] if scale is None else g[start:end] * scale for g in incoming]
        grads = Grads(local[0], tuple(local[1:]))
        _logits_gradient(z, _part(rows, part), tokens.logps[part], tokens.stats[part], None, grads)
        sums.add(z, h, part, 1.0 if scale is None else 1 / scale)
        start = end

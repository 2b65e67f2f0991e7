"""The operators in plain torch, for devices without a compiled kernel: exact, a chunk of rows at a time, not fast.

Nothing here waits for the device but the loss itself, computed on the host, and checks of cu_seqlens and pairs. A
target outside the vocabulary gives NaN for its token and sequence; DPO_FAST_CHECK=1 raises IndexError instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpo_fast._checks import STATISTIC_BITS, LogitOptions, named_statistics, of_statistic
from dpo_fast._torch import shapes
from dpo_fast._torch.operators import (
    PREFERENCE_FORWARD,
    DPOForward,
    DPOResult,
    Pairs,
    PreferenceBackward,
    PreferenceForward,
    PreferenceResult,
    Rows,
    RowsBackward,
    SequenceForward,
    SequenceResult,
    TokenForward,
    TokenResult,
    call,
)
from dpo_fast._torch.sequences import (
    accurate_type,
    check_pair_numbers,
    count_targets,
    counted_rows,
    kept_rows,
    refuse_bad_rows,
    spread_to_rows,
    sum_by_sequence,
    token_factors,
    vocab_size,
    wide_type,
    wpo_weights,
)

# Logits of a chunk, which exist a few times over in float32.
CHUNK_LOGITS = 1 << 24


def _chunks(logits: Tensor) -> Iterator[tuple[Any, ...]]:
    """Indices of groups of rows of one sequence."""
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    for seq in range(logits.shape[0]) if logits.dim() == 3 else (None,):
        for start in range(0, logits.shape[-2], rows):
            part = slice(start, start + rows)
            yield (part,) if seq is None else (seq, part)


def _targets(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [..., K], which rows count [...], and which targets of these are outside the vocabulary [..., K].

    Raises:
        IndexError: there are such, and DPO_FAST_CHECK=1.
    """
    if os.environ.get("DPO_FAST_CHECK") == "1":
        refuse_bad_rows(logits, rows)
    targets, kept = rows.targets.long(), counted_rows(logits, rows)
    index = targets if targets.dim() == logits.dim() else targets.unsqueeze(-1)
    vocab = vocab_size(logits.shape[-1], rows.options)
    return index, kept, kept.unsqueeze(-1) & ((index < 0) | (index >= vocab))


def transform(x: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor | float]:
    """z and dz/dx."""
    slope = options.logit_scale / options.temperature
    if options.softcap == 0:
        return x * slope, slope
    u = torch.tanh(x * (options.logit_scale / options.softcap))
    return u * (options.softcap / options.temperature), slope * (1 - u * u)


def _statistic(name: str, x: Tensor, z: Tensor, logp: Tensor, total: Tensor, shift: Tensor, y: Tensor) -> Tensor:
    """One statistic of a chunk: raw logits x, transformed z, log-probs, sum of exp(z - shift), targets [..., K]."""
    p = logp.exp()
    if name == "entropy":
        terms: Tensor = torch.special.xlogy(p, p)
        return -terms.sum(-1)
    if name == "mean_logits":
        return z.mean(-1)
    if name == "is_top1":
        return torch.logical_and(torch.argmax(x, -1, keepdim=True) == y, ~total.isnan())
    if name == "log_sum_sq_probs":
        return (p * p).sum(-1).log()
    return (shift + total.log()).squeeze(-1)  # lse


def _rows_forward(logits: Tensor, rows: Rows, out: TokenResult, wanted: int) -> None:
    """Fills the results of a token forward."""
    options, wide = rows.options, wide_type(logits.dtype)
    targets, all_kept, bad = _targets(logits, rows)
    zero, vocab = torch.zeros((), dtype=wide, device=logits.device), vocab_size(logits.shape[-1], options)
    logps = out.logps.view(targets.shape)
    for part in _chunks(logits):
        x, kept = logits[part].to(wide)[..., :vocab], all_kept[part]
        z, _ = transform(x, options)
        shift = z.amax(-1, keepdim=True)
        total = torch.exp(z - shift).sum(-1, keepdim=True)
        logp = (z - shift) - total.log()
        y = targets[part].clamp(0, vocab - 1)
        gathered = logp.gather(-1, y).masked_fill(bad[part], float("nan"))
        logps[part] = torch.where(kept.unsqueeze(-1), gathered, zero)
        if out.stats is not None:
            out.stats[part] = torch.where(kept.unsqueeze(-1), torch.cat([shift, 1 / total], -1), zero)
        for each, values in zip(named_statistics(wanted), out.statistics, strict=True):
            found = _statistic(each.name, x, z, logp, total, shift, targets[part])
            if each.per_target:
                values.view(targets.shape)[part] = kept.unsqueeze(-1) & found
            else:
                values[part] = torch.where(kept, found, zero)


def _weighted_rows(a: RowsBackward) -> Tensor:
    """The gradient of each row's log-probs that comes from sequences and pairs."""
    targets, cu_seqlens, wide = a.rows.targets, a.seqs.cu_seqlens, a.saved.logps.dtype
    kept = kept_rows(targets, a.rows.options.ignore_index, a.rows.token_weights)
    factors = token_factors(kept, a.rows.token_weights, cu_seqlens, a.seqs.average, wide)
    n_seqs = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    g = torch.zeros(n_seqs, dtype=wide, device=targets.device)
    if a.saved.pair_grads is not None and (a.grad.loss is not None or a.grad.losses is not None):
        g = preference_backward(g, PreferenceBackward(a.pairs, a.divisor, a.saved.pair_grads, a.grad))
    if a.grad.seq_logps is not None:
        g = g + a.grad.seq_logps
    g = spread_to_rows(g.to(wide), cu_seqlens, factors.shape)
    return torch.where(g == 0, torch.zeros_like(g), factors * g)


def rows_backward_into(grad: Tensor, logits: Tensor, a: RowsBackward) -> None:
    """Fills grad, which may be the logits."""
    options, saved, wide = a.rows.options, a.saved, wide_type(logits.dtype)
    targets, kept, bad = _targets(logits, a.rows)
    vocab = vocab_size(logits.shape[-1], options)
    zero = torch.zeros((), dtype=wide, device=logits.device)
    g = torch.zeros(targets.shape, dtype=wide, device=logits.device)
    if a.grad.logps is not None:
        g = g + a.grad.logps.view(g.shape)
    if a.grad.seq_logps is not None or a.grad.loss is not None or a.grad.losses is not None:
        g = g + _weighted_rows(a).unsqueeze(-1)
    of_rows = [
        torch.zeros_like(kept, dtype=wide) if h is None else h.to(wide)
        for h in (of_statistic("entropy", a.grad.statistics), of_statistic("lse", a.grad.statistics))
    ]
    moved = kept & ((g != 0).any(-1) | (of_rows[0] != 0) | (of_rows[1] != 0))
    logps = saved.logps.view(g.shape).to(wide)
    for part in _chunks(logits):
        z, slope = transform(logits[part].to(wide)[..., :vocab], options)
        stat, g_entropy, g_lse = saved.stats[part], of_rows[0][part].unsqueeze(-1), of_rows[1][part].unsqueeze(-1)
        d = z - stat[..., :1]
        p = torch.exp(d) * stat[..., 1:]
        each = g[part].masked_fill(bad[part], float("nan"))
        dz = p * (g_lse - each.sum(-1, keepdim=True))
        y = targets[part].clamp(0, vocab - 1)
        # at a target 1 - p is formed by expm1: a confident token keeps its small gradient
        dz.scatter_add_(-1, y, each)
        if y.shape[-1] == 1:
            dz.scatter_(-1, y, g_lse * p.gather(-1, y) - each * torch.expm1(logps[part]))
        if saved.entropy is not None and of_statistic("entropy", a.grad.statistics) is not None:
            logp = torch.where(p == 0, torch.zeros_like(p), d + stat[..., 1:].log())
            dz -= g_entropy * p * (logp + saved.entropy[part].to(wide).unsqueeze(-1))
        grad[part][..., :vocab] = torch.where(moved[part].unsqueeze(-1), dz * slope, zero).to(grad.dtype)
        grad[part][..., vocab:] = 0


def token_forward(logits: Tensor, a: TokenForward) -> TokenResult:
    out = shapes.token_forward(logits, a)
    _rows_forward(logits, a.rows, out, a.wanted)
    return out


def _sums(logits: Tensor, rows: Rows, seqs: Any, logps: Tensor) -> Tensor:
    kept = kept_rows(rows.targets, rows.options.ignore_index, rows.token_weights)
    accurate = accurate_type(logits.device)
    factors = token_factors(kept, rows.token_weights, seqs.cu_seqlens, seqs.average, accurate)
    return sum_by_sequence(logps.to(accurate) * factors, seqs.cu_seqlens)


def sequence_forward(logits: Tensor, a: SequenceForward) -> SequenceResult:
    out = shapes.sequence_forward(logits, a)
    _rows_forward(logits, a.rows, out.tokens, 0)
    out.seq_logps.copy_(_sums(logits, a.rows, a.seqs, out.tokens.logps))
    return out


def dpo_forward(logits: Tensor, a: DPOForward) -> DPOResult:
    out = shapes.dpo_forward(logits, a)
    squares = STATISTIC_BITS["log_sum_sq_probs"]
    _rows_forward(logits, a.rows, out.tokens, a.wanted)
    sums, pairs, bounds = _sums(logits, a.rows, a.seqs, out.tokens.logps), a.pairs, a.seqs.cu_seqlens
    if a.wpo:
        scratch = TokenResult(torch.empty_like(out.tokens.logps), None, [torch.empty_like(out.tokens.logps)])
        _rows_forward(logits, a.rows, scratch, squares)
        kept = kept_rows(a.rows.targets, a.rows.options.ignore_index, a.rows.token_weights)
        each = wpo_weights(out.tokens.logps, scratch.statistics[0], kept, bounds)
        chosen, rejected = _pair_index(sums.shape[0], pairs.pairs, logits.device)
        weights, given = each[chosen] * each[rejected], pairs.numbers.pair_weights
        if given is not None:  # a weight of 0 also against NaN
            weights = torch.where(given == 0, torch.zeros_like(weights), weights * given)
        pairs = pairs._replace(numbers=pairs.numbers._replace(pair_weights=weights))
    lengths = count_targets(a.rows.targets, bounds, a.rows.options.ignore_index)
    round_sums = logits.dtype is not torch.float64
    found = call(PREFERENCE_FORWARD, sums, PreferenceForward(pairs, a.ref_logps, lengths, round_sums, True))
    for tensor, value in zip(out.losses, found, strict=True):
        if tensor is not None:
            tensor.copy_(value)
    out.seq_logps.copy_(sums)
    return out


def _pair_index(n_seqs: int, pairs: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    if pairs is None:
        both = torch.arange(n_seqs, device=device)
        return both[: n_seqs // 2], both[n_seqs // 2 :]
    check_pair_numbers(pairs, n_seqs, absent=True)
    return pairs[:, 0].long(), pairs[:, 1].long()


def preference_forward(logps: Tensor, a: PreferenceForward) -> PreferenceResult:
    """The loss of [S] numbers is computed on the host, where its formulas are."""
    numbers = a.pairs.numbers._replace(**{k: v.cpu() for k, v in a.pairs.numbers._asdict().items() if v is not None})
    pairs, baseline, ref, lengths = (
        None if t is None else t.cpu() for t in (a.pairs.pairs, a.pairs.baseline, a.ref_logps, a.lengths)
    )
    on_host = Pairs(pairs, numbers, baseline, a.pairs.loss, a.pairs.divisor)
    found = call(PREFERENCE_FORWARD, logps.cpu(), PreferenceForward(on_host, ref, lengths, a.round_sums, True))
    grads = found.pair_grads.to(accurate_type(logps.device))
    return PreferenceResult(*[value.to(logps.device) for value in (*found[:4], grads)])


def preference_backward(logps: Tensor, a: PreferenceBackward) -> Tensor:
    n_pairs, accurate = a.pair_grads.shape[0], a.pair_grads.dtype
    g = torch.zeros(n_pairs, dtype=accurate, device=a.pair_grads.device)
    if a.grad.loss is not None:
        g = g + a.grad.loss / (a.divisor or n_pairs)
    if a.grad.losses is not None:
        g = g + a.grad.losses
    grad = torch.zeros(logps.shape, dtype=accurate, device=logps.device)
    # index_put_ with accumulate sorts on CUDA: deterministic, unlike scatter_add_
    for k, members in enumerate(_pair_index(logps.shape[0], a.pairs, logps.device)):
        # an absent side has derivative 0: it may be added anywhere. No gradient, no part in it: a derivative may be NaN
        values = torch.where(g == 0, torch.zeros_like(g), g * a.pair_grads[:, k])
        grad.index_put_((members.clamp(min=0),), values, accumulate=True)
    return grad.to(logps.dtype)

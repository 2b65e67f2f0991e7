"""The operators in plain torch, for devices without a compiled kernel: exact, a chunk of rows at a time, not fast.

Same arguments and results as the operators of the same name in ops.py, which has checked shapes and types. Nothing here
waits for the device except for the loss itself, computed on the host, and where there are cu_seqlens or pairs, which
are checked there. A target outside the
vocabulary gives NaN for its token and sequence; DPO_FAST_CHECK=1 raises IndexError instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dpo_fast._checks import IGNORE_NOTHING, LogitOptions
from dpo_fast._sequences import (
    check_pair_numbers,
    kept_rows,
    spread_to_rows,
    sum_by_sequence,
    token_factors,
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


def bad_targets(logits: Tensor, targets: Tensor, kept: Tensor) -> Tensor:
    """Targets [..., K] outside the vocabulary, in rows that count."""
    bad = kept.unsqueeze(-1) & ((targets < 0) | (targets >= logits.shape[-1]))
    if os.environ.get("DPO_FAST_CHECK") == "1" and bad.any():
        place = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target {targets[tuple(place)].item()} at position {place[: targets.dim() - 1]} is outside "
            f"[0, {logits.shape[-1]}) and is not ignore_index"
        )
    return bad


def _transform(x: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor | float]:
    """z and dz/dx."""
    slope = options.logit_scale / options.temperature
    if options.softcap == 0:
        return x * slope, slope
    u = torch.tanh(x * (options.logit_scale / options.softcap))
    return u * (options.softcap / options.temperature), slope * (1 - u * u)


def _rows_forward(
    logits: Tensor, targets: Tensor, kept: Tensor, options: LogitOptions, want: tuple[bool, ...] = (False,) * 4
) -> tuple[Tensor, ...]:
    """As token_forward, for targets [..., K] and kept [...]."""
    wide = wide_type(logits.dtype)
    rows, device = logits.shape[:-1], logits.device
    bad = bad_targets(logits, targets, kept)
    logps = torch.zeros(targets.shape, dtype=wide, device=device)
    stats = torch.zeros((*rows, 2), dtype=wide, device=device)
    shapes = (rows, rows, targets.shape, rows)
    extras = [
        torch.zeros(shape if wanted else (0,), dtype=torch.bool if i == 2 else wide, device=device)
        for i, (shape, wanted) in enumerate(zip(shapes, want, strict=True))
    ]
    zero = torch.zeros((), dtype=wide, device=device)
    for part in _chunks(logits):
        x, keep = logits[part].to(wide), kept[part]
        z, _ = _transform(x, options)
        shift = z.amax(-1, keepdim=True)
        e = torch.exp(z - shift)
        total = e.sum(-1, keepdim=True)
        logp = (z - shift) - total.log()
        y = targets[part].clamp(0, logits.shape[-1] - 1)
        gathered = logp.gather(-1, y).masked_fill(bad[part], float("nan"))
        logps[part] = torch.where(keep.unsqueeze(-1), gathered, zero)
        stats[part] = torch.where(keep.unsqueeze(-1), torch.cat([shift, 1 / total], -1), zero)
        p = e / total
        if want[0]:
            extras[0][part] = torch.where(keep, -torch.special.xlogy(p, p).sum(-1), zero)
        if want[1]:
            extras[1][part] = torch.where(keep, z.mean(-1), zero)
        if want[2]:
            first = torch.argmax(x, -1, keepdim=True)
            extras[2][part] = keep.unsqueeze(-1) & (first == targets[part]) & ~total.isnan()
        if want[3]:
            extras[3][part] = torch.where(keep, (p * p).sum(-1).log(), zero)
    return (logps, stats, *extras)


def _rows_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    kept: Tensor,
    options: LogitOptions,
    logps: Tensor,
    stats: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """Fills grad, which may be the logits, for targets and grad_logps [..., K]."""
    wide = wide_type(logits.dtype)
    bad = bad_targets(logits, targets, kept)
    for part in _chunks(logits):
        z, slope = _transform(logits[part].to(wide), options)
        stat = stats[part]
        d = z - stat[..., :1]
        p = torch.exp(d) * stat[..., 1:]
        g = grad_logps[part].to(wide).masked_fill(bad[part], float("nan"))
        dz = -p * g.sum(-1, keepdim=True)
        y = targets[part].clamp(0, logits.shape[-1] - 1)
        lp = logps[part].to(wide)
        # at a target 1 - p is formed by expm1: a confident token keeps its small gradient
        dz.scatter_add_(-1, y, g)
        if y.shape[-1] == 1:
            dz.scatter_(-1, y, -g * torch.expm1(lp))
        if grad_entropy is not None and entropy is not None:
            logp = torch.where(p == 0, torch.zeros_like(p), d + stat[..., 1:].log())
            dz -= grad_entropy[part].to(wide).unsqueeze(-1) * p * (logp + entropy[part].to(wide).unsqueeze(-1))
        zero = torch.zeros((), dtype=wide, device=logits.device)
        grad[part] = torch.where(kept[part].unsqueeze(-1), dz * slope, zero).to(grad.dtype)


def counts(targets: Tensor, ignore_index: int) -> Tensor:
    """Which targets are not to be ignored."""
    return targets != ignore_index if ignore_index != IGNORE_NOTHING else torch.ones_like(targets, dtype=torch.bool)


def with_k(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets [...] or [..., K] as [..., K]."""
    return targets.long() if targets.dim() == logits.dim() else targets.long().unsqueeze(-1)


def token_forward(logits: Tensor, targets: Tensor, row_mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """See ops.py."""
    options, want = LogitOptions(*rest[:4]), rest[4:]
    y = with_k(targets, logits)
    kept = counts(y, options.ignore_index).all(-1)
    if row_mask is not None:
        kept &= row_mask != 0
    logps, stats, entropy, mean_logits, is_top1, log_sum_sq = _rows_forward(logits, y, kept, options, want)
    if want[2]:
        is_top1 = is_top1.reshape(targets.shape)
    return logps.reshape(targets.shape), stats, entropy, mean_logits, is_top1, log_sum_sq


def token_backward_into(grad: Tensor, logits: Tensor, targets: Tensor, row_mask: Tensor | None, *rest: Any) -> None:
    """See ops.py."""
    options = LogitOptions(*rest[:4])
    logps, stats, entropy, grad_logps, grad_entropy = rest[4:]
    y = with_k(targets, logits)
    kept = counts(y, options.ignore_index).all(-1)
    if row_mask is not None:
        kept &= row_mask != 0
    g = torch.zeros_like(logps) if grad_logps is None else grad_logps
    _rows_backward(
        grad, logits, y, kept, options, logps.reshape(y.shape), stats, entropy, g.reshape(y.shape), grad_entropy
    )


def _nothing_saved(logits: Tensor) -> Tensor:
    return logits.new_empty((0, 0), dtype=torch.float64)


def sequence_forward(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    """See ops.py."""
    opts = LogitOptions(*options[:4])
    kept = kept_rows(targets, opts.ignore_index, token_weights)
    logps, stats = _rows_forward(logits, targets.long().unsqueeze(-1), kept, opts)[:2]
    logps = logps.squeeze(-1)
    wide = torch.float64 if options[4:] == (True,) else logps.dtype
    factors = token_factors(kept, token_weights, cu_seqlens, average, wide)
    return sum_by_sequence(logps.to(wide) * factors, cu_seqlens), logps, stats, _nothing_saved(logits)


def sequence_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    *rest: Any,
) -> None:
    """See ops.py."""
    options, (logps, stats, grad_seq_logps) = LogitOptions(*rest[:4]), rest[4:7]
    kept = kept_rows(targets, options.ignore_index, token_weights)
    factors = token_factors(kept, token_weights, cu_seqlens, average, logps.dtype)
    g = factors * spread_to_rows(grad_seq_logps.to(factors.dtype), cu_seqlens, factors.shape)
    _rows_backward(
        grad,
        logits,
        targets.long().unsqueeze(-1),
        kept,
        options,
        logps.unsqueeze(-1),
        stats,
        None,
        g.unsqueeze(-1),
        None,
    )


def _pair_index(n_seqs: int, pairs: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    if pairs is None:
        both = torch.arange(n_seqs, device=device)
        return both[: n_seqs // 2], both[n_seqs // 2 :]
    check_pair_numbers(pairs, n_seqs, absent=True)
    return pairs[:, 0].long(), pairs[:, 1].long()


def preference_forward(
    logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, *tensors_and_loss: Any
) -> tuple[Tensor, ...]:
    """See ops.py. The loss of [S] numbers is computed on the host, where its formulas stand."""
    args = (logps, ref_logps, lengths, *tensors_and_loss)
    on_host = [arg.cpu() if isinstance(arg, Tensor) else arg for arg in args]
    return tuple(out.to(logps.device) for out in torch.ops.dpo_fast.preference_forward(*on_host))


def preference_backward(
    logps: Tensor,
    pairs: Tensor | None,
    divisor: float,
    pair_grads: Tensor,
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
) -> Tensor:
    """See ops.py."""
    n_pairs = pair_grads.shape[0]
    g = torch.zeros(n_pairs, dtype=pair_grads.dtype, device=pair_grads.device)
    if grad_loss is not None:
        g = g + grad_loss / (divisor or n_pairs)
    if grad_losses is not None:
        g = g + grad_losses
    chosen, rejected = _pair_index(logps.shape[0], pairs, logps.device)
    grad = torch.zeros(logps.shape, dtype=pair_grads.dtype, device=logps.device)
    # index_put_ with accumulate sorts on CUDA: deterministic, unlike scatter_add_
    for k, members in enumerate((chosen, rejected)):
        # an absent side has derivative 0: it may be added anywhere. No gradient, no part in it: a derivative may be NaN
        values = torch.where(g == 0, torch.zeros_like(g), g * pair_grads[:, k])
        grad.index_put_((members.clamp(min=0),), values, accumulate=True)
    return grad.to(logps.dtype)


def dpo_forward(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """See ops.py."""
    options, loss, (wpo, *want) = LogitOptions(*rest[:4]), rest[4:-4], rest[-4:]
    kept = kept_rows(targets, options.ignore_index, token_weights)
    statistics = (*want, wpo)
    logps, stats, *extras = _rows_forward(logits, targets.long().unsqueeze(-1), kept, options, statistics)
    logps = logps.squeeze(-1)
    if want[2]:
        extras[2] = extras[2].squeeze(-1)
    factors = token_factors(kept, token_weights, cu_seqlens, average, torch.float64)
    sums = sum_by_sequence(logps.double() * factors, cu_seqlens)
    if ref_logps is not None and ref_logps.dtype is not torch.float64 and logits.dtype is not torch.float64:
        sums = sums.float().double()  # as the reference's were rounded
    if wpo:
        weights = wpo_weights(logps, extras[3], kept, cu_seqlens)
        chosen, rejected = _pair_index(sums.shape[0], pairs, logits.device)
        weights = weights[chosen] * weights[rejected]
        pair_weights = weights if pair_weights is None else weights * pair_weights
    lengths = sum_by_sequence((targets != options.ignore_index).double(), cu_seqlens)
    out = torch.ops.dpo_fast.preference_forward(sums, ref_logps, lengths, pairs, pair_weights, baseline, *loss)
    *losses, pair_grads = out
    return (
        *[x.to(logps.dtype) for x in (*losses, sums)],
        logps,
        stats,
        pair_grads,
        *extras[:3],
        _nothing_saved(logits),
    )


def dpo_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    *rest: Any,
) -> None:
    """See ops.py."""
    options, (divisor, logps, stats, pair_grads, grad_loss, grad_losses, grad_seq_logps) = rest[:4], rest[4:11]
    n_seqs = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    like = torch.empty(n_seqs, dtype=logps.dtype, device=logits.device)
    g = preference_backward(like, pairs, divisor, pair_grads, grad_loss, grad_losses)
    if grad_seq_logps is not None:
        g = g + grad_seq_logps
    sequence_backward_into(grad, logits, targets, cu_seqlens, token_weights, average, *options, logps, stats, g)

"""For each operator: arguments checked, results allocated. These functions are the operators' fakes as well."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from dpo_fast._checks import named_statistics
from dpo_fast._native import has_cuda_kernels
from dpo_fast._torch import checks
from dpo_fast._torch.head import early_type, trimmed
from dpo_fast._torch.operators import (
    PLAIN,
    DPOForward,
    DPOResult,
    Head,
    HeadGradients,
    LinearDPOForward,
    LinearDPOResult,
    LinearTokenBackward,
    LinearTokenForward,
    LinearTokenGradients,
    LinearTokenResult,
    PreferenceBackward,
    PreferenceForward,
    PreferenceResult,
    RowsBackward,
    SequenceForward,
    SequenceResult,
    TokenForward,
    TokenResult,
)
from dpo_fast._torch.sequences import accurate_type, wide_type
from dpo_fast._torch.tiles import plan_rows

_HAS_CUDA_KERNELS = has_cuda_kernels()

# Shape and type of a result, None where it is not wanted.
Kind = tuple[tuple[int, ...], torch.dtype] | None

# A tensor made like another takes half the time of a new one. These patterns, by call, are of the CPU alone, a number
# each, and made at a call's second use: shapes that change with every call pay nothing.
_PATTERNS: dict[Hashable, list[Tensor | None] | None] = {}
_MOST_PATTERNS = 64


def _allocate(like: Tensor, key: Hashable, kinds: Callable[[], list[Kind]]) -> list[Any]:
    """Memory for results of the `kinds`, which follow from the key."""
    is_ours = like.is_cpu and like.__class__ in PLAIN and not torch._C._len_torch_dispatch_stack()
    if is_ours:
        patterns = _PATTERNS.get(key)
        if patterns is not None:
            return [None if pattern is None else torch.empty_like(pattern) for pattern in patterns]
    new = [None if kind is None else torch.empty(kind[0], dtype=kind[1], device=like.device) for kind in kinds()]
    if is_ours and not torch.is_inference_mode_enabled() and torch._C._functorch.peek_interpreter_stack() is None:
        if key in _PATTERNS:
            # of a single number seen as a tensor of one or none, strides would be passed on
            _PATTERNS[key] = [
                None if t is None else t.new_empty(()).expand(t.shape) if t.numel() > 1 else torch.empty_like(t)
                for t in new
            ]
        else:
            if len(_PATTERNS) >= _MOST_PATTERNS:
                _PATTERNS.clear()
            _PATTERNS[key] = None
    return new


def _token_kinds(like: Tensor, targets: Tensor, wanted: int, keep: bool) -> list[Kind]:
    """Those of a TokenResult. The CUDA kernels write what backward reads in any case."""
    wide, rows = wide_type(like.dtype), like.shape[:-1]
    return [
        (targets.shape, wide),
        ((*rows, 2), wide) if keep or like.is_cuda else None,
        *[
            (targets.shape if each.per_target else rows, torch.bool if each.is_truth else wide)
            for each in named_statistics(wanted)
        ],
    ]


def _seq_saved_kind(like: Tensor, n_seqs: int) -> Kind:
    """The CUDA kernels keep what the CPU's backward works out again."""
    if not _HAS_CUDA_KERNELS or not like.is_cuda:
        return None
    from dpo_fast import _cuda

    return (n_seqs, _cuda.SEQ_SAVED), torch.float64


def _loss_kinds(like: Tensor, n_pairs: int, keep: bool) -> list[Kind]:
    """Those of a PreferenceResult."""
    each = (n_pairs,), wide_type(like.dtype)
    return [
        ((), each[1]), each, each, each, ((n_pairs, 2), accurate_type(like.device)) if keep or like.is_cuda else None
    ]  # fmt: skip


def token_forward(logits: Tensor, a: TokenForward) -> TokenResult:
    checks.check_rows(logits, a.rows)
    targets = a.rows.targets
    key = (0, logits.dtype, targets.shape, logits.dim(), a.wanted, a.keep)
    logps, stats, *statistics = _allocate(logits, key, lambda: _token_kinds(logits, targets, a.wanted, a.keep))
    return TokenResult(logps, stats, statistics)


def sequence_forward(logits: Tensor, a: SequenceForward) -> SequenceResult:
    checks.check_rows(logits, a.rows)
    n_seqs, targets = checks.check_sequences(logits, a.rows, a.seqs), a.rows.targets
    wide = torch.float64 if a.double_sums else wide_type(logits.dtype)
    kinds: Callable[[], list[Kind]] = lambda: [  # noqa: E731
        ((n_seqs,), wide), _seq_saved_kind(logits, n_seqs), *_token_kinds(logits, targets, 0, a.keep)
    ]  # fmt: skip
    key = (1, logits.dtype, targets.shape, n_seqs, wide, a.keep)
    seq_logps, seq_saved, logps, stats = _allocate(logits, key, kinds)
    return SequenceResult(seq_logps, TokenResult(logps, stats, []), seq_saved)


def dpo_forward(logits: Tensor, a: DPOForward) -> DPOResult:
    checks.check_rows(logits, a.rows)
    return _dpo_results(logits, a, "logits", a.keep)


def _dpo_results(like: Tensor, a: DPOForward, name: str, keep: bool) -> DPOResult:
    """Of checked rows of logits or hidden states."""
    n_seqs, targets = checks.check_sequences(like, a.rows, a.seqs, name), a.rows.targets
    n_pairs = checks.check_pairs(like, n_seqs, a.pairs, a.ref_logps, name)
    key = (2, like.dtype, targets.shape, n_seqs, n_pairs, a.wanted, keep)
    loss, each, chosen, rejected, pair_grads, seq_logps, seq_saved, logps, stats, *statistics = _allocate(
        like,
        key,
        lambda: [
            *_loss_kinds(like, n_pairs, keep),
            ((n_seqs,), wide_type(like.dtype)),
            _seq_saved_kind(like, n_seqs) if name == "logits" else None,
            *_token_kinds(like, targets, a.wanted, keep),
        ],
    )
    losses, tokens = PreferenceResult(loss, each, chosen, rejected, pair_grads), TokenResult(logps, stats, statistics)
    return DPOResult(losses, seq_logps, tokens, seq_saved)


def rows_backward(logits: Tensor, a: RowsBackward) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def rows_backward_(logits: Tensor, a: RowsBackward) -> None:
    checks.check_inplace(logits)


def preference_forward(logps: Tensor, a: PreferenceForward) -> PreferenceResult:
    checks.check_logps(logps)
    n_pairs = checks.check_pairs(logps, logps.shape[0], a.pairs, a.ref_logps, "logps")
    checks.check_numbers("lengths", a.lengths, logps, logps.shape, "with one number per sequence", "logps")
    key = (3, logps.dtype, n_pairs, a.keep)
    return PreferenceResult(*_allocate(logps, key, lambda: _loss_kinds(logps, n_pairs, a.keep)))


def preference_backward(logps: Tensor, a: PreferenceBackward) -> Tensor:
    checks.check_logps(logps)
    n_pairs = checks.check_pair_tensor(a.pairs, logps, logps.shape[0], a.divisor != 0, "logps")
    checks.check_numbers("pair_grads", a.pair_grads, logps, (n_pairs, 2), "with two derivatives per pair", "logps")
    checks.check_gradients(logps, None, a.grad, logps.shape[0], n_pairs)
    return torch.empty_like(logps, memory_format=torch.contiguous_format)


def linear_token_forward(hidden: Tensor, a: LinearTokenForward) -> LinearTokenResult:
    checks.check_head(hidden, a.head, a.tokens.rows)
    (rows, wanted, _), buffer = a.tokens, None
    key = (4, hidden.dtype, rows.targets.shape, wanted)
    logps, stats, *statistics = _allocate(hidden, key, lambda: _token_kinds(hidden, rows.targets, wanted, True))
    if a.tokens.keep:  # as many logits as the budget allows, whichever rows count
        vocab = trimmed(a.head, rows.options).weight.shape[0]
        plan = plan_rows(rows.targets.numel(), vocab, hidden.dtype.itemsize, a.head.budget, True)
        buffer = hidden.new_empty((plan.buffer_rows, vocab))
    return LinearTokenResult(TokenResult(logps, stats, statistics), buffer)


def linear_token_backward(hidden: Tensor, a: LinearTokenBackward) -> LinearTokenGradients:
    checks.check_head(hidden, a.head, a.rows)
    targets = a.rows.targets
    checks.check_saved(hidden, targets, a.saved.logps, a.saved.stats)
    checks.check_numbers("entropy", a.saved.entropy, hidden, targets.shape, "with one number per row", "hidden")
    if a.buffer is not None:
        checks.check_device("buffer", a.buffer, hidden, "hidden")
    checks.check_gradients(hidden, targets, a.grad, 0, 0)
    return LinearTokenGradients(_head_gradients(hidden, a, hidden.dtype), _skipped(hidden, a.head))


def _head_gradients(hidden: Tensor, a: LinearTokenBackward | LinearDPOForward, dtype: torch.dtype) -> HeadGradients:
    inputs = zip((hidden, *a.head[:4]), a.needs, strict=True)
    return HeadGradients(
        *[hidden.new_empty(x.shape, dtype=dtype) if need and x is not None else None for x, need in inputs]
    )


def _skipped(hidden: Tensor, head: Head) -> Tensor | None:
    return hidden.new_empty((), dtype=torch.float32) if head.hidden_tolerance or head.weight_tolerance else None


def linear_dpo_forward(hidden: Tensor, a: LinearDPOForward) -> LinearDPOResult:
    checks.check_head(hidden, a.head, a.dpo.rows)
    grads, skipped = _head_gradients(hidden, a, early_type(hidden.dtype)), _skipped(hidden, a.head)
    return LinearDPOResult(_dpo_results(hidden, a.dpo, "hidden", True), grads, skipped)

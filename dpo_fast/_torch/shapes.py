"""For each operator: arguments checked, results allocated. These functions are the operators' fakes as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_fast._checks import named_statistics
from dpo_fast._native import has_cuda_kernels
from dpo_fast._torch import checks
from dpo_fast._torch.operators import (
    PLAIN,
    DPOForward,
    DPOResult,
    HeadGradients,
    LinearDPOForward,
    LinearDPOResult,
    LinearTokenBackward,
    LinearTokenForward,
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


# A tensor made like another takes half the time of a new one. These patterns are of the CPU alone, a number each, and
# made at a shape's second use: shapes that change with every call pay nothing.
_PATTERNS: dict[tuple[Sequence[int], torch.dtype], Tensor | None] = {}
_MOST_PATTERNS = 256


def _new(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not like.is_cpu or like.__class__ not in PLAIN or torch._C._len_torch_dispatch_stack():
        return torch.empty(shape, dtype=dtype, device=like.device)
    pattern = _PATTERNS.get((shape, dtype))
    if pattern is not None:
        return torch.empty_like(pattern)
    new = torch.empty(shape, dtype=dtype, device=like.device)
    if not torch.is_inference_mode_enabled() and torch._C._functorch.peek_interpreter_stack() is None:
        _remember((tuple(shape), dtype), new)
    return new


def _remember(key: tuple[Sequence[int], torch.dtype], new: Tensor) -> None:
    if key not in _PATTERNS:
        if len(_PATTERNS) >= _MOST_PATTERNS:
            _PATTERNS.clear()
        _PATTERNS[key] = None
    else:  # of a single number seen as a tensor of one or none, strides would be passed on
        _PATTERNS[key] = new.new_empty(()).expand(key[0]) if new.numel() > 1 else torch.empty_like(new)


def _token_tensors(like: Tensor, targets: Tensor, wanted: int, keep: bool) -> TokenResult:
    wide, rows = wide_type(like.dtype), like.shape[:-1]
    return TokenResult(
        _new(like, targets.shape, wide),
        _new(like, (*rows, 2), wide) if keep else None,
        [
            _new(like, targets.shape if each.per_target else rows, torch.bool if each.is_truth else wide)
            for each in named_statistics(wanted)
        ],
    )


def _seq_saved(like: Tensor, n_seqs: int) -> Tensor | None:
    """The CUDA kernels keep what the CPU's backward works out again; they write it in any case."""
    if not _HAS_CUDA_KERNELS or not like.is_cuda:
        return None
    from dpo_fast import _cuda

    return _new(like, (n_seqs, _cuda.SEQ_SAVED), torch.float64)


def _losses(like: Tensor, wide: torch.dtype, n_pairs: int, keep: bool) -> PreferenceResult:
    pair_grads = _new(like, (n_pairs, 2), accurate_type(like.device)) if keep or like.is_cuda else None
    losses = _new(like, (n_pairs,), wide)
    chosen, rejected = torch.empty_like(losses), torch.empty_like(losses)
    return PreferenceResult(_new(like, (), wide), losses, chosen, rejected, pair_grads)


def token_forward(logits: Tensor, a: TokenForward) -> TokenResult:
    checks.check_rows(logits, a.rows)
    return _token_tensors(logits, a.rows.targets, a.wanted, a.keep or logits.is_cuda)


def sequence_forward(logits: Tensor, a: SequenceForward) -> SequenceResult:
    checks.check_rows(logits, a.rows)
    n_seqs = checks.check_sequences(logits, a.rows, a.seqs)
    wide = torch.float64 if a.double_sums else wide_type(logits.dtype)
    tokens = _token_tensors(logits, a.rows.targets, 0, a.keep or logits.is_cuda)
    return SequenceResult(_new(logits, (n_seqs,), wide), tokens.logps, tokens.stats, _seq_saved(logits, n_seqs))


def dpo_forward(logits: Tensor, a: DPOForward) -> DPOResult:
    checks.check_rows(logits, a.rows)
    n_seqs = checks.check_sequences(logits, a.rows, a.seqs)
    n_pairs = checks.check_pairs(logits, n_seqs, a.pairs, a.ref_logps)
    wide = wide_type(logits.dtype)
    return DPOResult(
        _losses(logits, wide, n_pairs, a.keep),
        _new(logits, (n_seqs,), wide),
        _token_tensors(logits, a.rows.targets, a.wanted, a.keep or logits.is_cuda),
        _seq_saved(logits, n_seqs),
    )


def check_rows_backward(logits: Tensor, a: RowsBackward) -> None:
    checks.check_rows(logits, a.rows)
    grad, targets = a.grad, a.rows.targets
    checks.check_saved(logits, targets, a.saved.logps, a.saved.stats)
    n_seqs = n_pairs = 0
    if grad.seq_logps is not None or grad.loss is not None or grad.losses is not None:
        n_seqs = checks.check_sequences(logits, a.rows, a.seqs)
    if grad.loss is not None or grad.losses is not None:
        n_pairs = checks.check_pair_tensor(a.pairs, logits, n_seqs, a.divisor != 0)
        if a.saved.pair_grads is None:
            raise ValueError("grad_loss and grad_losses need pair_grads of the forward pass")
        checks.check_numbers("pair_grads", a.saved.pair_grads, logits, (n_pairs, 2), "with two derivatives per pair")
    checks.check_gradients(logits, targets, grad, n_seqs, n_pairs)
    if a.saved.seq_saved is not None:
        checks.check_device("seq_saved", a.saved.seq_saved, logits, "logits")
    if grad.entropy is not None:
        if a.saved.entropy is None:
            raise ValueError("grad_entropy needs the entropy of the forward pass")
        checks.check_numbers("entropy", a.saved.entropy, logits, logits.shape[:-1], "with one number per row")


def rows_backward(logits: Tensor, a: RowsBackward) -> Tensor:
    check_rows_backward(logits, a)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def rows_backward_inplace(logits: Tensor, a: RowsBackward) -> None:
    check_rows_backward(logits, a)
    checks.check_inplace(logits)


def preference_forward(logps: Tensor, a: PreferenceForward) -> PreferenceResult:
    checks.check_logps(logps)
    n_pairs = checks.check_pairs(logps, logps.shape[0], a.pairs, a.ref_logps, "logps")
    checks.check_numbers("lengths", a.lengths, logps, logps.shape, "with one number per sequence", "logps")
    return _losses(logps, logps.dtype, n_pairs, a.keep)


def preference_backward(logps: Tensor, a: PreferenceBackward) -> Tensor:
    checks.check_logps(logps)
    n_pairs = checks.check_pair_tensor(a.pairs, logps, logps.shape[0], a.divisor != 0, "logps")
    checks.check_numbers("pair_grads", a.pair_grads, logps, (n_pairs, 2), "with two derivatives per pair", "logps")
    checks.check_gradients(logps, None, a.grad, logps.shape[0], n_pairs)
    return torch.empty_like(logps, memory_format=torch.contiguous_format)


def linear_token_forward(hidden: Tensor, a: LinearTokenForward) -> LinearTokenResult:
    checks.check_head(hidden, a.head, a.rows)
    tokens = _token_tensors(hidden, a.rows.targets, a.wanted, True)
    return LinearTokenResult(tokens, kept_logits(hidden, a) if a.keep else None)


def kept_logits(hidden: Tensor, a: LinearTokenForward) -> Tensor:
    """Memory for the logits that stay until backward; its size does not depend on which rows count."""
    vocab = a.rows.options.valid_vocab or a.head.weight.shape[0]
    plan = plan_rows(a.rows.targets.numel(), vocab, hidden.dtype.itemsize, a.budget, True)
    return _new(hidden, (plan.buffer_rows, vocab), hidden.dtype)


def linear_token_backward(hidden: Tensor, a: LinearTokenBackward) -> HeadGradients:
    checks.check_head(hidden, a.head, a.rows)
    targets = a.rows.targets
    checks.check_saved(hidden, targets, a.saved.logps, a.saved.stats)
    checks.check_numbers("entropy", a.saved.entropy, hidden, targets.shape, "with one number per row", "hidden")
    if a.buffer is not None:
        checks.check_device("buffer", a.buffer, hidden, "hidden")
    checks.check_gradients(hidden, targets, a.grad, 0, 0)
    return head_gradients(hidden, a, hidden.dtype)


def head_gradients(hidden: Tensor, a: LinearTokenBackward | LinearDPOForward, dtype: torch.dtype) -> HeadGradients:
    """Gradients of hidden states and head."""
    inputs = (hidden, *a.head[:4])
    return HeadGradients(
        *[_new(x, x.shape, dtype) if need and x is not None else None for x, need in zip(inputs, a.need, strict=True)]
    )


def early_type(hidden: Tensor) -> torch.dtype:
    """The type of gradients made before the incoming gradient is known: float16 waits for its loss scale."""
    return torch.float32 if hidden.dtype is torch.float16 else hidden.dtype


def linear_dpo_forward(hidden: Tensor, a: LinearDPOForward) -> LinearDPOResult:
    checks.check_head(hidden, a.head, a.rows)
    n_seqs = checks.check_sequences(hidden, a.rows, a.seqs, "hidden")
    n_pairs = checks.check_pairs(hidden, n_seqs, a.pairs, a.ref_logps, "hidden")
    wide = wide_type(hidden.dtype)
    return LinearDPOResult(
        _losses(hidden, wide, n_pairs, True),
        _new(hidden, (n_seqs,), wide),
        _token_tensors(hidden, a.rows.targets, a.wanted, True),
        head_gradients(hidden, a, early_type(hidden)),
    )

"""Which tensors the operators take: plain ones, of types, shapes and devices that fit.

Shapes are compared first and put into words only where they differ: a call that is right pays for comparisons alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_fast import _checks
from dpo_fast._checks import check_shape
from dpo_fast._loss.options import NO_NUMBERS
from dpo_fast._torch.operators import PLAIN, Grads, Head, Pairs, Rows, RowsBackward, Sequences

LOGIT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
INTEGER_TYPES = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32}

# --- plain tensors ----------------------------------------------------------------------------------------------------


def plain_tensors(names: Sequence[str], values: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a public function as plain tensors, None where they are None.

    Raises:
        TypeError: lists, arrays, and tensors that hold something other than their own numbers; named.
    """
    if not torch.compiler.is_compiling():
        for value in values:
            if value is not None and (value.__class__ not in PLAIN or value.is_neg()):
                break
        else:
            return values
    return [None if value is None else plain_tensor(name, value) for name, value in zip(names, values, strict=True)]


def plain_tensor(name: str, value: Any) -> Any:
    """One argument as a plain tensor that autograd connects with it; see `plain_tensors`."""
    if _is_dtensor(value):
        placements = tuple(value.placements)
        if not all(placement.is_replicate() for placement in placements):
            raise TypeError(
                f"{name} is a DTensor with placements {placements}, of which each rank holds a part: give "
                f"{name}.full_tensor(), or {name}.to_local() where this rank's part is meant"
            )
        return value.to_local()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(value).__name__}")
    if torch.compiler.is_compiling():
        return value
    if type(value).__name__ == "AsyncCollectiveTensor":
        return value.clone() if value.requires_grad else value.wait()  # type: ignore[attr-defined]
    if value.__class__ not in PLAIN and not torch._C._len_torch_dispatch_stack():
        if type(value).__torch_dispatch__ is Tensor.__torch_dispatch__:  # a subclass in name only
            value = value.as_subclass(Tensor)
        else:
            raise TypeError(
                f"{name} is a {type(value).__name__}, whose numbers are not in memory of its own: give a plain tensor"
            )
    return value.resolve_neg() if value.is_neg() else value


def _is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it is not loaded there is none
    return module is not None and isinstance(value, module.DTensor)


def check_no_grad(name: str, tensor: Tensor | None) -> None:
    """Refuses a tensor that expects a gradient which it would never get."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(f"{name} gets no gradient, but requires one: detach it")


# --- types and devices ------------------------------------------------------------------------------------------------


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, found {tensor.device}")


def check_integers(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor holds integers that fit int64."""
    if tensor.dtype not in INTEGER_TYPES:
        raise TypeError(f"{name} must be integers, found {tensor.dtype}")


def check_numbers(name: str, x: Any, like: Tensor, shape: Sequence[int], reason: str, of: str = "logits") -> None:
    """Checks a tensor x of real numbers, where it is given: its shape, and the device, which is that of `like`."""
    if x is None:
        return
    if x.is_complex():
        raise TypeError(f"{name} must be real numbers, found {x.dtype}")
    check_device(name, x, like, of)
    if x.shape != shape:
        check_shape(name, x.shape, shape, reason)


# --- rows, sequences, pairs -------------------------------------------------------------------------------------------


def check_rows(logits: Tensor, rows: Rows, name: str = "logits") -> None:
    """Checks logits [..., V] with targets [...] or [..., K] and row_mask [...]."""
    shape, targets = logits.shape, rows.targets
    _checks.check_logits_shape(shape, name)
    if logits.dtype not in LOGIT_TYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, LOGIT_TYPES))}, found {logits.dtype}")
    check_targets(targets, logits, name)
    if rows.options is not _checks.DEFAULT_LOGIT_OPTIONS:
        _checks.check_options(rows.options, shape[-1])
    if rows.row_mask is not None:
        check_numbers("row_mask", rows.row_mask, logits, shape[:-1], f"to fit logits of shape {tuple(shape)}")


def check_targets(targets: Tensor, like: Tensor, name: str) -> None:
    """Checks one target, or K of them, for each row of logits or hidden states."""
    check_integers("targets", targets)
    check_device("targets", targets, like, name)
    lead: Sequence[int] = like.shape[:-1]
    if targets.shape != lead and (targets.dim() != like.dim() or targets.shape[:-1] != lead):
        lead = (*lead, targets.shape[-1]) if targets.dim() == like.dim() else lead
        check_shape("targets", targets.shape, lead, f"to fit {name} of shape ", like.shape)


def check_sequences(like: Tensor, rows: Rows, seqs: Sequences, name: str = "logits") -> int:
    """Checks one target for each row of logits or hidden states, and what groups and weights the rows.

    Returns:
        The number of sequences.
    """
    targets, shape = rows.targets, like.shape
    if targets.shape != shape[:-1]:
        check_shape("targets", targets.shape, shape[:-1], f"to fit {name} of shape ", shape)
    if seqs.cu_seqlens is not None:
        check_integers("cu_seqlens", seqs.cu_seqlens)
        check_device("cu_seqlens", seqs.cu_seqlens, like, name)
    if rows.token_weights is not None:
        check_numbers("token_weights", rows.token_weights, like, targets.shape, "as targets have", name)
    return _checks.sequence_count(shape, None if seqs.cu_seqlens is None else seqs.cu_seqlens.shape, name)


def check_pair_tensor(pairs: Any, like: Tensor, n_seqs: int, may_be_none: bool = False, of: str = "logits") -> int:
    """Checks `pairs` [P, 2], where they are given; returns their number."""
    if pairs is not None:
        check_integers("pairs", pairs)
        check_device("pairs", pairs, like, of)
    return _checks.pair_count(n_seqs, None if pairs is None else pairs.shape, may_be_none)


def check_pairs(like: Tensor, n_seqs: int, pairs: Pairs, ref_logps: Tensor | None, like_name: str = "logits") -> int:
    """Checks what a loss takes beside n_seqs log-probs; returns the number of pairs."""
    if ref_logps is not None:
        if not ref_logps.is_floating_point():
            raise TypeError(f"ref_logps must be floating-point numbers, found {ref_logps.dtype}")
        check_numbers("ref_logps", ref_logps, like, (n_seqs,), "with one log-prob per sequence", like_name)
    n_pairs = check_pair_tensor(pairs.pairs, like, n_seqs, pairs.divisor != 0, like_name)
    for name, tensor in pairs.numbers._asdict().items() if pairs.numbers is not NO_NUMBERS else ():
        if tensor is not None:
            name = name.removeprefix("pair_") if name == "pair_beta" else name
            check_numbers(name, tensor, like, (n_pairs,), "with one number per pair", like_name)
    if pairs.baseline is not None:
        check_numbers("baseline", pairs.baseline, like, (), "as one number", like_name)
    return n_pairs


def check_saved(logits: Tensor, targets: Tensor, logps: Tensor, stats: Tensor) -> None:
    """Checks what forward left of each row of logits or hidden states."""
    check_device("logps", logps, logits, "the first argument")
    check_device("stats", stats, logits, "the first argument")
    if logps.shape != targets.shape:
        check_shape("logps", logps.shape, targets.shape, "as targets have")
    if stats.shape[:-1] != logits.shape[:-1] or stats.shape[-1] != 2:
        check_shape("stats", stats.shape, (*logits.shape[:-1], 2), "to fit logits of shape ", logits.shape)


def check_gradients(like: Tensor, targets: Tensor | None, grad: Grads, n_seqs: int, n_pairs: int) -> None:
    """Checks the gradients that come in; each is on the device of `like`."""
    logps, statistics, seq_logps, loss, losses = grad
    if logps is not None and targets is not None:
        check_numbers("grad_logps", logps, like, targets.shape, "to fit the others")
    if statistics:
        for each, tensor in zip(_checks.STATISTICS, statistics, strict=True):
            if tensor is not None and not each.differentiable:
                raise ValueError(f"{each.name} has no gradient")
            check_numbers(f"grad_{each.name}", tensor, like, like.shape[:-1], "to fit the others")
    check_numbers("grad_seq_logps", seq_logps, like, (n_seqs,), "to fit the others")
    check_numbers("grad_loss", loss, like, (), "to fit the others")
    check_numbers("grad_losses", losses, like, (n_pairs,), "to fit the others")


def check_rows_backward(logits: Tensor, a: RowsBackward) -> None:
    """Checks everything that a backward pass from logits takes."""
    check_rows(logits, a.rows)
    grad, saved, n_seqs, n_pairs = a.grad, a.saved, 0, 0
    check_saved(logits, a.rows.targets, saved.logps, saved.stats)
    if grad.seq_logps is not None or grad.loss is not None or grad.losses is not None:
        n_seqs = check_sequences(logits, a.rows, a.seqs)
    if grad.loss is not None or grad.losses is not None:
        n_pairs = check_pair_tensor(a.pairs, logits, n_seqs, a.divisor != 0)
        if saved.pair_grads is None:
            raise ValueError("grad_loss and grad_losses need pair_grads of the forward pass")
        check_numbers("pair_grads", saved.pair_grads, logits, (n_pairs, 2), "with two derivatives per pair")
    check_gradients(logits, a.rows.targets, grad, n_seqs, n_pairs)
    if saved.seq_saved is not None:
        check_device("seq_saved", saved.seq_saved, logits, "logits")
    if _checks.of_statistic("entropy", grad.statistics) is not None:
        if saved.entropy is None:
            raise ValueError("grad_entropy needs the entropy of the forward pass")
        check_numbers("entropy", saved.entropy, logits, logits.shape[:-1], "with one number per row")


def check_logps(logps: Tensor) -> None:
    """Checks sequence log-probs [S]."""
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logps must be torch.float32 or torch.float64, found {logps.dtype}")
    if logps.dim() != 1:
        raise ValueError(f"logps must have shape [S], found {tuple(logps.shape)}")


def check_inplace(logits: Tensor) -> None:
    """Refuses logits whose elements share memory, over which a gradient cannot be written."""
    if not logits.is_contiguous() and _checks.overlaps(logits.shape, logits.stride()):
        raise ValueError(
            f"inplace_backward needs logits whose elements do not share memory, found strides {logits.stride()} for "
            f"shape {tuple(logits.shape)} (expanded?)"
        )


def check_head(hidden: Tensor, head: Head, rows: Rows) -> None:
    """Checks hidden [S, T, H] or [N, H], targets [S, T] or [N], and the head."""
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must have shape [S, T, H], or [N, H] when packed, found {tuple(hidden.shape)}")
    if hidden.dtype not in LOGIT_TYPES:
        raise TypeError(f"hidden must be one of {', '.join(map(str, LOGIT_TYPES))}, found {hidden.dtype}")
    vocab = head.weight.shape[0] if head.weight.dim() else 0
    rank = head.lora_a.shape[0] if head.lora_a is not None and head.lora_a.dim() else 0
    shapes = ((vocab, hidden.shape[-1]), (vocab,), (rank, hidden.shape[-1]), (vocab, rank))
    for name, tensor, shape in zip(head._fields, head[:4], shapes, strict=False):
        if tensor is None:
            continue
        if tensor.shape != shape:
            check_shape(name, tensor.shape, shape, f"to fit hidden of shape {tuple(hidden.shape)} and the vocabulary")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} and hidden must have one type, found {tensor.dtype} and {hidden.dtype}")
        check_device(name, tensor, hidden, "hidden")
    if vocab < 1:
        raise ValueError(f"weight must have at least one token in the vocabulary, found {tuple(head.weight.shape)}")
    if (head.lora_a is None) != (head.lora_b is None):
        raise ValueError("lora needs both A and B")
    _checks.check_options(rows.options, vocab)
    check_targets(rows.targets, hidden, "hidden")
    for name, tensor in (("row_mask", rows.row_mask), ("token_weights", rows.token_weights)):
        check_numbers(name, tensor, hidden, rows.targets.shape, "as targets have", "hidden")
    if rows.targets.shape != hidden.shape[:-1]:
        check_shape("targets", rows.targets.shape, hidden.shape[:-1], "to fit hidden of shape ", hidden.shape)

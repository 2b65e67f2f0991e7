"""The operators `torch.ops.dpo_fast.*`: schemas, CPU implementations over the Cython kernels, and fakes.

An operator checks its tensors, allocates its outputs and calls one kernel; it has no autograd (that is in logps.py and
losses.py). Devices without a compiled kernel take the plain-torch path of fallback.py. `Library.define/impl` is used
because it is the cheapest way into the dispatcher: 2-4 us a call, against 10 us and more for `custom_op`.

    token_forward      logits, targets -> token log-probs and statistics
    sequence_forward   ... -> sequence log-probs
    dpo_forward        ... -> losses and their derivatives
    preference_forward log-probs -> losses and their derivatives
    *_backward         incoming gradients -> gradient of the logits (of the log-probs for preference_backward)
    *_backward_        the same, written over the logits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_fast import _checks, _cpu, _native, fallback
from dpo_fast._checks import check_shape
from dpo_fast._remembered import FOR_BACKWARD, PLAIN, RESULT, UNWANTED, Room, by_metadata
from dpo_fast._sequences import wide_type

LOGIT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_ROWS = "Tensor logits, Tensor targets"
OPTIONS = "int ignore_index, float temperature, float logit_scale, float softcap"
_SEQS = "Tensor? cu_seqlens, Tensor? token_weights, bool average"
PAIRS = "Tensor? pairs, Tensor? pair_weights, Tensor? baseline"
# dpo_fast._loss_options.LossOptions, and what the sum over pairs is divided by (0: their number)
LOSS = (
    "int[] loss_types, float[] loss_weights, float beta, float label_smoothing, float discopop_tau, "
    "float simpo_gamma, int divergence, float alpha, float desirable_weight, float undesirable_weight, "
    "float tokens_per_pair, bool averages, float divisor"
)
N_LOSS = 12
_SAVED = "Tensor logps, Tensor stats"

SCHEMAS = {
    "token_forward": f"({_ROWS}, Tensor? row_mask, {OPTIONS}, bool entropy, bool mean_logits, bool is_top1, "
    "bool log_sum_sq_probs) -> (Tensor logps, Tensor stats, Tensor entropy, Tensor mean_logits, Tensor is_top1, "
    "Tensor log_sum_sq_probs)",
    "token_backward": f"({_ROWS}, Tensor? row_mask, {OPTIONS}, {_SAVED}, Tensor? entropy, Tensor? grad_logps, "
    "Tensor? grad_entropy)",
    "sequence_forward": f"({_ROWS}, {_SEQS}, {OPTIONS}, bool double_sums) -> (Tensor seq_logps, "
    "Tensor logps, Tensor stats, Tensor seq_saved)",
    "sequence_backward": f"({_ROWS}, {_SEQS}, {OPTIONS}, {_SAVED}, Tensor grad_seq_logps, Tensor? seq_saved=None)",
    "dpo_forward": f"({_ROWS}, Tensor? ref_logps, {_SEQS}, {PAIRS}, {OPTIONS}, {LOSS}, bool wpo, bool entropy, "
    "bool mean_logits, bool is_top1) -> (Tensor loss, Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, "
    "Tensor seq_logps, Tensor logps, Tensor stats, Tensor pair_grads, Tensor entropy, Tensor mean_logits, "
    "Tensor is_top1, Tensor seq_saved)",
    "dpo_backward": f"({_ROWS}, {_SEQS}, Tensor? pairs, {OPTIONS}, float divisor, {_SAVED}, Tensor pair_grads, "
    "Tensor? grad_loss, Tensor? grad_losses, Tensor? grad_seq_logps, Tensor? seq_saved=None)",
    "preference_forward": f"(Tensor logps, Tensor? ref_logps, Tensor? lengths, {PAIRS}, {LOSS}) -> (Tensor loss, "
    "Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, Tensor pair_grads)",
    "preference_backward": "(Tensor logps, Tensor? pairs, float divisor, Tensor pair_grads, Tensor? grad_loss, "
    "Tensor? grad_losses) -> Tensor",
}

_lib = torch.library.Library("dpo_fast", "DEF")


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines an operator that has one implementation for all devices."""
    _lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dpo_fast::{name}", fake, lib=_lib)


# The implementations for the CPU, by name.
_ON_CPU: dict[str, Callable[..., Any]] = {}


def implement(name: str, implementation: Callable[..., Any], key: str) -> None:
    """Gives an operator an implementation for one kind of device."""
    _lib.impl(name, implementation, key)
    if key == "CPU":
        _ON_CPU[name] = implementation


def call(name: str, tensor: Tensor, *args: Any, **direct: Any) -> Any:
    """Calls an operator; straight, without torch's dispatcher, where nothing there would take part.

    That is in eager mode, for plain tensors on the CPU, with no mode on the stack. It saves some 10 us a call. `direct`
    is for such a call only: `keep`, whether a backward will follow.
    """
    if (
        not torch.compiler.is_compiling()
        and tensor.__class__ in PLAIN
        and tensor.is_cpu
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not tensor.is_neg()
    ):
        return _ON_CPU[name](tensor, *args, **direct)
    return getattr(torch.ops.dpo_fast, name)(tensor, *args)


def _define(
    name: str, schema: str, cpu: Callable[..., Any], other: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Defines an operator with kernels for the CPU and plain torch elsewhere; `fake` checks what they are given."""

    def checked(*args: Any) -> Any:
        fake(*args)
        return other(*args)

    define(name, schema, checked, fake)
    implement(name, cpu, "CPU")


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A tensor just made, all of which will be written: its memory may come from the system in huge pages."""
    if tensor.is_cpu:
        _cpu.expect_writes(tensor.data_ptr(), tensor.nbytes)
    return tensor


# --- checks -----------------------------------------------------------------------------------------------------------


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str = "logits") -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, found {tensor.device}")


def check_integers(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor holds integers that fit int64."""
    if not _checks.is_integer_type(str(tensor.dtype).removeprefix("torch.")):
        raise TypeError(f"{name} must be integers, found {tensor.dtype}")


def _check_real(name: str, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError(f"{name} must be real numbers, found {tensor.dtype}")


def _check_logits_type(name: str, logits: Tensor) -> None:
    if logits.dtype not in LOGIT_TYPES:
        types = ", ".join(str(t) for t in LOGIT_TYPES)
        raise TypeError(f"{name} must be one of {types}, found {logits.dtype}")


def check_rows(logits: Tensor, targets: Tensor, row_mask: Tensor | None = None, name: str = "logits") -> None:
    """Checks logits [..., V] with targets [...] or [..., K] and row_mask [...]."""
    _checks.check_logits_shape(logits.shape, name)
    _check_logits_type(name, logits)
    check_integers("targets", targets)
    check_device("targets", targets, logits, name)
    lead: tuple[int, ...] = tuple(logits.shape[:-1])
    if targets.dim() == logits.dim():
        lead = (*lead, targets.shape[-1])
    check_shape("targets", targets.shape, lead, f"to fit {name} of shape {tuple(logits.shape)}")
    if row_mask is not None:
        check_device("row_mask", row_mask, logits)
        check_shape("row_mask", row_mask.shape, logits.shape[:-1], f"to fit logits of shape {tuple(logits.shape)}")


def check_sequence_arguments(
    like: Tensor, targets: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None, like_name: str = "logits"
) -> int:
    """Checks what groups and weights the rows of `like` (logits or hidden states); returns the number of sequences."""
    if cu_seqlens is not None:
        check_integers("cu_seqlens", cu_seqlens)
        check_device("cu_seqlens", cu_seqlens, like, like_name)
    if token_weights is not None:
        _check_real("token_weights", token_weights)
        check_device("token_weights", token_weights, like, like_name)
        check_shape("token_weights", token_weights.shape, targets.shape, "as targets have")
    return _checks.sequence_count(like.shape, None if cu_seqlens is None else cu_seqlens.shape, like_name)


def check_sequences(logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None) -> int:
    """Checks one target per row, and what groups and weights the rows; returns the number of sequences."""
    check_rows(logits, targets)
    check_shape("targets", targets.shape, logits.shape[:-1], f"to fit logits of shape {tuple(logits.shape)}")
    return check_sequence_arguments(logits, targets, cu_seqlens, token_weights)


def rounds_sums(logits: Tensor, ref_logps: Tensor | None) -> bool:
    """Whether sequence log-probs are rounded to float32 before the reference's are taken from them.

    As these were: equal models then give rewards of exactly 0. With float64 references nothing is rounded.
    """
    return ref_logps is not None and ref_logps.dtype is not torch.float64 and logits.dtype is not torch.float64


def check_pairs(
    like: Tensor,
    n_seqs: int,
    pairs: Tensor | None,
    ref_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    baseline: Tensor | None = None,
) -> int:
    """Checks what a loss takes beside n_seqs log-probs; returns the number of pairs."""
    if pairs is not None:
        check_integers("pairs", pairs)
        check_device("pairs", pairs, like)
    if ref_logps is not None:
        if not ref_logps.is_floating_point():
            raise TypeError(f"ref_logps must be floating-point numbers, found {ref_logps.dtype}")
        check_device("ref_logps", ref_logps, like)
        check_shape("ref_logps", ref_logps.shape, (n_seqs,), "with one log-prob per sequence")
    n_pairs = _checks.pair_count(n_seqs, None if pairs is None else pairs.shape)
    for name, tensor, shape, reason in (
        ("pair_weights", pair_weights, (n_pairs,), "with one number per pair"),
        ("baseline", baseline, (), "as one number"),
    ):
        if tensor is not None:
            _check_real(name, tensor)
            check_device(name, tensor, like)
            check_shape(name, tensor.shape, shape, reason)
    return n_pairs


def _check_saved(logits: Tensor, targets: Tensor, logps: Tensor, stats: Tensor) -> None:
    check_shape("logps", logps.shape, targets.shape, "as targets have")
    check_shape("stats", stats.shape, (*logits.shape[:-1], 2), f"to fit logits of shape {tuple(logits.shape)}")


@by_metadata
def _check_inplace(logits: Tensor) -> None:
    if _checks.overlaps(logits.shape, logits.stride()):
        raise ValueError(
            f"inplace_backward needs logits whose elements do not share memory, found strides {logits.stride()} for "
            f"shape {tuple(logits.shape)} (expanded?)"
        )


# --- tensors to addresses ---------------------------------------------------------------------------------------------


class Call:
    """Addresses of a call's tensors, converted to what the kernels read where needed and kept alive until it ends."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.wide = wide_type(dtype)
        self.alive: list[Tensor] = []

    def _as(self, tensor: Tensor | None, dtype: torch.dtype) -> int:
        if tensor is None:
            return 0
        if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.is_neg():
            tensor = tensor.to(dtype).contiguous().resolve_neg()
            self.alive.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor | None) -> int:
        """Address, in the type of log-probs."""
        return self._as(tensor, self.wide)

    def doubles(self, tensor: Tensor | None) -> int:
        """Address, in float64."""
        return self._as(tensor, torch.float64)

    def integers(self, tensor: Tensor | None) -> int:
        """Address, in int64."""
        return self._as(tensor, torch.int64)

    def reference(self, ref_logps: Tensor | None) -> tuple[int, bool]:
        """Address of the reference's log-probs, float32 or float64, and whether they are float64."""
        double = ref_logps is not None and ref_logps.dtype is torch.float64
        return self._as(ref_logps, torch.float64 if double else torch.float32), double

    def rows(
        self,
        logits: Tensor,
        targets: Tensor,
        row_mask: Tensor | None,
        weights: Tensor | None,
        options: tuple[Any, ...],
        double_weights: bool = True,
    ) -> tuple[int | float, ...]:
        """The kernels' `rows`."""
        n_targets = targets.shape[-1] if targets.dim() == logits.dim() else 1
        return (
            *_checks.rows_head(LOGIT_TYPES[logits.dtype], logits.shape, logits.stride(), n_targets, options),
            logits.data_ptr(),
            self._as(targets, torch.int64),
            self._as(row_mask, torch.bool),
            self.weights_address(weights, double_weights),
        )

    def weights_address(self, weights: Tensor | None, double: bool) -> int:
        """Token weights, here always in float64."""
        return self.doubles(weights)

    def pairs(
        self,
        n_pairs: int,
        pairs: Tensor | None,
        divisor: float,
        pair_weights: Tensor | None = None,
        baseline: Tensor | None = None,
    ) -> tuple[int | float, ...]:
        """The kernels' `pairs`."""
        return self.integers(pairs), n_pairs, self.doubles(pair_weights), self.doubles(baseline), divisor

    def backward(
        self,
        grad: Tensor,
        rows: tuple[int | float, ...],
        seqs: tuple[int, int, bool] | None,
        pairs: tuple[int | float, ...] | None,
        saved: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        grads: tuple[Tensor | None, ...],
    ) -> None:
        """Fills grad with the CPU kernels."""
        logps, stats, entropy, pair_grads = saved
        layout = _checks.row_layout(grad.shape, grad.stride())
        _cpu.backward(
            rows,
            seqs,
            pairs,
            torch.get_num_threads(),
            self.floats(logps),
            self.floats(stats),
            self.floats(entropy),
            self.doubles(pair_grads),
            *[self.floats(g) for g in grads],  # type: ignore[call-arg]
            grad.data_ptr(),
            layout.seq_stride,
            layout.row_stride,
            layout.vocab_stride,
        )


_HAS_CUDA_KERNELS = _native.has_cuda_kernels()


def _seq_saved_shape(like: Tensor, n_seqs: int) -> tuple[int, int]:
    """What forward keeps of each sequence for backward: nothing, but for the CUDA kernels."""
    if not _HAS_CUDA_KERNELS or like.device.type != "cuda":
        return 0, 0
    from dpo_fast import _cuda_ops

    return _cuda_ops.seq_saved_shape(n_seqs)


# --- token log-probs --------------------------------------------------------------------------------------------------


def _extra(shape: tuple[int, ...], dtype: torch.dtype, wanted: bool) -> tuple[tuple[int, ...], torch.dtype, int]:
    return (shape, dtype, RESULT) if wanted else ((0,), dtype, UNWANTED)


@by_metadata
def _token_room(logits: Tensor, targets: Tensor, row_mask: Tensor | None, *want: bool) -> Room:
    check_rows(logits, targets, row_mask)
    wide = wide_type(logits.dtype)
    rows, each = tuple(logits.shape[:-1]), tuple(targets.shape)
    types = (wide, wide, torch.bool, wide)
    extras = [_extra(*extra) for extra in zip((rows, rows, each, rows), types, want, strict=True)]
    return Room(logits, (each, wide, RESULT), ((*rows, 2), wide, FOR_BACKWARD), *extras)


def token_outputs(
    logits: Tensor, targets: Tensor, row_mask: Tensor | None, *options_and_want: Any, keep: bool | None = None
) -> tuple[Tensor, ...]:
    """Checks what token_forward is given; room for what it returns."""
    return tuple(_token_room(logits, targets, row_mask, *options_and_want[4:]).make(keep))


def _token_forward(
    logits: Tensor, targets: Tensor, row_mask: Tensor | None, *options_and_want: Any, keep: bool | None = None
) -> tuple[Tensor, ...]:
    out = token_outputs(logits, targets, row_mask, *options_and_want, keep=keep)
    call = Call(logits.dtype)
    rows = call.rows(logits, targets, row_mask, None, options_and_want[:4])
    _cpu.token_forward(rows, torch.get_num_threads(), *[t.data_ptr() for t in out])  # 0 where not wanted
    return out


@by_metadata
def _check_token_backward(logits: Tensor, targets: Tensor, row_mask: Tensor | None, *rest: Any) -> None:
    logps, stats, entropy, grad_logps, grad_entropy = rest[4:]
    check_rows(logits, targets, row_mask)
    _check_saved(logits, targets, logps, stats)
    if grad_logps is not None:
        check_shape("grad_logps", grad_logps.shape, targets.shape, "as targets have")
    if grad_entropy is not None:
        check_shape("grad_entropy", grad_entropy.shape, logits.shape[:-1], "with one number per row")
        if entropy is None:
            raise ValueError("grad_entropy needs the entropy of the forward pass")
        check_shape("entropy", entropy.shape, logits.shape[:-1], "with one number per row")


def _token_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logps: Tensor,
    stats: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    call = Call(logits.dtype)
    options = (ignore_index, temperature, logit_scale, softcap)
    rows = call.rows(logits, targets, row_mask, None, options)
    grads = (grad_logps, grad_entropy, None, None, None)
    call.backward(grad, rows, None, None, (logps, stats, entropy, None), grads)


# --- sequence log-probs -----------------------------------------------------------------------------------------------


@by_metadata
def _sequence_room(
    logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None, double_sums: bool
) -> Room:
    n_seqs = check_sequences(logits, targets, cu_seqlens, token_weights)
    wide = wide_type(logits.dtype)
    shape = tuple(targets.shape)
    return Room(
        logits,
        ((n_seqs,), torch.float64 if double_sums else wide, RESULT),
        (shape, wide, RESULT),
        ((*shape, 2), wide, FOR_BACKWARD),
        (_seq_saved_shape(logits, n_seqs), torch.float64, FOR_BACKWARD if logits.is_cuda else UNWANTED),
    )


def sequence_outputs(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    *rest: Any,
    keep: bool | None = None,
) -> tuple[Tensor, ...]:
    """Checks what sequence_forward is given; room for what it returns."""
    return tuple(_sequence_room(logits, targets, cu_seqlens, token_weights, rest[4]).make(keep))


def _sequence_forward(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    *options: Any,
    keep: bool | None = None,
) -> tuple[Tensor, ...]:
    out = sequence_outputs(logits, targets, cu_seqlens, token_weights, average, *options, keep=keep)
    seq_logps, logps, stats, _ = out
    call = Call(logits.dtype)
    _cpu.sequence_forward(
        call.rows(logits, targets, None, token_weights, options[:4]),
        (call.integers(cu_seqlens), seq_logps.shape[0], average),
        torch.get_num_threads(),
        logps.data_ptr(),
        stats.data_ptr(),
        seq_logps.data_ptr(),
        options[4],
    )
    return out


@by_metadata
def _check_sequence_backward(
    logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None, token_weights: Tensor | None, average: bool, *rest: Any
) -> None:
    logps, stats, grad_seq_logps = rest[4:7]
    n_seqs = check_sequences(logits, targets, cu_seqlens, token_weights)
    _check_saved(logits, targets, logps, stats)
    check_shape("grad_seq_logps", grad_seq_logps.shape, (n_seqs,), "with one number per sequence")


def _sequence_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    logps: Tensor,
    stats: Tensor,
    grad_seq_logps: Tensor,
    seq_saved: Tensor | None = None,
) -> None:
    call = Call(logits.dtype)
    options = (ignore_index, temperature, logit_scale, softcap)
    call.backward(
        grad,
        call.rows(logits, targets, None, token_weights, options),
        (call.integers(cu_seqlens), grad_seq_logps.shape[0], average),
        None,
        (logps, stats, None, None),
        (None, None, grad_seq_logps, None, None),
    )


# --- the preference loss from logits ----------------------------------------------------------------------------------


@by_metadata
def _dpo_room(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    *want: bool,
) -> Room:
    *seqs, seq_saved = _sequence_room(logits, targets, cu_seqlens, token_weights, False).tensors
    n_pairs = check_pairs(logits, seqs[0][0][0], pairs, ref_logps, pair_weights, baseline)
    wide = wide_type(logits.dtype)
    shape, types = tuple(targets.shape), (wide, wide, torch.bool)
    return Room(
        logits,
        ((), wide, RESULT),
        *[((n_pairs,), wide, RESULT)] * 3,
        *seqs,
        ((n_pairs, 2), torch.float64, FOR_BACKWARD),
        *[_extra(shape, dtype, wanted) for dtype, wanted in zip(types, want, strict=True)],
        seq_saved,
    )


def dpo_outputs(
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
    keep: bool | None = None,
) -> tuple[Tensor, ...]:
    """Checks what dpo_forward is given; room for what it returns."""
    args = (logits, targets, ref_logps, cu_seqlens, token_weights, pairs, pair_weights, baseline)
    return tuple(_dpo_room(*args, *rest[-3:]).make(keep))


def split_loss_arguments(rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], float, tuple[bool, ...]]:
    """What follows the tensors of dpo_forward: options of the logits, the loss, its divisor, wpo and statistics."""
    return rest[:4], rest[4 : 4 + N_LOSS], rest[4 + N_LOSS], rest[5 + N_LOSS :]


def _dpo_forward(
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
    keep: bool | None = None,
) -> tuple[Tensor, ...]:
    out = dpo_outputs(
        logits, targets, ref_logps, cu_seqlens, token_weights, average, pairs, pair_weights, baseline, *rest, keep=keep
    )
    loss, losses, chosen_rewards, rejected_rewards, seq_logps, logps, stats, pair_grads, *extras, _ = out
    options, loss_options, divisor, (wpo, *_) = split_loss_arguments(rest)
    log_sum_sq_probs = torch.empty_like(logps) if wpo else None
    call = Call(logits.dtype)
    _cpu.dpo_forward(  # type: ignore[call-arg]
        call.rows(logits, targets, None, token_weights, options),
        (call.integers(cu_seqlens), seq_logps.shape[0], average),
        call.pairs(losses.shape[0], pairs, divisor, pair_weights, baseline),
        loss_options,
        torch.get_num_threads(),
        wpo,
        rounds_sums(logits, ref_logps),
        *call.reference(ref_logps),
        logps.data_ptr(),
        stats.data_ptr(),
        *[extra.data_ptr() for extra in extras],  # 0 where not wanted
        0 if log_sum_sq_probs is None else log_sum_sq_probs.data_ptr(),
        seq_logps.data_ptr(),
        loss.data_ptr(),
        losses.data_ptr(),
        chosen_rewards.data_ptr(),
        rejected_rewards.data_ptr(),
        pair_grads.data_ptr(),
    )
    return out


@by_metadata
def _check_dpo_backward(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    *rest: Any,
) -> None:
    logps, stats, pair_grads, grad_loss, grad_losses, grad_seq_logps = rest[5:11]
    n_seqs = check_sequences(logits, targets, cu_seqlens, token_weights)
    n_pairs = check_pairs(logits, n_seqs, pairs)
    _check_saved(logits, targets, logps, stats)
    _check_pair_grads(n_pairs, pair_grads, grad_loss, grad_losses)
    if grad_seq_logps is not None:
        check_shape("grad_seq_logps", grad_seq_logps.shape, (n_seqs,), "with one number per sequence")


def _dpo_backward_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    average: bool,
    pairs: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    divisor: float,
    logps: Tensor,
    stats: Tensor,
    pair_grads: Tensor,
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
    grad_seq_logps: Tensor | None,
    seq_saved: Tensor | None = None,
) -> None:
    n_seqs = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n_pairs = pair_grads.shape[0]
    call = Call(logits.dtype)
    options = (ignore_index, temperature, logit_scale, softcap)
    call.backward(
        grad,
        call.rows(logits, targets, None, token_weights, options),
        (call.integers(cu_seqlens), n_seqs, average),
        call.pairs(n_pairs, pairs, divisor),
        (logps, stats, None, pair_grads),
        (None, None, grad_seq_logps, grad_loss, grad_losses),
    )


def _check_pair_grads(n_pairs: int, pair_grads: Tensor, grad_loss: Tensor | None, grad_losses: Tensor | None) -> None:
    check_shape("pair_grads", pair_grads.shape, (n_pairs, 2), "with two derivatives per pair")
    for name, grad in (("grad_loss", grad_loss), ("grad_losses", grad_losses)):
        if grad is not None:
            check_device(name, grad, pair_grads, "pair_grads")
    if grad_loss is not None:
        check_shape("grad_loss", grad_loss.shape, (), "as the reduced loss has")
    if grad_losses is not None:
        check_shape("grad_losses", grad_losses.shape, (n_pairs,), "with one number per pair")


# --- the preference loss from log-probs -------------------------------------------------------------------------------


def _check_logps(logps: Tensor) -> None:
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logps must be torch.float32 or torch.float64, found {logps.dtype}")
    if logps.dim() != 1:
        raise ValueError(f"logps must have shape [S], found {tuple(logps.shape)}")


@by_metadata
def _preference_room(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
) -> Room:
    _check_logps(logps)
    n_pairs = check_pairs(logps, logps.shape[0], pairs, ref_logps, pair_weights, baseline)
    if lengths is not None:
        _check_real("lengths", lengths)
        check_device("lengths", lengths, logps, "logps")
        check_shape("lengths", lengths.shape, logps.shape, "with one number per sequence")
    each = ((n_pairs,), logps.dtype, RESULT)
    return Room(logps, ((), logps.dtype, RESULT), each, each, each, ((n_pairs, 2), torch.float64, FOR_BACKWARD))


def preference_outputs(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    *_: Any,
    keep: bool | None = None,
) -> tuple[Tensor, ...]:
    """Checks what preference_forward is given; room for what it returns."""
    return tuple(_preference_room(logps, ref_logps, lengths, pairs, pair_weights, baseline).make(keep))


def _preference_forward(
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    pairs: Tensor | None,
    pair_weights: Tensor | None,
    baseline: Tensor | None,
    *rest: Any,
    keep: bool | None = None,
) -> tuple[Tensor, ...]:
    out = preference_outputs(logps, ref_logps, lengths, pairs, pair_weights, baseline, keep=keep)
    *loss_options, divisor = rest
    call = Call(logps.dtype)
    _cpu.preference_forward(
        call.pairs(out[1].shape[0], pairs, divisor, pair_weights, baseline),
        tuple(loss_options),
        logps.dtype is torch.float64,
        logps.shape[0],
        call.floats(logps),
        *call.reference(ref_logps),
        call.doubles(lengths),
        *[t.data_ptr() for t in out],
    )
    return out


@by_metadata
def _check_preference_backward(
    logps: Tensor, pairs: Tensor | None, pair_grads: Tensor, grad_loss: Tensor | None, grad_losses: Tensor | None
) -> None:
    _check_logps(logps)
    n_pairs = check_pairs(logps, logps.shape[0], pairs)
    check_device("pair_grads", pair_grads, logps, "logps")
    _check_pair_grads(n_pairs, pair_grads, grad_loss, grad_losses)


def preference_backward_output(
    logps: Tensor,
    pairs: Tensor | None,
    divisor: float,
    pair_grads: Tensor,
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
) -> Tensor:
    """Checks what preference_backward is given; room for what it returns."""
    _check_preference_backward(logps, pairs, pair_grads, grad_loss, grad_losses)
    return torch.empty_like(logps, memory_format=torch.contiguous_format)


def _preference_backward(
    logps: Tensor,
    pairs: Tensor | None,
    divisor: float,
    pair_grads: Tensor,
    grad_loss: Tensor | None,
    grad_losses: Tensor | None,
) -> Tensor:
    grad = preference_backward_output(logps, pairs, divisor, pair_grads, grad_loss, grad_losses)
    n_pairs = pair_grads.shape[0]
    call = Call(logps.dtype)
    _cpu.preference_backward(
        call.pairs(n_pairs, pairs, divisor),
        logps.dtype is torch.float64,
        logps.shape[0],
        call.doubles(pair_grads),
        call.floats(grad_loss),
        call.floats(grad_losses),
        grad.data_ptr(),
    )
    return grad


# --- registration -----------------------------------------------------------------------------------------------------

_define("token_forward", SCHEMAS["token_forward"], _token_forward, fallback.token_forward, token_outputs)
_define(
    "sequence_forward",
    SCHEMAS["sequence_forward"],
    _sequence_forward,
    fallback.sequence_forward,
    sequence_outputs,
)
_define("dpo_forward", SCHEMAS["dpo_forward"], _dpo_forward, fallback.dpo_forward, dpo_outputs)
_define(
    "preference_forward",
    SCHEMAS["preference_forward"],
    _preference_forward,
    fallback.preference_forward,
    preference_outputs,
)
_define(
    "preference_backward",
    SCHEMAS["preference_backward"],
    _preference_backward,
    fallback.preference_backward,
    preference_backward_output,
)


# Of each backward operator: how the function that fills a gradient becomes the two operators.
_BACKWARD_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def implement_backward(name: str, into: Callable[..., None], key: str) -> None:
    """Gives `name` and `name_` an implementation for one kind of device; `into` fills the gradient it gets first."""
    for full_name, kind in zip((name, name + "_"), _BACKWARD_KINDS[name], strict=True):
        implement(full_name, kind(into), key)


def _define_backward(
    name: str, check: Callable[..., None], cpu: Callable[..., None], other: Callable[..., None]
) -> None:
    """Defines `name`, which returns a fresh gradient, and `name_`, which writes it over the logits."""

    def fresh(into: Callable[..., None]) -> Callable[..., Tensor]:
        def implementation(logits: Tensor, *args: Any) -> Tensor:
            grad = in_huge_pages(fake(logits, *args))
            into(grad, logits, *args)
            return grad

        return implementation

    def inplace(into: Callable[..., None]) -> Callable[..., None]:
        def implementation(logits: Tensor, *args: Any) -> None:
            check(logits, *args)
            _check_inplace(logits)
            into(logits, logits, *args)
            # autograd does not see a write below it; this lets it refuse any later use of the logits it had saved
            torch.autograd.graph.increment_version(logits)

        return implementation

    def fake(logits: Tensor, *args: Any) -> Tensor:
        check(logits, *args)
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    mutating = SCHEMAS[name].replace("Tensor logits", "Tensor(a!) logits")
    for full_name, schema, kind, fake_kind in (
        (name, SCHEMAS[name] + " -> Tensor", fresh, fake),
        (name + "_", mutating + " -> ()", inplace, check),
    ):
        define(full_name, schema, kind(other), fake_kind)
    _BACKWARD_KINDS[name] = (fresh, inplace)
    implement_backward(name, cpu, "CPU")


_define_backward("token_backward", _check_token_backward, _token_backward_into, fallback.token_backward_into)
_define_backward(
    "sequence_backward", _check_sequence_backward, _sequence_backward_into, fallback.sequence_backward_into
)
_define_backward("dpo_backward", _check_dpo_backward, _dpo_backward_into, fallback.dpo_backward_into)

if _HAS_CUDA_KERNELS:
    from dpo_fast import _cuda_ops

    _cuda_ops.register()

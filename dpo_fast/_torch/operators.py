"""One record per operator: its arguments and results, named once; schemas and parsing follow from the records.

An operator takes one or more leading tensors, those that may get a gradient, and a record with everything else. Records
nest; in the schema their fields are in one line, a name that would be ambiguous prefixed by the record's own.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast._checks import LogitOptions
from dpo_fast._loss.options import LossOptions, PairNumbers

# --- parts of records -------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What the rows of logits are asked, and which of them count."""

    targets: Tensor  # [S, T], [N], or with one more dimension K
    row_mask: Tensor | None  # [S, T] or [N]
    token_weights: Tensor | None  # as targets
    options: LogitOptions


class Sequences(NamedTuple):
    """Which rows make a sequence."""

    cu_seqlens: Tensor | None  # [S + 1]; None: rows [S, T]
    average: bool


class Pairs(NamedTuple):
    """Which sequences make a pair, and the loss over pairs."""

    pairs: Tensor | None  # [P, 2]; None: first half chosen
    numbers: PairNumbers  # [P] each
    baseline: Tensor | None  # []
    loss: LossOptions
    divisor: float  # of the sum over pairs; 0: P


class Saved(NamedTuple):
    """What forward leaves for backward."""

    logps: Tensor  # as targets
    stats: Tensor  # [S, T, 2] or [N, 2]: shift and 1 / sum of exponentials
    entropy: Tensor | None
    pair_grads: Tensor | None  # [P, 2], float64
    seq_saved: Tensor | None  # of the CUDA kernels


class Grads(NamedTuple):
    """Incoming gradients."""

    logps: Tensor | None = None  # as targets
    statistics: tuple[Tensor | None, ...] = ()  # one per row, for each of STATISTICS; empty: for none
    seq_logps: Tensor | None = None  # [S]
    loss: Tensor | None = None  # []
    losses: Tensor | None = None  # [P]


class Head(NamedTuple):
    """logits = hidden @ weight.T + bias + lora_scaling * (hidden @ lora_a.T) @ lora_b.T."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    lora_scaling: float
    budget: int  # bytes for tiles of logits
    hidden_tolerance: float = 0.0  # of the gradients that come by way of the hidden states; 0: exact
    weight_tolerance: float = 0.0  # of those of the head's rows


# --- arguments of the operators ---------------------------------------------------------------------------------------


class TokenForward(NamedTuple):
    """Of logits [S, T, V] or [N, V]."""

    rows: Rows
    wanted: int  # STATISTIC_BITS
    keep: bool  # for a backward pass


class SequenceForward(NamedTuple):
    """Of logits."""

    rows: Rows
    seqs: Sequences
    double_sums: bool
    keep: bool


class DPOForward(NamedTuple):
    """Of logits."""

    rows: Rows
    seqs: Sequences
    pairs: Pairs
    ref_logps: Tensor | None  # [S]
    wpo: bool
    wanted: int
    keep: bool


class RowsBackward(NamedTuple):
    """Of logits: from gradients at any level."""

    rows: Rows
    seqs: Sequences
    pairs: Tensor | None
    divisor: float
    saved: Saved
    grad: Grads


class PreferenceForward(NamedTuple):
    """Of log-probs [S]."""

    pairs: Pairs
    ref_logps: Tensor | None
    lengths: Tensor | None  # [S]
    round_sums: bool  # to float32 where the reference is that: logits below float64 are behind them
    keep: bool


class PreferenceBackward(NamedTuple):
    """Of log-probs [S], of which nothing is read but shape and type."""

    pairs: Tensor | None
    divisor: float
    pair_grads: Tensor
    grad: Grads


class LinearTokenForward(NamedTuple):
    """Of hidden states [S, T, H] or [N, H]; `keep`: logits, as many as the budget allows."""

    head: Head
    tokens: TokenForward
    compact: bool


class LinearTokenBackward(NamedTuple):
    """Of hidden states."""

    head: Head
    rows: Rows
    saved: Saved
    buffer: Tensor | None  # kept logits, written over
    grad: Grads
    compact: bool
    needs: tuple[bool, ...]  # which of HEAD_INPUTS want a gradient


class LinearDPOForward(NamedTuple):
    """Of hidden states; gradients for an incoming gradient of 1 are made at once."""

    head: Head
    dpo: DPOForward
    z_loss_weight: float
    needs: tuple[bool, ...]  # as above


# --- results ----------------------------------------------------------------------------------------------------------


class TokenResult(NamedTuple):
    """Of a token forward."""

    logps: Tensor
    stats: Any  # Tensor; None where nothing is kept
    statistics: list[Tensor]  # those wanted, in order


class SequenceResult(NamedTuple):
    """Of a sequence forward."""

    seq_logps: Tensor
    tokens: TokenResult
    seq_saved: Tensor | None


class PreferenceResult(NamedTuple):
    """Of a loss over pairs."""

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    pair_grads: Any  # Tensor; None where nothing is kept


class DPOResult(NamedTuple):
    """Of a loss from logits."""

    losses: PreferenceResult
    seq_logps: Tensor
    tokens: TokenResult
    seq_saved: Tensor | None


class LinearTokenResult(NamedTuple):
    """Of a token forward from hidden states."""

    tokens: TokenResult
    buffer: Tensor | None


class HeadGradients(NamedTuple):
    """By the inputs of the head; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class LinearTokenGradients(NamedTuple):
    """Of a backward pass to hidden states and head."""

    grad: HeadGradients
    skipped: Any  # as below


class LinearDPOResult(NamedTuple):
    """Of a loss from hidden states."""

    dpo: DPOResult
    grad: HeadGradients
    skipped: Any  # Tensor []: the share of the gradients' mass left out; None where nothing may be


HEAD_INPUTS = HeadGradients._fields


# --- schemas and parsing ----------------------------------------------------------------------------------------------

_PREFIXED = ("saved", "grad", "loss")
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    typing.Any: "Tensor?",  # of PairNumbers, which NumPy's arrays share
    int: "int",
    float: "float",
    bool: "bool",
    tuple[int, ...]: "int[]",
    tuple[float, ...]: "float[]",
    tuple[bool, ...]: "bool[]",
    list[Tensor]: "Tensor[]",
    tuple[Tensor | None, ...]: "Tensor?[]",
}


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _leaves(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The names and types of a record's fields, those of nested records in their place."""
    for name, kind in typing.get_type_hints(record).items():
        if _is_record(kind):
            yield from _leaves(kind, f"{name}_" if name in _PREFIXED else prefix)
        else:
            yield prefix + name, kind


def flatten(record: Any) -> Iterator[Any]:
    """The fields of a record, those of nested records in their place."""
    for value in record:
        if _is_record(type(value)):
            yield from flatten(value)
        else:
            yield value


def _parts(record: Any) -> tuple[Any, ...]:
    """For each field the record that it is, or `tuple`, None for others; fills in _PARTS for all of them."""
    kinds = typing.get_type_hints(record).values()
    parts = [tuple if typing.get_origin(k) is tuple else k if _is_record(k) and _parts(k) else None for k in kinds]
    _PARTS[record] = tuple(parts)
    return _PARTS[record]


# By record: see `_parts`, and the names of its leaves. Tables, because torch.compile cannot ask for type hints.
_PARTS: dict[Any, tuple[Any, ...]] = {}
_NAMES: dict[Any, list[str]] = {}


def parse(record: Any, values: Iterator[Any]) -> Any:
    """The record whose flattened fields these are."""
    return record(*[_parsed(part, values) for part in _PARTS[record]])


def _parsed(part: Any, values: Iterator[Any]) -> Any:
    if part is None:
        return next(values)
    return tuple(next(values)) if part is tuple else parse(part, values)


class Operator(NamedTuple):
    """An operator `torch.ops.dpo_fast.<name>`."""

    name: str
    leading: str  # the tensor before the record
    arguments: Any
    result: Any  # a record, Tensor, or None where it writes over its first tensor
    written: str = ""  # a tensor, beside that one, that it writes over

    def argument_names(self) -> list[str]:
        """The names behind the leading tensor, as in the schema."""
        return _NAMES[self.arguments]

    def schema(self) -> str:
        """Its arguments and results, as torch.library writes them."""
        over = "Tensor(a!)" if self.result is None else "Tensor"
        taken = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in _leaves(self.arguments)]
        taken = [
            entry.replace("Tensor?", "Tensor(a!)?") if entry.endswith(" " + self.written) else entry for entry in taken
        ]
        if self.result is None or self.result is Tensor:
            given = "()" if self.result is None else "Tensor"
        else:
            # a result that is not wanted is an empty tensor
            kinds = [_SCHEMA_TYPES[kind].replace("?", "") for _, kind in _leaves(self.result)]
            given = f"({', '.join(kinds)})"
        return f"{self.name}({over} {self.leading}, {', '.join(taken)}) -> {given}"


TOKEN_FORWARD = Operator("token_forward", "logits", TokenForward, TokenResult)
SEQUENCE_FORWARD = Operator("sequence_forward", "logits", SequenceForward, SequenceResult)
DPO_FORWARD = Operator("dpo_forward", "logits", DPOForward, DPOResult)
ROWS_BACKWARD = Operator("rows_backward", "logits", RowsBackward, Tensor)
ROWS_BACKWARD_INPLACE = Operator("rows_backward_", "logits", RowsBackward, None)
PREFERENCE_FORWARD = Operator("preference_forward", "logps", PreferenceForward, PreferenceResult)
PREFERENCE_BACKWARD = Operator("preference_backward", "logps", PreferenceBackward, Tensor)
LINEAR_TOKEN_FORWARD = Operator("linear_token_forward", "hidden", LinearTokenForward, LinearTokenResult)
LINEAR_TOKEN_BACKWARD = Operator("linear_token_backward", "hidden", LinearTokenBackward, LinearTokenGradients, "buffer")
LINEAR_DPO_FORWARD = Operator("linear_dpo_forward", "hidden", LinearDPOForward, LinearDPOResult)
OPERATORS = (
    TOKEN_FORWARD, SEQUENCE_FORWARD, DPO_FORWARD, ROWS_BACKWARD, ROWS_BACKWARD_INPLACE, PREFERENCE_FORWARD,
    PREFERENCE_BACKWARD, LINEAR_TOKEN_FORWARD, LINEAR_TOKEN_BACKWARD, LINEAR_DPO_FORWARD,
)  # fmt: skip

for _operator in OPERATORS:
    for _record in (_operator.arguments, _operator.result):
        if _is_record(_record):
            _parts(_record)
            _NAMES[_record] = [_name for _name, _ in _leaves(_record)]

# By device type and operator: the function (leading tensor, record) -> result that does it (register.py).
DIRECT: dict[str, dict[str, Any]] = {}


def call(operator: Operator, tensor: Tensor, arguments: Any) -> Any:
    """Calls an operator: straight where torch's dispatcher would take no part, which saves some 10 us.

    That is in eager mode, for a plain tensor, with no mode on the stack. The functions refuse other tensors that are
    not plain by name. Straight calls return None for what is not wanted.
    """
    if (
        not torch.compiler.is_compiling()
        and tensor.__class__ in PLAIN
        and not _modes_on_the_stack()
        and _tracing_state() is None
    ):
        direct = DIRECT.get("cpu" if tensor.is_cpu else tensor.device.type)
        if direct is not None:
            return direct[operator.name](tensor, arguments)
    found = getattr(torch.ops.dpo_fast, operator.name)(tensor, *flatten(arguments))
    return found if operator.result is None or operator.result is Tensor else parse(operator.result, iter(found))


PLAIN = (Tensor, torch.nn.Parameter)
_modes_on_the_stack, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state

"""Bytes and operations of a call, as number and as formula. R: rows (tokens), K: rows kept, b: bytes of a logit."""

from __future__ import annotations

from typing import NamedTuple

from dpo_fast.bench import Case

FORWARD = "forward"
STEP = "forward + backward"

LEGEND = "R rows (tokens), K of them kept, vocabulary V, hidden width H, b bytes a number"


class Figure(NamedTuple):
    """An amount and where it comes from."""

    amount: float
    formula: str


def read_bytes(case: Case) -> Figure:
    """What a plain read of all logits reads."""
    return Figure(case.rows * case.V * case.itemsize, "R·V·b")


def copy_bytes(case: Case) -> Figure:
    """What a copy of all logits reads and writes."""
    return Figure(2 * case.rows * case.V * case.itemsize, "2·R·V·b")


def logits_bytes(case: Case, work: str) -> Figure:
    """What a loss from logits has to move: kept logits are read once in each pass, every gradient is written once."""
    if work == FORWARD:
        return Figure(case.kept * case.V * case.itemsize, "K·V·b")
    return Figure((2 * case.kept + case.rows) * case.V * case.itemsize, "(2·K + R)·V·b")


def products_flops(case: Case) -> Figure:
    """Hidden states x head, gradient x head, gradient x hidden states, on the kept rows."""
    return Figure(3 * 2 * case.kept * case.hidden * case.V, "3·2·K·H·V")


def gradient_bytes(case: Case) -> Figure:
    """The gradients of the hidden states and of the head."""
    return Figure((case.rows + case.V) * case.hidden * case.itemsize, "(R + V)·H·b")


def read_rate(case: Case, seconds: float) -> float:
    """Bytes a second of a plain read of all logits."""
    return read_bytes(case).amount / seconds


def copy_rate(case: Case, seconds: float) -> float:
    """Bytes a second of a copy of all logits, reads and writes counted."""
    return copy_bytes(case).amount / seconds

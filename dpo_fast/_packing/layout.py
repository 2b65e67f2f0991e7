"""Which rows of a packed batch see which: one number per row.

The tokens of a packed batch form a forest: a token's parent is the token before it in its sequence, and sequences with
a common prefix have its tokens in common. Rows stand in pre-order, a token before everything that follows it. Row n
then sees row m exactly where

    m <= n < last[m]            last[m]: the end of the rows that have m in their past

so `last` [N] stands for the whole N x N mask. Every mask of this package is built from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Run(NamedTuple):
    """Rows start to stop, each the next token after the one before; they see the rows of `past` and their own past."""

    start: int
    stop: int
    past: tuple[tuple[int, int], ...]  # bounds of rows, in order


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows of a packed batch in pre-order."""

    last: Ints  # [N]
    position_ids: Ints  # [N], what the model is given
    places: Ints  # [N], what a sliding window is measured in: tokens since the sequence's first one
    masks: dict[Any, Any] = field(default_factory=dict)  # made from it, for its next use

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self.last)

    @cached_property
    def runs(self) -> list[Run]:
        """The rows cut into chains, in order: a new one begins where the row before is not seen."""
        rows = np.arange(1, self.n_rows + 1)
        ends = rows[self.last == rows]
        found, start = [], 0
        for stop in ends.tolist():
            seen = np.flatnonzero(self.last[:start] > start)
            cuts = np.flatnonzero(np.diff(seen) != 1) + 1
            past = tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(seen, cuts) if len(part))
            found.append(Run(start, stop, past))
            start = stop
        return found

    @property
    def shares(self) -> bool:
        """Whether a row is in the past of several sequences."""
        return any(run.past for run in self.runs)


def layout_of_spans(spans: Ints, cu_seqlens: Ints, position_ids: Ints) -> Layout:
    """The layout of a batch from `packed_batch`.

    Raises:
        ValueError: spans [S, 3] and cu_seqlens [S + 1] that do not describe consecutive sequences.
    """
    if spans.ndim != 2 or spans.shape[1] != 3 or cu_seqlens.shape != (len(spans) + 1,):
        raise ValueError(
            f"spans must have shape [S, 3] and cu_seqlens [S + 1], found {spans.shape} and {cu_seqlens.shape}"
        )
    last = np.zeros(len(position_ids), np.int64)
    before, end_before = None, 0
    for s, ((start, end, own), stop) in enumerate(zip(spans.tolist(), cu_seqlens[1:].tolist(), strict=True)):
        follows = own == end_before if (start, end) == before else start == end_before and own == end
        if not follows or not start <= end <= own < stop <= len(last):
            raise ValueError(
                f"spans[{s}] = [{start}, {end}, {own}] with rows up to {stop} does not follow a sequence that ends at "
                f"{end_before}: a prompt stands before all its completions, without gaps"
            )
        last[start:end] = last[own:stop] = stop
        before, end_before = (start, end), stop
    if end_before != len(last):
        raise ValueError(f"cu_seqlens ends at {end_before}, the batch has {len(last)} rows")
    return Layout(last, position_ids, position_ids)


class Prefixes(NamedTuple):
    """Sequences packed with every common prefix once."""

    layout: Layout
    keys: Ints  # [N, K], of each row
    rows: list[Ints]  # for each sequence, the row of each of its tokens


def find_prefixes(sequences: Sequence[Ints], share: bool = True) -> Prefixes:
    """Packs sequences of token keys [length, K]: token id, position, place; equal beginnings are stored once.

    Sorted sequences that have a prefix in common are neighbours, and what a sequence shares with any earlier one it
    shares with the one just before it.
    """
    order = list(range(len(sequences)))
    if share:  # big-endian bytes sort as the numbers do, whatever the order: neighbours are all that matters
        order.sort(key=lambda s: sequences[s].astype(">i8").tobytes())
    rows: list[Ints] = [np.zeros(0, np.int64) for _ in sequences]
    parts: list[Ints] = []
    last = np.zeros(sum(map(len, sequences)), np.int64)
    n, before, path = 0, np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    for s in order:
        keys = sequences[s]
        common = _common_prefix(before, keys) if share else 0
        last[path[common:]] = n
        path = np.concatenate([path[:common], np.arange(n, n + len(keys) - common)])
        parts.append(keys[common:])
        n += len(keys) - common
        rows[s], before = path, keys
    last[path] = n
    keys = np.concatenate(parts) if parts else before
    return Prefixes(Layout(last[:n], keys[:, 1].copy(), keys[:, 2].copy()), keys, rows)


def _common_prefix(a: Ints, b: Ints) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero((a[:n] != b[:n]).any(-1))
    return int(differ[0]) if len(differ) else n

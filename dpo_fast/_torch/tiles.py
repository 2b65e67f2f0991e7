"""How rows of hidden states are cut into tiles whose logits fit a budget."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dpo_fast._checks import integer

# A tile has at least this many rows, whatever the budget: products of fewer rows waste the weight's read.
ROW_GROUP = 32

DEFAULT_BUDGET = {"cpu": 256 << 20, "cuda": 1 << 30}


class LinearPlan(NamedTuple):
    """How rows are worked on: `tile_rows` at a time in a buffer of `buffer_rows`, of which the first `kept_rows` keep
    their logits until backward; `bytes` is the buffer's size."""

    n_rows: int
    buffer_rows: int
    tile_rows: int
    kept_rows: int
    bytes: int


def default_budget(device: torch.device, memory_budget: int | None) -> int:
    """The bytes that tiles of logits may take."""
    if memory_budget is None:
        return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])
    budget = integer("memory_budget", memory_budget)
    if budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, found {memory_budget}")
    return budget


def plan_rows(n_rows: int, vocab: int, itemsize: int, budget: int, keep: bool) -> LinearPlan:
    """Tiles for n_rows rows of logits; `keep`: backward will want them again."""
    fit = max(ROW_GROUP, budget // (vocab * itemsize))
    if n_rows <= fit:
        buffer, tile, kept = n_rows, n_rows, n_rows if keep else 0
    elif keep:  # a quarter to work in, the rest saves recomputing
        tile = max(ROW_GROUP, fit // 4)
        kept = max(0, fit - tile)
        buffer = kept + tile
    else:
        buffer, tile, kept = fit, fit, 0
    return LinearPlan(n_rows, buffer, tile, kept, buffer * vocab * itemsize)


def tile_bounds(plan: LinearPlan) -> list[tuple[int, int, int]]:
    """(first row, end, first row in the buffer) of each tile; kept tiles come first and have places of their own."""
    tiles = []
    start = 0
    while start < plan.n_rows:
        limit = plan.kept_rows if start < plan.kept_rows else plan.n_rows
        end = min(start + max(plan.tile_rows, 1), limit)
        tiles.append((start, end, start if start < plan.kept_rows else plan.kept_rows))
        start = end
    return tiles

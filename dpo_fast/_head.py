"""The LM head on tiles of rows: logits from hidden states, and gradients from the logits' gradient.

The products are torch's (`mm`, `addmm`); nothing here looks at a logit. Weight and bias gradients of several tiles are
added up in float32 whatever the inputs, because sums in bfloat16 over many tiles make training drift.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast._sequences import wide_type

# A tile has at least this many rows, whatever the budget: products of fewer rows waste the weight's read.
ROW_GROUP = 32

DEFAULT_BUDGET = {"cpu": 256 << 20, "cuda": 1 << 30}


class Head(NamedTuple):
    """logits = hidden @ weight.T + bias + lora_scaling * (hidden @ lora_a.T) @ lora_b.T."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    lora_scaling: float


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


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
    if memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, found {memory_budget}")
    return int(memory_budget)


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


def head_logits(head: Head, hidden: Tensor, out: Tensor) -> None:
    """Fills out [R, V] with the logits of hidden [R, H]."""
    if head.bias is None:
        torch.mm(hidden, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, hidden, head.weight.t(), out=out)
    if head.lora_a is not None and head.lora_b is not None:
        out.addmm_(hidden @ head.lora_a.t(), head.lora_b.t(), alpha=head.lora_scaling)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 where the device can give that from half types."""
    if a.dtype in (torch.bfloat16, torch.float16):
        if a.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 or later
            return torch.mm(a, b, out_dtype=torch.float32)
        if a.dtype is torch.float16:  # its range is too small for sums over many rows
            return torch.mm(a.float(), b.float())
    return torch.mm(a, b)


class HeadGrads:
    """Gradients of hidden states and head, added up over tiles.

    With one tile a product is rounded to its parameter's type at once; with several, each is added to a float32 sum.
    """

    def __init__(self, head: Head, hidden: Tensor, needs: Needs, n_tiles: int, dtype: torch.dtype) -> None:
        self.head, self.needs, self.several, self.dtype = head, needs, n_tiles > 1, dtype
        self.hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needs.hidden else None
        self.sums: dict[str, Tensor] = {}

    def add(self, dz: Tensor, hidden: Tensor, rows: Tensor | slice, scale: float = 1.0) -> None:
        """Adds a tile: dz [R, V] times `scale` is the gradient of the logits of hidden [R, H]."""
        head, needs = self.head, self.needs
        if self.hidden is not None:
            grad = _product(dz, head.weight)
            if scale != 1:
                grad = grad * scale
        if needs.weight:
            self._sum("weight", dz.t(), hidden, scale)
        if needs.bias:
            self._put("bias", dz.sum(0, dtype=wide_type(dz.dtype)), scale)
        if head.lora_a is not None and head.lora_b is not None:
            if needs.lora_b:
                self._sum("lora_b", dz.t(), hidden @ head.lora_a.t(), scale * head.lora_scaling)
            if needs.lora_a or self.hidden is not None:
                du = (_product(dz, head.lora_b) * (scale * head.lora_scaling)).to(dz.dtype)
                if needs.lora_a:
                    self._sum("lora_a", du.t(), hidden, 1.0)
                if self.hidden is not None:
                    grad = grad + du @ head.lora_a
        if self.hidden is not None:
            self.hidden[rows] = grad.to(self.hidden.dtype)

    def _sum(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        if name in self.sums and a.dtype in (torch.float32, torch.float64):
            self.sums[name].addmm_(a, b, alpha=scale)
        else:
            self._put(name, _product(a, b), scale)

    def _put(self, name: str, value: Tensor, scale: float) -> None:
        if name in self.sums:
            self.sums[name].add_(value, alpha=scale)
            return
        if self.several:
            value = value.to(wide_type(value.dtype))
        self.sums[name] = value if scale == 1 else value * scale

    def result(self) -> tuple[Tensor, ...]:
        """Gradients of hidden, weight, bias, lora_a and lora_b, in the given type; empty where not wanted."""
        none = self.head.weight.new_empty(0)
        out = [none if self.hidden is None else self.hidden]
        for name, wanted in zip(Needs._fields[1:], self.needs[1:], strict=True):
            if not wanted:
                out.append(none.clone())
                continue
            parameter = getattr(self.head, name)
            total = self.sums.get(name)
            out.append(torch.zeros_like(parameter, dtype=self.dtype) if total is None else total.to(self.dtype))
        return tuple(out)

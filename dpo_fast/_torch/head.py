"""The LM head on tiles of rows: logits from hidden states, and gradients from the logits' gradient.

The products are torch's (`mm`, `addmm`); nothing here looks at a logit. Gradients of float16 tiles come multiplied by
a power of 2 that keeps them in float16's range, and are in float32 until they are divided by it. Weight and bias
gradients of several tiles are added up in float32 whatever the inputs: sums in bfloat16 over many tiles make training
drift.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_fast._checks import LogitOptions
from dpo_fast._torch import tile_type
from dpo_fast._torch.operators import HEAD_INPUTS, Head, HeadGradients
from dpo_fast._torch.sequences import vocab_size, wide_type


def head_logits(head: Head, hidden: Tensor, out: Tensor) -> None:
    """Fills out [R, V] with the logits of hidden [R, H]."""
    if tile_type.through_float32(hidden.dtype, hidden.device):
        low_rank = None
        if head.lora_a is not None and head.lora_b is not None:
            low_rank = tile_type.product(hidden, head.lora_a.t()) * head.lora_scaling, head.lora_b
        tile_type.logits(hidden, head.weight, head.bias, low_rank, out)
        return
    if head.bias is None:
        torch.mm(hidden, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, hidden, head.weight.t(), out=out)
    if head.lora_a is not None and head.lora_b is not None:
        out.addmm_(hidden @ head.lora_a.t(), head.lora_b.t(), alpha=head.lora_scaling)


def range_scale(grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """A power of 2, [], that brings the largest of float16 rows' gradients near 1; None for other types.

    Without it the logits' gradients vanish, or overflow, in float16: mixed precision's loss scale may be missing so
    far, or be large.
    """
    if dtype is not torch.float16:
        return None
    each = [grad.float().abs().amax() for grad in grads if grad is not None and grad.numel()]
    if not each:
        return None
    largest = torch.stack(each).amax()
    scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)
    return torch.where((largest > 0) & torch.isfinite(largest), scale, torch.ones_like(scale))


def early_type(dtype: torch.dtype) -> torch.dtype:
    """The type of gradients made before the incoming gradient is known: float16 waits for its loss scale."""
    return torch.float32 if dtype is torch.float16 else dtype


def trimmed(head: Head, options: LogitOptions) -> Head:
    """The head without its padding."""
    vocab = vocab_size(head.weight.shape[0], options)
    if vocab == head.weight.shape[0]:
        return head
    bias, lora_b = (None if tensor is None else tensor[:vocab] for tensor in (head.bias, head.lora_b))
    return head._replace(weight=head.weight[:vocab], bias=bias, lora_b=lora_b)


def _product(a: Tensor, b: Tensor, rounded: bool = False) -> Tensor:
    """a @ b, in float32 where the device can give that from half types; rounded: bfloat16 need not come in float32."""
    if tile_type.through_float32(a.dtype, a.device):
        narrow = rounded and a.dtype is torch.bfloat16
        return tile_type.product(a, b, a.new_empty((a.shape[0], b.shape[1])) if narrow else None)
    if a.dtype in (torch.bfloat16, torch.float16):
        if a.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8 or later
            return torch.mm(a, b, out_dtype=torch.float32)
        if a.dtype is torch.float16:  # its range is too small for sums over many rows
            return torch.mm(a.float(), b.float())
    return torch.mm(a, b)


def _low_rank(head: Head, hidden: Tensor) -> Tensor:
    """The hidden states' product with LoRA's A, [R, r]."""
    a = head.lora_a.t()  # type: ignore[union-attr]
    if tile_type.through_float32(hidden.dtype, hidden.device):
        return tile_type.product(hidden, a).to(hidden.dtype)
    return hidden @ a


def _scaled(value: Tensor, scale: Tensor | float) -> Tensor:
    """In place: the value is a product's result."""
    return value if isinstance(scale, float) and scale == 1 else value.mul_(scale)


class HeadSums:
    """Gradients of hidden states and head, added up over tiles.

    With one tile a product is rounded to its parameter's type at once; with several, each is added to a float32 sum.
    """

    def __init__(self, head: Head, hidden: Tensor, needs: tuple[bool, ...], n_tiles: int, dtype: torch.dtype) -> None:
        self.head, self.several, self.dtype = head, n_tiles > 1, dtype
        self.needs = dict(zip(HEAD_INPUTS, needs, strict=True))
        self.hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if self.needs["hidden"] else None
        self.sums: dict[str, Tensor] = {}

    def add(self, dz: Tensor, hidden: Tensor, rows: Tensor | slice, scale: Tensor | float = 1.0) -> None:
        """Adds a tile: dz [R, V] times `scale` ([], for float16) is the gradient of the logits of hidden [R, H]."""
        self.add_to_hidden(dz, hidden, rows, scale)
        self.add_to_weight(dz, hidden, rows, scale)

    def add_to_hidden(
        self, dz: Tensor, hidden: Tensor, rows: Tensor | slice, scale: Tensor | float, head: Head | None = None
    ) -> None:
        """Adds to the gradients that come by way of the hidden states: theirs, and LoRA's A's.

        head: the columns that dz has; None: all.
        """
        head = self.head if head is None else head
        grad = None if self.hidden is None else _scaled(_product(dz, head.weight), scale)
        if head.lora_a is not None and head.lora_b is not None and (self.needs["lora_a"] or grad is not None):
            du = _scaled(_product(dz, head.lora_b), scale * head.lora_scaling)
            if dz.dtype is not torch.float16:  # its range is too small for what B has made of dz
                du = du.to(dz.dtype)
            if self.needs["lora_a"]:
                self._sum("lora_a", du.t(), hidden.to(du.dtype))
            if grad is not None:
                grad = grad + _product(du, head.lora_a.to(du.dtype))
        if self.hidden is not None and grad is not None:
            self.hidden[rows] = grad.to(self.hidden.dtype)

    def add_to_weight(self, dz: Tensor, hidden: Tensor, rows: Tensor | slice, scale: Tensor | float) -> None:
        """Adds to the gradients of the head's rows: weight, bias and LoRA's B."""
        head, needs = self.head, self.needs
        if needs["weight"]:
            self._sum("weight", dz.t(), hidden, scale)
        if needs["bias"]:
            self._put("bias", dz.sum(0, dtype=wide_type(dz.dtype)), scale)
        if needs["lora_b"] and head.lora_a is not None:
            self._sum("lora_b", dz.t(), _low_rank(head, hidden), scale * head.lora_scaling)

    def add_columns(
        self, kind: str, columns: Tensor, dz: Tensor, hidden: Tensor, rows: Tensor, scale: Tensor | float
    ) -> None:
        """As add_to_hidden or add_to_weight (`kind`), of a dz [R, C] whose other columns count as 0."""
        whole = self.head
        bias, lora_b = (None if t is None else t[columns] for t in (whole.bias, whole.lora_b))
        part = whole._replace(weight=whole.weight[columns], bias=bias, lora_b=lora_b)
        if kind == "hidden":
            self.add_to_hidden(dz, hidden, rows, scale, part)
            return
        found = HeadSums(part, hidden, (False, *[self.needs[name] for name in HEAD_INPUTS[1:]]), 1, self.dtype)
        found.add_to_weight(dz, hidden, rows, scale)
        for name, value in found.sums.items():
            out, has_sums = self.accumulator(name, (whole.weight.shape[0], *value.shape[1:]))
            if not has_sums:
                out.zero_()
            out.index_add_(0, columns, value.to(out.dtype))

    def accumulator(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, bool]:
        """The float32 sum (float64 for float64) of this name, and whether something has been added to it."""
        has_sums, like = name in self.sums, self.head.weight
        if not has_sums:
            self.sums[name] = torch.empty(shape, dtype=wide_type(like.dtype), device=like.device)
        return self.sums[name], has_sums

    def _sum(self, name: str, a: Tensor, b: Tensor, scale: Tensor | float = 1.0) -> None:
        """Adds a @ b times `scale` to a sum."""
        if name in self.sums and isinstance(scale, float) and a.dtype in (torch.float32, torch.float64):
            self.sums[name].addmm_(a, b, alpha=scale)
        else:
            self._put(name, _product(a, b, not self.several), scale)

    def _put(self, name: str, value: Tensor, scale: Tensor | float) -> None:
        value = _scaled(value, scale)
        if name in self.sums:
            self.sums[name].add_(value)
        else:
            self.sums[name] = value.to(wide_type(value.dtype)) if self.several else value

    def result(self, whole: Head) -> HeadGradients:
        """Gradients of hidden and of the whole head, 0 for its padding, in the given type; None where not wanted."""
        return HeadGradients(self.hidden, *[self._parameter(name, getattr(whole, name)) for name in HEAD_INPUTS[1:]])

    def _parameter(self, name: str, whole: Tensor | None) -> Tensor | None:
        if not self.needs[name] or whole is None:
            return None
        total = self.sums.get(name)
        if total is not None and total.shape == whole.shape:
            return total.to(self.dtype)
        grad = torch.zeros_like(whole, dtype=self.dtype)
        if total is not None:
            grad[: total.shape[0]] = total
        return grad

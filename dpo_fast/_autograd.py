"""What the autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """Hands gradients through and raises when they are differentiated.

    `sources`, which the gradients were made from, connect them with what these depend on: without such a path a second
    derivative would pass them by and come out as zero.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *sources: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("the gradients of dpo_fast's functions cannot be differentiated again")


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Decorates a backward pass: a second derivative raises instead of coming out as zero.

    torch's once_differentiable sees only incoming gradients that require a gradient; the logits do so always.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        compiling = torch.compiler.is_compiling()
        tensors = () if compiling else (*ctx.saved_tensors, *grads)
        sources = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
        with torch.no_grad():
            out = backward(ctx, *grads)
        if compiling:
            return out
        made = [grad.detach() for grad in out if grad is not None]
        refusing = iter(_Refuse.apply(made, *sources)) if made else iter(())
        return tuple(None if grad is None else next(refusing) for grad in out)

    return wrapper


def inplace_allowed(inplace_backward: bool) -> bool:
    """Whether backward may write over the logits: not in a compiled graph, where version counters guard nothing."""
    return inplace_backward and not torch.compiler.is_compiling()


def run(function: Any, tensor: Tensor, *args: Any) -> Any:
    """function.apply; its forward alone, with None as context, where `tensor`, which may get a gradient, wants none.

    That is much cheaper.
    """
    if torch.compiler.is_compiling() or (tensor.requires_grad and torch.is_grad_enabled()):
        return function.apply(tensor, *args)
    if not torch.is_grad_enabled():
        return function.forward(None, tensor, *args)
    with torch.no_grad():
        return function.forward(None, tensor, *args)

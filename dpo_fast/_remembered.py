"""What calls on tensors of the same types and shapes share: that these fit, and the shapes of the results.

Finding it out costs more than the rest of a small call, so that it is remembered, by the tensors' metadata alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def _inside_transform() -> bool:
    """Whether a transform of torch.func is at work: tensors made there belong to it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def by_metadata(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers what a function returns that looks at nothing of its tensors but types, shapes, strides and devices.

    Checks of arguments are such, and cost more than the rest of a small call. What raises is not remembered; tensors
    that are not plain ones (fake ones, subclasses) pass by.
    """
    memo: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(function)
    def remembering(*args: Any) -> Any:
        key: list[Any] = []
        for arg in args:
            if arg is None:
                key.append(None)
            elif arg.__class__ in PLAIN:
                key += arg.dtype, arg.shape, arg.stride(), arg.device
            elif isinstance(arg, Tensor):
                return function(*args)
            else:
                key.append(arg)
        found = memo.get(tuple(key), memo)
        if found is memo:  # not there
            found = function(*args)
            if _inside_transform():
                return found
            if len(memo) >= 256:
                memo.clear()
            memo[tuple(key)] = found
        return found

    return remembering


# What a tensor that an operator returns is for.
RESULT, FOR_BACKWARD, UNWANTED = range(3)


class Room:
    """What an operator returns, by shape, type and use: made anew for each call.

    A plain tensor is made like a single number that is seen as a tensor of that shape, which takes half of the time.
    """

    def __init__(self, like: Tensor, *tensors: tuple[tuple[int, ...], torch.dtype, int]) -> None:
        self.tensors, self.device = tensors, like.device
        # by `keep`: patterns, and whether a tensor is made from one, or it is returned itself
        self.patterns: dict[bool | None, list[tuple[Tensor, bool]]] = {}
        if like.__class__ in PLAIN and not _inside_transform():
            with torch.inference_mode(False):  # they outlive this call
                every = [self._pattern(shape, dtype) for shape, dtype, _ in tensors]
                nothing = [self._new((0,), dtype) for _, dtype, _ in tensors]
            uses = [use for *_, use in tensors]
            self.patterns[None] = [(pattern, True) for pattern in every]
            for keep, shared in ((True, (UNWANTED,)), (False, (UNWANTED, FOR_BACKWARD))):
                self.patterns[keep] = [
                    (none, False) if use in shared else (pattern, True)
                    for pattern, none, use in zip(every, nothing, uses, strict=True)
                ]

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _pattern(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # of a single element, or of none, the strides would be passed on
        return self._new(shape, dtype) if math.prod(shape) <= 1 else self._new((), dtype).expand(shape)

    def make(self, keep: bool | None = None) -> list[Tensor]:
        """New tensors, their numbers undefined.

        keep: in a direct call (see `call`), whether a backward will follow; what is not needed is then one tensor of no
        elements for all calls, which nobody gets to see. None: through the dispatcher, where autograd may mark any.
        """
        if not self.patterns:
            return [self._new(shape, dtype) for shape, dtype, _ in self.tensors]
        return [torch.empty_like(pattern) if anew else pattern for pattern, anew in self.patterns[keep]]

"""The operators' definition: the only file that knows all devices. A device is one line of DEVICES.

`Library.define/impl` is the cheapest way into the dispatcher: 2-4 us a call, against 10 us and more for `custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_fast._native import has_cuda_kernels
from dpo_fast._torch import cpu, cuda, linear, plain, shapes
from dpo_fast._torch.checks import check_device, check_inplace
from dpo_fast._torch.operators import DIRECT, OPERATORS, Operator, flatten, parse

# By device type: dispatch key, and the module with its functions. Others take plain torch.
DEVICES: dict[str, tuple[str, ModuleType]] = {"cpu": ("CPU", cpu)}
if has_cuda_kernels():
    DEVICES["cuda"] = ("CUDA", cuda)


def _fresh(into: Callable[..., None]) -> Callable[..., Tensor]:
    def rows_backward(logits: Tensor, a: Any) -> Tensor:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        into(grad, logits, a)
        return grad

    return rows_backward


def _inplace(into: Callable[..., None]) -> Callable[..., None]:
    def rows_backward_(logits: Tensor, a: Any) -> None:
        check_inplace(logits)
        into(logits, logits, a)
        # autograd does not see a write below it; this lets it refuse any later use of the logits it had saved
        torch.autograd.graph.increment_version(logits)

    return rows_backward_


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backward function for callers other than our autograd, whose tensors the forward pass has checked."""

    def implementation(logits: Tensor, a: Any) -> Any:
        shapes.check_rows_backward(logits, a)
        return function(logits, a)

    return implementation


def device_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """A device's functions by operator; those of the head serve every device."""
    into = module.rows_backward_into
    found: dict[str, Callable[..., Any]] = {"rows_backward": _fresh(into), "rows_backward_": _inplace(into)}
    for operator in OPERATORS:
        if operator.name not in found:
            found[operator.name] = getattr(linear if operator.leading == "hidden" else module, operator.name)
    return found


def _for_dispatcher(operator: Operator, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a record as torch calls it: arguments and results in one line, no result missing.

    One argument on another device would send the call to that device's function, which may be a fake.
    """
    names = operator.argument_names()

    def implementation(tensor: Tensor, *values: Any) -> Any:
        for name, value in zip(names, values, strict=True):
            if isinstance(value, Tensor):
                check_device(name, value, tensor, operator.leading)
        out = function(tensor, parse(operator.arguments, iter(values)))
        if out is None or isinstance(out, Tensor):
            return out
        return tuple([tensor.new_empty(0) if value is None else value for value in flatten(out)])

    return implementation


_lib = torch.library.Library("dpo_fast", "DEF")
DIRECT.update({kind: device_functions(module) for kind, (_, module) in DEVICES.items()})
_DISPATCHED = tuple([(key, DIRECT[kind]) for kind, (key, _) in DEVICES.items()])
for _operator in OPERATORS:
    _name = _operator.name
    _lib.define(_operator.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    for _key, _functions in (*_DISPATCHED, ("CompositeExplicitAutograd", device_functions(plain))):
        _function = _functions[_name]
        if _name.startswith("rows_backward"):
            _function = _checked(_function)
        _lib.impl(_name, _for_dispatcher(_operator, _function), _key)
    _fake = getattr(shapes, "rows_backward_inplace" if _name == "rows_backward_" else _name)
    torch.library.register_fake(f"dpo_fast::{_name}", _for_dispatcher(_operator, _fake), lib=_lib)

"""The operators' definition: the only file that knows all devices. A device is one line of DEVICES.

`Library.define/impl` is the cheapest way into the dispatcher: 2-4 us a call, against 10 us and more for `custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_fast._native import has_cuda_kernels
from dpo_fast._torch import cpu, cuda, linear, plain, shapes
from dpo_fast._torch.checks import check_device, check_inplace, check_rows_backward
from dpo_fast._torch.operators import DIRECT, OPERATORS, Operator, RowsBackward, flatten, parse

# By device type: dispatch key, and the module with its functions. Others take plain torch.
DEVICES: dict[str, tuple[str, ModuleType]] = {"cpu": ("CPU", cpu)}
if has_cuda_kernels():
    DEVICES["cuda"] = ("CUDA", cuda)


def _rows_backward(into: Callable[..., None], logits: Tensor, a: Any) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    into(grad, logits, a)
    return grad


def _rows_backward_inplace(into: Callable[..., None], logits: Tensor, a: Any) -> None:
    check_inplace(logits)
    into(logits, logits, a)
    # autograd does not see a write below it; this lets it refuse any later use of the logits it had saved
    torch.autograd.graph.increment_version(logits)


def device_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """A device's functions by operator; those of the head serve every device."""
    into = module.rows_backward_into
    found: dict[str, Callable[..., Any]] = {
        "rows_backward": partial(_rows_backward, into),
        "rows_backward_": partial(_rows_backward_inplace, into),
    }
    for operator in OPERATORS:
        if operator.name not in found:
            found[operator.name] = getattr(linear if operator.leading == "hidden" else module, operator.name)
    return found


def _dispatched(operator: Operator, function: Callable[..., Any], tensor: Tensor, *values: Any) -> Any:
    """A function of a record as torch calls it: arguments and results in one line, no result missing.

    One argument on another device would send the call to that device's function, which may be a fake.
    """
    for name, value in zip(operator.argument_names(), values, strict=True):
        if isinstance(value, Tensor):
            check_device(name, value, tensor, operator.leading)
    arguments = parse(operator.arguments, iter(values))
    if operator.arguments is RowsBackward:  # from callers other than our autograd, whose forward pass has checked
        check_rows_backward(tensor, arguments)
    out = function(tensor, arguments)
    if out is None or isinstance(out, Tensor):
        return out
    return tuple([tensor.new_empty(0) if value is None else value for value in flatten(out)])


_lib = torch.library.Library("dpo_fast", "DEF")
DIRECT.update({kind: device_functions(module) for kind, (_, module) in DEVICES.items()})
_DISPATCHED = tuple([(key, DIRECT[kind]) for kind, (key, _) in DEVICES.items()])
for _operator in OPERATORS:
    _name = _operator.name
    _lib.define(_operator.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    for _key, _functions in (*_DISPATCHED, ("CompositeExplicitAutograd", device_functions(plain))):
        _lib.impl(_name, partial(_dispatched, _operator, _functions[_name]), _key)
    _fake = partial(_dispatched, _operator, getattr(shapes, _name))
    torch.library.register_fake(f"dpo_fast::{_name}", _fake, lib=_lib)

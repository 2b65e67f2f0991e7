"""Runs the CPU's test bodies on CUDA, unchanged: the functions under test get their tensors moved there and back."""

from __future__ import annotations

import functools
import os

import torch
from torch.utils import _pytree

import dpo_fast

# another device tries out the moving itself
DEVICE = os.environ.get("DPO_FAST_TEST_DEVICE", "cuda")

FUNCTIONS = (
    *("token_logps", "selective_log_softmax", "sequence_logps", "dpo_loss", "preference_loss", "ld_dpo_weights"),
    *("linear_token_logps", "linear_sequence_logps", "linear_dpo_loss"),
)


def available() -> bool:
    """Whether the kernels and a device to run them on are there."""
    from dpo_fast import _native

    return "DPO_FAST_TEST_DEVICE" in os.environ or (torch.cuda.is_available() and _native.has_cuda_kernels())


class _Move(torch.autograd.Function):
    """To the device with the same strides and offset, so that every layout is seen there as it was made."""

    @staticmethod
    def forward(ctx, x):
        storage = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage())
        return storage.to(DEVICE).clone().as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx, grad):
        return grad.cpu()


def there(value):
    """A CPU tensor on the device."""
    return _Move.apply(value) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


def back(value):
    """A tensor on the CPU."""
    return value.cpu() if isinstance(value, torch.Tensor) else value


def moved(function):
    """The function on the device, for tensors of the CPU."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        args, kwargs = _pytree.tree_map(there, (args, kwargs))
        return _pytree.tree_map(back, function(*args, **kwargs))

    return wrapper


def patch(monkeypatch) -> None:
    """Puts the moved functions in the place of dpo_fast's."""
    monkeypatch.setenv("DPO_FAST_CHECK", "1")  # so that bad values raise as on the CPU
    for name in FUNCTIONS:
        monkeypatch.setattr(dpo_fast, name, moved(getattr(dpo_fast, name)))

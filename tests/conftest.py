"""Every compiled instruction set and thread count as fixtures."""

from __future__ import annotations

import pytest
import torch

from dpo_fast import _cpu

ISAS = [name for name, _ in _cpu.isas()]
SUPPORTED = {name for name, supported in _cpu.isas() if supported}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request):
    """Forces an instruction set for the test."""
    if request.param not in SUPPORTED:
        pytest.skip(f"this processor has no {request.param}")
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(None)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    """Sets torch's thread count, which the kernels follow."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

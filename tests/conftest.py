"""Every compiled instruction set, CUDA where there is a GPU, and thread counts as fixtures."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Graphs that an earlier version of the operators left in torch.compile's cache would be used again.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpo_fast_compiled_")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import cuda_device
import pytest
import torch

from dpo_fast import _cpu

ISAS = [name for name, _ in _cpu.isas()]
if cuda_device.available():
    ISAS.append("cuda")
SUPPORTED = {name for name, supported in _cpu.isas() if supported}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Forces an instruction set for the test; "cuda": its functions run there."""
    if request.param == "cuda":
        if request.node.get_closest_marker("cpu_only"):
            pytest.skip("says nothing about a GPU")
        cuda_device.patch(monkeypatch)
        yield request.param
        return
    if request.param not in SUPPORTED:
        pytest.skip(f"this processor has no {request.param}")
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(None)


@pytest.fixture(params=["cpu", "cuda"] if cuda_device.available() else ["cpu"])
def place(request, monkeypatch):
    """The functions as they are, and on CUDA where there is a GPU."""
    if request.param == "cuda":
        cuda_device.patch(monkeypatch)
    return request.param


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    """Sets torch's thread count, which the kernels follow."""
    if request.param > 1 and request.node.callspec.params.get("isa") == "cuda":
        pytest.skip("one is enough for a GPU")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)

"""Half-type heads whose products go through float32: chosen by what torch has, and as accurate as torch's own products."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import dpo_fast
from dpo_fast._torch import tile_type

HALVES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture(params=["native", "float32"])
def way(request, monkeypatch):
    monkeypatch.setenv("DPO_FAST_HEAD_TILES", request.param)
    return request.param


def run(x, dtype, targets, ref, options):
    """Values and gradients of every input, in float64."""
    leaves = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in x.items()}
    lora = (leaves["lora_a"], leaves["lora_b"], 2.0)
    out = dpo_fast.linear_dpo_loss(
        leaves["hidden"], leaves["weight"], targets, ref, bias=leaves["bias"], lora=lora, **options
    )
    out.loss.backward()
    return [out.loss.detach().double(), out.logps.detach().double()] + [leaf.grad.double() for leaf in leaves.values()]


@pytest.mark.parametrize("options", [{}, {"memory_budget": 33 * 2 * 3001}], ids=["one tile", "tiles"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_against_float64(dtype, options, way):
    """V, H and the number of rows are no multiples of a chunk, and V takes several (see the next fixture)."""
    shapes = {"hidden": (4, 29, 52), "weight": (3001, 52), "bias": (3001,), "lora_a": (5, 52), "lora_b": (3001, 5)}
    scales = {"hidden": 1.0, "weight": 0.2, "bias": 1.0, "lora_a": 0.1, "lora_b": 0.1}
    x = {name: (scales[name] * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
    targets = torch.randint(0, 3001, (4, 29))
    targets[:, :3] = -100
    ref = -200 + torch.randn(4)
    exact = run(x, torch.float64, targets, ref, options)
    found = run(x, dtype, targets, ref, options)
    epsilon = torch.finfo(dtype).eps
    assert (found[1] - exact[1]).abs().max() < 5 * epsilon * exact[1].abs().max() ** 0.5 * 4
    for a, b in zip(found[2:], exact[2:], strict=True):
        assert (a - b).norm() < 2 * epsilon * b.norm()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(tile_type, "_CHUNK_BYTES", 4 * 52 * 200)


@pytest.mark.parametrize("shape", [(7, 1000, 30), (1000, 7, 30), (7, 30, 1000), (64, 64, 64), (1, 1, 1), (0, 300, 5)])
def test_products_are_float32_products(shape):
    m, k, n = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    exact = a.double() @ b.double()
    found = tile_type.product(a, b)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    rounded = tile_type.product(a, b, torch.full((m, n), float("nan")).bfloat16())
    torch.testing.assert_close(rounded, found.bfloat16(), rtol=0, atol=0)


def test_choice(monkeypatch):
    monkeypatch.setenv("DPO_FAST_HEAD_TILES", "")
    for dtype in HALVES:
        for has in (True, False):
            monkeypatch.setattr(tile_type, "_has_dot_products", lambda _, has=has: has)
            assert tile_type.through_float32(dtype, CPU) is not has
    assert not tile_type.through_float32(torch.float32, CPU)
    assert not tile_type.through_float32(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setenv("DPO_FAST_HEAD_TILES", "bfloat16")
    with pytest.raises(ValueError, match=r"DPO_FAST_HEAD_TILES must be .* found 'bfloat16'"):
        tile_type.through_float32(torch.bfloat16, CPU)


@pytest.mark.cpu_only
def test_info_says_what_a_machine_without_dot_products_does():
    """oneDNN held to AVX2 stands in for one."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "DPO_FAST_HEAD_TILES": ""}
    command = [sys.executable, "-m", "dpo_fast", "info"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    if "x86_64" in run.stdout:
        assert "bfloat16 float32, float16 float32" in run.stdout

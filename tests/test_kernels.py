"""Properties of the kernels: exp's own error, bit-identical results, rows that do not touch each other, limits."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_accurate, naive_entropy, naive_token_logps, to_numpy

import dpo_fast
from dpo_fast import _cpu, reference

# Largest error of exp against float64 (docs/accuracy.md), measured over the range the kernels use. The FMA sets
# subtract n ln 2 in one step, which costs accuracy only where exp is below 1e-9 of the row's largest term.
EXP_ULP = {"near": 1.5, "far": 4.6}
EXP_SHORT_RELATIVE = 6e-6  # the shorter polynomial for half-precision logits
EXP_DOUBLE_ULP = 1.2


def test_exp_float(isa):
    x = np.concatenate([np.linspace(-87, 8, 4_000_001), -np.logspace(-10, 1.9, 500_000), [0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    found = np.empty_like(x)
    _cpu.exp_float(x.ctypes.data, found.ctypes.data, len(x), False)
    ulp = np.abs(found - exact) / np.spacing(exact.astype(np.float32))
    assert ulp[x > -20].max() < EXP_ULP["near"]
    assert ulp.max() < EXP_ULP["far"]
    _cpu.exp_float(x.ctypes.data, found.ctypes.data, len(x), True)
    assert (np.abs(found - exact) / exact).max() < EXP_SHORT_RELATIVE


def test_exp_double(isa):
    x = np.linspace(-708, 8, 1_000_001)
    exact = np.exp(x.astype(np.longdouble))
    found = np.empty_like(x)
    _cpu.exp_double(x.ctypes.data, found.ctypes.data, len(x))
    assert float((np.abs(found - exact) / np.spacing(exact.astype(np.float64))).max()) < EXP_DOUBLE_ULP


@pytest.mark.parametrize("half", [False, True])
def test_exp_special_values(isa, half):
    payloads = np.array([0x7FC00001, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    x = np.concatenate([np.array([0, -0.0, -np.inf, -1e30, -88], np.float32), payloads])
    found = np.empty_like(x)
    _cpu.exp_float(x.ctypes.data, found.ctypes.data, len(x), half)
    assert found[:5].tolist() == [1, 1, 0, 0, 0]
    assert np.isnan(found[5:]).all()


def run(logits, targets, ref, **options):
    x = logits.detach().clone().requires_grad_()
    out = dpo_fast.dpo_loss(x, targets, ref, **options)
    out.loss.backward()
    return [out.loss, out.losses, out.logps, x.grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_identical_for_any_thread_count_and_run(dtype, isa):
    """Enough logits for several threads: whole rows, and rows of several pieces."""
    before = torch.get_num_threads()
    for shape in ((4, 33, 2049), (2, 3, 128256)):
        logits = (3 * torch.randn(shape)).to(dtype)
        targets = torch.randint(0, shape[-1], shape[:-1])
        ref = torch.randn(shape[0])
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(logits, targets, ref))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_itself_alone(dtype, isa):
    """Bitwise the same alone, among other rows, at another alignment, and packed instead of padded."""
    V = 4099
    x = (3 * torch.randn(6, V)).to(dtype)
    targets = torch.randint(0, V, (6,))
    base = torch.zeros(6, V + 3, dtype=dtype)
    base[:, 1 : V + 1] = x
    together = dpo_fast.token_logps(x, targets).logps
    shifted = dpo_fast.token_logps(base[:, 1 : V + 1], targets).logps
    assert torch.equal(together, shifted)
    for i in range(6):
        assert torch.equal(dpo_fast.token_logps(x[i : i + 1], targets[i : i + 1]).logps, together[i : i + 1])
    padded = dpo_fast.sequence_logps(x.view(2, 3, V), targets.view(2, 3))
    packed = dpo_fast.sequence_logps(x, targets, cu_seqlens=torch.tensor([0, 3, 6]))
    assert torch.equal(padded, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_never_read_and_get_zeros(dtype, isa):
    """NaN in them shows up nowhere."""
    x = torch.randn(2, 4, 700).to(dtype)
    targets = torch.randint(0, 700, (2, 4))
    targets[0, 1] = targets[1, 3] = -100
    x[targets == -100] = float("nan")
    weights = torch.ones(2, 4)
    weights[1, 0] = 0
    x[1, 0] = float("nan")
    x.requires_grad_()
    out = dpo_fast.dpo_loss(x, targets, token_weights=weights)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(x.grad).all()
    ignored = (targets == -100) | (weights == 0)
    assert (x.grad[ignored] == 0).all()
    assert (x.grad[~ignored] != 0).any(-1).all()


@pytest.mark.cpu_only
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs an operating system that maps memory lazily")
def test_ignored_rows_of_a_mapping_stay_unread(isa):
    """Pages of ignored rows are not even touched: more logits than would fit, of which two rows are kept."""
    V, T = 1 << 20, 1 << 13  # 2^33 bfloat16 logits, 16 GiB of address space
    x = torch.empty(2, T // 2, V, dtype=torch.bfloat16)
    targets = torch.full((2, T // 2), -100)
    for s, t in ((0, 5), (1, T // 2 - 1)):  # the second lies beyond 2^31 elements
        targets[s, t] = 7
        x[s, t] = torch.linspace(-1, 1, V)
    out = dpo_fast.sequence_logps(x, targets)
    exact = reference.token_logps(to_numpy(x[0, 5:6]), np.array([7])).logps[0]
    np.testing.assert_allclose(out.numpy(), [exact, exact], atol=1e-3)


@pytest.mark.cpu_only
def test_offsets_beyond_2_31_elements_backward(isa):
    """Rows 2^31 + 1 elements apart, gradient in place."""
    stride = (1 << 31) + 1
    storage = torch.empty(stride + 600, dtype=torch.bfloat16)
    x = storage.as_strided((2, 1, 507), (stride, 507, 1))
    x.copy_(torch.randn(2, 1, 507))
    leaf = x.detach().requires_grad_()
    targets = torch.tensor([[3], [500]])
    exact = reference.dpo_loss_grad(to_numpy(x), targets.numpy())
    dpo_fast.dpo_loss(leaf, targets, inplace_backward=True).loss.backward()
    np.testing.assert_allclose(to_numpy(x), exact, atol=1e-3)


LIMITS = {
    "-inf off target": lambda x: x.index_fill(-1, torch.tensor([1, 5]), float("-inf")),
    "mostly -inf": lambda x: torch.where(torch.arange(x.shape[-1]) % 97 == 0, x, float("-inf")),
    "-inf first": lambda x: torch.where(torch.arange(x.shape[-1]) < 2500, float("-inf"), x),
    "offset 1e4": lambda x: x + 1e4,
    "offset -1e4": lambda x: x - 1e4,
    "one large": lambda x: x.index_fill(-1, torch.tensor([300]), 60.0),
    "rising": lambda x: torch.linspace(-300, 300, x.shape[-1]).expand_as(x),
    "falling": lambda x: torch.linspace(300, -300, x.shape[-1]).expand_as(x),
    "constant": lambda x: torch.zeros_like(x),
    # in float64 a quarter of it, so that the differences stay within the reference's own range
    "near the limit": lambda x: x / x.abs().max() * (torch.finfo(x.dtype).max * (0.25 if x.itemsize == 8 else 0.99)),
    "near minus the limit": lambda x: x * 0 - torch.finfo(x.dtype).max,
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(name, dtype, isa):
    logits = LIMITS[name](torch.randn(1, 3, 4099).to(dtype)).to(dtype)
    targets = torch.tensor([[0, 97, 3395]])
    if name == "-inf first":
        targets = targets + 2500 - targets % 97
        targets[0, -1] = 4098
    outputs = ("logps", "entropy", "is_top1", "log_sum_sq_probs", "mean_logits")
    x = logits.clone().requires_grad_()
    out = dpo_fast.token_logps(x, targets, outputs=outputs)
    (out.logps.sum() + out.entropy.sum()).backward()
    y = logits.clone().requires_grad_()
    naive = naive_token_logps(y, targets)
    naive.sum().backward()
    ones = np.ones((1, 3))
    with np.errstate(all="ignore"):
        exact = reference.token_logps(to_numpy(logits), targets.numpy())
        grad = reference.token_logps_grad(to_numpy(logits), targets.numpy(), ones, ones)
    assert_accurate(out.logps, exact.logps, naive, dtype, "logps")
    assert_accurate(out.entropy, exact.entropy, naive, dtype, "entropy")
    assert_accurate(out.log_sum_sq_probs, exact.log_sum_sq_probs, naive, dtype, "log_sum_sq_probs")
    assert out.is_top1.tolist() == exact.is_top1.tolist()
    if np.isfinite(exact.mean_logits).all() and np.abs(exact.mean_logits).max() < 1e30:
        assert_accurate(out.mean_logits, exact.mean_logits, naive, dtype, "mean_logits")
    assert_accurate(x.grad, grad, None, dtype, "gradient") if dtype.itemsize >= 4 else np.testing.assert_allclose(
        to_numpy(x.grad), grad, atol=5e-3
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 2100, 4098])
def test_nan_and_infinities_stay_in_their_row(dtype, where, isa):
    """As the float64 reference: NaN in a row, +inf, -inf at the target, all -inf; the row beside is untouched."""
    for value in ("nan", "inf", "-inf", "all -inf"):
        clean = torch.randn(1, 2, 4099).to(dtype)
        logits = clean.clone()
        if value == "all -inf":
            logits[0, 0] = float("-inf")
        else:
            logits[0, 0, where] = float(value)
        targets = torch.tensor([[where, where]])
        x = logits.clone().requires_grad_()
        out = dpo_fast.token_logps(x, targets, outputs=("logps", "entropy", "is_top1"))
        out.logps.sum().backward()
        with np.errstate(all="ignore"):
            exact = reference.token_logps(to_numpy(logits), targets.numpy())
            grad = reference.token_logps_grad(to_numpy(logits), targets.numpy(), np.ones((1, 2)))
        slack = 1e-5 if dtype.itemsize >= 4 else 5e-3
        np.testing.assert_allclose(out.logps.detach().numpy(), exact.logps, atol=slack)
        np.testing.assert_allclose(out.entropy.detach().numpy(), exact.entropy, atol=slack)
        np.testing.assert_allclose(to_numpy(x.grad), grad, atol=slack)
        beside = dpo_fast.token_logps(clean, targets, outputs=("logps", "entropy", "is_top1")).logps
        assert torch.equal(out.logps[0, 1], beside[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_confident_token_keeps_its_small_gradient(dtype, isa):
    """p - 1 is formed before the rounding to the logits' type: at 1 - p = 1e-4 it would become 0 in bfloat16."""
    x = torch.tensor([[9.25, 0.0]], dtype=dtype, requires_grad=True)
    dpo_fast.token_logps(x, torch.tensor([0])).logps.sum().backward()
    exact = reference.token_logps_grad(to_numpy(x), np.array([0]), np.ones(1))
    assert x.grad[0, 0].item() == pytest.approx(exact[0, 0], rel=4e-3 if dtype.itemsize == 2 else 2e-3)


def test_ties_go_to_the_first_index(isa):
    x = torch.zeros(3, 5000)
    x[:, 4000] = x[:, 2500] = x[:, 4500] = 2.0
    out = dpo_fast.token_logps(x, torch.tensor([4000, 2500, 4500]), outputs=("is_top1",))
    assert out.is_top1.tolist() == [False, True, False]
    assert out.logps is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_conversions(dtype, isa):
    """Every bit pattern is read exactly and gradients are rounded to nearest even, as torch does."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    # two logits, x and 0: log p of the first is -softplus(-x), to float32's accuracy if x is read exactly
    x = torch.stack([finite, torch.zeros_like(finite)], -1)
    found = dpo_fast.token_logps(x, torch.zeros(len(finite), dtype=torch.int64)).logps
    exact = -np.logaddexp(0, -to_numpy(finite).astype(np.float64))
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-5, atol=2e-5)
    # one row of equal logits: the gradient is g (1 - 1/2) and -g / 2, rounded
    g = torch.cat([torch.logspace(-9, 4, 2000), -torch.logspace(-9, 4, 2000)])
    rows = torch.zeros(len(g), 40, dtype=dtype, requires_grad=True)
    out = dpo_fast.token_logps(rows, torch.zeros(len(g), dtype=torch.int64))
    out.logps.backward(g)
    p = torch.tensor(1 / 40)
    assert torch.equal(rows.grad[:, 1:], (-g * p).to(dtype)[:, None].expand(-1, 39))


def test_nan_of_any_payload_stays_nan_in_half_gradients(isa):
    """A NaN that comes from elsewhere than the logits, with every bit set."""
    ref = torch.tensor([0x7FFFFFFF, 0], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(2, 3, 40).to(dtype).requires_grad_()
        dpo_fast.dpo_loss(x, torch.ones(2, 3, dtype=torch.int64), ref).loss.backward()
        assert x.grad.isnan().all()


@pytest.mark.parametrize(("V", "spread", "temperature"), [(1000, 10, 1.0), (1000, 3, 0.5), (32000, 10, 1.0)])
def test_entropy_of_peaked_rows(V, spread, temperature, isa):
    """Where the maximum stands far above the first logits: the shift must not stay behind it."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        logits = spread * torch.randn(16, V, generator=g)
        targets = torch.zeros(16, dtype=torch.int64)
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        out = dpo_fast.token_logps(x, targets, outputs=("entropy",), temperature=temperature).entropy
        naive = naive_entropy(y / temperature, targets)
        out.sum().backward()
        naive.sum().backward()
        exact = reference.token_logps(logits.numpy(), targets.numpy(), temperature=temperature).entropy
        grad = reference.token_logps_grad(
            logits.numpy(), targets.numpy(), np.zeros(16), np.ones(16), temperature=temperature
        )
        assert_accurate(out, exact, naive, torch.float32, "entropy")
        assert_accurate(x.grad, grad, y.grad, torch.float32, "gradient")


def test_first_index_is_top1_when_no_logit_is_largest(isa):
    x = torch.full((1, 2, 40), float("-inf"))
    out = dpo_fast.token_logps(x, torch.tensor([[0, 3]]), outputs=("logps", "is_top1"), softcap=30.0)
    assert out.is_top1.tolist() == [[True, False]]
    np.testing.assert_allclose(out.logps.numpy(), -np.log(40), rtol=1e-6)

"""What only a GPU can show: streams, graphs, devices, sizes past 2^31, determinism, values that nothing checked."""

from __future__ import annotations

import cuda_device
import pytest
import torch
from helpers import make_case, random_pairs

import dpo_fast

pytestmark = pytest.mark.skipif(not cuda_device.available(), reason="needs a GPU and the CUDA kernels")

DEVICE = cuda_device.DEVICE


def batch(dtype=torch.float32, shape=(4, 9, 32000), seed=0):
    """Logits, targets and reference on the device."""
    case = make_case("padded", shape, dtype, seed)
    return case.leaf.to(DEVICE), case.targets.to(DEVICE), torch.randn(case.n_seqs).to(DEVICE)


def step(x, targets, ref, **options):
    """Loss and gradient."""
    x = x.detach().clone().requires_grad_()
    out = dpo_fast.dpo_loss(x, targets, ref, **options)
    out.loss.backward()
    return out.loss.detach(), out.logps.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_cuda_equals_the_cpu(dtype):
    """The same numbers to rounding, in place and not, with every statistic."""
    x, targets, ref = batch(dtype)
    for inplace in (False, True):
        loss, logps, grad = step(x, targets, ref, inplace_backward=inplace)
        cpu = step(x.cpu(), targets.cpu(), ref.cpu(), inplace_backward=inplace)
        tight = dtype is torch.float64
        torch.testing.assert_close(loss.cpu(), cpu[0], rtol=1e-12 if tight else 1e-5, atol=1e-12 if tight else 1e-5)
        torch.testing.assert_close(logps.cpu(), cpu[1], rtol=1e-12 if tight else 1e-5, atol=1e-12 if tight else 1e-4)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(grad.cpu(), cpu[2], rtol=4 * rounding, atol=1e-14 if tight else 1e-7)


def test_cuda_is_deterministic_and_rows_stand_alone():
    x, targets, ref = batch(torch.bfloat16, (8, 40, 128256))
    pairs = random_pairs(8).to(DEVICE)
    first, again = (step(x, targets, ref, pairs=pairs) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    alone = dpo_fast.sequence_logps(x[3:4], targets[3:4])  # few rows: split over blocks
    assert torch.equal(alone, first[1][3:4])


def test_cuda_streams():
    """On the current stream, behind what is queued there."""
    x, targets, ref = batch(torch.float32, (4, 64, 32000))
    expected = step(x, targets, ref)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = step(late, targets, ref)
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_cuda_graph_capture():
    """No synchronisation and no allocation outside torch's: a step can be captured and replayed on new values."""
    x, targets, ref = batch(torch.bfloat16, (4, 64, 32000))
    static = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch's own advice: warm up beside
        for _ in range(2):
            static.grad = None
            dpo_fast.dpo_loss(static, targets, ref).loss.backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    static.grad = None
    with torch.cuda.graph(graph):
        out = dpo_fast.dpo_loss(static, targets, ref)
        out.loss.backward()
    other = x.flip(1)
    static.detach().copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = step(other, targets, ref)
    assert torch.equal(out.loss.detach(), expected[0])
    assert torch.equal(static.grad, expected[2])


def test_cuda_graph_of_the_linear_head():
    """compact=False: padded hidden states to loss and gradients in a graph, replayed on new values."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 32, 64, generator=g).to(DEVICE), torch.randn(5000, 64, generator=g).to(DEVICE)
    targets = torch.randint(0, 5000, (4, 32), generator=g).to(DEVICE)
    targets[:, :7] = -100
    hidden.requires_grad_()
    weight.requires_grad_()

    def run():
        out = dpo_fast.linear_dpo_loss(hidden, weight, targets, compact=False)
        return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, run(), strict=True):
        torch.testing.assert_close(a, b)


def test_cuda_does_not_wait():
    """No host synchronisation in forward and backward."""
    x, targets, ref = batch()
    pairs = torch.tensor([[0, 2], [1, 3]], device=DEVICE)
    options = {"outputs": ("entropy", "is_top1"), "ld_alpha": 0.5}
    step(x, targets, ref)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, targets, ref, pairs=pairs, wpo=True, loss_type=["sigmoid", "sft"], **options)
        step(x, targets, ref, loss_type="kto", baseline=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_invalid_targets_and_pairs_give_nan(monkeypatch):
    monkeypatch.delenv("DPO_FAST_CHECK", raising=False)
    x, targets, ref = batch(torch.float32, (4, 5, 1000))
    bad = targets.clone()
    bad[1, 2] = 1000
    logps = dpo_fast.token_logps(x, bad).logps
    assert torch.isnan(logps[1, 2])
    assert torch.isfinite(logps[[0, 2, 3]]).all()
    sums = dpo_fast.sequence_logps(x, bad)
    assert torch.isnan(sums).tolist() == [False, True, False, False]
    pairs = torch.tensor([[0, 2], [1, 9]], device=DEVICE)
    losses = dpo_fast.dpo_loss(x, targets, ref, pairs=pairs).losses
    assert torch.isnan(losses).tolist() == [False, True]
    monkeypatch.setenv("DPO_FAST_CHECK", "1")
    with pytest.raises(IndexError, match="target 1000 at position"):
        dpo_fast.token_logps(x, bad)
    with pytest.raises(IndexError, match=r"pairs\[1, 1\] = 9 is outside"):
        dpo_fast.dpo_loss(x, targets, ref, pairs=pairs)


def test_cuda_more_than_2_31_logits():
    rows, V = 17000, 128256  # 2.18e9 logits, 4.4 GB
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * rows * V * 2:
        pytest.skip("too little memory")
    x = torch.empty(rows, V, dtype=torch.bfloat16, device=DEVICE).normal_()
    targets = torch.full((rows,), -100, device=DEVICE)
    targets[[0, -2, -1]] = torch.tensor([5, V - 1, 7], device=DEVICE)
    x.requires_grad_()
    out = dpo_fast.token_logps(x, targets)
    expected = torch.log_softmax(x[[0, -2, -1]].float(), -1)[range(3), targets[[0, -2, -1]]]
    torch.testing.assert_close(out.logps[[0, -2, -1]], expected.detach(), rtol=1e-5, atol=1e-5)
    out.logps.sum().backward()
    grad = x.grad[-2].float()
    assert grad[V - 1] > 0.9
    assert grad.sum().abs() < 0.05
    assert not x.grad[1:-2].any()


def test_cuda_memory_in_place():
    """Nothing of the logits' size is allocated."""
    x, targets, ref = batch(torch.bfloat16, (4, 64, 128256))
    x.requires_grad_()
    y = x * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = dpo_fast.dpo_loss(y, targets, ref, inplace_backward=True)
    torch.autograd.grad(out.loss, y)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * y.numel() * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cuda_linear_head_equals_the_cpu(dtype):
    """Tiles, a pair at a time and all at once; half types have their products in float32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 33, 64, generator=g).to(dtype), (torch.randn(3000, 64, generator=g) / 8).to(dtype)
    targets = torch.randint(0, 3000, (4, 33), generator=g)
    targets[:, :9] = -100
    ref = -200 - torch.rand(4, generator=g)
    found = []
    for device in ("cpu", DEVICE):
        for budget in (None, 3000 * 4 * 40):
            h, w = hidden.to(device, copy=True).requires_grad_(), weight.to(device, copy=True).requires_grad_()
            out = dpo_fast.linear_dpo_loss(h, w, targets.to(device), ref.to(device), memory_budget=budget)
            out.loss.backward()
            found.append([t.detach().cpu().float() for t in (out.losses, h.grad, w.grad)])
    rounding = torch.finfo(dtype).eps
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=8 * rounding, atol=8 * rounding * b.abs().max().item() + 1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_cuda_second_device():
    x, targets, ref = batch()
    expected = step(x, targets, ref)
    found = step(*(t.to("cuda:1") for t in (x, targets, ref)))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


def test_cuda_compiled():
    x, targets, ref = batch(torch.bfloat16, (4, 9, 4096))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dpo_fast.dpo_loss(x, targets, ref).loss, fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    dpo_fast.dpo_loss(a, targets, ref).loss.backward()
    compiled(b).backward()
    assert torch.equal(a.grad, b.grad)

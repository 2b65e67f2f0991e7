"""The drop-in for Liger's fused linear DPO loss, beside the installed liger-kernel, over the grid that Liger tests."""

from __future__ import annotations

import inspect

import pytest
import torch

import dpo_fast
from dpo_fast.integrations.liger import LOSS_TYPES, FusedLinearDPOLoss

liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")


def problem(shape, dtype, ignore_index, bias, ref_bias, seed=0):
    B, T, H, V = shape
    g = torch.Generator().manual_seed(seed)
    randn = lambda *n: torch.randn(*n, generator=g).to(dtype)  # noqa: E731
    hidden, ref_hidden = randn(2 * B, T, H), randn(2 * B, T, H)
    weight, ref_weight = randn(V, H) / H**0.5, randn(V, H) / H**0.5
    targets = torch.randint(0, V, (2 * B, T), generator=g)
    some = torch.randint(1, 2 * B * T // 2, (1,), generator=g).item()
    targets.view(-1)[torch.randperm(2 * B * T, generator=g)[:some]] = ignore_index
    biases = (randn(V) if bias else None), (randn(V) if ref_bias else None)
    return hidden, weight, targets, biases[0], ref_hidden, ref_weight, biases[1]


def run(module, inputs, scale=1.0):
    hidden, weight, targets, bias, *rest = inputs
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    loss, aux = module(leaves[1], leaves[0], targets, leaves[2], *rest)
    (loss * scale).backward()
    return loss, aux, [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("shape", [(4, 64, 128, 512), (3, 47, 31, 123)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.bfloat16, 5e-2, 5e-1), (torch.float32, 1e-5, 5e-4)], ids=["bfloat16", "float32"]
)
@pytest.mark.parametrize(("bias", "ref_bias"), [(True, True), (False, False)])
@pytest.mark.parametrize("compute_nll_loss", [True, False])
@pytest.mark.parametrize("average_log_prob", [True, False])
@pytest.mark.parametrize(("ignore_index", "beta"), [(-100, 0.1), (42, 0.2)])
def test_same_as_liger(
    shape, dtype, atol, rtol, bias, ref_bias, compute_nll_loss, average_log_prob, ignore_index, beta
):
    inputs = problem(shape, dtype, ignore_index, bias, ref_bias)
    options = {
        "ignore_index": ignore_index, "beta": beta, "compute_nll_loss": compute_nll_loss, "alpha": 0.7,
        "average_log_prob": average_log_prob, "compiled": False,
    }  # fmt: skip
    expected = run(liger.LigerFusedLinearDPOLoss(**options), inputs, 1.5)
    found = run(FusedLinearDPOLoss(**options), inputs, 1.5)
    check(found, expected, atol, rtol)


def check(found, expected, atol, rtol):
    assert len(found[1]) == len(expected[1])
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=rtol, check_dtype=False)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=max(atol, 1e-4), rtol=rtol, check_dtype=False)
    for a, b in zip(found[2], expected[2], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@pytest.mark.parametrize("use_ref_model", [True, False])
@pytest.mark.parametrize("compute_nll_loss", [True, False])
@pytest.mark.parametrize("name", [name for name in LOSS_TYPES if name != "ipo"])
def test_every_loss_type(name, compute_nll_loss, use_ref_model):
    inputs = problem((3, 11, 16, 59), torch.float32, -100, True, True)
    if not use_ref_model:
        inputs = (*inputs[:4], None, None, None)
    options = {
        "loss_type": name, "label_smoothing": 0.1, "compute_nll_loss": compute_nll_loss, "beta": 0.3,
        "use_ref_model": use_ref_model, "compiled": False, "discopop_tau": 0.1,
    }  # fmt: skip
    expected = run(liger.LigerFusedLinearDPOLoss(**options), inputs)
    check(run(FusedLinearDPOLoss(**options), inputs), expected, 1e-5, 5e-4)
    tiles = FusedLinearDPOLoss(**options, memory_budget=59 * 4 * 8)
    check(run(tiles, inputs), expected, 1e-5, 5e-4)


def test_same_interface():
    for ours, theirs in (
        (FusedLinearDPOLoss.__init__, liger.LigerFusedLinearDPOLoss.__init__),
        (FusedLinearDPOLoss.forward, liger.LigerFusedLinearDPOLoss.forward),
    ):
        a, b = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        assert [(p.name, p.default) for p in a[: len(b)]] == [(p.name, p.default) for p in b]
        assert all(p.kind is p.KEYWORD_ONLY for p in a[len(b) :])
    module = liger.LigerFusedLinearDPOLoss()
    for name, value in vars(module).items():
        if not name.startswith("_"):
            assert getattr(FusedLinearDPOLoss(), name) == value
    assert set(liger.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES) <= set(LOSS_TYPES)


def test_bad_options_raise_as_in_liger():
    for options in (
        {"loss_type": "kto"},
        {"loss_type": "exo_pair"},
        {"loss_type": "robust", "label_smoothing": 0.5},
    ):
        for module in (FusedLinearDPOLoss, liger.LigerFusedLinearDPOLoss):
            with pytest.raises(ValueError):  # noqa: PT011  (Liger's texts are its own)
                module(**options)
    with pytest.raises(ValueError, match="needs ref_input and ref_weight"):
        FusedLinearDPOLoss()(torch.ones(3, 2), torch.ones(2, 1, 2), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("use_ref_model", [True, False])
def test_sharded_heads(use_ref_model):
    """Heads that are DTensors (FSDP2), on one process: the same numbers, and a gradient that is a DTensor."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    inputs = problem((3, 11, 16, 59), torch.float32, -100, True, True)
    hidden, weight, targets, bias, ref_hidden, ref_weight, ref_bias = inputs
    if not use_ref_model:
        ref_hidden = ref_weight = ref_bias = None
    module = FusedLinearDPOLoss(use_ref_model=use_ref_model, compute_nll_loss=True)
    expected = run(module, (hidden, weight, targets, bias, ref_hidden, ref_weight, ref_bias))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [
            None if t is None else distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, bias, ref_weight, ref_bias)
        ]
        loss, aux, grads = run(module, (hidden, sharded[0], targets, sharded[1], ref_hidden, *sharded[2:]))
        assert all(isinstance(grad, DTensor) for grad in grads[1:])
        check((loss, aux, [grads[0], *(grad.full_tensor() for grad in grads[1:])]), expected, 1e-6, 1e-5)
    finally:
        dist.destroy_process_group()


def test_options_are_checked_on_any_default_device():
    with torch.device("meta"):
        FusedLinearDPOLoss(compute_nll_loss=True)
        with pytest.raises(ValueError, match="label_smoothing"):
            FusedLinearDPOLoss(loss_type="exo_pair")


def test_beyond_liger():
    """ipo; log-probs with gradients; a completion without tokens; tiles smaller than a pair."""
    hidden, weight, targets, bias, ref_hidden, ref_weight, ref_bias = problem((2, 9, 8, 33), torch.float64, -100, 1, 1)
    targets[1] = -100
    ref = (ref_hidden, ref_weight, ref_bias)
    for average in (False, True):
        loss, aux = FusedLinearDPOLoss(average_log_prob=average, compute_nll_loss=True)(
            weight, hidden, targets, bias, *ref
        )
        assert torch.isfinite(loss)
        assert all(torch.isfinite(value).all() for value in aux)
        assert aux[0][1] == 0
    hidden.requires_grad_()
    loss, aux = FusedLinearDPOLoss(loss_type="ipo", memory_budget=1)(weight, hidden, targets, bias, *ref)
    logits, ref_logits = hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias
    expected = dpo_fast.dpo_loss(logits, targets, ref_logits=ref_logits, loss_type="ipo")
    torch.testing.assert_close(loss, expected.loss)
    (a,) = torch.autograd.grad(loss + aux[0].sum(), hidden)
    (b,) = torch.autograd.grad(expected.loss + expected.logps[:2].sum(), hidden)
    torch.testing.assert_close(a, b)

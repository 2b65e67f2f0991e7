"""The plain-torch path of devices without a kernel, run on CPU tensors: against the kernels and the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, assert_accurate, make_case, naive_sequence_logps, random_pairs, to_numpy

from dpo_fast import fallback, ops, reference  # noqa: F401  (ops defines torch.ops.dpo_fast)
from dpo_fast._loss.options import choose_loss

LOSS = (*choose_loss(label_smoothing=0.2).options, 0.0)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(fallback, "CHUNK_LOGITS", 100)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [(-100, 1.0, 1.0, 0.0), (-100, 0.7, 1.3, 5.0)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_against_reference(dtype, layout, options, inplace):
    case = make_case(layout, (4, 7, 33), dtype)
    if inplace and layout == "expanded":
        pytest.skip("refused before it gets here")
    x, targets, cu = case.view(case.leaf.clone()), case.targets, case.cu_seqlens
    names = dict(zip(("ignore_index", "temperature", "logit_scale", "softcap"), options, strict=True))
    names["softcap"] = names["softcap"] or None
    arrays = to_numpy(x).copy()
    g = torch.linspace(-1, 1, targets.numel()).reshape(targets.shape)

    logps, stats, entropy, *extras = fallback.token_forward(x, targets, None, *options, True, True, True, True)
    exact = reference.token_logps(arrays, targets.numpy(), **names)
    for found, value in zip(
        (logps, entropy, extras[0], extras[2]), (exact[0], exact[1], exact[2], exact[4]), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), value, atol=2e-5, rtol=1e-5)
    assert extras[1].tolist() == exact.is_top1.tolist()
    out = x.clone() if inplace else torch.empty(x.shape, dtype=dtype)
    fallback.token_backward_into(out, out if inplace else x, targets, None, *options, logps, stats, entropy, g, 0.5 * g)
    grad = reference.token_logps_grad(arrays, targets.numpy(), g.numpy(), 0.5 * g.numpy(), **names)
    rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(out), grad, atol=2e-6 + 2 * rounding * np.abs(grad).max())

    weights = torch.rand(targets.shape)
    weights[weights < 0.2] = 0
    pairs, ref = random_pairs(case.n_seqs), torch.randn(case.n_seqs)
    pair_weights = torch.rand(len(pairs))
    for average in (False, True):
        loss = choose_loss(loss_type=["sigmoid", "apo_down"], label_smoothing=0.2, average=average)
        out = fallback.dpo_forward(
            x, targets, ref, cu, weights, average, pairs, pair_weights, None, *options, *loss.options, loss.divisor,
            True, True, True, True,
        )  # fmt: skip
        *losses, seq, logps, stats, pair_grads, entropy, mean_logits, is_top1, _ = out
        shared = {
            "pairs": pairs.numpy(),
            "cu_seqlens": None if cu is None else cu.numpy(),
            "token_weights": weights.numpy(),
            "average": average,
            "label_smoothing": 0.2,
            "loss_type": ["sigmoid", "apo_down"],
            "pair_weights": pair_weights.numpy(),
            "wpo": True,
            **names,
        }
        tokens = reference.token_logps(arrays, targets.numpy(), token_weights=weights.numpy(), **names)
        np.testing.assert_allclose(entropy.numpy(), tokens.entropy, atol=2e-5)
        np.testing.assert_allclose(mean_logits.numpy(), tokens.mean_logits, atol=2e-5)
        assert is_top1.tolist() == tokens.is_top1.tolist()
        exact = reference.dpo_loss(arrays, targets.numpy(), ref.numpy(), **shared)
        for found, value in zip((*losses, seq), exact[:5], strict=True):
            np.testing.assert_allclose(found.numpy(), value, atol=1e-4, rtol=1e-5)
        out = x.clone() if inplace else torch.empty(x.shape, dtype=dtype)
        fallback.dpo_backward_into(
            out, out if inplace else x, targets, cu, weights, average, pairs, *options, 0.0, logps, stats, pair_grads,
            torch.ones(()), None, None,
        )  # fmt: skip
        grad = reference.dpo_loss_grad(arrays, targets.numpy(), ref.numpy(), **shared)
        np.testing.assert_allclose(to_numpy(out), grad, atol=2e-6 + 2 * rounding * np.abs(grad).max())


def test_k_indices_per_row():
    x, index = torch.randn(3, 33, dtype=torch.float64), torch.tensor([[0, 5, 5], [1, 1, 1], [7, 8, 9]])
    mask = torch.tensor([True, True, False])
    options = (-(2**63), 0.7, 1.0, 0.0)
    logps, stats = fallback.token_forward(x, index, mask, *options, False, False, False, False)[:2]
    kernel = torch.ops.dpo_fast.token_forward(x, index, mask, *options, False, False, False, False)
    torch.testing.assert_close(logps, kernel[0])
    g = torch.randn(3, 3, dtype=torch.float64)
    out = torch.empty_like(x)
    fallback.token_backward_into(out, x, index, mask, *options, logps, stats, None, g, None)
    torch.testing.assert_close(
        out, torch.ops.dpo_fast.token_backward(x, index, mask, *options, *kernel[:2], None, g, None)
    )


def test_bad_target_is_nan_for_its_token_and_sequence(monkeypatch):
    x, targets = torch.randn(2, 3, 5), torch.tensor([[0, 9, 1], [2, 3, -7]])
    targets[1, 2] = 4
    seq, logps, stats, _ = fallback.sequence_forward(x, targets, None, None, False, -100, 1.0, 1.0, 0.0, False)
    assert logps.isnan().tolist() == [[False, True, False], [False, False, False]]
    assert seq.isnan().tolist() == [True, False]
    out = torch.empty_like(x)
    fallback.sequence_backward_into(
        out, x, targets, None, None, False, -100, 1.0, 1.0, 0.0, logps, stats, torch.ones(2)
    )
    assert out.isnan().any(-1).tolist() == [[False, True, False], [False, False, False]]
    monkeypatch.setenv("DPO_FAST_CHECK", "1")
    with pytest.raises(IndexError, match=r"target 9 at position \[0, 1\] is outside \[0, 5\)"):
        fallback.sequence_forward(x, targets, None, None, False, -100, 1.0, 1.0, 0.0, False)


def test_cu_seqlens_are_checked():
    x, targets = torch.randn(6, 5), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        fallback.sequence_forward(x, targets, torch.tensor([0, 4, 2, 6]), None, False, -100, 1.0, 1.0, 0.0, False)


def test_gradients_of_separate_losses_and_logps():
    case = make_case("padded", (4, 5, 33), torch.float64)
    x, options = case.leaf, (-100, 1.0, 1.0, 0.0)
    want = (False, False, False, False)
    out = fallback.dpo_forward(x, case.targets, None, None, None, False, None, None, None, *options, *LOSS, *want)
    grads = (torch.tensor(0.3, dtype=torch.float64), torch.randn(2).double(), torch.randn(4).double())
    kernel = torch.ops.dpo_fast.dpo_backward(x, case.targets, None, None, False, None, *options, 0.0, *out[5:8], *grads)
    found = torch.empty_like(x)
    fallback.dpo_backward_into(found, x, case.targets, None, None, False, None, *options, 0.0, *out[5:8], *grads)
    torch.testing.assert_close(found, kernel)
    naive = naive_sequence_logps(x, case.targets, None)
    assert_accurate(out[4], reference.sequence_logps(x.numpy(), case.targets.numpy()), naive, torch.float64)


def test_pairs_are_checked():
    with pytest.raises(IndexError, match=r"pairs\[0, 1\] = -1 is outside \[0, 4\)"):
        fallback.preference_forward(torch.zeros(4), None, None, torch.tensor([[0, -1]]), None, None, *LOSS)


def test_other_devices_check_shapes_and_types():
    """What is registered for them checks first, as on the CPU: run here through the key that they take."""
    x, targets = torch.randn(4, 3, 5), torch.randint(0, 5, (4, 3))
    options = (-100, 1.0, 1.0, 0.0)

    def call(name, *args):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
        return getattr(torch.ops.dpo_fast, name).default.redispatch(keys, *args)

    def dpo(x=x, targets=targets, ref=None, cu=None, weights=None, pairs=None):
        rest = (*options, *LOSS, False, False, False, False)
        return call("dpo_forward", x, targets, ref, cu, weights, False, pairs, None, None, *rest)

    assert torch.isfinite(dpo()[0])
    bad = [
        (ValueError, lambda: dpo(x[:3], targets[:3])),
        (ValueError, lambda: dpo(x[:0], targets[:0])),
        (ValueError, lambda: dpo(targets=targets[:, :1])),
        (TypeError, lambda: dpo(targets=targets.float())),
        (TypeError, lambda: dpo(x.long())),
        (ValueError, lambda: dpo(ref=torch.ones(1))),
        (ValueError, lambda: dpo(weights=torch.ones(1, 3))),
        (ValueError, lambda: dpo(pairs=torch.zeros(2, 3, dtype=torch.int64))),
        (TypeError, lambda: dpo(pairs=torch.zeros(2, 2))),
        (ValueError, lambda: dpo(x[..., :0])),
        (ValueError, lambda: dpo(x[0], targets[0])),
        (ValueError, lambda: call("sequence_backward", x, targets, None, None, False, *options, x[..., 0], x[..., :2], torch.ones(2))),
    ]  # fmt: skip
    for kind, function in bad:
        with pytest.raises(kind):
            function()

"""Every level against the reference: dtypes x layouts x shapes x instruction sets x threads."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_accurate,
    make_case,
    naive_dpo_loss,
    naive_entropy,
    naive_sequence_logps,
    naive_token_logps,
    random_pairs,
    to_numpy,
)

import dpo_fast
from dpo_fast import reference
from dpo_fast._checks import TOKEN_OUTPUTS


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


grid = pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [(d, lay, s) for d in DTYPES for lay in LAYOUTS for s in SHAPES],
    ids=ids,
)


@grid
def test_token_logps(dtype, layout, shape, isa, threads):
    case = make_case(layout, shape, dtype)
    x, targets = case.logits(), case.targets
    out = dpo_fast.token_logps(x, targets, outputs=TOKEN_OUTPUTS)
    g = torch.linspace(-1, 1, targets.numel(), dtype=out.logps.dtype).reshape(targets.shape)
    h = 0.3 * g.flip(0)
    torch.autograd.backward([out.logps, out.entropy], [g, h])

    exact = reference.token_logps(to_numpy(x), targets.numpy())
    y = case.logits()
    logps, entropy = naive_token_logps(y, targets), naive_entropy(y, targets)
    torch.autograd.backward([logps, entropy], [g, h])
    assert_accurate(out.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(out.entropy, exact.entropy, entropy, dtype, "entropy")
    assert_accurate(out.mean_logits, exact.mean_logits, None, dtype, "mean_logits")
    assert_accurate(out.log_sum_sq_probs, exact.log_sum_sq_probs, entropy, dtype, "log_sum_sq_probs")
    assert out.is_top1.tolist() == exact.is_top1.tolist()
    grad = reference.token_logps_grad(to_numpy(x), targets.numpy(), to_numpy(g), to_numpy(h))
    assert_accurate(x.grad, grad, y.grad, dtype, "gradient")
    assert x.grad.dtype == dtype


@grid
def test_dpo_loss(dtype, layout, shape, isa, threads):
    case = make_case(layout, shape, dtype, seed=1)
    x, targets, cu = case.logits(), case.targets, case.cu_seqlens
    pairs = random_pairs(case.n_seqs)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    ref = torch.randn(case.n_seqs, generator=torch.Generator().manual_seed(2), dtype=wide)
    out = dpo_fast.dpo_loss(x, targets, ref, pairs=pairs, cu_seqlens=cu)
    out.loss.backward()

    options = {"pairs": pairs.numpy(), "cu_seqlens": None if cu is None else cu.numpy()}
    exact = reference.dpo_loss(to_numpy(x), targets.numpy(), ref.numpy(), **options)
    y = case.logits()
    logps = naive_sequence_logps(y, targets, cu)
    loss = naive_dpo_loss(logps, ref, pairs)
    loss.backward()
    chosen, rejected = (0.1 * (logps - ref))[pairs.T]
    assert_accurate(out.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(out.loss, exact.loss, loss, dtype, "loss")
    assert_accurate(out.losses, exact.losses, -torch.nn.functional.logsigmoid(chosen - rejected), dtype, "losses")
    assert_accurate(out.chosen_rewards, exact.chosen_rewards, chosen, dtype, "chosen_rewards")
    assert_accurate(out.rejected_rewards, exact.rejected_rewards, rejected, dtype, "rejected_rewards")
    grad = reference.dpo_loss_grad(to_numpy(x), targets.numpy(), ref.numpy(), **options)
    assert_accurate(x.grad, grad, y.grad, dtype, "gradient")
    logps_alone = dpo_fast.sequence_logps(case.view(case.leaf), targets, cu_seqlens=cu)
    assert torch.equal(logps_alone, out.logps.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 3.0, "logit_scale": 0.25},
        {"softcap": 5.0},
        {"softcap": 30.0, "logit_scale": 1.7, "temperature": 0.9},
    ],
    ids=str,
)
def test_transforms(dtype, options, isa):
    """Temperature, scale and soft-cap, values and gradients; the naive error is that of the same torch expression."""
    case = make_case("strided", (3, 5, 507), dtype, spread=8.0)
    x, y, targets = case.logits(), case.logits(), case.targets
    out = dpo_fast.token_logps(x, targets, outputs=TOKEN_OUTPUTS, **options)
    g = torch.linspace(-1, 1, targets.numel(), dtype=out.logps.dtype).reshape(targets.shape)
    torch.autograd.backward([out.logps, out.entropy], [g, 0.5 * g])

    z = (y if dtype is torch.float64 else y.float()) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    z = z / options.get("temperature", 1.0)
    logps, entropy = naive_token_logps(z, targets), naive_entropy(z, targets)
    torch.autograd.backward([logps, entropy], [g, 0.5 * g])
    exact = reference.token_logps(to_numpy(x), targets.numpy(), **options)
    assert_accurate(out.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(out.entropy, exact.entropy, entropy, dtype, "entropy")
    assert_accurate(out.mean_logits, exact.mean_logits, logps, dtype, "mean_logits")
    assert_accurate(out.log_sum_sq_probs, exact.log_sum_sq_probs, entropy, dtype, "log_sum_sq_probs")
    grad = reference.token_logps_grad(to_numpy(x), targets.numpy(), to_numpy(g), to_numpy(0.5 * g), **options)
    assert_accurate(x.grad, grad, y.grad, dtype, "gradient")


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_reference", ["none", "logps", "logits"])
def test_options_together(layout, average, smoothing, reduction, with_reference, isa):
    case = make_case(layout, (4, 7, 33), torch.float64)
    x, targets, cu = case.logits(), case.targets, case.cu_seqlens
    g = torch.Generator().manual_seed(5)
    weights = torch.rand(targets.shape, generator=g, dtype=torch.float64)
    weights[weights < 0.2] = 0
    ref_logits = torch.randn(x.shape, generator=g, dtype=torch.float64)
    ref = torch.randn(case.n_seqs, generator=g, dtype=torch.float64) if with_reference == "logps" else None
    pairs = random_pairs(case.n_seqs)
    options = {"average": average, "label_smoothing": smoothing, "reduction": reduction, "beta": 0.7, "softcap": 9.0}
    given = {"ref_logits": ref_logits} if with_reference == "logits" else {}
    out = dpo_fast.dpo_loss(x, targets, ref, pairs=pairs, cu_seqlens=cu, token_weights=weights, **given, **options)
    upstream = torch.linspace(0.5, 2, len(pairs), dtype=torch.float64)
    (out.loss * upstream).sum().backward() if reduction == "none" else out.loss.backward()

    as_arrays = {
        "pairs": pairs.numpy(),
        "cu_seqlens": None if cu is None else cu.numpy(),
        "token_weights": weights.numpy(),
        **({"ref_logits": ref_logits.numpy()} if given else {}),
        **options,
    }
    ref_array = None if ref is None else ref.numpy()
    exact = reference.dpo_loss(to_numpy(x), targets.numpy(), ref_array, **as_arrays)
    assert_accurate(out.loss, exact.loss, None, torch.float64)
    assert_accurate(out.chosen_rewards, exact.chosen_rewards, None, torch.float64)
    assert_accurate(out.logps, exact.logps, None, torch.float64)
    grad = reference.dpo_loss_grad(
        to_numpy(x),
        targets.numpy(),
        ref_array,
        grad_losses=upstream.numpy() if reduction == "none" else None,
        **as_arrays,
    )
    assert_accurate(x.grad, grad, None, torch.float64)


def test_gradients_into_losses_and_logps_besides_the_loss():
    """The sum of what comes into loss, losses and logps, and gradient accumulation over two calls."""
    case = make_case("padded", (4, 5, 33), torch.float64)
    ref = torch.randn(4, dtype=torch.float64)
    a, b, c = (torch.randn(n, dtype=torch.float64) for n in (1, 2, 4))
    x = case.logits()
    out = dpo_fast.dpo_loss(x, case.targets, ref)
    (a[0] * out.loss + (b * out.losses).sum() + (c * out.logps).sum()).backward()
    y = case.logits()
    for part in ("loss", "losses", "logps"):
        out = dpo_fast.dpo_loss(y, case.targets, ref)
        (a[0] * out.loss if part == "loss" else ((b if part == "losses" else c) * getattr(out, part)).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-15)
    exact = reference.dpo_loss_grad(
        to_numpy(x), case.targets.numpy(), ref.numpy(), reduction="sum", grad_losses=(a[0] / 2 + b).numpy()
    )
    exact += reference.sequence_logps_grad(to_numpy(x), case.targets.numpy(), c.numpy())
    assert_accurate(x.grad, exact, None, torch.float64)


def test_rewards_and_reference_have_no_gradient():
    case = make_case("padded", (4, 5, 33), torch.float32)
    ref = torch.randn(4, requires_grad=True)
    out = dpo_fast.dpo_loss(case.logits(), case.targets, ref)
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    out.loss.backward()
    assert ref.grad is None


def test_metrics():
    case = make_case("padded", (6, 5, 33), torch.float32)
    ref = torch.randn(6)
    for pairs in (None, random_pairs(6)):
        out = dpo_fast.dpo_loss(case.logits(), case.targets, ref, pairs=pairs)
        exact = reference.dpo_loss(
            to_numpy(case.leaf), case.targets.numpy(), ref.numpy(), pairs=None if pairs is None else pairs.numpy()
        )
        expected = exact.metrics()
        assert out.metrics() == pytest.approx(expected, abs=1e-5)
        index = reference.pair_index(6, exact.pairs)
        assert expected["logps/rejected"] == pytest.approx(exact.logps[index[:, 1]].mean())
        assert expected["rewards/margins"] == pytest.approx((exact.chosen_rewards - exact.rejected_rewards).mean())
        assert expected["rewards/accuracies"] == (exact.chosen_rewards > exact.rejected_rewards).mean()


def test_equal_rewards_do_not_count_as_accurate():
    assert dpo_fast.preference_loss(torch.zeros(2)).metrics()["rewards/accuracies"] == 0


def test_completion_targets():
    ids_ = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    targets = dpo_fast.completion_targets(ids_, mask)
    assert targets.tolist() == [[-100, 7, 8, -100], [2, 3, -100, -100]]
    with pytest.raises(ValueError, match=r"\[S, T\]"):
        dpo_fast.completion_targets(ids_, mask[:, :2])

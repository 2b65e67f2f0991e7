"""The CUDA kernels themselves, run on the host thread by thread, against the reference and the CPU kernels."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import kernel_calls
import numpy as np
import pytest
import torch
from cuda_host import host
from helpers import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_accurate,
    make_case,
    naive_entropy,
    naive_token_logps,
    random_pairs,
    to_numpy,
)
from kernel_calls import LOSSES, kernel_grads, loss_options
from test_kernels import LIMITS

import dpo_fast
from dpo_fast import _cpu, reference
from dpo_fast._arguments import KernelOut, KernelSaved

MISSING = list(host.toolchains())
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the CUDA kernels cannot be compiled here: {', '.join(MISSING)}")

ALL = host.STATISTICS
SANITIZED = "DPO_FAST_CUDA_HOST_FLAGS" in os.environ
SMALL = [s for s in SHAPES if s[0] * s[1] <= 70 and s[2] <= 2049]
LARGE = [s for s in SHAPES if s[2] > 16384]  # several pieces to a row
TRANSFORMS = ({}, {"temperature": 0.7, "logit_scale": 1.5}, {"softcap": 5.0}, {"softcap": 30.0, "temperature": 1.3})
# what runs under the sanitizers too, where switching threads is slow
SANITIZED_PART = (
    "test_tokens and strided and bfloat16 or test_rows_of_several_pieces and float32 and not softcap or "
    "test_gradient_at_every_alignment and bfloat16 or test_an_invalid_target or test_several_targets and float16 or "
    "test_sequences and packed and float64 and True or test_dpo_loss and float32 or test_pairs_and_offsets or test_no_rows "
    "or test_padding_of_the_vocabulary and strided and float16 or test_what_does_not_take_part and True"
)


@pytest.fixture(scope="module")
def kernels():
    return host.Kernels(host.build(host.include_folder()))


def on_the_cpu(x, targets, *, weights=None, cu_seqlens=None, **options):
    """The same batch for the CPU kernels."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    stored = x.view(torch.int16).numpy().view(np.uint16) if x.dtype is torch.bfloat16 else x.numpy()
    arrays = {"token_weights": weights, "cu_seqlens": cu_seqlens}
    arrays = {name: None if t is None else t.contiguous().numpy() for name, t in arrays.items()}
    return kernel_calls.Batch(stored, targets.contiguous().numpy(), **arrays, **options)


def assert_like_the_cpu(out, batch, cpu, **tight):
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        expected = cpu.results[name].reshape(out[name].shape)
        np.testing.assert_allclose(out[name].numpy(), expected, **tight, err_msg=name)
    np.testing.assert_allclose(batch.seq_logps.numpy(), cpu.seq_logps, **tight)


def naive(case, transform, grad_logps, grad_entropy):
    """logps, entropy and the gradient of the logits, by plain torch in the logits' own type."""
    x = case.view(case.leaf).detach().clone().requires_grad_()
    z = x if x.dtype is torch.float64 else x.float()
    z = z * transform.get("logit_scale", 1.0)
    cap = transform.get("softcap")
    z = (cap * torch.tanh(z / cap) if cap else z) / transform.get("temperature", 1.0)
    logps, entropy = naive_token_logps(z, case.targets), naive_entropy(z, case.targets)
    (logps * grad_logps + entropy * grad_entropy).sum().backward()
    return logps.detach(), entropy.detach(), x.grad


def exact_lse(x, targets, transform):
    """In float64, 0 where ignored."""
    z = x.double() * transform.get("logit_scale", 1.0)
    cap = transform.get("softcap")
    z = (cap * torch.tanh(z / cap) if cap else z) / transform.get("temperature", 1.0)
    return torch.where(targets == -100, 0, z.logsumexp(-1)).numpy()


def check_tokens(kernels, layout, shape, dtype, transform, inplace):
    case = make_case(layout, shape, dtype)
    x = case.view(case.leaf)
    targets = case.targets
    g, h = torch.randn(targets.shape), torch.randn(targets.shape)
    batch = host.Batch(kernels, x, targets, **transform).forward(*ALL)
    logps, entropy, grad = naive(case, transform, g, h)
    exact = reference.token_logps(to_numpy(x), targets.numpy(), **transform)
    assert_accurate(batch.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(batch.statistics["entropy"], exact.entropy, entropy, dtype, "entropy")
    assert_accurate(batch.statistics["mean_logits"], exact.mean_logits, logps, dtype, "mean_logits")
    assert_accurate(batch.statistics["log_sum_sq_probs"], exact.log_sum_sq_probs, logps, dtype, "log_sum_sq_probs")
    assert torch.equal(batch.statistics["is_top1"].bool(), torch.from_numpy(exact.is_top1))
    plain = host.Batch(kernels, x, targets, **transform).forward()
    assert torch.equal(plain.logps, batch.logps)  # the bits do not depend on which statistics there are
    assert torch.equal(plain.stats, batch.stats)
    only = host.Batch(kernels, x, targets, **transform).forward("lse", stats=False)
    assert torch.equal(only.logps, batch.logps)
    assert torch.equal(only.statistics["lse"], batch.statistics["lse"])
    assert (only.stats == 77).all()
    assert_accurate(batch.statistics["lse"], exact_lse(x, targets, transform), logps, dtype, "lse")
    g, h = g.to(batch.wide), h.to(batch.wide)
    for hh in (h, None):
        exact_grad = reference.token_logps_grad(
            to_numpy(x), targets.numpy(), g.numpy(), None if hh is None else hh.numpy(), **transform
        )
        found = batch.backward(sequences=False, token_logps=g, entropy=hh)
        assert_accurate(found, exact_grad, grad if hh is not None else None, dtype, "gradient")
        if inplace and hh is h:
            before = found
            written = host.Batch(kernels, x.clone(memory_format=torch.preserve_format), targets, **transform)
            written.logps, written.stats, written.statistics = batch.logps, batch.stats, batch.statistics
            found = written.backward(inplace=True, sequences=False, token_logps=g, entropy=hh)
            assert torch.equal(found, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens(kernels, layout, dtype):
    """Ragged shapes in every layout, all statistics, both gradients, in place and not."""
    for i, shape in enumerate(SMALL):
        check_tokens(kernels, layout, shape, dtype, TRANSFORMS[i % len(TRANSFORMS)], layout != "expanded")


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_several_pieces(kernels, dtype, transform):
    i = TRANSFORMS.index(transform)
    check_tokens(kernels, "strided" if i % 2 else "padded", LARGE[i % len(LARGE)], dtype, transform, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_itself_alone(kernels, dtype):
    """Bitwise the same whole or cut, at any alignment, with any stride."""
    V = 50003  # 4 pieces
    x = (3 * torch.randn(2, 1, V)).to(dtype)
    targets = torch.tensor([[5], [V - 1]])
    for extras in (False, True):
        cut = host.Batch(kernels, x, targets).forward(*(ALL if extras else ()))
        # so many rows that a block takes two pieces, or all; all rows but two are ignored, all lie in the same memory
        for T in (512, 1024):
            many = torch.full((2, T), -100)
            many[:, 7:8] = targets
            whole = host.Batch(kernels, x.expand(2, T, V), many).forward(*(ALL if extras else ()))
            assert torch.equal(cut.logps, whole.logps[:, 7:8])
            assert torch.equal(cut.stats, whole.stats[:, 7:8])
            assert (whole.logps[:, 8:] == 0).all()
        views = [torch.zeros(2, 1, V + 16, dtype=dtype)[:, :, i : V + i] for i in range(1, 16 // dtype.itemsize, 3)]
        views += [torch.zeros(2, 1, 2 * V, dtype=dtype)[:, :, ::2]]
        for view in views:
            other = host.Batch(kernels, view.copy_(x), targets).forward(*(ALL if extras else ()))
            assert torch.equal(cut.logps, other.logps)
            assert torch.equal(cut.stats, other.stats)
            if extras:
                assert torch.equal(cut.statistics["entropy"], other.statistics["entropy"])
                assert torch.equal(cut.statistics["mean_logits"], other.statistics["mean_logits"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alignment", range(8))
def test_gradient_at_every_alignment(kernels, dtype, alignment):
    """Logits and gradient begin anywhere; the bits are those of aligned ones, and nothing around is written."""
    V = 530
    x = (3 * torch.randn(2, 1, V)).to(dtype)
    targets = torch.tensor([[0], [V - 1]])
    batch = host.Batch(kernels, x, targets).forward()
    expected = batch.backward(sequences=False, token_logps=torch.ones(2, 1, dtype=batch.wide))
    around = torch.full((2, 1, V + 16), 5, dtype=dtype)
    view = around[:, :, alignment : V + alignment].copy_(x)
    moved = host.Batch(kernels, view, targets).forward()
    assert torch.equal(moved.backward(sequences=False, token_logps=torch.ones(2, 1, dtype=batch.wide)), expected)
    moved.backward(inplace=True, sequences=False, token_logps=torch.ones(2, 1, dtype=batch.wide))
    assert torch.equal(view, expected)
    assert (around[:, :, :alignment] == 5).all()
    assert (around[:, :, V + alignment :] == 5).all()


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(kernels, name, dtype):
    logits = LIMITS[name](torch.randn(1, 3, 4099).to(dtype)).to(dtype)
    targets = torch.tensor([[0, 97, 3395]])
    if name == "-inf first":
        targets = torch.tensor([[2522, 2619, 4098]])
    batch = host.Batch(kernels, logits, targets).forward(*ALL)
    ones = torch.ones(1, 3, dtype=batch.wide)
    found = batch.backward(sequences=False, token_logps=ones, entropy=ones)
    y = logits.clone().requires_grad_()
    logps = naive_token_logps(y, targets)
    logps.sum().backward()
    with np.errstate(all="ignore"):
        exact = reference.token_logps(to_numpy(logits), targets.numpy())
        grad = reference.token_logps_grad(to_numpy(logits), targets.numpy(), ones.numpy(), ones.numpy())
    logps = logps.detach()
    assert_accurate(batch.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(batch.statistics["entropy"], exact.entropy, logps, dtype, "entropy")
    assert_accurate(batch.statistics["log_sum_sq_probs"], exact.log_sum_sq_probs, logps, dtype, "log_sum_sq_probs")
    assert torch.equal(batch.statistics["is_top1"].bool(), torch.from_numpy(exact.is_top1))
    assert_accurate(found, grad, y.grad, dtype, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_rows(kernels, dtype):
    """They propagate as in the reference; the row beside them keeps its bits."""
    inf, nan = float("inf"), float("nan")
    x = torch.randn(1, 6, 600).to(dtype)
    x[0, 0, 3] = -inf
    x[0, 1] = -inf
    x[0, 2, 100] = nan
    x[0, 3, 5] = inf
    x[0, 4] = nan
    targets = torch.full((1, 6), 3)
    batch = host.Batch(kernels, x, targets).forward(*ALL)
    with np.errstate(all="ignore"):
        exact = reference.token_logps(to_numpy(x), targets.numpy())
    assert torch.equal(batch.logps[0, :5].isnan(), torch.tensor([False, True, True, True, True]))
    assert batch.logps[0, 0] == -inf
    assert torch.equal(batch.statistics["is_top1"].bool(), torch.from_numpy(exact.is_top1))
    alone = host.Batch(kernels, x[:, 5:].clone(), targets[:, 5:]).forward()
    assert torch.equal(batch.logps[:, 5:], alone.logps)
    capped = host.Batch(kernels, torch.full((1, 2, 40), -inf), torch.tensor([[0, 3]]), softcap=30.0).forward(*ALL)
    np.testing.assert_allclose(capped.logps.numpy(), -np.log(40), rtol=1e-6)
    assert capped.statistics["is_top1"].tolist() == [[1, 0]]


def test_ignored_rows_are_never_read_and_get_zeros(kernels):
    """By target, by mask and by weight; NaN in them shows up nowhere."""
    for V in (700, 20000):
        x = torch.randn(2, 4, V)
        targets = torch.randint(0, V, (2, 4))
        targets[0, 1] = targets[1, 3] = -7
        weights = torch.ones(2, 4, dtype=torch.float64)
        weights[1, 0] = 0
        mask = torch.ones(2, 4, dtype=torch.bool)
        mask[0, 0] = False
        ignored = (targets == -7) | (weights == 0) | ~mask
        x[ignored] = float("nan")
        batch = host.Batch(kernels, x, targets, weights=weights, row_mask=mask, ignore_index=-7).forward(*ALL)
        for name, values in {"logps": batch.logps, "stats": batch.stats, **batch.statistics}.items():
            assert (values[ignored] == 0).all(), name
            assert torch.isfinite(values.float()).all(), name
        seqs = batch.sequences()
        expected = (batch.logps * weights).sum(-1)
        np.testing.assert_allclose(seqs.numpy(), expected.numpy(), rtol=1e-6)
        for inplace in (False, True):
            grad = batch.backward(inplace=inplace, seq_logps=torch.ones(2))
            assert (grad[ignored] == 0).all()
            assert torch.isfinite(grad).all()
            assert (grad[~ignored] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_invalid_target_is_nan_for_its_token_and_sequence(kernels, dtype):
    V = 40
    x = torch.randn(4, 2, V).to(dtype)
    good = torch.randint(0, V, (4, 2))
    bad = good.clone()
    bad[1, 0], bad[2, 1] = V, -(2**62)
    expected = host.Batch(kernels, x, good).forward()
    expected_grad = (expected.losses(mean=False), expected.backward(loss=torch.ones((), dtype=expected.wide)))[1]
    batch = host.Batch(kernels, x, bad).forward(*ALL)
    hit = torch.zeros(4, 2, dtype=torch.bool)
    hit[1, 0] = hit[2, 1] = True
    assert torch.equal(batch.logps.isnan(), hit)
    assert torch.equal(batch.logps[~hit], expected.logps[~hit])
    pairs = torch.tensor([[0, 3], [1, 2]])
    out = batch.losses(pairs=pairs, mean=False)
    assert out["losses"].isnan().tolist() == [False, True]
    grad = batch.backward(loss=torch.ones((), dtype=batch.wide))
    assert grad[1:3].isnan().all()
    assert torch.isfinite(grad[0]).all()
    assert expected_grad.isfinite().all()
    tokens = batch.backward(sequences=False, token_logps=torch.ones(4, 2, dtype=batch.wide))
    assert torch.equal(tokens.isnan().all(-1), hit)
    assert torch.equal(tokens.isnan().any(-1), hit)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_targets_to_a_row(kernels, dtype, softcap):
    """Some named several times; the gradient of each is as for one target after the other."""
    V, K = 300, 40
    x = (3 * torch.randn(3, 2, V)).to(dtype)
    targets = torch.randint(0, V, (3, 2, K))
    targets[..., 7] = targets[..., 3] = targets[..., 30]
    grad = torch.randn(3, 2, K)
    batch = host.Batch(kernels, x, targets, softcap=softcap, ignore_index=-(2**63)).forward(*ALL)
    exact, exact_grad = [], np.zeros(x.shape)
    options = {"softcap": softcap or None}
    for k in range(K):
        y = targets[..., k].numpy()
        exact.append(reference.token_logps(to_numpy(x), y, **options).logps)
        exact_grad += reference.token_logps_grad(to_numpy(x), y, grad[..., k].numpy(), **options)
    assert_accurate(batch.logps, np.stack(exact, -1), None, dtype, "logps")
    found = batch.backward(sequences=False, token_logps=grad.to(batch.wide))
    slack = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dtype, 1e-2)
    np.testing.assert_allclose(to_numpy(found), exact_grad, rtol=slack, atol=slack)
    assert torch.equal(batch.backward(inplace=True, sequences=False, token_logps=grad.to(batch.wide)), found)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences(kernels, dtype, layout, average):
    """Weights of both types, offsets of both types, an empty sequence; the gradient through the sums."""
    case = make_case(layout, (5, 40, 67), dtype)
    x = case.view(case.leaf)
    case.targets.view(-1)[40:80] = -100  # a whole sequence, where sequences are that long
    for wide in (False, True):
        weights = torch.rand(case.targets.shape, dtype=torch.float64 if wide else torch.float32)
        weights.view(-1)[3] = 0
        cu = None if case.cu_seqlens is None else case.cu_seqlens.to(torch.int64 if wide else torch.int32)
        batch = host.Batch(kernels, x, case.targets, weights=weights, cu_seqlens=cu, average=average).forward()
        options = {"cu_seqlens": case.cu_seqlens, "token_weights": weights.numpy(), "average": average}
        exact = reference.sequence_logps(to_numpy(x), case.targets.numpy(), **options)
        sums = batch.sequences(double=wide)
        np.testing.assert_allclose(to_numpy(sums), exact, rtol=1e-5, atol=2e-5)
        g = torch.randn(batch.n_seqs).to(batch.wide)
        found = batch.backward(seq_logps=g)
        exact_grad = reference.sequence_logps_grad(to_numpy(x), case.targets.numpy(), g.numpy(), **options)
        assert_accurate(found, exact_grad, None, dtype, "gradient")
        cpu = on_the_cpu(x, case.targets, weights=weights, cu_seqlens=cu, average=average).sequences(wide)
        np.testing.assert_allclose(to_numpy(sums), cpu.seq_logps, rtol=2e-6, atol=2e-6)


def test_a_sequence_does_not_depend_on_the_others(kernels):
    x, targets = torch.randn(130, 31), torch.randint(0, 31, (130,))
    cuts = torch.tensor([0, 37, 37, 102, 130])
    together = host.Batch(kernels, x, targets, cu_seqlens=cuts).forward().sequences(double=True)
    for s in range(4):
        rows = slice(int(cuts[s]), int(cuts[s + 1]))
        n = rows.stop - rows.start
        if n == 0:
            assert together[s] == 0
            continue
        alone = host.Batch(kernels, x[rows].view(1, n, 31), targets[rows].view(1, n)).forward().sequences(double=True)
        assert torch.equal(together[s : s + 1], alone)


@pytest.mark.parametrize("given_pairs", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dpo_loss_is_that_of_the_cpu_kernels(kernels, dtype, mean, given_pairs):
    case = make_case("padded", (6, 5, 83), dtype)
    x = case.view(case.leaf).detach()
    pairs = random_pairs(6) if given_pairs else None
    n_pairs = 3 if pairs is None else len(pairs)
    ref = torch.randn(6, dtype=torch.float64 if mean else torch.float32)
    loss, divisor = loss_options("sigmoid", beta=0.3, label_smoothing=0.1), n_pairs if mean else 1
    numpy_pairs = None if pairs is None else pairs.numpy()
    cpu = on_the_cpu(x, case.targets).loss(loss, ref.numpy(), pairs=numpy_pairs, divisor=divisor)
    batch = host.Batch(kernels, x, case.targets).forward()
    out = batch.losses(ref, pairs, loss=loss, mean=mean)
    assert_like_the_cpu(out, batch, cpu, rtol=1e-6, atol=1e-6)
    weight = torch.randn(6).to(batch.wide)
    grads = {"loss": torch.tensor(1.7, dtype=batch.wide), "seq_logps": weight}
    slack = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    expected = cpu.backward(**{name: g.numpy() for name, g in grads.items()})
    np.testing.assert_allclose(to_numpy(batch.backward(**grads)), expected, rtol=slack, atol=slack)
    # a gradient for each pair instead of a common one, and both
    for common in (None, grads["loss"]):
        g = torch.randn(n_pairs, dtype=batch.wide)
        found = batch.backward(loss=common, losses=g)
        each = g.double().numpy() + (0 if common is None else 1.7 / divisor)
        options = {"beta": 0.3, "label_smoothing": 0.1, "pairs": pairs, "reduction": "none"}
        exact = reference.dpo_loss_grad(to_numpy(x), case.targets.numpy(), ref.numpy(), **options, grad_losses=each)
        assert_accurate(found, exact, None, dtype, "gradient")


OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "sigmoid": {"divergence": "js_divergence"},
    "hinge": {"dpop_lambda": 5.0},
    "discopop": {"length_penalty": 0.02},
}
CASES = [*LOSSES, ("sigmoid", "sft", "bco_pair"), "wpo", "numbers"]


@pytest.mark.parametrize("loss_type", CASES, ids=str)
def test_every_loss_is_that_of_the_cpu_kernels(kernels, loss_type):
    """In a whole step, with weights of pairs; single completions with a side that is absent; every number of pairs."""
    case = make_case("packed", (6, 9, 50), torch.float32, spread=1.0)
    x, n = case.view(case.leaf).detach(), case.n_seqs
    single, wpo, numbered = loss_type in ("kto", "bco"), loss_type == "wpo", loss_type == "numbers"
    average = loss_type in ("simpo", "orpo")
    given = {"dpop_lambda": 2.0, "length_penalty": 0.03, "label_smoothing": 0.1} if numbered else {}
    given = {"beta": 0.02, **OPTIONS.get(loss_type, {}), **given}
    loss = loss_options("sigmoid" if wpo or numbered else loss_type, average=average, **given)
    ref = None if loss_type in ("simpo", "orpo", "cpo") else torch.randn(n)
    pairs = random_pairs(n)
    if single:
        desirable, alone, none = torch.arange(n) % 3 != 0, torch.arange(n), torch.full((n,), -1)
        pairs = torch.stack([torch.where(desirable, alone, none), torch.where(desirable, none, alone)], -1)
    baseline = torch.tensor(0.2, dtype=torch.float64) if single else None
    numbers = {"weight": torch.rand(len(pairs), dtype=torch.float64)}
    numbers["weight"][1] = 0
    if numbered:
        numbers |= {"beta": torch.rand(len(pairs)).double(), "margin": torch.randn(len(pairs)).double()}
    cpu = on_the_cpu(x, case.targets, cu_seqlens=case.cu_seqlens, average=average).loss(
        loss,
        None if ref is None else ref.numpy(),
        wpo=wpo,
        pairs=pairs.numpy(),
        baseline=0.2 if single else None,
        **{name: t.numpy() for name, t in numbers.items()},
    )
    batch = host.Batch(kernels, x, case.targets, cu_seqlens=case.cu_seqlens, average=average)
    out = batch.forward(*ALL).losses(ref, pairs, loss=loss, numbers=numbers, baseline=baseline, wpo=wpo)
    assert_like_the_cpu(out, batch, cpu, rtol=1e-5, atol=1e-6)
    for grads in ({"loss": torch.ones(())}, {"losses": torch.randn(len(pairs))}):
        expected = cpu.backward(**{name: g.numpy() for name, g in grads.items()})
        np.testing.assert_allclose(batch.backward(**grads).numpy(), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected).max() > 1e-4


def sorted_numbers(S):
    """Pairs that name sequences in the ways there are."""
    n = torch.arange(S)
    return {
        "interleaved": n.view(-1, 2),
        "backwards": n.flip(0).view(-1, 2),
        "one chosen, all others rejected": torch.stack([torch.zeros(S - 1, dtype=torch.int64), n[1:]], -1),
        "in-batch negatives": torch.cartesian_prod(n[: S // 2], n[S // 2 :]).contiguous(),
        "random": random_pairs(S),
        "with itself": torch.tensor([[3, 3], [0, 1]]),
    }


@pytest.mark.parametrize("name", sorted_numbers(4))
def test_gradients_of_pairs_reach_their_sequences(kernels, name):
    """As in the reference, from either gradient; sequences of no pair get 0."""
    S = 90  # a sequence may have more pairs than a warp has lanes
    pairs = sorted_numbers(S)[name]
    x, targets = torch.randn(S, 2, 5), torch.randint(0, 5, (S, 2))
    batch = host.Batch(kernels, x, targets).forward()
    batch.losses(pairs=pairs, loss=loss_options("sigmoid", beta=0.4))
    each = torch.rand(len(pairs)) + 0.5
    for grads, g in (({"loss": torch.tensor(2.0)}, 2 / len(pairs)), ({"losses": each}, each.double().numpy())):
        exact = reference.dpo_loss_grad(
            x.numpy(),
            targets.numpy(),
            None,
            beta=0.4,
            pairs=pairs,
            reduction="none",
            grad_losses=np.zeros(len(pairs)) + g,
        )
        found = batch.backward(**grads)
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-5, atol=1e-7)
        assert torch.equal(batch.backward(**grads), found)
        absent = torch.ones(S, dtype=torch.bool)
        absent[pairs.view(-1)] = False
        assert (found[absent] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["padded", "strided", "every_second"])
def test_padding_of_the_vocabulary(kernels, layout, dtype):
    """Columns from valid_vocab on: never read, gradient 0, no target; the other bits are those of the narrow logits."""
    for V, valid in ((75, 67), (40, 39), (509, 1), (20011, 16384)):
        case = make_case(layout, (2, 3, V), dtype)
        x, targets = case.view(case.leaf).detach(), case.targets % valid
        targets[0, 1] = -100
        narrow = x[:, :, :valid].clone()
        x[:, :, valid:] = float("nan")
        batch = host.Batch(kernels, x, targets, valid_vocab=valid).forward(*ALL)
        other = host.Batch(kernels, narrow, targets).forward(*ALL)
        assert torch.equal(batch.logps, other.logps)
        assert torch.equal(batch.stats, other.stats)
        for name in ALL:
            assert torch.equal(batch.statistics[name], other.statistics[name]), name
        g, h = torch.randn(2, 3).to(batch.wide), torch.randn(2, 3).to(batch.wide)
        for grads in ({"token_logps": g}, {"token_logps": g, "entropy": h}, {"token_logps": 0 * g}):
            expected = other.backward(sequences=False, **grads)
            found = batch.backward(sequences=False, **grads)
            assert torch.equal(found[:, :, :valid], expected)
            assert (found[:, :, valid:] == 0).all()
        batch.backward(inplace=True, sequences=False, token_logps=g)
        assert torch.equal(x[:, :, :valid], other.backward(sequences=False, token_logps=g))
        assert (x[:, :, valid:] == 0).all()
        bad = targets.clone()
        bad[1, 2] = valid
        beyond = host.Batch(kernels, narrow, bad).forward()
        assert beyond.logps.isnan().sum() == 1
        assert beyond.logps[1, 2].isnan()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_log_sum_exp(kernels, dtype, transform):
    """Alone, for rows of which nothing else has a gradient, and beside the others."""
    case = make_case("padded", (3, 4, 131), dtype)
    x = case.view(case.leaf).detach()
    batch = host.Batch(kernels, x, case.targets, **transform).forward(*ALL)
    wide = x.double().requires_grad_()
    z = wide * transform.get("logit_scale", 1.0)
    cap = transform.get("softcap")
    z = (cap * torch.tanh(z / cap) if cap else z) / transform.get("temperature", 1.0)
    logp = z.log_softmax(-1)
    parts = {
        "lse": z.logsumexp(-1),
        "token_logps": logp.gather(-1, case.targets.clamp(min=0)[..., None])[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
    }
    kept = case.targets != -100
    for names in (["lse"], ["lse", "token_logps"], ["lse", "entropy"], list(parts)):
        grads = {name: torch.randn(3, 4).to(batch.wide) for name in names}
        grads["lse"][0] = 0
        if "token_logps" in names:
            grads["token_logps"][1] = 0
        total = sum((parts[name] * grads[name].double() * kept).sum() for name in names)
        (exact,) = torch.autograd.grad(total, wide, retain_graph=True)
        found = batch.backward(sequences=False, **grads)
        slack = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
        np.testing.assert_allclose(to_numpy(found), exact.numpy(), rtol=slack, atol=slack)
        if names == ["lse"]:
            assert (found[0] == 0).all()
            assert (found[1:][kept[1:]] != 0).any(-1).all()
    # through the loss: the sequence's gradient and that of its tokens' log-sum-exp
    batch.losses(loss=loss_options("sigmoid"), pairs=torch.tensor([[0, 1]]))
    g = torch.randn(3, 4).to(batch.wide)
    both = batch.backward(loss=torch.ones((), dtype=batch.wide), lse=g)
    one = to_numpy(batch.backward(loss=torch.ones((), dtype=batch.wide))) + to_numpy(batch.backward(lse=g))
    np.testing.assert_allclose(to_numpy(both), one, rtol=0, atol=2e-2 if dtype.itemsize == 2 else 1e-6)
    assert (both[2] != 0).any()


@pytest.mark.parametrize("explicit", [False, True])
def test_what_does_not_take_part_is_not_read(kernels, explicit):
    """Pairs of weight 0 and sequences of no pair, with NaN in their logits: as if they were not there."""
    nan = float("nan")
    for V in (70, 20000):
        x, targets = torch.randn(7, 3, V), torch.randint(0, V, (7, 3))
        pairs = torch.tensor([[0, 3], [1, 4], [2, 5]]) if explicit else None
        weight = torch.tensor([1, 0, 2], dtype=torch.float64)
        beta = torch.tensor([0.1, nan, 0.3], dtype=torch.float64)
        loss = loss_options(("sigmoid", "sft", "ipo"), beta=0.2, dpop_lambda=1.0, length_penalty=0.1)
        numbers = {"weight": weight, "beta": beta}
        clean = host.Batch(kernels, x.clone(), targets).forward()
        expected = clean.losses(torch.zeros(7), pairs, loss=loss, numbers=numbers)
        x[[1, 4, 6]] = nan
        batch = host.Batch(kernels, x, targets).forward("log_sum_sq_probs")
        for wpo in (False, True):
            out = batch.losses(torch.zeros(7), pairs, loss=loss, numbers=numbers, wpo=wpo)
            for name, values in out.items():
                assert values.isfinite().all(), name
                assert wpo or torch.equal(values, expected[name])
            for name in ("losses", "chosen_rewards", "rejected_rewards"):
                assert out[name][1] == 0
                assert (out[name][[0, 2]] != 0).all()
            # 0 comes in for what takes no part, but for one sequence that the caller asks for
            for grads in ({"loss": torch.ones(())}, {"losses": torch.ones(3)}):
                found = batch.backward(**grads)
                assert (found[[1, 4, 6]] == 0).all()
                assert found.isfinite().all()
                assert (found[[0, 2, 3, 5]] != 0).any(-1).all()
        asked = torch.zeros(7)
        asked[6] = 1
        found = batch.backward(loss=torch.ones(()), seq_logps=asked)
        assert found[6].isnan().all()
        assert found[:6].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_gradient_are_not_read(kernels, dtype):
    """Their logits are NaN; the rows beside them keep their bits."""
    for V, softcap in ((300, 0.0), (300, 5.0), (20000, 0.0)):
        x, targets = torch.randn(2, 3, V).to(dtype), torch.randint(0, V, (2, 3))
        clean = host.Batch(kernels, x.clone(), targets, softcap=softcap).forward(*ALL)
        x[0, 1] = x[1, 2] = float("nan")
        batch = host.Batch(kernels, x, targets, softcap=softcap).forward(*ALL)
        for names in (["token_logps"], ["entropy"], ["lse"], ["token_logps", "entropy", "lse"]):
            grads = {name: torch.randn(2, 3).to(batch.wide) for name in names}
            for g in grads.values():
                g[0, 1] = g[1, 2] = 0
            found = batch.backward(sequences=False, **grads)
            assert torch.equal(found, clean.backward(sequences=False, **grads))
            assert (found[[0, 1], [1, 2]] == 0).all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("given_pairs", [False, True])
def test_losses_from_log_probs(kernels, given_pairs, wide):
    dtype = torch.float64 if wide else torch.float32
    S = 1200  # more pairs than threads
    logps, ref = 5 * torch.randn(S).to(dtype), torch.randn(S, dtype=torch.float64)
    pairs = random_pairs(S) if given_pairs else None
    n_pairs = S // 2 if pairs is None else len(pairs)
    (spec, _alive), out = host.make_pairs(S, True, pairs), host.loss_arrays(n_pairs, dtype)
    arrays = host.Losses(**{k: v.data_ptr() for k, v in out.items()})
    lengths = torch.randint(1, 50, (S,)).double()
    loss = host.make_loss(loss_options(("sigmoid", "sft")))
    kernels.call("losses", spec, loss, int(wide), int(not wide), host.c_int64(S), logps, ref, 1, lengths, arrays)
    options = {"pairs": pairs, "loss_type": ("sigmoid", "sft"), "lengths": lengths.numpy()}
    exact = reference.preference_loss(logps.numpy(), ref.numpy(), **options)
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        np.testing.assert_allclose(out[name].numpy(), getattr(exact, name), rtol=1e-6, atol=1e-7, err_msg=name)
    g = torch.randn(n_pairs, dtype=dtype)
    found = torch.full((S,), 77, dtype=dtype)
    common = torch.tensor(2, dtype=dtype)
    grads = host.Grads(loss=common.data_ptr(), losses=g.data_ptr())
    kernels.call("losses_backward", spec, int(wide), host.c_int64(S), out["pair_grads"], grads, found)
    each = g.double().numpy() + 2 / n_pairs
    exact_grad = reference.preference_loss_grad(
        logps.numpy(), ref.numpy(), **options, reduction="none", grad_losses=each
    )
    np.testing.assert_allclose(found.numpy(), exact_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("round_sums", [False, True])
def test_sums_are_rounded_as_their_float32_references_were(kernels, round_sums):
    """float64 sums of bfloat16 logits: rewards of equal models are exactly 0; others keep their digits."""
    logps = torch.randn(4, dtype=torch.float64) * 100
    out = host.loss_arrays(2, torch.float64)
    arrays = host.Losses(**{k: v.data_ptr() for k, v in out.items()})
    spec, _alive = host.make_pairs(4)
    loss = host.make_loss(loss_options("sigmoid", beta=1.0))
    kernels.call("losses", spec, loss, 1, int(round_sums), host.c_int64(4), logps, logps.float(), 0, None, arrays)
    expected = torch.zeros(2) if round_sums else (logps - logps.float().double())[:2]
    assert torch.equal(out["chosen_rewards"], expected.double())
    assert round_sums or (expected != 0).all()


def test_pairs_and_offsets_outside_read_nothing(kernels):
    """Their values are not checked on the device: NaN, and no memory touched beyond the arrays."""
    x, targets = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    cu = torch.tensor([0, 2, 4_000_000])
    batch = host.Batch(kernels, x, targets, cu_seqlens=cu).forward()
    out = batch.losses(pairs=torch.tensor([[0, 2], [-5, 1], [0, 1], [-1, 1]]))
    assert out["losses"].isnan().tolist() == [True, True, False, True]
    assert torch.equal(batch.seq_logps[1], batch.logps[2:].double().sum().float())


@pytest.mark.parametrize("V", [300, 40000])
def test_launches(kernels, V):
    """Rows and the losses, and one more for rows that are cut; backward one, and one more with a gradient for each pair."""
    batch = host.Batch(kernels, torch.randn(4, 1, V), torch.zeros(4, 1, dtype=torch.int64))
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3]])
    counts = [kernels.launches()]
    for step in (
        lambda: (batch.forward(*ALL), batch.losses(pairs=pairs, wpo=True)),
        lambda: batch.backward(loss=torch.ones(()), lse=torch.ones(4, 1)),
        lambda: batch.backward(losses=torch.ones(3), entropy=torch.ones(4, 1)),
    ):
        step()
        counts.append(kernels.launches())
    assert np.diff(counts).tolist() == [3 if V > 16384 else 2, 1, 2]


def test_no_rows(kernels):
    for shape in ((0, 3, 5), (3, 0, 5)):
        batch = host.Batch(kernels, torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64)).forward()
        assert (batch.sequences() == 0).all()
        assert batch.backward(seq_logps=torch.ones(shape[0])).shape == shape


@pytest.fixture(scope="module")
def binding_path():
    pytest.importorskip("Cython")
    return host.build_binding(host.include_folder())


@pytest.fixture(scope="module")
def binding(binding_path):
    return host.load_binding(binding_path)


def in_order(pairs, n_seqs):
    """KernelPairs with order and offsets, and the arrays these lie in."""
    entries = np.ctypeslib.as_array((ctypes.c_int64 * (2 * pairs.n_pairs)).from_address(pairs.pairs))
    arrays = [t.numpy() for t in host.by_sequence(torch.from_numpy(entries), n_seqs)]
    order, offsets = map(kernel_calls.address, arrays)
    return pairs._replace(order=order, offsets=offsets), arrays


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("V", [67, 40000])
def test_the_binding_takes_what_the_cpu_binding_takes(binding, binding_path, V, device):
    """Each argument in its place: the same calls of both bindings, on a device that is current or is not."""
    runtime, place, address = ctypes.CDLL(str(binding_path)), (0, device), kernel_calls.address
    before = runtime.cuda_host_device_sets()
    rng = np.random.default_rng(0)
    S, T, wide = 4, 3, np.dtype(np.float32)
    targets = rng.integers(0, V - 4, (S, T))
    targets[0, 1] = -7
    weights, mask = rng.random((S, T)), np.ones((S, T), np.uint8)
    mask[2, 0] = 0
    options = {"row_mask": mask, "token_weights": weights, "average": True, "ignore_index": -7, "temperature": 0.8}
    options |= {"logit_scale": 1.2, "softcap": 20.0, "valid_vocab": V - 4}
    cpu = kernel_calls.Batch(2 * rng.standard_normal((S, T, V)).astype(wide), targets, **options)
    loss = loss_options(("sigmoid", "sft"), [1.0, 0.3], beta=0.3, label_smoothing=0.1, length_penalty=0.2)
    pairs = np.array([[0, 1], [2, 3], [2, 1]])
    numbers = {"weight": rng.random(3), "beta": rng.random(3), "margin": rng.random(3)}
    ref = rng.standard_normal(S)
    cpu.loss(loss, ref, wpo=True, names=ALL, pairs=pairs, divisor=2.5, **numbers)
    cuda = {name: np.full_like(x, 77) for name, x in cpu.statistics.items()}
    logps, stats, seq_logps = (np.full_like(x, 77) for x in (cpu.logps, cpu.stats, cpu.seq_logps))
    saved = np.full((S, binding.SEQ_SAVED), 77.0)
    _, _kept, results, losses = kernel_calls.pair_arrays(S, wide, pairs=pairs)
    n_bytes = binding.forward_scratch_bytes(cpu.rows)
    assert (n_bytes > 0) == (V > 16384)
    memory = np.full(max(n_bytes, 8 * S), 77, np.uint8)
    scratch = address(memory)
    named, _order = in_order(cpu.pairs, S)
    arrays = (address(logps), address(stats))
    found = tuple(address(cuda[name]) for name in ALL)
    shared = (cpu.rows, cpu.seqs)
    binding.dpo_forward(
        *(*shared, named, loss, place, scratch, True, address(ref), True, *arrays, found),
        *(address(seq_logps), losses, address(saved)),
    )
    close = {"rtol": 2e-6, "atol": 2e-6}
    for name in ALL:
        np.testing.assert_allclose(cuda[name], cpu.statistics[name], **close, err_msg=name)
    for name in results:
        np.testing.assert_allclose(results[name], cpu.results[name], **close, err_msg=name)
    np.testing.assert_allclose(logps, cpu.logps, **close)
    np.testing.assert_allclose(seq_logps, cpu.seq_logps, **close)
    grads = {"token_logps": rng.random((S, T)), "entropy": rng.random((S, T)), "lse": rng.random((S, T))}
    grads |= {"seq_logps": rng.random(S), "loss": rng.random(1), "losses": rng.random(3)}
    grads = {name: g.astype(wide) for name, g in grads.items()}
    kept = KernelSaved(*arrays, address(cuda["entropy"]), address(results["pair_grads"]), address(saved))
    grad = np.full_like(cpu.logits, 77)
    out = KernelOut(address(grad), *cpu.strides)
    incoming = kernel_grads(grads)
    binding.backward(*shared, named, place, scratch, kept, incoming, out)
    np.testing.assert_allclose(grad, cpu.backward(**grads), **close)
    # sequences and tokens alone; without statistics and stats
    sums, expected = np.full(S, 77.0), cpu.sequences(double_sums=True).seq_logps
    binding.sequence_forward(*shared, place, scratch, arrays[0], None, address(sums), True, address(saved))
    np.testing.assert_allclose(sums, expected, **close)
    logps[:] = 77
    binding.token_forward(cpu.rows, place, scratch, address(logps), None, None)
    np.testing.assert_allclose(logps, cpu.tokens().logps, **close)
    # four calls: to the device and back, if it was not the current one
    assert runtime.cuda_host_device() == 0
    assert runtime.cuda_host_device_sets() - before == (8 if device else 0)


def test_the_binding_of_the_losses_alone_takes_what_the_cpu_binding_takes(binding):
    rng, address, S = np.random.default_rng(0), kernel_calls.address, 4
    loss = loss_options(("sigmoid", "sft"), [1.0, 0.3], beta=0.3, label_smoothing=0.1, length_penalty=0.2)
    pairs = np.array([[0, 1], [2, 3], [2, 1]])
    numbers = {"weight": rng.random(3), "beta": rng.random(3), "margin": rng.random(3)}
    logps, ref, lengths = rng.standard_normal(S), rng.standard_normal(S).astype(np.float32), np.array([5.0, 2, 7, 3])
    calls = {binding: ((0, 0),), _cpu: ()}
    results, grads = [], []
    g, each = rng.random(1), rng.random(3)
    for module, place in calls.items():
        spec, _kept, arrays, out = kernel_calls.pair_arrays(S, np.float64, pairs=pairs, divisor=2.5, **numbers)
        inputs = (address(logps), address(ref), False, address(lengths))
        module.preference_forward(spec, loss, True, True, S, *place, *inputs, out)
        results.append(arrays)
        grads.append(np.full(S, 77.0))
        named, _order = in_order(spec, S)
        incoming = (address(arrays["pair_grads"]), address(g), address(each), address(grads[-1]))
        module.preference_backward(named, True, S, *place, *incoming)
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(grads[0], grads[1], rtol=1e-12)


def test_the_small_suite_of_the_sanitizers(binding, monkeypatch):
    """tools/gpu_small.py, which compute-sanitizer runs on a GPU."""
    monkeypatch.setitem(sys.modules, "dpo_fast._cuda", binding)
    monkeypatch.setattr(dpo_fast, "_cuda", binding, raising=False)
    monkeypatch.syspath_prepend(host.ROOT / "tools")
    import gpu_small

    monkeypatch.setattr(gpu_small, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_small, "place", lambda: (0, 0))
    gpu_small.main()


@pytest.mark.skipif(SANITIZED, reason="this is the run under the sanitizers")
@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD")
def test_under_sanitizers():
    """The same, in part, under the address and undefined-behaviour sanitizers."""
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
    libraries = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("g++ has no sanitizers")
    env = {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "DPO_FAST_CUDA_HOST_FLAGS": sanitize,
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", SANITIZED_PART],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " passed" in run.stdout

"""The CUDA kernels themselves, run on the host thread by thread, against the reference and the CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys

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
from test_kernels import LIMITS

import dpo_fast
from dpo_fast import reference
from dpo_fast._loss.options import PAIR_LOSSES

MISSING = list(host.toolchains())
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the CUDA kernels cannot be compiled here: {', '.join(MISSING)}")

SANITIZED = "DPO_FAST_CUDA_HOST_FLAGS" in os.environ
SMALL = [s for s in SHAPES if s[0] * s[1] <= 70 and s[2] <= 2049]
LARGE = [s for s in SHAPES if s[2] > 16384]  # several pieces to a row
TRANSFORMS = ({}, {"temperature": 0.7, "logit_scale": 1.5}, {"softcap": 5.0}, {"softcap": 30.0, "temperature": 1.3})
# what runs under the sanitizers too, where switching threads is slow
SANITIZED_PART = (
    "test_tokens and strided and bfloat16 or test_rows_of_several_pieces and float32 and not softcap or "
    "test_gradient_at_every_alignment and bfloat16 or test_an_invalid_target or test_several_targets and float16 or "
    "test_sequences and packed and float64 and True or test_dpo_loss and float32 or test_pairs_and_offsets or test_no_rows"
)


@pytest.fixture(scope="module")
def kernels():
    return host.Kernels(host.build(host.include_folder()))


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


def check_tokens(kernels, layout, shape, dtype, transform, inplace):
    case = make_case(layout, shape, dtype)
    x = case.view(case.leaf)
    targets = case.targets
    g, h = torch.randn(targets.shape), torch.randn(targets.shape)
    batch = host.Batch(kernels, x, targets, **transform).forward(extras=True)
    logps, entropy, grad = naive(case, transform, g, h)
    exact = reference.token_logps(to_numpy(x), targets.numpy(), **transform)
    assert_accurate(batch.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(batch.entropy, exact.entropy, entropy, dtype, "entropy")
    assert_accurate(batch.mean_logits, exact.mean_logits, logps, dtype, "mean_logits")
    assert_accurate(batch.log_sum_sq_probs, exact.log_sum_sq_probs, logps, dtype, "log_sum_sq_probs")
    assert torch.equal(batch.is_top1.bool(), torch.from_numpy(exact.is_top1))
    plain = host.Batch(kernels, x, targets, **transform).forward()
    assert_accurate(plain.logps, exact.logps, logps, dtype, "logps without extras")
    g, h = g.to(batch.wide), h.to(batch.wide)
    for hh in (h, None):
        exact_grad = reference.token_logps_grad(
            to_numpy(x), targets.numpy(), g.numpy(), None if hh is None else hh.numpy(), **transform
        )
        found = batch.backward(sequences=False, token_logps=g, token_entropy=hh)
        assert_accurate(found, exact_grad, grad if hh is not None else None, dtype, "gradient")
        if inplace and hh is h:
            before = found
            written = host.Batch(kernels, x.clone(memory_format=torch.preserve_format), targets, **transform)
            written.logps, written.stats, written.entropy = batch.logps, batch.stats, batch.entropy
            found = written.backward(inplace=True, sequences=False, token_logps=g, token_entropy=hh)
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
        cut = host.Batch(kernels, x, targets).forward(extras)
        # so many rows that a block takes two pieces, or all; all rows but two are ignored, all lie in the same memory
        for T in (512, 1024):
            many = torch.full((2, T), -100)
            many[:, 7:8] = targets
            whole = host.Batch(kernels, x.expand(2, T, V), many).forward(extras)
            assert torch.equal(cut.logps, whole.logps[:, 7:8])
            assert torch.equal(cut.stats, whole.stats[:, 7:8])
            assert (whole.logps[:, 8:] == 0).all()
        views = [torch.zeros(2, 1, V + 16, dtype=dtype)[:, :, i : V + i] for i in range(1, 16 // dtype.itemsize, 3)]
        views += [torch.zeros(2, 1, 2 * V, dtype=dtype)[:, :, ::2]]
        for view in views:
            other = host.Batch(kernels, view.copy_(x), targets).forward(extras)
            assert torch.equal(cut.logps, other.logps)
            assert torch.equal(cut.stats, other.stats)
            if extras:
                assert torch.equal(cut.entropy, other.entropy)
                assert torch.equal(cut.mean_logits, other.mean_logits)


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
    batch = host.Batch(kernels, logits, targets).forward(extras=True)
    ones = torch.ones(1, 3, dtype=batch.wide)
    found = batch.backward(sequences=False, token_logps=ones, token_entropy=ones)
    y = logits.clone().requires_grad_()
    logps = naive_token_logps(y, targets)
    logps.sum().backward()
    with np.errstate(all="ignore"):
        exact = reference.token_logps(to_numpy(logits), targets.numpy())
        grad = reference.token_logps_grad(to_numpy(logits), targets.numpy(), ones.numpy(), ones.numpy())
    logps = logps.detach()
    assert_accurate(batch.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(batch.entropy, exact.entropy, logps, dtype, "entropy")
    assert_accurate(batch.log_sum_sq_probs, exact.log_sum_sq_probs, logps, dtype, "log_sum_sq_probs")
    assert torch.equal(batch.is_top1.bool(), torch.from_numpy(exact.is_top1))
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
    batch = host.Batch(kernels, x, targets).forward(extras=True)
    with np.errstate(all="ignore"):
        exact = reference.token_logps(to_numpy(x), targets.numpy())
    assert torch.equal(batch.logps[0, :5].isnan(), torch.tensor([False, True, True, True, True]))
    assert batch.logps[0, 0] == -inf
    assert torch.equal(batch.is_top1.bool(), torch.from_numpy(exact.is_top1))
    alone = host.Batch(kernels, x[:, 5:].clone(), targets[:, 5:]).forward()
    assert torch.equal(batch.logps[:, 5:], alone.logps)
    capped = host.Batch(kernels, torch.full((1, 2, 40), -inf), torch.tensor([[0, 3]]), softcap=30.0).forward(True)
    np.testing.assert_allclose(capped.logps.numpy(), -np.log(40), rtol=1e-6)
    assert capped.is_top1.tolist() == [[1, 0]]


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
        batch = host.Batch(kernels, x, targets, weights=weights, row_mask=mask, ignore_index=-7).forward(extras=True)
        for name in ("logps", "stats", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"):
            values = getattr(batch, name)
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
    batch = host.Batch(kernels, x, bad).forward(extras=True)
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
    batch = host.Batch(kernels, x, targets, softcap=softcap, ignore_index=-(2**63)).forward(extras=True)
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
        cpu = dpo_fast.sequence_logps(
            x.detach(), case.targets, cu_seqlens=case.cu_seqlens, token_weights=weights, average=average
        )
        np.testing.assert_allclose(to_numpy(sums), cpu.numpy(), rtol=2e-6, atol=2e-6)


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
    ref = torch.randn(6, dtype=torch.float64 if mean else torch.float32)
    y = x.clone().requires_grad_()
    options = {"beta": 0.3, "label_smoothing": 0.1, "pairs": pairs, "reduction": "mean" if mean else "sum"}
    cpu = dpo_fast.dpo_loss(y, case.targets, ref, **options)
    weight = torch.randn(6).to(cpu.logps.dtype)
    (1.7 * cpu.loss + (cpu.logps * weight).sum()).backward()
    batch = host.Batch(kernels, x, case.targets).forward()
    out = batch.losses(ref, pairs, beta=0.3, label_smoothing=0.1, mean=mean)
    tight = {"rtol": 1e-6, "atol": 1e-6}
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        np.testing.assert_allclose(out[name].numpy(), getattr(cpu, name).detach().numpy(), **tight, err_msg=name)
    np.testing.assert_allclose(batch.seq_logps.numpy(), cpu.logps.detach().numpy(), **tight)
    grads = {"loss": torch.tensor(1.7, dtype=batch.wide), "seq_logps": weight}
    found = batch.backward(**grads)
    slack = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    np.testing.assert_allclose(to_numpy(found), to_numpy(y.grad), rtol=slack, atol=slack)
    # a gradient for each pair instead of a common one, and both
    for common in (None, grads["loss"]):
        g = torch.randn(len(out["losses"]), dtype=batch.wide)
        found = batch.backward(loss=common, losses=g)
        n_pairs = len(g)
        each = g.double().numpy() + (0 if common is None else 1.7 / (n_pairs if mean else 1))
        exact = reference.dpo_loss_grad(
            to_numpy(x), case.targets.numpy(), ref.numpy(), **{**options, "reduction": "none"}, grad_losses=each
        )
        assert_accurate(found, exact, None, dtype, "gradient")


OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "sigmoid": {"f_divergence": "js_divergence"},
}
CASES = [*PAIR_LOSSES, ("sigmoid", "sft", "bco_pair"), "wpo"]


@pytest.mark.parametrize("loss_type", CASES, ids=str)
def test_every_loss_is_that_of_the_cpu_kernels(kernels, loss_type):
    """In a whole step, with weights of pairs; single completions with a side that is absent."""
    case = make_case("packed", (6, 9, 50), torch.float32)
    x, n = case.view(case.leaf).detach(), case.n_seqs
    single, wpo = loss_type in ("kto", "bco"), loss_type == "wpo"
    name = "sigmoid" if wpo else loss_type
    options = {"beta": 0.3, **OPTIONS.get(loss_type, {})}
    average = loss_type in ("simpo", "orpo")
    ref = None if loss_type in ("simpo", "orpo", "cpo") else torch.randn(n)
    desirable = torch.arange(n) % 3 != 0
    pairs = random_pairs(n)
    if single:
        numbers, none = torch.arange(n), torch.full((n,), -1)
        pairs = torch.stack([torch.where(desirable, numbers, none), torch.where(desirable, none, numbers)], -1)
    baseline = torch.tensor(0.2, dtype=torch.float64) if single else None
    weights = torch.rand(len(pairs), dtype=torch.float64)
    weights[1] = 0
    y = x.clone().requires_grad_()
    sides = {"desirable": desirable, "baseline": baseline} if single else {"pairs": pairs, "wpo": wpo}
    cpu = dpo_fast.dpo_loss(
        y, case.targets, ref, loss_type=name, cu_seqlens=case.cu_seqlens, pair_weights=weights, **sides, **options
    )
    cpu.loss.backward()
    batch = host.Batch(kernels, x, case.targets, cu_seqlens=case.cu_seqlens, average=average).forward(extras=wpo)
    out = batch.losses(ref, pairs, loss_type=name, weights=weights, baseline=baseline, wpo=wpo, **options)
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        expected = getattr(cpu, key).detach().numpy()
        np.testing.assert_allclose(out[key].numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=key)
    found = batch.backward(loss=torch.ones(()))
    np.testing.assert_allclose(found.numpy(), y.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("given_pairs", [False, True])
def test_losses_from_log_probs(kernels, given_pairs, wide):
    dtype = torch.float64 if wide else torch.float32
    S = 1200  # more pairs than threads
    logps, ref = 5 * torch.randn(S).to(dtype), torch.randn(S, dtype=torch.float64)
    pairs = random_pairs(S) if given_pairs else None
    n_pairs = S // 2 if pairs is None else len(pairs)
    spec, out = host.make_pairs(n_pairs, True, pairs), host.loss_arrays(n_pairs, dtype)
    arrays = host.Losses(**{k: v.data_ptr() for k, v in out.items()})
    lengths = torch.randint(1, 50, (S,)).double()
    loss = host.make_loss(("sigmoid", "sft"))
    kernels.call("losses", spec, loss, int(wide), host.c_int64(S), logps, ref, 1, lengths, arrays)
    options = {"pairs": pairs, "loss_type": ("sigmoid", "sft"), "lengths": lengths.numpy()}
    exact = reference.preference_loss(logps.numpy(), ref.numpy(), **options)
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        np.testing.assert_allclose(out[name].numpy(), getattr(exact, name), rtol=1e-6, atol=1e-7, err_msg=name)
    g = torch.randn(n_pairs, dtype=dtype)
    found = torch.full((S,), 77, dtype=dtype)
    kernels.call(
        "losses_backward", spec, int(wide), host.c_int64(S), out["pair_grads"], torch.tensor(2, dtype=dtype), g, found
    )
    each = g.double().numpy() + 2 / n_pairs
    exact_grad = reference.preference_loss_grad(
        logps.numpy(), ref.numpy(), **options, reduction="none", grad_losses=each
    )
    np.testing.assert_allclose(found.numpy(), exact_grad, rtol=1e-5, atol=1e-7)


def test_pairs_and_offsets_outside_read_nothing(kernels):
    """Their values are not checked on the device: NaN, and no memory touched beyond the arrays."""
    x, targets = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    cu = torch.tensor([0, 2, 4_000_000])
    batch = host.Batch(kernels, x, targets, cu_seqlens=cu).forward()
    out = batch.losses(pairs=torch.tensor([[0, 2], [-5, 1], [0, 1], [-1, 1]]))
    assert out["losses"].isnan().tolist() == [True, True, False, True]
    assert torch.equal(batch.seq_logps[1], batch.logps[2:].double().sum().float())


def test_no_rows(kernels):
    for shape in ((0, 3, 5), (3, 0, 5)):
        batch = host.Batch(kernels, torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.int64)).forward()
        assert (batch.sequences() == 0).all()
        assert batch.backward(seq_logps=torch.ones(shape[0])).shape == shape


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

"""The plain-torch path of devices without a kernel, run on CPU tensors: against the kernels and the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, make_case, random_pairs, to_numpy
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_fast
from dpo_fast import reference
from dpo_fast._checks import LogitOptions
from dpo_fast._loss.options import PairNumbers, choose_loss
from dpo_fast._torch import plain, register
from dpo_fast._torch.operators import (
    DIRECT,
    DPO_FORWARD,
    PREFERENCE_FORWARD,
    DPOForward,
    Pairs,
    PreferenceForward,
    Rows,
    Sequences,
    flatten,
)

EVERY = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(plain, "CHUNK_LOGITS", 100)


@pytest.fixture
def on_plain(monkeypatch):
    """CPU tensors take the path of other devices; but for the loss of [S] numbers, which that path takes to the CPU."""
    functions = register.device_functions(plain)
    functions["preference_forward"] = DIRECT["cpu"]["preference_forward"]
    monkeypatch.setitem(DIRECT, "cpu", functions)


@pytest.mark.usefixtures("on_plain")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0}, {"valid_vocab": 30}], ids=str
)
@pytest.mark.parametrize("inplace", [False, True])
def test_against_reference(dtype, layout, options, inplace):
    case = make_case(layout, (4, 7, 33), dtype)
    if inplace and layout == "expanded":
        pytest.skip("refused before it gets here")
    targets, cu = case.targets, case.cu_seqlens
    targets[targets != -100] %= 30
    leaf = case.leaf.clone().requires_grad_()
    x = case.view(leaf) * 1 if inplace else case.view(leaf)
    arrays, rounding = to_numpy(x).copy(), torch.finfo(dtype).eps
    g = torch.linspace(-1, 1, targets.numel(), dtype=torch.float64).reshape(targets.shape)
    out = dpo_fast.token_logps(x, targets, outputs=EVERY, inplace_backward=inplace, **options)
    exact = reference.token_logps(arrays, targets.numpy(), **options)
    for name in EVERY:
        found, value = getattr(out, name), getattr(exact, name)
        np.testing.assert_allclose(found.detach().numpy(), value, atol=2e-5, rtol=1e-5, err_msg=name)
    [grad] = torch.autograd.grad([out.logps, out.entropy], x, [g.to(out.logps), 0.5 * g.to(out.logps)])
    exact_grad = reference.token_logps_grad(arrays, targets.numpy(), g.numpy(), 0.5 * g.numpy(), **options)
    np.testing.assert_allclose(to_numpy(grad), exact_grad, atol=2e-6 + 2 * rounding * np.abs(exact_grad).max())

    weights = torch.rand(targets.shape)
    weights[weights < 0.2] = 0
    pairs, ref = random_pairs(case.n_seqs), torch.randn(case.n_seqs)
    pair_weights = torch.rand(len(pairs))
    for average in (False, True):
        x = case.view(leaf) * 1 if inplace else case.view(leaf)
        shared = {
            "average": average, "label_smoothing": 0.2, "loss_type": ["sigmoid", "apo_down"], "wpo": True, **options,
        }  # fmt: skip
        given = {"pairs": pairs, "cu_seqlens": cu, "token_weights": weights, "pair_weights": pair_weights}
        out = dpo_fast.dpo_loss(x, targets, ref, inplace_backward=inplace, outputs=("entropy",), **given, **shared)
        in_numpy = {name: None if value is None else value.numpy() for name, value in given.items()}
        exact = reference.dpo_loss(arrays, targets.numpy(), ref.numpy(), **in_numpy, **shared)
        for found, value in zip(out[:5], exact[:5], strict=True):
            np.testing.assert_allclose(found.detach().numpy(), value, atol=1e-4, rtol=1e-5)
        tokens = reference.token_logps(arrays, targets.numpy(), token_weights=weights.numpy(), **options)
        np.testing.assert_allclose(out.tokens.entropy.numpy(), tokens.entropy, atol=2e-5)
        [grad] = torch.autograd.grad(out.loss, x)
        exact_grad = reference.dpo_loss_grad(arrays, targets.numpy(), ref.numpy(), **in_numpy, **shared)
        np.testing.assert_allclose(to_numpy(grad), exact_grad, atol=2e-6 + 2 * rounding * np.abs(exact_grad).max())


def both_ways(monkeypatch, function, leaf):
    """Results and gradients by the kernels and by plain torch."""
    found = []
    for functions in (DIRECT["cpu"], register.device_functions(plain)):
        functions = {**functions, "preference_forward": DIRECT["cpu"]["preference_forward"]}
        with monkeypatch.context() as patch:
            patch.setitem(DIRECT, "cpu", functions)
            out = function()
            found.append([*(t.detach() for t in out), *torch.autograd.grad([t.sum() for t in out], leaf)])
    return found


def test_same_as_the_kernels(monkeypatch):
    """Gradients at several levels at once, several indices per row, rows that have no gradient and hold NaN."""
    x = torch.randn(4, 5, 33, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[1] = float("nan")
    targets, index = torch.randint(0, 33, (4, 5)), torch.tensor([[[0, 5, 5]]]).expand(4, 5, 3)
    mask, weights = torch.rand(4, 5, 3) < 0.5, torch.tensor([1.0, 0.0])
    mask[1] = False

    def losses():
        out = dpo_fast.dpo_loss(x[[0, 1, 2, 3]], targets, pairs=torch.tensor([[0, 2], [1, 3]]), pair_weights=weights)
        return out.loss, out.losses, out.logps[[0, 2]]

    def statistics():
        out = dpo_fast.token_logps(x[[0, 2, 3]], targets[[0, 2, 3]], outputs=("lse", "entropy"))
        return out.lse, out.entropy, dpo_fast.selective_log_softmax(x, index, 0.7, mask)

    for function in (losses, statistics):
        kernels, other = both_ways(monkeypatch, function, x)
        for a, b in zip(kernels, other, strict=True):
            torch.testing.assert_close(a, b)
        assert (other[-1][1] == 0).all()


@pytest.mark.usefixtures("on_plain")
def test_bad_target_is_nan_for_its_token_and_sequence(monkeypatch):
    x, targets = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[0, 9, 1], [2, 3, 4]])
    seq = dpo_fast.sequence_logps(x, targets)
    assert seq.isnan().tolist() == [True, False]
    [grad] = torch.autograd.grad(seq.sum(), x)
    assert grad.isnan().any(-1).tolist() == [[False, True, False], [False, False, False]]
    assert dpo_fast.token_logps(x, targets).logps.isnan().tolist() == [[False, True, False], [False, False, False]]
    monkeypatch.setenv("DPO_FAST_CHECK", "1")
    with pytest.raises(IndexError, match=r"target 9 at position \[0, 1\] is outside \[0, 5\)"):
        dpo_fast.sequence_logps(x, targets)


@pytest.mark.usefixtures("on_plain")
def test_cu_seqlens_are_checked():
    x, targets = torch.randn(6, 5), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        dpo_fast.sequence_logps(x, targets, cu_seqlens=torch.tensor([0, 4, 2, 6]))


def test_pairs_are_checked():
    a = Pairs(torch.tensor([[0, -1]]), PairNumbers(), None, choose_loss().options, 0.0)
    with pytest.raises(IndexError, match=r"pairs\[0, 1\] = -1 is outside \[0, 4\)"):
        plain.preference_forward(torch.zeros(4), PreferenceForward(a, None, None, False, True))


class Float64Results(TorchDispatchMode):
    """Keeps the operations with results in float64; not on the host, where losses are computed."""

    def __init__(self):
        super().__init__()
        self.on_device, self.found = True, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor)]
        if self.on_device and any(t.dtype == torch.float64 for t in tensors):
            self.found.append(str(func))
        return out


def test_devices_without_float64(monkeypatch):
    """MPS has no float64: sums and derivatives are float32 there."""
    mode = Float64Results()

    def accurate_type(device):
        return torch.float32 if mode.on_device else torch.float64

    for module in ("plain", "shapes", "sequences"):
        monkeypatch.setattr(f"dpo_fast._torch.{module}.accurate_type", accurate_type)
    functions = register.device_functions(plain)
    kernels = DIRECT["cpu"]["preference_forward"]

    def on_the_host(logps, a):
        mode.on_device = False
        found = kernels(logps, a)
        mode.on_device = True
        return found._replace(pair_grads=found.pair_grads.float())

    functions["preference_forward"] = on_the_host
    rows = Rows(torch.randint(0, 33, (4, 5)), None, torch.rand(4, 5), LogitOptions())
    a = Pairs(torch.tensor([[0, 1], [2, 3]]), PairNumbers(), None, choose_loss().options, 0.0)
    with mode, monkeypatch.context() as patch:
        patch.setattr(plain, "call", lambda operator, tensor, record: functions[operator.name](tensor, record))
        record = DPOForward(rows, Sequences(None, True), a, torch.randn(4), True, 0, True)
        out = functions[DPO_FORWARD.name](torch.randn(4, 5, 33), record)
    assert mode.found == []
    assert out.losses.pair_grads.dtype == torch.float32
    assert all(torch.isfinite(t).all() for t in out.losses)
    assert PREFERENCE_FORWARD.name in functions


def test_other_devices_check_shapes_and_types():
    """The implementation registered for them checks first, as on the CPU: run here through the key that they take."""
    x, targets = torch.randn(4, 3, 5), torch.randint(0, 5, (4, 3))

    def dpo(x=x, targets=targets, ref=None, cu=None, weights=None, pairs=None):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
        rows = Rows(targets, None, weights, LogitOptions())
        loss = Pairs(pairs, PairNumbers(), None, choose_loss(label_smoothing=0.2).options, 0.0)
        record = DPOForward(rows, Sequences(cu, False), loss, ref, False, 0, True)
        return torch.ops.dpo_fast.dpo_forward.default.redispatch(keys, x, *flatten(record))

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
    ]
    for kind, function in bad:
        with pytest.raises(kind):
            function()

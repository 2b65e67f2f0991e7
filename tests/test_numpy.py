"""dpo_fast.numpy: the same numbers as the torch functions, bit for bit, and gradients on request."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import make_case, random_pairs, to_numpy

import dpo_fast
import dpo_fast.numpy as dn
from dpo_fast import reference

pytestmark = pytest.mark.cpu_only

TYPES = {
    "float32": (np.float32, torch.float32),
    "float64": (np.float64, torch.float64),
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
}
SHAPES = ((1, 1, 1), (3, 7, 33), (2, 2, 2049), (4, 1, 40000))


def as_array(x, dtype):
    """Tensor view -> array with the same strides."""
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(dtype)
    return x.numpy()


def same_bits(array, tensor):
    np.testing.assert_array_equal(np.asarray(array).astype(np.float64), to_numpy(tensor).astype(np.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "strided", "every_second", "transposed", "expanded"])
@pytest.mark.parametrize("name", TYPES)
def test_same_bits_as_torch(name, layout, shape, isa):
    dtype, torch_dtype = TYPES[name]
    case = make_case(layout, shape, torch_dtype)
    x, targets = case.logits(), case.targets
    # bfloat16 views go through int16, whose strides are the same
    array = as_array(case.view(case.leaf), dtype)
    outputs = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    g = torch.linspace(-1, 1, targets.numel()).reshape(targets.shape)

    out = dpo_fast.token_logps(x, targets, outputs=outputs, softcap=7.0)
    torch.autograd.backward([out.logps, out.entropy], [g.to(out.logps.dtype), 0.5 * g.to(out.logps.dtype)])
    found, grad = dn.token_logps(
        array, targets.numpy(), outputs=outputs, softcap=7.0, grad_logps=g.numpy(), grad_entropy=0.5 * g.numpy()
    )
    for key in outputs:
        same_bits(getattr(found, key), getattr(out, key))
    assert grad.dtype == dtype
    same_bits(grad, x.grad)

    x = case.logits()
    cu = None if case.cu_seqlens is None else case.cu_seqlens.numpy()
    pairs = random_pairs(case.n_seqs)
    ref = np.linspace(-3, 3, case.n_seqs)
    out = dpo_fast.dpo_loss(x, targets, torch.tensor(ref), pairs=pairs, cu_seqlens=case.cu_seqlens, label_smoothing=0.1)
    out.loss.backward()
    found, grad = dn.dpo_loss(
        array, targets.numpy(), ref, pairs=pairs.numpy(), cu_seqlens=cu, label_smoothing=0.1, with_grad=True
    )
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards", "logps"):
        same_bits(getattr(found, key), getattr(out, key))
    same_bits(grad, x.grad)
    assert found.metrics() == pytest.approx(out.metrics(), rel=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_inplace(name):
    dtype, torch_dtype = TYPES[name]
    case = make_case("strided", (4, 5, 507), torch_dtype)
    fresh = as_array(case.view(case.leaf.clone()), dtype)
    over = as_array(case.view(case.leaf.clone()), dtype)
    targets = case.targets.numpy()
    _, grad = dn.dpo_loss(fresh, targets, with_grad=True)
    _, inplace = dn.dpo_loss(over, targets, with_grad=True, inplace_backward=True)
    assert inplace is over
    np.testing.assert_array_equal(grad.astype(np.float32), over.astype(np.float32))
    g = np.ones(4)
    over = as_array(case.view(case.leaf.clone()), dtype)
    _, grad = dn.sequence_logps(fresh, targets, grad_logps=g)
    _, inplace = dn.sequence_logps(over, targets, grad_logps=g, inplace_backward=True)
    np.testing.assert_array_equal(grad.astype(np.float32), over.astype(np.float32))


def test_sequence_logps_gradient():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(3, 4, 33)), rng.integers(0, 33, (3, 4))
    weights, g = rng.random((3, 4)), rng.normal(size=3)
    out, grad = dn.sequence_logps(x, targets, token_weights=weights, average=True, grad_logps=g)
    options = {"token_weights": weights, "average": True}
    np.testing.assert_allclose(out, reference.sequence_logps(x, targets, **options), atol=1e-12)
    np.testing.assert_allclose(grad, reference.sequence_logps_grad(x, targets, g, **options), atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_preference_loss_gradient(reduction):
    rng = np.random.default_rng(0)
    logps, ref, pairs = rng.normal(size=5), rng.normal(size=5), rng.integers(0, 5, (7, 2))
    options = {"pairs": pairs, "beta": 0.4, "label_smoothing": 0.2, "reduction": reduction}
    out, grad = dn.preference_loss(logps, ref, with_grad=True, **options)
    exact = reference.preference_loss(logps, ref, **options)
    np.testing.assert_allclose(out.loss, exact.loss, atol=1e-12)
    np.testing.assert_allclose(grad, reference.preference_loss_grad(logps, ref, **options), atol=1e-12)
    assert dn.preference_loss(logps[:4].astype(np.float16)).loss.dtype == np.float32


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(shape, k, masked):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    index = rng.integers(0, 5, shape[:-1] if k is None else (*shape[:-1], k))
    mask = rng.random(index.shape) < 0.6 if masked else None
    g = rng.normal(size=index.shape)
    found, grad = dn.selective_log_softmax(x, index, 0.8, mask, grad_logps=g)
    np.testing.assert_allclose(found, reference.selective_log_softmax(x, index, 0.8, mask), atol=1e-12)
    t = torch.tensor(x, requires_grad=True)
    out = dpo_fast.selective_log_softmax(t, torch.tensor(index), 0.8, None if mask is None else torch.tensor(mask))
    out.backward(torch.tensor(g))
    same_bits(found, out)
    same_bits(grad, t.grad)


def test_lists_are_accepted_where_only_numbers_count():
    x = np.zeros((2, 2, 3), np.float32)
    out = dn.dpo_loss(x, [[0, 1], [2, -100]], [0.0, 0.0], pairs=[[0, 1]])
    assert out.logps.tolist() == pytest.approx([-2 * np.log(3), -np.log(3)])


def test_thread_count_changes_nothing():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(4, 9, 4099)).astype(np.float32), rng.integers(0, 4099, (4, 9))
    before = dn.get_num_threads()
    try:
        dn.set_num_threads(1)
        one = dn.dpo_loss(x, targets, with_grad=True)
        dn.set_num_threads(2)
        assert dn.get_num_threads() == dpo_fast.get_num_threads() == 2
        two = dn.dpo_loss(x, targets, with_grad=True)
    finally:
        dn.set_num_threads(before)
    np.testing.assert_array_equal(one[1], two[1])
    assert one[0].loss == two[0].loss

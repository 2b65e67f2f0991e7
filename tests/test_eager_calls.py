"""Calls in eager mode go straight to their functions: same bits without gradients, nothing kept from one to the next."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_calls import call

import dpo_fast
from dpo_fast._checks import LogitOptions
from dpo_fast._torch.operators import TOKEN_FORWARD, Rows, TokenForward

S, T, V = 4, 5, 37


def tensors(t=T, dtype=torch.float32):
    x = torch.randn(S, t, V, dtype=torch.float64).mul(3).to(dtype)
    targets = torch.randint(0, V, (S, t))
    targets[1, : t // 2] = -100
    return x, targets, torch.randn(S)


FUNCTIONS = {
    "token": lambda x, y, ref: dpo_fast.token_logps(x, y, outputs=("logps", "entropy")),
    "sequence": lambda x, y, ref: (dpo_fast.sequence_logps(x, y, average=True),),
    "dpo": lambda x, y, ref: dpo_fast.dpo_loss(x, y, ref, loss_type=["sigmoid", "sft"]),
    "dpo with statistics": lambda x, y, ref: dpo_fast.dpo_loss(x, y, ref, outputs=["logps", "is_top1"], wpo=True),
    "ref_logits": lambda x, y, ref: dpo_fast.dpo_loss(x, y, ref_logits=x.detach().flip(-1)),
    "preference": lambda x, y, ref: dpo_fast.preference_loss(x.sum((1, 2)), ref),
}


def flat(out):
    for item in out:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from flat(item)
        elif isinstance(item, dict):
            yield from flat(item.values())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_gradients_the_same_bits(name, dtype):
    x, targets, ref = tensors(dtype=dtype)
    with_grad = list(flat(FUNCTIONS[name](x.clone().requires_grad_(), targets, ref)))
    assert any(t.requires_grad for t in with_grad)
    plain = list(flat(FUNCTIONS[name](x, targets, ref)))
    with torch.no_grad():
        without = list(flat(FUNCTIONS[name](x.clone().requires_grad_(), targets, ref)))
    assert len(with_grad) == len(plain) == len(without) > 0
    for a, b, c in zip(with_grad, plain, without, strict=True):
        assert not b.requires_grad
        assert not c.requires_grad
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inference_mode_first(name):
    """What inference mode leaves behind must not stop a later backward: autograd cannot save its tensors."""
    x, targets, ref = tensors(t=11 + list(FUNCTIONS).index(name))  # shapes that no other test remembers
    with torch.inference_mode():
        first = FUNCTIONS[name](x, targets, ref)[0]
    leaf = x.clone().requires_grad_()
    out = FUNCTIONS[name](leaf, targets, ref)[0]
    assert torch.equal(out, first)
    assert not out.is_inference()
    out.sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_every_call_is_checked():
    x, targets, ref = tensors()
    for _ in range(2):
        dpo_fast.dpo_loss(x, targets, ref)
    wrong = targets.clone()
    wrong[2, 3] = V
    with pytest.raises(IndexError, match="target 37 at position"):
        dpo_fast.dpo_loss(x, wrong, ref)
    with pytest.raises(ValueError, match="targets must have shape"):
        dpo_fast.dpo_loss(x, targets[:, 1:], ref)
    with pytest.raises(ValueError, match="ref_logps must have shape"):
        dpo_fast.dpo_loss(x, targets, ref[1:])
    with pytest.raises(TypeError, match="targets must be integers"):
        dpo_fast.dpo_loss(x, targets.double(), ref)
    expanded = torch.zeros(1, T, V).expand(S, T, V)
    for _ in range(2):  # an error is not remembered as a success
        with pytest.raises(ValueError, match="do not share memory"):
            dpo_fast.dpo_loss(expanded.requires_grad_(), targets, ref, inplace_backward=True).loss.backward()


def test_results_of_two_calls_are_apart():
    x, targets, ref = tensors()
    first, second = (dpo_fast.dpo_loss(x, targets, ref, outputs=["logps", "entropy"]) for _ in range(2))
    pointers = [t.data_ptr() for out in (first, second) for t in flat(out) if t.numel()]
    assert len(set(pointers)) == len(pointers)
    kept = second.losses.clone()
    first.losses.zero_()
    assert torch.equal(second.losses, kept)


def live_tensors():
    gc.collect()
    return [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", [*FUNCTIONS, "linear"])
def test_no_tensor_outlives_a_step(name):
    """A tensor kept for the next call would be in a CUDA graph's private pool where the first call was captured."""
    x, targets, ref = tensors(t=23 + len(name))
    weight = torch.randn(V, V, requires_grad=True)

    def step():
        leaf = x.clone().requires_grad_()
        if name == "linear":
            loss = dpo_fast.linear_dpo_loss(leaf, weight, targets, ref).loss
        else:
            loss = FUNCTIONS[name](leaf, targets, ref)[0].sum()
        torch.autograd.grad(loss, leaf)

    for _ in range(2):  # a shape's second use leaves a pattern of one number, on the CPU only
        step()
    before = {id(t) for t in live_tensors()}
    step()
    assert not [t.shape for t in live_tensors() if id(t) not in before]


def test_many_threads_with_many_shapes():
    cases = [tensors(t=1 + n % 40) for n in range(200)]

    def loss(case):
        x, targets, ref = case
        leaf = x.clone().requires_grad_()
        out = dpo_fast.dpo_loss(leaf, targets, ref)
        out.loss.backward()
        return out.losses.detach(), leaf.grad

    expected = [loss(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(loss, cases), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("transform", ["grad", "jvp", "functionalize", "vmap"])
def test_a_transform_leaves_nothing_behind(transform):
    """torch.func is not supported, and what is made inside it must not be remembered."""
    t = 41 + ["grad", "jvp", "functionalize", "vmap"].index(transform)  # shapes that no other test remembers
    x, targets, ref = tensors(t=t)
    w = torch.ones(S)

    def both(w):
        losses = dpo_fast.dpo_loss(x, targets, ref).losses
        return (w * dpo_fast.sequence_logps(x, targets)).sum() + losses.sum()

    transforms = {
        "grad": lambda: torch.func.grad(both)(w),
        "jvp": lambda: torch.func.jvp(both, (w,), (w,)),
        "functionalize": lambda: torch.func.functionalize(both)(w),
        "vmap": lambda: torch.func.vmap(both)(torch.ones(2, S)),
    }
    try:
        transforms[transform]()
    except Exception as error:
        print(f"refused: {error}")
    expected = torch.log_softmax(x, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = expected.masked_fill(targets == -100, 0).sum(-1)
    torch.testing.assert_close(dpo_fast.sequence_logps(x, targets), expected)
    torch.testing.assert_close(dpo_fast.dpo_loss(x, targets, ref).logps, expected)
    leaf = x.clone().requires_grad_()
    dpo_fast.dpo_loss(leaf, targets, ref).loss.backward()
    assert leaf.grad.abs().sum() > 0


def test_results_without_elements_are_apart_too():
    x, targets = torch.zeros(0, 3, 7, requires_grad=True), torch.zeros(0, 3, dtype=torch.long)
    first = dpo_fast.sequence_logps(x, targets)
    assert first.requires_grad
    with torch.no_grad():
        assert not dpo_fast.sequence_logps(x, targets).requires_grad
    dpo_fast.sequence_logps(torch.zeros(0, 3, 7, requires_grad=True), targets)
    [grad] = torch.autograd.grad(first.sum(), x)
    assert grad.shape == (0, 3, 7)
    cu = torch.zeros(1, dtype=torch.long)
    for _ in range(2):
        out = dpo_fast.sequence_logps(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), cu_seqlens=cu)
        assert not out.requires_grad
        out.requires_grad_()
        out = dpo_fast.token_logps(torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.long)).logps
        assert not out.requires_grad
        out.requires_grad_()


def test_operators_called_by_name_share_nothing():
    """There autograd marks results of operators that it does not know how to differentiate."""
    x, targets = torch.randn(2, 3, 9, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
    a = TokenForward(Rows(targets, None, None, LogitOptions()), 0, False)
    marked = call(TOKEN_FORWARD, x, a)
    with torch.no_grad():
        plain = call(TOKEN_FORWARD, x, a)
    assert not any(a is b for a in marked[:2] for b in plain[:2])
    assert not any(t.requires_grad for t in plain[:2])


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (4, 1), (6, 2)])
def test_strides_are_those_of_new_tensors(shape):
    x, targets = torch.randn(*shape, 7), torch.zeros(shape, dtype=torch.long)
    for grad in (False, True):
        leaf = x.clone().requires_grad_(grad)
        out = [
            *flat(dpo_fast.dpo_loss(leaf, targets, outputs=["logps", "entropy", "is_top1"])),
            *flat(dpo_fast.token_logps(leaf, targets, outputs=["logps", "entropy", "mean_logits"])),
            dpo_fast.sequence_logps(leaf[:1, :1], targets[:1, :1]),
        ]
        assert [t.stride() for t in out] == [torch.empty(t.shape).stride() for t in out]


def test_negative_bit():
    """Torch may keep a sign apart from the numbers."""
    z, targets = torch.randn(2, 3, 7, dtype=torch.complex64), torch.zeros(2, 3, dtype=torch.long)
    x, ref = z.conj().imag, torch._neg_view(torch.randn(2))
    assert x.is_neg()
    assert ref.is_neg()
    lazy, plain = (dpo_fast.dpo_loss(a, targets, r) for a, r in ((x, ref), (x.clone(), ref.clone())))
    for a, b in zip(flat(lazy), flat(plain), strict=True):
        assert torch.equal(a, b)


def test_a_trace_calls_the_operators():
    x, targets, _ = tensors()
    traced = torch.jit.trace(lambda x: dpo_fast.sequence_logps(x, targets), (x,))
    assert "dpo_fast::sequence_forward" in str(traced.graph)
    other = torch.randn_like(x)
    assert torch.equal(traced(other), dpo_fast.sequence_logps(other, targets))


def test_equal_options_of_another_type_are_still_checked():
    x, targets, _ = tensors()
    for average in (0, False, 0):
        with pytest.raises(ValueError, match="average must be True"):
            dpo_fast.dpo_loss(x, targets, loss_type="simpo", average=average)

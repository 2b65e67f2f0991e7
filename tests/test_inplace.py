"""inplace_backward: the same gradient, in the logits' memory, and no way to use the overwritten logits unnoticed."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import DTYPES, LAYOUTS, make_case, peak_growth, random_pairs

import dpo_fast

pytestmark = pytest.mark.cpu_only

LEVELS = {
    "token_logps": lambda x, c, **kw: dpo_fast.token_logps(x, c.targets, outputs=("logps", "entropy"), **kw),
    "sequence_logps": lambda x, c, **kw: dpo_fast.sequence_logps(x, c.targets, cu_seqlens=c.cu_seqlens, **kw),
    "dpo_loss": lambda x, c, **kw: dpo_fast.dpo_loss(
        x, c.targets, pairs=random_pairs(c.n_seqs), cu_seqlens=c.cu_seqlens, **kw
    ),
}


def scalar(out):
    if isinstance(out, torch.Tensor):
        return (out * torch.arange(1.0, len(out) + 1)).sum()
    return out.loss if hasattr(out, "loss") else out.logps.sum() + 0.3 * out.entropy.sum()


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_same_gradient(level, dtype, layout, isa):
    for shape in ((3, 7, 33), (2, 2, 2049), (2, 1, 40000)):
        for options in ({}, {"temperature": 0.5}, {"softcap": 4.0}):
            case = make_case(layout, shape, dtype)
            x, y = case.logits(), case.logits()
            scalar(LEVELS[level](x, case, **options)).backward()
            scalar(LEVELS[level](y, case, inplace_backward=True, **options)).backward()
            assert torch.equal(x.grad, y.grad)
            if not y.is_leaf:
                assert torch.equal(y, y.grad)  # the logits now hold their gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_ignored_in_logits_past_the_caches(dtype):
    """Their zeros are streamed: rows of an odd length start at any address, and their neighbours stay as they are."""
    rows, vocab = 530, 32003
    memory = torch.randn(rows * (vocab + 1) + 1).to(dtype)
    before = memory.clone()
    x = memory[1 : 1 + rows * (vocab + 1)].view(2, rows // 2, vocab + 1)[..., :vocab]  # one logit of padding a row
    assert x.numel() * x.element_size() > 32 << 20
    targets = torch.randint(0, vocab, (2, rows // 2))
    targets[:, ::3] = -100
    expected = x.detach().clone().requires_grad_()
    dpo_fast.dpo_loss(expected, targets).loss.backward()
    x.requires_grad_()
    dpo_fast.dpo_loss(x, targets, inplace_backward=True).loss.backward()
    assert torch.equal(x, expected.grad)
    assert not x[:, ::3].any()
    after, padded = memory[1:].view(rows, vocab + 1), before[1:].view(rows, vocab + 1)
    assert torch.equal(after[:, vocab], padded[:, vocab])
    assert memory[0] == before[0]


def test_gradient_is_the_logits_memory():
    x = torch.randn(2, 3, 5, requires_grad=True)
    dpo_fast.dpo_loss(x, torch.zeros(2, 3, dtype=torch.int64), inplace_backward=True).loss.backward()
    assert x.grad.data_ptr() == x.data_ptr()


def test_later_use_by_autograd_raises():
    x = torch.randn(2, 3, 5, requires_grad=True)
    logits = x * 2
    targets = torch.zeros(2, 3, dtype=torch.int64)
    other = (logits * logits).sum()  # saves the logits for its own backward
    dpo_fast.dpo_loss(logits, targets, inplace_backward=True).loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_second_backward_raises():
    logits = torch.randn(2, 3, 5, requires_grad=True) * 1
    out = dpo_fast.sequence_logps(logits, torch.zeros(2, 3, dtype=torch.int64), inplace_backward=True)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_expanded_logits_are_refused():
    logits = torch.randn(1, 3, 5, requires_grad=True).expand(2, 3, 5)
    out = dpo_fast.dpo_loss(logits, torch.zeros(2, 3, dtype=torch.int64), inplace_backward=True)
    with pytest.raises(ValueError, match="share memory"):
        out.loss.backward()


def loss_growth(inplace: bool, dtype: str) -> int:
    """Growth of the peak resident memory over a loss and its backward, in bytes, in a fresh process."""
    return peak_growth(f"""
    def step(n, V):
        x = torch.randn(2, n // 2, V).to(torch.{dtype}).requires_grad_()
        targets = torch.randint(0, V, (2, n // 2))
        return peak_growth(lambda: dpo_fast.dpo_loss(x, targets, inplace_backward={inplace}).loss.backward())
    step(64, 1000)
    print(step(1024, 49152))
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident memory as Linux reports it")
def test_peak_memory():
    logits = 1024 * 49152 * 4
    assert loss_growth(True, "float32") <= 0.01 * logits
    assert 0.95 * logits <= loss_growth(False, "float32") <= 1.02 * logits

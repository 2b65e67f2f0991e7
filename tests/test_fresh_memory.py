"""Gradients in fresh memory: rows without a gradient are zeros, whether the pages were touched before or not."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

import dpo_fast

V, T = 40009, 120  # 2 x 120 x 40009 float32: 38 MB, above the size that comes fresh from the system
pytestmark = pytest.mark.cpu_only


def empty(like, **_):
    return torch.empty(like.shape, dtype=like.dtype)


def all_touched(like, **_):
    return torch.full(like.shape, float("nan"), dtype=like.dtype)


def one_touched(like, **_):
    fresh = torch.empty(like.shape, dtype=like.dtype)
    fresh.view(-1)[fresh.numel() // 2] = float("nan")
    return fresh


def shifted(like, **_):
    """Not on a page's bound, as fresh memory never is."""
    return torch.full((like.numel() + 1,), float("nan"), dtype=like.dtype)[1:].view(like.shape)


@pytest.fixture(scope="module")
def problem():
    logits = torch.randn(2, T, V)
    targets = torch.randint(0, V, (2, T))
    targets[:, : T // 2] = -100
    targets[1, -5] = -100
    return logits, targets


def gradient(logits, targets, **options):
    leaf = logits.detach().requires_grad_()
    dpo_fast.dpo_loss(leaf, targets, **options).loss.backward()
    return leaf.grad


@pytest.mark.parametrize("memory", [empty, all_touched, one_touched, shifted])
@pytest.mark.parametrize("valid_vocab", [None, V - 1001])
def test_zeros(memory, valid_vocab, problem, monkeypatch):
    logits, targets = problem
    targets = targets.clamp(max=(valid_vocab or V) - 1)
    expected = gradient(logits.clone(), targets, valid_vocab=valid_vocab, inplace_backward=True)
    monkeypatch.setattr(torch, "empty_like", memory)
    found = gradient(logits, targets, valid_vocab=valid_vocab)
    assert torch.equal(found, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are there")
def test_ignored_rows_take_no_memory(problem):
    """Half of the rows, in one piece for each sequence: their pages are not touched."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    logits, targets = problem
    gradient(logits, targets)
    before = resident()
    grad = gradient(logits, targets)
    assert resident() - before < 0.8 * grad.nbytes
    assert (grad[:, : T // 2] == 0).all()

"""A bad target is reported where the caller has it: [s, t], or [n] packed, whatever is dropped before the products."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dpo_fast
import dpo_fast.numpy

S, T, V, H = 4, 20, 11, 5
N = S * T
CU_SEQLENS = torch.tensor([0, 7, 33, 34, N])

G = torch.Generator().manual_seed(0)
LOGITS = torch.randn(S, T, V, generator=G)
HIDDEN = torch.randn(S, T, H, generator=G)
WEIGHT = torch.randn(V, H, generator=G)

WAYS = {"compact": {}, "tiles": {"memory_budget": 1}, "whole": {"compact": False}}
PLACES = [(0, 0), (1, 5), (2, 19), (3, 19)]


def targets_with(place: tuple[int, int], value: int, ignored: str) -> torch.Tensor:
    """One bad target; before and around it none, many or all others are ignored."""
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(0, V, (S, T), generator=g)
    if ignored == "many":
        targets[torch.rand(S, T, generator=g) < 0.6] = -100
        targets[0, 1] = 3  # somebody is left
    elif ignored == "all others":
        targets[:] = -100
    targets[place] = value
    return targets


def shaped(layout: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if layout == "padded" else tensor.flatten(0, 1).contiguous()


def position(layout: str, place: tuple[int, int]) -> str:
    s, t = place
    return f"[{s}, {t}]" if layout == "padded" else f"[{s * T + t}]"


def packed(layout: str) -> dict[str, Any]:
    return {} if layout == "padded" else {"cu_seqlens": CU_SEQLENS}


def from_logits(function: str) -> Callable[[str, torch.Tensor], Any]:
    def call(layout: str, targets: torch.Tensor, **options: Any) -> Any:
        x = shaped(layout, LOGITS).clone().requires_grad_()
        more = packed(layout) if function != "token_logps" else {}
        return getattr(dpo_fast, function)(x, shaped(layout, targets), **more, **options)

    return call


def from_hidden(function: str, way: str) -> Callable[[str, torch.Tensor], Any]:
    def call(layout: str, targets: torch.Tensor, **options: Any) -> Any:
        hidden = shaped(layout, HIDDEN).clone().requires_grad_()
        more = packed(layout) if function != "linear_token_logps" else {}
        return getattr(dpo_fast, function)(hidden, WEIGHT, shaped(layout, targets), **more, **WAYS[way], **options)

    return call


CALLS = {name: from_logits(name) for name in ("token_logps", "sequence_logps", "dpo_loss")} | {
    f"{name}-{way}": from_hidden(name, way)
    for name in ("linear_token_logps", "linear_sequence_logps", "linear_dpo_loss")
    for way in WAYS
}


def refused(value: int, layout: str, place: tuple[int, int], call: Callable[[], Any]) -> None:
    with pytest.raises(IndexError, match=re.escape(f"target {value} at position {position(layout, place)}")) as caught:
        call()
    assert f"[0, {V})" in str(caught.value)


@pytest.mark.parametrize("ignored", ["none", "many", "all others"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", CALLS)
def test_position(place, name, layout, ignored):
    for where in PLACES:
        for value in (V, -1, 2**40):
            targets = targets_with(where, value, ignored)
            refused(value, layout, where, lambda targets=targets: CALLS[name](layout, targets))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", CALLS)
def test_the_first_of_several(place, name, layout):
    """In the order of memory, also where the kept rows are worked on in another."""
    targets = targets_with((3, 1), V, "many")
    targets[1, 7] = V + 1
    targets[0, :2] = -100
    refused(V + 1, layout, (1, 7), lambda: CALLS[name](layout, targets))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", [name for name in CALLS if "token" not in name])
def test_rows_of_weight_0_are_passed_over(place, name, layout):
    """They are not read, so their targets may be anything, and they do not shift the position of others."""
    targets = targets_with((1, 5), V, "none")
    targets[0, 3] = 99
    weights = torch.ones(S, T)
    weights[0] = 0
    weights = shaped(layout, weights)
    refused(V, layout, (1, 5), lambda: CALLS[name](layout, targets, token_weights=weights))
    targets[1, 5] = 0
    CALLS[name](layout, targets, token_weights=weights)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", [name for name in CALLS if "dpo" in name])
def test_with_pairs_in_another_order(place, name, layout):
    """The linear loss works on groups of whole pairs; also with reference logits or hidden states, looked at first."""
    pairs = torch.tensor([[3, 0], [2, 1]])
    targets = targets_with((2, 4), V, "none") if layout == "padded" else targets_with((1, 13), V, "none")
    where = (2, 4) if layout == "padded" else (1, 13)  # the second is row 33, a sequence of its own
    refused(V, layout, where, lambda: CALLS[name](layout, targets, pairs=pairs))
    ref = {"ref_hidden": shaped(layout, HIDDEN)} if "linear" in name else {"ref_logits": shaped(layout, LOGITS)}
    refused(V, layout, where, lambda: CALLS[name](layout, targets, pairs=pairs, **ref))


@pytest.mark.parametrize("name", [name for name in CALLS if "token" not in name])
def test_one_row_of_batch(place, name):
    """Packed as varlen attention has it, [1, N]: the position is that of the targets given."""
    targets = targets_with((1, 5), V, "many").view(1, N)
    if "linear" in name:
        way = WAYS[name.split("-")[1]]
        function, tensors = getattr(dpo_fast, name.split("-")[0]), (HIDDEN.view(1, N, H), WEIGHT)
    else:
        way, function, tensors = {}, getattr(dpo_fast, name), (LOGITS.view(1, N, V),)
    with pytest.raises(IndexError, match=re.escape(f"target {V} at position [0, {T + 5}]")):
        function(*tensors, targets, cu_seqlens=CU_SEQLENS, **way)


def test_valid_vocab_is_the_bound(place):
    """A target among the columns that are padding is outside."""
    targets = targets_with((1, 5), V - 1, "all others")
    for name in CALLS:
        with pytest.raises(IndexError, match=re.escape(f"target {V - 1} at position [1, 5] is outside [0, {V - 1})")):
            CALLS[name]("padded", targets, valid_vocab=V - 1)


@pytest.mark.parametrize("shape", [(S, T), (2, 2, T), (S, T, 1)])
def test_selective_log_softmax(place, shape):
    """Any number of dimensions; the position is one in the index."""
    index = torch.zeros(shape, dtype=torch.int64)
    where = (1,) * (len(shape) - 1) + (shape[-1] - 1,)
    index[where] = V
    x = LOGITS.view(*(shape[:-1] if shape[-1] == 1 else shape), V)
    with pytest.raises(IndexError, match=re.escape(f"at position {list(where)}")):
        dpo_fast.selective_log_softmax(x, index)


@pytest.mark.parametrize("ignored", ["none", "many", "all others"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("function", ["token_logps", "sequence_logps", "dpo_loss"])
def test_numpy(function, layout, ignored):
    more = {} if layout == "padded" or function == "token_logps" else {"cu_seqlens": np.asarray(CU_SEQLENS)}
    for where in PLACES:
        targets = shaped(layout, targets_with(where, V, ignored)).numpy()
        x = shaped(layout, LOGITS).numpy()
        refused(V, layout, where, lambda x=x, y=targets: getattr(dpo_fast.numpy, function)(x, y, **more))

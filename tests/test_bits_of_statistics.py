"""A log-prob's bits do not depend on the statistics asked for beside it, so equal models give rewards of exactly 0."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import DTYPES

import dpo_fast
import dpo_fast.numpy

VOCABULARIES = (
    2,
    33,  # between the vector lengths
    1000,  # where differences were found
    2049,  # one logit more than a block
    32769,  # one logit more than a piece of a row
)

STATISTICS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse")
ASKED = [*((name,) for name in STATISTICS), ("entropy", "log_sum_sq_probs"), STATISTICS]
TRANSFORMS = [{}, {"temperature": 0.7, "logit_scale": 0.25}, {"softcap": 10.0}]
S = 4


def rows_of(V: int) -> int:
    return 64 if V < 2000 else 24 if V < 10000 else 6


def problem(V: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, T, V]: some rows of a usual spread, some confident ones, some far from 0."""
    g = torch.Generator().manual_seed(seed)
    T = rows_of(V) // S + 1
    x = 3 * torch.randn(S, T, V, generator=g)
    x[0] *= 4
    x[1] += 30
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[2, 0] = -100
    return x.to(dtype), targets


def ids(options: dict) -> str:
    return "-".join(options) or "plain"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_tokens(isa, V, dtype):
    x, targets = problem(V, dtype)
    for options in TRANSFORMS:
        alone = dpo_fast.token_logps(x, targets, **options).logps
        for asked in ASKED:
            beside = dpo_fast.token_logps(x, targets, outputs=("logps", *asked), **options).logps
            assert torch.equal(alone, beside), (asked, ids(options))
        wants_gradient = dpo_fast.token_logps(x.clone().requires_grad_(), targets, **options).logps
        assert torch.equal(alone, wants_gradient.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_a_statistics_bits_depend_on_no_other(isa, V, dtype):
    x, targets = problem(V, dtype)
    every = dpo_fast.token_logps(x, targets, outputs=STATISTICS)
    for name in STATISTICS:
        assert torch.equal(getattr(dpo_fast.token_logps(x, targets, outputs=(name,)), name), getattr(every, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_gradients_do_not_depend_on_statistics(isa, V, dtype):
    x, targets = problem(V, dtype)
    found = []
    for asked in ((), STATISTICS):
        leaf = x.clone().requires_grad_()
        dpo_fast.token_logps(leaf, targets, outputs=("logps", *asked)).logps.sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


OF_A_LOSS = (("entropy",), ("logps", "entropy", "mean_logits", "is_top1"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_sequences_and_losses(isa, V, dtype):
    """Log-probs of sequences, alone and out of a loss, with statistics, packed, with WPO's own statistic."""
    x, targets = problem(V, dtype)
    cu_seqlens = torch.arange(0, targets.numel() + 1, targets.shape[1])
    alone = dpo_fast.sequence_logps(x, targets)
    for options in ({}, *({"outputs": asked} for asked in OF_A_LOSS), {"wpo": True}, {"outputs": ("lse",)}):
        assert torch.equal(dpo_fast.dpo_loss(x, targets, **options).logps, alone), options
    packed = dpo_fast.dpo_loss(
        x.flatten(0, 1), targets.flatten(), cu_seqlens=cu_seqlens, outputs=("entropy", "mean_logits")
    )
    assert torch.equal(packed.logps, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_equal_models_give_rewards_of_0(isa, V, dtype):
    x, targets = problem(V, dtype)
    for asked, average in itertools.product(((), *OF_A_LOSS), (False, True)):
        out = dpo_fast.dpo_loss(x, targets, ref_logits=x, outputs=asked, average=average)
        assert (out.chosen_rewards == 0).all(), (asked, average)
        assert (out.rejected_rewards == 0).all(), (asked, average)
        assert out.metrics()["rewards/accuracies"] == 0
        given = dpo_fast.sequence_logps(x, targets, average=average)  # computed before
        out = dpo_fast.dpo_loss(x, targets, given, outputs=asked, average=average)
        assert (out.chosen_rewards == 0).all(), (asked, average)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [33, 1000, 32769])
def test_equal_heads_give_rewards_of_0(isa, V, dtype):
    """From hidden states: in one tile and in several, with ignored rows dropped and not."""
    g = torch.Generator().manual_seed(0)
    T, H = 20, 16
    hidden = torch.randn(S, T, H, generator=g).to(dtype)
    weight = torch.randn(V, H, generator=g).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[:, :3] = -100
    # other tiles, whose products torch's CPU libraries round alike here; a GPU's need not
    tiles = [] if isa == "cuda" else [{"memory_budget": 1}]
    for way in ({}, *tiles, {"compact": False}):
        for asked in (("entropy",), ("logps", "entropy", "mean_logits", "is_top1")):
            out = dpo_fast.linear_dpo_loss(
                hidden, weight, targets, bias=bias, ref_hidden=hidden, ref_bias=bias, outputs=asked, **way
            )
            assert (out.chosen_rewards == 0).all(), (way, asked)
            assert (out.rejected_rewards == 0).all(), (way, asked)
        alone = dpo_fast.linear_token_logps(hidden, weight, targets, bias, **way).logps
        beside = dpo_fast.linear_token_logps(hidden, weight, targets, bias, outputs=("logps", *STATISTICS), **way).logps
        assert torch.equal(alone, beside), way
        ref = dpo_fast.linear_sequence_logps(hidden, weight, targets, bias, **way)
        out = dpo_fast.linear_dpo_loss(hidden, weight, targets, ref, bias=bias, outputs=("entropy",), **way)
        assert (out.chosen_rewards == 0).all(), way


def to_array(x: torch.Tensor) -> np.ndarray:
    if x.dtype is not torch.bfloat16:
        return x.numpy()
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_numpy(isa, V, dtype):
    x, targets = problem(V, dtype)
    array, ids_ = to_array(x), targets.numpy()
    alone = dpo_fast.numpy.token_logps(array, ids_).logps
    np.testing.assert_array_equal(alone, dpo_fast.token_logps(x, targets).logps.numpy())
    for asked in ASKED:
        beside = dpo_fast.numpy.token_logps(array, ids_, outputs=("logps", *asked)).logps
        np.testing.assert_array_equal(alone, beside)
    seqs = dpo_fast.numpy.sequence_logps(array, ids_)
    for options in ({}, {"wpo": True}):
        out = dpo_fast.numpy.dpo_loss(array, ids_, ref_logits=array, **options)
        np.testing.assert_array_equal(out.logps, seqs)
        assert (out.chosen_rewards == 0).all()
        assert (out.rejected_rewards == 0).all()

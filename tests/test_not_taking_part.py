"""Sequences in no pair, and pairs of weight 0: whatever their numbers are, the loss is that of the others.

NaN, inf and -inf in their logits, hidden states and references reach nothing but their own log-probs. "Clean" is the
same call with ordinary numbers in these places.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import dpo_fast
import dpo_fast.numpy

S, T, V, H = 6, 5, 37, 8
PAIRS = torch.tensor([[0, 1], [2, 3], [4, 1], [0, 3]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0])
OUT = [4, 5]  # in a pair of weight 0 alone, and in none
IN = [0, 1, 2, 3]
BAD = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}


def own_function(chosen, rejected, ref_chosen, ref_rejected):
    """A loss function of a user's, in torch."""
    return -torch.nn.functional.logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)))


# Every loss with what it needs. "alone": its completions stand alone, with a weight for each. "whole": no weights.
FREE, ALONE, WHOLE = {"ref": False}, {"alone": True, "baseline": 0.25}, {"whole": True}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sigmoid_norm": {},
    "sft": FREE,
    "simpo": FREE,
    "orpo": FREE,
    "cpo": FREE,
    "kto": ALONE,
    "bco": ALONE,
    "aot": WHOLE,
    "aot_unpaired": WHOLE,
}
MIXED = {
    "several": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "wpo": {"loss_type": "sigmoid", "wpo": True},
}


def loss_types() -> list[str]:
    """All there are, from the message that lists them."""
    with pytest.raises(ValueError, match="must be one of") as caught:
        dpo_fast.preference_loss(torch.zeros(2), loss_type="?")
    return re.findall(r"'(\w+)'", str(caught.value))


TYPES = [*loss_types(), *MIXED, "own function"]
FROM_LOG_PROBS = [name for name in TYPES if name != "wpo"]


def test_every_loss_is_in_the_table():
    assert set(loss_types()) == set(LOSSES)


def options_of(name: str) -> tuple[dict[str, Any], bool]:
    """Keywords of the loss with who takes part, and whether it has a reference."""
    if name == "own function":
        return {"loss_type": own_function, "pairs": PAIRS, "pair_weights": WEIGHTS}, True
    if name in MIXED:
        return {"pairs": PAIRS, "pair_weights": WEIGHTS, **MIXED[name]}, True
    options = dict(LOSSES[name], loss_type=name)
    with_ref = options.pop("ref", True)
    if options.pop("alone", False):
        options["desirable"] = torch.tensor([True, False, True, False, True, False])
        options["pair_weights"] = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 0.0])
    elif options.pop("whole", False):
        options["pairs"] = PAIRS[[0, 1]]
    else:
        options |= {"pairs": PAIRS, "pair_weights": WEIGHTS}
    return options, with_ref


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and reference."""
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(S, T, V, generator=g)
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[:, 0] = -100
    return x, targets, -15 + torch.randn(S, generator=g)


def poisoned(values: torch.Tensor, bad: float) -> torch.Tensor:
    """Sequence 4 has it in some places, sequence 5 everywhere."""
    values = values.clone()
    if values.dim() == 1:
        values[OUT] = bad
    else:
        values[4, ::2, ::3] = bad
        values[5] = bad
    return values


def flat(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(0, 1)


CU_SEQLENS = torch.arange(0, S * T + 1, T)


def logits_loss(layout: str, x: torch.Tensor, targets: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
    """dpo_loss in a layout, and the logits [S, T, V] whose gradient it gives."""
    leaf = x.clone().requires_grad_()
    if layout == "packed":
        return dpo_fast.dpo_loss(flat(leaf), flat(targets), cu_seqlens=CU_SEQLENS, **options), leaf
    if layout == "in place":
        view = leaf * 1
        view.retain_grad()
        return dpo_fast.dpo_loss(view, targets, inplace_backward=True, **options), view
    return dpo_fast.dpo_loss(leaf, targets, **options), leaf


def same_metrics(found: Any, clean: Any) -> None:
    found, clean = found.metrics(), clean.metrics()
    assert found.keys() == clean.keys()
    assert all(map(math.isfinite, found.values())), found
    assert found == clean


def check(out: Any, clean: Any, grad: torch.Tensor, clean_grad: torch.Tensor) -> None:
    """Bit by bit: the loss, and the gradient of those who take part; exactly 0 for the others."""
    assert torch.isfinite(out.loss)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(out.logps[IN], clean.logps[IN])
    assert torch.equal(grad[IN], clean_grad[IN])
    assert clean_grad[IN].abs().max() > 0
    assert (grad[OUT] == 0).all()
    assert (clean_grad[OUT] == 0).all()
    for found, expected in zip(out[1:4], clean[1:4], strict=True):  # losses and rewards
        assert torch.equal(found.nan_to_num(nan=-99), expected.nan_to_num(nan=-99))
    same_metrics(out, clean)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", ["padded", "packed", "in place"])
@pytest.mark.parametrize("name", TYPES)
def test_from_logits(place, name, layout, bad):
    x, targets, ref = problem()
    options, with_ref = options_of(name)
    found = []
    for logits, reference in ((poisoned(x, BAD[bad]), poisoned(ref, BAD[bad])), (x, ref)):
        out, leaf = logits_loss(layout, logits, targets, ref_logps=reference if with_ref else None, **options)
        out.loss.backward()
        found.append((out, leaf.grad))
    (out, grad), (clean, clean_grad) = found
    check(out, clean, grad, clean_grad)
    if bad != "minus_inf":
        assert not torch.isfinite(out.logps[5])  # its own log-prob says it


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_reference_logits_and_statistics(place, layout, bad):
    """Reference logits of the others, and no statistic of theirs in a metric."""
    x, targets, _ = problem()
    ref = x + 0.1 * torch.randn(S, T, V)
    found = []
    for logits, reference in ((poisoned(x, BAD[bad]), poisoned(ref, BAD[bad])), (x, ref)):
        reference = flat(reference) if layout == "packed" else reference
        out, leaf = logits_loss(
            layout, logits, targets, ref_logits=reference, pairs=PAIRS, pair_weights=WEIGHTS,
            outputs=("logps", "entropy", "mean_logits", "is_top1"),
        )  # fmt: skip
        out.loss.backward()
        found.append((out, leaf.grad))
    check(found[0][0], found[1][0], found[0][1], found[1][1])
    assert {"entropy", "logits/chosen", "mean_token_accuracy"} <= found[0][0].metrics().keys()


def test_a_pair_of_weight_0_counts_as_none(place):
    """Loss and rewards are 0, and the metrics those of a batch without it."""
    x, targets, ref = problem()
    out = dpo_fast.dpo_loss(x, targets, ref, pairs=PAIRS, pair_weights=WEIGHTS, reduction="none")
    kept = [0, 1, 3]
    less = dpo_fast.dpo_loss(x, targets, ref, pairs=PAIRS[kept], pair_weights=WEIGHTS[kept], reduction="none")
    for found, expected in zip(out[1:4], less[1:4], strict=True):
        assert found[2] == 0
        assert torch.equal(found[kept], expected)
    assert out.metrics() == pytest.approx(less.metrics())
    weights = torch.zeros(4)
    leaf = poisoned(x, math.nan).requires_grad_()
    nobody = dpo_fast.dpo_loss(leaf, targets, ref, pairs=PAIRS, pair_weights=weights)
    nobody.loss.backward()
    assert nobody.loss == 0
    assert (leaf.grad == 0).all()
    assert all(math.isfinite(value) for value in nobody.metrics().values())


@pytest.mark.parametrize("layout", ["padded", "packed", "in place"])
@pytest.mark.parametrize("average", [False, True])
def test_gradients_through_log_probs_are_honoured(place, layout, average):
    """A sequence that takes no part still has a log-prob, and that a gradient; where none comes in, its rows are 0."""
    x, targets, ref = problem()
    options = {"ref_logps": ref, "pairs": PAIRS, "pair_weights": WEIGHTS, "average": average}
    factors = torch.tensor([0.0, 1.5, 0.0, 0.0, 0.0, 0.75])
    bad = x.clone()
    bad[4] = math.nan
    out, leaf = logits_loss(layout, bad, targets, **options)
    # not multiplied with the NaN: the gradient that comes in for sequence 4 is exactly 0
    torch.autograd.backward([out.loss, out.logps], [None, factors])
    alone, both = x.clone().requires_grad_(), x.clone().requires_grad_()
    dpo_fast.sequence_logps(alone, targets, average=average).backward(factors)
    dpo_fast.dpo_loss(both, targets, **options).loss.backward()
    assert torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(leaf.grad, alone.grad + both.grad)
    assert leaf.grad[5].abs().max() > 0
    assert (leaf.grad[4] == 0).all()


# --- hidden states ----------------------------------------------------------------------------------------------------

LONG = 24  # 6 x 24 rows: several tiles of 32
WAYS = {"compact": {}, "small_budget": {"memory_budget": 1}, "whole": {"compact": False}}


def linear_problem():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, LONG, H, generator=g)
    targets = torch.randint(0, V, (S, LONG), generator=g)
    targets[:, :2] = -100
    head = torch.randn(V, H, generator=g), torch.randn(V, generator=g)
    lora = torch.randn(2, H, generator=g), torch.randn(V, 2, generator=g)
    return [hidden, *head, *lora], targets, -15 + torch.randn(S, generator=g)


def linear_loss(tensors, targets, way, through_logps=None, packed=False, **options):
    leaves = [value.clone().requires_grad_() for value in tensors]
    hidden, weight, bias, a, b = leaves
    if packed:
        hidden, targets = flat(hidden), flat(targets)
        options["cu_seqlens"] = torch.arange(0, S * LONG + 1, LONG)
    out = dpo_fast.linear_dpo_loss(hidden, weight, targets, bias=bias, lora=(a, b, 0.5), **options, **WAYS[way])
    if through_logps is None:
        out.loss.backward()
    else:
        torch.autograd.backward([out.loss, out.logps], [None, through_logps])
    return out, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TYPES)
def test_from_hidden_states(place, name, way, bad):
    """Also the head's gradients: a row that takes no part is no factor of any product."""
    tensors, targets, ref = linear_problem()
    options, with_ref = options_of(name)
    options["ref_logps"] = ref if with_ref else None
    spoiled = [poisoned(tensors[0], BAD[bad]), *tensors[1:]]
    out, grads = linear_loss(spoiled, targets, way, **options)
    clean, clean_grads = linear_loss(tensors, targets, way, **options)
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(out.loss, clean.loss)
    assert (grads[0][OUT] == 0).all()
    for grad, expected in zip(grads, clean_grads, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logps[IN], clean.logps[IN])
    metrics = out.metrics()
    assert all(map(math.isfinite, metrics.values())), metrics
    assert metrics == pytest.approx(clean.metrics(), abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_heads_gradient_is_that_of_a_batch_without_them(place, way):
    tensors, targets, ref = linear_problem()
    spoiled = [poisoned(tensors[0], math.nan), *tensors[1:]]
    _, grads = linear_loss(spoiled, targets, way, ref_logps=ref, pairs=PAIRS, pair_weights=WEIGHTS, reduction="sum")
    kept = [0, 1, 3]
    less = {"ref_logps": ref[IN], "pairs": PAIRS[kept], "pair_weights": WEIGHTS[kept], "reduction": "sum"}
    leaves = [tensors[0][IN].clone().requires_grad_(), *(value.clone().requires_grad_() for value in tensors[1:])]
    hidden, weight, bias, a, b = leaves
    dpo_fast.linear_dpo_loss(hidden, weight, targets[IN], bias=bias, lora=(a, b, 0.5), **less).loss.backward()
    torch.testing.assert_close(grads[0][IN], hidden.grad, rtol=1e-5, atol=1e-6)
    for grad, leaf in zip(grads[1:], leaves[1:], strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("way", WAYS)
def test_reference_hidden_states(place, way, packed):
    tensors, targets, _ = linear_problem()
    options = {"packed": packed, "pairs": PAIRS, "pair_weights": WEIGHTS, "outputs": ("entropy",)}
    found = []
    for spoil in (True, False):
        given = [poisoned(tensors[0], math.nan) if spoil else tensors[0], *tensors[1:]]
        ref = given[0] + 0.5
        ref = flat(ref) if packed else ref
        found.append(linear_loss(given, targets, way, ref_hidden=ref, **options))
    (out, grads), (clean, clean_grads) = found
    torch.testing.assert_close(out.loss, clean.loss)
    for grad, expected in zip(grads, clean_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    assert out.metrics() == pytest.approx(clean.metrics(), abs=1e-5)
    assert "entropy" in out.metrics()


@pytest.mark.parametrize("way", WAYS)
def test_gradients_through_log_probs_reach_the_head(place, way):
    tensors, targets, ref = linear_problem()
    factors = torch.tensor([0.0, 1.5, 0.0, 0.0, 0.0, 0.75])
    spoiled = [tensors[0].clone(), *tensors[1:]]
    spoiled[0][4] = math.nan
    options = {"ref_logps": ref, "pairs": PAIRS, "pair_weights": WEIGHTS}
    _, grads = linear_loss(spoiled, targets, way, through_logps=factors, **options)
    _, of_loss = linear_loss(tensors, targets, way, **options)
    leaves = [value.clone().requires_grad_() for value in tensors]
    hidden, weight, bias, a, b = leaves
    dpo_fast.linear_sequence_logps(hidden, weight, targets, bias, lora=(a, b, 0.5)).backward(factors)
    assert (grads[0][4] == 0).all()
    assert grads[0][5].abs().max() > 0
    for grad, expected, leaf in zip(grads, of_loss, leaves, strict=True):
        torch.testing.assert_close(grad, expected + leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_of_0_multiplies_nothing(place, way):
    """At the levels without a loss as well: a sequence whose log-prob gets a gradient of exactly 0 is not read."""
    tensors, targets, _ = linear_problem()
    tensors[0][4:] = math.nan
    leaves = [value.clone().requires_grad_() for value in tensors]
    hidden, weight, bias, a, b = leaves
    out = dpo_fast.linear_sequence_logps(hidden, weight, targets, bias, lora=(a, b, 0.5), **WAYS[way])
    out.backward(torch.tensor([1.0, -2.0, 0.5, 0.25, 0, 0]))
    assert (hidden.grad[OUT] == 0).all()
    for leaf in leaves:
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.abs().max() > 0


# --- log-probs alone, and NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", FROM_LOG_PROBS)
def test_from_log_probs(place, name, bad):
    _, _, ref = problem()
    logps = ref + torch.linspace(-2, 2, S)
    options, with_ref = options_of(name)
    lengths = torch.tensor([3.0, 4, 2, 5, 4, 3])
    found = []
    for values, reference in ((poisoned(logps, BAD[bad]), poisoned(ref, BAD[bad])), (logps, ref)):
        leaf = values.clone().requires_grad_()
        out = dpo_fast.preference_loss(leaf, reference if with_ref else None, lengths=lengths, **options)
        out.loss.backward()
        found.append((out, leaf.grad))
    check(found[0][0], found[1][0], found[0][1], found[1][1])


def numpy_options(name: str) -> tuple[dict[str, Any], bool]:
    options, with_ref = options_of(name)
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}, with_ref


NUMPY_TYPES = [name for name in TYPES if name != "own function"]


def check_arrays(found: Any, clean: Any) -> None:
    (out, grad), (expected, expected_grad) = found, clean
    assert np.isfinite(out.loss)
    assert out.loss == expected.loss
    np.testing.assert_array_equal(grad[IN], expected_grad[IN])
    assert (grad[OUT] == 0).all()
    assert np.abs(expected_grad[IN]).max() > 0
    for a, b in zip(out[1:4], expected[1:4], strict=True):
        np.testing.assert_array_equal(a, b)
    same_metrics(out, expected)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", ["padded", "packed", "in place"])
@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_numpy_from_logits(name, layout, bad):
    x, targets, ref = problem()
    options, with_ref = numpy_options(name)
    found = []
    for logits, reference in ((poisoned(x, BAD[bad]), poisoned(ref, BAD[bad])), (x, ref)):
        array, ids = logits.clone().numpy(), targets.numpy()
        more = {"inplace_backward": layout == "in place", "ref_logps": reference.numpy() if with_ref else None}
        if layout == "packed":
            array, ids = array.reshape(S * T, V), ids.reshape(-1)
            more["cu_seqlens"] = CU_SEQLENS.numpy()
        out, grad = dpo_fast.numpy.dpo_loss(array, ids, with_grad=True, **options, **more)
        found.append((out, grad.reshape(S, T, V)))
    check_arrays(*found)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [name for name in FROM_LOG_PROBS if name in NUMPY_TYPES])
def test_numpy_from_log_probs(name, bad):
    _, _, ref = problem()
    logps = ref + torch.linspace(-2, 2, S)
    options, with_ref = numpy_options(name)
    lengths = np.array([3.0, 4, 2, 5, 4, 3])
    found = [
        dpo_fast.numpy.preference_loss(
            values.numpy(), reference.numpy() if with_ref else None, lengths=lengths, with_grad=True, **options
        )
        for values, reference in ((poisoned(logps, BAD[bad]), poisoned(ref, BAD[bad])), (logps, ref))
    ]
    check_arrays(*found)

"""Every preference loss: values and derivatives against the float64 reference, TRL and Liger; layouts; properties."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_accurate, make_case, naive_sequence_logps, random_pairs, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import call

import dpo_fast
from dpo_fast import reference
from dpo_fast._checks import LogitOptions
from dpo_fast._loss.options import (
    COUPLED_LOSSES,
    DIVERGENCES,
    PAIR_LOSSES,
    Given,
    LossFlags,
    PairNumbers,
    choose_loss,
)
from dpo_fast._torch.operators import (
    DPO_FORWARD,
    PREFERENCE_BACKWARD,
    PREFERENCE_FORWARD,
    DPOForward,
    Grads,
    Pairs,
    PreferenceBackward,
    PreferenceForward,
    Rows,
    Sequences,
)

NAMES = (*PAIR_LOSSES, *COUPLED_LOSSES)


def flags_of(name):
    return PAIR_LOSSES[name][1] if name in PAIR_LOSSES else COUPLED_LOSSES[name]


def options_of(name, smoothing=0.1, divergence="reverse_kl"):
    """What a loss needs, and something of all that it reads."""
    flags = flags_of(name)
    options = {}
    if flags & LossFlags.SMOOTHING:
        options["label_smoothing"] = smoothing
    if flags & LossFlags.BASELINE:
        options["baseline"] = 0.3
    if flags & LossFlags.SIDE_WEIGHTS:
        options |= {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    if flags & LossFlags.TAU:
        options["discopop_tau"] = 0.4
    if flags & LossFlags.GAMMA:
        options["simpo_gamma"] = 0.8
    if flags & LossFlags.DIVERGENCE:
        options["f_divergence"] = divergence
    return options


def cases():
    """name, label smoothing, divergence: all that go together."""
    for name in NAMES:
        flags = flags_of(name)
        for smoothing in (0.0, 0.1) if flags & LossFlags.SMOOTHING else (0.0,):
            if flags & LossFlags.SMOOTHING_OVER_0 and smoothing == 0:
                continue
            for divergence in DIVERGENCES if flags & LossFlags.DIVERGENCE else DIVERGENCES[:1]:
                yield pytest.param(name, smoothing, divergence, id=f"{name}-{smoothing}-{divergence}")


def log_probs(n, scale, seed=0):
    g = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(n, dtype=torch.float64, generator=g)


def has_reference(name):
    return not flags_of(name) & LossFlags.REFERENCE_FREE


def as_reference(options):
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def reference_average(name):
    return bool(flags_of(name) & LossFlags.AVERAGES)


@pytest.mark.parametrize(("name", "smoothing", "divergence"), cases())
@pytest.mark.parametrize("scale", [1, 30, 1e4], ids=["near", "usual", "far"])
def test_value_and_derivative(name, smoothing, divergence, scale, place):
    """Relative to the float64 reference, also where beta times the margin is 1e4."""
    S = 12
    logps, ref = log_probs(S, scale, 1), log_probs(S, scale, 2) if has_reference(name) else None
    options = options_of(name, smoothing, divergence) | {"lengths": torch.arange(1, S + 1), "beta": 1.0}
    if not flags_of(name) & LossFlags.UNPAIRED:
        options["pairs"] = random_pairs(S)
    logps.requires_grad_()
    out = dpo_fast.preference_loss(logps, ref, loss_type=name, reduction="sum", **options)
    out.loss.backward()
    args = (logps.detach().numpy(), None if ref is None else ref.numpy())
    plain = as_reference(options) | {"average": reference_average(name), "loss_type": name, "reduction": "sum"}
    exact = reference.preference_loss(*args, **plain)
    np.testing.assert_allclose(out.losses.detach().numpy(), exact.losses, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(out.chosen_rewards.numpy(), exact.chosen_rewards, rtol=1e-12)
    grad = reference.preference_loss_grad(*args, **plain)
    np.testing.assert_allclose(logps.grad.numpy(), grad, rtol=1e-10, atol=1e-13 * (1 + np.abs(grad).max()))


@pytest.mark.parametrize(("name", "smoothing", "divergence"), cases())
def test_reference_derivative_is_the_difference_quotient(name, smoothing, divergence):
    """What the kernels are judged by, judged by finite differences."""
    S, h = 6, 1e-6
    logps, ref = log_probs(S, 3, 3).numpy(), log_probs(S, 3, 4).numpy() if has_reference(name) else None
    options = options_of(name, smoothing, divergence)
    options |= {"loss_type": name, "lengths": np.arange(2, S + 2), "average": reference_average(name), "beta": 0.6}
    grad = reference.preference_loss_grad(logps, ref, **options)
    for s in range(S):
        step = np.zeros(S)
        step[s] = h
        up, down = (reference.preference_loss(logps + sign * step, ref, **options).loss for sign in (1, -1))
        np.testing.assert_allclose(grad[s], (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "smoothing", "divergence"), cases())
def test_infinite_log_probs_do_not_turn_into_nan_silently(name, smoothing, divergence):
    """A pair that is fine stays fine beside one whose chosen completion is impossible."""
    logps = torch.tensor([-1.0, -torch.inf, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    if name in COUPLED_LOSSES:
        pytest.skip("couples the batch")
    options = options_of(name, smoothing, divergence) | {"lengths": torch.ones(4)}
    if "sft" in name:
        options |= {"num_pairs": 2, "num_chosen_tokens": 2}
    ref = torch.zeros(4).double() if has_reference(name) else None
    losses = dpo_fast.preference_loss(logps, ref, loss_type=name, **options).losses
    good = 0 if name not in ("kto", "bco") else [0, 2, 3]
    assert torch.isfinite(losses[good]).all()
    losses[0].backward()
    assert torch.isfinite(logps.grad[0])
    assert logps.grad[1] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_gradcheck_through_the_whole_operation(name, level):
    S, T, H, V = 4, 3, 3, 5
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[0, 2:] = -100
    ref = log_probs(S, 5) if has_reference(name) else None
    options = options_of(name) | {"loss_type": name, "beta": 0.7}

    if level == "logits":
        inputs = [torch.randn(S, T, V, dtype=torch.float64, generator=g, requires_grad=True)]
        function = lambda x: dpo_fast.dpo_loss(x, targets, ref, **options).loss  # noqa: E731
    else:
        inputs = [torch.randn(*n, dtype=torch.float64, generator=g, requires_grad=True) for n in ((S, T, H), (V, H))]
        function = lambda x, w: dpo_fast.linear_dpo_loss(x, w, targets, ref, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-12)


# --- from logits and hidden states, every layout ----------------------------------------------------------------------

COMBINATIONS = {
    "rpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "f_divergence": "reverse_kl"},
    "wpo": {"loss_type": "sigmoid", "wpo": True, "label_smoothing": 0.1},
    "weighted": {"loss_type": ["hinge", "sft"], "wpo": True, "f_divergence": "js_divergence"},
    "aot_sft": {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.5]},
    "simpo_sft": {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5]},
}


def combination(name):
    return dict(COMBINATIONS[name]) if name in COMBINATIONS else options_of(name) | {"loss_type": name}


@pytest.mark.parametrize("layout", ["padded", "packed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*NAMES, *COMBINATIONS])
def test_from_logits_against_the_reference(name, dtype, layout, place):
    if name == "orpo" and layout == "packed":
        pytest.skip("the odds of an empty completion are infinite")
    case = make_case(layout, (5, 7, 33), dtype, spread=1.0)
    S = case.n_seqs
    options = combination(name) | {"beta": 0.3, "reduction": "sum"}
    types = [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    ref = naive_sequence_logps(case.view(case.leaf), case.targets, case.cu_seqlens).double() * 0.9 - 0.1
    ref = ref if all(map(has_reference, types)) else None
    if types[0] in ("kto", "bco"):
        options["desirable"] = torch.arange(S) % 3 == 0
    else:
        options["pairs"] = random_pairs(S)
        if not set(types) & set(COUPLED_LOSSES):
            options["pair_weights"] = torch.linspace(0.5, 1.5, len(options["pairs"]), dtype=torch.float64)
    if case.cu_seqlens is not None:
        options["cu_seqlens"] = case.cu_seqlens
    x = case.logits()
    out = dpo_fast.dpo_loss(x, case.targets, ref, **options)
    out.loss.backward()
    plain = as_reference(options) | {"average": any(map(reference_average, types))}
    args = (to_numpy(x), case.targets.numpy(), None if ref is None else ref.numpy())
    exact = reference.dpo_loss(*args, **plain)
    grad = reference.dpo_loss_grad(*args, **plain)
    slack = 1e-12 if dtype is torch.float64 else 3e-5
    np.testing.assert_allclose(out.losses.detach().numpy(), exact.losses, rtol=slack, atol=slack)
    scale = np.abs(grad).max() + 1e-30
    rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(x.grad), grad, rtol=2 * rounding, atol=scale * max(4 * rounding, slack / 10))


@pytest.mark.parametrize("name", [*NAMES, *COMBINATIONS, "ld"])
@pytest.mark.parametrize("budget", [None, 33 * 4 * 8], ids=["whole", "tiles"])
def test_from_hidden_states_as_from_logits(name, budget, place):
    S, T, H, V = 6, 9, 5, 33
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, T, H, generator=g, requires_grad=True)
    weight = torch.randn(V, H, generator=g, requires_grad=True)
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[torch.rand(S, T, generator=g) < 0.3] = -100
    options = {"ld_alpha": 0.4} if name == "ld" else combination(name)
    types = options.get("loss_type", "sigmoid")
    ref = -10 * torch.rand(S, generator=g)
    if not all(map(has_reference, [types] if isinstance(types, str) else types)):
        ref = None
    options |= {"outputs": ("logps", "entropy", "mean_logits", "is_top1")}
    found = dpo_fast.linear_dpo_loss(hidden, weight, targets, ref, memory_budget=budget, **options)
    expected = dpo_fast.dpo_loss(hidden @ weight.T, targets, ref, **options)
    for i in range(5):
        torch.testing.assert_close(found[i], expected[i], rtol=1e-5, atol=1e-5, equal_nan=True)
    for a, b in zip(found.tokens[:4], expected.tokens[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a, b = found.metrics(), expected.metrics()
    assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    (found.loss * 1.5).backward()
    grads = hidden.grad.clone(), weight.grad.clone()
    for actual, exact in zip(grads, torch.autograd.grad(expected.loss * 1.5, (hidden, weight)), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("name", [*NAMES, *COMBINATIONS, "ld"])
def test_numpy_gives_the_same(name):
    case = make_case("padded", (6, 7, 33), torch.float64, spread=1.0)
    options = {"ld_alpha": 0.4} if name == "ld" else combination(name)
    types = options.get("loss_type", "sigmoid")
    ref = log_probs(6, 20) if all(map(has_reference, [types] if isinstance(types, str) else types)) else None
    x = case.logits()
    out = dpo_fast.dpo_loss(x, case.targets, ref, **options)
    out.loss.backward()
    arrays = (case.leaf.numpy(), case.targets.numpy(), None if ref is None else ref.numpy())
    found, grad = dpo_fast.numpy.dpo_loss(*arrays, with_grad=True, **options)
    np.testing.assert_allclose(found.losses, out.losses.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(found.loss, out.loss.item(), rtol=1e-13)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-12, atol=1e-16)
    assert found.metrics() == pytest.approx(out.metrics(), rel=1e-12)
    lengths = (case.targets != -100).sum(-1)
    loss_only = {k: v for k, v in options.items() if k not in ("wpo", "ld_alpha")}
    logps = out.logps.detach().clone().requires_grad_()
    average = {"average": True} if name == "simpo_sft" else {}
    from_torch = dpo_fast.preference_loss(logps, ref, lengths=lengths, **loss_only, **average)
    from_torch.loss.backward()
    from_numpy, grad = dpo_fast.numpy.preference_loss(
        logps.detach().numpy(), arrays[2], lengths=lengths.numpy(), with_grad=True, **loss_only, **average
    )
    np.testing.assert_allclose(from_numpy.losses, from_torch.losses.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(grad, logps.grad.numpy(), rtol=1e-12, atol=1e-16)


def own_loss(chosen, rejected, ref_chosen, ref_rejected):
    """Not a loss of ours: a squared margin."""
    return (chosen - rejected - ref_chosen + ref_rejected - 1) ** 2


@pytest.mark.parametrize("outputs", [("logps",), ("logps", "mean_logits"), ("is_top1",), ("entropy", "logps")], ids=str)
def test_statistics_asked_for_one_by_one(outputs):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, 3, generator=g), torch.randn(5, 3, generator=g)
    targets = torch.randint(0, 5, (2, 4), generator=g)
    logits = hidden @ weight.T
    expected = dpo_fast.token_logps(logits, targets, outputs=outputs)
    for out in (
        dpo_fast.dpo_loss(logits, targets, outputs=outputs),
        dpo_fast.dpo_loss(logits.clone().requires_grad_(), targets, outputs=outputs),
        dpo_fast.linear_dpo_loss(hidden, weight, targets, outputs=outputs),
    ):
        for found, value in zip(out.tokens, expected, strict=True):
            assert (found is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(found, value)
        assert isinstance(out.metrics(), dict)


def test_own_function_at_every_level():
    S, T, H, V = 4, 5, 3, 17
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(S, T, H, generator=g).double(), torch.randn(V, H, generator=g).double()
    hidden.requires_grad_()
    targets, ref = torch.randint(0, V, (S, T), generator=g), log_probs(S, 20)
    logps = dpo_fast.sequence_logps(hidden @ weight.T, targets)
    expected = own_loss(*logps.chunk(2), *ref.chunk(2))
    both = {"loss_type": [own_loss, "sigmoid"], "loss_weights": [1.0, 0.5]}
    sigmoid = dpo_fast.preference_loss(logps, ref).losses
    results = [
        dpo_fast.dpo_loss(hidden @ weight.T, targets, ref, loss_type=own_loss),
        dpo_fast.linear_dpo_loss(hidden, weight, targets, ref, loss_type=own_loss),
        dpo_fast.preference_loss(logps, ref, loss_type=own_loss),
    ]
    (exact,) = torch.autograd.grad(expected.mean(), hidden, retain_graph=True)
    for out in results:
        torch.testing.assert_close(out.losses, expected)
        torch.testing.assert_close(torch.autograd.grad(out.loss, hidden, retain_graph=True)[0], exact)
    mixed = dpo_fast.dpo_loss(hidden @ weight.T, targets, ref, **both)
    torch.testing.assert_close(mixed.losses, expected + 0.5 * sigmoid)
    torch.testing.assert_close(mixed.loss, (expected + 0.5 * sigmoid).mean())

    def with_derivatives(c, d, rc, rd):
        return own_loss(c, d, rc, rd), 2 * (c - d - rc + rd - 1), -2 * (c - d - rc + rd - 1)

    arrays = ((hidden @ weight.T).detach().numpy(), targets.numpy(), ref.numpy())
    out, grad = dpo_fast.numpy.dpo_loss(*arrays, loss_type=with_derivatives, with_grad=True)
    np.testing.assert_allclose(out.losses, expected.detach().numpy())
    np.testing.assert_allclose(grad @ weight.numpy(), exact.numpy(), atol=1e-14)
    with pytest.raises(ValueError, match="returns \\(losses, derivatives"):
        dpo_fast.numpy.dpo_loss(*arrays, loss_type=own_loss, with_grad=True)


def test_compiled_losses():
    case = make_case("padded", (4, 5, 33), torch.float32)
    ref = torch.randn(4)
    options = {"loss_type": ["sigmoid", "aot", "sft"], "label_smoothing": 0.1, "outputs": ("entropy", "is_top1")}

    def step(x):
        out = dpo_fast.dpo_loss(x, case.targets, ref, **options)
        weighted = dpo_fast.dpo_loss(x, case.targets, ref, wpo=True, ld_alpha=0.5)
        single = dpo_fast.dpo_loss(x, case.targets, ref, loss_type="kto", baseline=0.1)
        return out.loss + weighted.loss + single.loss, out.token_sums["entropy"]

    torch._dynamo.reset()
    x, y = case.logits(), case.logits()
    expected, found = step(x), torch.compile(step, fullgraph=True)(y)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    expected[0].backward()
    found[0].backward()
    torch.testing.assert_close(y.grad, x.grad)


# --- TRL's and Liger's own numbers ------------------------------------------------------------------------------------

TRL_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]


def trl_loss(logits, input_ids, completion_mask, ref_logps, types, weights=None, **settings_):
    """Loss and metrics as TRL's own DPOTrainer computes them, its model replaced by these logits."""
    trainer_module = pytest.importorskip("trl.trainer.dpo_trainer")
    targets = dpo_fast.completion_targets(input_ids, completion_mask)[:, :-1]
    names = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    tokens = dpo_fast.token_logps(logits[:, :-1], targets, outputs=names)
    output = SimpleNamespace(log_probs=tokens.logps, **{name: getattr(tokens, name) for name in names[1:]})
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": {name: [] for name in TRL_METRICS}},
        _total_train_tokens=0,
        _tp_size=1,
        loss_types=types,
        loss_weights=weights or [1.0] * len(types),
        args=SimpleNamespace(discopop_tau=settings_.pop("discopop_tau", 0.05)),
        **({"label_smoothing": 0.0, "ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False,
            "f_alpha_divergence_coef": 0.5} | settings_),
    )  # fmt: skip
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = trainer_module.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}


TRL_METRICS = (
    *("entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen"),
    *("rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
)


def trl_cases():
    divergent = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
    for name in TRL_LOSSES:
        smoothing = 0.1 if flags_of(name) & LossFlags.SMOOTHING and name != "sigmoid" else 0.0
        for divergence in DIVERGENCES if name in divergent else DIVERGENCES[:1]:
            yield [name], None, {"label_smoothing": smoothing, "f_divergence": divergence}
        if name not in ("aot", "aot_unpaired", "sft", "hinge"):  # TRL's sft and hinge do not run with weights
            yield [name], None, {"label_smoothing": smoothing, "wpo": True}
        if name != "sft":  # TRL leaves sft's tokens unweighted
            yield [name], None, {"label_smoothing": smoothing, "ld_alpha": 0.3}
    yield ["sigmoid", "sft"], [1.0, 0.2], {}
    yield ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {}
    yield ["sigmoid", "sft"], [1.0, 0.2], {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 0.7}


@pytest.mark.parametrize(
    ("types", "weights", "options"), trl_cases(), ids=lambda v: "-".join(map(str, v)) if isinstance(v, list) else None
)
def test_same_loss_gradient_and_metrics_as_trl(types, weights, options):
    g = torch.Generator().manual_seed(0)
    S, T, V = 8, 12, 50
    input_ids = torch.randint(0, V, (S, T), generator=g)
    starts, ends = torch.randint(1, 5, (S, 1), generator=g), torch.randint(6, T + 1, (S, 1), generator=g)
    place = torch.arange(T)
    completion_mask = ((place >= starts) & (place < ends)).long()
    in_float32 = options.get("f_divergence") == "alpha_divergence"  # TRL has no double there
    logits = 2 * torch.randn(S, T, V, generator=g, dtype=torch.float32 if in_float32 else torch.float64)
    targets = dpo_fast.completion_targets(input_ids, completion_mask)
    ref = dpo_fast.sequence_logps(logits, targets, token_weights=_ld(targets, options)) + torch.randn(S, generator=g)
    theirs = {
        "f_divergence_type": options.get("f_divergence", "reverse_kl"),
        "use_weighting": options.get("wpo", False),
        **{k: v for k, v in options.items() if k in ("label_smoothing", "ld_alpha", "f_alpha_divergence_coef")},
    }
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, metrics = trl_loss(x, input_ids, completion_mask, ref, types, weights, beta=0.5, **theirs)
    out = dpo_fast.dpo_loss(
        y, targets, ref, beta=0.5, loss_type=types, loss_weights=weights, outputs=("entropy", "mean_logits", "is_top1"),
        **options,
    )  # fmt: skip
    # TRL's label smoothing and constants are float32
    torch.testing.assert_close(out.loss, expected, rtol=1e-4 if in_float32 else 1e-6, atol=1e-5 if in_float32 else 1e-7)
    assert out.metrics() == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    expected.backward()
    out.loss.backward()
    largest = x.grad.abs().max().item()
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=(1e-3 if in_float32 else 1e-6) * largest)


def _ld(targets, options):
    return dpo_fast.ld_dpo_weights(targets, options["ld_alpha"]) if "ld_alpha" in options else None


LIGER_LOSSES = [name for name in TRL_LOSSES if name not in ("ipo", "aot", "aot_unpaired", "sft", "sigmoid_norm")]


@pytest.mark.parametrize("name", LIGER_LOSSES)
def test_same_loss_as_liger(name):
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    S = 8
    logps, ref = log_probs(S, 40, 1), log_probs(S, 40, 2)
    smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
    expected, chosen, rejected = module.LigerFusedLinearDPOFunction.preference_loss_fn(
        *logps.chunk(2), torch.zeros(S, 1), *ref.chunk(2), beta=0.2, loss_type=name, label_smoothing=smoothing
    )
    out = dpo_fast.preference_loss(logps, ref, beta=0.2, loss_type=name, label_smoothing=smoothing)
    torch.testing.assert_close(out.loss, expected.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.chosen_rewards, chosen)
    torch.testing.assert_close(out.rejected_rewards, rejected)


# --- properties -------------------------------------------------------------------------------------------------------

quick = settings(max_examples=25, deadline=None)


@given(seed=st.integers(0, 2**31), offset=st.floats(-1e3, 1e3), name=st.sampled_from(NAMES))
@quick
def test_a_constant_on_a_row_changes_nothing(seed, offset, name):
    case = make_case("padded", (4, 3, 17), torch.float64, seed)
    options = options_of(name) | {"loss_type": name}
    ref = torch.zeros(4) if has_reference(name) else None
    a = dpo_fast.dpo_loss(case.leaf, case.targets, ref, **options).losses
    b = dpo_fast.dpo_loss(case.leaf + offset, case.targets, ref, **options).losses
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@given(seed=st.integers(0, 2**31), beta=st.floats(0.01, 5), smoothing=st.floats(0, 0.5))
@quick
def test_swapping_sides_mirrors_the_sigmoid_loss(seed, beta, smoothing):
    logps, ref = log_probs(8, 10, seed % 1000), log_probs(8, 10, seed % 999 + 1)
    swapped = torch.cat([logps[4:], logps[:4]]), torch.cat([ref[4:], ref[:4]])
    a = dpo_fast.preference_loss(logps, ref, beta=beta, label_smoothing=smoothing)
    b = dpo_fast.preference_loss(*swapped, beta=beta, label_smoothing=smoothing)
    r = a.chosen_rewards - a.rejected_rewards
    # softplus(-x) - softplus(x) = -x
    torch.testing.assert_close(a.losses - b.losses, -(1 - 2 * smoothing) * r, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**31), name=st.sampled_from([n for n in NAMES if n not in COUPLED_LOSSES and n != "sft"]))
@quick
def test_permuted_sequences_and_packing_change_no_bit(seed, name):
    S, T, V = 6, 5, 33
    case = make_case("padded", (S, T, V), torch.float32, seed)
    x, y = case.leaf, case.targets
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(S, generator=g)
    inverse = order.argsort()
    options = options_of(name) | {"loss_type": name}
    ref = torch.randn(S, generator=g) if has_reference(name) else None
    permuted_ref = None if ref is None else ref[order]
    if flags_of(name) & LossFlags.UNPAIRED:
        good = torch.arange(S) % 2 == 0
        a = dpo_fast.dpo_loss(x, y, ref, desirable=good, **options)
        b = dpo_fast.dpo_loss(x[order], y[order], permuted_ref, desirable=good[order], **options)
        assert torch.equal(a.losses[order], b.losses)
        more = {"desirable": good}
    else:
        pairs = random_pairs(S, seed % 1000)
        a = dpo_fast.dpo_loss(x, y, ref, pairs=pairs, **options)
        b = dpo_fast.dpo_loss(x[order], y[order], permuted_ref, pairs=inverse[pairs], **options)
        assert torch.equal(a.losses, b.losses)
        assert torch.equal(a.chosen_rewards, b.chosen_rewards)
        more = {"pairs": pairs}
    kept = (y != -100).reshape(-1)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), (y != -100).sum(-1).cumsum(0)])
    packed = dpo_fast.dpo_loss(
        x.reshape(-1, V)[kept], y.reshape(-1)[kept], ref, cu_seqlens=cu_seqlens, **more, **options
    )
    assert torch.equal(packed.losses, a.losses)
    assert torch.equal(packed.logps, a.logps)


@given(seed=st.integers(0, 2**31), name=st.sampled_from([n for n in PAIR_LOSSES if n not in ("kto", "bco")]))
@quick
def test_one_chosen_against_several_equals_the_pairs_written_out(seed, name):
    case = make_case("padded", (5, 4, 17), torch.float64, seed)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [4, 1]])
    options = options_of(name) | {"loss_type": name}
    ref = log_probs(5, 10, seed % 1000) if has_reference(name) else None
    x = case.logits()
    out = dpo_fast.dpo_loss(x, case.targets, ref, pairs=pairs, **options)
    out.loss.backward()
    written = pairs.T.reshape(-1)
    y = case.leaf.clone().requires_grad_()
    other = dpo_fast.dpo_loss(y[written], case.targets[written], None if ref is None else ref[written], **options)
    other.loss.backward()
    assert torch.equal(out.losses, other.losses)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-15)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 3))
@quick
def test_microbatches_with_num_pairs_equal_the_whole(seed, cut):
    """Uneven microbatches: losses and gradients add up to the large batch's."""
    case = make_case("padded", (8, 4, 17), torch.float64, seed)
    ref = log_probs(8, 10, seed % 1000)
    options = {"loss_type": ["sigmoid", "sft", "nca_pair"], "loss_weights": [1.0, 0.3, 0.5]}
    x = case.logits()
    whole = dpo_fast.dpo_loss(x, case.targets, ref, **options)
    whole.loss.backward()
    tokens = (case.targets[:4] != -100).sum().item()
    y = case.leaf.clone().requires_grad_()
    total = 0.0
    for part in (range(cut), range(cut, 4)):
        rows = [*part, *(p + 4 for p in part)]
        out = dpo_fast.dpo_loss(
            y[rows], case.targets[rows], ref[rows], num_pairs=4, num_chosen_tokens=max(tokens, 1), **options
        )
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-11, atol=1e-15)


# --- the table ---------------------------------------------------------------------------------------------------------


def test_flags_are_those_of_the_header():
    text = (Path(__file__).parent.parent / "csrc" / "preference_loss.h").read_text()
    names = re.findall(r"^  k(\w+) = (\d+),", text, re.M)
    header = {re.sub(r"(?<=[a-z0-9])(?=[A-Z0-9])", "_", name).upper(): int(value) for name, value in names}
    ours = {name: value for name, value in vars(LossFlags).items() if name.isupper()}
    assert {name.replace("_", ""): v for name, v in header.items()} == {n.replace("_", ""): v for n, v in ours.items()}


def test_unpaired_losses_by_label():
    """Any mixture of desirable and undesirable completions; the default is first half, second half."""
    logps, ref = log_probs(4, 5, 1), log_probs(4, 5, 2)
    for name in ("kto", "bco"):
        default = dpo_fast.preference_loss(logps, ref, loss_type=name, baseline=0.2)
        labels = torch.tensor([True, True, False, False])
        given_ = dpo_fast.preference_loss(
            logps, ref, loss_type=name, baseline=torch.tensor(0.2, dtype=torch.float64), desirable=labels
        )
        assert torch.equal(default.losses, given_.losses)
        all_good = dpo_fast.preference_loss(logps, ref, loss_type=name, baseline=0.2, desirable=torch.ones(4))
        assert torch.equal(all_good.losses[:2], default.losses[:2])
        assert torch.isnan(all_good.rejected_rewards).all()
        metrics = default.metrics()
        assert metrics["rewards/chosen"] == pytest.approx((0.1 * (logps - ref))[:2].mean().item())
        assert metrics["logps/rejected"] == pytest.approx(logps[2:].mean().item())
        assert "rewards/accuracies" not in metrics


def test_ld_dpo_weights():
    targets = torch.tensor([[-100, 1, 2, 3], [4, -100, -100, -100], [5, 6, -100, -100], [-100, 7, 8, 9]])
    expected = torch.tensor([[1, 1, 1, 0.25], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0.25, 0.25]])
    assert torch.equal(dpo_fast.ld_dpo_weights(targets, 0.25), expected)
    packed = dpo_fast.ld_dpo_weights(targets.flatten(), 0.25, cu_seqlens=torch.tensor([0, 4, 8, 12, 16]))
    assert torch.equal(packed, expected.flatten())
    pairs = torch.tensor([[2, 1]])
    by_pairs = dpo_fast.ld_dpo_weights(targets, 0.0, pairs=pairs)
    assert by_pairs[[0, 1, 3]].eq(1).all()
    assert by_pairs[2].tolist() == [1, 0, 0, 0]
    np.testing.assert_array_equal(
        dpo_fast.numpy.ld_dpo_weights(targets.numpy(), 0.0, pairs=pairs.numpy()), by_pairs.numpy()
    )
    for module, wrap in ((dpo_fast, lambda x: x), (dpo_fast.numpy, lambda x: x.numpy())):
        with pytest.raises(ValueError, match="in several pairs whose shorter completions"):
            module.ld_dpo_weights(wrap(targets), 0.5, pairs=wrap(torch.tensor([[0, 1], [0, 2]])))


def test_losses_in_float32_are_as_accurate_as_torch():
    logps, ref = 100 * torch.randn(64), 100 * torch.randn(64)
    out = dpo_fast.preference_loss(logps, ref)
    exact = reference.preference_loss(logps.numpy(), ref.numpy())
    ratios = logps - ref
    naive = -torch.nn.functional.logsigmoid(0.1 * (ratios[:32] - ratios[32:]))
    assert_accurate(out.losses, exact.losses, naive, torch.float32)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{"average": True}, {"loss_type": "simpo"}, {}], ids=lambda o: "-".join(o) or "sums"
)
@pytest.mark.parametrize("extra", [{"outputs": ["logps"]}, {"wpo": True}], ids=lambda o: next(iter(o)))
def test_no_alpha_against_an_empty_completion(packed, options, extra):
    """Every token is past the shorter completion, and weighs nothing: neither do statistics bring it back."""
    x, targets = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [-100] * 3])
    cu = torch.tensor([0, 3, 6])
    layout = {"cu_seqlens": cu} if packed else {}
    if packed:
        x, targets = x.reshape(6, 7), targets.reshape(6)
    plain = dpo_fast.dpo_loss(x, targets, ld_alpha=0.0, **options, **layout)
    more = dpo_fast.dpo_loss(x, targets, ld_alpha=0.0, **options, **extra, **layout)
    assert plain.logps.tolist() == [0, 0]
    assert torch.allclose(more.logps, plain.logps, atol=1e-290)
    if "wpo" not in extra:
        assert torch.equal(more.loss, plain.loss)
        return
    arrays = {name: array.numpy() for name, array in layout.items()}
    found = dpo_fast.numpy.dpo_loss(x.numpy(), targets.numpy(), ld_alpha=0.0, **options, **extra, **arrays)
    assert np.allclose(found.logps, 0, atol=1e-290)
    assert found.loss == more.loss.numpy()


@pytest.mark.parametrize("options", [{"token_weights": True}, {"ld_alpha": 0.0}], ids=lambda o: next(iter(o)))
def test_tokens_of_weight_0_with_wpo(options):
    """Dropped or masked, from logits or hidden states: the same; an ld_alpha of 0 is the limit of small ones."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, 3, generator=g), torch.randn(5, 3, generator=g)
    targets = torch.randint(0, 5, (2, 4), generator=g)
    targets[0, 3] = -100
    if "token_weights" in options:
        options = {"token_weights": torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])}
    options = options | {"wpo": True, "outputs": ("entropy", "mean_logits", "is_top1")}
    expected = dpo_fast.dpo_loss(hidden @ weight.T, targets, **options)
    for compact in (True, False):
        found = dpo_fast.linear_dpo_loss(hidden, weight, targets, compact=compact, **options)
        torch.testing.assert_close(found.losses, expected.losses)
        assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-5)
    if "ld_alpha" in options:
        near = dpo_fast.dpo_loss(hidden @ weight.T, targets, **(options | {"ld_alpha": 1e-12}))
        torch.testing.assert_close(near.losses, expected.losses)
        arrays = (hidden @ weight.T).numpy(), targets.numpy()
        found = dpo_fast.numpy.dpo_loss(*arrays, wpo=True, ld_alpha=0.0)
        np.testing.assert_allclose(found.losses, expected.losses.numpy(), rtol=1e-6)


def test_orpo_of_certain_and_empty_completions_is_finite():
    logits = torch.zeros(2, 1, 50)
    logits[1, :, 0] = 20  # the rejected completion has probability 1 in float32
    logits.requires_grad_()
    targets = torch.zeros(2, 1, dtype=torch.int64)
    for y in (targets, targets.clone().index_fill_(0, torch.tensor([1]), -100), torch.full_like(targets, -100)):
        out = dpo_fast.dpo_loss(logits, y, loss_type="orpo")
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert torch.isfinite(out.losses).all()
        assert torch.isfinite(grad).all()


def test_a_pair_of_weight_0_is_switched_off():
    logps = torch.tensor([0.0, -torch.inf, -1.0, -2.0], requires_grad=True)
    out = dpo_fast.preference_loss(logps, pair_weights=torch.tensor([1.0, 0.0]))
    out.loss.backward()
    assert out.losses[1] == 0
    assert torch.isfinite(logps.grad).all()


def test_metrics_of_nothing():
    """0 where no token counts, as TRL; no entry for a side that is not there."""
    logits, targets = torch.randn(2, 3, 5), torch.full((2, 3), -100)
    names = ("entropy", "mean_logits", "is_top1")
    metrics = dpo_fast.dpo_loss(logits, targets, outputs=names).metrics()
    for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
        assert metrics[name] == 0
    logps = torch.tensor([-1.0, -2.0, -torch.inf])
    out = dpo_fast.preference_loss(logps, loss_type="kto", baseline=0, desirable=torch.ones(3))
    assert set(out.metrics()) == {"rewards/chosen", "logps/chosen"}
    out = dpo_fast.preference_loss(logps, loss_type="kto", baseline=0, desirable=torch.tensor([1, 1, 0]))
    assert out.metrics()["logps/chosen"] == -1.5


def test_changing_num_pairs_does_not_compile_again():
    logps = torch.randn(4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda n: dpo_fast.preference_loss(logps, num_pairs=n).loss, fullgraph=True)
    for n in range(2, 14):
        torch.testing.assert_close(compiled(n + 0.5), dpo_fast.preference_loss(logps, num_pairs=n + 0.5).loss)


def test_compiled_with_pairs_and_packed_weights():
    x, y = torch.randn(6, 5, 9), torch.randint(0, 9, (6, 5))
    pairs, cu_seqlens = torch.tensor([[0, 1], [2, 3]]), torch.arange(7) * 5
    for step in (
        lambda x: dpo_fast.dpo_loss(x, y, ld_alpha=0.3, pairs=pairs).loss,
        lambda x: (
            dpo_fast.dpo_loss(x.view(30, 9), y.view(30), ld_alpha=0.3, cu_seqlens=cu_seqlens, outputs=["entropy"]).loss
        ),
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), step(x))


def test_own_function_may_work_in_place():
    logps, ref = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double()

    def careless(chosen, rejected, ref_chosen, ref_rejected):
        ref_chosen.zero_()
        return chosen.sub_(rejected) ** 2

    assert dpo_fast.preference_loss(logps, ref, loss_type=careless).loss == 1
    assert logps.tolist() == [1, 2]
    assert ref.tolist() == [3, 4]


def test_operators_with_absent_sides_stay_in_bounds():
    """Combinations that the functions refuse, given to the operator: no read outside the arrays."""
    x, y = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    pairs = torch.tensor([[0, -1], [-1, 1]])
    rows, seqs = Rows(y, None, None, LogitOptions()), Sequences(None, False)
    loss = choose_loss(loss_type="kto", given=Given(baseline=True)).options
    mixed = loss._replace(types=(*loss.types, PAIR_LOSSES["sft"][0]), weights=(1.0, 1.0))
    for options in (loss, mixed):
        a = Pairs(pairs, PairNumbers(), torch.zeros(()), options, 0.0)
        out = call(DPO_FORWARD, x, DPOForward(rows, seqs, a, None, True, 0, True))
        assert torch.isfinite(out[1]).all()
    a = Pairs(None, PairNumbers(), None, choose_loss().options._replace(divergence=99), 0.0)
    with pytest.raises(ValueError, match="no divergence number 99"):
        call(PREFERENCE_FORWARD, torch.zeros(2), PreferenceForward(a, None, None, False, True))
    a = PreferenceBackward(None, 0.0, torch.zeros(1, 2, device="meta"), Grads(loss=torch.ones(())))
    with pytest.raises(ValueError, match="pair_grads must be on the device"):
        call(PREFERENCE_BACKWARD, torch.zeros(2), a)

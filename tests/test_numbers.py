"""Every argument that is one number or a truth value, given nonsense: a TypeError or ValueError that names it.

One table, run through every public function that takes the argument, for torch tensors and NumPy arrays alike.
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

S, T, V, H = 4, 3, 11, 6
P = S // 2


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(S, T, V, generator=g)
    targets = torch.randint(0, V - 2, (S, T), generator=g)
    targets[0, 2] = targets[3, 1] = -100
    logps = -torch.rand(S, generator=g) * 9
    return {
        "logits": x,
        "hidden": torch.randn(S, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "targets": targets,
        "index": targets.clamp(min=0),
        "logps": logps,
        "ref_logps": logps + torch.tensor([1, -0.5, -1, 0.25]),
        "lengths": torch.tensor([2.0, 3, 3, 2]),
    }


TENSORS = tensors()

LOSS = ("logits", "targets", "ref_logps")
FUNCTIONS = {
    "token_logps": ("logits", "targets"),
    "selective_log_softmax": ("logits", "index"),
    "sequence_logps": ("logits", "targets"),
    "dpo_loss": LOSS,
    "preference_loss": ("logps", "ref_logps"),
    "linear_token_logps": ("hidden", "weight", "targets"),
    "linear_sequence_logps": ("hidden", "weight", "targets"),
    "linear_dpo_loss": ("hidden", "weight", *LOSS[1:]),
    "ld_dpo_weights": ("targets",),
}
LOGITS = tuple(name for name in FUNCTIONS if name not in ("preference_loss", "ld_dpo_weights"))
WITH_OPTIONS = tuple(name for name in LOGITS if name != "selective_log_softmax")
LOSSES = ("dpo_loss", "preference_loss", "linear_dpo_loss")
FROM_LOGITS = ("dpo_loss", "linear_dpo_loss")
LINEAR = tuple(name for name in FUNCTIONS if name.startswith("linear"))

# What is wrong for every number, whatever it means.
NONSENSE: dict[str, Any] = {
    "text": "1",
    "nan": math.nan,
    "several": torch.tensor([0.5, 0.25, 0.125]),  # three: neither one number nor one for each of two pairs
    "several in an array": np.array([0.5, 0.25, 0.125]),
    "list": [0.5],
    "complex": 1j,
    "with gradient": torch.tensor(0.5, requires_grad=True),
}
NONE, INF, MINUS = {"none": None}, {"inf": math.inf, "minus inf": -math.inf}, {"negative": -0.5}
ZERO, HALF = {"zero": 0}, {"no integer": 1.5}

# argument: (functions, more that is wrong, the other arguments, a number that is right)
NUMBERS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any], Any]] = {
    "temperature": (LOGITS, NONE | INF | MINUS | ZERO, {}, 0.5),
    "logit_scale": (WITH_OPTIONS, NONE | INF | MINUS | ZERO, {}, 0.5),
    "softcap": (WITH_OPTIONS, INF | MINUS | ZERO, {}, 8.0),
    "ignore_index": ((*WITH_OPTIONS, "ld_dpo_weights"), NONE | INF | HALF, {}, -100),
    "valid_vocab": (WITH_OPTIONS, INF | MINUS | HALF | {"too many": V + 1}, {}, V - 1),
    "beta": (LOSSES, NONE | INF | MINUS, {}, 0.5),
    "label_smoothing": (LOSSES, NONE | INF | MINUS | {"over a half": 0.75}, {}, 0.25),
    "baseline": (LOSSES, INF, {"loss_type": "kto"}, 0.5),
    "num_pairs": (LOSSES, INF | MINUS | ZERO, {}, 4.0),
    "num_chosen_tokens": (LOSSES, INF | MINUS | ZERO, {"loss_type": "sft", "num_pairs": 4, "ref_logps": None}, 4.0),
    "simpo_gamma": (LOSSES, INF, {"loss_type": "simpo", "ref_logps": None}, 0.75),
    "discopop_tau": (LOSSES, INF | MINUS | ZERO, {"loss_type": "discopop"}, 0.5),
    "desirable_weight": (LOSSES, INF, {"loss_type": "kto", "baseline": 0.0}, 0.5),
    "undesirable_weight": (LOSSES, INF, {"loss_type": "kto", "baseline": 0.0}, 0.5),
    "f_alpha_divergence_coef": (LOSSES, INF, {"f_divergence": "alpha_divergence"}, 0.5),
    "dpop_lambda": (LOSSES, INF | MINUS, {}, 0.5),
    "length_penalty": (LOSSES, INF | MINUS, {}, 0.5),
    "z_loss_weight": (FROM_LOGITS, INF | MINUS, {}, 0.5),
    "ld_alpha": (FROM_LOGITS, INF | MINUS | {"over 1": 1.5}, {}, 0.5),
    "ld_alpha of": (("ld_dpo_weights",), NONE | INF | MINUS | {"over 1": 1.5}, {}, 0.5),
    "memory_budget": (LINEAR, INF | MINUS | ZERO, {}, 4096),
}  # fmt: skip

FLAGS: dict[str, tuple[str, ...]] = {
    "average": ("sequence_logps", "dpo_loss", "preference_loss", "linear_sequence_logps", "linear_dpo_loss"),
    "inplace_backward": ("token_logps", "sequence_logps", "dpo_loss"),
    "wpo": FROM_LOGITS,
    "compact": LINEAR,
    "with_grad": ("dpo_loss", "preference_loss"),  # NumPy's
}
NO_TRUTH: dict[str, Any] = {
    "yes": "yes",
    "no": "no",
    "x": "x",
    "empty text": "",
    "number": 0.5,
    "nan": math.nan,
    "list": [],
    "several": torch.tensor([True, False]),
    "several in an array": np.array([True, False]),
}


def has(module: Any, function: str, argument: str) -> bool:
    if not hasattr(module, function):
        return False
    return not (module is dpo_fast.numpy and argument in ("memory_budget", "compact")) and not (
        module is dpo_fast and argument == "with_grad"
    )


def needs_lengths(function: str, options: dict[str, Any], argument: str) -> bool:
    return function == "preference_loss" and ("sft" in options.values() or argument == "length_penalty")


def call(module: Any, function: str, argument: str, value: Any, options: dict[str, Any]) -> Any:
    convert = (lambda x: x) if module is dpo_fast else (lambda x: x.numpy())
    arguments: dict[str, Any] = {name: convert(TENSORS[name].clone()) for name in FUNCTIONS[function]}
    if needs_lengths(function, options, argument):
        arguments["lengths"] = convert(TENSORS["lengths"])
    if function == "ld_dpo_weights":
        arguments.setdefault("ld_alpha", 0.5)
    return getattr(module, function)(**{**arguments, **options, argument.removesuffix(" of"): value})


MODULES = {"torch": dpo_fast, "numpy": dpo_fast.numpy}

REFUSED = [
    pytest.param(module, function, argument, value, options, id=f"{name}-{function}-{argument}-{what}")
    for name, module in MODULES.items()
    for argument, (functions, more, options, _) in NUMBERS.items()
    for function in functions
    if has(module, function, argument)
    for what, value in (NONSENSE | more).items()
] + [
    pytest.param(module, function, argument, value, {}, id=f"{name}-{function}-{argument}-{what}")
    for name, module in MODULES.items()
    for argument, functions in FLAGS.items()
    for function in functions
    if has(module, function, argument)
    for what, value in NO_TRUTH.items()
]


@pytest.mark.parametrize(("module", "function", "argument", "value", "options"), REFUSED)
def test_nonsense_is_refused_by_name(module, function, argument, value, options):
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument.removesuffix(' of')}\b") as caught:
        call(module, function, argument, value, options)
    assert "unexpected keyword" not in str(caught.value)  # it is known


def loss_of(found: Any) -> np.ndarray:
    if isinstance(found, tuple):
        found = getattr(found, "loss", getattr(found, "logps", None))
    return np.asarray(found)


ACCEPTED = [
    pytest.param(module, function, argument, right, options, id=f"{name}-{function}-{argument}")
    for name, module in MODULES.items()
    for argument, (functions, _, options, right) in NUMBERS.items()
    for function in functions
    if has(module, function, argument)
]


@pytest.mark.parametrize(("module", "function", "argument", "right", "options"), ACCEPTED)
def test_every_form_of_a_number(module, function, argument, right, options):
    """Python's and NumPy's numbers give the same, and another number another result."""
    expected = loss_of(call(module, function, argument, right, options))
    assert np.isfinite(expected).all()
    forms = [np.int64(right), np.int32(right)] if isinstance(right, int) else [np.float64(right), np.float32(right)]
    for form in forms:
        np.testing.assert_array_equal(loss_of(call(module, function, argument, form, options)), expected)
    if argument == "beta":
        one = torch.tensor(right) if module is dpo_fast else np.array(right)
        np.testing.assert_array_equal(loss_of(call(module, function, argument, one, options)), expected)
        each = torch.full((P,), right) if module is dpo_fast else np.full(P, right)
        np.testing.assert_array_equal(loss_of(call(module, function, argument, each, options)), expected)
    if argument not in ("ignore_index", "memory_budget"):  # nothing else is ignored; no result depends on the budget
        other = right - 1 if isinstance(right, int) else right / 2
        assert not np.array_equal(loss_of(call(module, function, argument, other, options)), expected)


@pytest.mark.parametrize("argument", [name for name, row in NUMBERS.items() if isinstance(row[3], float)])
def test_integers_are_numbers(argument):
    functions, _, options, _ = NUMBERS[argument]
    whole = {"softcap": 8, "label_smoothing": 0, "num_pairs": 4, "num_chosen_tokens": 4}.get(argument, 1)
    for module in MODULES.values():
        function = functions[0]
        np.testing.assert_array_equal(
            loss_of(call(module, function, argument, whole, options)),
            loss_of(call(module, function, argument, float(whole), options)),
        )


@pytest.mark.parametrize("name", MODULES)
def test_truth_values(name):
    """NumPy's count as Python's, and both are read."""
    module = MODULES[name]
    for flag in ("average", "wpo"):
        yes, no = (loss_of(call(module, "dpo_loss", flag, value, {})) for value in (True, False))
        assert yes != no
        assert loss_of(call(module, "dpo_loss", flag, np.True_, {})) == yes
        assert loss_of(call(module, "dpo_loss", flag, np.False_, {})) == no


def test_beta_below_zero_does_not_flip_the_preference():
    for loss_type in ("sigmoid", "hinge", "ipo", "sppo_hard"):
        with pytest.raises(ValueError, match=r"\bbeta\b"):
            dpo_fast.preference_loss(TENSORS["logps"], beta=-0.1, loss_type=loss_type, lengths=TENSORS["lengths"])


@pytest.mark.parametrize("function", LINEAR)
@pytest.mark.parametrize("scaling", [*NONSENSE.values(), None, math.inf])
def test_lora_scaling(function, scaling):
    lora = (torch.zeros(2, H), torch.zeros(V, 2), scaling)
    with pytest.raises((TypeError, ValueError), match=r"\blora"):
        call(dpo_fast, function, "lora", lora, {})


NO_ARRAYS = [
    (function, argument)
    for function, arguments in FUNCTIONS.items()
    for argument in (*arguments, *(("pairs", "pair_weights", "margin") if function in LOSSES else ()))
] + [
    *((function, "token_weights") for function in FUNCTIONS if "sequence" in function or function in FROM_LOGITS),
    *((function, "cu_seqlens") for function in FUNCTIONS if "sequence" in function or function in FROM_LOGITS),
    *(("ld_dpo_weights", "pairs"), ("ld_dpo_weights", "cu_seqlens"), ("selective_log_softmax", "row_mask")),
    *((function, "bias") for function in LINEAR),
    *((function, "lora") for function in LINEAR),
    *(("dpo_loss", "ref_logits"), ("linear_dpo_loss", "ref_hidden"), ("preference_loss", "lengths")),
    ("completion_targets", "input_ids"),
    ("completion_targets", "completion_mask"),
]


@pytest.mark.parametrize(("function", "argument"), NO_ARRAYS)
def test_lists_and_arrays_are_no_tensors(function, argument):
    arguments: dict[str, Any] = {name: TENSORS[name] for name in FUNCTIONS.get(function, ())}
    if function == "ld_dpo_weights":
        arguments["ld_alpha"] = 0.5
    if function == "completion_targets":
        arguments = {"input_ids": TENSORS["targets"], "completion_mask": TENSORS["targets"] > 0}
    if argument.startswith("ref_"):
        arguments.pop("ref_logps", None)
    given = arguments.get(argument, torch.ones(2, 2))
    for value in (given.tolist(), given.numpy(), 1.5, "text"):
        kinds = (TypeError, ValueError) if argument == "lora" else TypeError  # a tuple, of three
        with pytest.raises(kinds, match=rf"\b{re.escape(argument)}\b") as caught:
            getattr(dpo_fast, function)(**{**arguments, argument: value})
        assert "unexpected keyword" not in str(caught.value)


def test_numpy_takes_lists():
    """There lists are arrays: only what cannot become numbers is refused."""
    found = dpo_fast.numpy.preference_loss([-1.0, -2.0], [-1.5, -1.0], pairs=[[0, 1]], pair_weights=[2.0])
    assert float(found.loss) == pytest.approx(2 * math.log1p(math.exp(-0.1 * 1.5)))
    with pytest.raises(TypeError, match=r"\bref_logps\b"):
        dpo_fast.numpy.preference_loss([-1.0, -2.0], ["a", "b"])

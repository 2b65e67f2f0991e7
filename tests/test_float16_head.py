"""float16 through the LM head with LoRA: every gradient against float64, whatever scale comes in from the loss.

A loss scaler multiplies the loss by 2^16 or more, and a loss divided over many microbatches brings a small factor; the
intermediates of the head's backward may not leave float16's range on the way, with B about 1e-4 as after some steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_fast

S, T, V, H, RANK, SCALING = 64, 8, 4000, 64, 8, 2.0
BETA = 0.1
NAMES = ("hidden", "weight", "bias", "lora_a", "lora_b")

SCALES = (2.0**-10, 1.0, 2.0**16)

# Relative error (Euclidean norms) beside that of rounding the exact gradient once to float16: rounding the logits'
# gradient (2^-11 an element), the products and their sums. Plain torch's own is 5e-4 where nothing leaves the range.
SLACK = 1.5e-3


class Problem(NamedTuple):
    tensors: dict[str, Tensor]  # float16 numbers
    targets: Tensor  # [S, T]
    ref: Tensor  # [S]


@pytest.fixture(scope="module")
def problem() -> Problem:
    g = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=g)).half()

    tensors = {
        "hidden": randn(S, T, H),
        "weight": randn(V, H, scale=3 / H**0.5),
        "bias": randn(V),
        "lora_a": randn(RANK, H, scale=1 / H**0.5),
        "lora_b": randn(V, RANK, scale=1e-4),
    }
    targets = torch.randint(0, V, (S, T), generator=g)
    targets[:, 0] = -100
    targets[::3, 1] = -100
    return Problem(tensors, targets, -60 + torch.randn(S, generator=g))


def leaves_of(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in problem.tensors.items()}


def weights_of(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What a mean over the batch with different signs brings in."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g).to(dtype) / S


def value_of(level: str, out: Any) -> Tensor:
    """One number, from what a level gives."""
    if level == "linear_dpo_loss":
        return out.loss
    logps = out.logps if level == "linear_token_logps" else out
    return (logps * weights_of(logps.shape, logps.dtype)).sum()


LEVELS = ("linear_dpo_loss", "linear_token_logps", "linear_sequence_logps")
WAYS = {"one_tile": {}, "tiles": {"memory_budget": 200 * V * 2}, "whole": {"compact": False}}


def fast(level: str, x: dict[str, Tensor], problem: Problem, way: str) -> Tensor:
    lora = (x["lora_a"], x["lora_b"], SCALING)
    options = {"bias": x["bias"], "lora": lora, **WAYS[way]}
    if level == "linear_dpo_loss":
        options |= {"ref_logps": problem.ref, "beta": BETA}
    return value_of(level, getattr(dpo_fast, level)(x["hidden"], x["weight"], problem.targets, **options))


def naive(level: str, x: dict[str, Tensor], problem: Problem) -> Tensor:
    """The same in plain torch, in the tensors' own type but for the log-softmax."""
    z = x["hidden"] @ x["weight"].t() + x["bias"] + SCALING * ((x["hidden"] @ x["lora_a"].t()) @ x["lora_b"].t())
    logps = F.log_softmax(z if z.dtype is torch.float64 else z.float(), -1)
    logps = logps.gather(-1, problem.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (problem.targets != -100)
    if level == "linear_token_logps":
        return (logps * weights_of(logps.shape, logps.dtype)).sum()
    sums = logps.sum(-1)
    if level == "linear_sequence_logps":
        return (sums * weights_of(sums.shape, sums.dtype)).sum()
    chosen, rejected = (sums - problem.ref).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


@pytest.fixture(scope="module")
def exact(problem) -> dict[str, dict[str, Tensor]]:
    """The gradients in float64, by level; a scale multiplies them."""
    found = {}
    for level in LEVELS:
        x = leaves_of(problem, torch.float64)
        naive(level, x, problem).backward()
        found[level] = {name: leaf.grad for name, leaf in x.items()}
    return found


def error_of(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def assert_as_good_as_rounded(grads: dict[str, Tensor], exact: dict[str, Tensor], scale: float, dtype: torch.dtype):
    for name in NAMES:
        expected = exact[name] * scale
        rounded = expected.to(dtype)
        assert torch.isfinite(rounded).all()  # the test's own numbers stay in range
        once = error_of(rounded, expected)
        assert torch.isfinite(grads[name]).all(), name
        found = error_of(grads[name], expected)
        assert found <= 2 * once + SLACK, (name, found, once)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_gradient(place, problem, exact, level, way, scale):
    x = leaves_of(problem, torch.float16)
    (fast(level, x, problem, way) * scale).backward()
    grads = {name: leaf.grad for name, leaf in x.items()}
    assert all(grad.dtype is torch.float16 for grad in grads.values())
    assert_as_good_as_rounded(grads, exact[level], scale, torch.float16)


@pytest.mark.cpu_only
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", LEVELS)
def test_under_autocast(problem, exact, level, way, scale):
    """Parameters in float32, the products in float16: gradients come out in float32, still through float16."""
    x = leaves_of(problem, torch.float32)
    with torch.autocast("cpu", torch.float16):
        value = fast(level, x, problem, way)
    (value * scale).backward()
    grads = {name: leaf.grad for name, leaf in x.items()}
    assert all(grad.dtype is torch.float32 for grad in grads.values())
    # they may pass through float16, which rounds the smallest
    assert_as_good_as_rounded(grads, exact[level], scale, torch.float16)


def test_the_case_that_was_found(place, problem, exact):
    """(loss * 65536).backward(): lora_a had a relative error of 0.59, where plain torch has 5e-4."""
    x = leaves_of(problem, torch.float16)
    (fast("linear_dpo_loss", x, problem, "one_tile") * 65536).backward()
    plain = leaves_of(problem, torch.float16)
    (naive("linear_dpo_loss", plain, problem) * 65536).backward()
    for name in NAMES:
        expected = exact["linear_dpo_loss"][name] * 65536
        own, theirs = error_of(x[name].grad, expected), error_of(plain[name].grad, expected)
        assert theirs < 0.01, (name, theirs)  # plain torch is a measure here
        assert own <= 2 * theirs + 5e-4, (name, own, theirs)


@pytest.mark.parametrize("scale", SCALES)
def test_losses_and_log_probs_together(place, problem, exact, scale):
    """A gradient that comes through logps as well takes another way back."""
    x, want = leaves_of(problem, torch.float16), leaves_of(problem, torch.float64)
    out = dpo_fast.linear_dpo_loss(
        x["hidden"], x["weight"], problem.targets, problem.ref, bias=x["bias"],
        lora=(x["lora_a"], x["lora_b"], SCALING), beta=BETA,
    )  # fmt: skip
    factors = weights_of(out.logps.shape, out.logps.dtype)
    torch.autograd.backward([out.loss, out.logps], [torch.tensor(scale), scale * factors])
    (naive("linear_dpo_loss", want, problem) + naive("linear_sequence_logps", want, problem)).backward()
    grads = {name: leaf.grad for name, leaf in x.items()}
    assert_as_good_as_rounded(grads, {name: leaf.grad for name, leaf in want.items()}, scale, torch.float16)

"""The worked values of DPO's definition on every path: reference, NumPy, torch; from log-probs and from logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dpo_fast
import dpo_fast.numpy
from dpo_fast import reference

LOGPS = {
    "reference": (reference.preference_loss, np.array),
    "numpy": (dpo_fast.numpy.preference_loss, np.array),
    "torch": (dpo_fast.preference_loss, lambda x: torch.tensor(x, dtype=torch.float64)),
}
LOGITS = {
    "reference": (reference.dpo_loss, np.array),
    "numpy": (dpo_fast.numpy.dpo_loss, np.array),
    "torch": (dpo_fast.dpo_loss, lambda x: torch.tensor(np.array(x))),
}


def margin(out):
    return float(out.chosen_rewards[0] - out.rejected_rewards[0])


@pytest.mark.parametrize("path", LOGPS)
def test_from_log_probs(path):
    loss, array = LOGPS[path]
    # log pi(chosen), log pi(rejected), log ref(chosen), log ref(rejected)
    assert margin(loss(array([-2.0, -2.5]), array([-3.0, -3.5]), beta=1.0)) == 0
    assert float(loss(array([1.2, 0.0]), beta=1.0).loss) == pytest.approx(0.2633, abs=5e-5)
    assert margin(loss(array([np.log(0.2), -2.5]), array([np.log(0.18), -2.0]), beta=1.0)) == pytest.approx(
        np.log(0.2) - np.log(0.18) + 0.5
    )


def test_derivative_at_r_0_8():
    expected = -0.31003
    assert reference.preference_loss_grad([0.8, 0.0], beta=1.0)[0] == pytest.approx(expected, abs=5e-6)
    _, grad = dpo_fast.numpy.preference_loss(np.array([0.8, 0.0]), beta=1.0, with_grad=True)
    np.testing.assert_allclose(grad, [expected, -expected], atol=5e-6)
    logps = torch.tensor([0.8, 0.0], requires_grad=True)
    dpo_fast.preference_loss(logps, beta=1.0).loss.backward()
    np.testing.assert_allclose(logps.grad.numpy(), [expected, -expected], atol=5e-6)


@pytest.mark.parametrize("path", LOGITS)
def test_from_token_probabilities(path):
    """Token probabilities 0.4, 0.5 (reference 0.3, 0.6); rejected -2.5 and -3.0 (reference): r = -0.39464."""
    loss, array = LOGITS[path]
    # a rejected completion of one token with log-prob -2.5 under the policy and -3.0 under the reference
    p, q = np.exp(-2.5), np.exp(-3.0)
    policy = array(np.log([[[0.4, 0.6], [0.5, 0.5]], [[p, 1 - p], [0.5, 0.5]]]))
    ref = array(np.log([[[0.3, 0.7], [0.6, 0.4]], [[q, 1 - q], [0.5, 0.5]]]))
    targets = array([[0, 0], [0, -100]])
    out = loss(policy, targets, ref_logits=ref, beta=1.0)
    assert float(out.logps[0]) == pytest.approx(np.log(0.2))
    assert float(out.logps[1]) == pytest.approx(-2.5)
    assert float(out.chosen_rewards[0]) == pytest.approx(np.log(0.2) - np.log(0.18))
    assert margin(out) == pytest.approx(-0.39464, abs=5e-6)
    assert float(out.loss) == pytest.approx(np.log1p(np.exp(0.39464)), abs=5e-6)


# One pair at each margin: r = 0 gives log 2; r = 1.2 gives 0.2633; r = 0.8 has slope -0.31003; r = -0.39464.
MARGINS = torch.tensor([0.0, 1.2, 0.8, -0.39464], dtype=torch.float64)
LOSSES = torch.tensor([0.693147, 0.263282, 0.371101, 0.909810], dtype=torch.float64)
SLOPES = torch.tensor([-0.5, -0.231475, -0.310026, -0.597399], dtype=torch.float64)


def two_tokens(logp):
    """Logits over 3 entries that give target 0 half of the log-prob, so that two rows give all of it."""
    p = torch.exp(torch.as_tensor(logp, dtype=torch.float64) / 2)
    rest = (1 - p) / 2
    return torch.stack([p, rest, rest], -1).log()


@pytest.mark.parametrize("layout", ["halves", "interleaved", "packed", "one against several", "shared prompt"])
@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_every_layout(layout, level):
    """Rejected completions have log-prob -3, chosen ones -3 + r (policy), without reference: margin r."""
    n = len(MARGINS)
    chosen, rejected = two_tokens(-3 + MARGINS), two_tokens(torch.full((n,), -3.0))  # [n, 3], for each of two rows
    rows = {"halves": torch.cat([chosen, rejected])}
    rows["interleaved"] = torch.stack([chosen, rejected], 1).reshape(2 * n, 3)
    rows["packed"] = rows["halves"]
    rows["one against several"] = torch.cat([chosen, rejected[:1]])
    rows["shared prompt"] = rows["interleaved"]
    x = rows[layout].unsqueeze(1).repeat(1, 2, 1)  # [S, 2, 3]
    S = x.shape[0]
    targets = torch.zeros(S, 2, dtype=torch.int64)
    more = {}
    if layout in ("interleaved", "shared prompt"):
        more["pairs"] = torch.arange(S).reshape(-1, 2)
    if layout == "one against several":
        more["pairs"] = torch.tensor([[c, n] for c in range(n)])
    if layout == "packed":
        x, targets = x.reshape(-1, 3), targets.reshape(-1)
        more["cu_seqlens"] = torch.arange(S + 1) * 2
    if layout == "shared prompt":  # a prompt row before each pair, in the first one's bounds, that predicts nothing
        x = torch.cat([torch.randn(n, 1, 3, dtype=torch.float64), x.reshape(n, 4, 3)], 1).reshape(-1, 3)
        targets = torch.tensor([-100, 0, 0, 0, 0] * n)
        more["cu_seqlens"] = torch.tensor([0, *(5 * i + k for i in range(n) for k in (3, 5))])
    x = x.clone().requires_grad_()
    if level == "logits":
        out = dpo_fast.dpo_loss(x, targets, beta=1.0, reduction="sum", **more)
    else:
        out = dpo_fast.linear_dpo_loss(x, torch.eye(3).double(), targets, beta=1.0, reduction="sum", **more)
    torch.testing.assert_close(out.losses, LOSSES, rtol=0, atol=1e-6)
    (slopes,) = torch.autograd.grad(out.loss, out.logps, retain_graph=True, allow_unused=True)
    assert slopes is None  # logps are an output, not an intermediate: their slope is seen from the pairs
    logps = out.logps.detach().requires_grad_()
    alone = dpo_fast.preference_loss(logps, beta=1.0, reduction="sum", pairs=more.get("pairs"))
    alone.loss.backward()
    first = range(n) if "pairs" not in more else more["pairs"][:, 0].tolist()
    torch.testing.assert_close(logps.grad[list(first)], SLOPES, rtol=0, atol=1e-6)
    out.loss.backward()
    # dloss/dz at a target is slope * (1 - p), in each row of the sequence
    p = torch.exp((-3 + MARGINS) / 2)
    at_targets = x.grad.reshape(-1, 3)[:, 0]
    starts = {"halves": 2 * torch.arange(n), "packed": 2 * torch.arange(n), "interleaved": 4 * torch.arange(n)}
    starts |= {"one against several": 2 * torch.arange(n), "shared prompt": 5 * torch.arange(n) + 1}
    for k in (0, 1):
        torch.testing.assert_close(at_targets[starts[layout] + k], SLOPES * (1 - p), rtol=0, atol=1e-6)


# log pi -2.8, -2.3 and log ref -2.0, -2.0: log-ratios -0.8 (chosen) and -0.3 (rejected), with 7 and 4 tokens; beta 0.5
# gives x = -0.25, the loss log(1 + exp(0.25)) = 0.825939 and its slope -sigmoid(0.25) = -0.562177 in x.
ADDED = {
    # DPO-Positive: 0.5 (-0.8 + 0.3 - 2 max(0, 0.8)) = -1.05; dx/dlr_c = 0.5 (1 + 2), dx/dlr_d = -0.5
    "dpop_lambda": ({"dpop_lambda": 2.0}, -1.05, 1.350058, -0.740775, 1.5),
    # R-DPO: 0.5 (-0.5) + 0.1 (7 - 4) = 0.05: a longer chosen completion is preferred for its length already
    "length_penalty": ({"length_penalty": 0.1}, 0.05, 0.668460, -0.487503, 0.5),
    # ODPO: 0.5 (-0.5) - 0.4 = -0.65: the rewards have to differ by more than 0.4
    "margin": ({"margin": [0.4]}, -0.65, 1.070055, -0.657010, 0.5),
    # a beta of the pair's own: 2 (-0.5) = -1
    "beta": ({"beta": [2.0]}, -1.0, 1.313262, -0.731059, 2.0),
}


@pytest.mark.parametrize("path", LOGPS)
@pytest.mark.parametrize("name", ADDED)
def test_numbers_in_the_score_margin(name, path):
    given, x, loss, slope, dx = ADDED[name]
    function, array = LOGPS[path]
    options = {k: v if isinstance(v, float) else array(v) for k, v in given.items()}
    options = {"beta": 0.5, "lengths": array([7, 4]), **options}
    assert loss == pytest.approx(np.log1p(np.exp(-x)), abs=1e-6)
    out = function(array([-2.8, -2.3]), array([-2.0, -2.0]), **options)
    assert float(out.loss) == pytest.approx(loss, abs=1e-6)
    beta = given.get("beta", [0.5])[0]
    assert float(out.chosen_rewards[0]) == pytest.approx(beta * -0.8)
    assert float(out.rejected_rewards[0]) == pytest.approx(beta * -0.3)
    assert slope == pytest.approx(-1 / (1 + np.exp(x)), abs=1e-6)
    grad = gradient(path, array([-2.8, -2.3]), array([-2.0, -2.0]), **options)
    np.testing.assert_allclose(grad, [slope * dx, -slope * beta], atol=1e-6)


def gradient(path, x, *args, **options):
    """The gradient of the loss by log-probs, or by logits [S, T, V]."""
    name = "preference_loss" if x.ndim == 1 else "dpo_loss"
    if path == "reference":
        return getattr(reference, f"{name}_grad")(x, *args, **options)
    if path == "numpy":
        return getattr(dpo_fast.numpy, name)(x, *args, with_grad=True, **options)[1]
    x.requires_grad_()
    getattr(dpo_fast, name)(x, *args, **options).loss.backward()
    return x.grad.numpy()


@pytest.mark.parametrize("path", LOGITS)
def test_z_loss(path):
    """Three tokens with the log-sum-exps log 4, log 4 and 0: weight 0.1 adds 0.1 * 2 (log 4)^2 / 3 = 0.128121."""
    function, array = LOGITS[path]
    x, targets = np.log([[[3.0, 1.0], [2.0, 2.0]], [[0.5, 0.5], [7.0, 7.0]]]), array([[0, 0], [0, -100]])
    # log(3/4) + log(1/2) against log(1/2): r = log(3/4), and log(1 + 4/3) = 0.847298
    assert float(function(array(x), targets, beta=1.0).loss) == pytest.approx(0.847298, abs=1e-6)
    found = function(array(x), targets, beta=1.0, z_loss_weight=0.1)
    assert float(found.loss) == pytest.approx(0.975419, abs=1e-6)
    assert float(found.losses[0]) == pytest.approx(0.847298, abs=1e-6)
    without, grad = (gradient(path, array(x), targets, beta=1.0, **more) for more in ({}, {"z_loss_weight": 0.1}))
    # 0.1 * 2 log(4) / 3 = 0.092420, shared out by softmax
    np.testing.assert_allclose((grad - without)[0], 0.092420 * np.array([[0.75, 0.25], [0.5, 0.5]]), atol=1e-6)
    np.testing.assert_allclose((grad - without)[1], 0, atol=1e-15)

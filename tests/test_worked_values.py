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

"""The reference itself: the worked values of DPO's definition, and its gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_fast import reference


def test_equal_margins_give_zero_reward():
    out = reference.preference_loss([-2.0, -2.5], [-3.0, -3.5], beta=1.0)
    assert out.chosen_rewards[0] - out.rejected_rewards[0] == 0
    assert out.loss == pytest.approx(np.log(2))


def test_loss_at_r_1_2():
    assert reference.preference_loss([1.2, 0.0], beta=1.0).loss == pytest.approx(0.2633, abs=5e-5)


def test_derivative_at_r_0_8():
    grad = reference.preference_loss_grad([0.8, 0.0], beta=1.0)
    assert grad[0] == pytest.approx(-0.31003, abs=5e-6)
    assert grad[1] == -grad[0]


def worked_logits():
    """Token probabilities 0.4, 0.5 under the policy and 0.3, 0.6 under the reference."""
    policy = np.log([[[0.4, 0.6], [0.5, 0.5]]])
    ref = np.log([[[0.3, 0.7], [0.6, 0.4]]])
    return policy, ref, np.zeros((1, 2), np.int64)


def test_sequence_log_probs_of_token_probabilities():
    policy, ref, targets = worked_logits()
    chosen = reference.sequence_logps(policy, targets)[0]
    chosen_ref = reference.sequence_logps(ref, targets)[0]
    assert chosen == pytest.approx(np.log(0.2))
    assert chosen_ref == pytest.approx(np.log(0.18))
    out = reference.preference_loss([chosen, -2.5], [chosen_ref, -2.0], beta=1.0)
    assert out.chosen_rewards[0] - out.rejected_rewards[0] == pytest.approx(np.log(0.2 / 0.18) + 0.5)


def finite_difference(f, x, h=1e-5):
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        grad[i] = (f(up) - f(down)) / (2 * h)
    return grad


@pytest.fixture
def small():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 3, 5)), rng.integers(0, 5, (4, 3)), rng.normal(size=4), rng.random((4, 3)) + 0.5


OPTIONS = {"temperature": 0.7, "logit_scale": 1.3, "softcap": 2.0}


def test_token_gradient(small):
    x, targets, _, weights = small
    targets[1, 1] = -100
    g, h = weights, weights[::-1]

    def f(x):
        out = reference.token_logps(x, targets, **OPTIONS)
        return (g * out.logps).sum() + (h * out.entropy).sum()

    grad = reference.token_logps_grad(x, targets, g, h, **OPTIONS)
    np.testing.assert_allclose(grad, finite_difference(f, x), atol=1e-8)
    assert (grad[1, 1] == 0).all()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dpo_gradient(small, average, reduction):
    x, targets, ref, weights = small
    weights[2] = 0
    options = {
        "token_weights": weights,
        "average": average,
        "reduction": reduction,
        "beta": 0.5,
        "label_smoothing": 0.2,
        "pairs": [[0, 1], [0, 2], [3, 1]],
        **OPTIONS,
    }
    grad = reference.dpo_loss_grad(x, targets, ref, **options)
    expected = finite_difference(lambda x: reference.dpo_loss(x, targets, ref, **options).loss, x)
    np.testing.assert_allclose(grad, expected, atol=1e-8)

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


def test_log_sum_exp_and_its_gradient(small):
    x, targets, _, weights = small
    targets[1, 1] = -100
    out = reference.token_logps(x, targets, **OPTIONS)
    z = 2.0 * np.tanh(x * 1.3 / 2.0) / 0.7
    kept = targets != -100
    np.testing.assert_allclose(out.lse[kept], np.log(np.exp(z).sum(-1))[kept], atol=1e-12)
    at_targets = np.take_along_axis(z, np.where(kept, targets, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.lse[kept], (at_targets - out.logps)[kept], atol=1e-12)
    assert out.lse[1, 1] == 0
    far = reference.token_logps(x + 1e4, targets).lse[kept]  # no overflow
    np.testing.assert_allclose(far, reference.token_logps(x, targets).lse[kept] + 1e4, atol=1e-8)
    assert reference.token_logps(np.full((1, 5), -np.inf), [0]).lse[0] == -np.inf
    g, h = weights, weights[::-1]

    def f(x):
        out = reference.token_logps(x, targets, **OPTIONS)
        return (g * out.lse).sum() + (h * out.logps).sum()

    grad = reference.token_logps_grad(x, targets, h, grad_lse=g, **OPTIONS)
    np.testing.assert_allclose(grad, finite_difference(f, x), atol=1e-8)
    assert (grad[1, 1] == 0).all()


def test_columns_of_padding_are_not_there(small):
    """All numbers are those of the logits without them, whatever lies in them; their gradient is 0."""
    x, targets, ref, weights = small
    padded = np.concatenate([x, np.full((4, 3, 2), np.nan)], -1)
    found, expected = reference.token_logps(padded, targets, valid_vocab=5), reference.token_logps(x, targets)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    grad = reference.token_logps_grad(padded, targets, weights, weights, weights, valid_vocab=5)
    np.testing.assert_array_equal(grad[..., :5], reference.token_logps_grad(x, targets, weights, weights, weights))
    assert (grad[..., 5:] == 0).all()
    options = {"beta": 0.5, "z_loss_weight": 0.1, "wpo": True}
    loss = reference.dpo_loss(padded, targets, ref, valid_vocab=5, **options).loss
    assert loss == reference.dpo_loss(x, targets, ref, **options).loss
    grad = reference.dpo_loss_grad(padded, targets, ref, valid_vocab=5, **options)
    np.testing.assert_array_equal(grad[..., :5], reference.dpo_loss_grad(x, targets, ref, **options))
    assert (grad[..., 5:] == 0).all()


def test_rows_without_an_incoming_gradient_are_not_read(small):
    x, targets, *_ = small
    x[2] = np.nan
    incoming = np.ones((4, 3))
    incoming[2] = 0
    grad = reference.token_logps_grad(x, targets, incoming, incoming, incoming)
    assert np.isfinite(grad).all()
    assert (grad[2] == 0).all()
    assert (grad[0] != 0).any()
    one = np.zeros((4, 3))
    one[2, 0] = 1  # through one of them alone it is read
    for name in ("grad_entropy", "grad_lse"):
        assert np.isnan(reference.token_logps_grad(x, targets, incoming, **{name: one})[2, 0]).all()
    grad = reference.sequence_logps_grad(x, targets, [1.0, 2.0, 0.0, 3.0])
    assert (grad[2] == 0).all()
    assert np.isfinite(grad).all()


# --- numbers in the score margin, and of each pair --------------------------------------------------------------------

PAIRS = [[0, 1], [0, 2], [3, 1]]
LOGPS, REF = np.array([-3.0, -2.0, -4.5, -1.0]), np.array([-2.2, -2.1, -3.0, -1.5])  # ratios -0.8, 0.1, -1.5, 0.5
LENGTHS = [5, 3, 9, 4]
MARGIN_LOSSES = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.4},
}
ADDED = {
    "dpop": {"dpop_lambda": 2.5},
    "length": {"length_penalty": 0.07},
    "margin": {"margin": [0.3, -0.2, 0.9]},
    "beta": {"beta": [0.2, 0.7, 1.1]},
    "all": {"dpop_lambda": 1.5, "length_penalty": 0.05, "margin": [0.3, -0.2, 0.9], "beta": [0.2, 0.7, 1.1]},
}


def plain(x, name, options):
    """The loss at these margins of scores, from log-probs that have them as their difference."""
    logps = np.concatenate([x, np.zeros(len(x))])
    return reference.preference_loss(logps, beta=1.0, loss_type=name, reduction="none", **options).losses


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_score_margin(name, added):
    """The loss is the plain one at x = b (lr_c - lr_d - lambda max(0, -lr_c)) + alpha (n_c - n_d) - margin."""
    options = {"loss_type": name, "pairs": PAIRS, "lengths": LENGTHS, "beta": 0.5, "reduction": "none"}
    options |= MARGIN_LOSSES[name] | ADDED[added]
    o = {"dpop_lambda": 0, "length_penalty": 0, "margin": 0} | ADDED[added]
    c, d = np.transpose(PAIRS)
    lr, n = LOGPS - REF, np.array(LENGTHS)
    penalty = o["dpop_lambda"] * np.maximum(0, REF[c] - LOGPS[c])
    x = options["beta"] * (lr[c] - lr[d] - penalty) + o["length_penalty"] * (n[c] - n[d]) - o["margin"]
    out = reference.preference_loss(LOGPS, REF, **options)
    np.testing.assert_allclose(out.losses, plain(x, name, MARGIN_LOSSES[name]), rtol=1e-12)
    np.testing.assert_allclose(out.chosen_rewards, options["beta"] * lr[c])  # rewards know the pair's beta alone
    np.testing.assert_allclose(out.rejected_rewards, options["beta"] * lr[d])
    g = np.array([1.0, -0.5, 2.0])
    grad = reference.preference_loss_grad(LOGPS, REF, grad_losses=g, **options)
    expected = finite_difference(lambda v: (g * reference.preference_loss(v, REF, **options).losses).sum(), LOGPS)
    np.testing.assert_allclose(grad, expected, atol=1e-8)


@pytest.mark.parametrize("name", ["ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm"])
def test_beta_of_each_pair(name):
    """Each pair's loss is that of a call with its beta."""
    betas = [0.2, 0.7, 1.1]
    options = {"loss_type": name, "lengths": LENGTHS, "reduction": "none"}
    found = reference.preference_loss(LOGPS, REF, pairs=PAIRS, beta=betas, **options)
    alone = [
        reference.preference_loss(LOGPS, REF, pairs=[pair], beta=beta, **options)
        for pair, beta in zip(PAIRS, betas, strict=True)
    ]
    for key in ("losses", "chosen_rewards", "rejected_rewards"):
        expected = np.concatenate([getattr(out, key) for out in alone])
        np.testing.assert_allclose(getattr(found, key), expected, rtol=1e-12)


def test_the_penalty_of_dpo_positive_is_for_a_chosen_completion_below_its_reference():
    """A ratio above 0 has none; the chosen completion's slope grows by 1 + lambda, the rejected one's does not."""
    assert (
        reference.preference_loss([-1.0, -2.0], [-1.5, -2.0], dpop_lambda=50.0, beta=1.0).loss
        == reference.preference_loss([-1.0, -2.0], [-1.5, -2.0], beta=1.0).loss
    )
    grad = reference.preference_loss_grad([-3.0, -2.0], [-2.0, -2.0], dpop_lambda=4.0, beta=0.1)
    assert grad[0] == pytest.approx(-5 * grad[1])
    assert grad[0] < 0  # downhill is up, for the chosen one


# --- the z-loss -------------------------------------------------------------------------------------------------------


def kept_mean_of_squares(x, targets, sequences, weights=None):
    kept = np.zeros(targets.shape, bool)
    kept[sequences] = True
    kept &= targets != -100
    if weights is not None:
        kept &= weights != 0
    return (np.log(np.exp(x).sum(-1))[kept] ** 2).mean()


@pytest.mark.parametrize("reduction", ["mean", "sum", "num_pairs"])
def test_z_loss(small, reduction):
    """Added once to a mean, P times to a sum, P / num_pairs times to a share."""
    x, targets, ref, weights = small
    targets[0, 1] = -100
    weights[2, 2] = 0
    options = {"pairs": PAIRS, "pair_weights": [0.5, 0.0, 2.0], "token_weights": weights, "beta": 0.5}
    options |= {"reduction": "mean", "num_pairs": 12} if reduction == "num_pairs" else {"reduction": reduction}
    without = reference.dpo_loss(x, targets, ref, **options)
    found = reference.dpo_loss(x, targets, ref, z_loss_weight=0.3, **options)
    times = {"mean": 1, "sum": 3, "num_pairs": 3 / 12}[reduction]
    expected = 0.3 * kept_mean_of_squares(x, targets, [0, 1, 3], weights)  # 2 is in a pair of weight 0 alone
    assert found.loss - without.loss == pytest.approx(times * expected)
    np.testing.assert_array_equal(found.losses, without.losses)
    grad = reference.dpo_loss_grad(x, targets, ref, z_loss_weight=0.3, **options)
    expected = finite_difference(lambda x: reference.dpo_loss(x, targets, ref, z_loss_weight=0.3, **options).loss, x)
    np.testing.assert_allclose(grad, expected, atol=1e-8)
    assert (grad[2] == 0).all()


def test_z_loss_of_single_completions_and_of_packed_ones(small):
    x, targets, ref, _ = small
    options = {"loss_type": "kto", "baseline": 0.1, "pair_weights": [1.0, 0.0, 1.0, 1.0], "beta": 0.5}
    without = reference.dpo_loss(x, targets, ref, **options).loss
    found = reference.dpo_loss(x, targets, ref, z_loss_weight=0.3, **options).loss
    assert found - without == pytest.approx(0.3 * kept_mean_of_squares(x, targets, [0, 2, 3]))
    packed = {"cu_seqlens": [0, 3, 6, 9, 12], "z_loss_weight": 0.3, **options}
    assert reference.dpo_loss(x.reshape(12, 5), targets.reshape(12), ref, **packed).loss == pytest.approx(found)


def test_z_loss_beside_ld_alpha(small):
    """It is over all tokens: an ld_alpha of 0 is the limit of small ones."""
    x, targets, ref, _ = small
    targets[:2, 1:] = -100
    found = reference.dpo_loss(x, targets, ref, z_loss_weight=0.3, ld_alpha=0.0).loss
    expected = reference.dpo_loss(x, targets, ref, ld_alpha=0.0).loss + 0.3 * kept_mean_of_squares(x, targets, range(4))
    assert found == pytest.approx(expected)
    assert found == pytest.approx(reference.dpo_loss(x, targets, ref, z_loss_weight=0.3, ld_alpha=1e-12).loss)
    grad = reference.dpo_loss_grad(x, targets, ref, z_loss_weight=0.3, ld_alpha=0.0)
    assert (grad[2:, 2] != 0).all()
    near = reference.dpo_loss_grad(x, targets, ref, z_loss_weight=0.3, ld_alpha=1e-12)
    np.testing.assert_allclose(grad, near, atol=1e-11)


def test_z_loss_is_not_one_of_pairs(small):
    x, targets, ref, _ = small
    for function in (reference.dpo_loss, reference.dpo_loss_grad):
        with pytest.raises(ValueError, match="z_loss_weight is for reductions"):
            function(x, targets, ref, z_loss_weight=0.3, reduction="none")


# --- pairs of weight 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"wpo": True}, {"z_loss_weight": 0.2}, {"average": True}], ids=str)
def test_a_pair_of_weight_0_counts_as_none(small, options):
    """NaN in its own sequence stays in that one's log-prob."""
    x, targets, ref, _ = small
    options = {"pairs": PAIRS, "pair_weights": [0.5, 0.0, 2.0], "beta": 0.5, **options}
    bad = x.copy()
    bad[2, 1] = np.nan
    found, clean = reference.dpo_loss(bad, targets, ref, **options), reference.dpo_loss(x, targets, ref, **options)
    assert found.loss == clean.loss
    for out in (found, clean):
        assert out.losses[1] == out.chosen_rewards[1] == out.rejected_rewards[1] == 0
        assert (out.losses[[0, 2]] > 0).all()
    assert np.isnan(found.logps).tolist() == [False, False, True, False]
    assert found.metrics() == clean.metrics()
    grad, expected = (reference.dpo_loss_grad(values, targets, ref, **options) for values in (bad, x))
    np.testing.assert_array_equal(grad, expected)
    assert (grad[2] == 0).all()
    assert (grad[0] != 0).any()


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_single_completion_of_weight_0_counts_as_none(name):
    """Both its rewards are 0, though one side is not there."""
    options = {"loss_type": name, "baseline": 0.1, "desirable": [True, False, True, False], "beta": 0.5}
    weights = [1.0, 2.0, 0.0, 0.0]
    bad = LOGPS.copy()
    bad[2:] = np.nan
    found = reference.preference_loss(bad, REF, pair_weights=weights, **options)
    clean = reference.preference_loss(LOGPS, REF, pair_weights=weights, **options)
    assert found.loss == clean.loss > 0
    np.testing.assert_array_equal(found.chosen_rewards, [0.5 * (LOGPS - REF)[0], np.nan, 0, 0])
    np.testing.assert_array_equal(found.rejected_rewards, [np.nan, 0.5 * (LOGPS - REF)[1], 0, 0])
    assert found.metrics() == clean.metrics()
    grad = reference.preference_loss_grad(bad, REF, pair_weights=weights, **options)
    assert (grad[2:] == 0).all()
    assert (grad[:2] != 0).all()

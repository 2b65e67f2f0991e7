"""The score margin's terms, numbers of pairs, the z-loss, lse and valid_vocab: every level against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import make_case, to_numpy

import dpo_fast
import dpo_fast.numpy
from dpo_fast import reference

S, T, H, V = 6, 7, 16, 41
PAIRS = torch.tensor([[0, 3], [1, 4], [2, 5], [0, 5], [1, 3]])
P = len(PAIRS)

# name: options of the loss, by a generator that makes the tensors
TERMS = {
    "dpop_lambda": lambda g: {"dpop_lambda": 5.0},
    "length_penalty": lambda g: {"length_penalty": 0.03},
    "margin": lambda g: {"margin": torch.rand(P, generator=g)},
    "beta of each pair": lambda g: {"beta": torch.rand(P, generator=g) + 0.05},
    "beta, 0-d": lambda g: {"beta": torch.tensor(0.3)},
    "z_loss_weight": lambda g: {"z_loss_weight": 0.01},
    "weights of 0": lambda g: {"pair_weights": torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])},
    "all": lambda g: {
        "dpop_lambda": 2.0, "length_penalty": 0.02, "margin": torch.rand(P, generator=g), "z_loss_weight": 0.01,
        "beta": torch.rand(P, generator=g) + 0.05, "pair_weights": torch.tensor([1.0, 0.0, 0.5, 0.3, 2.0]),
        "label_smoothing": 0.1,
    },
}  # fmt: skip
READERS = ("sigmoid", "hinge", "exo_pair", "robust", "discopop")


class Problem:
    def __init__(self, dtype=torch.float64, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(S, T, H, generator=g).to(dtype)
        self.weight = torch.randn(V, H, generator=g).to(dtype)
        self.targets = torch.randint(0, V - 5, (S, T), generator=g)
        self.targets[torch.rand(S, T, generator=g) < 0.3] = -100
        # near the policy: chosen ratios of both signs
        logps = dpo_fast.sequence_logps(self.hidden @ self.weight.T, self.targets)
        self.ref = (logps + 2 * torch.randn(S, generator=g).to(logps)).double()
        self.generator = g


def as_arrays(options):
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("loss_type", READERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "shares"])
def test_every_level(name, loss_type, reduction):
    problem = Problem()
    options = {"loss_type": loss_type, "pairs": PAIRS, **TERMS[name](problem.generator)}
    if loss_type == "exo_pair":
        options["label_smoothing"] = 0.1
    if loss_type in ("hinge", "discopop"):
        options.pop("label_smoothing", None)
    options |= {"num_pairs": 11} if reduction == "shares" else {"reduction": reduction}
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    logits = (hidden @ weight.T).detach().requires_grad_()
    out = dpo_fast.dpo_loss(logits, problem.targets, problem.ref, **options)
    [grad] = torch.autograd.grad(out.loss, logits)
    args = (to_numpy(logits), problem.targets.numpy(), problem.ref.numpy())
    exact, exact_grad = (
        reference.dpo_loss(*args, **as_arrays(options)),
        reference.dpo_loss_grad(*args, **as_arrays(options)),
    )
    for field in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        np.testing.assert_allclose(to_numpy(getattr(out, field)), getattr(exact, field), rtol=1e-9, err_msg=field)
    np.testing.assert_allclose(to_numpy(grad), exact_grad, rtol=1e-8, atol=1e-12)
    in_numpy, numpy_grad = dpo_fast.numpy.dpo_loss(*args, **as_arrays(options), with_grad=True)
    np.testing.assert_allclose(in_numpy.loss, exact.loss, rtol=1e-9)
    np.testing.assert_allclose(numpy_grad, exact_grad, rtol=1e-8, atol=1e-12)
    expected = torch.autograd.grad(hidden @ weight.T, (hidden, weight), torch.tensor(exact_grad))
    for how in ({}, {"memory_budget": 1}, {"compact": False}):
        found = dpo_fast.linear_dpo_loss(hidden, weight, problem.targets, problem.ref, **options, **how)
        np.testing.assert_allclose(to_numpy(found.loss), exact.loss, rtol=1e-9, err_msg=str(how))
        for a, b in zip(torch.autograd.grad(found.loss, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    if "z_loss_weight" not in options:
        lengths = (problem.targets != -100).sum(-1).double()
        logps = out.logps.detach().requires_grad_()
        alone = dpo_fast.preference_loss(logps, problem.ref, lengths=lengths, **options)
        torch.testing.assert_close(alone.loss, out.loss)
        in_numpy = dpo_fast.numpy.preference_loss(
            to_numpy(logps), problem.ref.numpy(), lengths=lengths.numpy(), **as_arrays(options)
        )
        np.testing.assert_allclose(in_numpy.losses, exact.losses, rtol=1e-9)


def test_gradient_through_losses_beside_the_z_loss():
    """The linear head's way back when its early gradients cannot be used."""
    problem = Problem()
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    found = []
    for out in (
        dpo_fast.dpo_loss(hidden @ weight.T, problem.targets, problem.ref, z_loss_weight=0.1),
        dpo_fast.linear_dpo_loss(hidden, weight, problem.targets, problem.ref, z_loss_weight=0.1),
    ):
        found.append(torch.autograd.grad(2 * out.loss + out.losses.sum() + out.logps.sum(), (hidden, weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_worked_values():
    """By hand: ratios -1 and -0.5, beta 1."""
    logps, ref = torch.tensor([-3.0, -2.0]).double(), torch.tensor([-2.0, -1.5]).double()

    def softplus(x):
        return math.log1p(math.exp(x))

    def loss(**options):
        return dpo_fast.preference_loss(logps, ref, beta=1.0, **options).loss.item()

    assert loss() == pytest.approx(softplus(0.5))
    assert loss(dpop_lambda=2.0) == pytest.approx(softplus(0.5 + 2.0))  # the chosen ratio is 1 below the reference
    assert loss(margin=torch.tensor([0.25])) == pytest.approx(softplus(0.75))
    lengths = torch.tensor([7.0, 4.0])
    assert loss(length_penalty=0.1, lengths=lengths) == pytest.approx(softplus(0.5 - 0.3))
    out = dpo_fast.preference_loss(logps, ref, beta=torch.tensor([2.0]))
    assert out.loss.item() == pytest.approx(softplus(1.0))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == (-2.0, -1.0)
    # two logits of 0: lse = log 2
    x, targets = torch.zeros(2, 1, 2), torch.zeros(2, 1, dtype=torch.int64)
    out = dpo_fast.dpo_loss(x, targets, z_loss_weight=3.0)
    assert out.loss.item() == pytest.approx(math.log(2) + 3 * math.log(2) ** 2)
    assert dpo_fast.token_logps(x, targets, outputs=("lse",)).lse[0, 0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "strided", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_lse_and_valid_vocab(dtype, layout, inplace, isa):
    case = make_case(layout, (4, 7, 507), dtype)
    valid, targets = 300, case.targets
    targets[targets != -100] %= valid
    options = {"softcap": 20.0, "temperature": 0.8, "valid_vocab": valid}
    leaf = case.leaf.clone()
    with torch.no_grad():
        case.view(leaf)[..., valid:] = float("nan")  # padding is not read
    x = case.view(leaf.requires_grad_()) * 1
    out = dpo_fast.token_logps(
        x, targets, outputs=("logps", "lse", "mean_logits", "is_top1"), inplace_backward=inplace, **options
    )
    arrays = np.nan_to_num(to_numpy(case.view(case.leaf)))
    exact = reference.token_logps(arrays, targets.numpy(), **options)
    for name in ("logps", "lse", "mean_logits", "is_top1"):
        np.testing.assert_allclose(
            to_numpy(getattr(out, name)), getattr(exact, name), rtol=2e-6, atol=2e-6, err_msg=name
        )
    g = torch.linspace(-1, 1, targets.numel(), dtype=out.lse.dtype).reshape(targets.shape)
    [grad] = torch.autograd.grad([out.logps, out.lse], x, [g, 0.5 * g])
    exact_grad = reference.token_logps_grad(arrays, targets.numpy(), g.numpy(), None, 0.5 * g.numpy(), **options)
    np.testing.assert_allclose(
        to_numpy(grad), exact_grad, atol=1e-6 + torch.finfo(dtype).eps * np.abs(exact_grad).max()
    )
    assert (grad[..., valid:] == 0).all()


def test_valid_vocab_of_a_padded_head():
    """As the first rows of the head alone; the padding's gradient is 0."""
    problem, valid = Problem(), V - 5
    hidden, weight, bias = problem.hidden, problem.weight.clone(), torch.randn(V, dtype=torch.float64)
    weight[valid:] = 7.0
    found, expected = [], []
    for head, options, out in ((weight, {"valid_vocab": valid}, found), (weight[:valid], {}, expected)):
        w, b = head.clone().requires_grad_(), bias[: len(head)].clone().requires_grad_()
        loss = dpo_fast.linear_dpo_loss(hidden, w, problem.targets, problem.ref, bias=b, **options).loss
        tokens = dpo_fast.linear_token_logps(
            hidden, w, problem.targets, b, outputs=("lse",), memory_budget=1, **options
        )
        (loss + tokens.lse.square().sum()).backward()
        out += [loss.detach(), w.grad, b.grad]
    torch.testing.assert_close(found[0], expected[0])
    for padded, grad in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(padded[:valid], grad)
        assert (padded[valid:] == 0).all()
    bad = problem.targets.clone()
    bad[0, 1] = valid
    with pytest.raises(IndexError, match=rf"target {valid} at position \[0, 1\]"):
        dpo_fast.linear_token_logps(hidden, weight, bad, valid_vocab=valid)


def test_bfloat16_references_give_the_rewards_of_torch():
    """The rule when sums are rounded is in the kernels alone: NumPy's rewards are torch's."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, targets = torch.randn(4, 60, 50), torch.randint(0, 50, (4, 60))
    ref = torch.randn(4).mul(100).bfloat16()
    array = ref.float().numpy().astype(ml_dtypes.bfloat16)
    out = dpo_fast.dpo_loss(x, targets, ref)
    in_numpy = dpo_fast.numpy.dpo_loss(x.numpy(), targets.numpy(), array)
    assert np.array_equal(out.chosen_rewards.numpy(), in_numpy.chosen_rewards)
    assert np.array_equal(out.losses.numpy(), in_numpy.losses)


def test_an_empty_microbatch():
    """No pairs, but num_pairs: loss 0, gradients 0; without it there is no loss."""
    x = torch.randn(2, 3, 5, requires_grad=True)
    targets, none = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
    weight = torch.randn(7, 5, requires_grad=True)
    for loss in (
        dpo_fast.dpo_loss(x, targets, pairs=none, num_pairs=4).loss,
        dpo_fast.linear_dpo_loss(x, weight, targets, pairs=none, num_pairs=4).loss,
        dpo_fast.linear_dpo_loss(x, weight, targets, pairs=none, num_pairs=4, compact=False).loss,
        dpo_fast.preference_loss(x[:, 0, 0], pairs=none, num_pairs=4).loss,
        dpo_fast.dpo_loss(x[:0], targets[:0], num_pairs=4).loss,
    ):
        assert loss.item() == 0
        [grad] = torch.autograd.grad(loss, x)
        assert (grad == 0).all()
    assert dpo_fast.numpy.preference_loss(np.zeros(2), pairs=none.numpy(), num_pairs=4).loss == 0
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}):
        with pytest.raises(ValueError, match="there are no pairs"):
            dpo_fast.dpo_loss(x, targets, pairs=none, **options)


@pytest.mark.parametrize("more", [{}, {"outputs": ("entropy",)}, {"wpo": True}], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_z_loss_beside_an_ld_alpha_of_0(average, more):
    """It is over all tokens, whatever else is asked for: an ld_alpha of 0 is the limit of small ones."""
    problem = Problem()
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    logits = (hidden @ weight.T).detach().requires_grad_()
    options = {"ld_alpha": 0.0, "z_loss_weight": 0.1, "average": average, **more}
    known = {k: v for k, v in options.items() if k != "outputs"}
    args = (to_numpy(logits), problem.targets.numpy(), problem.ref.numpy())
    exact, exact_grad = reference.dpo_loss(*args, **known), reference.dpo_loss_grad(*args, **known)
    out = dpo_fast.dpo_loss(logits, problem.targets, problem.ref, **options)
    np.testing.assert_allclose(out.loss.item(), exact.loss, rtol=1e-9)
    [grad] = torch.autograd.grad(out.loss, logits)
    np.testing.assert_allclose(to_numpy(grad), exact_grad, rtol=1e-8, atol=1e-12)
    expected = torch.autograd.grad(hidden @ weight.T, (hidden, weight), torch.tensor(exact_grad))
    for how in ({}, {"memory_budget": 1}):
        found = dpo_fast.linear_dpo_loss(hidden, weight, problem.targets, problem.ref, **options, **how)
        np.testing.assert_allclose(found.loss.item(), exact.loss, rtol=1e-9)
        for a, b in zip(torch.autograd.grad(found.loss, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)

"""The linear head: every level against the reference and the plain product, for any budget; what is kept and what not."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from helpers import (
    assert_accurate,
    naive_dpo_loss,
    naive_entropy,
    naive_sequence_logps,
    naive_token_logps,
    peak_growth,
    random_pairs,
    to_numpy,
)

import dpo_fast
from dpo_fast import reference
from dpo_fast._torch import head as head_module
from dpo_fast._torch import linear as linear_operators
from dpo_fast._torch import tiles as tiling
from dpo_fast._torch.operators import HEAD_INPUTS

S, T, H, V, R = 4, 9, 16, 507, 3
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# bytes: everything in one tile; a few tiles, some kept; a row or so at a time
BUDGETS = (None, 12 * V * 4, 1)


@pytest.fixture(autouse=True)
def _small_row_groups(monkeypatch):
    monkeypatch.setattr(tiling, "ROW_GROUP", 2)


class Problem:
    """Hidden states, a head with bias and LoRA, targets; and the same logits by plain products."""

    def __init__(self, dtype, packed=False, seed=0):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=g)).to(dtype)

        self.tensors = [randn(S, T, H), randn(V, H, scale=0.5), randn(V), randn(R, H), randn(V, R, scale=0.5)]
        self.targets = torch.randint(0, V, (S, T), generator=g)
        self.targets[torch.rand(S, T, generator=g) < 0.4] = -100
        self.cu_seqlens, self.n_seqs = None, S
        if packed:
            self.tensors[0] = self.tensors[0].reshape(S * T, H)
            self.targets = self.targets.reshape(-1)
            self.cu_seqlens, self.n_seqs = torch.tensor([0, 0, 10, 20, 36], dtype=torch.int32), 4
        self.ref = torch.randn(self.n_seqs, generator=g)
        self.weights = torch.rand(self.targets.shape, generator=g)
        self.weights[self.weights < 0.2] = 0

    def leaves(self):
        return [tensor.clone().requires_grad_() for tensor in self.tensors]

    @staticmethod
    def head(leaves):
        hidden, weight, bias, a, b = leaves
        return {"hidden": hidden, "weight": weight, "bias": bias, "lora": (a, b, 0.7)}

    @staticmethod
    def logits(leaves):
        """The same-type torch expression."""
        hidden, weight, bias, a, b = leaves
        rows = hidden.reshape(-1, H)
        logits = torch.addmm(torch.nn.functional.linear(rows, weight, bias), rows @ a.T, b.T, alpha=0.7)
        return logits.reshape(*hidden.shape[:-1], len(weight))


def exact_gradients(problem, grad_logits):
    """Gradients of the five tensors from that of the logits, in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in problem.tensors]
    Problem.logits(leaves).backward(torch.tensor(grad_logits))
    return [leaf.grad.numpy() for leaf in leaves]


def assert_gradients(found, exact, naive, dtype, budget):
    tiles = S * T if budget == 1 else 4  # at most
    for name, x, value, other in zip(HEAD_INPUTS, found, exact, naive, strict=True):
        assert x.grad.dtype == dtype
        assert_accurate(x.grad, value, other.grad, dtype, name, roundings=tiles)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_token_logps(dtype, compact, budget):
    problem = Problem(dtype)
    leaves, plain = problem.leaves(), problem.leaves()
    outputs = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    head = Problem.head(leaves)
    out = dpo_fast.linear_token_logps(
        head.pop("hidden"),
        head.pop("weight"),
        problem.targets,
        **head,
        outputs=outputs,
        memory_budget=budget,
        compact=compact,
    )
    g = torch.linspace(-1, 1, S * T, dtype=out.logps.dtype).reshape(S, T)
    torch.autograd.backward([out.logps, out.entropy], [g, 0.3 * g])
    z = Problem.logits(plain)
    logps, entropy = naive_token_logps(z, problem.targets), naive_entropy(z, problem.targets)
    torch.autograd.backward([logps, entropy], [g, 0.3 * g])

    exact_logits = to_numpy(Problem.logits([t.double() for t in problem.tensors]))
    exact = reference.token_logps(exact_logits, problem.targets.numpy())
    assert_accurate(out.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(out.entropy, exact.entropy, entropy, dtype, "entropy")
    assert_accurate(out.log_sum_sq_probs, exact.log_sum_sq_probs, logps, dtype, "log_sum_sq_probs")
    assert (out.is_top1 == torch.tensor(exact.is_top1)).float().mean() > (0.99 if dtype.itemsize >= 4 else 0.9)
    grad = reference.token_logps_grad(exact_logits, problem.targets.numpy(), to_numpy(g), to_numpy(0.3 * g))
    assert_gradients(leaves, exact_gradients(problem, grad), plain, dtype, budget)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_dpo_loss(dtype, packed, layout, budget):
    problem = Problem(dtype, packed)
    pairs = random_pairs(problem.n_seqs) if layout == "pairs" else None
    index = torch.tensor(reference.pair_index(problem.n_seqs, None)) if pairs is None else pairs
    leaves, plain = problem.leaves(), problem.leaves()
    head = Problem.head(leaves)
    out = dpo_fast.linear_dpo_loss(
        head.pop("hidden"),
        head.pop("weight"),
        problem.targets,
        problem.ref,
        **head,
        pairs=pairs,
        cu_seqlens=problem.cu_seqlens,
        memory_budget=budget,
    )
    (2.5 * out.loss).backward()
    logps = naive_sequence_logps(Problem.logits(plain), problem.targets, problem.cu_seqlens)
    loss = naive_dpo_loss(logps, problem.ref, index)
    (2.5 * loss).backward()

    exact_logits = to_numpy(Problem.logits([t.double() for t in problem.tensors]))
    options = {
        "pairs": None if pairs is None else pairs.numpy(),
        "cu_seqlens": None if not packed else problem.cu_seqlens.numpy(),
    }
    exact = reference.dpo_loss(exact_logits, problem.targets.numpy(), problem.ref.numpy(), **options)
    assert_accurate(out.logps, exact.logps, logps, dtype, "logps")
    assert_accurate(out.loss, exact.loss, loss, dtype, "loss")
    grad = reference.dpo_loss_grad(exact_logits, problem.targets.numpy(), problem.ref.numpy(), **options)
    assert_gradients(leaves, [2.5 * g for g in exact_gradients(problem, grad)], plain, dtype, budget)
    alone = [t.detach() for t in leaves]
    head = Problem.head(alone)
    seq = dpo_fast.linear_sequence_logps(
        head.pop("hidden"),
        head.pop("weight"),
        problem.targets,
        **head,
        cu_seqlens=problem.cu_seqlens,
        memory_budget=budget,
    )
    torch.testing.assert_close(seq, out.logps.detach(), rtol=1e-6, atol=1e-5 if dtype is not torch.float64 else 1e-12)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference_from", ["none", "logps", "hidden", "other hidden"])
def test_options_together(reference_from, average, reduction, budget):
    """Weights, average, transform, smoothing, reference; gradients into loss, losses and logps at once; float64."""
    problem = Problem(torch.float64)
    pairs = torch.tensor([[0, 1], [0, 2], [3, 1]])
    options = {
        "average": average,
        "label_smoothing": 0.1,
        "reduction": reduction,
        "beta": 0.7,
        "softcap": 9.0,
        "temperature": 0.8,
        "logit_scale": 1.2,
        "token_weights": problem.weights,
        "pairs": pairs,
    }
    g = torch.Generator().manual_seed(3)
    ref_hidden = torch.randn(S, T, 5 if reference_from == "other hidden" else H, generator=g, dtype=torch.float64)
    ref_weight = torch.randn(V, 5, generator=g, dtype=torch.float64)
    ref_bias = torch.randn(V, generator=g, dtype=torch.float64)
    of_head, of_logits = {}, {}
    if reference_from == "logps":
        of_head = of_logits = {"ref_logps": problem.ref}
    elif reference_from == "hidden":
        of_head = {"ref_hidden": ref_hidden}
        of_logits = {"ref_logits": ref_hidden @ problem.tensors[1].T}
    elif reference_from == "other hidden":
        of_head = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        of_logits = {"ref_logits": ref_hidden @ ref_weight.T + ref_bias}

    def scalar(out):
        total = (out.loss * torch.arange(1.0, 4.0)).sum() if reduction == "none" else 1.5 * out.loss
        return total + (out.losses * torch.tensor([0.1, 0.0, -0.2])).sum() + 0.01 * (out.logps * out.logps).sum()

    leaves, plain = problem.leaves(), problem.leaves()
    head = Problem.head(leaves)
    out = dpo_fast.linear_dpo_loss(
        head.pop("hidden"), head.pop("weight"), problem.targets, **head, **of_head, memory_budget=budget, **options
    )
    expected = dpo_fast.dpo_loss(Problem.logits(plain), problem.targets, **of_logits, **options)
    for a, b in zip(out[:5], expected[:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    scalar(out).backward()
    scalar(expected).backward()
    for x, y in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradcheck(budget):
    problem = Problem(torch.float64)
    small = [t[..., :4] if t.dim() > 1 and t.shape[-1] == H else t for t in problem.tensors]
    small = [small[0][:, :3], small[1][:7], small[2][:7], small[3], small[4][:7]]
    targets = problem.targets[:, :3] % 7
    targets[0, 0] = -100
    leaves = [t.clone().requires_grad_() for t in small]

    def token(*leaves):
        head = Problem.head(leaves)
        return dpo_fast.linear_token_logps(
            head.pop("hidden"), head.pop("weight"), targets, **head, outputs=("logps", "entropy"), memory_budget=budget
        )[:2]

    def loss(*leaves):
        head = Problem.head(leaves)
        out = dpo_fast.linear_dpo_loss(
            head.pop("hidden"), head.pop("weight"), targets, problem.ref, **head, memory_budget=budget
        )
        return out.loss, out.logps

    # a second backward makes the logits again and adds up in another order
    assert torch.autograd.gradcheck(token, leaves, nondet_tol=1e-12)
    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("frozen", range(5))
@pytest.mark.parametrize("level", ["token", "dpo"])
def test_frozen_inputs_cost_no_product(level, frozen, monkeypatch):
    """What does not require a gradient gets none, and no product of its size is made."""
    problem = Problem(torch.float64)
    made = []
    real = head_module.HeadSums._sum
    monkeypatch.setattr(
        head_module.HeadSums, "_sum", lambda self, name, *rest: (made.append(name), real(self, name, *rest))[1]
    )
    leaves = problem.leaves()
    leaves[frozen].requires_grad_(False)
    head = Problem.head(leaves)
    if level == "token":
        dpo_fast.linear_token_logps(
            head.pop("hidden"), head.pop("weight"), problem.targets, **head
        ).logps.sum().backward()
    else:
        dpo_fast.linear_dpo_loss(head.pop("hidden"), head.pop("weight"), problem.targets, **head).loss.backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(5)]
    assert HEAD_INPUTS[frozen] not in made
    assert {"weight", "lora_a", "lora_b"} - {HEAD_INPUTS[frozen]} == set(made)


def count_products(monkeypatch):
    """Counts how often a tile's logits are made."""
    counts = {"logits": 0}
    real = head_module.head_logits

    def counting(*args):
        counts["logits"] += 1
        return real(*args)

    monkeypatch.setattr(linear_operators, "head_logits", counting)
    return counts


def test_three_products_when_pairs_fit_and_four_when_not(monkeypatch):
    counts = count_products(monkeypatch)
    problem = Problem(torch.float64)
    row = V * 8
    for budget, forward in ((None, 1), (20 * row, 2), (2 * row, 24)):
        leaves = problem.leaves()
        targets = problem.targets.clone()
        targets[:, :6] = torch.randint(0, V, (S, 6))
        targets[:, 6:] = -100  # six rows in every sequence, twelve in a pair
        counts["logits"] = 0
        out = dpo_fast.linear_dpo_loss(leaves[0], leaves[1], targets, memory_budget=budget)
        assert counts["logits"] == forward
        out.loss.backward()
        assert counts["logits"] == forward  # backward only scales


def test_forward_alone_makes_one_product_and_keeps_nothing(monkeypatch):
    counts = count_products(monkeypatch)
    problem = Problem(torch.float32)
    hidden, weight = problem.tensors[:2]
    with torch.no_grad():
        leaf = weight.clone().requires_grad_()
        out = dpo_fast.linear_dpo_loss(hidden, leaf, problem.targets)
    assert not out.loss.requires_grad
    dpo_fast.linear_sequence_logps(hidden, weight, problem.targets)
    assert counts["logits"] == 2


def test_kept_tiles_are_not_made_again(monkeypatch):
    counts = count_products(monkeypatch)
    problem = Problem(torch.float64)
    n_rows = int((problem.targets != -100).sum())
    for budget, again in ((None, 0), (12 * V * 8, None), (1, n_rows)):
        leaves = problem.leaves()
        counts["logits"] = 0
        out = dpo_fast.linear_token_logps(leaves[0], leaves[1], problem.targets, memory_budget=budget)
        plan = dpo_fast.linear_plan(n_rows, V, torch.float64, memory_budget=budget)
        tiles = tiling.tile_bounds(plan)
        assert counts["logits"] == len(tiles)
        out.logps.sum().backward(retain_graph=True)
        recomputed = sum(start >= plan.kept_rows for start, _, _ in tiles)
        assert counts["logits"] == len(tiles) + recomputed
        assert again is None or (recomputed == 0) == (again == 0)
        # a second backward finds the kept logits overwritten, makes all again, and doubles the gradient
        once = leaves[1].grad.clone()
        out.logps.sum().backward()
        torch.testing.assert_close(leaves[1].grad, 2 * once)


def test_loss_may_be_differentiated_twice_over():
    """retain_graph: the second backward does not reuse what the first gave away."""
    problem = Problem(torch.float64)
    leaves = problem.leaves()
    out = dpo_fast.linear_dpo_loss(leaves[0], leaves[1], problem.targets, problem.ref)
    out.loss.backward(retain_graph=True)
    once = leaves[1].grad.clone()
    (3 * out.loss).backward()
    torch.testing.assert_close(leaves[1].grad, 4 * once)


def test_float16_gradients_do_not_underflow_before_the_loss_scale():
    """A gradient of 1e-9 per logit, times a loss scale of 2^16, is exact, as it would be after a scaled loss."""
    problem = Problem(torch.float16)
    leaves = problem.leaves()
    out = dpo_fast.linear_dpo_loss(leaves[0], leaves[1], problem.targets, beta=1e-6)
    (65536 * out.loss).backward()
    exact_logits = to_numpy(problem.tensors[0].double() @ problem.tensors[1].double().T)
    grad = 65536 * reference.dpo_loss_grad(exact_logits, problem.targets.numpy(), beta=1e-6)
    exact = grad.reshape(-1, V).T @ to_numpy(problem.tensors[0].double()).reshape(-1, H)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(to_numpy(leaves[1].grad) / scale, exact / scale, atol=0.02)


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_rows_stay_connected(budget):
    problem = Problem(torch.float32)
    leaves = problem.leaves()
    targets = torch.full_like(problem.targets, -100)
    loss = dpo_fast.linear_dpo_loss(leaves[0], leaves[1], targets, memory_budget=budget).loss
    loss = loss + dpo_fast.linear_token_logps(leaves[0], leaves[1], targets, memory_budget=budget).logps.sum()
    assert loss.item() == pytest.approx(np.log(2))
    loss.backward()
    assert (leaves[0].grad == 0).all()
    assert (leaves[1].grad == 0).all()
    empty = torch.zeros(0, H, requires_grad=True)
    dpo_fast.linear_token_logps(empty, leaves[1], torch.zeros(0, dtype=torch.int64)).logps.sum().backward()
    assert empty.grad.shape == (0, H)


def test_results_do_not_depend_on_the_budget_beyond_rounding():
    problem = Problem(torch.bfloat16)
    results = []
    for budget in BUDGETS:
        leaves = problem.leaves()
        out = dpo_fast.linear_dpo_loss(leaves[0], leaves[1], problem.targets, problem.ref, memory_budget=budget)
        out.loss.backward()
        results.append((out.loss, leaves[0].grad, leaves[1].grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=1e-4)


def test_many_bfloat16_tiles_do_not_drift():
    """Weight gradients of 200 tiles are as exact as that of one: the sum is float32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 200, 8, generator=g).bfloat16(), torch.randn(33, 8, generator=g).bfloat16()
    targets = torch.randint(0, 33, (2, 200), generator=g)
    exact_logits = to_numpy(hidden.double() @ weight.double().T)
    grad = reference.token_logps_grad(exact_logits, targets.numpy(), np.ones((2, 200)))
    exact = grad.reshape(-1, 33).T @ to_numpy(hidden.double()).reshape(-1, 8)
    errors = []
    for budget in (None, 1):
        leaf = weight.clone().requires_grad_()
        dpo_fast.linear_token_logps(hidden, leaf, targets, memory_budget=budget).logps.sum().backward()
        errors.append(np.abs(to_numpy(leaf.grad) - exact).max())
    assert errors[1] < 1.5 * errors[0]


def test_autocast():
    """float32 parameters under bfloat16 autocast: bfloat16 products, float32 gradients, as the plain head has."""
    problem = Problem(torch.float32)
    leaves, plain = problem.leaves(), problem.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dpo_fast.linear_dpo_loss(leaves[0], leaves[1], problem.targets, problem.ref, bias=leaves[2]).loss
        logits = torch.nn.functional.linear(plain[0], plain[1], plain[2])
        assert logits.dtype == torch.bfloat16
        expected = dpo_fast.dpo_loss(logits, problem.targets, problem.ref).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-3)
    for x, y in zip(leaves[:3], plain[:3], strict=True):
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, y.grad, rtol=0.02, atol=2e-3)


def test_compiled_step():
    problem = Problem(torch.float32)

    def step(hidden, weight):
        out = dpo_fast.linear_dpo_loss(hidden, weight, problem.targets, problem.ref)
        logps = dpo_fast.linear_token_logps(hidden, weight, problem.targets).logps
        return out.loss + 0.01 * logps.sum()

    torch._dynamo.reset()
    leaves, other = problem.leaves(), problem.leaves()
    expected, found = step(*leaves[:2]), torch.compile(step, fullgraph=True)(*other[:2])
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    for x, y in zip(leaves[:2], other[:2], strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_bad_input():
    problem = Problem(torch.float32)
    hidden, weight, bias, a, b = problem.tensors
    y = problem.targets
    f = dpo_fast.linear_token_logps
    cases = [
        (ValueError, r"hidden must have shape \[S, T, H\].*found \(16,\)", lambda: f(hidden[0, 0], weight, y[0, 0])),
        (ValueError, r"weight must have shape \(507, 16\).*found \(507, 15\)", lambda: f(hidden, weight[:, :15], y)),
        (ValueError, r"bias must have shape \(507,\).*found \(506,\)", lambda: f(hidden, weight, y, bias[1:])),
        (ValueError, r"lora_b must have shape \(507, 3\).*found \(507, 2\)", lambda: f(hidden, weight, y, lora=(a, b[:, :2], 1))),
        (TypeError, r"weight and hidden must have one type, found torch.float64 and torch.float32", lambda: f(hidden, weight.double(), y)),
        (TypeError, r"hidden must be one of.*found torch.int64", lambda: f(hidden.long(), weight, y)),
        (TypeError, r"targets must be integers", lambda: f(hidden, weight, y.float())),
        (ValueError, r"targets must have shape \(4, 9\).*found \(4, 8\)", lambda: f(hidden, weight, y[:, 1:])),
        (ValueError, r"memory_budget must be a positive", lambda: f(hidden, weight, y, memory_budget=0)),
        (ValueError, r"weight must be on the device of hidden, cpu, found meta", lambda: f(hidden, weight.to("meta"), y)),
        (IndexError, r"target 507", lambda: f(hidden, weight, torch.full_like(y, 507))),
        (ValueError, r"packed hidden \[N, H\] need cu_seqlens", lambda: dpo_fast.linear_dpo_loss(hidden[0], weight, y[0])),
        (ValueError, r"must be even, found 3", lambda: dpo_fast.linear_dpo_loss(hidden[:3], weight, y[:3])),
        (IndexError, r"pairs\[0, 1\] = 4 is outside \[0, 4\)", lambda: dpo_fast.linear_dpo_loss(hidden, weight, y, pairs=torch.tensor([[0, 4]]))),
        (ValueError, r"ref_logps and ref_hidden exclude", lambda: dpo_fast.linear_dpo_loss(hidden, weight, y, torch.ones(4), ref_hidden=hidden)),
        (ValueError, r"need ref_hidden", lambda: dpo_fast.linear_dpo_loss(hidden, weight, y, ref_weight=weight)),
        (ValueError, r"ref_logps must have shape \(4,\)", lambda: dpo_fast.linear_dpo_loss(hidden, weight, y, torch.ones(3))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak resident memory as Linux reports it")
def test_peak_memory_stays_within_budget_and_gradients():
    """Logits of 400 MB with a budget of 32 MB, in a fresh process."""
    growth = peak_growth("""
    def step(T, V, budget):
        hidden, weight = torch.randn(4, T, 64, requires_grad=True), torch.randn(V, 64, requires_grad=True)
        targets = torch.randint(0, V, (4, T))
        return peak_growth(
            lambda: dpo_fast.linear_dpo_loss(hidden, weight, targets, memory_budget=budget).loss.backward()
        )
    step(8, 1000, 1 << 20)
    print(step(512, 49152, 32 << 20))
    """)
    gradients = 4 * (49152 * 64 + 4 * 512 * 64)
    # products of oneDNN/MKL take scratch of their own, of the size of a packed operand
    assert growth <= (32 << 20) + 2.5 * gradients


def test_partitioned_parameters_are_gathered_in_forward_and_backward(monkeypatch):
    """DeepSpeed ZeRO-3 leaves a parameter empty outside its own module; a stand-in does the same here."""

    class Partitioned(torch.nn.Parameter):
        """A parameter whose data is away unless it is gathered."""

    gathers, recomputed = [], []

    class GatheredParameters:
        def __init__(self, parameters):
            self.parameters = parameters

        def __enter__(self):
            gathers.append(len(self.parameters))
            for p in self.parameters:
                p.data = p.whole

        def __exit__(self, *_):
            for p in self.parameters:
                p.data = p.whole.new_empty(0)

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    problem = Problem(torch.float32)
    hidden, weight = problem.leaves()[:2]
    budget = V * 4 * 40  # not all logits stay until backward
    for loss in (
        lambda h, w: dpo_fast.linear_token_logps(h, w, problem.targets, memory_budget=budget).logps.sum(),
        lambda h, w: dpo_fast.linear_dpo_loss(h, w, problem.targets, problem.ref, memory_budget=budget).loss,
        lambda h, w: dpo_fast.linear_dpo_loss(h, w, problem.targets, problem.ref, reduction="none").loss.sum(),
    ):
        expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        away = Partitioned(torch.empty(0))
        away.whole = weight.detach().clone()
        away.ds_status = types.SimpleNamespace(name="NOT_AVAILABLE")
        gathers.clear()
        value = loss(hidden, away)
        n_forward = len(gathers)
        assert n_forward >= 1
        assert away.numel() == 0
        found = torch.autograd.grad(value, (hidden, away))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
        assert away.numel() == 0
        recomputed.append(len(gathers) > n_forward)
    assert recomputed == [True, False, True]  # gradients made in forward need no head in backward


def test_peak_memory_does_not_grow_with_the_sequence():
    """From T = 1024 to T = 8192 by a few times what hidden states take, while logits would take 32 times as much."""
    peaks = [
        peak_growth(
            f"""
            S, T, H, V, budget = 2, {T}, 64, 8192, 16 << 20
            hidden = torch.randn(S, T, H, requires_grad=True)
            weight = torch.randn(V, H, requires_grad=True)
            targets = torch.randint(0, V, (S, T))
            small = torch.randn(S, 8, H, requires_grad=True)
            dpo_fast.linear_dpo_loss(small, weight, targets[:, :8], memory_budget=budget).loss.backward()
            def step():
                dpo_fast.linear_dpo_loss(hidden, weight, targets, memory_budget=budget).loss.backward()
            print(peak_growth(step))
            """
        )
        for T in (1024, 8192)
    ]
    hidden_bytes = 2 * (8192 - 1024) * 64 * 4
    logits_bytes = 2 * (8192 - 1024) * 8192 * 4
    assert peaks[0] <= (16 << 20) * 1.5 + 8192 * 64 * 4 * 4
    assert peaks[1] - peaks[0] <= 8 * hidden_bytes < logits_bytes / 12


def test_without_compaction_nothing_is_read_on_the_host(monkeypatch):
    """What CUDA graphs need: no value decides a shape or a branch, forward and backward."""
    problem = Problem(torch.float32)
    hidden, weight = problem.leaves()[:2]
    reads = []
    for name in ("item", "tolist", "nonzero", "__bool__", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, o=original, n=name: (reads.append(n), o(t, *a))[1])
    options = {"loss_type": ["sigmoid", "sft"], "wpo": True, "outputs": ("entropy",)}
    for compact in (True, False):
        reads.clear()
        out = dpo_fast.linear_dpo_loss(hidden, weight, problem.targets, problem.ref, compact=compact, **options)
        out.loss.backward()
        assert bool(len(reads)) == compact, reads

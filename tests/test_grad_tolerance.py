"""`grad_tolerance`: what is left out, counted in float64 from the dense softmax, is within the tolerance; errors are within
the bound that follows; what cannot be left out comes out as the exact way gives it."""

from __future__ import annotations

import contextlib

import pytest
import torch

import dpo_fast
from dpo_fast import _cpu
from dpo_fast._torch import head as head_module
from dpo_fast._torch import sparse_head
from dpo_fast._torch import tiles as tiling

# V: several blocks of 512 columns and a rest; H: no multiple of any vector's lanes
N, V, H, R = 48, 1543, 27, 3
ISAS = [name for name, runs in _cpu.isas() if runs]
TOLERANCES = (2**-4, 2**-8, 2**-12)
KINDS = ("peaked", "mixed", "flat", "equal", "one-hot", "tiny target", "minus infinity")


@contextlib.contextmanager
def instruction_set(name):
    before = _cpu.isa()
    _cpu.set_isa(name)
    try:
        yield
    finally:
        _cpu.set_isa(before)


@pytest.fixture(autouse=True)
def _sparse_whatever_pays(monkeypatch):
    monkeypatch.setattr(sparse_head, "_sparse_pays", lambda dtype: True)


@pytest.fixture(params=["sparse rows", "columns"])
def way(request, monkeypatch):
    """Both ways of leaving out, on CPU tensors."""
    if request.param == "columns":
        monkeypatch.setattr(sparse_head, "_add_sparse", sparse_head._add_columns)
        monkeypatch.setattr(sparse_head, "GATHER_BELOW", 1.0)
    return request.param


def problem(kind, dtype=torch.float32, seed=0):
    """Hidden states, weight, bias and targets whose softmax rows are of one kind."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g)
    bias = torch.zeros(V)
    scale = {"flat": 0.02, "equal": 0.0, "one-hot": 60.0, "peaked": 2.0}.get(kind, 1.0)
    if kind == "mixed":
        hidden *= torch.logspace(-2, 1, N).unsqueeze(-1)
    hidden *= scale
    targets = torch.multinomial(torch.softmax(hidden @ weight.T, -1), 1, generator=g).squeeze(-1)
    if kind == "tiny target":
        targets = (hidden @ weight.T).argmin(-1)
    if kind == "minus infinity":
        bias[::3] = -torch.inf
        targets = targets // 3 * 3 + 1
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets.clamp(max=V - 1)


def incoming(seed=1):
    """Gradients over several orders of magnitude, some of them 0."""
    g = torch.Generator().manual_seed(seed)
    grad = torch.randn(N, generator=g) * torch.logspace(-6, 0, N)[torch.randperm(N, generator=g)]
    grad[::11] = 0
    return grad


def gradients(hidden, weight, bias, targets, grad, tolerance, lora=(), **options):
    """The output, and gradients of hidden, weight, bias (and LoRA)."""
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias, *lora)]
    options |= {"lora": (*leaves[3:], 0.7)} if lora else {}
    out = dpo_fast.linear_token_logps(*leaves[:2], targets, leaves[2], grad_tolerance=tolerance, **options)
    out.logps.backward(grad)
    return out, [leaf.grad for leaf in leaves]


def exact_gradient(z, targets, grad):
    """Probabilities and the gradient of the logits, in float64."""
    p = torch.softmax(z.double(), -1)
    dz = -grad.double().unsqueeze(-1) * p
    dz[torch.arange(N), targets] += grad.double()
    return p, dz


def left_out(p, targets, exact, found_dz):
    """The mass of the missing entries of the gradient, by row, and whether the target's entry is missing, too."""
    missing, rows = (found_dz == 0) & (exact != 0), torch.arange(len(p))
    target_missing = missing[rows, targets]
    missing[rows, targets] = False
    return (p * missing).sum(-1), target_missing


def logit_gradient(z, targets, grad, tolerance, **options):
    """The gradient of the logits behind the others: with unit vectors as hidden states, it is the head's gradient."""
    leaf = z.T.contiguous().requires_grad_()
    out = dpo_fast.linear_token_logps(
        torch.eye(len(z), dtype=z.dtype), leaf, targets, grad_tolerance=tolerance, **options
    )
    out.logps.backward(grad)
    return out, leaf.grad.T


def check_guarantee(p, m, grad, tolerance):
    size = grad.double().abs()
    assert (size * m).sum() <= tolerance * size.sum() * (1 + 1e-6)
    over = m > tolerance * (1 + 1e-6)
    assert (size[over] < tolerance * size.mean()).all()


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_guarantee(kind, tolerance, way):
    hidden, weight, bias, targets = problem(kind)
    z, grad = hidden @ weight.T + bias.clamp(min=-1e4), incoming()
    out, dz = logit_gradient(z, targets, grad, tolerance)
    p, exact = exact_gradient(z, targets, grad)
    m, target_missing = left_out(p, targets, torch.where(p > 1e-30, exact, 0), dz)  # below, float32 has no number
    # a log-prob that rounds to 0 has gradient 0
    assert not (target_missing & (exact[torch.arange(N), targets].abs() > 1e-6 * grad.abs())).any()
    check_guarantee(p, m, grad, tolerance)
    share = (grad.double().abs() * m).sum() / grad.double().abs().sum()
    assert abs(out.skipped.double() - share) <= (0.1 * tolerance if way == "columns" else 2e-5)
    kept = dz != 0
    size = grad.abs().unsqueeze(-1).expand_as(dz)[kept]
    assert ((dz[kept] - exact[kept]).abs() <= 1e-4 * exact[kept].abs() + 1e-6 * size).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, kind):
    hidden, weight, bias, targets = problem(kind)
    grad, tolerance = incoming(), 2**-6
    with instruction_set(isa):
        out, found = gradients(hidden, weight, bias, targets, grad, tolerance)
        _, exact = gradients(hidden, weight, bias, targets, grad, 0.0)
    mass = (out.skipped.double() + 1e-6) * grad.double().abs().sum()  # rounding of the mass itself
    bound = mass * weight.double().norm(dim=1).max() + 1e-5 * exact[0].norm()
    assert (found[0].double() - exact[0].double()).norm() <= bound
    # the rows of dWeight: the same mass, times hidden states
    bound = mass * hidden.double().norm(dim=1).max() + 1e-5 * exact[1].norm()
    assert (found[1].double() - exact[1].double()).norm() <= bound
    assert (found[2].double() - exact[2].double()).abs().sum() <= mass + 1e-5 * exact[2].abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_half_types(isa, dtype, way):
    hidden, weight, bias, targets = problem("peaked", dtype)
    grad, tolerance = incoming(), 2**-8
    with instruction_set(isa):
        out, found = gradients(hidden, weight, bias, targets, grad, tolerance)
    assert 0 < out.skipped <= tolerance
    _, exact = gradients(hidden, weight, bias, targets, grad, 0.0)
    mass = out.skipped.double() * grad.double().abs().sum()
    for name, a, b, unit in zip("hwb", found, exact, (weight, hidden, torch.ones(1, 1)), strict=True):
        allowed = mass * unit.double().norm(dim=1).max() + 0.02 * b.double().norm()
        assert a.dtype == dtype
        assert (a.double() - b.double()).norm() <= allowed, name


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_transforms_and_padding(softcap, way):
    hidden, weight, bias, targets = problem("peaked")
    weight[-43:] = 1e3  # columns that do not count
    targets, grad = targets % (V - 43), incoming()
    options = {"softcap": softcap, "temperature": 0.8, "logit_scale": 1.1, "valid_vocab": V - 43}
    out, found = gradients(hidden, weight, bias, targets, grad, 2**-8, **options)
    _, exact = gradients(hidden, weight, bias, targets, grad, 0.0, **options)
    assert 0 < out.skipped <= 2**-8
    slope = 1.1 / 0.8
    mass = out.skipped.double() * grad.double().abs().sum() * slope
    assert (found[0] - exact[0]).norm() <= mass * weight[:-43].norm(dim=1).max() + 1e-5 * exact[0].norm()
    assert (found[1] - exact[1]).norm() <= mass * hidden.norm(dim=1).max() + 1e-5 * exact[1].norm()
    assert not found[1][-43:].any()


def test_lora(way):
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias, targets = problem("peaked")
    lora = torch.randn(R, H, generator=g), 0.1 * torch.randn(V, R, generator=g)
    out, found = gradients(hidden, weight, bias, targets, incoming(), 2**-9, lora)
    _, exact = gradients(hidden, weight, bias, targets, incoming(), 0.0, lora)
    assert 0 < out.skipped <= 2**-9
    for a, b in zip(found, exact, strict=True):
        assert 0 < (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("pair", [(2**-10, 2**-5), (2**-5, 2**-10), (0.0, 2**-5), (2**-5, 0.0)])
def test_each_kind_has_its_own(pair, way):
    hidden, weight, bias, targets = problem("mixed" if way == "sparse rows" else "peaked")
    grad = incoming()
    out, found = gradients(hidden, weight, bias, targets, grad, pair)
    _, exact = gradients(hidden, weight, bias, targets, grad, 0.0)
    size = grad.double().abs().sum()
    for i, unit in enumerate((weight, hidden, torch.ones(1, 1))):
        tolerance = pair[min(i, 1)]
        error = (found[i].double() - exact[i].double()).norm()
        assert error <= (tolerance + 1e-6) * size * unit.double().norm(dim=1).max()
        assert (error == 0) == (tolerance == 0)
    assert min(t for t in pair if t) / 100 < out.skipped <= max(pair)


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_input_costs_nothing(frozen, monkeypatch):
    made = []
    for name in ("sparse_times_table", "sparse_transposed_times_table", "sparse_column_sums"):
        real = getattr(_cpu, name)
        monkeypatch.setattr(_cpu, name, lambda *a, name=name, real=real: (made.append(name), real(*a))[1])
    hidden, weight, bias, targets = problem("peaked")
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate((hidden, weight, bias))]
    out = dpo_fast.linear_token_logps(*leaves[:2], targets, leaves[2], grad_tolerance=2**-6)
    out.logps.backward(incoming())
    names = ["sparse_times_table", "sparse_transposed_times_table", "sparse_column_sums"]
    assert made == names[:frozen] + names[frozen + 1 :]
    assert leaves[frozen].grad is None


def test_not_finite_rows_come_out_as_exact():
    hidden, weight, bias, targets = problem("peaked")
    hidden[3], hidden[8], grad = torch.nan, torch.inf, incoming().clamp(min=1e-3)
    out, found = gradients(hidden, weight, bias, targets, grad, 2**-6)
    _, exact = gradients(hidden, weight, bias, targets, grad, 0.0)
    assert torch.equal(found[0].isnan().any(-1), exact[0].isnan().any(-1))
    assert torch.equal(found[1].isnan(), exact[1].isnan())
    finite = ~exact[0].isnan().any(-1)
    assert (found[0] - exact[0])[finite].norm() <= 0.1 * exact[0][finite].norm()
    assert out.skipped <= 2**-6


def test_a_row_without_a_gradient_is_not_read():
    hidden, weight, bias, targets = problem("peaked")
    grad = incoming()
    hidden[grad == 0] = torch.nan
    _, found = gradients(hidden, weight, bias, targets, grad, 2**-6)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("grad", [torch.full((N,), torch.nan), torch.zeros(N)], ids=["nan", "zero"])
def test_gradients_without_a_size(grad):
    arguments = (*problem("peaked"), grad)
    for a, b in zip(gradients(*arguments, 2**-6)[1], gradients(*arguments, 0.0)[1], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_one_gradient_larger_than_all_others():
    hidden, weight, _, targets = problem("mixed")
    grad = torch.full((N,), 1e-9)
    grad[5] = 1.0
    z = hidden @ weight.T
    _, dz = logit_gradient(z, targets, grad, 2**-7)
    p, exact = exact_gradient(z, targets, grad)
    check_guarantee(p, left_out(p, targets, exact, dz)[0], grad, 2**-7)
    others = torch.arange(N) != 5
    assert ((dz[others] != 0).sum(-1) == 1).all()  # the target alone


@pytest.mark.parametrize("budget", [None, 12 * V * 4, 1])
@pytest.mark.parametrize("level", ["token", "sequence", "dpo", "dpo through logps"])
def test_levels_and_tiles(level, budget, monkeypatch):
    monkeypatch.setattr(tiling, "ROW_GROUP", 2)
    hidden, weight, bias, targets = problem("peaked")
    shape = (4, N // 4)
    targets = targets.view(shape).clone()
    targets[:, -3:] = -100
    found = []
    for tolerance in (0.0, 2**-8):
        leaves = [hidden.view(*shape, H).clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"grad_tolerance": tolerance, "memory_budget": budget, "bias": bias}
        if level == "token":
            out = dpo_fast.linear_token_logps(*leaves, targets, **options)
            out.logps.backward(incoming().view(shape))
        elif level == "sequence":
            dpo_fast.linear_sequence_logps(*leaves, targets, **options).backward(torch.tensor([1.0, -2.0, 0.5, 1.0]))
        else:
            out = dpo_fast.linear_dpo_loss(*leaves, targets, **options)
            if level == "dpo":
                assert tolerance == 0 or out.skipped > 0  # made in forward
                out.loss.backward()
            else:
                (out.loss + out.logps.sum()).backward()
        if tolerance == 0:
            assert level == "sequence" or out.skipped is None
        elif level != "sequence":
            assert 0 < out.skipped <= tolerance
        found.append([leaf.grad for leaf in leaves])
    for exact, sparse in zip(*found, strict=True):
        assert 0 < (exact - sparse).norm() <= 0.02 * exact.norm()


def test_zero_tolerance_is_exact_to_the_bit():
    arguments = (*problem("mixed"), incoming())
    for tolerance in ((0.0, 0.0), (0, 1e-6)):  # below what rounding takes
        for a, b in zip(gradients(*arguments, tolerance)[1], gradients(*arguments, 0.0)[1], strict=True):
            assert torch.equal(a, b)


def test_flat_rows_are_exact_to_the_bit():
    arguments = (*problem("equal"), torch.ones(N))
    out, found = gradients(*arguments, 2**-8)
    assert out.skipped == 0
    for a, b in zip(found, gradients(*arguments, 0.0)[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("statistic", ["entropy", "lse"])
def test_other_gradients_go_the_exact_way(statistic):
    hidden, weight, _, targets = problem("peaked")
    found = []
    for tolerance in (0.0, 2**-6):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = dpo_fast.linear_token_logps(*leaves, targets, outputs=("logps", statistic), grad_tolerance=tolerance)
        torch.autograd.backward([out.logps, getattr(out, statistic)], [incoming(), incoming(2)])
        found.append([leaf.grad for leaf in leaves])
    assert out.skipped == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float64_is_exact():
    arguments = (*problem("peaked", torch.float64), incoming().double())
    out, found = gradients(*arguments, 2**-6)
    assert out.skipped == 0
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(*arguments, 0.0)[1], strict=True))


def test_without_compaction_it_is_exact():
    arguments = (*problem("peaked"), incoming())
    _, found = gradients(*arguments, 2**-6, compact=False)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(*arguments, 0.0, compact=False)[1], strict=True))


def test_any_number_of_threads_gives_the_same_bits():
    arguments = (*problem("peaked"), incoming(), 2**-7)  # no dense rows: the bits of torch's products depend on threads
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(gradients(*arguments)[1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_skipped_is_not_a_number_before_backward():
    hidden, weight, _, targets = problem("peaked")
    out = dpo_fast.linear_token_logps(hidden.requires_grad_(), weight, targets, grad_tolerance=2**-6)
    assert out.skipped.shape == ()
    assert out.skipped.isnan()
    assert dpo_fast.linear_token_logps(hidden.detach(), weight, targets, grad_tolerance=2**-6).skipped is None


def test_where_dense_products_are_faster_it_is_exact(monkeypatch):
    monkeypatch.setattr(sparse_head, "_sparse_pays", lambda dtype: dtype is not torch.bfloat16)
    arguments = (*problem("peaked", torch.bfloat16), incoming())
    out, found = gradients(*arguments, 2**-6)
    assert out.skipped == 0
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(*arguments, 0.0)[1], strict=True))


def test_weights_with_other_strides():
    hidden, weight, bias, targets = problem("peaked")
    grad = incoming()
    _, exact = gradients(hidden, weight, bias, targets, grad, 2**-7)
    leaf = weight.T.contiguous().requires_grad_()
    out = dpo_fast.linear_token_logps(hidden, leaf.T, targets, bias, grad_tolerance=2**-7)
    out.logps.backward(grad)
    assert (leaf.grad.T - exact[1]).norm() <= 0.02 * exact[1].norm()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-0.1, ValueError),
        (1.0, ValueError),
        (float("nan"), ValueError),
        ((0.1,), ValueError),
        ((0.1, 0.1, 0.1), ValueError),
        ((0.1, 2), ValueError),
        (None, TypeError),
        ("0.1", TypeError),
        (True, TypeError),
        (torch.tensor(0.1), TypeError),
        ((0.1, None), TypeError),
    ],
)
@pytest.mark.parametrize("function", ["linear_token_logps", "linear_sequence_logps", "linear_dpo_loss"])
def test_bad_tolerances(function, value, error):
    hidden, weight, _, targets = problem("peaked")
    with pytest.raises(error, match="grad_tolerance"):
        getattr(dpo_fast, function)(hidden.view(4, -1, H), weight, targets.view(4, -1), grad_tolerance=value)


def test_sums_name_every_accumulator():
    assert {name for names in sparse_head.KINDS.values() for name in names} == set(head_module.HEAD_INPUTS)

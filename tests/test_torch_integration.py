"""The operators under torch's own tools: gradcheck, opcheck, torch.compile, autocast, fake tensors, TRL's signature."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_accurate, make_case, naive_token_logps, random_pairs, to_numpy
from operator_calls import call, recorded
from torch._subclasses.fake_tensor import FakeTensorMode

import dpo_fast
from dpo_fast import _native, ops, reference  # ops defines torch.ops.dpo_fast
from dpo_fast._checks import LogitOptions
from dpo_fast._loss.options import LOSS_TYPES, PairNumbers, choose_loss
from dpo_fast._torch.operators import (
    DPO_FORWARD,
    OPERATORS,
    ROWS_BACKWARD,
    DPOForward,
    Grads,
    Pairs,
    Rows,
    RowsBackward,
    Saved,
    Sequences,
    flatten,
    parse,
)

CALLS = recorded()


@pytest.mark.parametrize("i", range(len(CALLS)), ids=lambda i: f"{i}-{CALLS[i][0]}")
def test_opcheck(i):
    name, args = CALLS[i]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "kto" not in [LOSS_TYPES[k] for arg in args if isinstance(arg, list) for k in arg if isinstance(k, int)]:
        utils.append("test_aot_dispatch_dynamic")  # which takes the NaN of an absent side's reward for a difference
    torch.library.opcheck(getattr(torch.ops.dpo_fast, name).default, args, test_utils=utils)


def test_calls_cover_every_operator():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dpo_fast::")}
    assert {name.split(".")[0] for name in defined} == {name for name, _ in CALLS} == set(ops.SCHEMAS)


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_parse_undoes_flatten(name):
    operator = next(operator for operator in OPERATORS if operator.name == name)
    args = next(args for found, args in CALLS if found == name)[1:]
    record = parse(operator.arguments, iter(args))
    assert isinstance(record, operator.arguments)
    for a, b in zip(flatten(record), args, strict=True):
        assert a is b or (isinstance(b, list) and list(a) == b)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "strided", "expanded"])
def test_gradcheck(layout, options):
    case = make_case(layout, (4, 3, 5), torch.float64, spread=1.0)
    leaf = case.leaf.requires_grad_()
    cu, targets, pairs = case.cu_seqlens, case.targets, random_pairs(case.n_seqs)
    ref = torch.randn(case.n_seqs, dtype=torch.float64)
    weights = torch.rand(targets.shape, dtype=torch.float64)

    def token(x):
        out = dpo_fast.token_logps(case.view(x), targets, outputs=("logps", "entropy", "lse"), **options)
        return out.logps, out.entropy, out.lse

    def sequence(x):
        return dpo_fast.sequence_logps(
            case.view(x), targets, cu_seqlens=cu, token_weights=weights, average=True, **options
        )

    def loss(x):
        out = dpo_fast.dpo_loss(
            case.view(x),
            targets,
            ref,
            pairs=pairs,
            cu_seqlens=cu,
            label_smoothing=0.1,
            beta=0.6,
            z_loss_weight=0.2,
            **options,
        )
        return out.loss, out.losses, out.logps

    for function in (token, sequence, loss):
        assert torch.autograd.gradcheck(function, (leaf,))
    logps = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dpo_fast.preference_loss(x, label_smoothing=0.2, beta=2.0)[:2], (logps,))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for index in (torch.tensor([0, 5, 2]), torch.tensor([[0, 1], [5, 5], [2, 2]])):
        assert torch.autograd.gradcheck(lambda x, i=index: dpo_fast.selective_log_softmax(x, i, 0.7), (x,))


@pytest.mark.parametrize(
    "function", ["dpo_loss", "sequence_logps", "token_logps", "linear_dpo_loss", "preference_loss"]
)
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivative_raises(function, power):
    """Never a silent zero, whether or not the incoming gradient depends on the input."""
    x, targets = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    call = {
        "dpo_loss": lambda: dpo_fast.dpo_loss(x, targets).loss,
        "sequence_logps": lambda: dpo_fast.sequence_logps(x, targets).sum(),
        "token_logps": lambda: dpo_fast.token_logps(x, targets).logps.sum(),
        "linear_dpo_loss": lambda: dpo_fast.linear_dpo_loss(x, torch.ones(7, 5), targets).loss,
        "preference_loss": lambda: dpo_fast.preference_loss(x[:, 0, 0]).loss,
    }[function]
    (grad,) = torch.autograd.grad(call() ** power, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(call() + grad.pow(2).sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_second_derivative_beside_the_logits_raises():
    """Of what the logits were made from as well."""
    x, w = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    targets = torch.zeros(2, 3, dtype=torch.int64)
    (grad,) = torch.autograd.grad(dpo_fast.dpo_loss(x @ w, targets).loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grad.pow(2).sum(), x)


def test_inplace_under_compile_spares_the_logits():
    """A compiled graph has no version counters: there the gradient is allocated, and other uses of the logits are right."""
    x, w = torch.randn(2, 3, 7), torch.randn(7, 7)
    targets = torch.randint(0, 7, (2, 3))

    def step(w, inplace):
        z = torch.tanh(x @ w)
        return (z * z).sum() + dpo_fast.dpo_loss(z, targets, inplace_backward=inplace).loss, z

    torch._dynamo.reset()
    grads = []
    for function, inplace in ((step, False), (torch.compile(step, fullgraph=True), True)):
        leaf = w.clone().requires_grad_()
        function(leaf, inplace)[0].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_compile_with_a_changing_beta_and_shape():
    torch._dynamo.reset()
    step = torch.compile(lambda x, t, b: dpo_fast.dpo_loss(x, t, beta=b).loss, fullgraph=True, dynamic=True)
    for T, beta in ((3, 0.1), (5, 0.2), (8, 0.3)):
        x, targets = torch.randn(2, T, 7), torch.randint(0, 7, (2, T))
        torch.testing.assert_close(step(x, targets, beta), dpo_fast.dpo_loss(x, targets, beta=beta).loss)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step_gives_the_same_numbers(inplace, dtype):
    """A small model's step under torch.compile(fullgraph=True): losses, metrics and the model's gradients."""
    hidden = torch.randn(4, 6, 16).to(dtype)
    weight = torch.randn(33, 16).to(dtype)
    targets = torch.randint(0, 33, (4, 6))
    targets[:, :2] = -100
    ref = torch.randn(4)

    def step(hidden, weight):
        logits = hidden @ weight.T
        out = dpo_fast.dpo_loss(logits, targets, ref, inplace_backward=inplace)
        logps = dpo_fast.sequence_logps(logits.detach(), targets, average=True)
        return out.loss, out.chosen_rewards, logps

    def run(function):
        w = weight.clone().requires_grad_()
        out = function(hidden, w)
        out[0].backward()
        return (*out, w.grad)

    torch._dynamo.reset()
    expected, found = run(step), run(torch.compile(step, fullgraph=True))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_token_level():
    x, targets = torch.randn(3, 5, 40), torch.randint(0, 40, (3, 5))

    def f(x):
        out = dpo_fast.token_logps(x, targets, outputs=("logps", "entropy", "is_top1"), temperature=0.9)
        return (
            (out.logps * out.is_top1).sum() - 0.1 * out.entropy.sum() + dpo_fast.selective_log_softmax(x, targets).sum()
        )

    torch._dynamo.reset()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(a).backward()
    torch.compile(f, fullgraph=True)(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_fake_cuda_tensors():
    """Shapes and types are known without a device (no autograd: torch without CUDA has none for such tensors)."""
    with FakeTensorMode():
        x = torch.empty(4, 6, 1000, dtype=torch.bfloat16, device="cuda")
        targets = torch.zeros(4, 6, dtype=torch.int64, device="cuda")
        out = dpo_fast.dpo_loss(x, targets)
        assert out.losses.shape == (2,)
        assert out.loss.device.type == "cuda"
        assert out.logps.dtype == torch.float32
        rows, seqs = Rows(targets, None, None, LogitOptions()), Sequences(None, False)
        pairs = Pairs(None, PairNumbers(), None, choose_loss().options, 0.0)
        forward = call(DPO_FORWARD, x, DPOForward(rows, seqs, pairs, None, False, 0, True))
        loss, pair_grads, logps, stats, seq_saved = (forward[i] for i in (0, 4, 6, 7, 9))
        assert (seq_saved.shape == (4, 4)) == _native.has_cuda_kernels()  # the CUDA kernels keep it of each sequence
        saved = Saved(logps, stats, None, pair_grads, seq_saved)
        grad = call(ROWS_BACKWARD, x, RowsBackward(rows, seqs, None, 0.0, saved, Grads(loss=loss)))
        assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)


def test_tracing_with_fake_cuda_tensors():
    """A graph over CUDA tensors can be traced where there is none: each level is one operator in it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x, weight, targets, ref):
        losses = dpo_fast.dpo_loss(x @ weight.T, targets, ref, loss_type=["sigmoid", "sft"], wpo=True).losses
        return losses + dpo_fast.linear_dpo_loss(x, weight, targets, ref).losses + dpo_fast.preference_loss(ref).losses

    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(4, 6, 16, device="cuda"), torch.empty(1000, 16, device="cuda")
        targets, ref = torch.zeros(4, 6, dtype=torch.int64, device="cuda"), torch.empty(4, device="cuda")
        graph = make_fx(step)(x, weight, targets, ref)
    found = [str(node.target) for node in graph.graph.nodes if "dpo_fast" in str(node.target)]
    assert found == ["dpo_fast.dpo_forward.default", "dpo_fast.linear_dpo_forward.default", "dpo_fast.preference_forward.default"]  # fmt: skip
    assert next(node for node in graph.graph.nodes if node.op == "output").args[0].meta["val"].device.type == "cuda"


def test_autocast_and_gradient_accumulation():
    """A bfloat16 head under autocast, two microbatches; the gradients add up as with the plain expression."""
    head = torch.nn.Linear(16, 33)
    hidden, targets = torch.randn(2, 4, 6, 16), torch.randint(0, 33, (2, 4, 6))

    def grads(loss):
        head.zero_grad()
        for h, t in zip(hidden, targets, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits = head(h)
                assert logits.dtype == torch.bfloat16
                loss(logits, t).backward()
        return head.weight.grad.clone()

    def naive(logits, t):
        logps = naive_token_logps(logits, t).sum(-1)
        return -torch.nn.functional.logsigmoid(0.1 * (logps[:2] - logps[2:])).mean()

    fast = grads(lambda logits, t: dpo_fast.dpo_loss(logits, t, inplace_backward=True).loss)
    torch.testing.assert_close(fast, grads(naive), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [None, 3])
def test_selective_log_softmax(dtype, k, isa):
    """TRL's signature: rank 1 to 4, one index or K per row (repeated ones too), masks, strided logits."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for lead in ((), (6,), (2, 3), (2, 2, 3)):
        base = torch.randn(*lead, 600).to(dtype).requires_grad_()
        x = base[..., 3:510]
        index = torch.randint(0, 507, lead if k is None else (*lead, k))
        if k is not None:
            index[..., 2] = index[..., 0]
        mask = torch.rand(index.shape) < 0.6
        for row_mask in (None, mask, mask.int()):
            base.grad = None
            out = dpo_fast.selective_log_softmax(x, index, 0.7, row_mask, dtype=wide)
            own = dpo_fast.selective_log_softmax(x, index, 0.7, row_mask)
            assert own.dtype == dtype
            assert torch.equal(own, out.to(dtype))  # rounded once
            g = torch.randn_like(out)
            out.backward(g)
            exact = reference.selective_log_softmax(
                to_numpy(x), index.numpy(), 0.7, None if row_mask is None else row_mask.numpy()
            )
            assert_accurate(out, exact, None, dtype)
            found = base.grad[..., 3:510]
            leaf = torch.tensor(to_numpy(x).astype(float), requires_grad=True)
            logp = torch.log_softmax(leaf / 0.7, -1)
            picked = logp.gather(-1, index if k is not None else index.unsqueeze(-1)).reshape(index.shape)
            if row_mask is not None:
                picked = picked.masked_fill(row_mask == 0, 0)
            picked.backward(g.double())
            assert_accurate(found, leaf.grad.numpy(), None, dtype)
            assert (base.grad[..., :3] == 0).all()


def test_masked_entries_may_hold_any_index():
    x = torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, True]] * 2)
    index = torch.where(mask, torch.ones(2, 3, dtype=torch.int64), -100)
    out = dpo_fast.selective_log_softmax(x, index, row_mask=mask)
    assert (out[~mask] == 0).all()
    wide = dpo_fast.selective_log_softmax(x, index.unsqueeze(-1), row_mask=mask.unsqueeze(-1))
    assert torch.equal(wide.squeeze(-1), out)


def test_outputs_may_be_changed_in_place():
    """What backward needs is its own."""
    x, targets = torch.randn(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    logps = dpo_fast.token_logps(x, targets).logps
    logps *= 2
    logps.sum().backward()
    exact = reference.token_logps_grad(to_numpy(x), targets.numpy(), 2 * torch.ones(2, 3).numpy())
    assert_accurate(x.grad, exact, None, torch.float32)


def test_integer_types_of_targets():
    x = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 4], [0, 2, 3]])
    expected = dpo_fast.token_logps(x, targets).logps
    for dtype in (torch.int32, torch.int16, torch.int8):
        assert torch.equal(dpo_fast.token_logps(x, targets.to(dtype)).logps, expected)
    strided = torch.stack([targets, targets], -1)[..., 0]
    assert torch.equal(dpo_fast.token_logps(x, strided).logps, expected)
    assert torch.equal(dpo_fast.token_logps(x, targets.masked_fill(targets == -100, 9), ignore_index=9).logps, expected)

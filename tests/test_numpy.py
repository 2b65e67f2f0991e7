"""dpo_fast.numpy: the same numbers as the torch functions, bit for bit, and gradients on request."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import SLACK, make_case, random_pairs, to_numpy

import dpo_fast
import dpo_fast.numpy as dn
from dpo_fast import reference

pytestmark = pytest.mark.cpu_only

TYPES = {
    "float32": (np.float32, torch.float32),
    "float64": (np.float64, torch.float64),
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
}
SHAPES = ((1, 1, 1), (3, 7, 33), (2, 2, 2049), (4, 1, 40000))


def as_array(x, dtype):
    """Tensor view -> array with the same strides."""
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(dtype)
    return x.numpy()


def same_bits(array, tensor):
    np.testing.assert_array_equal(np.asarray(array).astype(np.float64), to_numpy(tensor).astype(np.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "strided", "every_second", "transposed", "expanded"])
@pytest.mark.parametrize("name", TYPES)
def test_same_bits_as_torch(name, layout, shape, isa):
    dtype, torch_dtype = TYPES[name]
    case = make_case(layout, shape, torch_dtype)
    x, targets = case.logits(), case.targets
    # bfloat16 views go through int16, whose strides are the same
    array = as_array(case.view(case.leaf), dtype)
    outputs = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse")
    g = torch.linspace(-1, 1, targets.numel()).reshape(targets.shape)

    out = dpo_fast.token_logps(x, targets, outputs=outputs, softcap=7.0)
    incoming = [factor * g.to(out.logps.dtype) for factor in (1, 0.5, 0.25)]
    torch.autograd.backward([out.logps, out.entropy, out.lse], incoming)
    grads = {f"grad_{name}": a.numpy() for name, a in zip(("logps", "entropy", "lse"), incoming, strict=True)}
    found, grad = dn.token_logps(array, targets.numpy(), outputs=outputs, softcap=7.0, **grads)
    for key in outputs:
        same_bits(getattr(found, key), getattr(out, key))
    assert grad.dtype == dtype
    same_bits(grad, x.grad)

    x = case.logits()
    cu = None if case.cu_seqlens is None else case.cu_seqlens.numpy()
    pairs = random_pairs(case.n_seqs)
    ref = np.linspace(-3, 3, case.n_seqs)
    out = dpo_fast.dpo_loss(x, targets, torch.tensor(ref), pairs=pairs, cu_seqlens=case.cu_seqlens, label_smoothing=0.1)
    out.loss.backward()
    found, grad = dn.dpo_loss(
        array, targets.numpy(), ref, pairs=pairs.numpy(), cu_seqlens=cu, label_smoothing=0.1, with_grad=True
    )
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards", "logps"):
        same_bits(getattr(found, key), getattr(out, key))
    same_bits(grad, x.grad)
    assert found.metrics() == pytest.approx(out.metrics(), rel=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_inplace(name):
    dtype, torch_dtype = TYPES[name]
    case = make_case("strided", (4, 5, 507), torch_dtype)
    fresh = as_array(case.view(case.leaf.clone()), dtype)
    over = as_array(case.view(case.leaf.clone()), dtype)
    targets = case.targets.numpy()
    _, grad = dn.dpo_loss(fresh, targets, with_grad=True)
    _, inplace = dn.dpo_loss(over, targets, with_grad=True, inplace_backward=True)
    assert inplace is over
    np.testing.assert_array_equal(grad.astype(np.float32), over.astype(np.float32))
    g = np.ones(4)
    over = as_array(case.view(case.leaf.clone()), dtype)
    _, grad = dn.sequence_logps(fresh, targets, grad_logps=g)
    _, inplace = dn.sequence_logps(over, targets, grad_logps=g, inplace_backward=True)
    np.testing.assert_array_equal(grad.astype(np.float32), over.astype(np.float32))


def test_sequence_logps_gradient():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(3, 4, 33)), rng.integers(0, 33, (3, 4))
    weights, g = rng.random((3, 4)), rng.normal(size=3)
    out, grad = dn.sequence_logps(x, targets, token_weights=weights, average=True, grad_logps=g)
    options = {"token_weights": weights, "average": True}
    np.testing.assert_allclose(out, reference.sequence_logps(x, targets, **options), atol=1e-12)
    np.testing.assert_allclose(grad, reference.sequence_logps_grad(x, targets, g, **options), atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_preference_loss_gradient(reduction):
    rng = np.random.default_rng(0)
    logps, ref, pairs = rng.normal(size=5), rng.normal(size=5), rng.integers(0, 5, (7, 2))
    options = {"pairs": pairs, "beta": 0.4, "label_smoothing": 0.2, "reduction": reduction}
    out, grad = dn.preference_loss(logps, ref, with_grad=True, **options)
    exact = reference.preference_loss(logps, ref, **options)
    np.testing.assert_allclose(out.loss, exact.loss, atol=1e-12)
    np.testing.assert_allclose(grad, reference.preference_loss_grad(logps, ref, **options), atol=1e-12)
    assert dn.preference_loss(logps[:4].astype(np.float16)).loss.dtype == np.float32


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(shape, k, masked):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    index = rng.integers(0, 5, shape[:-1] if k is None else (*shape[:-1], k))
    mask = rng.random(index.shape) < 0.6 if masked else None
    g = rng.normal(size=index.shape)
    found, grad = dn.selective_log_softmax(x, index, 0.8, mask, grad_logps=g)
    np.testing.assert_allclose(found, reference.selective_log_softmax(x, index, 0.8, mask), atol=1e-12)
    t = torch.tensor(x, requires_grad=True)
    out = dpo_fast.selective_log_softmax(t, torch.tensor(index), 0.8, None if mask is None else torch.tensor(mask))
    out.backward(torch.tensor(g))
    same_bits(found, out)
    same_bits(grad, t.grad)


def test_lists_are_accepted_where_only_numbers_count():
    x = np.zeros((2, 2, 3), np.float32)
    out = dn.dpo_loss(x, [[0, 1], [2, -100]], [0.0, 0.0], pairs=[[0, 1]])
    assert out.logps.tolist() == pytest.approx([-2 * np.log(3), -np.log(3)])


def test_thread_count_changes_nothing():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(4, 9, 4099)).astype(np.float32), rng.integers(0, 4099, (4, 9))
    before = dn.get_num_threads()
    try:
        dn.set_num_threads(1)
        one = dn.dpo_loss(x, targets, with_grad=True)
        dn.set_num_threads(2)
        assert dn.get_num_threads() == dpo_fast.get_num_threads() == 2
        two = dn.dpo_loss(x, targets, with_grad=True)
    finally:
        dn.set_num_threads(before)
    np.testing.assert_array_equal(one[1], two[1])
    assert one[0].loss == two[0].loss


# --- against the reference, in all types ------------------------------------------------------------------------------

S, T, V = 6, 7, 65
PAIRS = np.array([[0, 3], [1, 4], [2, 5], [0, 5], [1, 3]])


def problem(name, seed=0):
    """Logits of a type, targets, and references near the policy: chosen ratios of both signs."""
    rng = np.random.default_rng(seed)
    x = (2 * rng.normal(size=(S, T, V))).astype(TYPES[name][0])
    targets = rng.integers(0, V - 5, (S, T))
    targets[rng.random((S, T)) < 0.3] = -100
    ref = reference.sequence_logps(x, targets) + 2 * rng.normal(size=S)
    return x, targets, ref, rng


def close(found, exact, name):
    """Values and gradients; the latter with their rounding to the logits' type."""
    exact, slack = np.asarray(exact), SLACK[TYPES[name][1]]
    largest = np.abs(exact).max(initial=0, where=np.isfinite(exact))
    eps = float(ml_dtypes.finfo(found.dtype).eps)
    wide = np.asarray(found).astype(np.float64)
    assert wide.shape == exact.shape
    np.testing.assert_allclose(wide, exact, rtol=0, atol=slack * max(1, largest) + eps * largest)


@pytest.mark.parametrize("valid_vocab", [None, V - 5])
@pytest.mark.parametrize("given", ["lse", "lse and logps", "all"])
@pytest.mark.parametrize("name", TYPES)
def test_log_sum_exp(name, given, valid_vocab):
    """Its gradient needs none of the outputs; columns of padding may hold anything, and get 0, also in place."""
    x, targets, _, rng = problem(name)
    options = {"softcap": 9.0, "temperature": 0.8, "valid_vocab": valid_vocab}
    names = {"lse": ("lse",), "lse and logps": ("logps", "lse"), "all": ("logps", "entropy", "lse")}[given]
    grads = {f"grad_{each}": rng.normal(size=(S, T)) for each in names}
    exact = reference.token_logps(x, targets, **options)
    exact_grad = reference.token_logps_grad(x, targets, **{"grad_logps": np.zeros((S, T)), **grads}, **options)
    if valid_vocab:
        x[..., valid_vocab:] = np.nan
    found, grad = dn.token_logps(x, targets, outputs=names, **grads, **options)
    for each in names:
        close(getattr(found, each), getattr(exact, each), name)
    assert all(getattr(found, each) is None for each in found._fields if each not in names)
    assert (found.lse[targets == -100] == 0).all()
    assert grad.dtype == x.dtype
    close(grad, exact_grad, name)
    assert np.abs(exact_grad).max() > 0.1
    quiet, same = dn.token_logps(x, targets, outputs=(), **grads, **options)
    assert all(each is None for each in quiet)
    np.testing.assert_array_equal(same, grad)
    _, inplace = dn.token_logps(x, targets, **grads, **options, inplace_backward=True)
    assert inplace is x
    np.testing.assert_array_equal(x, grad)
    if valid_vocab:
        assert (x[..., valid_vocab:] == 0).all()


def test_a_row_without_incoming_gradient_is_not_read():
    x, targets, *_ = problem("float32")
    targets[:] = 1
    x[2] = np.nan
    g = np.ones((S, T))
    g[2] = 0
    for grads in ({"grad_logps": g}, {"grad_lse": g}, {"grad_entropy": g, "grad_lse": g}):
        _, grad = dn.token_logps(x, targets, **grads)
        assert (grad[2] == 0).all()
        assert np.isfinite(grad).all()
        assert np.abs(grad[0]).max() > 0
    one = np.zeros((S, T))
    one[2, 3] = 1
    _, grad = dn.token_logps(x, targets, grad_logps=g, grad_lse=one)
    assert np.isnan(grad[2, 3]).all()
    assert (grad[2, :3] == 0).all()


@pytest.mark.parametrize("name", TYPES)
def test_valid_vocab_at_every_level(name):
    """The bits are those of the logits without the padding, whatever lies in it."""
    x, targets, ref, rng = problem(name)
    valid = V - 5
    bad = x.copy()
    bad[..., valid:] = np.nan
    g, weights = rng.normal(size=S), rng.random((S, T))
    calls = {
        "sequences": lambda x, **o: dn.sequence_logps(x, targets, grad_logps=g, token_weights=weights, **o),
        "loss": lambda x, **o: dn.dpo_loss(x, targets, ref, with_grad=True, z_loss_weight=0.01, wpo=True, **o),
        "reference": lambda x, **o: dn.dpo_loss(x, targets, ref_logits=x, with_grad=True, **o),
    }
    for level, call in calls.items():
        found, grad = call(bad, valid_vocab=valid)
        expected, less = call(x[..., :valid])
        for one, other in zip(found, expected, strict=True) if level != "sequences" else [(found, expected)]:
            np.testing.assert_array_equal(one, other, err_msg=level)
        np.testing.assert_array_equal(grad[..., :valid], less, err_msg=level)
        assert (grad[..., valid:] == 0).all()
    targets[0, 0] = valid
    with pytest.raises(IndexError, match=rf"target {valid}"):
        dn.token_logps(bad, targets, valid_vocab=valid)
    for wrong, kind in ((V + 1, ValueError), (0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="valid_vocab"):
            dn.token_logps(x, targets, valid_vocab=wrong)


TERMS = {
    "dpop_lambda": {"dpop_lambda": 5.0},
    "length_penalty": {"length_penalty": 0.03},
    "margin": {"margin": [0.4, -0.2, 0.0, 0.9, 0.1]},
    "beta": {"beta": [0.05, 0.9, 0.3, 0.0, 0.2]},
    "z_loss_weight": {"z_loss_weight": 0.01},
    "pair_weights": {"pair_weights": [1.0, 0.0, 0.5, 0.0, 2.0]},
}
TERMS["all"] = {key: value for term in TERMS.values() for key, value in term.items()}
MARGIN_LOSSES = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "discopop": {},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "share", "none"])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("loss_type", MARGIN_LOSSES)
@pytest.mark.parametrize("name", TYPES)
def test_new_terms_of_losses(name, loss_type, term, reduction):
    x, targets, ref, _ = problem(name)
    options = {"loss_type": loss_type, "pairs": PAIRS, **MARGIN_LOSSES[loss_type], **TERMS[term]}
    options |= {"num_pairs": 11} if reduction == "share" else {"reduction": reduction}
    if reduction == "none":
        options.pop("z_loss_weight", None)
    exact = reference.dpo_loss(x, targets, ref, **options)
    exact_grad = reference.dpo_loss_grad(x, targets, ref, **options)
    plain = reference.dpo_loss(x, targets, ref, **{k: v for k, v in options.items() if k not in TERMS[term]})
    if reduction != "none" or term != "z_loss_weight":
        assert np.abs(plain.loss - exact.loss).max() > 1e-3  # the term says something here
    out, grad = dn.dpo_loss(x, targets, ref, with_grad=True, **options)
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        close(getattr(out, key), getattr(exact, key), name)
    assert grad.dtype == x.dtype
    close(grad, exact_grad, name)
    if "z_loss_weight" in options:
        return
    lengths = (targets != -100).sum(-1)
    logps = exact.logps.astype(out.logps.dtype)
    out, grad = dn.preference_loss(logps, ref, lengths=lengths, with_grad=True, **options)
    exact_grad = reference.preference_loss_grad(logps, ref, lengths=lengths, **options)
    exact = reference.preference_loss(logps, ref, lengths=lengths, **options)
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        close(getattr(out, key), getattr(exact, key), name)
    close(grad, exact_grad, name)


@pytest.mark.parametrize("loss_type", ["ipo", "nca_pair", "sppo_hard", "apo_down", "kto", "bco", "orpo", "cpo", "sft"])
def test_beta_and_weights_of_other_losses(loss_type):
    """Every loss of pairs, and of single completions, knows a beta, a weight of 0 and a z-loss."""
    x, targets, ref, _ = problem("float64")
    free, alone = loss_type in ("orpo", "cpo"), loss_type in ("kto", "bco")
    options = {"beta": np.linspace(0.1, 0.6, S), "baseline": 0.2} if alone else {"beta": TERMS["all"]["beta"]}
    if alone:
        options |= {"desirable": [True, False, True, True, False, False], "pair_weights": [1.0, 0, 0, 2, 0.5, 1]}
    else:
        options |= {"pairs": PAIRS, "pair_weights": TERMS["all"]["pair_weights"]}
    if loss_type in ("ipo", "sppo_hard"):
        options["beta"] = np.add(options["beta"], 0.1)
    options |= {"loss_type": loss_type, "z_loss_weight": 0.02, "ref_logps": None if free else ref}
    x[2] = np.nan  # of weight 0
    if not alone:
        options["pair_weights"] = [1.0, 0.5, 0, 0, 2]
    exact, exact_grad = (f(x, targets, **options) for f in (reference.dpo_loss, reference.dpo_loss_grad))
    out, grad = dn.dpo_loss(x, targets, with_grad=True, **options)
    assert np.isfinite(out.loss)
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards", "logps"):
        np.testing.assert_allclose(getattr(out, key), getattr(exact, key), rtol=1e-10, err_msg=key)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-9, atol=1e-13)
    assert (grad[2] == 0).all()
    assert np.isfinite(list(out.metrics().values())).all()
    assert out.metrics() == pytest.approx(exact.metrics())


@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_z_loss_beside_ld_alpha(ld_alpha, wpo):
    """Over all tokens: also over those of weight 0, which WPO looks at as well."""
    x, targets, ref, _ = problem("float64")
    options = {"ld_alpha": ld_alpha, "wpo": wpo, "z_loss_weight": 0.05, "average": True}
    out, grad = dn.dpo_loss(x, targets, ref, with_grad=True, **options)
    np.testing.assert_allclose(out.loss, reference.dpo_loss(x, targets, ref, **options).loss, rtol=1e-12)
    np.testing.assert_allclose(grad, reference.dpo_loss_grad(x, targets, ref, **options), atol=1e-13)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_z_loss_in_place_and_packed(layout):
    x, targets, ref, _ = problem("float32")
    options = {"z_loss_weight": 0.02, "pairs": PAIRS, "pair_weights": TERMS["all"]["pair_weights"]}
    exact = reference.dpo_loss_grad(x, targets, ref, **options)
    if layout == "packed":
        options["cu_seqlens"] = np.arange(0, S * T + 1, T)
        x, targets, exact = x.reshape(-1, V), targets.reshape(-1), exact.reshape(-1, V)
    _, grad = dn.dpo_loss(x, targets, ref, with_grad=True, inplace_backward=True, **options)
    assert grad is x
    close(x, exact, "float32")


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", TYPES)
def test_references_of_every_type_give_the_rewards_of_torch(name, kind):
    """The kernels round the policy's sums where the reference's were rounded, and nowhere else."""
    x, targets, ref, _ = problem(name)
    ref = (30 * ref).astype(kind)
    theirs = torch.tensor(ref.astype(np.float64)).to(getattr(torch, np.dtype(kind).name))
    logits = torch.tensor(x.astype(np.float64)).to(TYPES[name][1])
    expected = dpo_fast.dpo_loss(logits, torch.tensor(targets), theirs, beta=0.7)
    found = dn.dpo_loss(x, targets, ref, beta=0.7)
    for key in ("loss", "losses", "chosen_rewards", "rejected_rewards", "logps"):
        same_bits(getattr(found, key), getattr(expected, key))
    alone = dn.preference_loss(found.logps, ref, beta=0.7)
    of_torch = dpo_fast.preference_loss(expected.logps, theirs, beta=0.7)
    same_bits(alone.chosen_rewards, of_torch.chosen_rewards)


@pytest.mark.parametrize("name", TYPES)
def test_equal_models_have_no_rewards(name):
    x, targets, *_ = problem(name)
    outputs = [dn.dpo_loss(x, targets, ref_logits=x)]
    if name != "float64":
        outputs.append(dn.dpo_loss(x, targets, dn.sequence_logps(x, targets)))
    for out in outputs:
        assert (out.chosen_rewards == 0).all()
        assert (out.rejected_rewards == 0).all()


@pytest.mark.parametrize("name", TYPES)
def test_type_of_selective_log_softmax(name):
    """The logits' own, rounded once, or the one asked for."""
    x, targets, *_ = problem(name)
    index = np.maximum(targets, 0)
    exact = reference.selective_log_softmax(x, index)
    own = dn.selective_log_softmax(x, index)
    assert own.dtype == x.dtype
    close(own, exact, name)
    wide = dn.selective_log_softmax(x, index, dtype=np.float64 if name == "float64" else np.float32)
    close(wide, exact, name)
    np.testing.assert_array_equal(wide.astype(x.dtype), own)
    if name in ("float16", "bfloat16"):
        assert np.abs(wide - exact).max() < 1e-5  # not rounded on the way
    logits = torch.tensor(x.astype(np.float64)).to(TYPES[name][1])
    same_bits(own, dpo_fast.selective_log_softmax(logits, torch.tensor(index)))
    logps, grad = dn.selective_log_softmax(x, index, grad_logps=np.ones_like(exact))
    assert logps.dtype == grad.dtype == x.dtype
    for wrong in (np.int64, "int32", bool, "text", 1.5):
        with pytest.raises(TypeError, match="dtype must be a floating-point type"):
            dn.selective_log_softmax(x, index, dtype=wrong)


OLD_KEYWORDS = {
    "token_logps": ("ignore_index", "temperature", "logit_scale", "softcap"),
    "sequence_logps": ("ignore_index", "temperature", "logit_scale", "softcap"),
    "dpo_loss": ("ignore_index", "temperature", "softcap", "loss_weights", "discopop_tau", "num_pairs", "margin"),
    "preference_loss": ("loss_weights", "f_divergence", "simpo_gamma", "num_pairs", "length_penalty"),
}


@pytest.mark.parametrize("function", OLD_KEYWORDS)
def test_unknown_keywords_are_refused_with_those_there_are(function):
    x, targets, ref, _ = problem("float32")
    args = (ref,) if function == "preference_loss" else (x, targets)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'") as caught:
        getattr(dn, function)(*args, temprature=0.5)
    for name in OLD_KEYWORDS[function]:
        assert name in str(caught.value).partition("options:")[2]


def test_values_of_pairs_are_checked():
    x, targets, ref, _ = problem("float32")
    for wrong, message in (
        ({"beta": [0.1, 0.2]}, r"beta must have shape \(3,\)"),
        ({"beta": [0.1, -0.2, 0.1]}, "beta must be at least 0"),
        ({"beta": [0.1, np.nan, 0.1]}, "beta must be at least 0"),
        ({"margin": [0.1]}, r"margin must have shape \(3,\)"),
        ({"margin": [0.1] * 3, "loss_type": "ipo"}, "margin is read by 'sigmoid', 'hinge'"),
        ({"dpop_lambda": -1.0}, "dpop_lambda must be at least 0"),
        ({"length_penalty": 0.1, "loss_type": "apo_zero"}, "length_penalty is read by"),
        ({"z_loss_weight": -0.1}, "z_loss_weight must be at least 0"),
        ({"z_loss_weight": 0.1, "reduction": "none"}, "z_loss_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            dn.dpo_loss(x, targets, **wrong)
    with pytest.raises(ValueError, match="z_loss_weight needs the logits"):
        dn.preference_loss(ref, z_loss_weight=0.1)
    with pytest.raises(ValueError, match="needs lengths"):
        dn.preference_loss(ref, length_penalty=0.1)
    with pytest.raises(TypeError, match="margin must be"):
        dn.dpo_loss(x, targets, margin=["a", "b", "c"])

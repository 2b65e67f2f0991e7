"""The kernels by their binding alone: every argument's absence, bad values, and the numbers against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import LOGIT_TYPES, LOSSES, STATISTICS, Batch, address, loaded, loss_options, pair_arrays, stored

from dpo_fast import _checks, _cpu, _reference_losses, reference
from dpo_fast._arguments import KernelGrads, KernelLosses, KernelOut, KernelRows, KernelSaved
from dpo_fast._checks import LogitOptions

pytestmark = pytest.mark.cpu_only

VALUE_ERROR = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 1e-4, "float16": 1e-4}
GRAD_ERROR = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 1e-2, "float16": 2e-3}
TRANSFORMS = ({}, {"temperature": 0.7}, {"logit_scale": 1.3, "softcap": 20.0})


def random_batch(S=4, T=5, V=37, logit_type="float32", seed=0, **options):
    """Logits [S, T, V] of which some targets are ignored."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, options.get("valid_vocab") or V, (S, T))
    targets[0, 0] = targets[-1, -1] = -100
    return Batch(stored(3 * rng.standard_normal((S, T, V)), logit_type), targets, **options)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_tables_have_the_names_of_the_interface():
    assert tuple(each.name for each in _checks.STATISTICS) == STATISTICS
    differentiable = tuple(each.name for each in _checks.STATISTICS if each.differentiable)
    assert differentiable == _cpu.differentiable_statistics()
    assert LogitOptions._fields == _cpu.logit_options()
    assert _cpu.loss_parameters() == (
        *("beta", "label_smoothing", "discopop_tau", "simpo_gamma", "alpha", "desirable_weight", "undesirable_weight"),
        *("tokens_per_pair", "dpop_lambda", "length_penalty"),
    )
    assert _cpu.pair_numbers() == ("weight", "beta", "margin")
    margin = {name for name, flags in _cpu.loss_types() if flags & 16384}
    assert margin == {"sigmoid", "hinge", "exo_pair", "robust", "discopop"}


def every_argument():
    """For each function: the function, its arguments, and the places of the addresses in them with their names."""
    b = Batch(
        stored(np.random.default_rng(0).standard_normal((4, 6)), "float32"),
        np.zeros(4, np.int64),
        row_mask=np.ones(4, np.uint8),
        token_weights=np.ones(4),
        cu_seqlens=np.array([0, 2, 4]),
    )
    pairs, kept, results, losses = pair_arrays(
        2, np.float32, np.array([[0, 1]]), baseline=0.5, weight=np.ones(1), beta=np.ones(1), margin=np.ones(1)
    )
    numbers = [np.ones(8) for _ in range(12)]
    given = [address(x) for x in numbers]
    sequence_wise, grad_logits = np.ones(2), np.empty_like(b.logits)
    options = loss_options(["sigmoid", "sft"])
    rows = {name: (0, KernelRows._fields.index(name)) for name in ("logits", "targets", "row_mask", "token_weights")}
    seqs = {"cu_seqlens": (1, 0)}

    def pair_places(i):
        places = {"pairs": (i, 0), "baseline": (i, 3)}
        return places | {f"pair_{name}": (i, 4, k) for k, name in enumerate(_cpu.pair_numbers())}

    def loss_places(i):
        return {name: (i, k) for k, name in enumerate(KernelLosses._fields)}

    def statistics_places(i):
        return {name: (i, k) for k, name in enumerate(STATISTICS)}

    grads = {f"grad_{name}": (5, k) for k, name in enumerate(KernelGrads._fields) if name != "statistics"}
    has_gradient = [name in _cpu.differentiable_statistics() for name in STATISTICS]
    grads |= {f"grad_{name}": (5, 1, k) for k, name in enumerate(STATISTICS) if has_gradient[k]}
    saved = {name: (4, k) for k, name in enumerate(KernelSaved._fields) if name != "seq_saved"}
    keep = (b, kept, results, numbers, sequence_wise, grad_logits)
    statistics = tuple(given[2:7])
    out = KernelOut(address(grad_logits), 0, 6, 1)
    dpo = [b.rows, b.seqs, pairs, options, 1, True, given[7], True, given[0], given[1]]
    dpo += [statistics, address(b.seq_logps), losses]
    preference = [pairs, options, True, False, 2, address(sequence_wise), given[7], True, given[8]]
    cases = {
        "token_forward": (
            [b.rows, 1, given[0], given[1], statistics],
            rows | {"logps": (2,), "stats": (3,)} | statistics_places(4),
        ),
        "sequence_forward": (
            [b.rows, b.seqs, 1, given[0], given[1], given[2], False],
            rows | seqs | {"logps": (3,), "stats": (4,), "seq_logps": (5,)},
        ),
        "dpo_forward": (
            dpo,
            rows
            | seqs
            | pair_places(2)
            | {"ref_logps": (6,), "logps": (8,), "stats": (9,), "seq_logps": (11,)}
            | statistics_places(10)
            | loss_places(12),
        ),
        "backward": (
            [
                *(b.rows, b.seqs, pairs, 1, KernelSaved(*given[:4])),
                KernelGrads(given[4], tuple(given[5] if has else None for has in has_gradient), *given[6:9]),
                out,
            ],
            rows | seqs | pair_places(2) | saved | grads | {"grad_logits": (6, 0)},
        ),
        "preference_forward": (
            [*preference, KernelLosses(*given[:5])],
            pair_places(0) | {"logps": (5,), "ref_logps": (6,), "lengths": (8,)} | loss_places(9),
        ),
        "preference_backward": (
            [pairs, True, 2, given[0], given[1], given[2], given[3]],
            pair_places(0) | {"pair_grads": (3,), "grad_loss": (4,), "grad_losses": (5,), "grad_logps": (6,)},
        ),
    }
    return cases, keep


REQUIRED = {
    "token_forward": {"logits", "targets", "logps"},
    "sequence_forward": {"logits", "targets", "logps", "seq_logps"},
    "dpo_forward": {"logits", "targets", "logps", "seq_logps", "log_sum_sq_probs"} | set(KernelLosses._fields[:4]),
    "backward": {"logits", "targets", "logps", "stats", "entropy", "pair_grads", "grad_logits"},
    "preference_forward": {"logps", "lengths", *KernelLosses._fields[:4]},
    "preference_backward": {"pair_grads", "grad_logps"},
}
# without them the numbers are others, and another check may refuse those
ELSEWHERE = {"cu_seqlens", "pairs"}


def replaced(arguments, place, value):
    head, *rest = place
    if rest:
        inner = list(arguments[head])
        value = replaced(inner, rest, value)
        kind = type(arguments[head])
        value = kind(*value) if hasattr(kind, "_fields") else tuple(value)
    return [*arguments[:head], value, *arguments[head + 1 :]]


@pytest.mark.parametrize("name", list(REQUIRED))
def test_every_address_of_0_is_refused_by_name(name):
    cases, _keep = every_argument()
    arguments, places = cases[name]
    function = getattr(_cpu, name)
    function(*arguments)
    for argument, place in places.items():
        with pytest.raises(ValueError, match=f"^{argument} has no memory"):
            function(*replaced(arguments, place, 0))


@pytest.mark.parametrize("name", list(REQUIRED))
def test_none_is_refused_by_name_where_an_array_has_to_be(name):
    cases, _keep = every_argument()
    arguments, places = cases[name]
    function = getattr(_cpu, name)
    for argument, place in places.items():
        if argument in REQUIRED[name]:
            with pytest.raises(ValueError, match=f"^{argument} must be given"):
                function(*replaced(arguments, place, None))
        elif argument not in ELSEWHERE:
            function(*replaced(arguments, place, None))


def test_arguments_that_do_not_go_together():
    b = random_batch(S=4)
    with pytest.raises(ValueError, match="3 sequences of 5 rows are not the 20 rows"):
        _cpu.sequence_forward(b.rows, b.seqs._replace(n_seqs=3), 1, address(b.logps), None, address(b.seq_logps), False)
    b.loss(loss_options("sigmoid"))
    with pytest.raises(ValueError, match="3 pairs need 6 sequences, found 4"):
        _cpu.preference_backward(b.pairs._replace(n_pairs=3), False, 4, *[address(b.stats)] * 4)
    no_grads = KernelGrads(None, (), None, None, None)
    saved = KernelSaved(address(b.logps), address(b.stats), None, None)
    out = KernelOut(address(b.logits), *b.strides)
    for k, name in enumerate(STATISTICS):
        if name not in _cpu.differentiable_statistics():
            grads = no_grads._replace(statistics=tuple(address(b.logps) if k == i else None for i in range(5)))
            with pytest.raises(ValueError, match=f"{name} has no gradient"):
                _cpu.backward(b.rows, None, None, 1, saved, grads, out)
    with pytest.raises(ValueError, match="a token has 5 statistics"):
        _cpu.backward(b.rows, None, None, 1, saved, no_grads._replace(statistics=(None,)), out)
    with pytest.raises(ValueError, match="logits have 5 options"):
        _cpu.backward(b.rows._replace(options=(0.0,)), None, None, 1, saved, no_grads, out)
    for gradient, message in (
        ("seq_logps", "grad_seq_logps needs seqs"),
        ("loss", "grad_loss"),
        ("losses", "grad_loss"),
    ):
        grads = no_grads._replace(**{gradient: address(b.logps)})
        with pytest.raises(ValueError, match=message):
            _cpu.backward(b.rows, None, None, 1, saved, grads, out)
    for valid_vocab in (-1, 38):
        rows = b.rows._replace(options=(*b.rows.options[:-1], valid_vocab))
        with pytest.raises(ValueError, match=r"valid_vocab must be in \[1, 37\]"):
            _cpu.token_forward(rows, 1, address(b.logps), None, None)
    with pytest.raises(ValueError, match="statistics"):
        _cpu.token_forward(b.rows, 1, address(b.logps), None, (None,) * 4)
    with pytest.raises(ValueError, match="no type of logits"):
        _cpu.token_forward(b.rows._replace(logit_type=4), 1, address(b.logps), None, None)
    with pytest.raises(TypeError, match="rows must be a tuple"):
        _cpu.token_forward(list(b.rows), 1, address(b.logps), None, None)


def test_bad_values_are_named_with_their_place():
    def message(change, **options):
        b = random_batch(S=2, T=3, **options)
        change(b.targets)
        with pytest.raises(IndexError) as error:
            b.tokens()
        return str(error.value)

    def put(place, value):
        return lambda targets: targets.__setitem__(place, value)

    assert message(put((1, 1), 37)).startswith("target 37 at position [1, 1] is outside [0, 37)")
    assert message(put((0, 2), -5)).startswith("target -5 at position [0, 2] is")
    # a column of padding is no target
    assert message(put((1, 1), 30), valid_vocab=30).startswith("target 30 at position [1, 1] is outside [0, 30)")
    several = Batch(stored(np.zeros((4, 9)), "float32"), np.array([[0, 1], [2, 3], [4, 9], [5, 6]]))
    with pytest.raises(IndexError, match=r"target 9 at position \[2, 1\]"):
        several.tokens()
    for dtype in (np.int32, np.int64):
        for bounds, found in (([1, 6], r"cu_seqlens\[0\] must be 0, found 1"),
                              ([0, 4, 3, 6], r"cu_seqlens\[2\] = 3 follows 4"),
                              ([0, 5], r"cu_seqlens\[1\] must be the number of rows, 6, found 5")):  # fmt: skip
            packed = Batch(stored(np.zeros((6, 9)), "float32"), np.zeros(6, int), cu_seqlens=np.array(bounds, dtype))
            with pytest.raises(ValueError, match=found):
                packed.sequences()
    for pairs, name, found in (([[0, 1], [2, 4]], "sigmoid", r"pairs\[1, 1\] = 4 is outside \[0, 4\)"),
                               ([[-1, 1]], "sigmoid", r"pairs\[0, 0\] = -1"),
                               ([[-2, 1]], "kto", r"pairs\[0, 0\] = -2")):  # fmt: skip
        with pytest.raises(IndexError, match=found):
            random_batch(S=4).loss(loss_options(name), pairs=np.array(pairs))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("logit_type", LOGIT_TYPES)
@pytest.mark.parametrize(("V", "valid"), [(1, 0), (37, 0), (37, 30), (2049, 0), (32775, 32769), (65600, 32000)])
def test_statistics_and_their_gradients(V, valid, logit_type, transform, isa):
    """lse and its gradient, padding columns (NaN in them is not read), gradients in the logits' own memory."""
    b = random_batch(S=1, T=4, V=V, logit_type=logit_type, valid_vocab=valid, **transform)
    n = valid or V
    padding = np.full(b.logits[..., n:].shape, np.nan)
    b.logits[..., n:] = stored(padding, logit_type)
    x = loaded(b.logits)[..., :n]
    options = dict(transform)
    exact = reference.token_logps(x, b.targets, **options)
    kept = b.targets != -100
    z = reference.transform(x, **options)
    lse = np.where(kept, np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1), 0)
    b.tokens(STATISTICS)
    error = VALUE_ERROR[logit_type]
    np.testing.assert_allclose(b.logps, exact.logps, atol=error, rtol=error)
    np.testing.assert_allclose(b.statistics["lse"], lse, atol=error, rtol=error)
    for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
        np.testing.assert_allclose(b.statistics[name], getattr(exact, name), atol=error, rtol=error, err_msg=name)
    assert b.statistics["is_top1"].astype(bool).tolist() == exact.is_top1.tolist()

    rng = np.random.default_rng(1)
    g, h, k = (np.ascontiguousarray(rng.standard_normal(b.targets.shape), b.wide) for _ in range(3))
    p = np.exp(reference.log_softmax(z))
    lse_grad = np.where(kept[..., None], k[..., None] * p * reference.transform_grad(x, **options), 0)
    expected = reference.token_logps_grad(x, b.targets, g, h, **options) + lse_grad
    for inplace in (False, True):
        grad = b.backward(token_logps=g, entropy=h, lse=k, inplace=inplace)
        np.testing.assert_allclose(grad[..., :n], expected, atol=GRAD_ERROR[logit_type], rtol=GRAD_ERROR[logit_type])
        assert (grad[..., n:] == 0).all()
    only = random_batch(S=1, T=4, V=V, logit_type=logit_type, valid_vocab=valid, **transform).tokens(["lse"])
    np.testing.assert_array_equal(only.statistics["lse"], b.statistics["lse"])
    grad = only.backward(lse=k)[..., :n]
    np.testing.assert_allclose(grad, lse_grad, atol=GRAD_ERROR[logit_type], rtol=GRAD_ERROR[logit_type])


@pytest.mark.parametrize("logit_type", LOGIT_TYPES)
@pytest.mark.parametrize("V", [1, 33, 1000, 2049, 32769, 128256])
def test_bits_do_not_depend_on_the_statistics_asked_for(V, logit_type, isa):
    for seed, options in enumerate(TRANSFORMS):
        T = max(3, min(200, 200_000 // V))
        plain, beside = (random_batch(S=1, T=T, V=V, logit_type=logit_type, seed=seed, **options) for _ in range(2))
        for b in (plain, beside):  # largest logits at the end, where the shift follows late
            b.logits[0, ::2].sort(axis=-1) if logit_type != "bfloat16" else None
        plain.tokens()
        for name in STATISTICS:
            beside.tokens([name])
            np.testing.assert_array_equal(plain.logps, beside.logps, err_msg=name)
            np.testing.assert_array_equal(plain.stats, beside.stats, err_msg=name)
        ref = random_batch(S=2, T=T, V=V, logit_type=logit_type, seed=seed, **options).sequences().seq_logps
        b = random_batch(S=2, T=T, V=V, logit_type=logit_type, seed=seed, **options)
        b.loss(loss_options("sigmoid"), ref, names=("entropy",))
        assert b.results["chosen_rewards"][0] == b.results["rejected_rewards"][0] == 0


@pytest.mark.parametrize("logit_type", LOGIT_TYPES)
def test_several_targets_and_a_row_mask(logit_type, isa):
    rng = np.random.default_rng(0)
    x = stored(rng.standard_normal((3, 4, 50)), logit_type)
    targets = rng.integers(0, 50, (3, 4, 6))
    targets[..., 5] = targets[..., 2]  # named twice
    mask = np.ones((3, 4), np.uint8)
    mask[1, 2] = 0
    b = Batch(x, targets, row_mask=mask, ignore_index=np.iinfo(np.int64).min).tokens(["is_top1"])
    logp = reference.log_softmax(loaded(x))
    expected = np.where(mask[..., None], np.take_along_axis(logp, targets, -1), 0)
    np.testing.assert_allclose(b.logps, expected, atol=VALUE_ERROR[logit_type])
    top = (loaded(x).argmax(-1)[..., None] == targets) & (mask[..., None] == 1)
    assert b.statistics["is_top1"].astype(bool).tolist() == top.tolist()
    g = rng.standard_normal(targets.shape)
    g[0, 1] = [1, -1, 0, 0, 0, 0]  # their sum is 0, they are not
    g[2, 3] = 0
    x[2, 3] = stored(np.full(50, np.nan), logit_type)
    g = g.astype(b.wide)
    grad = np.zeros((3, 4, 50))
    for k in range(6):
        one_hot = np.arange(50) == targets[..., k, None]
        grad += np.where(mask[..., None], g[..., k, None] * (one_hot - np.exp(logp)), 0)
    grad[2, 3] = 0
    np.testing.assert_allclose(b.backward(token_logps=g), grad, atol=4 * GRAD_ERROR[logit_type])


@pytest.mark.parametrize("logit_type", LOGIT_TYPES)
def test_rows_without_incoming_gradient_are_not_read(logit_type, isa):
    b = random_batch(S=1, T=6, V=2100, logit_type=logit_type)
    b.logits[0, 2:5] = stored(np.full((3, 2100), np.nan), logit_type)
    b.tokens(["entropy"])
    zero = np.zeros((1, 6))
    zero[0, 1] = -0.0
    assert (b.backward(token_logps=zero, entropy=zero, lse=zero) == 0).all()
    for name in ("token_logps", "entropy", "lse"):  # one that is not 0 is honoured
        g = zero.copy()
        g[0, 3] = 1
        grad = b.backward(**{"token_logps": zero, name: g})
        assert np.isnan(grad[0, 3]).all()
        assert (np.delete(grad, 3, axis=1) == 0).all()


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("weights", [None, np.float32, np.float64])
@pytest.mark.parametrize("bounds", [None, np.int32, np.int64])
def test_sequences_and_their_gradients(bounds, weights, average, threads):
    rng = np.random.default_rng(0)
    S, T, V = 3, 40, 1500  # enough logits for a second thread
    x, targets = rng.standard_normal((S, T, V)), rng.integers(0, V, (S, T))
    targets[0, :7] = -100
    targets[1] = -100  # an empty sequence
    w = None if weights is None else rng.random((S, T)).astype(weights)
    if w is not None:
        w[2, 3:6] = 0
    layout = {} if bounds is None else {"cu_seqlens": np.array([0, 11, 11, 50, 120], bounds)}
    if bounds is not None:
        x, targets, w = x.reshape(-1, V), targets.reshape(-1), None if w is None else w.reshape(-1)
    for logit_type in ("float32", "float64"):
        b = Batch(stored(x, logit_type), targets, token_weights=w, average=average, threads=threads, **layout)
        options = {"token_weights": w, "average": average, **layout}
        exact = reference.sequence_logps(loaded(b.logits), targets, **options)
        for double_sums in (False, True):
            b.sequences(double_sums)
            np.testing.assert_allclose(b.seq_logps, exact, rtol=1e-5 if logit_type == "float32" else 1e-12, atol=1e-5)
        g = rng.standard_normal(b.n_seqs).astype(b.wide)
        expected = reference.sequence_logps_grad(loaded(b.logits), targets, g, **options)
        np.testing.assert_allclose(b.backward(seq_logps=g), expected, atol=GRAD_ERROR[logit_type])


# --- losses -----------------------------------------------------------------------------------------------------------

PAIRED = [name for name in LOSSES if name not in ("kto", "bco")]


def options_of(name):
    """(average, parameters of the loss)."""
    parameters = {"label_smoothing": 0.1} if name in ("sigmoid", "exo_pair", "robust", "simpo", "cpo") else {}
    return name in ("simpo", "orpo"), parameters


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", [*PAIRED, ["sigmoid", "sft", "bco_pair"]], ids=str)
def test_losses_and_their_gradients(name, explicit):
    rng = np.random.default_rng(0)
    first = name if isinstance(name, str) else name[0]
    average, parameters = options_of(first)
    b = random_batch(S=6, logit_type="float64", average=average)
    ref = None if first in ("simpo", "cpo", "orpo") else b.sequences().seq_logps + rng.standard_normal(6)
    pairs = rng.integers(0, 6, (9, 2)) if explicit else None
    P = 9 if explicit else 3
    numbers = {"weight": rng.random(P)}
    weights = [1.0] if isinstance(name, str) else [1.0, 0.3, -0.2]
    options = {"loss_type": name, "loss_weights": weights, "pairs": pairs, "pair_weights": numbers["weight"]}
    options |= {"average": average, **parameters}
    loss = loss_options(name, weights, average=average, **parameters)
    b.loss(loss, ref, pairs=pairs, **numbers)
    x = b.logits
    exact = reference.dpo_loss(x, b.targets, ref, **options)
    np.testing.assert_allclose(b.results["loss"][0], exact.loss, rtol=1e-11)
    np.testing.assert_allclose(b.results["losses"], exact.losses, rtol=1e-10)
    np.testing.assert_allclose(b.results["chosen_rewards"], exact.chosen_rewards, rtol=1e-10)
    np.testing.assert_allclose(b.results["rejected_rewards"], exact.rejected_rewards, rtol=1e-10)
    np.testing.assert_allclose(
        b.backward(loss=np.ones(1)), reference.dpo_loss_grad(x, b.targets, ref, **options), atol=1e-12
    )
    g = rng.standard_normal(P)
    expected = reference.dpo_loss_grad(x, b.targets, ref, grad_losses=g, reduction="sum", **options)
    np.testing.assert_allclose(b.backward(losses=g), expected, atol=1e-12)

    # the loss alone, from the sums
    lengths = (b.targets != -100).sum(-1).astype(np.float64)
    kernel, _kept, results, losses = pair_arrays(6, np.float64, pairs, **numbers)
    logps = b.seq_logps
    _cpu.preference_forward(kernel, loss, True, False, 6, address(logps), address(ref), True, address(lengths), losses)
    for key, found in results.items():
        np.testing.assert_array_equal(found, b.results[key], err_msg=key)
    grad, one = np.full(6, np.nan), np.ones(1)
    _cpu.preference_backward(kernel, True, 6, address(results["pair_grads"]), address(one), None, address(grad))
    expected = reference.preference_loss_grad(logps, ref, lengths=lengths, **options)
    np.testing.assert_allclose(grad, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop"])
def test_score_margin(name):
    """dpop_lambda, length_penalty, and beta and margin of each pair, by the formula and by finite differences."""
    rng = np.random.default_rng(0)
    S, P = 8, 4
    logps, ref = rng.standard_normal(S), rng.standard_normal(S)
    lengths = rng.integers(1, 9, S).astype(np.float64)
    beta, margin = rng.random(P) + 0.1, rng.standard_normal(P)
    smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
    loss = loss_options(name, beta=77.0, label_smoothing=smoothing, dpop_lambda=2.0, length_penalty=0.3)

    def run(values):
        kernel, kept, results, losses = pair_arrays(S, np.float64, beta=beta, margin=margin)
        _cpu.preference_forward(
            kernel, loss, True, False, S, address(values), address(ref), True, address(lengths), losses
        )
        return results, kernel, kept

    results, kernel, _kept = run(logps)
    ratios = logps - ref
    c, d = ratios[:P], ratios[P:]
    x = beta * (c - d - 2 * np.maximum(0, -c)) + 0.3 * (lengths[:P] - lengths[P:]) - margin
    side = _reference_losses.PairSide(x, x, lengths[:P], {})
    none = _reference_losses.PairSide(0 * x, 0 * x, lengths[:P], {})
    expected = _reference_losses.pair_losses(name, side, none, 1.0, smoothing, {})
    np.testing.assert_allclose(results["losses"], expected, rtol=1e-12)
    np.testing.assert_allclose(results["chosen_rewards"], beta * c, rtol=1e-12)
    np.testing.assert_allclose(results["rejected_rewards"], beta * d, rtol=1e-12)
    grad, one = np.full(S, np.nan), np.ones(1)
    _cpu.preference_backward(kernel, True, S, address(results["pair_grads"]), address(one), None, address(grad))
    for s in range(S):
        step = np.zeros(S)
        step[s] = 1e-6
        slope = (run(logps + step)[0]["loss"][0] - run(logps - step)[0]["loss"][0]) / 2e-6
        assert grad[s] == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_beta_of_each_pair(name):
    """As a call of each pair with that beta."""
    rng = np.random.default_rng(0)
    P = 4
    logps, lengths = -rng.random(2 * P), np.full(2 * P, 3.0)
    beta = rng.random(P) + 0.1
    parameters = options_of(name)[1] | {"tokens_per_pair": 2.0}
    kernel, _kept, results, losses = pair_arrays(2 * P, np.float64, beta=beta, baseline=0.2)
    loss = loss_options(name, **parameters)
    _cpu.preference_forward(kernel, loss, True, False, 2 * P, address(logps), None, False, address(lengths), losses)
    for p in range(P):
        one = np.ascontiguousarray(logps[[p, P + p]])
        kernel, _kept, single, losses = pair_arrays(2, np.float64, baseline=0.2)
        loss = loss_options(name, beta=beta[p], **parameters)
        _cpu.preference_forward(kernel, loss, True, False, 2, address(one), None, False, address(lengths), losses)
        for key in ("losses", "chosen_rewards", "rejected_rewards", "pair_grads"):
            np.testing.assert_array_equal(results[key][p : p + 1], single[key], err_msg=key)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_absent_sides(name):
    rng = np.random.default_rng(0)
    b = random_batch(S=5, logit_type="float64")
    good = np.array([True, False, False, True, False])
    numbers = np.arange(5)
    pairs = np.stack([np.where(good, numbers, -1), np.where(good, -1, numbers)], -1)
    ref, weight = rng.standard_normal(5) - 10, np.array([1, 0, 2, 0.5, 1])
    b.loss(loss_options(name), ref, pairs=pairs, baseline=0.3, weight=weight)
    options = {"loss_type": name, "desirable": good, "baseline": 0.3, "pair_weights": weight}
    exact = reference.dpo_loss(b.logits, b.targets, ref, **options)
    np.testing.assert_allclose(b.results["losses"], exact.losses, rtol=1e-10)
    there = weight != 0
    assert np.isnan(b.results["chosen_rewards"][there & ~good]).all()
    assert np.isnan(b.results["rejected_rewards"][there & good]).all()
    np.testing.assert_allclose(b.results["chosen_rewards"][good], exact.chosen_rewards[good], rtol=1e-10)
    assert b.results["chosen_rewards"][1] == b.results["rejected_rewards"][1] == 0
    grad = b.backward(loss=np.ones(1))
    np.testing.assert_allclose(grad, reference.dpo_loss_grad(b.logits, b.targets, ref, **options), atol=1e-12)


@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pair_of_weight_0_counts_as_none(value, name, wpo):
    """Whatever is in its logits and reference; a gradient that comes in through logps is honoured."""
    rng = np.random.default_rng(0)
    average, parameters = options_of(name)
    pairs = np.array([[0, 1], [2, 3], [0, 5]])  # sequence 4 is in none
    weight = np.array([1.0, 0.0, 0.5])
    bad = [2, 3, 4]
    ref = rng.standard_normal(6).astype(np.float32)
    outcomes = []
    for poison in (False, True):
        b = random_batch(S=6, average=average)
        if poison:
            b.logits[bad] = value
            ref[bad] = np.nan
        b.loss(loss_options(name, average=average, **parameters), ref, pairs=pairs, weight=weight, wpo=wpo)
        outcomes.append((b.results, b.backward(loss=np.ones(1)), b.backward(losses=np.ones(3))))
    (clean, *clean_grads), (found, *grads) = outcomes
    for key in clean:
        np.testing.assert_array_equal(found[key], clean[key], err_msg=key)
    assert np.isfinite(found["loss"]).all()
    for results in (clean, found):
        assert results["losses"][1] == results["chosen_rewards"][1] == results["rejected_rewards"][1] == 0
        assert (results["pair_grads"][1] == 0).all()
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        np.testing.assert_array_equal(grad, clean_grad)
        assert (grad[bad] == 0).all()
        assert (grad[0, 1] != 0).any()
    through_logps = b.backward(loss=np.ones(1), seq_logps=np.array([0, 0, 1.0, 0, 0, 0]))
    kept = b.targets[2] != -100
    assert np.isnan(through_logps[2][kept]).any()
    np.testing.assert_array_equal(np.delete(through_logps, 2, axis=0), np.delete(grads[0], 2, axis=0))


def test_sums_are_rounded_as_the_reference_was():
    """To float32 where the reference is float32 and the logits are not float64: equal models give rewards of 0."""
    for logit_type in LOGIT_TYPES:
        sums = random_batch(logit_type=logit_type).sequences(double_sums=True).seq_logps
        for dtype in (np.float32, np.float64):
            b = random_batch(logit_type=logit_type).loss(loss_options("sigmoid"), sums.astype(dtype))
            rewards = np.concatenate([b.results["chosen_rewards"], b.results["rejected_rewards"]])
            exact = logit_type == "float64" and dtype == np.float32
            assert (np.abs(rewards) > 0).any() if exact else (rewards == 0).all()
            kernel, _kept, results, losses = pair_arrays(4, np.float64)
            ref, loss = sums.astype(dtype), loss_options("sigmoid")
            for round_sums in (False, True):
                arrays = (address(sums), address(ref), dtype == np.float64, None, losses)
                _cpu.preference_forward(kernel, loss, True, round_sums, 4, *arrays)
                rounded = round_sums or dtype == np.float64
                assert (results["chosen_rewards"] == 0).all() if rounded else (results["chosen_rewards"] != 0).any()

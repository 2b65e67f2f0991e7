"""Every line of DESIGN.md's table of bad input: the type of the error and what its message names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operator_calls import call

import dpo_fast
import dpo_fast.numpy
from dpo_fast import reference
from dpo_fast._checks import STATISTICS, LogitOptions
from dpo_fast._torch.operators import (
    PREFERENCE_BACKWARD,
    ROWS_BACKWARD,
    TOKEN_FORWARD,
    Grads,
    PreferenceBackward,
    Rows,
    RowsBackward,
    Saved,
    Sequences,
    TokenForward,
)

X = torch.randn(4, 3, 5)
Y = torch.randint(0, 5, (4, 3))
PACKED = X.reshape(12, 5)
CU = torch.tensor([0, 3, 6, 9, 12])


def both(kind, message, call):
    """A case for torch tensors and one for NumPy arrays; `call` takes the module and a converter."""

    def as_array(t):
        return t.numpy() if isinstance(t, torch.Tensor) else t

    name = message[:40]
    return [
        pytest.param(kind, message, lambda: call(dpo_fast, lambda t: t), id=f"torch: {name}"),
        pytest.param(kind, message, lambda: call(dpo_fast.numpy, as_array), id=f"numpy: {name}"),
    ]


SHAPES = [
    *both(ValueError, r"targets must have shape \(4, 3\).*found \(4, 2\)", lambda m, a: m.token_logps(a(X), a(Y[:, :2]))),
    *both(ValueError, r"targets must have shape \(4, 3\).*found \(4, 3, 1\)", lambda m, a: m.token_logps(a(X), a(Y[..., None]))),
    *both(ValueError, r"logits must have shape \[S, T, V\].*found \(5,\)", lambda m, a: m.token_logps(a(X[0, 0]), a(Y[0, 0]))),
    *both(ValueError, r"logits must have shape \[S, T, V\].*\(1, 4, 3, 5\)", lambda m, a: m.token_logps(a(X[None]), a(Y[None]))),
    *both(ValueError, r"at least one token in the vocabulary.*\(4, 3, 0\)", lambda m, a: m.token_logps(a(X[..., :0]), a(Y))),
    *both(ValueError, r"packed logits \[N, V\] need cu_seqlens", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten()))),
    *both(ValueError, r"with cu_seqlens logits must have shape \[N, V\]", lambda m, a: m.sequence_logps(a(X), a(Y), cu_seqlens=a(CU))),
    *both(ValueError, r"targets must have shape \(4, 3\).*\(4, 3, 2\)", lambda m, a: m.dpo_loss(a(X), a(Y[..., None].expand(4, 3, 2)))),
    *both(ValueError, r"token_weights must have shape \(4, 3\).*found \(3, 4\)", lambda m, a: m.dpo_loss(a(X), a(Y), token_weights=a(torch.ones(3, 4)))),
    *both(ValueError, r"ref_logps must have shape \(4,\).*found \(2,\)", lambda m, a: m.dpo_loss(a(X), a(Y), a(torch.ones(2)))),
    *both(ValueError, r"ref_logps must have shape \(4,\).*found \(4, 1\)", lambda m, a: m.preference_loss(a(torch.ones(4)), a(torch.ones(4, 1)))),
    *both(ValueError, r"logps must have shape \[S\], found \(4, 1\)", lambda m, a: m.preference_loss(a(torch.ones(4, 1)))),
    *both(ValueError, r"pairs must have shape \[P, 2\].*found \(4,\)", lambda m, a: m.dpo_loss(a(X), a(Y), pairs=a(torch.arange(4)))),
    *both(ValueError, r"number\D*must be even, found 3", lambda m, a: m.dpo_loss(a(X[:3]), a(Y[:3]))),
    *both(ValueError, r"cu_seqlens must have shape \[S \+ 1\], found \(0,\)", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten()), cu_seqlens=a(CU[:0]))),
    *both(ValueError, r"index must have shape.*found \(\)", lambda m, a: m.selective_log_softmax(a(X), a(torch.tensor(1)))),
    *both(ValueError, r"index must have shape \(4, 3, 2\).*found \(4, 1, 2\)", lambda m, a: m.selective_log_softmax(a(X), a(Y[:, :1, None].expand(4, 1, 2)))),
    *both(ValueError, r"row_mask must have shape \(4, 3\)", lambda m, a: m.selective_log_softmax(a(X), a(Y), row_mask=a(Y[:2]))),
    *both(ValueError, r"ref_logps and ref_logits exclude each other", lambda m, a: m.dpo_loss(a(X), a(Y), a(torch.ones(4)), ref_logits=a(X))),
    *both(ValueError, r"must have shape \(4, 2\)", lambda m, a: m.dpo_loss(a(X), a(Y), ref_logits=a(X[:, :2]))),
]  # fmt: skip

TYPES = [
    *both(TypeError, r"logits must be one of.*found (torch\.)?int64", lambda m, a: m.token_logps(a(X.long()), a(Y))),
    *both(TypeError, r"logits must be one of.*found (torch\.)?complex64", lambda m, a: m.token_logps(a(X.to(torch.complex64)), a(Y))),
    *both(TypeError, r"targets must be integers, found (torch\.)?float32", lambda m, a: m.token_logps(a(X), a(Y.float()))),
    *both(TypeError, r"targets must be integers, found (torch\.)?bool", lambda m, a: m.dpo_loss(a(X), a(Y > 0))),
    *both(TypeError, r"(targets|index) must be integers, found (torch\.)?float32", lambda m, a: m.selective_log_softmax(a(X), a(Y.float()))),
    *both(TypeError, r"pairs must be integers, found (torch\.)?float32", lambda m, a: m.dpo_loss(a(X), a(Y), pairs=a(torch.ones(2, 2)))),
    *both(TypeError, r"cu_seqlens must be integers, found (torch\.)?float32", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten()), cu_seqlens=a(CU.float()))),
    *both(TypeError, r"token_weights must be real numbers, found (torch\.)?complex64", lambda m, a: m.dpo_loss(a(X), a(Y), token_weights=a(torch.ones(4, 3, dtype=torch.complex64)))),
    *both(TypeError, r"found (torch\.)?int64", lambda m, a: m.preference_loss(a(torch.ones(4, dtype=torch.int64)))),
]  # fmt: skip

VALUES = [
    *both(IndexError, r"target 5 at position \[1, 2\] is outside \[0, 5\)", lambda m, a: m.token_logps(a(X), a(Y.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(5))))),
    *both(IndexError, r"target -1 at position \[0, 0\]", lambda m, a: m.dpo_loss(a(X), a(Y.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(-1))))),
    *both(IndexError, r"target 99 at position \[7\]", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten().index_fill(0, torch.tensor(7), 99)), cu_seqlens=a(CU))),
    *both(IndexError, r"target -100 at position \[0, 0\]", lambda m, a: m.selective_log_softmax(a(X), a(Y * 0 - 100))),
    *both(IndexError, r"pairs\[1, 0\] = 4 is outside \[0, 4\)", lambda m, a: m.dpo_loss(a(X), a(Y), pairs=a(torch.tensor([[0, 1], [4, 1]])))),
    *both(IndexError, r"pairs\[0, 1\] = -1 is outside", lambda m, a: m.preference_loss(a(torch.ones(4)), pairs=a(torch.tensor([[0, -1]])))),
    *both(ValueError, r"cu_seqlens must not decrease: cu_seqlens\[2\] = 2 follows 3", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten()), cu_seqlens=a(torch.tensor([0, 3, 2, 12])))),
    *both(ValueError, r"cu_seqlens\[0\] must be 0, found 1", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten()), cu_seqlens=a(torch.tensor([1, 12])))),
    *both(ValueError, r"cu_seqlens\[1\] must be the number of rows, 12, found 13", lambda m, a: m.sequence_logps(a(PACKED), a(Y.flatten()), cu_seqlens=a(torch.tensor([0, 13])))),
    *both(ValueError, r"loss_type must be one of 'sigmoid', 'hinge', .*, found 'hinge2'", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="hinge2")),
    *both(ValueError, r"label_smoothing must be in \[0, 0.5\], found 0.6", lambda m, a: m.dpo_loss(a(X), a(Y), label_smoothing=0.6)),
    *both(ValueError, r"label_smoothing must be in \[0, 0.5\], found nan", lambda m, a: m.preference_loss(a(torch.ones(4)), label_smoothing=float("nan"))),
    *both(ValueError, r"beta must be at least 0 and finite, found nan", lambda m, a: m.dpo_loss(a(X), a(Y), beta=float("nan"))),
    *both(ValueError, r"beta must be at least 0 and finite, found -1", lambda m, a: m.dpo_loss(a(X), a(Y), beta=-1)),
    *both(ValueError, r"beta must be at least 0 and finite for every pair", lambda m, a: m.dpo_loss(a(X), a(Y), beta=a(torch.tensor([0.1, -0.1])))),
    *both(ValueError, r"margin must have shape \(2,\) with one number per pair", lambda m, a: m.dpo_loss(a(X), a(Y), margin=a(torch.ones(3)))),
    *both(ValueError, r"margin is read by 'sigmoid', .* only", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="nca_pair", margin=a(torch.ones(2)))),
    *both(ValueError, r"dpop_lambda is read by 'sigmoid', .* only", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="nca_pair", dpop_lambda=1.0)),
    *both(ValueError, r"valid_vocab must be at most the number of columns, 5, found 6", lambda m, a: m.token_logps(a(X), a(Y), valid_vocab=6)),
    *both(IndexError, r"is outside \[0, 3\)", lambda m, a: m.token_logps(a(X), a(Y * 0 + 3), valid_vocab=3)),
    *both(ValueError, r"z_loss_weight needs the logits", lambda m, a: m.preference_loss(a(torch.ones(4)), z_loss_weight=0.1)),
    *both(ValueError, r"z_loss_weight adds one number", lambda m, a: m.dpo_loss(a(X), a(Y), z_loss_weight=0.1, reduction="none")),
    *both(ValueError, r"this loss needs lengths", lambda m, a: m.preference_loss(a(torch.ones(4)), length_penalty=0.1)),
    *both(ValueError, r"reduction must be one of 'mean', 'sum', 'none', found 'avg'", lambda m, a: m.dpo_loss(a(X), a(Y), reduction="avg")),
    *both(ValueError, r"temperature must be positive and finite, found 0", lambda m, a: m.selective_log_softmax(a(X), a(Y), temperature=0.0)),
    *both(ValueError, r"softcap must be positive and finite, found -1", lambda m, a: m.token_logps(a(X), a(Y), softcap=-1.0)),
    *both(ValueError, r"logit_scale must be positive and finite, found inf", lambda m, a: m.token_logps(a(X), a(Y), logit_scale=float("inf"))),
    *both(ValueError, r"outputs must be among 'logps', 'entropy'.*found 'top5'", lambda m, a: m.token_logps(a(X), a(Y), outputs=("top5",))),
    *both(ValueError, r"there are no pairs \(sequences: 0\)", lambda m, a: m.dpo_loss(a(X[:0]), a(Y[:0]))),
    *both(ValueError, r"there are no pairs \(sequences: 4\)", lambda m, a: m.dpo_loss(a(X), a(Y), pairs=a(torch.zeros(0, 2, dtype=torch.int64)))),
    *both(ValueError, r"there are no pairs", lambda m, a: m.preference_loss(a(torch.ones(0)))),
    # parameters that none of the losses reads, or outside what it is defined on
    *both(ValueError, r"label_smoothing is read by 'sigmoid', .* only, found 0.1 with loss_type 'hinge'", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="hinge", label_smoothing=0.1)),
    *both(ValueError, r"'exo_pair' needs label_smoothing in \(0, 0.5\]", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="exo_pair")),
    *both(ValueError, r"'robust' needs label_smoothing in \[0, 0.5\)", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="robust", label_smoothing=0.5)),
    *both(ValueError, r"'ipo' divide by beta: it must be positive, found 0", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="ipo", beta=0)),
    *both(ValueError, r"'sppo_hard' divide by beta", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="sppo_hard", beta=0)),
    *both(ValueError, r"'ipo' are defined on sums over tokens: average must be False", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="ipo", average=True)),
    *both(ValueError, r"'simpo' are defined on averages over tokens", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="simpo", average=False)),
    *both(ValueError, r"'simpo' need average=True, 'ipo' need average=False", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type=["simpo", "ipo"])),
    *both(ValueError, r"'cpo' have no reference", lambda m, a: m.dpo_loss(a(X), a(Y), a(torch.ones(4)), loss_type="cpo")),
    *both(ValueError, r"f_divergence must be one of 'reverse_kl', .*found 'kl'", lambda m, a: m.dpo_loss(a(X), a(Y), f_divergence="kl")),
    *both(ValueError, r"f_divergence 'forward_kl' is for .*found loss_type 'nca_pair'", lambda m, a: m.dpo_loss(a(X), a(Y), f_divergence="forward_kl", loss_type="nca_pair")),
    *both(ValueError, r"f_divergence 'forward_kl' is for .*found loss_type 'sft'", lambda m, a: m.dpo_loss(a(X), a(Y), f_divergence="forward_kl", loss_type="sft")),
    *both(ValueError, r"f_alpha_divergence_coef is read by 'alpha_divergence' only", lambda m, a: m.dpo_loss(a(X), a(Y), f_alpha_divergence_coef=0.5)),
    *both(ValueError, r"discopop_tau is read by 'discopop' only, found loss_type 'sigmoid'", lambda m, a: m.dpo_loss(a(X), a(Y), discopop_tau=0.5)),
    *both(ValueError, r"discopop_tau must be positive", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="discopop", discopop_tau=0)),
    *both(ValueError, r"simpo_gamma is read by 'simpo' only", lambda m, a: m.dpo_loss(a(X), a(Y), simpo_gamma=0.5)),
    *both(ValueError, r"desirable_weight is read by 'kto' only", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="bco", baseline=0.0, desirable_weight=2.0)),
    *both(ValueError, r"baseline goes with 'kto' and 'bco'", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="kto")),
    *both(ValueError, r"baseline goes with 'kto' and 'bco'", lambda m, a: m.dpo_loss(a(X), a(Y), baseline=0.0)),
    *both(ValueError, r"take no others beside them and no wpo, found 'kto', 'sigmoid'", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type=["kto", "sigmoid"], baseline=0.0)),
    *both(ValueError, r"take `desirable` \[S\], not pairs", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="kto", baseline=0.0, pairs=a(torch.zeros(1, 2, dtype=torch.int64)))),
    *both(ValueError, r"desirable is for losses of single completions", lambda m, a: m.dpo_loss(a(X), a(Y), desirable=a(torch.ones(4)))),
    *both(ValueError, r"desirable must have shape \(4,\) with one truth value", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="kto", baseline=0.0, desirable=a(torch.ones(3)))),
    *both(ValueError, r"baseline must have shape \(\) as one number", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="kto", baseline=a(torch.ones(3)))),
    *both(ValueError, r"pair_weights must have shape \(2,\) with one number per pair, found \(4,\)", lambda m, a: m.dpo_loss(a(X), a(Y), pair_weights=a(torch.ones(4)))),
    *both(ValueError, r"loss_weights must have one number per loss type, 2, found 1", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type=["sigmoid", "sft"], loss_weights=[1.0])),
    *both(ValueError, r"loss_weights must be finite, found inf", lambda m, a: m.dpo_loss(a(X), a(Y), loss_weights=[float("inf")])),
    *both(ValueError, r"loss_type must name 1 to 8 losses, found 0", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type=[])),
    *both(ValueError, r"f_divergence 'forward_kl' is from a reference", lambda m, a: m.dpo_loss(a(X), a(Y), f_divergence="forward_kl")),
    *both(ValueError, r"pair_weights is for losses of pairs, which 'aot'", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="aot", pair_weights=a(torch.ones(2)))),
    *both(ValueError, r"token_weights must have shape \(4, 3\)", lambda m, a: m.dpo_loss(a(X), a(Y), ld_alpha=0.5, token_weights=a(torch.ones(3)))),
    *both(ValueError, r"pairs must have shape \[P, 2\]", lambda m, a: m.dpo_loss(a(X), a(Y), ld_alpha=0.5, pairs=a(torch.ones(1, 3, dtype=torch.int64)))),
    *both(IndexError, r"pairs.* \[0, 4\)", lambda m, a: m.dpo_loss(a(X), a(Y), ld_alpha=0.5, pairs=a(torch.tensor([[0, 9]])))),
    *both(ValueError, r"baseline must be finite, found nan", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="kto", baseline=float("nan"))),
    *both(ValueError, r"loss_type must be one of .* or a list, found None", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type=None)),
    *both(ValueError, r"loss_weights must be a list of 1 numbers, found 0.5", lambda m, a: m.dpo_loss(a(X), a(Y), loss_weights=0.5)),
    *both(ValueError, r"cu_seqlens must rise from 0", lambda m, a: m.dpo_loss(a(PACKED), a(Y.flatten()), ld_alpha=0.5, cu_seqlens=a(torch.tensor([0, 13, 12])))),
    *both(ValueError, r"wpo weighs the losses of the kernels, not those of 'aot'", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="aot", wpo=True)),
    *both(ValueError, r"ld_alpha must be in \[0, 1\], found 2", lambda m, a: m.dpo_loss(a(X), a(Y), ld_alpha=2)),
    *both(ValueError, r"ld_alpha compares the completions of pairs", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type="kto", baseline=0.0, ld_alpha=0.5)),
    *both(ValueError, r"'sft' beside averages over tokens takes no token_weights", lambda m, a: m.dpo_loss(a(X), a(Y), loss_type=["simpo", "sft"], token_weights=a(torch.ones(4, 3)))),
    *both(ValueError, r"num_pairs is for reduction 'mean', found 'sum'", lambda m, a: m.dpo_loss(a(X), a(Y), num_pairs=4, reduction="sum")),
    *both(ValueError, r"num_pairs must be positive", lambda m, a: m.dpo_loss(a(X), a(Y), num_pairs=0)),
    *both(ValueError, r"with num_pairs, 'sft' needs num_chosen_tokens", lambda m, a: m.dpo_loss(a(X), a(Y), num_pairs=4, loss_type="sft")),
    *both(ValueError, r"num_chosen_tokens goes with num_pairs", lambda m, a: m.dpo_loss(a(X), a(Y), num_chosen_tokens=4, loss_type="sft")),
    *both(ValueError, r"this loss needs lengths", lambda m, a: m.preference_loss(a(torch.ones(4)), loss_type="ipo")),
    *both(ValueError, r"lengths must have shape \(4,\) with one number per sequence", lambda m, a: m.preference_loss(a(torch.ones(4)), loss_type="ipo", lengths=a(torch.ones(2)))),
    *both(ValueError, r"a loss function must return", lambda m, a: m.preference_loss(a(torch.ones(4)), loss_type=lambda c, d, rc, rd: c[:1])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), [*SHAPES, *TYPES, *VALUES])
def test_error(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_mixed_devices():
    with pytest.raises(ValueError, match=r"targets must be on the device of logits, cpu, found meta"):
        dpo_fast.token_logps(X, Y.to("meta"))
    with pytest.raises(ValueError, match=r"ref_logps must be on the device of logits, cpu, found meta"):
        dpo_fast.dpo_loss(X, Y, torch.ones(4, device="meta"))


def test_weights_that_expect_a_gradient_are_refused():
    with pytest.raises(ValueError, match=r"token_weights gets no gradient, but requires one"):
        dpo_fast.dpo_loss(X, Y, token_weights=torch.ones(4, 3, requires_grad=True))


def test_half_precision_reference_is_accepted():
    """A reference in another float type is converted, as users' data are."""
    out = dpo_fast.dpo_loss(X, Y, torch.ones(4, dtype=torch.bfloat16), ref_logits=None)
    assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("average", [False, True])
def test_fully_ignored_sequence(average):
    targets = Y.clone()
    targets[1] = -100
    x = X.clone().requires_grad_()
    out = dpo_fast.dpo_loss(x, targets, average=average)
    out.loss.backward()
    assert out.logps[1] == 0
    assert (x.grad[1] == 0).all()
    exact = reference.dpo_loss_grad(X.numpy(), targets.numpy(), average=average)
    np.testing.assert_allclose(x.grad.numpy(), exact, atol=1e-6)
    _, grad = dpo_fast.numpy.dpo_loss(X.numpy(), targets.numpy(), average=average, with_grad=True)
    assert np.array_equal(grad, x.grad.numpy())


@pytest.mark.parametrize("average", [False, True])
def test_every_row_ignored(average):
    x = X.clone().requires_grad_()
    out = dpo_fast.dpo_loss(x, torch.full((4, 3), -100), average=average)
    assert out.loss.item() == pytest.approx(np.log(2))
    assert out.loss.requires_grad
    out.loss.backward()
    assert (x.grad == 0).all()


def test_no_positions():
    x = torch.zeros(2, 0, 5, requires_grad=True)
    out = dpo_fast.dpo_loss(x, torch.zeros(2, 0, dtype=torch.int64))
    out.loss.backward()
    assert out.logps.tolist() == [0, 0]
    assert x.grad.shape == (2, 0, 5)
    assert dpo_fast.numpy.token_logps(np.zeros((0, 5), np.float32), np.zeros(0, np.int64)).logps.shape == (0,)


def test_operators_called_directly_check_too():
    """The operators are public: shapes that do not fit must not reach a pointer."""
    rows, seqs = Rows(Y, None, None, LogitOptions()), Sequences(None, False)
    out = call(TOKEN_FORWARD, X, TokenForward(rows, 0, True))
    logps, stats = out[:2]

    def backward(saved, **grads):
        statistics = tuple(grads.pop(each.name, None) for each in STATISTICS)
        grad = Grads(statistics=statistics, **grads)
        call(ROWS_BACKWARD, X, RowsBackward(rows, seqs, None, 0.0, Saved(*saved), grad))

    for saved, grads in (
        ((logps[:2], stats, None, None, None), {"logps": logps}),
        ((logps, stats[:2], None, None, None), {"logps": logps}),
        ((logps, stats, None, None, None), {"logps": logps[:, :1]}),
        ((logps, stats, None, None, None), {"entropy": logps}),  # of an entropy that was not computed
        ((logps, stats, logps[:1], None, None), {"entropy": logps}),
        ((logps, stats, None, None, None), {"lse": logps[:1]}),
        ((logps, stats, None, None, None), {"seq_logps": torch.ones(2)}),
        ((logps, stats, None, None, None), {"loss": torch.ones(())}),  # without derivatives of pairs
        ((logps, stats, None, torch.ones(1, 2), None), {"loss": torch.ones(())}),
        ((logps, stats, None, torch.ones(2, 2), None), {"losses": torch.ones(3)}),
    ):
        with pytest.raises(ValueError, match=r"shape|entropy|pair_grads"):
            backward(saved, **grads)
    with pytest.raises(ValueError, match="row_mask must have shape"):
        call(TOKEN_FORWARD, X, TokenForward(rows._replace(row_mask=torch.ones(2, 3)), 0, True))
    with pytest.raises(ValueError, match="pair_grads must have shape"):
        call(PREFERENCE_BACKWARD, torch.ones(4), PreferenceBackward(None, 0.0, torch.ones(1, 2), Grads()))


def test_numpy_arrays_the_kernels_cannot_read():
    raw = np.zeros(4 * 3 * 5 * 4 + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(4, 3, 5)
    with pytest.raises(ValueError, match="aligned"):
        dpo_fast.numpy.token_logps(unaligned, Y.numpy())
    with pytest.raises(ValueError, match="native byte order"):
        dpo_fast.numpy.token_logps(X.numpy().astype(">f4"), Y.numpy())
    read_only = X.numpy().copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="can be written"):
        dpo_fast.numpy.dpo_loss(read_only, Y.numpy(), with_grad=True, inplace_backward=True)
    with pytest.raises(ValueError, match="share memory"):
        dpo_fast.numpy.dpo_loss(
            np.lib.stride_tricks.as_strided(X.numpy().copy(), (4, 3, 5), (0, 20, 4)),
            Y.numpy(),
            with_grad=True,
            inplace_backward=True,
        )


def test_threads_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        dpo_fast.set_num_threads(0)


def test_preference_backward_checks_the_type():
    """The gradient has logps' type: any other than float32 and float64 would be written out of bounds."""
    a = PreferenceBackward(None, 0.0, torch.ones(2, 2, dtype=torch.float64), Grads(loss=torch.ones(())))
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.int64):
        with pytest.raises(TypeError, match="logps must be torch.float32 or torch.float64"):
            call(PREFERENCE_BACKWARD, torch.zeros(4).to(dtype), a)


def test_no_index_is_ignored_by_accident():
    """The smallest integer is an index like any other, and integers too large for int64 do not wrap."""
    index = torch.tensor([[0, 1, -(2**63)], [0, 1, 2]])
    with pytest.raises(IndexError, match="position"):
        dpo_fast.selective_log_softmax(X[:2], index)
    with pytest.raises(IndexError, match="position"):
        dpo_fast.numpy.selective_log_softmax(X[:2].numpy(), index.numpy())
    with pytest.raises(TypeError, match="targets must be integers, found uint64"):
        dpo_fast.numpy.token_logps(X.numpy(), np.full((4, 3), 2**64 - 100, np.uint64))


def test_names_in_messages():
    with pytest.raises(ValueError, match="targets must have shape .* to fit ref_logits"):
        dpo_fast.dpo_loss(X, Y, ref_logits=X[:, :2])
    with pytest.raises(TypeError, match="ref_logits must be one of"):
        dpo_fast.dpo_loss(X, Y, ref_logits=X.long())
    with pytest.raises(TypeError, match="index must be integers"):
        dpo_fast.selective_log_softmax(X, Y.float())
    with pytest.raises(ValueError, match="loss_type must be one of 'sigmoid'.*found 3"):
        dpo_fast.dpo_loss(X, Y, loss_type=["sigmoid", 3])
    with pytest.raises(TypeError, match="pairs must be a tensor, found list"):
        dpo_fast.dpo_loss(X, Y, pairs=[[0, 1]])
    with pytest.raises(ValueError, match="baseline gets no gradient, but requires one"):
        dpo_fast.dpo_loss(X, Y, loss_type="kto", baseline=torch.zeros((), requires_grad=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        dpo_fast.dpo_loss(X, Y, gamma=1)
    with pytest.raises(ValueError, match="there are no pairs"):
        dpo_fast.numpy.dpo_loss(X.numpy(), Y.numpy(), pairs=np.zeros((0, 2)))
    with pytest.raises(TypeError, match="float"):
        dpo_fast.token_logps(X, Y, ignore_index=1.9)


def test_integer_types_of_pairs_in_metrics():
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3], [2, 1]])
    expected = dpo_fast.preference_loss(logps, pairs=pairs).metrics()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert dpo_fast.preference_loss(logps, pairs=pairs.to(dtype)).metrics() == expected


def test_tiny_and_huge_weights_are_not_rounded_to_nothing():
    for weight in (1e-50, 1e39):
        weights = torch.full((4, 3), weight, dtype=torch.float64)
        found = dpo_fast.sequence_logps(X, Y, token_weights=weights, average=True)
        exact = reference.sequence_logps(X.numpy(), Y.numpy(), token_weights=weights.numpy(), average=True)
        np.testing.assert_allclose(found.numpy(), exact, atol=1e-6)


def test_reference_is_not_rounded():
    """Equal models give rewards of exactly 0; a float64 reference counts in full, also beside float32 logits."""
    x, targets = 3 * torch.randn(8, 512, 200), torch.randint(0, 200, (8, 512))
    out = dpo_fast.dpo_loss(x, targets, ref_logits=x)
    assert (out.chosen_rewards == 0).all()
    assert out.metrics()["rewards/accuracies"] == 0
    out, _ = dpo_fast.numpy.dpo_loss(x.numpy(), targets.numpy(), ref_logits=x.numpy(), with_grad=True)
    assert (out.rejected_rewards == 0).all()
    logps = torch.tensor([-3000.0, -2000.0])
    ref = torch.tensor([-3000.0101, -2000.0202], dtype=torch.float64)
    exact = reference.preference_loss(logps.numpy(), ref.numpy(), beta=0.5)
    for out in (
        dpo_fast.preference_loss(logps, ref, beta=0.5),
        dpo_fast.numpy.preference_loss(logps.numpy(), ref.numpy(), beta=0.5),
    ):
        assert float(out.chosen_rewards[0]) == pytest.approx(exact.chosen_rewards[0], rel=1e-6)
        assert float(out.loss) == pytest.approx(exact.loss, rel=1e-6)


@pytest.mark.parametrize("module", [dpo_fast, dpo_fast.numpy], ids=["torch", "numpy"])
def test_unknown_keyword(module):
    logps = torch.zeros(2) if module is dpo_fast else np.zeros(2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'; options: loss_weights, .*simpo_gamma"):
        module.preference_loss(logps, gamma=1.0)

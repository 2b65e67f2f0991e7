"""Preference losses, from logits or from sequence log-probabilities: the public functions and their autograd.

    r[p] = (logp[c_p] - ref[c_p]) - (logp[d_p] - ref[d_p])        c chosen, d rejected
    loss[p] = softplus(-beta r[p]) = -log sigmoid(beta r[p])      (DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7)

That loss and the others that are sums over pairs are in csrc/preference_loss.h, those that couple the batch in
_loss/coupled.py, the checks of their options in _loss/options.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from dpo_fast._checks import STATISTIC_BITS, LogitKeywords, split_logit_keywords, statistic, truth
from dpo_fast._loss.levels import (
    choose,
    loss_statistics,
    output,
    reduced,
    token_weights_of,
    with_pairs,
    with_tokens,
    with_z_loss,
)
from dpo_fast._loss.options import LossKeywords, LossType
from dpo_fast._torch import register  # noqa: F401  (it defines torch.ops.dpo_fast)
from dpo_fast._torch.autograd import DPOLoss, PreferenceLoss, inplace_allowed, run, wants_gradient
from dpo_fast._torch.checks import check_no_grad, check_rows, check_sequences, plain_tensors
from dpo_fast._torch.operators import (
    SEQUENCE_FORWARD,
    DPOForward,
    PreferenceForward,
    Rows,
    SequenceForward,
    Sequences,
    call,
)
from dpo_fast._torch.sequences import kept_rows
from dpo_fast.outputs import DPOOutput


class DPOKeywords(LossKeywords, LogitKeywords, total=False):
    """Options of a loss and of the logits; see `LossKeywords` and `LogitKeywords`."""


def dpo_loss(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_logits: Tensor | None = None,
    beta: float | Tensor = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: Tensor | None = None,
    pair_weights: Tensor | None = None,
    desirable: Tensor | None = None,
    baseline: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ld_alpha: float | None = None,
    wpo: bool = False,
    average: bool | None = None,
    reduction: str = "mean",
    outputs: Sequence[str] = (),
    inplace_backward: bool = False,
    **options: Unpack[DPOKeywords],
) -> DPOOutput:
    """A preference loss from logits, in one fused call forward and one backward.

    Args:
        logits: [S, T, V], or packed [N, V] (or [1, N, V]) with cu_seqlens; float32, float64, bfloat16 or float16, any
            strides.
        targets: [S, T] or [N] (or [1, N]), integers; row t predicts targets[:, t] (see `completion_targets`).
        ref_logps: [S], the reference model's sequence log-probs. Without it and ref_logits the loss is reference-free.
        ref_logits: like logits, the reference model's logits, instead of ref_logps. Neither ever gets a gradient.
        beta: strength of the pull towards the reference, at least 0; a number, or a tensor [] or [P] without gradient.
        loss_type: a name from the table in docs/losses.md ("sigmoid" is DPO, eq. 7), a function
            f(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps) -> [P] of float64 [P] tensors, or
            several of these, whose weighted sum is the loss.
        label_smoothing: in [0, 0.5]; probability that a pair's labels are swapped, for the losses that know it.
        pairs: [P, 2] integers, numbers of the chosen and rejected sequences; by default the first half of the
            sequences is chosen and the second half rejected. A sequence may be in several pairs, or in none.
        pair_weights: [P], multiplies the losses. No gradient. A pair of weight 0 counts as none: loss and rewards are
            0, and its sequences are read for logps alone.
        desirable: [S] truth values, for "kto" and "bco", whose losses are one per sequence (P = S); by default the
            first half is desirable.
        baseline: a number or 0-d tensor without gradient; "kto": the estimate of the KL divergence; "bco": the running
            mean of the rewards.
        cu_seqlens, token_weights: as for `sequence_logps`.
        ld_alpha: weight, in [0, 1], of the tokens past the shorter completion of a pair (LD-DPO, see
            `ld_dpo_weights`); times token_weights.
        wpo: weigh each pair by how likely the policy is to write it (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2);
            no gradient goes through the weight.
        average: log-probs of sequences are averages over tokens; by default what the loss is defined on.
        reduction: "mean" or "sum" over the pairs, or "none".
        inplace_backward: as for `token_logps`.
        outputs: statistics of tokens for DPOOutput.tokens and its metrics, among "logps", "entropy", "mean_logits",
            "is_top1", "lse"; no gradient.
        options: see `LossKeywords`: loss_weights, f_divergence, f_alpha_divergence_coef, discopop_tau, simpo_gamma,
            desirable_weight, undesirable_weight, dpop_lambda, length_penalty, margin, z_loss_weight, num_pairs,
            num_chosen_tokens; and `LogitKeywords`.

    Returns:
        DPOOutput: loss [] (or [P] for "none"), losses [P], chosen_rewards and rejected_rewards [P], logps [S];
        float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, devices or options that do not fit, or that the loss does not read; no pairs.
        TypeError: tensors of another type.
        IndexError: a target outside [0, V) that is not ignore_index, or a pair outside the sequences.
    """
    logits, targets, ref_logps, ref_logits, pairs, pair_weights, desirable, cu_seqlens, token_weights = plain_tensors(
        _TENSORS, (logits, targets, ref_logps, ref_logits, pairs, pair_weights, desirable, cu_seqlens, token_weights)
    )
    logit_options, keywords = split_logit_keywords(options), dict(**options)
    wpo, inplace = truth("wpo", wpo), truth("inplace_backward", inplace_backward)
    wanted = 0 if outputs == () else loss_statistics(outputs)
    choice = choose(
        keywords, logits, beta, pair_weights, baseline, reduction, token_weights if ld_alpha is None else ld_alpha,
        ref_logps if ref_logits is None else ref_logits, loss_type, label_smoothing, average, wpo,
    )  # fmt: skip
    loss, seqs = choice.loss, Sequences(cu_seqlens, choice.loss.options.average)
    rows = Rows(targets, None, token_weights, logit_options)
    if loss.unpaired or desirable is not None or ld_alpha is not None or choice.operand.numbers.pair_beta is not None:
        check_rows(logits, rows)
        n_seqs = check_sequences(logits, rows, seqs)
        choice, pairs = with_pairs(choice, n_seqs, pairs, desirable, logits)
    z_loss, weights = loss.z_loss_weight > 0, token_weights
    if token_weights is not None or ld_alpha is not None:
        looks_at_all = wpo or bool(outputs) or z_loss
        weights = token_weights_of(
            loss, token_weights, ld_alpha, targets, pairs, cu_seqlens, logit_options.ignore_index, looks_at_all
        )
        rows = rows._replace(token_weights=weights)
    if ref_logits is not None:
        if ref_logps is not None:
            raise ValueError("ref_logps and ref_logits exclude each other: give one of them")
        check_rows(ref_logits, rows, "ref_logits")
        # unrounded, as the policy's own sums are: equal models give rewards of exactly 0
        reference = SequenceForward(rows, seqs, True, False)
        ref_logps = call(SEQUENCE_FORWARD, ref_logits.detach(), reference).seq_logps
    if ref_logps is not None and ref_logps.requires_grad:
        ref_logps = ref_logps.detach()
    all_wanted, keep = wanted | (STATISTIC_BITS["lse"] if z_loss else 0), wants_gradient(logits)
    a = DPOForward(rows, seqs, choice.pairs(pairs), ref_logps, wpo, all_wanted, keep)
    found = run(DPOLoss, keep, logits, a, inplace_allowed(inplace), bool(outputs) or z_loss)
    out = output(found, choice, pairs)
    if outputs or z_loss:
        kept = kept_rows(targets, logit_options.ignore_index, weights)
        out = with_tokens(out, all_wanted, outputs, found[5:], targets, kept, cu_seqlens)
        if z_loss:
            out = with_z_loss(out, statistic("lse", all_wanted, found[6:]), choice, targets, kept, seqs)
    return reduced(out, choice, ref_logps)


_TENSORS = (
    "logits", "targets", "ref_logps", "ref_logits", "pairs", "pair_weights", "desirable", "cu_seqlens", "token_weights"
)  # fmt: skip


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    pairs: Tensor | None = None,
    pair_weights: Tensor | None = None,
    desirable: Tensor | None = None,
    baseline: float | Tensor | None = None,
    lengths: Tensor | None = None,
    average: bool | None = None,
    reduction: str = "mean",
    **options: Unpack[LossKeywords],
) -> DPOOutput:
    """A preference loss from sequence log-probabilities.

    Args:
        logps: [S], log-probs of the policy; float32, float64, or a half type, which is converted to float32.
        ref_logps: [S], log-probs of the reference; never gets a gradient. None: reference-free.
        lengths: [S], number of tokens of each sequence; for "ipo", "sigmoid_norm", "sft" and a length_penalty. No
            gradient.
        average: whether the given log-probs are averages over tokens; by default what the loss is defined on.
        all others: as for `dpo_loss`.

    Returns:
        DPOOutput, as `dpo_loss`; logps are the given ones (half types as float32).

    Raises:
        ValueError, TypeError, IndexError: as `dpo_loss`; also for a loss that needs lengths without them.
    """
    names = ("logps", "ref_logps", "pairs", "pair_weights", "desirable", "lengths")
    logps, ref_logps, pairs, pair_weights, desirable, lengths = plain_tensors(
        names, (logps, ref_logps, pairs, pair_weights, desirable, lengths)
    )
    choice = choose(
        dict(**options), logps, beta, pair_weights, baseline, reduction, None, ref_logps, loss_type, label_smoothing,
        average,
    )  # fmt: skip
    loss = choice.loss
    loss.check_lengths(lengths is not None)
    if loss.z_loss_weight:
        raise ValueError("z_loss_weight needs the logits: there is no log-sum-exp in sequence log-probs")
    check_no_grad("lengths", lengths)
    if logps.dim() != 1:
        raise ValueError(f"logps must have shape [S], found {tuple(logps.shape)}")
    values = logps.float() if logps.dtype in (torch.bfloat16, torch.float16) else logps
    if ref_logps is not None and ref_logps.requires_grad:
        ref_logps = ref_logps.detach()
    choice, pairs = with_pairs(choice, logps.shape[0], pairs, desirable, logps)
    keep = wants_gradient(values)
    a = PreferenceForward(choice.pairs(pairs), ref_logps, lengths, False, keep)
    reduced_loss, losses, *rewards = run(PreferenceLoss, keep, values, a)
    return reduced(output((reduced_loss, losses, values, *rewards), choice, pairs), choice, ref_logps)

"""Token and sequence log-probabilities from logits: the public functions and their autograd.

log p[n] = z[n, y_n] - log sum_v exp z[n, v]          z = softcap * tanh(x * logit_scale / softcap) / temperature
log p[s] = sum over the tokens n of sequence s of w_n log p[n]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from dpo_fast._checks import (
    IGNORE_NOTHING,
    LogitKeywords,
    LogitOptions,
    check_shape,
    named_statistics,
    number,
    only_logit_keywords,
    truth,
    wanted_statistics,
)
from dpo_fast._torch import register  # noqa: F401  (it defines torch.ops.dpo_fast)
from dpo_fast._torch.autograd import SequenceLogps, TokenLogps, inplace_allowed, run, wants_gradient
from dpo_fast._torch.checks import check_device, check_integers, check_no_grad, plain_tensors
from dpo_fast._torch.operators import Rows, SequenceForward, Sequences, TokenForward
from dpo_fast._torch.sequences import refuse_bad_targets
from dpo_fast.outputs import TokenOutput


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    outputs: Sequence[str] = ("logps",),
    inplace_backward: bool = False,
    **options: Unpack[LogitKeywords],
) -> TokenOutput:
    """Log-probability of each target under softmax(logits), and other statistics of the same rows, in one pass.

    Args:
        logits: [S, T, V] or packed [N, V]; float32, float64, bfloat16 or float16, any strides (views are not copied).
        targets: [S, T] or [N], integers; row t predicts targets[:, t] (see `completion_targets`).
        outputs: names of the statistics wanted, among "logps", "entropy", "mean_logits", "is_top1",
            "log_sum_sq_probs", "lse"; see `TokenOutput`. The log-probs keep every bit, whatever else is asked for.
        inplace_backward: the backward pass writes the gradient over the logits instead of allocating it. Any later
            use of the logits by autograd then raises. Under torch.compile, which has no such guard, the gradient is
            allocated.
        options: how the logits are read, see `LogitKeywords`.

    Returns:
        TokenOutput of tensors in the targets' shape: float32 (float64 for float64 logits), is_top1 bool; None where
        not asked for. logps, entropy and lse (nats) are differentiable, once.

    Raises:
        ValueError: shapes or devices that do not fit, an option out of its range.
        TypeError: logits or targets of another type.
        IndexError: a target outside [0, V) that is not ignore_index.
    """
    logits, targets = plain_tensors(("logits", "targets"), (logits, targets))
    wanted, inplace = wanted_statistics(outputs), truth("inplace_backward", inplace_backward)
    rows = Rows(targets, None, None, only_logit_keywords("token_logps", options))
    if targets.shape != logits.shape[:-1]:
        check_shape("targets", targets.shape, logits.shape[:-1], "to fit logits of shape ", logits.shape)
    keep = wants_gradient(logits)
    logps, *found = run(TokenLogps, keep, logits, TokenForward(rows, wanted, keep), inplace_allowed(inplace))
    by_name = {each.name: tensor for each, tensor in zip(named_statistics(wanted), found, strict=True)}
    return TokenOutput(logps if "logps" in outputs else None, **by_name)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """log_softmax(logits / temperature, -1) gathered at index; TRL's function of this name, fused.

    Args:
        logits: (..., V); float32, float64, bfloat16 or float16.
        index: (...) for one entry of each row, or (..., K) for K of them; integers.
        temperature: positive.
        row_mask: like index; entries where it is zero give 0, and rows that are zero throughout are not read.
        dtype: of the result, a floating-point type; by default the logits' own, rounded once, as TRL's function gives
            it. torch.float32 keeps all digits of half-precision logits.

    Returns:
        Like index.

    Raises:
        ValueError, TypeError, IndexError: as `token_logps`; no index is ignored, whatever its value.
    """
    logits, index, row_mask = plain_tensors(("logits", "index", "row_mask"), (logits, index, row_mask))
    options = LogitOptions(IGNORE_NOTHING, number("temperature", temperature))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point type of torch, found {dtype!r}")
    if logits.dim() < 1 or index.dim() not in (logits.dim() - 1, logits.dim()):
        raise ValueError(
            f"index must have shape (...) or (..., K) to fit logits of shape {tuple(logits.shape)}, found "
            f"{tuple(index.shape)}"
        )
    gathers_one = index.dim() == logits.dim() - 1
    check_integers("index", index)
    lead = logits.shape[:-1]
    check_shape("index", index.shape, lead if gathers_one else (*lead, index.shape[-1]), "to fit the logits")
    check_device("index", index, logits, "logits")
    rows_kept = None
    if row_mask is not None:
        check_shape("row_mask", row_mask.shape, index.shape, "as index has")
        check_device("row_mask", row_mask, logits, "logits")
        index = index.long()
        rows_kept = row_mask != 0 if gathers_one else (row_mask != 0).any(-1)
        if not gathers_one:  # an entry masked out may hold any index
            index = index.masked_fill(row_mask == 0, 0)
    given, shape, vocab, own = index, index.shape, logits.shape[-1], dtype or logits.dtype
    if logits.dim() == 1:
        logits, index = logits.unsqueeze(0), index.unsqueeze(0)
        rows_kept = None if rows_kept is None else rows_kept.unsqueeze(0)
    elif logits.dim() > 3:
        logits = logits.flatten(0, -2)
        index = index.flatten() if gathers_one else index.flatten(0, -2)
        rows_kept = None if rows_kept is None else rows_kept.flatten()
    keep = wants_gradient(logits)
    a = TokenForward(Rows(index, rows_kept, None, options), 0, keep)
    try:
        logps = run(TokenLogps, keep, logits, a, False)[0].reshape(shape)
    except IndexError:  # its position is one in the rows above
        refuse_bad_targets(
            given, torch.ones_like(given, dtype=torch.bool) if row_mask is None else row_mask != 0, vocab
        )
        raise
    if row_mask is not None and not gathers_one:
        logps = logps.masked_fill(row_mask == 0, 0)
    return logps.to(own)  # type: ignore[no-any-return]


def sequence_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    average: bool = False,
    inplace_backward: bool = False,
    **options: Unpack[LogitKeywords],
) -> Tensor:
    """Log-probability of each sequence: the (weighted) sum or mean of its tokens' log-probabilities, in one call.

    Args:
        logits: [S, T, V], or packed [N, V] (or [1, N, V]) with cu_seqlens.
        targets: [S, T] or [N] (or [1, N]), as for `token_logps`.
        cu_seqlens: [S + 1] integers, rising from 0 to N: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1].
        token_weights: like targets; multiplies each token's log-prob. A token of weight 0 is ignored. No gradient.
        average: divide by the sum of the weights of the tokens that count (without weights, their number).
        inplace_backward, options: as for `token_logps`.

    Returns:
        [S], float32 (float64 for float64 logits), differentiable once. A sequence whose tokens are all ignored has
        log-probability 0 and gradient 0.

    Raises:
        ValueError, TypeError, IndexError: as `token_logps`; also for cu_seqlens that does not rise from 0 to N.
    """
    names = ("logits", "targets", "cu_seqlens", "token_weights")
    logits, targets, cu_seqlens, token_weights = plain_tensors(names, (logits, targets, cu_seqlens, token_weights))
    check_no_grad("token_weights", token_weights)
    rows = Rows(targets, None, token_weights, only_logit_keywords("sequence_logps", options))
    keep, inplace = wants_gradient(logits), truth("inplace_backward", inplace_backward)
    a = SequenceForward(rows, Sequences(cu_seqlens, truth("average", average)), False, keep)
    return run(SequenceLogps, keep, logits, a, inplace_allowed(inplace))  # type: ignore[no-any-return]

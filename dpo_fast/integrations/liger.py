"""`FusedLinearDPOLoss`: the interface of Liger's LigerFusedLinearDPOLoss (liger-kernel 0.8.5) over `linear_dpo_loss`.

    from dpo_fast.integrations.liger import FusedLinearDPOLoss as LigerFusedLinearDPOLoss

Same constructor, same arguments in the same order, same returned tuple. In addition `ipo` works, log-probs are
differentiable, a completion without tokens is not NaN, and tiles follow `memory_budget`, not the batch. Liger is not
imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_fast.linear import linear_dpo_loss
from dpo_fast.losses import preference_loss

LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    "discopop",
)


def _whole(tensor: Any) -> Tensor:
    """A tensor that is sharded over ranks (DTensor) as a plain one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


class FusedLinearDPOLoss(torch.nn.Module):
    """A DPO loss from hidden states and the LM head, whose logits are never built whole.

    Args:
        ignore_index: targets with this value are ignored.
        beta: strength of the pull towards the reference.
        alpha: weight of the negative log-likelihood of the chosen completions, with compute_nll_loss.
        compute_nll_loss: add that term, the mean over the chosen tokens.
        compiled, chunk_size: accepted and not read; nothing is compiled, and tiles follow memory_budget.
        use_ref_model: whether there is a reference; if not, ref_* are not read.
        average_log_prob: log-probs of sequences are averages over tokens.
        loss_type: one of `LOSS_TYPES`, see docs/losses.md.
        label_smoothing: for "exo_pair" (in (0, 0.5]) and "robust" (in [0, 0.5)); the others do not read it.
        discopop_tau: for "discopop".
        memory_budget: as for `linear_dpo_loss`.

    Raises:
        ValueError: an unknown loss_type, or a parameter outside its range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(map(repr, LOSS_TYPES))}, found {loss_type!r}")
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self.memory_budget = memory_budget
        self._check_options()

    def _loss_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"loss_type": self.loss_type, "beta": self.beta, "average": self.average_log_prob}
        if self.compute_nll_loss:
            options |= {"loss_type": [self.loss_type, "sft"], "loss_weights": [1.0, self.alpha]}
        if self.loss_type in ("exo_pair", "robust"):
            options["label_smoothing"] = self.label_smoothing
        if self.loss_type == "discopop":
            options["discopop_tau"] = self.discopop_tau
        return options

    def _check_options(self) -> None:
        """Raises for bad options now and not at the first forward: computes the loss of a pair of one token each."""
        zeros = torch.zeros(2, device="cpu")  # whatever the default device is
        preference_loss(zeros, zeros if self.use_ref_model else None, lengths=zeros + 1, **self._loss_options())

    def _nll_loss(self, logps: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood per token of the chosen completions, without gradient."""
        if not self.compute_nll_loss:
            return logps.new_zeros(())
        lengths = (target[: logps.shape[0]] != self.ignore_index).sum(-1)
        sums = logps.detach() * (lengths if self.average_log_prob else 1)
        return -sums.sum() / lengths.sum().clamp(min=1)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the other values that Liger returns.

        Args:
            lin_weight: [V, H], the LM head.
            _input: [2 P, T, H], hidden states; chosen completions first, then the rejected.
            target: [2 P, T], integers; row t of _input predicts target[:, t].
            bias: [V].
            ref_input, ref_weight, ref_bias: as _input, lin_weight and bias, of the reference model; no gradient.

        Returns:
            loss [], (chosen_logps [P], rejected_logps [P], chosen_logits_mean [], rejected_logits_mean [],
            nll_loss [], chosen_rewards [P], rejected_rewards [P]). The loss and the log-probs are differentiable. The
            means of the logits are over all rows, as in Liger, ignored ones included.

        Raises:
            ValueError: use_ref_model without ref_input and ref_weight.
            ValueError, TypeError, IndexError: as `linear_dpo_loss`.
        """
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("use_ref_model=True needs ref_input and ref_weight")
        reference: dict[str, Any] = {"ref_hidden": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        out = linear_dpo_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            memory_budget=self.memory_budget,
            **(reference if self.use_ref_model else {}),
            **self._loss_options(),
        )
        n_pairs = out.losses.shape[0]
        chosen_logps, rejected_logps = out.logps[:n_pairs], out.logps[n_pairs:]
        with torch.no_grad():
            # the mean of hidden @ weight.T + bias is mean(hidden) @ mean(weight) + mean(bias): no large product
            mean_row = _whole(lin_weight.mean(0, dtype=out.losses.dtype))
            mean_bias = 0 if bias is None else _whole(bias.mean(dtype=out.losses.dtype))
            chosen_mean, rejected_mean = (
                half.mean((0, 1), dtype=out.losses.dtype) @ mean_row + mean_bias for half in _input.split(n_pairs)
            )
        rewards = (out.chosen_rewards, out.rejected_rewards)
        nll_loss = self._nll_loss(chosen_logps, target)
        return out.loss, (chosen_logps, rejected_logps, chosen_mean, rejected_mean, nll_loss, *rewards)

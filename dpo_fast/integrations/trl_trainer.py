"""A `DPOTrainer` for TRL 1.16 that computes its whole loss with `linear_dpo_loss`.

    from dpo_fast.integrations.trl_trainer import DPOTrainer      # instead of: from trl import DPOTrainer

Where `use_dpo_fast` replaces TRL's per-token log-probs and leaves the loss to TRL, here the LM head, the loss and its
gradient are one operation (three matrix products, never a fourth), and a step's metrics reach the host in one transfer.
Options whose meaning differs take TRL's own loss over the same log-probs; see `DPOTrainer.computes_whole_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import trl
from torch import Tensor

from dpo_fast._checks import IGNORE_NOTHING
from dpo_fast._loss.options import COUPLED_LOSSES
from dpo_fast.integrations.trl import ChunkedLogProbs, UseDpoFast, check_trl
from dpo_fast.linear import linear_dpo_loss
from dpo_fast.outputs import DPOOutput

_SMOOTHED = {"exo_pair", "robust"}  # where TRL reads label_smoothing and the loss is a sum over pairs


class _DoubleLogProbs(ChunkedLogProbs):
    """As it is, in float64, for TRL to sum."""

    def apply(self, *args: Any) -> Any:
        """See `ChunkedLogProbs`."""
        logps, *others = super().apply(*args)
        return logps.double(), *others


class _WholeLoss(ChunkedLogProbs):
    """Stands where TRL's chunked log-probs stood, for one forward pass of the policy.

    The model's output has no place for a loss over pairs; it travels as the sum of the log-probs that are returned, so
    that whatever wraps the model (DDP, FSDP) sees it leave.
    """

    def __init__(self, memory_budget: int | None, lengths: Tensor, **options: Any) -> None:
        super().__init__(memory_budget)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.options = options
        self.out: DPOOutput | None = None

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor, None, None, None, None]:
        """The loss, in the first of [N] numbers."""
        del chunk_size, outputs
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            self.out = linear_dpo_loss(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                bias=None if bias is None else bias.to(dtype),
                cu_seqlens=self.cu_seqlens,
                ignore_index=IGNORE_NOTHING,  # TRL has dropped its ignored rows
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=final_logit_softcapping,
                outputs=("entropy", "mean_logits", "is_top1"),
                memory_budget=self.memory_budget,
                **self.options,
            )
        loss = self.out.loss.reshape(1)
        return torch.cat([loss, loss.new_zeros(targets.shape[0] - 1)]), None, None, None, None


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc,name-defined]
    """TRL's DPOTrainer with its loss computed by dpo_fast; the same arguments, losses and metrics.

    Args:
        memory_budget: as for `dpo_fast.linear_dpo_loss`.
        all others: TRL's.

    Raises:
        RuntimeError: a version of TRL that was not tested.
    """

    def __init__(self, *args: Any, memory_budget: int | None = None, **kwargs: Any) -> None:
        self._trl_utils = check_trl(installed=True)
        self.memory_budget = memory_budget
        super().__init__(*args, **kwargs)

    @property
    def computes_whole_loss(self) -> bool:
        """Whether the options allow the whole loss in one operation.

        Not for losses that sort the batch, for "sft" beside ld_alpha (TRL leaves its tokens unweighted), and for
        label_smoothing where one of several losses of TRL's ignores it.
        """
        types = set(self.loss_types)
        if types & set(COUPLED_LOSSES) or ("sft" in types and self.ld_alpha is not None):
            return False
        return not (self.label_smoothing and types & _SMOOTHED and not types <= _SMOOTHED)

    @contextmanager
    def _seam(self, function: ChunkedLogProbs) -> Iterator[None]:
        """Puts a function in the place of TRL's own."""
        before = self._trl_utils._ChunkedLogProbFunction, self._trl_utils._use_triton
        UseDpoFast.put(self._trl_utils, function)
        try:
            yield
        finally:
            self._trl_utils._ChunkedLogProbFunction, self._trl_utils._use_triton = before  # type: ignore[attr-defined]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[P] log-probs of the reference for the chosen and the rejected completions.

        Summed in double and rounded once, as the policy's are: equal models give rewards of exactly 0.
        """
        with self._seam(_DoubleLogProbs(self.memory_budget)):
            chosen, rejected = super().compute_ref_log_probs(model, inputs)
        return chosen.float(), rejected.float()

    def _ref_logps(self, inputs: dict[str, Any]) -> Tensor:
        """[S] log-probs of the reference."""
        if self.precompute_ref_logps:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        model = self.model if self.ref_model is None else self.ref_model
        return torch.cat(self.compute_ref_log_probs(model, inputs))

    def _loss_options(self) -> dict[str, Any]:
        types = set(self.loss_types)
        options: dict[str, Any] = {
            "loss_type": list(self.loss_types),
            "loss_weights": list(self.loss_weights),
            "beta": self.beta,
            "f_divergence": self.f_divergence_type,
            "wpo": self.use_weighting,
            "ld_alpha": self.ld_alpha,
        }
        if types & _SMOOTHED:
            options["label_smoothing"] = self.label_smoothing
        if "discopop" in types:
            options["discopop_tau"] = self.args.discopop_tau
        if self.f_divergence_type == "alpha_divergence":
            options["f_alpha_divergence_coef"] = self.f_alpha_divergence_coef
        if types == {"sft"}:
            options["f_divergence"] = "reverse_kl"  # TRL takes any there, and reads none
        return options

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        lengths = inputs["completion_mask"][..., 1:].sum(-1)
        if return_outputs or not self.computes_whole_loss:
            with self._seam(ChunkedLogProbs(self.memory_budget)):
                return super()._compute_loss(model, inputs, return_outputs)
        ref_logps = self._ref_logps(inputs)
        others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        model_inputs = {k: v for k, v in inputs.items() if k not in others} | {"use_cache": False}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        whole = _WholeLoss(self.memory_budget, lengths, ref_logps=ref_logps, **self._loss_options())
        with self._seam(whole):
            outputs = model(**model_inputs, labels=labels, fused_lm_head=True)
        loss = outputs.log_probs.sum()
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss
        assert whole.out is not None
        self._log_metrics(whole.out, inputs, aux_loss)
        return loss

    @torch.no_grad()
    def _log_metrics(self, out: DPOOutput, inputs: dict[str, Any], aux_loss: Tensor | None) -> None:
        """TRL's metrics of a step: sums over the rank, gathered, and read in one transfer."""
        mode = "train" if self.model.training else "eval"
        assert out.token_sums is not None
        sums = {f"{name}/{side}": half.sum() for name, side, half in self._halves(out)}
        sums |= {
            "pairs": torch.ones_like(out.losses).sum(),
            "accurate": (out.chosen_rewards > out.rejected_rewards).sum(),
            "margins": (out.chosen_rewards - out.rejected_rewards).sum(),
            "entropy": out.token_sums["entropy"].sum(),
            "aux_loss": out.loss.new_zeros(()) if aux_loss is None else aux_loss,
            "ranks": out.loss.new_ones(()),
            "num_tokens": inputs["attention_mask"].sum(),
        }
        vector = torch.stack([value.detach().double() for value in sums.values()])
        values = self.accelerator.gather(vector).view(-1, len(sums)).sum(0).tolist()
        total = dict(zip(sums, values, strict=True))

        def share(part: str, of: str) -> float:
            return total[part] / total[of] if total[of] > 0 else 0.0

        total["tokens"] = total["lengths/chosen"] + total["lengths/rejected"]
        metrics = {"entropy": share("entropy", "tokens"), "rewards/accuracies": share("accurate", "pairs")}
        metrics["mean_token_accuracy"] = share("is_top1/chosen", "lengths/chosen")
        metrics["rewards/margins"] = share("margins", "pairs")
        for side in ("chosen", "rejected"):
            metrics[f"logits/{side}"] = share(f"mean_logits/{side}", f"lengths/{side}")
            metrics[f"rewards/{side}"] = share(f"rewards/{side}", "pairs")
            metrics[f"logps/{side}"] = share(f"logps/{side}", "pairs")
        if aux_loss is not None:
            metrics["aux_loss"] = share("aux_loss", "ranks")
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(total["num_tokens"]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    @staticmethod
    def _halves(out: DPOOutput) -> Iterator[tuple[str, str, Tensor]]:
        """Name, side and values of what is summed over the chosen and over the rejected completions."""
        assert out.token_sums is not None
        names = ("lengths", "mean_logits", "is_top1")
        for name, values in (("logps", out.logps), *((name, out.token_sums[name]) for name in names)):
            for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True):
                yield name, side, half
        yield "rewards", "chosen", out.chosen_rewards
        yield "rewards", "rejected", out.rejected_rewards

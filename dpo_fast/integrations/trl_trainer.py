"""A `DPOTrainer` for TRL 1.16 that computes its whole loss with `linear_dpo_loss`.

    from dpo_fast.integrations.trl_trainer import DPOTrainer      # instead of: from trl import DPOTrainer

`use_dpo_fast` replaces TRL's per-token log-probs and leaves the loss to TRL. Here the LM head, the loss and its
gradient are one operation of three matrix products (TRL needs four), and a step's metrics reach the host in one
transfer. Options that TRL reads differently take TRL's own loss over the same log-probs; see
`DPOTrainer.computes_whole_loss`. With `packing=True` the models run without padding and with each prompt once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import trl
from torch import Tensor

import dpo_fast
from dpo_fast._packing.shared import SharedPrompts
from dpo_fast.integrations import trl_packing
from dpo_fast.integrations.trl import ChunkedLogProbs, Replacement, autocast_applied, check_trl
from dpo_fast.linear import linear_dpo_loss
from dpo_fast.outputs import DPOOutput

_SMOOTHED = {"exo_pair", "robust"}  # losses over pairs that read label_smoothing in TRL
_SORTED = {"aot", "aot_unpaired"}  # losses that sort the batch
_OF_PAIRS = {"pairs", "accurate", "margins"}  # sums that TRL gathers from all ranks, beside rewards and logps
_NOT_OF_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", trl_packing.ROWS}


def _for_trl(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch without what TRL does not know: it hands the model all other keys."""
    return {key: value for key, value in inputs.items() if key != trl_packing.ROWS}


class _DoubleLogProbs(ChunkedLogProbs):
    """Log-probs as float64, which TRL then sums without rounding."""

    def apply(self, *args: Any) -> Any:
        """See `ChunkedLogProbs`."""
        logps, *others = super().apply(*args)
        return logps.double(), *others


class _WholeLoss(ChunkedLogProbs):
    """Computes the whole loss where TRL expects log-probs, in one forward pass of the policy.

    The model's output has no field for a loss. The loss is returned as the first log-prob, and the others are 0, so the
    sum of the log-probs is the loss and wrappers of the model (DDP, FSDP) see it in the model's output.
    """

    def __init__(self, memory_budget: int | None, lengths: Tensor, **options: Any) -> None:
        super().__init__(memory_budget)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        self.options = options
        self.out: DPOOutput | None = None
        self.n_tokens = 0

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
        """[N] numbers whose sum is the loss; without tokens (N = 0) `loss_of` adds it."""
        del chunk_size, outputs
        with autocast_applied(hidden, weight, bias) as head:
            hidden, weight, bias = head
            self.out = linear_dpo_loss(
                hidden,
                weight,
                targets,
                bias=bias,
                cu_seqlens=self.cu_seqlens,
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=final_logit_softcapping,
                outputs=("entropy", "mean_logits", "is_top1"),
                memory_budget=self.memory_budget,
                **self.options,
            )
        self.n_tokens = targets.shape[0]
        # with N = 0 the padding is -1: it drops the loss and leaves an empty tensor that is connected to the graph
        padded = torch.nn.functional.pad(self.out.loss.reshape(1), (0, self.n_tokens - 1))
        return padded, None, None, None, None

    def loss_of(self, log_probs: Tensor) -> tuple[Tensor, DPOOutput]:
        """The loss from the model's output, and everything else that was computed with it."""
        assert self.out is not None
        loss = log_probs.sum()
        # without tokens the loss is a constant, and the sum is a 0 that connects it to the model's parameters
        return (loss if self.n_tokens else loss + self.out.loss.detach()), self.out


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc,name-defined]
    """TRL's DPOTrainer with its loss computed by dpo_fast; the same arguments, losses and metrics.

    It differs from TRL in two cases: "sft" on a batch without chosen tokens is 0 (TRL: NaN), and "ipo" and
    "sigmoid_norm" divide by the number of scored tokens (where a prompt is empty, TRL counts the first token of the
    completion too, which no logit predicts).

    With `packing=True` every microbatch, of training, evaluation and the reference, runs through the decoder as one row
    of all sequences' tokens, without padding, and with each common beginning (a pair's prompt, above all) once. All
    options, losses, metrics and trained parameters stay TRL's up to rounding, and so do the microbatches: TRL's
    collator chooses and truncates their tokens. Wrapped models (PEFT, DDP, FSDP) are entered through their own forward.
    Two things differ: with `disable_dropout=False`, dropout draws one mask for a shared prompt; and the logits that
    `predict` returns are still those of a padded forward pass. Flash attention takes no mask: it leaves out padding,
    and shares no prompts.

    Args:
        memory_budget: as for `dpo_fast.linear_dpo_loss`.
        packing: run packed with shared prompts. Counts of rows, padded and as run, are in `shared_prompts`.
        all others: TRL's.

    Raises:
        RuntimeError: this version of TRL was not tested.
        TypeError, ValueError: with packing, what cannot run packed: vision-language models, models that
            `dpo_fast.packed_hidden` refuses, collators that give more than token ids and masks, padding_free,
            use_liger_kernel, torch_compile, dispatch_batches, context and sequence parallelism.
    """

    data_collator: Any

    def __init__(self, *args: Any, memory_budget: int | None = None, packing: bool = False, **kwargs: Any) -> None:
        check_trl()
        if not isinstance(packing, bool):
            raise TypeError(f"packing must be True or False, found {packing!r}")
        self.memory_budget = memory_budget
        self.packing = packing
        self.shared_prompts = SharedPrompts() if packing else None
        if packing:
            given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
            trl_packing.check_arguments(given.get("args"), given.get("processing_class"))
        super().__init__(*args, **kwargs)
        self._set_up_packing()

    def _set_up_packing(self) -> None:
        """Checks what is to run packed, and packs in the collator; done once, before the first batch."""
        if not self.packing or isinstance(self.data_collator, trl_packing.PackingCollator):
            return
        if self._is_vlm:
            trl_packing.check_arguments(None, self.processing_class)
        trl_packing.check_parallelism(self.accelerator)
        # sharded models are whole only within their own forward: they are checked in their first step
        run = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        decoder = trl_packing.check_model(self.model, run)
        if self.ref_model is not None:
            trl_packing.check_model(self.ref_model, run)
        self.data_collator = trl_packing.PackingCollator(self.data_collator, "flash" not in decoder.attention)
        self.data_collator([self._first_example()])  # raises for collators of other data
        self.accelerator.dataloader_config.dispatch_batches = False  # each process collates its own batches

    def _first_example(self) -> dict[str, Any]:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        example = next(iter(self.train_dataset))
        if not self.args.remove_unused_columns:
            return dict(example)
        return {key: example[key] for key in columns}

    def _packed(self, inputs: dict[str, Any], *models: Any) -> AbstractContextManager[Any]:
        """Within it, these models run the batch packed; with packing=False, as ever."""
        if self.shared_prompts is None:
            return nullcontext()
        return trl_packing.packed_calls(models, self.shared_prompts, inputs.get(trl_packing.ROWS))

    @property
    def computes_whole_loss(self) -> bool:
        """Whether the options allow the whole loss in one operation.

        They do not for losses that sort the batch, for "sft" with ld_alpha (TRL leaves its tokens unweighted), and for
        label_smoothing with several losses of which TRL applies it to some only.
        """
        types = set(self.loss_types)
        if types & _SORTED or ("sft" in types and self.ld_alpha is not None):
            return False
        return not (self.label_smoothing and types & _SMOOTHED and not types <= _SMOOTHED)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[P] log-probs of the reference for the chosen and the rejected completions.

        Summed in double and rounded once, as the policy's are: equal models give rewards of exactly 0.
        """
        with Replacement(_DoubleLogProbs(self.memory_budget)), self._packed(inputs, model):
            chosen, rejected = super().compute_ref_log_probs(model, _for_trl(inputs))
        return chosen.float(), rejected.float()

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's, with cache files of its own: TRL's log-probs differ from these in the last bits."""
        self._set_up_packing()
        mark = f" dpo_fast {dpo_fast.__version__}" + " packed" * self.packing
        if not self._precompute_model_hash.endswith(mark):
            self._precompute_model_hash += mark
        return super()._precompute_ref_logps(dataset, name, batch_size)

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
            options["f_divergence"] = "reverse_kl"  # TRL allows any other here and does not read it
        return options

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs and self.packing:
            # logits of padding, too, are those of the padded batch
            loss = self._compute_loss(model, inputs, False)
            with torch.no_grad():
                return loss, model(**self._model_inputs(inputs))
        if return_outputs or not self.computes_whole_loss:
            packed = self._packed(inputs, model, None if self.precompute_ref_logps else self.ref_model)
            with Replacement(ChunkedLogProbs(self.memory_budget)), packed:
                return super()._compute_loss(model, _for_trl(inputs), return_outputs)
        lengths = inputs["completion_mask"][..., 1:].sum(-1)
        ref_logps = self._ref_logps(inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        whole = _WholeLoss(self.memory_budget, lengths, ref_logps=ref_logps, **self._loss_options())
        with Replacement(whole), self._packed(inputs, model):
            outputs = model(**self._model_inputs(inputs), labels=labels, fused_lm_head=True)
        loss, out = whole.loss_of(outputs.log_probs)
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss
        self._log_metrics(out, inputs, aux_loss)
        return loss

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found = {k: v for k, v in inputs.items() if k not in _NOT_OF_THE_MODEL} | {"use_cache": False}
        if self.aux_loss_enabled:
            found["output_router_logits"] = True
        return found

    @torch.no_grad()
    def _log_metrics(self, out: DPOOutput, inputs: dict[str, Any], aux_loss: Tensor | None) -> None:
        """TRL's metrics of a step: sums of each rank, gathered together and read in one transfer."""
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
        total = self._over_ranks(sums)

        def ratio(part: str, of: str) -> float:
            return total[part] / total[of] if total[of] > 0 else 0.0

        total["tokens"] = total["lengths/chosen"] + total["lengths/rejected"]
        metrics = {"entropy": ratio("entropy", "tokens"), "rewards/accuracies": ratio("accurate", "pairs")}
        metrics["mean_token_accuracy"] = ratio("is_top1/chosen", "lengths/chosen")
        metrics["rewards/margins"] = ratio("margins", "pairs")
        for side in ("chosen", "rejected"):
            metrics[f"logits/{side}"] = ratio(f"mean_logits/{side}", f"lengths/{side}")
            metrics[f"rewards/{side}"] = ratio(f"rewards/{side}", "pairs")
            metrics[f"logps/{side}"] = ratio(f"logps/{side}", "pairs")
        if aux_loss is not None:
            metrics["aux_loss"] = ratio("aux_loss", "ranks")
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(total["num_tokens"]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over ranks: over all, but of tokens, as TRL by gather_for_metrics, over some in an uneven last batch."""
        vector = torch.stack([value.detach().double() for value in sums.values()])
        ranks = self.accelerator.gather(vector).view(-1, len(sums))
        state = self.accelerator.gradient_state
        counted = state.remainder if state.end_of_dataloader and state.remainder > 0 else len(ranks)
        totals = torch.stack([ranks.sum(0), ranks[:counted].sum(0)]).tolist()
        return {
            name: every if name in _OF_PAIRS or name.startswith(("rewards/", "logps/")) else of_tokens
            for name, every, of_tokens in zip(sums, *totals, strict=True)
        }

    @staticmethod
    def _halves(out: DPOOutput) -> Iterator[tuple[str, str, Tensor]]:
        """(name, side, values) of the metrics that are sums over the chosen or over the rejected completions."""
        assert out.token_sums is not None
        names = ("lengths", "mean_logits", "is_top1")
        for name, values in (("logps", out.logps), *((name, out.token_sums[name]) for name in names)):
            for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True):
                yield name, side, half
        yield "rewards", "chosen", out.chosen_rewards
        yield "rewards", "rejected", out.rejected_rewards

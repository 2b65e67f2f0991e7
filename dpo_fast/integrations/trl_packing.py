"""What `trl_trainer.DPOTrainer(packing=True)` adds to TRL: a collator that packs, and what cannot run packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo_fast._packing.layout import Layout
from dpo_fast._packing.models import Decoder, decoder_of
from dpo_fast._packing.run import checked_form, hidden_of
from dpo_fast._packing.shared import PackedRows, SharedPrompts, packed_rows, sharing

ROWS = "packed_rows"  # the packed form of a batch, beside TRL's own keys
_NEEDED = ("input_ids", "attention_mask", "completion_mask")
_KNOWN = {*_NEEDED, "ref_chosen_logps", "ref_rejected_logps"}
_CHECKED_LENGTHS = (1, 4096)  # the mask's form depends on the number of rows
_NOT = "packing=True:"


@dataclass
class PackingCollator:
    """TRL's collator, and with its batch how the rows are packed, so that nothing is read from the device for it.

    The padded batch stays: metrics, evaluation and TRL's own code take their sizes from it.

    Args:
        collator: gives input_ids, attention_mask and completion_mask [2 * P, T], chosen ones first, and may give
            ref_chosen_logps and ref_rejected_logps [P].
        share_prompts: prefixes once; False for attention that takes no mask (flash attention).
    """

    collator: Any
    share_prompts: bool = True

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The collator's batch, with a PackedRows where its rows begin in the first column.

        Raises:
            ValueError: the collator gives other tensors than those of text.
        """
        batch = dict(self.collator(examples))
        check_batch(batch, self.collator)
        valid = (batch["attention_mask"] != 0).numpy()
        if valid.shape[1] and valid[:, 0].all():  # others are read where the model runs
            columns = np.broadcast_to(np.arange(valid.shape[1]), valid.shape)
            batch[ROWS] = packed_rows(batch["input_ids"].numpy(), valid, columns, self.share_prompts)
        return batch


def check_batch(batch: Mapping[str, Any], collator: Any) -> None:
    """Raises ValueError for a batch that is not one of text as TRL's own collator makes it."""
    name = type(collator).__name__ if not hasattr(collator, "__name__") else collator.__name__
    missing = [key for key in _NEEDED if not isinstance(batch.get(key), torch.Tensor)]
    unknown = [key for key in batch if key not in _KNOWN]
    if missing or unknown:
        what = (
            f"gives no {', '.join(missing)}" if missing else f"gives {', '.join(unknown)}, which packing does not know"
        )
        raise ValueError(
            f"packing=True: the data_collator ({name}) {what}; leave data_collator out (TRL's own is packed), or train "
            "with packing=False"
        )
    shapes = {key: tuple(batch[key].shape) for key in _NEEDED}
    if len(set(shapes.values())) > 1 or len(shapes["input_ids"]) != 2:
        raise ValueError(f"packing=True: the data_collator ({name}) must give one shape [S, T], found {shapes}")


def check_arguments(args: Any, processing_class: Any) -> None:
    """Raises ValueError for settings that cannot be packed. args: a DPOConfig, or None (TRL's defaults)."""
    from transformers import ProcessorMixin

    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(f"{_NOT} vision-language models have inputs other than token ids; train with packing=False")
    if args is None:
        return
    if args.padding_free:
        raise ValueError(
            f"{_NOT} padding_free=True is TRL's own way without padding (in 1.16 it does nothing); packing leaves out "
            "padding and repeated prompts: set padding_free=False"
        )
    if args.use_liger_kernel:
        raise ValueError(
            f"{_NOT} use_liger_kernel=True replaces parts of the model when training starts, after it was checked to "
            "honour packing; set use_liger_kernel=False"
        )
    if args.torch_compile:
        raise ValueError(
            f"{_NOT} torch_compile=True would compile the model anew for each batch's layout; set torch_compile=False, "
            "or compile the layers by themselves"
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            f"{_NOT} dispatch_batches=True sends one process's batches to the others, which would have to be packed "
            "anew; set dispatch_batches=False"
        )


def check_parallelism(accelerator: Any) -> None:
    """Raises ValueError where sequences are split over processes."""
    config = accelerator.parallelism_config
    if config is not None and (config.cp_enabled or config.sp_enabled):
        raise ValueError(
            f"{_NOT} context and sequence parallelism split each row over processes, but packed rows are none of a "
            "sequence; train with packing=False"
        )


def check_model(model: Any, run: bool) -> Decoder:
    """The model's decoder, after a look at what it is and, with `run`, at what it makes of a few packed tokens.

    Raises:
        TypeError: a model that cannot run packed.
        ValueError: one that, by its hidden states, does not honour packing.
    """
    try:
        decoder = decoder_of(model)
        if run:
            for n_rows in _CHECKED_LENGTHS:
                rows = np.arange(n_rows)
                layout = Layout(rows + 1, rows, rows)
                forward = decoder.body.forward
                checked_form(decoder, forward, hidden_of(forward), layout, decoder.causal.device, None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_NOT} {error}; train with packing=False") from error
    return decoder


@contextmanager
def packed_calls(models: Sequence[Any], done: SharedPrompts, rows: PackedRows | None) -> Iterator[None]:
    """Within it, these models' calls run packed; None is no model."""
    with ExitStack() as stack:
        for model in models:
            if model is not None:
                stack.enter_context(sharing(model, None, done, rows))
        yield

"""Packed batches, with shared prompts, through transformers' causal models.

    batch = packed_batch(examples, share_prompts=True, mask="none")
    hidden = packed_hidden(model, batch)                                    # [1, N, H]
    options = head_options(model)
    out = linear_dpo_loss(hidden, targets=batch["targets"], ref_logps=ref, pairs=batch["pairs"],
                          cu_seqlens=batch["cu_seqlens"], **options)

For a training loop that exists: `with shared_prompts(model):` around forward and backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dpo_fast._packing.head import options_of
from dpo_fast._packing.layout import Layout, layout_of_spans
from dpo_fast._packing.models import decoder_of
from dpo_fast._packing.run import checked_form, run_packed

_LAYOUTS: Any = WeakIdKeyDictionary()  # spans -> (version, layout): a batch that is used again keeps its masks


def packed_hidden(model: Any, batch: Mapping[str, Tensor], *, mask: str | None = None) -> Tensor:
    """Hidden states of a packed batch, as the model's LM head gets them (final norm applied).

    The mask is built from spans in the form that the model's attention takes; the batch's own attention_mask is not
    read. No cache is used. On first use a few short sequences are run packed and alone (no gradients, evaluation
    mode); the result is remembered with the model.

    Args:
        model: a transformers causal model, also wrapped by PEFT; its attention is sdpa, eager, flex attention or, where
            no prompts are shared, flash attention.
        batch: from `packed_batch`; input_ids [1, N], position_ids [1, N], spans [S, 3], cu_seqlens [S + 1].
        mask: "dense", "blocks" or "auto" (None: DPO_FAST_PACKED_MASK, or "auto"); see `describe`.

    Returns:
        [1, N, H], in the model's type, differentiable.

    Raises:
        TypeError: a model that cannot run packed (recurrent layers, unknown kinds of attention, ...).
        ValueError: a batch without spans or with spans that do not fit it; a mask that the attention does not take; a
            model that, by the check, does not honour packing.
    """
    decoder = decoder_of(model)
    layout, ids = _layout(batch), batch["input_ids"]
    form = checked_form(decoder, decoder.body, layout.n_rows, ids.device, mask)
    found: Tensor = run_packed(decoder, decoder.body, ids, layout, form).last_hidden_state
    return found


def _layout(batch: Mapping[str, Tensor]) -> Layout:
    missing = [key for key in ("input_ids", "position_ids", "spans", "cu_seqlens") if batch.get(key) is None]
    if missing:
        raise ValueError(f"batch has no {', '.join(missing)}: make it with dpo_fast.packed_batch")
    ids, positions, spans = batch["input_ids"], batch["position_ids"], batch["spans"]
    if ids.dim() != 2 or ids.shape[0] != 1 or positions.shape != ids.shape:
        raise ValueError(
            f"input_ids and position_ids must have shape [1, N], found {tuple(ids.shape)} and {tuple(positions.shape)}"
        )
    versions = [(batch[key]._version, id(batch[key])) for key in ("spans", "cu_seqlens", "position_ids")]
    version, layout = _LAYOUTS.get(spans, (None, None))
    if version != versions:
        layout = layout_of_spans(*(batch[key].cpu().numpy().astype("int64") for key in ("spans", "cu_seqlens")),
                                 positions[0].cpu().numpy().astype("int64"))  # fmt: skip
        _LAYOUTS[spans] = versions, layout
    found: Layout = layout
    return found


def head_options(model: Any) -> dict[str, Any]:
    """The model's LM head for `linear_dpo_loss(hidden, targets=..., **options)` and the other `linear_*` functions.

    On first use the model's own logits of a few tokens are compared with what the options give, unless the weights are
    sharded.

    Args:
        model: a transformers causal model, also wrapped by PEFT. Call this again after a change of adapters.

    Returns:
        weight [V, H], bias [V] or None, lora (A [r, H], B [V, r], scaling) or None, softcap (a number or None; Gemma's
        final_logit_softcapping) and logit_scale (a number; Cohere's logit_scale, one over Granite's logits_scaling).
        The tensors are the model's own parameters: gradients reach them.

    Raises:
        TypeError: a head that is no linear layer, or has adapters of another form; the message names the remedy.
        ValueError: a field of the config that may transform logits, or logits that the options do not give.
    """
    return options_of(model)

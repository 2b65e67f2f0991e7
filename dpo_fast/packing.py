"""Packed batches, with shared prompts, through transformers' causal models.

    batch = packed_batch(examples, share_prompts=True, mask="none")
    hidden = packed_hidden(model, batch)                                    # [1, N, H]
    options = head_options(model)
    out = linear_dpo_loss(hidden, targets=batch["targets"], ref_logps=ref, pairs=batch["pairs"],
                          cu_seqlens=batch["cu_seqlens"], **options)

For a training loop that exists: `with shared_prompts(model):` around forward and backward. docs/packing.md says which
models and masks; tested with transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dpo_fast._packing.head import options_of
from dpo_fast._packing.layout import Layout, layout_of_spans
from dpo_fast._packing.masks import mask_bytes
from dpo_fast._packing.models import decoder_of
from dpo_fast._packing.run import checked_form, head_input_of, packed_inputs, planned_form
from dpo_fast._packing.shared import SharedPrompts, sharing
from dpo_fast._torch.checks import plain_tensors

_KEYS = ("input_ids", "position_ids", "spans", "cu_seqlens")
_LAYOUTS: Any = WeakIdKeyDictionary()  # spans -> what a batch's layout was made of, and the layout with its masks


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
        TypeError: a model that cannot run packed (recurrent layers, unknown kinds of attention, ...); a batch of other
            things than plain tensors.
        ValueError: a batch without spans or with spans that do not fit it; a mask that the attention does not take; a
            model that, by the check, does not honour packing.
    """
    decoder = decoder_of(model)
    layout, ids = _layout(batch), batch["input_ids"]
    form = checked_form(decoder, decoder.body, head_input_of(decoder.causal), layout, ids.device, mask)
    found: Tensor = decoder.body(**packed_inputs(decoder, ids, layout, form)).last_hidden_state
    return found


def _layout(batch: Mapping[str, Tensor]) -> Layout:
    missing = [key for key in _KEYS if batch.get(key) is None]
    if missing:
        raise ValueError(f"batch has no {', '.join(missing)}: make it with dpo_fast.packed_batch")
    ids, positions, spans, bounds = plain_tensors(_KEYS, [batch[key] for key in _KEYS])
    if ids.dim() != 2 or ids.shape[0] != 1 or positions.shape != ids.shape:
        raise ValueError(
            f"input_ids and position_ids must have shape [1, N], found {tuple(ids.shape)} and {tuple(positions.shape)}"
        )
    others = bounds, positions
    versions = [0 if x.is_inference() else x._version for x in (spans, *others)]
    known, known_versions, layout = _LAYOUTS.get(spans, ((None, None), None, None))
    if known_versions != versions or any(x is not y for x, y in zip(known, others, strict=True)):
        host = [x.cpu().numpy().astype("int64") for x in (spans, bounds, positions[0])]
        layout = layout_of_spans(host[0], host[1], host[2])
        _LAYOUTS[spans] = others, versions, layout
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


def shared_prompts(model: Any, *, mask: str | None = None) -> AbstractContextManager[SharedPrompts]:
    """Within the block, the model runs ordinary padded batches packed, with every common prefix once.

        with dpo_fast.shared_prompts(model):
            loss = my_loss(model(input_ids=ids, attention_mask=attention_mask).logits)
            loss.backward()

    Only the decoder's forward is replaced: it finds the rows' common prefixes (chosen and rejected, several completions
    of a prompt, prefixes within prefixes), leaves out padding, and gives the hidden states back at their padded places;
    what the model does with them (logits, logits_to_keep, labels, router losses) is its own. Losses and gradients are
    those of the padded batch up to rounding; hidden states at padding are zeros. Dropout draws one mask for a shared
    prompt. Flash attention shares no prompts and leaves out padding alone.

    A call runs as it is, where that is exactly right and packing is not: with past_key_values, or use_cache=True
    without gradients (generation); with an attention_mask that is not [S, T]; with a batch that is packed already
    (cu_seq_lens_q, or positions that restart without an attention_mask); and where there is neither padding nor a
    common prefix. Blocks may be nested, the outer one counts. The model is restored, also after an exception.

    Args:
        model: a transformers causal model, also wrapped by PEFT, DDP or FSDP.
        mask: as for `packed_hidden`.

    Returns:
        A context manager that gives a SharedPrompts: calls and rows so far, padded and as run.

    Raises:
        TypeError: a model that cannot run packed.
        ValueError: in forward: as `packed_hidden`; inputs_embeds without input_ids, positions that fall within a
            row, output_attentions, other tensors per token.
    """
    return sharing(model, mask)


class Plan(NamedTuple):
    """How a packed batch runs through a model; see `describe`."""

    attention: str  # as transformers names it
    layers: dict[str, int | None]  # kinds of layers, and how many tokens back they see (None: all)
    form: str  # of the mask: "bool", "runs", "additive", "blocks" or "varlen" (docs/packing.md)
    rows: int  # N
    mask_bytes: int  # of the masks of all kinds of layers


def describe(model: Any, batch: Mapping[str, Tensor], *, mask: str | None = None) -> Plan:
    """How `packed_hidden(model, batch, mask=mask)` runs: the form of the mask and its memory. Nothing is run.

    Raises:
        TypeError, ValueError: as `packed_hidden`, but for the check of the model.
    """
    decoder, layout, device = decoder_of(model), _layout(batch), batch["input_ids"].device
    form = planned_form(decoder, layout, device, mask)
    layers = {kind: decoder.window_of(kind) for kind in decoder.kinds}
    itemsize = decoder.body.get_input_embeddings().weight.dtype.itemsize
    n_bytes = sum(mask_bytes(form, layout, window, itemsize) for window in layers.values())
    return Plan(decoder.attention, layers, form, layout.n_rows, n_bytes)

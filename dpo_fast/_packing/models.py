"""What a transformers model is: its decoder, its attention, the kinds of its layers; or why it cannot run packed."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KINDS = ("full_attention", "sliding_attention")
MASKS = ("auto", "dense", "blocks")
ENVIRONMENT = "DPO_FAST_PACKED_MASK"
DENSE_UP_TO = {"cpu": 128}  # rows up to which one dense sdpa call is faster than one call per run (docs/packing.md)
DENSE_UP_TO_ELSEWHERE = 1024

_RECURRENT = re.compile("Mamba|Rwkv|xLSTM|Recurrent|RgLru|GatedDelta|LinearAttention|LightningAttention|ShortConv")
_WINDOWS = re.compile("window|chunk_size|local_attention|attention_types")
_KNOWN_WINDOWS = re.compile(
    "^(_?sliding_window(_pattern)?|use_sliding_window|max_window_layers|chunk_size_feed_forward)$"
)


@dataclass(frozen=True)
class Decoder:
    """A causal model's body, and how its attention takes a mask."""

    causal: Any  # the causal model itself, out of its wrappers
    body: Any  # what maps token ids to the head's input
    name: str
    attention: str  # as transformers names it
    kinds: tuple[str, ...]  # of its layers
    window: int | None

    def window_of(self, kind: str) -> int | None:
        """How many tokens back a layer of this kind sees, itself included; None: all."""
        return self.window if kind == "sliding_attention" else None


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP, FSDP, torch.compile and PEFT.

    Raises:
        TypeError: not a transformers model; a PEFT method that puts virtual tokens before the input.
    """
    from transformers import PreTrainedModel

    while not isinstance(model, PreTrainedModel):
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            raise TypeError("prompt learning (PEFT) puts virtual tokens before each sequence: it cannot run packed")
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model must be a transformers causal model, found {type(model).__name__}")
        model = inner
    return model


def decoder_of(model: Any) -> Decoder:
    """The decoder of a causal model.

    Raises:
        TypeError: a model that cannot run packed; the message says why.
    """
    causal = unwrapped(model)
    name, body = type(causal).__name__, causal.get_decoder()
    if body is causal:  # a prefix that names nothing
        body = getattr(causal, "model", causal)
    if body is causal or causal.get_output_embeddings() is None:
        raise TypeError(f"{name} has no LM head over a decoder: give a causal model, ...ForCausalLM")
    config = body.config
    _check_config(name, config)
    _check_layers(name, body)
    kinds, window = _kinds(name, config)
    return Decoder(causal, body, name, config._attn_implementation or "eager", kinds, window)


def _check_config(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        raise TypeError(f"{name} is not a causal decoder")
    if getattr(config, "use_bidirectional_attention", False):
        raise TypeError(f"{name} has bidirectional attention (use_bidirectional_attention)")
    if config.get_text_config() is not config:
        raise TypeError(f"{name} has inputs other than text: packing knows token ids alone")
    for key, value in config.to_dict().items():
        if value and _WINDOWS.search(key) and not _KNOWN_WINDOWS.match(key):
            raise TypeError(f"{name} limits attention by {key} = {value!r}, which packing does not know")


def _check_layers(name: str, body: Any) -> None:
    for path, module in body.named_modules():
        if isinstance(module, nn.Conv1d) or _RECURRENT.search(type(module).__name__):
            raise TypeError(
                f"{name} has a layer that carries a state along the rows ({path}: {type(module).__name__}): sequences "
                "in one row would flow into each other"
            )
    takes = inspect.signature(body.forward).parameters
    missing = [key for key in ("attention_mask", "position_ids") if key not in takes]
    if missing:
        raise TypeError(f"{name} takes no {' and no '.join(missing)}: it cannot be told where sequences begin")


def _kinds(name: str, config: Any) -> tuple[tuple[str, ...], int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    kinds = tuple(dict.fromkeys(kinds)) if kinds else (KINDS[window is not None],)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise TypeError(f"{name} has layers of kind {', '.join(unknown)}; packing knows {' and '.join(KINDS)}")
    if "sliding_attention" not in kinds:
        window = None
    elif not isinstance(window, int) or window < 1:
        raise TypeError(f"{name} has sliding layers, but sliding_window = {window!r}")
    return kinds, window


def asked_mask(mask: str | None) -> str:
    """ "auto", "dense" or "blocks"; where it is None, the environment's DPO_FAST_PACKED_MASK, or "auto".

    Raises:
        ValueError: another one.
    """
    found = os.environ.get(ENVIRONMENT, "auto") if mask is None else mask
    if found not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, found {found!r}")
    return found


def mask_form(attention: str, n_rows: int, device: torch.device, mask: str) -> str:
    """The form of the mask (see `masks`) for an attention implementation, a length, a device and `asked_mask`.

    Raises:
        ValueError: a mask that this attention does not take.
        TypeError: an attention implementation that packing does not know.
    """
    if "flash" in attention:
        forms = {"auto": "varlen"}
    elif attention == "flex_attention":
        forms = {"auto": "blocks", "blocks": "blocks"}
    elif attention == "sdpa":
        long = n_rows > DENSE_UP_TO.get(device.type, DENSE_UP_TO_ELSEWHERE)
        forms = {"auto": "runs" if long else "bool", "dense": "bool", "blocks": "runs"}
    elif attention == "eager":
        forms = {"auto": "additive", "dense": "additive"}
    else:
        raise TypeError(
            f"attention {attention!r} is not known here: take sdpa, eager, flex_attention or flash attention"
        )
    if mask not in forms:
        raise ValueError(f"{attention} takes no {mask} mask, only {', '.join(forms)}")
    return forms[mask]

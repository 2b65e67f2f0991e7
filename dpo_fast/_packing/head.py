"""A causal model's LM head as the options of the `linear_*` functions."""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast._packing.models import unwrapped
from dpo_fast._packing.run import head_input_of, undisturbed

# config fields that transform logits: what is done with them
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "logit_softcapping")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_OTHERS = re.compile("logits?_(?!to_keep|dtype)|lm_head_(scale|mult)|output_multiplier")
_NOT_OF_THE_HEAD = re.compile("^(attn|attention|router|use)_|_attention|logits_to_keep|return_|output_.*logits$")

_CHECKED: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def options_of(model: Any) -> dict[str, Any]:
    """See `dpo_fast.head_options`."""
    causal = unwrapped(model)
    name, head = type(causal).__name__, causal.get_output_embeddings()
    if head is None:
        raise TypeError(f"{name} has no LM head (get_output_embeddings() is None)")
    options = {**_linear(name, head), **_transform(name, causal.config.get_text_config())}
    _check(name, causal, options)
    return options


def _linear(name: str, head: Any) -> dict[str, Any]:
    """weight, bias and lora of a head that is a linear layer, also one that PEFT has wrapped."""
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save[head.active_adapter] if not head.disable_adapters else head.original_module
    lora = None
    if hasattr(head, "base_layer"):
        lora, head = _lora(name, head), head.base_layer
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the head of {name} must be a torch.nn.Linear, found {type(head).__name__}")
    if not head.weight.is_floating_point():
        raise TypeError(f"the head of {name} is quantised ({head.weight.dtype}): leave lm_head out of the quantisation")
    return {"weight": head.weight, "bias": head.bias, "lora": lora}


def _lora(name: str, layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scaling) of the one active LoRA adapter; None where none is active, or all are merged into the weight."""
    remedy = "leave lm_head out of target_modules, or train it whole (modules_to_save)"
    if not hasattr(layer, "lora_A"):
        raise TypeError(f"the head of {name} has an adapter that is no LoRA ({type(layer).__name__}): {remedy}")
    active = [] if layer.disable_adapters or layer.merged else [a for a in layer.active_adapters if a in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise TypeError(f"the head of {name} has several active adapters, {', '.join(active)}: merge them, or {remedy}")
    adapter = active[0]
    a, b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if getattr(layer, "use_dora", {}).get(adapter) or getattr(layer, "lora_variant", {}).get(adapter) is not None:
        raise TypeError(f"the head of {name} has a variant of LoRA (DoRA or another): {remedy}")
    if a.bias is not None or b.bias is not None:
        raise TypeError(f"the head of {name} has LoRA with a bias: {remedy}")
    if layer.training and getattr(dropout, "p", 0.0):
        raise TypeError(f"the head of {name} has LoRA with dropout {dropout.p}: set lora_dropout=0, or {remedy}")
    return a.weight, b.weight, float(layer.scaling[adapter])


def _transform(name: str, config: Any) -> dict[str, Any]:
    """softcap and logit_scale from a model's config."""
    softcap, scale, known = None, 1.0, {*_SOFTCAPS, *_FACTORS, *_DIVISORS}
    for key in _SOFTCAPS:
        softcap = getattr(config, key, None) or softcap
    for key in _FACTORS:
        scale *= getattr(config, key, None) or 1.0
    for key in _DIVISORS:
        scale /= getattr(config, key, None) or 1.0
    for key, value in config.to_dict().items():
        unknown = _OTHERS.search(key) and key not in known and not _NOT_OF_THE_HEAD.search(key)
        if unknown and isinstance(value, (int, float)) and not isinstance(value, bool) and value not in (0, 1):
            raise ValueError(
                f"{name} has {key} = {value!r} in its config, which may transform logits in a way unknown here"
            )
    return {"softcap": softcap, "logit_scale": scale}


def _check(name: str, causal: Any, options: dict[str, Any]) -> None:
    """Compares the options with the model's own logits of a few tokens, once for each model and options.

    Raises:
        ValueError: they differ.
    """
    weight = options["weight"]
    key = options["softcap"], options["logit_scale"], options["bias"] is None, options["lora"] is None
    known = _CHECKED.setdefault(causal, set())
    if key in known or weight.is_meta or hasattr(weight, "full_tensor") or hasattr(weight, "ds_status"):
        return
    ids = torch.arange(6, device=weight.device)[None] % weight.shape[0]
    with undisturbed(causal, weight.device):
        expected = causal(input_ids=ids, use_cache=False).logits.double()
        hidden = head_input_of(causal)(ids)
        found = _logits(hidden, **options)
    if not _close(found, expected, hidden.dtype):
        raise ValueError(f"{name} transforms its logits in a way unknown here: its head has no known form")
    known.add(key)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Any, softcap: float | None, logit_scale: float
) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).double()
    if lora is not None:
        a, b, scaling = lora
        logits += scaling * nn.functional.linear(nn.functional.linear(hidden.to(a.dtype), a), b)
    logits *= logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype.itemsize >= 4 else 0.05
    return bool((found - expected).norm() <= tolerance * expected.norm())

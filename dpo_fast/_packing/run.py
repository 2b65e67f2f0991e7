"""A packed batch through a decoder, and the check that the decoder honours packing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast._packing.layout import Ints, Layout, find_prefixes
from dpo_fast._packing.masks import make_mask, teach_sdpa, varlen_bounds
from dpo_fast._packing.models import Decoder, asked_mask, mask_form

Forward = Callable[..., Any]
Alone = Callable[[Tensor], Tensor]


def packed_inputs(decoder: Decoder, ids: Tensor, layout: Layout, form: str) -> dict[str, Any]:
    """The decoder's keywords for token ids [1, N] that lie as layout says."""
    inputs = {
        "input_ids": ids,
        "position_ids": torch.from_numpy(layout.position_ids)[None].to(ids.device),
        "use_cache": False,
    }
    if form == "varlen":
        return {**inputs, "attention_mask": None, **varlen_bounds(layout, ids.device)}
    if form == "runs":
        teach_sdpa()
    dtype = decoder.body.get_input_embeddings().weight.dtype
    masks = {k: make_mask(form, layout, decoder.window_of(k), ids.device, dtype) for k in decoder.kinds}
    return {**inputs, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


# --- the check --------------------------------------------------------------------------------------------------------

_CHECKED: weakref.WeakKeyDictionary[Any, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()
_WINDOW = 3  # of the check: sliding layers are tried with a window that its short sequences exceed
_TOLERANCE = 1e-4  # of the largest relative error of a row; norms are computed in float32 in float64 models too
_HALF_TOLERANCE = 0.05  # of the median: in half types a row may take another expert


def checked_form(
    decoder: Decoder, forward: Forward, alone: Alone, layout: Layout, device: torch.device, mask: str | None
) -> str:
    """The mask's form for this batch, after a check on first use that the model honours it.

    Raises:
        ValueError, TypeError: as `mask_form`; the model's hidden states of packed sequences are not those of the
            same sequences alone.
    """
    form = planned_form(decoder, layout, device, mask)
    chosen = asked_mask(mask) == "auto"
    error = _checked(decoder, forward, alone, form, device)
    if error and form == "runs" and chosen:  # an attention of its own, which asks sdpa itself
        form = "bool"
        error = _checked(decoder, forward, alone, form, device)
        if not error:
            _CHECKED[decoder.body].add((decoder.attention, "no runs"))
    if error:
        raise ValueError(f"{decoder.name} with attention {decoder.attention} does not honour packing: {error}")
    return form


def planned_form(decoder: Decoder, layout: Layout, device: torch.device, mask: str | None) -> str:
    """The mask's form for this batch, as far as it is known without running anything."""
    mask = asked_mask(mask)
    form = mask_form(decoder.attention, layout.n_rows, device, mask)
    no_runs = (decoder.attention, "no runs") in _CHECKED.get(decoder.body, ())
    return "bool" if form == "runs" and no_runs and mask == "auto" else form


def _checked(decoder: Decoder, forward: Forward, alone: Alone, form: str, device: torch.device) -> str | None:
    known = _CHECKED.setdefault(decoder.body, set())
    key = decoder.attention, form
    if key in known:
        return None
    with undisturbed(decoder.causal, device):
        error = _packing_error(decoder, forward, alone, form, device)
    if not error:
        known.add(key)
    return error


def hidden_of(forward: Forward) -> Alone:
    """Hidden states [S, T, H] of rows [S, T] by the decoder."""

    def alone(ids: Tensor) -> Tensor:
        found: Tensor = forward(input_ids=ids, use_cache=False).last_hidden_state
        return found

    return alone


def head_input_of(causal: Any) -> Alone:
    """Hidden states [S, T, H] of rows [S, T], as the model's head is given them.

    Raises:
        TypeError: (the function) a model that does not call its head.
    """

    def alone(ids: Tensor) -> Tensor:
        given: list[Tensor] = []
        hook = causal.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        try:
            causal(input_ids=ids, use_cache=False)
        finally:
            hook.remove()
        if not given:
            raise TypeError(f"{type(causal).__name__} does not call its head: its hidden states cannot be compared")
        return given[0]

    return alone


@contextmanager
def undisturbed(model: Any, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients and autocast; random state and the modules' modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    on_cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_cuda), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _short_window(decoder: Decoder) -> Iterator[Decoder]:
    """The decoder with a sliding window of a few tokens, where its masks come from its config."""
    config = decoder.body.config
    if decoder.window is None or "flash" in decoder.attention:
        yield decoder
        return
    config.sliding_window, before = _WINDOW, config.sliding_window
    try:
        yield replace(decoder, window=_WINDOW)
    finally:
        config.sliding_window = before


def shifts_freely(decoder: Decoder, forward: Forward, device: torch.device) -> bool:
    """Whether adding a number to all positions changes nothing but rounding, as with rotary embeddings; remembered.

    Never so in half types, where rounding could hide what it changes.
    """
    known = _CHECKED.setdefault(decoder.body, set())
    yes, no = ("shifts freely",), ("depends on positions",)
    if yes not in known and no not in known:
        ids = torch.from_numpy(_tokens(decoder)[:6])[None].to(device)
        with undisturbed(decoder.causal, device):
            positions = torch.arange(6, device=device)[None]
            a, b = (
                forward(input_ids=ids, position_ids=positions + shift, use_cache=False).last_hidden_state[0]
                for shift in (0, 5)
            )
        known.add(yes if _is_exact(b) and not _too_large(_relative_errors(b, a), b) else no)
    return yes in known


def _tokens(decoder: Decoder) -> Ints:
    vocab = decoder.body.get_input_embeddings().weight.shape[0]
    found: Ints = (np.arange(40) * 7 + np.arange(40) ** 2) % vocab
    return found


def _relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    scale = expected.double().norm(dim=-1).clamp_min(1e-30)
    errors: Tensor = (found.double() - expected.double()).norm(dim=-1) / scale
    return errors


def _packing_error(decoder: Decoder, forward: Forward, alone: Alone, form: str, device: torch.device) -> str | None:
    """What differs between a few short sequences packed and alone; None: nothing."""
    tokens = _tokens(decoder)
    sequences = [np.concatenate([tokens[:5], tokens[a:b]]) for a, b in ((5, 9), (9, 15))] + [tokens[15:23]]
    keys = [np.stack([ids, np.arange(len(ids)), np.arange(len(ids))], -1) for ids in sequences]
    packed = find_prefixes(keys, share=form != "varlen")
    # rows of a batch are alone; what follows a sequence cannot reach it in a causal model, so no mask is needed
    batch = np.stack([np.resize(ids, max(map(len, sequences))) for ids in sequences])
    with _short_window(decoder) as tried:
        expected = alone(torch.from_numpy(batch).to(device))
        try:
            ids = torch.from_numpy(packed.keys[:, 0].copy())[None].to(device)
            found = forward(**packed_inputs(tried, ids, packed.layout, form)).last_hidden_state[0]
        except Exception as error:  # whatever it does not take
            return f"it fails with {type(error).__name__}: {str(error)[:300]}"
    errors = [
        _relative_errors(found[torch.from_numpy(rows).to(device)], each[: len(rows)])
        for each, rows in zip(expected, packed.rows, strict=True)
    ]
    return _too_large(torch.cat(errors), found)


def _is_exact(found: Tensor) -> bool:
    rounded = found.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return found.dtype.itemsize >= 4 and not rounded


def _too_large(errors: Tensor, found: Tensor) -> str | None:
    exact = _is_exact(found)
    error = float(errors.max() if exact else errors.median())
    if error <= (_TOLERANCE if exact else _HALF_TOLERANCE):  # NaN is not
        return None
    return f"hidden states of packed sequences differ by {error:.2g} (relative) from what the head is given alone"

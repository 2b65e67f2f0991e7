"""A decoder whose forward takes an ordinary padded batch and runs it packed, with every common prefix once."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast._packing.layout import Ints, find_prefixes
from dpo_fast._packing.models import Decoder, decoder_of
from dpo_fast._packing.run import Forward, checked_form, hidden_of, packed_inputs, shifts_freely

_FOR_THE_LOSS = {"labels", "shift_labels", "num_items_in_batch"}  # models hand them through to their decoder
_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "past_key_values", *_FOR_THE_LOSS}
_PACKED_ALREADY = {"cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"}


@dataclass
class SharedPrompts:
    """What a `shared_prompts` block has done so far."""

    packed_calls: int = 0  # of the decoder, run packed
    plain_calls: int = 0  # run as they were: nothing to share or to leave out, or not for packing (see shared_prompts)
    rows_given: int = 0  # S * T of the packed calls, padding included
    rows_run: int = 0  # N of the packed calls


_ACTIVE: weakref.WeakKeyDictionary[Any, SharedPrompts] = weakref.WeakKeyDictionary()


@contextmanager
def sharing(model: Any, mask: str | None) -> Iterator[SharedPrompts]:
    """See `dpo_fast.shared_prompts`."""
    decoder = decoder_of(model)
    body = decoder.body
    if body in _ACTIVE:  # a block within a block
        yield _ACTIVE[body]
        return
    before = body.__dict__.get("forward")  # not the class's own where another library has replaced it
    done = _ACTIVE[body] = SharedPrompts()
    ours = _forward(decoder, body.forward, mask, done)
    body.forward = ours
    hook = decoder.causal.register_forward_hook(_not_around(decoder.name, done))
    try:
        yield done
    finally:
        hook.remove()
        del _ACTIVE[body]
        if body.__dict__.get("forward") is ours:
            del body.forward
            if before is not None:
                body.forward = before


def _not_around(name: str, done: SharedPrompts) -> Any:
    """A hook of the causal model that raises where its forward did not call the decoder's."""
    before = [0]

    def hook(*_: Any) -> None:
        calls = done.packed_calls + done.plain_calls
        if calls == before[0]:
            raise TypeError(f"{name} does not call its decoder's forward: shared_prompts cannot run it packed")
        before[0] = calls

    return hook


def _forward(decoder: Decoder, plain: Forward, mask: str | None, done: SharedPrompts) -> Forward:
    signature = inspect.signature(plain)
    extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prepare(args: Any, kwargs: Any) -> tuple[_Batch, dict[str, Any]] | None:
        bound = signature.bind(*args, **kwargs).arguments
        given = {**bound, **bound.pop(extra, {})} if extra else bound
        batch = None if _is_plain(given) else _Batch(decoder, plain, given)
        if batch is None or batch.nothing_to_gain:
            done.plain_calls += 1
            return None
        done.packed_calls += 1
        done.rows_given += batch.ids.numel()
        done.rows_run += batch.packed.layout.n_rows
        return batch, batch.inputs(decoder, plain, mask)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        packed = prepare(args, kwargs)
        if packed is None:
            return plain(*args, **kwargs)
        batch, inputs = packed
        return batch.unpacked(decoder.name, plain(**inputs))

    # a compiled model's decoder is compiled by itself: what is packed depends on the tokens
    found: Forward = torch.compiler.disable(forward, recursive=False)
    return found


def _is_plain(given: Mapping[str, Any]) -> bool:
    """Whether a call is none of a padded batch in training: with a cache or a mask of its own, or packed already."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    # some models say use_cache=True for their config's default: in training nobody reads the cache
    if given.get("past_key_values") is not None or (given.get("use_cache") and not torch.is_grad_enabled()):
        return True
    if any(given.get(name) is not None for name in _PACKED_ALREADY):
        return True
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return True
    return mask is None and positions is not None and bool((positions.diff() != 1).any())


class _Batch:
    """One call's padded batch, and the same packed."""

    def __init__(self, decoder: Decoder, plain: Forward, given: Mapping[str, Any]) -> None:
        _check(decoder.name, given)
        self.ids: Tensor = given["input_ids"]  # [S, T]
        self.others = {k: v for k, v in given.items() if k not in _INPUTS - _FOR_THE_LOSS and v is not None}
        self.as_tuple = given.get("return_dict") is False
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        valid = np.ones(self.ids.shape, bool) if mask is None else (mask != 0).cpu().numpy()
        columns = np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape)
        firsts = valid.argmax(-1)
        at = columns if positions is None else np.broadcast_to(positions.cpu().numpy(), self.ids.shape)
        if positions is None and (firsts != firsts[0]).any() and shifts_freely(decoder, plain, self.ids.device):
            at = columns - firsts[:, None]
        keys = np.stack([self.ids.cpu().numpy(), at, columns - firsts[:, None]], -1).astype(np.int64)
        sequences = [key[kept] for key, kept in zip(keys, valid, strict=True)]
        _check_positions(decoder.name, sequences)
        self.packed = find_prefixes(sequences, share="flash" not in decoder.attention)
        self.valid = valid

    @property
    def nothing_to_gain(self) -> bool:
        """No padding and no common prefix, or no token at all."""
        return self.packed.layout.n_rows in (0, self.ids.numel())

    def inputs(self, decoder: Decoder, plain: Forward, mask: str | None) -> dict[str, Any]:
        """The decoder's keywords for the packed batch."""
        layout, device = self.packed.layout, self.ids.device
        form = checked_form(decoder, plain, hidden_of(plain), layout, device, mask)
        ids = torch.from_numpy(self.packed.keys[:, 0].copy())[None].to(device, self.ids.dtype)
        return {**packed_inputs(decoder, ids, layout, form), **self.others}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def unpacked(self, name: str, out: Any) -> Any:
        """The decoder's output, each row's at its padded place; zeros at padding."""
        rows: Ints = np.full(self.ids.shape, self.packed.layout.n_rows, np.int64)
        rows[self.valid] = np.concatenate(self.packed.rows)
        found = type(out)(**_unpacked(name, out, torch.from_numpy(rows).to(self.ids.device)))
        return found.to_tuple() if self.as_tuple else found


def _check(name: str, given: Mapping[str, Any]) -> None:
    ids, mask, positions = (given.get(key) for key in ("input_ids", "attention_mask", "position_ids"))
    if ids is None:
        raise ValueError("shared_prompts finds common prefixes by token ids: give input_ids, not inputs_embeds")
    if ids.dim() != 2:
        raise ValueError(f"input_ids must have shape [S, T], found {tuple(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(ids.shape)}, found {tuple(mask.shape)}"
        )
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != ids.shape[1]):
        raise ValueError(f"position_ids must have shape {tuple(ids.shape)}, found {tuple(positions.shape)}")
    if given.get("output_attentions"):
        raise ValueError("attention weights of a packed batch are not those of a padded one: no output_attentions")
    for key, value in given.items():
        if key not in _INPUTS and isinstance(value, Tensor) and value.dim() > 1:
            raise ValueError(f"{name} is given {key} {tuple(value.shape)}, which shared_prompts cannot pack")


def _check_positions(name: str, sequences: list[Ints]) -> None:
    for s, keys in enumerate(sequences):
        steps = np.diff(keys[:, 1])
        if (steps < 1).any():
            where = int(np.argmax(steps < 1)) + 1
            raise ValueError(
                f"position_ids of row {s} fall from {keys[where - 1, 1]} to {keys[where, 1]}: {name} would take it for "
                "one sequence by its attention_mask, and for several by its positions"
            )


def _unpacked(name: str, out: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The fields of a decoder's output by padded places: [1, N, H] as [S, T, H], [N, E] as [S * T, E]."""

    def placed(x: Tensor) -> Tensor:
        flat = torch.nn.functional.pad(x.reshape(-1, x.shape[-1]), (0, 0, 0, 1))
        # embedding's backward adds up the rows in a fixed order, also on CUDA
        found = torch.nn.functional.embedding(rows, flat, padding_idx=len(flat) - 1)
        return found if x.dim() == 3 else found.flatten(0, 1)

    fields: dict[str, Any] = {}
    for key, value in out.items():
        if key not in ("last_hidden_state", "hidden_states", "router_logits"):
            raise ValueError(f"{name} returns {key}, which shared_prompts cannot bring into the form of a padded batch")
        fields[key] = placed(value) if isinstance(value, Tensor) else tuple(map(placed, value))
    return fields

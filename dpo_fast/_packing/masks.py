"""A layout's mask in the form that a model's attention takes.

| form | attention | what the model is given | bytes |
|---|---|---|---|
| "bool" | sdpa, short | bool [1, 1, N, N] | N * N |
| "runs" | sdpa, long | a call per run of rows over the rows it sees | of a run with a past: own rows * rows seen |
| "additive" | eager | 0 or the type's minimum [1, 1, N, N] | N * N * bytes of the type |
| "blocks" | flex attention | BlockMask of 128 x 128 blocks | 16 * (N / 128)^2 + 16 * N |
| "varlen" | flash attention | bounds of the sequences; nothing may be shared | 8 * S |

The "runs" form is a mask object that only our sdpa function understands: any other attention that is handed one
fails, it cannot be misread. Gradient checkpointing runs a layer again from the mask that it was given, so nothing
depends on a setting that may have changed by then.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dpo_fast._packing.dense import additive_mask, dense_mask
from dpo_fast._packing.layout import Layout, Run

BLOCK = 128


def varlen_bounds(layout: Layout, device: torch.device) -> dict[str, Any]:
    """The keywords of transformers' flash attention for a batch of separate sequences.

    Raises:
        ValueError: sequences that share rows.
    """
    if layout.shares:
        raise ValueError(
            "flash attention takes no mask, so it cannot share prompts: pack with share_prompts=False, or take "
            'model.set_attn_implementation("sdpa") or ("flex_attention")'
        )
    bounds = [0, *(run.stop for run in layout.runs)]
    lengths = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(bounds))
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


# --- blocks, for flex attention ---------------------------------------------------------------------------------------


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """The BlockMask of a layout, from the bounds of each block's numbers: N x N pairs are not looked at.

    A block that is said to be partly seen may be empty: the function within blocks decides there.
    """
    N = layout.n_rows
    n_blocks = -(-N // BLOCK)
    starts = np.arange(n_blocks) * BLOCK
    stops = np.minimum(starts + BLOCK, N)
    low, high = ([f.reduceat(x, starts) for x in (layout.last, layout.places)] for f in (np.minimum, np.maximum))
    below = np.tri(n_blocks, k=-1, dtype=bool)
    seen = below & (high[0] > starts[:, None])
    full = below & (low[0] >= stops[:, None])
    seen |= np.eye(n_blocks, dtype=bool)
    if window is not None:
        seen &= low[1][:, None] - high[1] < window
        full &= high[1][:, None] - low[1] < window
    full &= ((stops - starts)[:, None] == BLOCK) & (stops - starts == BLOCK)
    last, places = (torch.from_numpy(x).to(device) for x in (layout.last, layout.places))

    def within(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found = (kv <= q) & (q < last[kv])
        return found if window is None else found & (places[q] - places[kv] < window)

    partly = _listed(seen & ~full, device)
    mask = BlockMask.from_kv_blocks(
        *partly, *_listed(full, device), BLOCK_SIZE=BLOCK, mask_mod=within, seq_lengths=(N, N)
    )
    mask.ndim = 4  # type: ignore[attr-defined]  # GPT-2 asks for it
    return mask


def _listed(blocks: np.ndarray[Any, np.dtype[np.bool_]], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row of blocks, how many there are and which: [1, 1, R] and [1, 1, R, C], int32."""
    number = torch.from_numpy(blocks.sum(-1).astype(np.int32))
    which = torch.from_numpy(np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32))
    return number[None, None].to(device), which[None, None].to(device)


# --- runs, for sdpa ---------------------------------------------------------------------------------------------------


class RunMask(BlockMask):
    """A layout for `run_attention`. A BlockMask in name, because transformers hands these through untouched."""

    ndim = 4

    def __init__(self, layout: Layout, window: int | None, device: torch.device) -> None:
        self.n_rows = layout.n_rows
        bounds = {0, layout.n_rows}
        for run in layout.runs:
            bounds |= {run.start, run.stop, *(bound for part in run.past for bound in part)}
        cuts = sorted(bounds)
        at = {cut: i for i, cut in enumerate(cuts)}
        self.sizes = [b - a for a, b in pairwise(cuts)]
        self.parts: list[tuple[list[int], list[int]]] = []  # which pieces a run's rows are, and which it sees
        self.masks: list[Tensor | None] = []
        for run in layout.runs:
            own = list(range(at[run.start], at[run.stop]))
            self.parts.append(([*own], [i for a, b in run.past for i in range(at[a], at[b])] + own))
            self.masks.append(_mask_of_run(layout, run, window, device))

    @property
    def shape(self) -> tuple[int, ...]:
        """[1, 1, N, N], though nothing of this size exists."""
        return 1, 1, self.n_rows, self.n_rows

    def __repr__(self) -> str:
        return f"RunMask(n_rows={self.n_rows}, n_runs={len(self.parts)})"


def _reach(layout: Layout, run: Run) -> int:
    """How far back a run's last row looks, in places."""
    first = run.past[0][0] if run.past else run.start
    return int(layout.places[run.stop - 1] - layout.places[first])


def _size_of_run(layout: Layout, run: Run, window: int | None) -> tuple[int, int]:
    """Rows and columns of a run's mask; 0 where it needs none: plain causal attention is right."""
    if not run.past and (window is None or _reach(layout, run) < window):
        return 0, 0
    own = run.stop - run.start
    return own, own + sum(b - a for a, b in run.past)


def _mask_of_run(layout: Layout, run: Run, window: int | None, device: torch.device) -> Tensor | None:
    """[1, 1, own rows, rows seen], bool; None where plain causal attention is right."""
    if not _size_of_run(layout, run, window)[0]:
        return None
    own = np.arange(run.start, run.stop)
    columns = np.concatenate([*(np.arange(a, b) for a, b in run.past), own])
    rows, cols, places = (torch.from_numpy(x).to(device) for x in (own, columns, layout.places))
    seen = cols <= rows[:, None]
    if window is not None and _reach(layout, run) >= window:
        seen &= places[rows][:, None] - places[cols] < window
    return seen[None, None]


def run_attention(
    attend: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: RunMask, *args: Any, **kw: Any
) -> Any:
    """Attention of each run over the rows it sees, by the model's own sdpa function `attend`.

    Pieces are cut once (`split`), so that backward puts their gradients together once.
    """
    if kw.get("position_bias") is not None:
        raise ValueError("attention with a position bias cannot run in pieces: use mask='dense'")
    cut = [x.split(mask.sizes, dim=2) for x in (q, k, v)]
    found = []
    for (own, seen), allowed in zip(mask.parts, mask.masks, strict=True):
        rows = _joined(cut[0], own)
        found.append(attend(module, rows, _joined(cut[1], seen), _joined(cut[2], seen), allowed, *args, **kw)[0])
    return torch.cat(found, dim=1), None


def _joined(pieces: Any, which: list[int]) -> Tensor:
    return pieces[which[0]] if len(which) == 1 else torch.cat([pieces[i] for i in which], dim=2)


def teach_sdpa() -> None:
    """Makes transformers' sdpa understand a RunMask; for all other masks it stays what it is."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(attend, "takes_runs", False):
        return

    def sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kw: Any) -> Any:
        if isinstance(attention_mask, RunMask):
            return run_attention(attend, module, query, key, value, attention_mask, *args, **kw)
        return attend(module, query, key, value, attention_mask, *args, **kw)

    sdpa.takes_runs = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa)


# --- one mask for each kind of layer ----------------------------------------------------------------------------------


def make_mask(form: str, layout: Layout, window: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The mask of one kind of layer. Dense ones are made anew; blocks and runs are small and stay with the layout."""
    if form == "bool":
        return dense_mask(layout, window, device)
    if form == "additive":
        return additive_mask(layout, window, device, dtype)
    key = form, window, device
    if key not in layout.masks:
        with torch.inference_mode(False):  # its next use may be in training
            layout.masks[key] = (block_mask if form == "blocks" else RunMask)(layout, window, device)
    return layout.masks[key]


def mask_bytes(form: str, layout: Layout, window: int | None, itemsize: int) -> int:
    """Memory of one mask; itemsize is that of the model's type."""
    N, n_blocks = layout.n_rows, -(-layout.n_rows // BLOCK)
    if form == "runs":
        return sum(own * seen for own, seen in (_size_of_run(layout, run, window) for run in layout.runs))
    sizes = {"bool": N * N, "additive": N * N * itemsize, "blocks": 16 * (n_blocks**2 + N)}
    return sizes.get(form, 4 * (len(layout.runs) + 1))

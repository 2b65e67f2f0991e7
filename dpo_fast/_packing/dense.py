"""A layout's mask as an N x N tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_fast._packing.layout import Layout


def dense_mask(layout: Layout, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, N, N], bool: row n may look at column m, at most `window` tokens back (None: any number)."""
    last, places = (torch.from_numpy(x).to(device) for x in (layout.last, layout.places))
    rows = torch.arange(layout.n_rows, device=device)
    seen = (rows <= rows[:, None]) & (rows[:, None] < last)
    if window is not None:
        seen &= places[:, None] - places < window
    return seen[None, None]


def additive_mask(layout: Layout, window: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, 1, N, N] of dtype: 0 where row n may look at column m, the type's minimum elsewhere."""
    seen = dense_mask(layout, window, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)

"""The type that the LM head's products are computed in: half types go through float32 where that is faster.

Without dot products for a half type (AVX2 only) torch's products of it take 10 to 100 times as long as float32's: there
operands are converted some MiB at a time. torch says what the processor has, within ONEDNN_MAX_CPU_ISA;
DPO_FAST_HEAD_TILES overrides that: "float32" or "native".
"""

from __future__ import annotations

import functools
import os
import platform

import torch
from torch import Tensor

_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_CHUNK_BYTES = 8 << 20  # of a converted operand: larger than a cache's share gains nothing


@functools.cache
def _has_dot_products(dtype: torch.dtype) -> bool:
    """Whether torch's products of a half type are fast; elsewhere than on x86-64 nobody has measured: yes."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    check = getattr(torch.ops.mkldnn, _CHECKS[dtype], None)
    return check is not None and bool(check())


def through_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type are computed in float32 there.

    Raises:
        ValueError: DPO_FAST_HEAD_TILES is neither "float32" nor "native".
    """
    if device.type != "cpu" or dtype not in _CHECKS:
        return False
    choice = os.environ.get("DPO_FAST_HEAD_TILES", "")
    if choice not in ("", "float32", "native"):
        raise ValueError(f'DPO_FAST_HEAD_TILES must be "float32" or "native", found {choice!r}')
    return choice == "float32" or (choice == "" and not _has_dot_products(dtype))


def _chunks(size: int, other: int) -> list[slice]:
    """Slices of a side of `size` whose rows of `other` float32 numbers fit _CHUNK_BYTES."""
    step = max(64, _CHUNK_BYTES // (4 * max(other, 1)))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] in float32, converted along the longest side; written to `out`, or new in float32."""
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty((m, n), dtype=torch.float32)
    if k >= max(m, n):
        total = out.zero_() if out.dtype is torch.float32 else a.new_zeros((m, n), dtype=torch.float32)
        for part in _chunks(k, max(m, n)):
            total.addmm_(a[:, part].float(), b[part].float())
        return total if out is total else out.copy_(total)
    if m >= n:
        whole = b.float()
        for part in _chunks(m, max(k, n)):
            out[part] = a[part].float() @ whole
        return out
    whole = a.float()
    for part in _chunks(n, max(k, m)):
        out[:, part] = whole @ b[:, part].float()
    return out


def logits(
    hidden: Tensor,  # [R, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    low_rank: tuple[Tensor, Tensor] | None,  # [R, r], [V, r]
    out: Tensor,  # [R, V]
) -> None:
    """Fills out with hidden @ weight.T + bias + the product of low_rank, rounded once."""
    x = hidden.float()
    for part in _chunks(weight.shape[0], max(hidden.shape)):
        rows = weight[part].float().t()
        z = x @ rows if bias is None else torch.addmm(bias[part].float(), x, rows)
        if low_rank is not None:
            z.addmm_(low_rank[0], low_rank[1][part].float().t())
        out[:, part] = z


def describe() -> str:
    """One line for `dpo-fast info`."""
    cpu = torch.device("cpu")
    ways = {str(t).removeprefix("torch."): "float32" if through_float32(t, cpu) else "native" for t in _CHECKS}
    return ", ".join(f"{name} {way}" for name, way in ways.items())

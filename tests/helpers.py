"""What the tests share: cases in every layout, the naive torch expressions, and the tolerance."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("padded", "packed", "strided", "expanded", "every_second", "transposed")

# S, T, V
SHAPES = (
    (1, 1, 1),  # the smallest there is
    (2, 1, 2),
    (3, 7, 33),  # V between the vector lengths of all instruction sets
    (2, 33, 507),  # V not a multiple of any vector, rows at every alignment
    (7, 3, 1),  # one token in the vocabulary: log-prob 0
    (33, 2, 7),
    (1, 507, 3),
    (2, 2, 2049),  # one logit more than a block
    (2, 3, 32000),  # Llama-2, 64 bytes divide a row
    (3, 1, 32769),  # one logit more than a piece of a row
    (1, 3, 49152),  # SmolLM2
    (2, 1, 128256),  # Llama-3
)

# DESIGN.md, section 6: beside the naive expression's own error.
SLACK = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Tensor -> array, half types as float32 (exact)."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def assert_accurate(
    actual: Tensor, exact: np.ndarray, naive: Tensor | None, dtype: torch.dtype, what: str = "", roundings: int = 1
) -> None:
    """|actual - exact| <= max |naive - exact| + SLACK + the result's own rounding.

    `roundings`: of how many roundings the result is the sum (tiles added up in float32).
    """
    assert tuple(actual.shape) == np.shape(exact), (what, tuple(actual.shape), np.shape(exact))
    if not actual.numel():
        return
    found = to_numpy(actual)
    with np.errstate(over="ignore", invalid="ignore"):
        # correctly rounded is correct, also where that is infinite
        error = np.where(found == np.asarray(exact).astype(found.dtype), 0, np.abs(found.astype(np.float64) - exact))
    own = 0.0 if naive is None else np.abs(to_numpy(naive).astype(np.float64) - exact).max()
    own = own if np.isfinite(own) else 0.0  # where the naive expression overflows, the kernels must not
    bound = own + SLACK[dtype] + roundings * torch.finfo(actual.dtype).eps / 2 * np.abs(exact)
    if not (error <= bound).all():  # also for NaN
        worst = np.unravel_index(np.argmax(np.nan_to_num(error - bound, nan=np.inf)), error.shape)
        raise AssertionError(f"{what}{list(worst)}: {found[worst]}, exactly {np.asarray(exact)[worst]}")


@dataclass
class Case:
    """Logits in some layout, made from a leaf, with targets of the right shape."""

    leaf: Tensor
    view: Callable[[Tensor], Tensor]
    targets: Tensor
    cu_seqlens: Tensor | None
    n_seqs: int

    def logits(self) -> Tensor:
        """A fresh view of a fresh leaf, whose own gradient is kept."""
        x = self.view(self.leaf.detach().clone().requires_grad_())
        if not x.is_leaf:
            x.retain_grad()
        return x


def make_case(layout: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> Case:
    """Random logits of a realistic spread; about a third of the targets ignored."""
    S, T, V = shape
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return (spread * torch.randn(*size, generator=g)).to(dtype)

    targets = torch.randint(0, V, (S, T), generator=g)
    targets[torch.rand(S, T, generator=g) < 0.3] = -100
    cu_seqlens, n_seqs = None, S
    if layout == "padded":
        leaf, view = randn(S, T, V), lambda x: x.view(S, T, V)
    elif layout == "packed":
        leaf, view = randn(S * T, V), lambda x: x.view(S * T, V)
        targets = targets.reshape(-1)
        cuts = torch.randint(0, S * T + 1, (S,), generator=g).sort().values  # some sequences are empty
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([S * T])]).to(torch.int32)
        n_seqs = S + 1
    elif layout == "strided":  # the usual shift by one, and rows that start anywhere
        leaf, view = randn(S, T + 1, V + 5), lambda x: x[:, :-1, 3 : V + 3]
    elif layout == "expanded":
        leaf, view = randn(1, T, V), lambda x: x.expand(S, T, V)
    elif layout == "every_second":
        leaf, view = randn(S, T, 2 * V), lambda x: x[:, :, ::2]
    else:  # transposed: neighbouring logits lie T apart
        leaf, view = randn(S, V, T), lambda x: x.transpose(1, 2)
    return Case(leaf, view, targets, cu_seqlens, n_seqs)


def naive_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """The plain expression: log_softmax in float32 (float64), gather, zeros where ignored."""
    wide = logits if logits.dtype is torch.float64 else logits.float()
    logps = torch.log_softmax(wide, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, torch.zeros_like(logps), logps)


def naive_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype is torch.float64 else logits.float()
    logp = torch.log_softmax(wide, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(targets == -100, torch.zeros_like(entropy), entropy)


def naive_sequence_logps(logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    logps = naive_token_logps(logits, targets)
    if cu_seqlens is None:
        return logps.sum(-1)
    return torch.stack(
        [logps[a:b].sum() for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    )


def naive_dpo_loss(logps: Tensor, ref: Tensor, pairs: Tensor, beta: float = 0.1) -> Tensor:
    ratios = logps - ref
    return -torch.nn.functional.logsigmoid(beta * (ratios[pairs[:, 0]] - ratios[pairs[:, 1]])).mean()


def random_pairs(n_seqs: int, seed: int = 0) -> Tensor:
    """More pairs than sequences, so that a sequence is in several."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, n_seqs, (n_seqs + 2, 2), generator=g)


PEAK_GROWTH = """
import torch, dpo_fast
def status(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))
def peak_growth(function):
    # the mark starts anew: pages of the libraries that were taken back meanwhile would hide growth below the old one
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before
"""


def peak_growth(code: str) -> int:
    """Runs code in a fresh process, where `peak_growth(function)` is defined; the number of bytes that it prints."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK_GROWTH + textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return int(run.stdout)

"""Calls of the `_cpu` binding on NumPy arrays, without the layers of Python above it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_fast import _cpu
from dpo_fast._arguments import (
    KernelGrads,
    KernelLosses,
    KernelOut,
    KernelPairs,
    KernelRows,
    KernelSaved,
    KernelSequences,
)

LOGIT_TYPES = ("float32", "float64", "bfloat16", "float16")  # by number
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
STATISTICS = _cpu.token_statistics()
LOSSES = {name: number for number, (name, _) in enumerate(_cpu.loss_types())}
DEFAULTS = {"beta": 0.1, "discopop_tau": 0.05, "simpo_gamma": 0.5, "alpha": 0.5}
DEFAULTS |= {"desirable_weight": 1.0, "undesirable_weight": 1.0}


def address(array: Any) -> int | None:
    return None if array is None else array.ctypes.data


def stored(x: np.ndarray, logit_type: str) -> np.ndarray:
    """x rounded to a type of logits; bfloat16 as its bits."""
    if logit_type != "bfloat16":
        return np.ascontiguousarray(x.astype(logit_type))
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def loaded(x: np.ndarray) -> np.ndarray:
    """The numbers that `stored` holds, as float64."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def loss_options(
    types: Any, weights: Any = None, divergence: str = "reverse_kl", average: bool = False, **given: float
):
    types = [types] if isinstance(types, str) else types
    values = DEFAULTS | given
    assert not values.keys() - set(_cpu.loss_parameters())
    parameters = tuple(values.get(name, 0.0) for name in _cpu.loss_parameters())
    numbers = tuple(LOSSES[name] for name in types)
    return numbers, tuple(weights or [1.0] * len(types)), parameters, DIVERGENCES.index(divergence), average


def kernel_grads(arrays: dict[str, np.ndarray]) -> KernelGrads:
    """Incoming gradients by the names of KernelGrads and the statistics."""
    statistics = tuple(address(arrays.get(name)) for name in STATISTICS)
    return KernelGrads(
        address(arrays.get("token_logps")), statistics, *(address(arrays.get(k)) for k in KernelGrads._fields[2:])
    )


class Batch:
    """Logits [S, T, V], or packed [N, V] with cu_seqlens, and everything the kernels write for them."""

    def __init__(
        self,
        logits: np.ndarray,  # as `stored` makes them
        targets: np.ndarray,  # [S, T] or [S, T, K]
        *,
        threads: int = 1,
        row_mask: np.ndarray | None = None,
        token_weights: np.ndarray | None = None,
        cu_seqlens: np.ndarray | None = None,
        average: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        valid_vocab: int = 0,
    ) -> None:
        self.logits, self.targets, self.threads = logits, targets, threads
        self.arrays = (row_mask, token_weights, cu_seqlens)  # keeps them alive
        S, T = logits.shape[:2] if logits.ndim == 3 else (1, logits.shape[0])
        self.wide = np.dtype(np.float64 if logits.dtype == np.float64 else np.float32)
        strides = [s // logits.itemsize for s in logits.strides]
        self.strides = strides if logits.ndim == 3 else [0, *strides]
        name = "bfloat16" if logits.dtype == np.uint16 else str(logits.dtype)
        self.rows = KernelRows(
            *(LOGIT_TYPES.index(name), S, T, logits.shape[-1], *self.strides),
            targets.shape[-1] if targets.ndim == logits.ndim else 1,
            (ignore_index, temperature, logit_scale, softcap, valid_vocab),
            *(address(logits), address(targets), address(row_mask), address(token_weights)),
            token_weights is not None and token_weights.dtype == np.float64,
        )
        self.n_seqs = S if cu_seqlens is None else len(cu_seqlens) - 1
        wide_bounds = cu_seqlens is not None and cu_seqlens.dtype == np.int64
        self.seqs = KernelSequences(address(cu_seqlens), wide_bounds, self.n_seqs, average)
        # NaN: what is not written is seen
        self.logps = np.full(targets.shape, np.nan, self.wide)
        self.stats = np.full((S * T, 2), np.nan, self.wide)
        self.statistics: dict[str, np.ndarray] = {}
        self.seq_logps = np.full(self.n_seqs, np.nan, self.wide)
        self.pairs: KernelPairs | None = None

    def _statistics(self, names: Any) -> tuple[int | None, ...]:
        rows = self.targets.shape[: self.logits.ndim - 1]
        for name in names:
            top1 = name == "is_top1"
            shape, dtype = (self.targets.shape, np.uint8) if top1 else (rows, self.wide)
            self.statistics[name] = np.full(shape, 77, dtype)
        return tuple(address(self.statistics.get(name)) for name in STATISTICS)

    def tokens(self, names: Any = ()) -> Batch:
        _cpu.token_forward(self.rows, self.threads, address(self.logps), address(self.stats), self._statistics(names))
        return self

    def sequences(self, double_sums: bool = False) -> Batch:
        if double_sums:
            self.seq_logps = self.seq_logps.astype(np.float64)
        arrays = (address(self.logps), address(self.stats), address(self.seq_logps))
        _cpu.sequence_forward(self.rows, self.seqs, self.threads, *arrays, double_sums)
        return self

    def loss(self, options: Any, ref: np.ndarray | None = None, *, wpo: bool = False, names: Any = (), **pairs: Any):
        self.pairs, self.kept, self.results, losses = pair_arrays(self.n_seqs, self.wide, **pairs)
        names = (*names, "log_sum_sq_probs") if wpo else names
        _cpu.dpo_forward(
            *(self.rows, self.seqs, self.pairs, options, self.threads, wpo, address(ref)),
            *(ref is not None and ref.dtype == np.float64, address(self.logps), address(self.stats)),
            *(self._statistics(names), address(self.seq_logps), losses),
        )
        return self

    def backward(self, inplace: bool = False, **grads: np.ndarray) -> np.ndarray:
        """The gradient of the logits, as float64; grads by the names of KernelGrads and the statistics."""
        grad = self.logits if inplace else np.full_like(self.logits, 77)
        strides = [s // grad.itemsize for s in grad.strides]
        arrays = {name: np.ascontiguousarray(g, self.wide) for name, g in grads.items()}
        entropy = address(self.statistics.get("entropy"))
        pair_grads = None if self.pairs is None else address(self.results["pair_grads"])
        _cpu.backward(
            *(self.rows, self.seqs, self.pairs, self.threads),
            KernelSaved(address(self.logps), address(self.stats), entropy, pair_grads),
            kernel_grads(arrays),
            KernelOut(address(grad), *(strides if self.logits.ndim == 3 else [0, *strides])),
        )
        return loaded(grad)


def pair_arrays(
    n_seqs: int,
    wide: Any,
    pairs: np.ndarray | None = None,
    divisor: float = 0.0,
    baseline: float | None = None,
    **numbers: np.ndarray,
) -> tuple[KernelPairs, Any, dict[str, np.ndarray], KernelLosses]:
    """The pairs' arguments, what must stay alive beside them, the results by name, and these as arguments."""
    P = n_seqs // 2 if pairs is None else len(pairs)
    base = None if baseline is None else np.array(baseline, np.float64)
    arrays = [numbers.get(name) for name in _cpu.pair_numbers()]
    kernel = KernelPairs(address(pairs), P, divisor, address(base), tuple(address(x) for x in arrays))
    results = {name: np.full(P, np.nan, wide) for name in ("losses", "chosen_rewards", "rejected_rewards")}
    results = {"loss": np.full(1, np.nan, wide), **results, "pair_grads": np.full((P, 2), np.nan)}
    return kernel, (pairs, base, arrays), results, KernelLosses(*(address(x) for x in results.values()))

"""Types of the compiled kernels; addresses are integers, None for an absent array (dpo_fast/_arguments.py)."""

from collections.abc import Sequence
from typing import Any

from dpo_fast._arguments import (
    Address,
    KernelGrads,
    KernelLosses,
    KernelOut,
    KernelPairs,
    KernelRows,
    KernelSaved,
    KernelSelected,
    KernelSequences,
    KernelSparse,
)

# dpo_fast._loss.options.LossOptions
_LossOptions = tuple[Any, ...]

def after_fork_in_child() -> None: ...
def isas() -> list[tuple[str, bool]]: ...
def set_isa(name: str | None) -> None: ...
def isa() -> str: ...
def exp_float(x: int, y: int, n: int, half: bool) -> None: ...
def exp_double(x: int, y: int, n: int) -> None: ...
def expect_writes(address: int, n_bytes: int) -> None: ...
def loss_types() -> list[tuple[str, int]]: ...
def logit_options() -> tuple[str, ...]: ...
def token_statistics() -> tuple[str, ...]: ...
def differentiable_statistics() -> tuple[str, ...]: ...
def loss_parameters() -> tuple[str, ...]: ...
def pair_numbers() -> tuple[str, ...]: ...
def token_forward(
    rows: KernelRows, threads: int, logps: Address, stats: Address, statistics: Sequence[Address] | None
) -> None: ...
def sequence_forward(
    rows: KernelRows,
    seqs: KernelSequences,
    threads: int,
    logps: Address,
    stats: Address,
    seq_logps: Address,
    double_sums: bool,
) -> None: ...
def dpo_forward(
    rows: KernelRows,
    seqs: KernelSequences,
    pairs: KernelPairs,
    loss: _LossOptions,
    threads: int,
    wpo: bool,
    ref_logps: Address,
    ref_double: bool,
    logps: Address,
    stats: Address,
    statistics: Sequence[Address] | None,
    seq_logps: Address,
    losses: KernelLosses,
) -> None: ...
def backward(
    rows: KernelRows,
    seqs: KernelSequences | None,
    pairs: KernelPairs | None,
    threads: int,
    saved: KernelSaved,
    grads: KernelGrads,
    out: KernelOut,
) -> None: ...
def preference_forward(
    pairs: KernelPairs,
    loss: _LossOptions,
    wide: bool,
    round_sums: bool,
    n_seqs: int,
    logps: Address,
    ref_logps: Address,
    ref_double: bool,
    lengths: Address,
    losses: KernelLosses,
) -> None: ...
def preference_backward(
    pairs: KernelPairs,
    wide: bool,
    n_seqs: int,
    pair_grads: Address,
    grad_loss: Address,
    grad_losses: Address,
    grad_logps: Address,
) -> None: ...
def column_blocks(vocab: int) -> int: ...
def select_sparse(
    rows: KernelRows,
    threads: int,
    logps: Address,
    stats: Address,
    grads: Address,
    allowed: Address,
    selected: KernelSelected,
) -> int: ...
def pack_sparse(selected: KernelSelected, threads: int, sparse: KernelSparse) -> None: ...
def sparse_times_table(
    sparse: KernelSparse, logit_type: int, table: Address, stride: int, width: int, threads: int, out: Address
) -> None: ...
def sparse_transposed_times_table(
    sparse: KernelSparse,
    logit_type: int,
    table: Address,
    stride: int,
    width: int,
    add: bool,
    threads: int,
    out: Address,
) -> None: ...
def sparse_column_sums(sparse: KernelSparse, add: bool, threads: int, out: Address) -> None: ...

"""Types of the CUDA binding; addresses are integers, None for an absent array (dpo_fast/_arguments.py)."""

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
    KernelSequences,
)

# dpo_fast._loss.options.LossOptions
_LossOptions = tuple[Any, ...]
# a cudaStream_t and a device
_Place = tuple[int, int]

SEQ_SAVED: int

def archs() -> list[str]: ...
def runtime_version() -> tuple[int, int]: ...
def driver_version() -> tuple[int, int]: ...
def logit_options() -> tuple[str, ...]: ...
def token_statistics() -> tuple[str, ...]: ...
def differentiable_statistics() -> tuple[str, ...]: ...
def loss_parameters() -> tuple[str, ...]: ...
def pair_numbers() -> tuple[str, ...]: ...
def forward_scratch_bytes(rows: KernelRows) -> int: ...
def token_forward(
    rows: KernelRows,
    place: _Place,
    scratch: Address,
    logps: Address,
    stats: Address,
    statistics: Sequence[Address] | None,
) -> None: ...
def sequence_forward(
    rows: KernelRows,
    seqs: KernelSequences,
    place: _Place,
    scratch: Address,
    logps: Address,
    stats: Address,
    seq_logps: Address,
    double_sums: bool,
    seq_saved: Address,
) -> None: ...
def dpo_forward(
    rows: KernelRows,
    seqs: KernelSequences,
    pairs: KernelPairs,
    loss: _LossOptions,
    place: _Place,
    scratch: Address,
    wpo: bool,
    ref_logps: Address,
    ref_double: bool,
    logps: Address,
    stats: Address,
    statistics: Sequence[Address] | None,
    seq_logps: Address,
    losses: KernelLosses,
    seq_saved: Address,
) -> None: ...
def backward(
    rows: KernelRows,
    seqs: KernelSequences | None,
    pairs: KernelPairs | None,
    place: _Place,
    scratch: Address,
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
    place: _Place,
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
    place: _Place,
    pair_grads: Address,
    grad_loss: Address,
    grad_losses: Address,
    grad_logps: Address,
) -> None: ...

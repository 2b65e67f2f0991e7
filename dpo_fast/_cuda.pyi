"""Types of the CUDA binding; addresses are integers, 0 for an absent array."""

from typing import Any

_Tuple = tuple[Any, ...]

SEQ_SAVED: int

def archs() -> list[str]: ...
def runtime_version() -> tuple[int, int]: ...
def driver_version() -> tuple[int, int]: ...
def forward_scratch_bytes(rows: _Tuple) -> int: ...
def token_forward(
    rows: _Tuple,
    stream: int,
    device: int,
    scratch: int,
    logps: int,
    stats: int,
    entropy: int,
    mean_logits: int,
    is_top1: int,
    log_sum_sq_probs: int,
) -> None: ...
def sequence_forward(
    rows: _Tuple,
    seqs: _Tuple,
    stream: int,
    device: int,
    scratch: int,
    logps: int,
    stats: int,
    seq_logps: int,
    double_sums: bool,
    seq_saved: int,
) -> None: ...
def dpo_forward(
    rows: _Tuple,
    seqs: _Tuple,
    pairs_spec: _Tuple,
    loss_spec: _Tuple,
    stream: int,
    device: int,
    scratch: int,
    wpo: bool,
    ref_logps: int,
    ref_double: bool,
    logps: int,
    stats: int,
    entropy: int,
    mean_logits: int,
    is_top1: int,
    log_sum_sq_probs: int,
    seq_logps: int,
    loss: int,
    losses: int,
    chosen_rewards: int,
    rejected_rewards: int,
    pair_grads: int,
    seq_saved: int,
) -> None: ...
def backward(
    rows: _Tuple,
    seqs: _Tuple | None,
    pairs_spec: _Tuple | None,
    stream: int,
    device: int,
    scratch: int,
    logps: int,
    stats: int,
    entropy: int,
    seq_saved: int,
    pair_grads: int,
    grad_token_logps: int,
    grad_entropy: int,
    grad_seq_logps: int,
    grad_loss: int,
    grad_losses: int,
    grad_logits: int,
    grad_seq_stride: int,
    grad_row_stride: int,
    grad_vocab_stride: int,
) -> None: ...
def preference_forward(
    pairs_spec: _Tuple,
    loss_spec: _Tuple,
    wide: bool,
    n_seqs: int,
    stream: int,
    device: int,
    logps: int,
    ref_logps: int,
    ref_double: bool,
    lengths: int,
    loss: int,
    losses: int,
    chosen_rewards: int,
    rejected_rewards: int,
    pair_grads: int,
) -> None: ...
def preference_backward(
    pairs_spec: _Tuple,
    wide: bool,
    n_seqs: int,
    stream: int,
    device: int,
    pair_grads: int,
    grad_loss: int,
    grad_losses: int,
    grad_logps: int,
) -> None: ...

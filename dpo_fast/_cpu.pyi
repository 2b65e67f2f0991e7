"""Types of the compiled kernels; addresses are integers, 0 for an absent array."""

from typing import Any

_Tuple = tuple[Any, ...]

def after_fork_in_child() -> None: ...
def isas() -> list[tuple[str, bool]]: ...
def set_isa(name: str | None) -> None: ...
def isa() -> str: ...
def exp_float(x: int, y: int, n: int, half: bool) -> None: ...
def exp_double(x: int, y: int, n: int) -> None: ...
def expect_writes(address: int, n_bytes: int) -> None: ...
def token_forward(
    rows: _Tuple,
    threads: int,
    logps: int,
    stats: int,
    entropy: int,
    mean_logits: int,
    is_top1: int,
    log_sum_sq_probs: int,
) -> None: ...
def sequence_forward(
    rows: _Tuple, seqs: _Tuple, threads: int, logps: int, stats: int, seq_logps: int, double_sums: bool
) -> None: ...
def loss_types() -> list[tuple[str, int]]: ...
def dpo_forward(
    rows: _Tuple,
    seqs: _Tuple,
    pairs_spec: _Tuple,
    loss_spec: _Tuple,
    threads: int,
    wpo: bool,
    float_sums: bool,
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
) -> None: ...
def backward(
    rows: _Tuple,
    seqs: _Tuple | None,
    pairs_spec: _Tuple | None,
    threads: int,
    logps: int,
    stats: int,
    entropy: int,
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
    pair_grads: int,
    grad_loss: int,
    grad_losses: int,
    grad_logps: int,
) -> None: ...

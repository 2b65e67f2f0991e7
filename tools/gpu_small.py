"""A small suite for compute-sanitizer: each CUDA kernel a few times, straight through the binding, on ragged shapes."""

from __future__ import annotations

import itertools

import torch

from dpo_fast import _checks, _cuda
from dpo_fast.ops import LOGIT_TYPES

DEVICE = torch.device("cuda")
# a row per block, rows in pieces; rows that start anywhere
SHAPES = ((2, 3, 5), (2, 3, 509), (2, 2, 2048), (2, 1, 40003))
LOSS = ((0,), (1.0,), 0.1, 0.0, 0.05, 0.5, 0, 0.5, 1.0, 1.0, 0.0, False)


def step(x: torch.Tensor, targets: torch.Tensor, softcap: float, inplace: bool) -> torch.Tensor:
    """One dpo_forward with all statistics and one backward; the gradient."""
    S, T, _ = x.shape
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    stream, device = torch.cuda.current_stream().cuda_stream, x.device.index or 0

    def new(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    head = _checks.rows_head(LOGIT_TYPES[x.dtype], x.shape, x.stride(), 1, (-100, 1.0, 1.0, softcap))
    rows = (*head, x.data_ptr(), targets.data_ptr(), 0, 0, False)
    seqs, pairs = (0, S, False, True), (0, S // 2, 0, 0, 0.0)
    scratch = new(max(_cuda.forward_scratch_bytes(rows), 8 * S), dtype=torch.uint8)
    logps, stats, entropy, mean, squares = new(S, T), new(S, T, 2), new(S, T), new(S, T), new(S, T)
    top1, seq_logps, loss, per_pair = new(S, T, dtype=torch.uint8), new(S), new(), new(3, S // 2)
    pair_grads, saved = new(S // 2, 2, dtype=torch.float64), new(S, _cuda.SEQ_SAVED, dtype=torch.float64)
    tokens = [t.data_ptr() for t in (logps, stats, entropy, mean, top1, squares)]
    results = [seq_logps.data_ptr(), loss.data_ptr(), *(p.data_ptr() for p in per_pair), pair_grads.data_ptr()]
    _cuda.dpo_forward(
        rows, seqs, pairs, LOSS, stream, device, scratch.data_ptr(), True, 0, False, *tokens, *results, saved.data_ptr()
    )
    grad = x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    one, each, out = (
        torch.ones((), dtype=wide, device=x.device),
        torch.ones_like(per_pair[0]),
        _checks.row_layout(grad.shape, grad.stride()),
    )
    for losses, h in ((0, 0), (each.data_ptr(), entropy.data_ptr())):
        if inplace and losses:
            break
        _cuda.backward(
            *(rows, seqs, pairs, stream, device, scratch.data_ptr(), logps.data_ptr(), stats.data_ptr()),
            *(entropy.data_ptr(), saved.data_ptr(), pair_grads.data_ptr(), 0, h, 0, one.data_ptr()),
            *(losses, grad.data_ptr(), out.seq_stride, out.row_stride, out.vocab_stride),
        )
    return grad


def main() -> None:
    torch.manual_seed(0)
    for dtype, (S, T, V), softcap in itertools.product(LOGIT_TYPES, SHAPES, (0.0, 20.0)):
        wide = torch.randn(S, T, V + 3, device=DEVICE).to(dtype)
        targets = torch.randint(0, V, (S, T), device=DEVICE)
        targets[0, 0] = -100
        for x in (wide[:, :, 1 : V + 1], wide[:, :, :V].contiguous()):
            for inplace in (False, True):
                grad = step(x, targets, softcap, inplace)
                # a gradient of a log-probability sums to 0 over the vocabulary
                if softcap == 0 and inplace:
                    slack = 1e-4 if dtype.itemsize > 2 else 0.05
                    assert grad.double().sum(-1).abs().max() < slack, (dtype, S, T, V)
    torch.cuda.synchronize()
    print("small suite passed")


if __name__ == "__main__":
    main()

"""A small suite for compute-sanitizer: each CUDA kernel a few times, straight through the binding, on ragged shapes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dpo_fast import _cuda
from dpo_fast._arguments import (
    KernelGrads,
    KernelLosses,
    KernelOut,
    KernelPairs,
    KernelRows,
    KernelSaved,
    KernelSequences,
)

DEVICE = torch.device("cuda")
LOGIT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # by number
# a row per block, rows in pieces; rows that start anywhere
SHAPES = ((2, 3, 5), (2, 3, 509), (2, 2, 2048), (2, 1, 40003))
PARAMETERS = {"beta": 0.1, "discopop_tau": 0.05, "simpo_gamma": 0.5, "dpop_lambda": 1.0, "length_penalty": 0.01}
LOSS = ((0,), (1.0,), tuple(PARAMETERS.get(name, 0.0) for name in _cuda.loss_parameters()), 0, False)


def place() -> tuple[int, int]:
    """The stream and the device that the kernels go to."""
    stream = torch.cuda.current_stream()
    return stream.cuda_stream, stream.device_index


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of a tensor of three dimensions."""
    return x.stride(0), x.stride(1), x.stride(2)


def named_pairs(pairs: Tensor, n_seqs: int, numbers: tuple[int | None, ...]) -> tuple[KernelPairs, list[Tensor]]:
    """Pairs with their entries sorted by sequence, and the tensors that must live as long."""
    entries, order = pairs.view(-1).sort(stable=True)
    offsets = torch.searchsorted(entries, torch.arange(n_seqs + 1, device=pairs.device))
    kernel = KernelPairs(pairs.data_ptr(), len(pairs), 0.0, None, numbers, order.data_ptr(), offsets.data_ptr())
    return kernel, [pairs, order, offsets]


def step(x: Tensor, targets: Tensor, softcap: float, inplace: bool, valid_vocab: int) -> Tensor:
    """One dpo_forward with all statistics and the backwards of it, the losses alone both ways; the gradient."""
    S, T, V = x.shape
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32

    def new(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    rows = KernelRows(
        *(LOGIT_TYPES.index(x.dtype), S, T, V, *strides(x), 1, (-100, 1.0, 1.0, softcap, valid_vocab)),
        *(x.data_ptr(), targets.data_ptr(), None, None, False),
    )
    seqs = KernelSequences(None, True, S, False)
    # of sequences that are in several pairs, in one, and in pairs of weight 0
    index = torch.tensor([[0, 1], [1, 0], [0, 1]], device=x.device)
    P = len(index)
    weights = torch.tensor([1, 0, 0.5], dtype=torch.float64, device=x.device)
    numbers = tuple(weights.data_ptr() if name != "margin" else None for name in _cuda.pair_numbers())
    pairs, _alive = named_pairs(index, S, numbers)
    n_bytes = _cuda.forward_scratch_bytes(rows)
    scratch = new(max(n_bytes, 8 * S), dtype=torch.uint8)
    logps, stats = new(S, T), new(S, T, 2)
    statistics = {
        name: new(S, T, dtype=torch.uint8 if name == "is_top1" else wide) for name in _cuda.token_statistics()
    }
    seq_logps, loss, per_pair = new(S), new(), new(3, P)
    pair_grads, seq_saved = new(P, 2, dtype=torch.float64), new(S, _cuda.SEQ_SAVED, dtype=torch.float64)
    losses = KernelLosses(loss.data_ptr(), *(t.data_ptr() for t in per_pair), pair_grads.data_ptr())
    found = tuple(t.data_ptr() for t in statistics.values())
    _cuda.dpo_forward(
        *(rows, seqs, pairs, LOSS, place(), scratch.data_ptr(), True, None, False, logps.data_ptr()),
        *(stats.data_ptr(), found, seq_logps.data_ptr(), losses, seq_saved.data_ptr()),
    )
    grad = x if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    one, each, tokens = torch.ones_like(loss), torch.ones_like(per_pair[0]), torch.ones_like(logps)
    saved = KernelSaved(
        *(t.data_ptr() for t in (logps, stats, statistics["entropy"], pair_grads, seq_saved)),
    )
    only_loss = KernelGrads(None, (), None, one.data_ptr(), None)
    differentiable = tuple(tokens.data_ptr() if name in ("entropy", "lse") else None for name in statistics)
    everything = KernelGrads(tokens.data_ptr(), differentiable, None, one.data_ptr(), each.data_ptr())
    for grads in [only_loss] if inplace else [everything, only_loss]:
        out = KernelOut(grad.data_ptr(), *strides(grad))
        _cuda.backward(rows, seqs, pairs, place(), scratch.data_ptr(), saved, grads, out)
    lengths, grad_seqs = torch.full((S,), T, dtype=torch.float64, device=x.device), new(S)
    is_wide = wide is torch.float64
    _cuda.preference_forward(
        *(pairs, LOSS, is_wide, True, S, place(), seq_logps.data_ptr(), None, False, lengths.data_ptr(), losses)
    )
    _cuda.preference_backward(
        *(pairs, is_wide, S, place(), pair_grads.data_ptr(), one.data_ptr(), each.data_ptr(), grad_seqs.data_ptr())
    )
    return grad


def main() -> None:
    torch.manual_seed(0)
    for dtype, (S, T, V), softcap in itertools.product(LOGIT_TYPES, SHAPES, (0.0, 20.0)):
        wide = torch.randn(S, T, V + 3, device=DEVICE).to(dtype)
        targets = torch.randint(0, V, (S, T), device=DEVICE)
        targets[0, 0] = -100
        for x, valid_vocab in ((wide[:, :, 1 : V + 1], 0), (wide[:, :, :V].contiguous(), 0), (wide.clone(), V)):
            for inplace in (False, True):
                grad = step(x, targets, softcap, inplace, valid_vocab)
                assert (grad[:, :, V:] == 0).all()
                # a gradient of a log-probability sums to 0 over the vocabulary
                if softcap == 0:
                    slack = 1e-4 if dtype.itemsize > 2 else 0.05
                    assert grad.double().sum(-1).abs().max() < slack, (dtype, S, T, V)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("small suite passed")


if __name__ == "__main__":
    main()

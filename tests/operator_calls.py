"""Calls of the operators torch.ops.dpo_fast.*, as the public functions make them."""

from __future__ import annotations

import torch
from helpers import random_pairs
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_fast
from dpo_fast._torch.operators import flatten


def call(operator, tensor, record):
    """The operator through torch's dispatcher, its results in one line."""
    return getattr(torch.ops.dpo_fast, operator.name)(tensor, *flatten(record))


class Recorder(TorchDispatchMode):
    """Keeps the calls of our operators: (name, arguments), tensors as they were before."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dpo_fast":
            copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((func._schema.name.split("::")[1], copies))
        return func(*args, **(kwargs or {}))


def recorded():
    """Calls of every operator, with every kind of argument among them."""
    torch.manual_seed(0)
    x, targets = torch.randn(4, 3, 7), torch.randint(0, 7, (4, 3))
    hidden, weight = torch.randn(4, 3, 8).requires_grad_(), torch.randn(7, 8, requires_grad=True)
    cu, weights = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32), torch.rand(4, 3)
    pairs, ref, some = random_pairs(4), torch.randn(4), torch.tensor([[1, 0, 1]] * 4)
    lora = (torch.randn(2, 8, requires_grad=True), torch.randn(7, 2, requires_grad=True), 0.5)
    every = ("logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "lse")
    pair_numbers = {"pair_weights": torch.rand(len(pairs)), "margin": torch.rand(len(pairs))}
    beta = torch.rand(len(pairs))
    with Recorder() as recorder:
        for inplace in (False, True):
            leaf = x.clone().requires_grad_()
            out = dpo_fast.token_logps(leaf * 1, targets, outputs=every, inplace_backward=inplace)
            (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()
            flat = {"cu_seqlens": cu, "token_weights": weights.flatten(), "average": True, "inplace_backward": inplace}
            dpo_fast.sequence_logps((leaf * 1).view(12, 7), targets.flatten(), **flat, softcap=3.0).sum().backward()
            options = {"pairs": pairs, "beta": beta, **pair_numbers, "wpo": True, "outputs": ("entropy", "lse")}
            out = dpo_fast.dpo_loss(leaf * 1, targets, ref, token_weights=weights, **options, inplace_backward=inplace)
            (out.loss + out.losses.sum() + out.logps.sum()).backward()
        dpo_fast.dpo_loss(x, targets, ref_logits=x, valid_vocab=7)
        dpo_fast.selective_log_softmax(leaf * 1, targets, row_mask=some).sum().backward()
        logps, desirable = ref.clone().requires_grad_(), torch.tensor([1, 0, 0, 1])
        out = dpo_fast.preference_loss(logps, loss_type="kto", baseline=torch.tensor(0.5), desirable=desirable)
        (out.loss + out.losses.sum()).backward()
        dpo_fast.preference_loss(ref, -ref, lengths=torch.ones(4), length_penalty=0.1)
        for compact in (True, False):
            out = dpo_fast.linear_token_logps(
                hidden, weight, targets, weight.sum(-1), lora=lora, outputs=every, memory_budget=1, compact=compact
            )
            (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()
        for reduction in ("mean", "none"):
            out = dpo_fast.linear_dpo_loss(
                hidden, weight, targets, ref, lora=lora, reduction=reduction, pairs=pairs, beta=beta, **pair_numbers
            )
            out.loss.sum().backward()
        dpo_fast.linear_dpo_loss(hidden, weight, targets, ref, outputs=("entropy",), z_loss_weight=0.1).loss.backward()
    return recorder.calls

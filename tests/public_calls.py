"""One table of small valid calls of the public torch functions, with every tensor argument given in some call.

Side arguments hold multiples of 1/8, exact in every floating-point type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import dpo_fast

S, T, V, H, RANK = 4, 3, 11, 6, 2
N = S * T


@dataclass(frozen=True)
class PublicCall:
    """A function's name, its tensors by argument (`lora_a` and `lora_b` go together as `lora`), the other arguments,
    which tensors get a gradient, and the fields of the result that it comes through."""

    name: str
    function: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    through: tuple[str, ...] = ()

    def run(self, replaced: Mapping[str, Any] | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """The tensors of the result, and the gradients in the order of `differentiable`."""
        given: dict[str, Any] = {}
        for name, tensor in self.tensors.items():
            given[name] = tensor.detach().clone().requires_grad_(name in self.differentiable)
        given |= replaced or {}
        arguments = dict(given)
        if "lora_a" in arguments:
            arguments["lora"] = arguments.pop("lora_a"), arguments.pop("lora_b"), 0.5
        out = getattr(dpo_fast, self.function)(**arguments, **self.options)
        parts = [getattr(out, name) for name in self.through] if self.through else [out]
        if self.differentiable:
            scalar = sum((part * weights_like(part)).sum() for part in parts)
            scalar.backward()
        found = [value for value in _pytree.tree_leaves(out) if isinstance(value, Tensor)]
        return [value.detach() for value in found], [given[name].grad for name in self.differentiable]


def weights_like(tensor: Tensor) -> Tensor:
    """Different factors for all elements, 1 for a single one."""
    return (torch.arange(tensor.numel(), dtype=tensor.dtype) / 4 + 1).view(tensor.shape)


def names_argument(error: BaseException, argument: str) -> bool:
    """Whether an error's text has the argument's name as a word."""
    name = "lora(_[ab])?" if argument.startswith("lora") else re.escape(argument)
    return re.search(rf"\b{name}\b", str(error)) is not None


def _table() -> list[PublicCall]:
    g = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    def eighths(*size: int) -> Tensor:
        return torch.randint(1, 16, size, generator=g) / 8

    targets = torch.randint(0, V, (S, T), generator=g)
    targets[0, 0] = targets[3, 2] = -100
    logits, ref_logits = randn(S, T, V), randn(S, T, V)
    index = torch.randint(0, V, (S, T, 2), generator=g)
    mask = torch.tensor([[[1, 0], [1, 1], [0, 0]]]).expand(S, T, 2).contiguous()
    cu_seqlens = torch.tensor([0, 2, 6, 9, N])
    pairs = torch.tensor([[1, 0], [3, 2], [1, 2]])
    ref_logps, weights = -8 * eighths(S), eighths(S, T)
    pair_weights, margin, beta = eighths(3), eighths(3), eighths(3)
    desirable = torch.tensor([True, False, False, True])
    baseline = torch.tensor(0.125)
    hidden, ref_hidden = randn(S, T, H), randn(S, T, H)
    head = {"weight": randn(V, H), "bias": randn(V)}
    lora = {"lora_a": randn(RANK, H), "lora_b": randn(V, RANK)}
    trained = ("hidden", "weight", "bias", "lora_a", "lora_b")

    from_logits = {"logits": logits, "targets": targets}
    packed = {"logits": logits.view(N, V), "targets": targets.view(N), "cu_seqlens": cu_seqlens}
    from_hidden = {"hidden": hidden, **head, **lora, "targets": targets}
    hidden_packed = {"hidden": hidden.view(N, H), **head, "targets": targets.view(N), "cu_seqlens": cu_seqlens}
    of_pairs = {"ref_logps": ref_logps, "pairs": pairs, "pair_weights": pair_weights}
    alone = {"ref_logps": ref_logps, "desirable": desirable, "baseline": baseline, "pair_weights": eighths(S)}
    kto = {"loss_type": "kto"}

    def call(name: str, function: str, tensors: dict[str, Tensor], *more: Any, **options: Any) -> PublicCall:
        return PublicCall(name, function, tensors, options, *more)

    x, logps = ("logits",), ("logps",)
    loss, both = ("loss",), ("loss", "logps")
    return [
        call("token_logps", "token_logps", from_logits, x, ("logps", "entropy"), outputs=("logps", "entropy")),
        call("token_logps_lse", "token_logps", from_logits, x, ("lse",), outputs=("logps", "lse", "is_top1")),
        call("selective", "selective_log_softmax", {"logits": logits, "index": targets.clamp(min=0), "row_mask": mask[..., 0].contiguous()}, x),
        call("selective_of_several", "selective_log_softmax", {"logits": logits, "index": index, "row_mask": mask}, x),
        call("sequence_logps", "sequence_logps", {**from_logits, "token_weights": weights.double()}, x),
        call("sequence_logps_packed", "sequence_logps", {**packed, "token_weights": weights.view(N)}, x, average=True),
        call("dpo_loss", "dpo_loss", {**from_logits, **of_pairs, "token_weights": weights.double()}, x, loss),
        call("dpo_loss_packed", "dpo_loss", {**packed, "pairs": pairs, "pair_weights": pair_weights, "token_weights": weights.view(N), "ref_logits": ref_logits.view(N, V)}, x, both),
        call("dpo_loss_margin", "dpo_loss", {**from_logits, **of_pairs, "margin": margin, "beta": beta}, x, loss),
        call("dpo_loss_kto", "dpo_loss", {**from_logits, **alone}, x, loss, **kto),
        call("dpo_loss_aot", "dpo_loss", {**from_logits, "ref_logps": ref_logps, "pairs": pairs}, x, loss, loss_type="aot", outputs=("entropy", "mean_logits", "is_top1")),
        call("dpo_loss_ld", "dpo_loss", {**packed, "ref_logps": ref_logps, "pairs": pairs[:2].contiguous(), "token_weights": weights.view(N)}, x, loss, ld_alpha=0.5, wpo=True),
        call("dpo_loss_inplace", "dpo_loss", {**from_logits, **of_pairs}, x, loss, loss_type=["sigmoid", "sft"], inplace_backward=True),
        call("preference_loss", "preference_loss", {"logps": -8 * eighths(S), **of_pairs, "lengths": torch.tensor([2, 4, 3, 1])}, logps, loss, loss_type="ipo"),
        call("preference_loss_margin", "preference_loss", {"logps": -8 * eighths(S), **of_pairs, "margin": margin, "beta": beta}, logps, loss),
        call("preference_loss_kto", "preference_loss", {"logps": -8 * eighths(S), **alone}, logps, loss, **kto),
        call("preference_loss_aot", "preference_loss", {"logps": -8 * eighths(S), "ref_logps": ref_logps, "pairs": pairs}, logps, loss, loss_type="aot"),
        call("linear_token_logps", "linear_token_logps", from_hidden, trained, ("logps", "entropy"), outputs=("logps", "entropy")),
        call("linear_sequence_logps", "linear_sequence_logps", {**from_hidden, "token_weights": weights.double()}, trained),
        call("linear_sequence_logps_packed", "linear_sequence_logps", {**hidden_packed, "token_weights": weights.view(N)}, trained[:3], average=True, compact=False),
        call("linear_dpo_loss", "linear_dpo_loss", {**from_hidden, **of_pairs, "token_weights": weights.double()}, trained, loss),
        call("linear_dpo_loss_ref", "linear_dpo_loss", {**hidden_packed, "pairs": pairs, "pair_weights": pair_weights, "ref_hidden": ref_hidden.view(N, H), "ref_weight": randn(V, H), "ref_bias": randn(V)}, trained[:3], both),
        call("linear_dpo_loss_whole", "linear_dpo_loss", {**from_hidden, **of_pairs, "token_weights": weights}, trained, loss, compact=False, outputs=("entropy",)),
        call("linear_dpo_loss_margin", "linear_dpo_loss", {"hidden": hidden, **head, "targets": targets, **of_pairs, "margin": margin, "beta": beta}, trained[:3], loss),
        call("linear_dpo_loss_kto", "linear_dpo_loss", {"hidden": hidden, **head, "targets": targets, **alone}, trained[:3], loss, **kto),
        call("ld_dpo_weights", "ld_dpo_weights", {"targets": targets, "pairs": pairs[:2].contiguous()}, ld_alpha=0.5),
        call("ld_dpo_weights_packed", "ld_dpo_weights", {"targets": targets.view(N), "cu_seqlens": cu_seqlens}, ld_alpha=0.5),
        call("completion_targets", "completion_targets", {"input_ids": targets.clamp(min=0), "completion_mask": (targets != -100).long()}),
    ]  # fmt: skip


CALLS = {call.name: call for call in _table()}

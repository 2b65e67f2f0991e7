"""TRL's trainers on these kernels.

TRL 1.16 computes every per-token log-prob of its trainers (DPO, SFT, KTO, GRPO, RLOO) in one function, which its fused
LM head looks up at call time in `trl.trainer.utils`: nine arguments in, five outputs. `use_dpo_fast` puts
`linear_token_logps` in its place; losses, weights, divergences, adapters and metrics stay TRL's own.

    with use_dpo_fast(trainer):
        trainer.train()

The function is private to TRL, so the versions that were tested are stated here and checked before anything changes.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dpo_fast._checks import IGNORE_NOTHING
from dpo_fast.linear import linear_token_logps

SUPPORTED_TRL = ("1.16.0",)

_ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbs:
    """Stands where TRL's autograd function of the chunked log-probs stood."""

    def __init__(self, memory_budget: int | None) -> None:
        self.memory_budget = memory_budget

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """log_probs, entropy, log_sum_sq_probs, mean_logits and is_top1, [N] each; None where not in `outputs`.

        chunk_size is TRL's own way of bounding memory; memory_budget takes its place.
        """
        del chunk_size
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            out = linear_token_logps(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                None if bias is None else bias.to(dtype),
                ignore_index=IGNORE_NOTHING,  # TRL has dropped its ignored rows
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=final_logit_softcapping,
                outputs=("logps", *(name for name in _OUTPUTS if name in outputs)),
                memory_budget=self.memory_budget,
            )
        return out.logps, out.entropy, out.log_sum_sq_probs, out.mean_logits, out.is_top1


def _scores_no_padding(device: torch.device) -> bool:
    """Tells TRL to hand over the rows that count and no others (it does so by itself only where Triton runs)."""
    return True


def check_trl(installed: bool = False) -> ModuleType:
    """The module that holds the seam; `installed`: it may already be in effect.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL is not one that was tested, or its function has other arguments.
    """
    try:
        import trl
        import trl.trainer.utils as utils
    except ImportError as error:
        raise ImportError("use_dpo_fast needs TRL: pip install trl==" + SUPPORTED_TRL[-1]) from error
    if trl.__version__ not in SUPPORTED_TRL:
        raise RuntimeError(
            f"use_dpo_fast was tested with TRL {', '.join(SUPPORTED_TRL)}, found {trl.__version__}: nothing was changed"
        )
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if isinstance(function, ChunkedLogProbs):
        if installed:
            return utils
        raise RuntimeError("use_dpo_fast is already in effect: restore it first")
    found = tuple(inspect.signature(function.forward).parameters)[1:] if function is not None else ()
    if found != _ARGUMENTS or not hasattr(utils, "_use_triton"):
        raise RuntimeError(f"TRL's chunked log-prob function takes {found}, not {_ARGUMENTS}: nothing was changed")
    return utils


class UseDpoFast:
    """What `use_dpo_fast` did, and how to undo it: `restore()`, or the end of a `with` block."""

    def __init__(self, memory_budget: int | None) -> None:
        self._utils: ModuleType | None = check_trl()
        self._before = (self._utils._ChunkedLogProbFunction, self._utils._use_triton)
        self.put(self._utils, ChunkedLogProbs(memory_budget))

    @staticmethod
    def put(utils: ModuleType, function: ChunkedLogProbs) -> None:
        """Puts a function in the place of TRL's own."""
        utils._ChunkedLogProbFunction = function  # type: ignore[attr-defined]
        utils._use_triton = _scores_no_padding  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Gives TRL its own function back. Once is enough; more does nothing."""
        if self._utils is not None:
            self._utils._ChunkedLogProbFunction, self._utils._use_triton = self._before  # type: ignore[attr-defined]
            self._utils = None

    def __enter__(self) -> UseDpoFast:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def use_dpo_fast(trainer: Any = None, *, memory_budget: int | None = None) -> UseDpoFast:
    """Makes TRL's trainers compute their per-token log-probs with dpo_fast.

    It holds for every trainer of the process until it is undone: `with use_dpo_fast(trainer): ...`, or
    `handle = use_dpo_fast(trainer)` and `handle.restore()`.

    Args:
        trainer: a TRL trainer; checked for being one whose model has TRL's fused LM head. None: no check.
        memory_budget: as for `linear_token_logps`.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a version of TRL that was not tested, or already in effect; nothing is changed then.
        TypeError: the trainer is not one of TRL's.
    """
    if trainer is not None and not any(c.__module__.startswith("trl.") for c in type(trainer).__mro__):
        raise TypeError(f"use_dpo_fast takes a trainer of TRL, found {type(trainer).__name__}")
    return UseDpoFast(memory_budget)

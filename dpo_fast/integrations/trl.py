"""TRL's trainers with their per-token log-probs computed by dpo_fast.

The trainers of TRL 1.16 (DPO, SFT, KTO, GRPO, RLOO) compute per-token log-probs in one function, which their fused LM
head looks up in `trl.trainer.utils` on each call. `use_dpo_fast` replaces that function by `linear_token_logps`.
Losses, weights, divergences, adapters and metrics stay TRL's own.

    with use_dpo_fast(trainer):
        trainer.train()

The function is private to TRL, so TRL's version and the function's arguments are checked before it is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpo_fast.linear import linear_plan, linear_token_logps

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


@contextmanager
def autocast_applied(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The head in autocast's type, with autocast off: it would convert the float32 products of the gradients too."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        yield hidden, weight, bias
        return
    dtype = torch.get_autocast_dtype(kind)
    head = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        yield head


class ChunkedLogProbs:
    """Has the interface of TRL's `ChunkedLogProbFunction`: `apply` with its nine arguments and five outputs."""

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

        chunk_size, TRL's own bound on memory, is not read: memory_budget is the bound. TRL has dropped its
        ignored rows, so no target is negative.
        """
        del chunk_size
        with autocast_applied(hidden, weight, bias) as head:
            hidden, weight, bias = head
            out = linear_token_logps(
                hidden,
                weight,
                targets,
                bias,
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=final_logit_softcapping,
                outputs=("logps", *(name for name in _OUTPUTS if name in outputs)),
                memory_budget=self.memory_budget,
            )
        return out.logps, out.entropy, out.log_sum_sq_probs, out.mean_logits, out.is_top1


def _scores_no_padding(device: torch.device) -> bool:
    """Replaces TRL's `_use_triton`: True makes TRL pass only the rows that count, on every device."""
    return True


def check_trl() -> ModuleType:
    """`trl.trainer.utils`, whose functions are replaced.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL was not tested, or its function has other arguments.
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
        return utils
    forward = getattr(function, "forward", None)
    found = tuple(inspect.signature(forward).parameters)[1:] if forward is not None else ()
    if found != _ARGUMENTS or not hasattr(utils, "_use_triton"):
        raise RuntimeError(f"TRL's chunked log-prob function takes {found}, not {_ARGUMENTS}: nothing was changed")
    return utils


class Replacement:
    """A function in place of TRL's, until `restore()` or the end of a `with` block.

    Replacements are counted. TRL calls the newest that was not restored, and its own function again when none is left;
    the order in which they are restored does not matter.
    """

    _active: ClassVar[list[Replacement]] = []  # oldest first
    _own: ClassVar[tuple[Any, Any]]  # TRL's own functions, kept while replacements are active

    def __init__(self, function: ChunkedLogProbs) -> None:
        utils = check_trl()
        # not only before the first replacement: a reload of TRL's module brings its own functions back
        if not isinstance(utils._ChunkedLogProbFunction, ChunkedLogProbs):
            Replacement._own = (utils._ChunkedLogProbFunction, utils._use_triton)
        self.function = function
        self._utils = utils
        self._active.append(self)
        self._set_newest()

    def _set_newest(self) -> None:
        """Gives TRL the newest active function, or its own."""
        function, use_triton = (self._active[-1].function, _scores_no_padding) if self._active else self._own
        self._utils._ChunkedLogProbFunction = function  # type: ignore[attr-defined]
        self._utils._use_triton = use_triton  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Ends this replacement. A second call does nothing."""
        if self in self._active:
            self._active.remove(self)
            self._set_newest()

    def __enter__(self) -> Replacement:
        if self not in self._active:
            raise RuntimeError("this replacement was restored: call use_dpo_fast again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def use_dpo_fast(trainer: Any = None, *, memory_budget: int | None = None) -> Replacement:
    """Makes TRL's trainers compute their per-token log-probs with dpo_fast.

    It holds for every trainer of the process until it is undone: `with use_dpo_fast(trainer): ...`, or
    `handle = use_dpo_fast(trainer)` and `handle.restore()`. Each call returns a new handle. TRL's own function is back
    when all of them are restored; until then the memory_budget of the newest holds. A call that raises changes nothing.

    With `precompute_ref_log_probs=True` TRL computes the reference while the trainer is made. Call `use_dpo_fast()`
    before that, or policy and reference are rounded differently.

    Args:
        trainer: a trainer of TRL, or None; only its class is checked.
        memory_budget: as for `linear_token_logps`.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL was not tested.
        TypeError: the trainer is not one of TRL's.
        ValueError: memory_budget is not positive.
    """
    if trainer is not None and not any(c.__module__.startswith("trl.") for c in type(trainer).__mro__):
        raise TypeError(f"use_dpo_fast takes a trainer of TRL, found {type(trainer).__name__}")
    linear_plan(0, 1, memory_budget=memory_budget)  # checks the budget
    return Replacement(ChunkedLogProbs(memory_budget))

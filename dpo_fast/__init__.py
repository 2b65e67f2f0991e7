"""Fused preference-tuning losses with native kernels.

The functions load on first use, so that `import dpo_fast.numpy` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_fast._native import get_num_threads, set_num_threads
    from dpo_fast.collate import completion_targets, in_batch_negatives, in_batch_pairs, packed_batch, padded_batch
    from dpo_fast.ld_dpo import ld_dpo_weights
    from dpo_fast.linear import linear_dpo_loss, linear_plan, linear_sequence_logps, linear_token_logps
    from dpo_fast.logps import selective_log_softmax, sequence_logps, token_logps
    from dpo_fast.losses import dpo_loss, preference_loss
    from dpo_fast.outputs import DPOOutput, TokenOutput
    from dpo_fast.packing import head_options, packed_hidden, shared_prompts
    from dpo_fast.sampler import PackedSampler, packed_lengths
    from dpo_fast.scoring import SequenceNumbers, reference_logps

__version__ = "0.1.0"

_MODULE_OF = {
    "DPOOutput": "outputs",
    "PackedSampler": "sampler",
    "SequenceNumbers": "scoring",
    "TokenOutput": "outputs",
    "completion_targets": "collate",
    "dpo_loss": "losses",
    "get_num_threads": "_native",
    "head_options": "packing",
    "in_batch_negatives": "collate",
    "in_batch_pairs": "collate",
    "ld_dpo_weights": "ld_dpo",
    "linear_dpo_loss": "linear",
    "linear_plan": "linear",
    "linear_sequence_logps": "linear",
    "linear_token_logps": "linear",
    "packed_batch": "collate",
    "packed_hidden": "packing",
    "packed_lengths": "sampler",
    "padded_batch": "collate",
    "preference_loss": "losses",
    "reference_logps": "scoring",
    "selective_log_softmax": "logps",
    "sequence_logps": "logps",
    "set_num_threads": "_native",
    "shared_prompts": "packing",
    "token_logps": "logps",
}

__all__ = [
    "DPOOutput",
    "PackedSampler",
    "SequenceNumbers",
    "TokenOutput",
    "completion_targets",
    "dpo_loss",
    "get_num_threads",
    "head_options",
    "in_batch_negatives",
    "in_batch_pairs",
    "ld_dpo_weights",
    "linear_dpo_loss",
    "linear_plan",
    "linear_sequence_logps",
    "linear_token_logps",
    "packed_batch",
    "packed_hidden",
    "packed_lengths",
    "padded_batch",
    "preference_loss",
    "reference_logps",
    "selective_log_softmax",
    "sequence_logps",
    "set_num_threads",
    "shared_prompts",
    "token_logps",
]


_MODULES = ("integrations", "numpy", "ops", "packing", "reference")


def __getattr__(name: str) -> Any:
    if name == "_cpu":
        try:
            return import_module("dpo_fast._cpu")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"dpo_fast's compiled kernels are not in {__path__[0]}: in the source tree, build them by "
                "`pip install -e .`; to use an installed copy, work in another folder"
            ) from error
    if name not in _MODULES and name not in _MODULE_OF:
        raise AttributeError(f"module 'dpo_fast' has no attribute {name!r}")
    try:
        module = import_module(f"dpo_fast.{_MODULE_OF.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"dpo_fast.{name} needs PyTorch, which is not installed: `pip install torch` (2.6 or later). "
            "dpo_fast.numpy works without it."
        ) from error
    if name in _MODULES:
        return module
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))])

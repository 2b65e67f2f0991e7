"""The operators `torch.ops.dpo_fast.*`; importing this module registers them. Their records: _torch/operators.py."""

from __future__ import annotations

from dpo_fast._torch import register  # noqa: F401
from dpo_fast._torch.operators import OPERATORS

SCHEMAS = {operator.name: operator.schema() for operator in OPERATORS}

__all__ = ["SCHEMAS"]

"""DeepSpeed ZeRO-3: parameters whose shards have to be gathered before they can be read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """A context in which those of the parameters that ZeRO-3 has partitioned are whole.

    ZeRO-3 leaves parameters empty outside the module that owns them; forward and a backward that recomputes each have
    to ask for them.
    """
    partitioned = {
        id(p): p for p in parameters if hasattr(p, "ds_status") and getattr(p.ds_status, "name", "") != "AVAILABLE"
    }
    if not partitioned:
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found]

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(partitioned.values()))
    return context

"""Hidden states, head and targets of a trained model on real completions: what `grad_tolerance` is made for."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MAX_LENGTH = 1024


class RealTokens(NamedTuple):
    """Rows that count, of the demo's model and data."""

    hidden: Tensor  # [N, 576]
    weight: Tensor  # [49152, 576]
    targets: Tensor  # [N]


@lru_cache(maxsize=1)
@torch.no_grad()
def real_tokens(n_rows: int) -> RealTokens:
    """The first n_rows completion tokens of the demo's pairs, in the file's order, in float32."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import language_model  # type: ignore[import-not-found]
    import preference_data  # type: ignore[import-not-found]

    model, tokenizer = language_model.load_model(*language_model.find_model(None), torch.device("cpu"))
    hidden, targets, found = [], [], 0
    for _, record in preference_data.read_preferences(EXAMPLES / "data" / "preferences.jsonl"):
        pair = preference_data.tokenize(tokenizer, record, MAX_LENGTH)
        if pair is None:
            continue
        for completion in (pair["chosen_ids"], pair["rejected_ids"]):
            ids = torch.tensor([[*pair["prompt_ids"], *completion]])
            states = model.base_model(ids, use_cache=False).last_hidden_state
            hidden.append(states[0, len(pair["prompt_ids"]) - 1 : -1])
            targets.append(torch.tensor(completion))
            found += len(completion)
        if found >= n_rows:
            break
    weight = model.get_output_embeddings().weight.detach()
    return RealTokens(torch.cat(hidden)[:n_rows].clone(), weight, torch.cat(targets)[:n_rows])

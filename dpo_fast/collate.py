"""From token ids to what the functions take."""

from __future__ import annotations

import torch
from torch import Tensor


def completion_targets(input_ids: Tensor, completion_mask: Tensor, ignore_index: int = -100) -> Tensor:
    """Targets aligned with the unshifted logits of the same input_ids.

    Row t of the logits predicts token t + 1, so targets[:, t] is input_ids[:, t + 1] where that token belongs to the
    completion, and ignore_index elsewhere (prompt, padding, and the last position, which predicts nothing). The model's
    logits can then be used as they are, without slicing.

    Args:
        input_ids: [S, T] integers.
        completion_mask: [S, T], nonzero where the token belongs to the completion.
        ignore_index: the mark for rows that do not count.

    Returns:
        [S, T], int64.

    Raises:
        ValueError: shapes that do not fit.
    """
    if input_ids.dim() != 2 or input_ids.shape != completion_mask.shape:
        raise ValueError(
            f"input_ids and completion_mask must have one shape [S, T], found {tuple(input_ids.shape)} and "
            f"{tuple(completion_mask.shape)}"
        )
    targets = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    targets[:, :-1] = input_ids[:, 1:].to(torch.int64).masked_fill(completion_mask[:, 1:] == 0, ignore_index)
    return targets

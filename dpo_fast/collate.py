"""From token ids to what the functions take: targets, padded and packed batches, pairs.

Examples are dictionaries of token ids, as TRL's tokenized preference data: "prompt_ids", "chosen_ids" and
"rejected_ids", the last a list of ids, or several such lists (one chosen completion against K rejected).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_fast._checks import integer
from dpo_fast._packing.dense import dense_mask
from dpo_fast._packing.layout import layout_of_spans
from dpo_fast._torch.checks import check_device, plain_tensors

Example = Mapping[str, Any]


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
        TypeError: arguments that are no plain tensors.
    """
    input_ids, completion_mask = plain_tensors(("input_ids", "completion_mask"), (input_ids, completion_mask))
    ignore_index = integer("ignore_index", ignore_index)
    check_device("completion_mask", completion_mask, input_ids, "input_ids")
    if input_ids.dim() != 2 or input_ids.shape != completion_mask.shape:
        raise ValueError(
            f"input_ids and completion_mask must have one shape [S, T], found {tuple(input_ids.shape)} and "
            f"{tuple(completion_mask.shape)}"
        )
    targets = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    targets[:, :-1] = input_ids[:, 1:].to(torch.int64).masked_fill(completion_mask[:, 1:] == 0, ignore_index)
    return targets


class _Sequence(NamedTuple):
    prompt: list[int]
    completion: list[int]


def _ids(ids: Any, where: str) -> list[int]:
    """Token ids, from a list, an array or a tensor, as a list of integers."""
    found: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if any(not isinstance(i, int) for i in found):
        raise TypeError(f"{where} must be token ids, found {found[:4]}...")
    return found


def _several(ids: Any, where: str) -> list[list[int]]:
    """One list of ids, or several, as several."""
    found = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if found and (isinstance(found[0], Sequence) or hasattr(found[0], "tolist")):
        return [_ids(one, where) for one in found]
    return [_ids(found, where)]


def _truncated(sequence: _Sequence, max_length: int | None, truncation: str, where: str) -> _Sequence:
    prompt, completion = sequence
    excess = 0 if max_length is None else len(prompt) + len(completion) - max_length
    if excess > 0:
        if truncation == "keep_start":
            completion = completion[: max(0, len(completion) - excess)]
        else:
            completion = completion[max(0, excess - len(prompt)) :]
            prompt = prompt[excess:]
    if not completion:
        raise ValueError(f"{where} has no completion token within max_length {max_length}")
    if not prompt:
        raise ValueError(
            f"{where} has no prompt token within max_length {max_length}: nothing predicts its first token"
        )
    return _Sequence(prompt, completion)


def _sequences(
    examples: Sequence[Example], max_length: int | None, truncation: str
) -> tuple[list[_Sequence], list[tuple[int, int]], list[int]]:
    """All sequences, the pairs among them, and the example that each sequence is from; chosen ones come first."""
    if truncation not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation must be 'keep_start' or 'keep_end', found {truncation!r}")
    chosen: list[_Sequence] = []
    rejected: list[_Sequence] = []
    pairs, owners = [], []
    for i, example in enumerate(examples):
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            if key not in example:
                raise ValueError(f"example {i} has no {key}, only {', '.join(map(str, example))}")
        prompt = _ids(example["prompt_ids"], f"prompt_ids of example {i}")
        if not prompt:
            raise ValueError(f"prompt_ids of example {i} is empty: nothing predicts the completions' first token")
        for key, into in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            where = f"{key} of example {i}"
            several = _several(example[key], where) if key == "rejected_ids" else [_ids(example[key], where)]
            for ids in several:
                into.append(_truncated(_Sequence(prompt, ids), max_length, truncation, where))
                if key == "rejected_ids":
                    pairs.append((i, len(examples) + len(rejected) - 1))
                    owners.append(i)
    if not pairs:
        raise ValueError("there are no pairs in these examples")
    return chosen + rejected, pairs, [*range(len(examples)), *owners]


def padded_batch(
    examples: Sequence[Example],
    pad_token_id: int,
    *,
    max_length: int | None = None,
    truncation: str = "keep_start",
    pad_to_multiple_of: int = 1,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Examples as one padded batch: all chosen completions, then all rejected ones, each after its prompt.

    Args:
        examples: see the top of this file.
        pad_token_id: fills up on the right.
        max_length: of prompt and completion together; longer ones lose their end ("keep_start") or their beginning
            ("keep_end").
        pad_to_multiple_of: the length is rounded up to it.
        ignore_index: the mark for rows that do not count.

    Returns:
        input_ids, attention_mask, completion_mask and targets (see `completion_targets`) [S, T], and pairs [P, 2];
        int64.

    Raises:
        ValueError: truncation leaves no token of a completion or of its prompt; no pairs.
    """
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, found {pad_to_multiple_of}")
    sequences, pairs, _ = _sequences(examples, max_length, truncation)
    length = max(len(s.prompt) + len(s.completion) for s in sequences)
    length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(sequences), length), pad_token_id, dtype=torch.int64)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "targets": completion_targets(input_ids, completion_mask, ignore_index),
        "pairs": torch.tensor(pairs),
    }


def packed_batch(
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    truncation: str = "keep_start",
    share_prompts: bool = False,
    mask: str = "dense",
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Examples as one row without padding; `packed_hidden` runs it through a model.

    Args:
        examples, max_length, truncation, ignore_index: as for `padded_batch`.
        share_prompts: a prompt stands once, before all its completions, instead of once for each; the last token of
            the prompt is repeated before each completion, because that row predicts the completion's first token.
        mask: "dense": with share_prompts also attention_mask [1, 1, N, N], bool (N * N bytes): row n may look at
            column m. "none": no mask is built; `packed_hidden` makes what the model needs from spans.

    Returns:
        input_ids, position_ids and targets [1, N], cu_seqlens [S + 1] (the bounds of the sequences' rows), spans
        [S, 3] and pairs [P, 2]; int64. A sequence looks at rows spans[s, 0] to spans[s, 1] (its prompt, end
        excluded) and at its own from spans[s, 2] to cu_seqlens[s + 1].

    Raises:
        ValueError: as `padded_batch`; an unknown mask; with share_prompts also when truncation cuts one prompt in
            different ways.
    """
    if mask not in ("dense", "none"):
        raise ValueError(f"mask must be 'dense' or 'none', found {mask!r}")
    sequences, pairs, owners = _sequences(examples, max_length, truncation)
    order = sorted(range(len(sequences)), key=lambda s: owners[s]) if share_prompts else list(range(len(sequences)))
    place = {s: i for i, s in enumerate(order)}
    input_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    bounds, spans = [0], []
    for i, s in enumerate(order):
        prompt, completion = sequences[s]
        first = not share_prompts or i == 0 or owners[order[i - 1]] != owners[s]
        if not first and sequences[order[i - 1]].prompt != prompt:
            raise ValueError(
                f"truncation cuts the prompt of example {owners[s]} in different ways: it cannot be shared"
            )
        if first:
            start = len(input_ids)
            input_ids += prompt[:-1]
            positions += range(len(prompt) - 1)
            targets += [ignore_index] * (len(prompt) - 1)
            shared = (start, len(input_ids))
        own = [prompt[-1], *completion]
        spans.append((*shared, len(input_ids)))
        positions += range(len(prompt) - 1, len(prompt) + len(completion))
        targets += [*completion, ignore_index]
        input_ids += own
        bounds.append(len(input_ids))
    batch = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]),
        "targets": torch.tensor([targets]),
        "cu_seqlens": torch.tensor(bounds),
        "spans": torch.tensor(spans),
        "pairs": torch.tensor([[place[c], place[d]] for c, d in pairs]),
    }
    if share_prompts and mask == "dense":
        layout = layout_of_spans(np.array(spans), np.array(bounds), np.array(positions))
        batch["attention_mask"] = dense_mask(layout, None, batch["spans"].device)
    return batch


def in_batch_pairs(prompts: Tensor, own: Tensor | None = None) -> Tensor:
    """Pairs for data without rejected answers: a prompt's own completions against the others that follow it.

    The others may be completions of other prompts (see `in_batch_negatives`) or other samples of the same prompt.

    Args:
        prompts: [S] integers; sequences with one number have one prompt.
        own: [S], nonzero for sequences whose completion is to be preferred; by default the first one of each prompt.

    Returns:
        [P, 2], int64: every own completion with every other one of its prompt, in the order of the sequences.

    Raises:
        ValueError: shapes that do not fit; no pairs.
    """
    if prompts.dim() != 1 or (own is not None and own.shape != prompts.shape):
        found = tuple(prompts.shape) if own is None else (tuple(prompts.shape), tuple(own.shape))
        raise ValueError(f"prompts and own must have shape [S], found {found}")
    same = prompts[:, None] == prompts[None, :]
    good = ~same.tril(-1).any(-1) if own is None else own != 0
    pairs = (same & good[:, None] & ~good[None, :]).nonzero()
    if not len(pairs):
        raise ValueError("there are no pairs: no prompt has both an own completion and another one")
    return pairs


def in_batch_negatives(
    examples: Sequence[Example], n_negatives: int = 1, generator: torch.Generator | None = None
) -> list[dict[str, Any]]:
    """Examples without rejected answers, each given completions of other examples as rejected ones.

    Args:
        examples: with "prompt_ids" and "chosen_ids".
        n_negatives: how many, drawn without repetition; never a completion that is a chosen one of the same prompt.
        generator: of the random draw.

    Returns:
        Examples with "rejected_ids", a list of n_negatives lists.

    Raises:
        ValueError: an example has too few others to draw from.
    """
    if n_negatives < 1:
        raise ValueError(f"n_negatives must be at least 1, found {n_negatives}")
    prompts, answers = [], []
    known: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for i, example in enumerate(examples):
        prompts.append(tuple(_ids(example["prompt_ids"], f"prompt_ids of example {i}")))
        answers.append(tuple(_ids(example["chosen_ids"], f"chosen_ids of example {i}")))
        known.setdefault(prompts[-1], set()).add(answers[-1])
    distinct = list(dict.fromkeys(answers))
    found = []
    for i, example in enumerate(examples):
        others = [ids for ids in distinct if ids not in known[prompts[i]]]
        if len(others) < n_negatives:
            raise ValueError(f"example {i} has {len(others)} completions of other prompts, {n_negatives} are wanted")
        drawn = torch.randperm(len(others), generator=generator)[:n_negatives].tolist()
        found.append({**example, "rejected_ids": [list(others[k]) for k in drawn]})
    return found

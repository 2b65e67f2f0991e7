"""Preference pairs for the demo: reading and checking them, token ids, and right-padded batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dpo_fast


class DemoError(Exception):
    """What the user can put right; its message is printed alone, without a traceback."""


@dataclass
class Pair:
    """One preference as token ids: a prompt with the chosen and with the rejected completion."""

    chosen: list[int]
    rejected: list[int]
    n_prompt: int


class Batch(NamedTuple):
    """Right-padded sequences, the chosen ones in the first half and the rejected ones in the second."""

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor


def check_messages(record: dict[str, Any], key: str) -> None:
    """Raises ValueError unless record[key] is a non-empty list of messages with role and content."""
    if key not in record:
        raise ValueError(f'the key "{key}" is missing')
    messages = record[key]
    if not isinstance(messages, list):
        raise ValueError(f'"{key}" must be a list of messages, found {type(messages).__name__}')
    if not messages:
        raise ValueError(f'"{key}" is empty')
    for number, message in enumerate(messages, 1):
        where = f'message {number} of "{key}"'
        if not isinstance(message, dict):
            raise ValueError(f'{where} must be an object with "role" and "content", found {type(message).__name__}')
        for name in ("role", "content"):
            if name not in message:
                raise ValueError(f'{where} has no "{name}"')
            if not isinstance(message[name], str):
                raise ValueError(f'"{name}" in {where} must be a string, found {type(message[name]).__name__}')
            try:
                message[name].encode()
            except UnicodeEncodeError:
                raise ValueError(f'"{name}" in {where} is not valid Unicode') from None


def check_record(record: Any) -> None:
    """Raises ValueError unless the record is a preference in TRL's conversational format."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, found {type(record).__name__}")
    for key in ("prompt", "chosen", "rejected"):
        check_messages(record, key)
    for key in ("chosen", "rejected"):
        if record[key][0]["role"] != "assistant":
            raise ValueError(f'"{key}" must begin with a message of the assistant, found "{record[key][0]["role"]}"')
        if not any(message["content"].strip() for message in record[key]):
            raise ValueError(f'the completion "{key}" is empty')


def read_preferences(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads a JSON Lines file of preferences, each with the number of its line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DemoError(f"{path}: the preference data cannot be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            check_record(record)
        except json.JSONDecodeError as error:
            raise DemoError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        except UnicodeDecodeError:
            raise DemoError(f"{path}, line {number}: not valid UTF-8") from None
        except RecursionError:
            raise DemoError(f"{path}, line {number}: JSON nested too deeply") from None
        except ValueError as error:
            raise DemoError(f"{path}, line {number}: {error}") from None
        records.append((number, record))
    if not records:
        raise DemoError(f"{path}: no preference pairs in this file")
    return records


def tokenize(tokenizer: Any, record: dict[str, Any], max_length: int) -> Pair | None:
    """Turns a preference into token ids, cut to max_length; None when a completion has no token left."""
    import jinja2

    def render(messages: list[dict[str, str]], opens_answer: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_answer)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages ({error})") from None

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    prompt_text = render(record["prompt"], opens_answer=True)
    prompt = encode(prompt_text)
    sequences = []
    for key in ("chosen", "rejected"):
        text = render(record["prompt"] + record[key])
        if not text.startswith(prompt_text):
            raise ValueError(f'the model\'s chat template changes the prompt when "{key}" follows')
        sequences.append((prompt + encode(text[len(prompt_text) :]))[:max_length])
    if any(len(sequence) <= len(prompt) for sequence in sequences):
        return None
    chosen, rejected = sequences
    return Pair(chosen, rejected, len(prompt))


def choose_pairs(
    path: Path,
    records: list[tuple[int, dict[str, Any]]],
    tokenizer: Any,
    n_wanted: int,
    max_length: int,
    rng: random.Random,
) -> tuple[list[Pair], int]:
    """Takes up to n_wanted usable pairs in random order; returns them and the number of pairs skipped on the way."""
    pairs: list[Pair] = []
    n_skipped = 0
    for number, record in rng.sample(records, len(records)):
        if len(pairs) == n_wanted:
            break
        try:
            pair = tokenize(tokenizer, record, max_length)
        except ValueError as error:
            raise DemoError(f"{path}, line {number}: {error}") from None
        if pair is None:
            n_skipped += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise DemoError(
            f"{path}: no completion has a token left within --max-length {max_length} in any of the {n_skipped} pairs, "
            "the prompts fill it; give a larger --max-length"
        )
    return pairs, n_skipped


def batches_of(n_pairs: int, batch_size: int, steps: int, rng: random.Random) -> list[list[int]]:
    """Draws the pairs' numbers for each step, through all pairs in a new order each epoch."""

    def endless() -> Iterator[int]:
        while True:
            yield from rng.sample(range(n_pairs), n_pairs)

    numbers = endless()
    return [[next(numbers) for _ in range(batch_size)] for _ in range(steps)]


def collate(pairs: list[Pair], pad_token_id: int, device: torch.device) -> Batch:
    """Pads a batch on the right and marks what the loss counts: the completions' tokens."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    shape = (len(sequences), max(map(len, sequences)))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.int64)
    for row, (sequence, pair) in enumerate(zip(sequences, pairs * 2, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
        completion_mask[row, pair.n_prompt : len(sequence)] = 1
    # the targets fit the logits as the model returns them: no logits[:, :-1], no shifted labels
    targets = dpo_fast.completion_targets(input_ids, completion_mask)
    return Batch(input_ids.to(device), attention_mask.to(device), targets.to(device))

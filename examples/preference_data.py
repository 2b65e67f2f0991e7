"""Preference pairs for the examples: reading and checking them, and their token ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Example = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids, as dpo_fast's batches take them


class DemoError(Exception):
    """What the user can put right; its message is printed alone, without a traceback."""


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


def tokenize(
    tokenizer: Any, record: dict[str, Any], max_length: int, max_prompt_length: int | None = None
) -> Example | None:
    """Turns a preference into token ids; None when a completion has no token left.

    Prompts lose their beginning beyond max_prompt_length; then prompt and completion together lose their end beyond
    max_length. Both completions keep one prompt, so that it can be shared.
    """
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
    prompt = prompt[-max_prompt_length:] if max_prompt_length else prompt
    completions = {}
    for key in ("chosen", "rejected"):
        text = render(record["prompt"] + record[key])
        if not text.startswith(prompt_text):
            raise ValueError(f'the model\'s chat template changes the prompt when "{key}" follows')
        completions[f"{key}_ids"] = encode(text[len(prompt_text) :])[: max(0, max_length - len(prompt))]
    return {"prompt_ids": prompt, **completions} if all(completions.values()) else None


def choose_pairs(
    path: Path,
    records: list[tuple[int, dict[str, Any]]],
    tokenizer: Any,
    n_wanted: int | None,
    max_length: int,
    rng: random.Random,
    max_prompt_length: int | None = None,
) -> tuple[list[Example], int]:
    """Takes up to n_wanted usable pairs in random order; returns them and the number of pairs skipped on the way."""
    examples: list[Example] = []
    n_skipped = 0
    for number, record in rng.sample(records, len(records)):
        if len(examples) == n_wanted:
            break
        try:
            example = tokenize(tokenizer, record, max_length, max_prompt_length)
        except ValueError as error:
            raise DemoError(f"{path}, line {number}: {error}") from None
        if example is None:
            n_skipped += 1
        else:
            examples.append(example)
    if not examples:
        raise DemoError(
            f"{path}: no completion has a token left within --max-length {max_length} in any of the {n_skipped} pairs, "
            "the prompts fill it; give a larger --max-length"
        )
    return examples, n_skipped

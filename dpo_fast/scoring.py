"""The reference model's log-probs of a whole data set, computed once: packed, with shared prompts, kept in a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_fast import _reference_file
from dpo_fast._checks import integer
from dpo_fast.collate import Example, _sequences, _several, packed_batch
from dpo_fast.linear import linear_sequence_logps
from dpo_fast.packing import head_options, packed_hidden
from dpo_fast.sampler import pack, packed_lengths


def reference_logps(
    model: Any,
    dataset: Sequence[Example],
    *,
    path: str | Path | None = None,
    token_budget: int = 8192,
    adapter_off: bool | Literal["auto"] = "auto",
    progress: bool = True,
    max_length: int | None = None,
    truncation: str = "keep_start",
) -> Tensor:
    """The reference's log-prob of every completion of a data set: the losses' `ref_logps`, for all batches.

    Runs the model as `packed_hidden` does, without gradients and in evaluation mode (restored afterwards), each prompt
    once. `refs[where(numbers)]`, with `where = SequenceNumbers(dataset)`, are those of the batch of these examples.

    Args:
        model: a transformers causal model that `packed_hidden` takes, in the state that is the reference.
        dataset: dictionaries with prompt_ids, chosen_ids and rejected_ids (one list of ids, or several), see
            `padded_batch`; anything with a length and whole numbers as indices.
        path: a safetensors file. Absent, it is written, whole or not at all; there, it is read if it is of this data,
            this model (its configuration and all bytes of its weights) and this autocast, else refused.
        token_budget: tokens of one forward pass; an example that is longer goes alone.
        adapter_off: True: score with the adapters (PEFT) disabled, so that a model trained by LoRA is its own
            reference; False: as it is; "auto": disabled where there are any.
        progress: show a bar on stderr (tqdm; without it, a line every 10%).
        max_length, truncation: as for the batches that will be trained on.

    Returns:
        [S], float32 (float64 for a float64 model), on the CPU, in the order of `padded_batch(dataset)`: all chosen
        completions, then all rejected ones, example by example.

    Raises:
        ValueError: the file is of something else (the message says what differs); adapter_off=True and there are no
            adapters; the examples' mistakes that `padded_batch` names; what `packed_hidden` refuses.
        FileNotFoundError: the folder of path does not exist.
        ImportError: path is given and safetensors is not installed.
    """
    if integer("token_budget", token_budget) < 1:
        raise ValueError(f"token_budget must be at least 1, found {token_budget}")
    disable = _adapters(model, adapter_off)
    sequences, _, _ = _sequences([dataset[i] for i in range(len(dataset))], max_length, truncation)
    file = None if path is None else Path(path)
    if file is not None:
        _reference_file.check_writable(file)
        identity = _reference_file.identity_of(model, sequences, adapters=disable is None and _has_adapters(model))
        if file.exists():
            return _reference_file.read(file, identity, len(sequences))
    with torch.no_grad(), _evaluating(model), disable or contextlib.nullcontext():
        logps = _scored(model, dataset, len(sequences), token_budget, progress, max_length, truncation)
    if file is not None:
        _reference_file.write(file, logps, identity)
    return logps


class SequenceNumbers:
    """Where the sequences of a data set's batches stand in `reference_logps(model, dataset)`.

    Args:
        dataset: as it was scored.
    """

    def __init__(self, dataset: Sequence[Example]) -> None:
        first = len(dataset)
        self._rejected: list[range] = []
        for i in range(len(dataset)):
            count = len(_several(dataset[i]["rejected_ids"], f"rejected_ids of example {i}"))
            self._rejected.append(range(first, first + count))
            first += count

    def __call__(self, numbers: Sequence[int], *, share_prompts: bool = False) -> Tensor:
        """Those of one batch.

        Args:
            numbers: the batch's examples.
            share_prompts: whether it is made by `packed_batch(..., share_prompts=True)`, whose sequences go example by
                example (chosen, its rejected ones); other batches have all chosen ones first.

        Returns:
            [S], int64.
        """
        if share_prompts:
            return torch.tensor([s for i in numbers for s in (i, *self._rejected[i])])
        return torch.tensor([*numbers, *(s for i in numbers for s in self._rejected[i])])


def _scored(
    model: Any,
    dataset: Sequence[Example],
    n_sequences: int,
    token_budget: int,
    progress: bool,
    max_length: int | None,
    truncation: str,
) -> Tensor:
    """The log-probs, batch by batch, the largest first: what does not fit into memory shows at once."""
    # cut at the start, one prompt becomes several
    share = max_length is None or truncation == "keep_start"
    lengths = packed_lengths(dataset, share_prompts=share, max_length=max_length)
    device = next(model.parameters()).device
    head = head_options(model)
    where = SequenceNumbers(dataset)
    found: Tensor | None = None
    with _progress(sum(lengths), progress) as advance:
        for numbers in pack(lengths, token_budget):
            examples = [dataset[i] for i in numbers]
            batch = packed_batch(
                examples, share_prompts=share, max_length=max_length, truncation=truncation, mask="none"
            )
            batch = {name: value.to(device) for name, value in batch.items()}
            hidden = packed_hidden(model, batch)
            logps = linear_sequence_logps(
                hidden, targets=batch["targets"], cu_seqlens=batch["cu_seqlens"], **head
            ).cpu()
            if found is None:
                found = logps.new_empty(n_sequences)
            found[where(numbers, share_prompts=share)] = logps
            advance(sum(lengths[i] for i in numbers))
    if found is None:
        raise ValueError("the data set is empty")
    return found


def _has_adapters(model: Any) -> bool:
    """Whether the model is PEFT's, or has adapters by transformers' own `add_adapter`."""
    return hasattr(model, "disable_adapter") or bool(getattr(model, "_hf_peft_config_loaded", False))


def _adapters(model: Any, off: bool | str) -> contextlib.AbstractContextManager[Any] | None:
    """Inside it the adapters are off; None: they stay as they are."""
    if off not in (True, False, "auto") or not isinstance(off, (bool, str)):
        raise ValueError(f'adapter_off must be True, False or "auto", found {off!r}')
    if off is True and not _has_adapters(model):
        raise ValueError("adapter_off is True, but this model has no adapters that could be disabled")
    if off is False or not _has_adapters(model):
        return None
    found: contextlib.AbstractContextManager[Any]
    found = model.disable_adapter() if hasattr(model, "disable_adapter") else _transformers_adapters_off(model)
    return found


@contextlib.contextmanager
def _transformers_adapters_off(model: Any) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode; afterwards each module has its own mode again (parts of a model may be frozen in theirs)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Any]:
    """A function that takes the tokens done since its last call."""
    if not wanted:
        yield lambda n: None
        return
    try:
        tqdm = import_module("tqdm").tqdm
    except ModuleNotFoundError:
        yield _Lines(total)
        return
    with tqdm(total=total, desc="Reference", unit="token", unit_scale=True) as bar:
        yield bar.update


class _Lines:
    """A line on stderr whenever another tenth is done."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, n: int) -> None:
        before, self.done = self.done, self.done + n
        if 10 * before // self.total < 10 * self.done // self.total:
            print(f"Reference: {self.done:,} of {self.total:,} tokens", file=sys.stderr, flush=True)

"""Fine-tunes a real language model by DPO in four ways that do the same, and compares what a whole step costs.

    python examples/demo.py                      the defaults: SmolLM2-135M-Instruct on the CPU, some minutes
    python examples/demo.py --data my.jsonl --model my_model_folder --output my_report

    naive            padded batches, logits, log_softmax and gather: DPO as people write it
    naive, sorted    the same on pairs sorted by length: less padding, but other pairs together in a step
    dpo_fast, head   padded batches; LM head, loss and gradient are one operation
    dpo_fast, packed no padding and each prompt once, the LM head on completions alone

All but the second see the same pairs in the same steps; each way has a copy of the model of its own, and they take
their steps in turn, so that a busy machine is busy for all. References are computed once, before. A step is forward,
backward and AdamW. The report (tables, report.png and report.json) says what they cost in time, tokens and memory.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from language_model import (
    HelpFormatter,
    add_common_arguments,
    autocast,
    check_inputs,
    load_model,
    model_name,
    positive,
    reporter,
)
from preference_data import DemoError, Example, choose_pairs
from torch import Tensor

import dpo_fast
from dpo_fast.sampler import pack

NEEDED_PACKAGES = ("transformers", "jinja2", "matplotlib", "psutil", "tqdm")
IGNORE_INDEX = -100  # what dpo_fast.padded_batch marks prompt and padding with
TOLERANCE = 1e-3
SAMPLING_INTERVAL_S = 0.002


# --- The ways ---------------------------------------------------------------------------------------------------------


def naive_loss(logits: Tensor, targets: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Computes the DPO loss as people write it: several [S, T, V] tensors for a handful of numbers."""
    counted = targets != IGNORE_INDEX
    log_probs = F.log_softmax(logits.float(), dim=-1)
    token_logps = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logps = (token_logps * counted).sum(-1)
    chosen, rejected = (beta * (logps - ref_logps)).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


@dataclass
class Task:
    """The pairs, their references and how they are run."""

    examples: list[Example]
    refs: Tensor  # [S], chosen first
    args: argparse.Namespace
    device: torch.device

    def __post_init__(self) -> None:
        self.where = dpo_fast.SequenceNumbers(self.examples)

    def padded(self, numbers: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """A padded batch and its references."""
        batch = dpo_fast.padded_batch([self.examples[i] for i in numbers], pad_token_id=0)  # any id: it is masked
        return self._placed(batch), self.refs[self.where(numbers)].to(self.device)

    def packed(self, numbers: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """A packed batch with shared prompts and its references."""
        batch = dpo_fast.packed_batch([self.examples[i] for i in numbers], share_prompts=True, mask="none")
        return self._placed(batch), self.refs[self.where(numbers, share_prompts=True)].to(self.device)

    def _placed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def parts(self, numbers: list[int]) -> list[list[int]]:
        """The packed batches of a step: as many pairs at a time as the token budget allows."""
        lengths = dpo_fast.packed_lengths([self.examples[i] for i in numbers])
        return [[numbers[k] for k in part] for part in pack(lengths, self.args.token_budget)]


# Each way adds the gradient of a step's pairs and returns their loss and the tokens that the model was run on.
Way = Callable[[Any, Task, list[int]], tuple[Tensor, int]]


def naive(model: Any, task: Task, numbers: list[int]) -> tuple[Tensor, int]:
    batch, refs = task.padded(numbers)
    with autocast(task.device, task.args.dtype):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = naive_loss(logits, batch["targets"], refs, task.args.beta)
    del logits
    loss.backward()
    return loss.detach(), batch["input_ids"].numel()


def fused_head(model: Any, task: Task, numbers: list[int]) -> tuple[Tensor, int]:
    batch, refs = task.padded(numbers)
    with autocast(task.device, task.args.dtype):
        hidden = model.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        loss = dpo_fast.linear_dpo_loss(
            hidden, targets=batch["targets"], ref_logps=refs, beta=task.args.beta, **dpo_fast.head_options(model)
        ).loss
    loss.backward()
    return loss.detach(), batch["input_ids"].numel()


def packed(model: Any, task: Task, numbers: list[int]) -> tuple[Tensor, int]:
    losses, tokens = [], 0
    for part in task.parts(numbers):
        batch, refs = task.packed(part)
        with autocast(task.device, task.args.dtype):
            loss = dpo_fast.linear_dpo_loss(
                dpo_fast.packed_hidden(model, batch),
                targets=batch["targets"],
                ref_logps=refs,
                pairs=batch["pairs"],
                cu_seqlens=batch["cu_seqlens"],
                num_pairs=len(numbers),
                beta=task.args.beta,
                **dpo_fast.head_options(model),
            ).loss
        loss.backward()
        losses.append(loss.detach())
        tokens += batch["input_ids"].numel()
    return torch.stack(losses).sum(), tokens


WAYS: dict[str, Way] = {
    "naive": naive,
    "naive, sorted": naive,
    "dpo_fast, head": fused_head,
    "dpo_fast, packed": packed,
}
SORTED = "naive, sorted"


# --- Measuring --------------------------------------------------------------------------------------------------------


class StepProbe:
    """Measures what is done inside `with`: its time, also the processor's, and by how much memory grew at its highest.

    On a CPU memory is the process's resident set, sampled by a thread; on CUDA, torch's own count.
    """

    def __init__(self, device: torch.device) -> None:
        import psutil

        self.device = device
        self.process = psutil.Process()

    def __enter__(self) -> StepProbe:
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.bytes_before = torch.cuda.memory_allocated(self.device)
        else:
            # malloc keeps what was freed and hands it out again unseen: return it first, or later steps look free
            return_freed_memory()
            self.bytes_before = self.highest = self.process.memory_info().rss
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        self.cpu_before, self.started = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.started
        self.cpu_seconds = time.process_time() - self.cpu_before
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)
        else:
            self.stop.set()
            self.thread.join()
        self.peak_bytes = self.highest - self.bytes_before

    def _sample(self) -> None:
        stopped = False
        while not stopped:
            stopped = self.stop.wait(SAMPLING_INTERVAL_S)
            self.highest = max(self.highest, self.process.memory_info().rss)


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library can do that (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that the clock sees its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Column:
    """One way, with its own model, and what its steps cost."""

    way: Way
    model: Any
    steps: list[list[int]]
    optimizer: Any = None
    loss: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)

    def warm_up(self, task: Task) -> None:
        """Goes once through the shortest step without changing a weight, so that no timed step pays for first uses."""
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        numbers = min(self.steps, key=lambda step: max(length_of(task.examples[i]) for i in step))
        self.way(self.model, task, numbers)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for state in self.optimizer.state.values():  # as if it had taken no step
            for value in state.values():
                value.zero_()
        self.optimizer.param_groups[0]["lr"] = task.args.lr

    def step(self, number: int, task: Task) -> None:
        """One whole step."""
        with StepProbe(task.device) as probe:
            loss, tokens = self.way(self.model, task, self.steps[number])
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.loss.append(loss.item())
        self.step_s.append(probe.seconds)
        self.cpu_s.append(probe.cpu_seconds)
        self.tokens.append(tokens)
        self.peak_mb.append(probe.peak_bytes / 1e6)

    def measured(self) -> dict[str, list[float]]:
        return {name: getattr(self, name) for name in ("loss", "step_s", "cpu_s", "tokens", "peak_mb")}


def length_of(example: Example) -> int:
    """Tokens of the longer sequence."""
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def steps_of(name: str, task: Task, n_steps: int) -> list[list[int]]:
    """The pairs of each step: in the order of the examples, or sorted by length with the steps in random order."""
    size, numbers = task.args.batch_size, list(range(len(task.examples)))
    if name == SORTED:
        numbers.sort(key=lambda i: length_of(task.examples[i]))
    steps = [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return random.Random(task.args.seed).sample(steps, n_steps) if name == SORTED else steps[:n_steps]


def token_counts(task: Task) -> dict[str, int]:
    """What all pairs of the data need, in each layout."""
    steps = {name: steps_of(name, task, -(-len(task.examples) // task.args.batch_size)) for name in ("naive", SORTED)}
    padded = {
        name: sum(2 * len(step) * max(length_of(task.examples[i]) for i in step) for step in found)
        for name, found in steps.items()
    }
    return {
        "padded": padded["naive"],
        "padded, sorted": padded[SORTED],
        "packed": sum(dpo_fast.packed_lengths(task.examples, share_prompts=False)),
        "shared prompts": sum(dpo_fast.packed_lengths(task.examples)),
        "completions": sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in task.examples),
    }


@torch.no_grad()
def difference(column: Column, naive: Column, initial: dict[str, Tensor]) -> dict[str, float]:
    """How far the weights are from the naive way's: at most, and in norm, relative to what training changed."""
    largest, apart, moved = 0.0, 0.0, 0.0
    others = dict(naive.model.named_parameters())
    for name, p in column.model.named_parameters():
        delta = p - others[name]
        largest = max(largest, delta.abs().max().item())
        apart += delta.double().square().sum().item()
        moved += (others[name] - initial[name]).double().square().sum().item()
    return {"largest": largest, "relative_to_update": (apart / max(moved, 1e-300)) ** 0.5}


# --- The program ------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="DPO on a real language model: plain torch and dpo_fast, the same steps, compared.",
        formatter_class=HelpFormatter,
    )
    add_common_arguments(parser)
    parser.add_argument("--steps", type=positive(int), default=12, help="optimizer steps of each way")
    parser.add_argument("--batch-size", type=positive(int), default=4, help="pairs per step")
    parser.add_argument(
        "--token-budget", type=positive(int), default=1024, help="tokens of one forward pass of the packed way"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="which to run; naive always is"
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for report.png and report.json")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    args.ways = [name for name in WAYS if name in args.ways or name == "naive"]
    return args


def measure(columns: dict[str, Column], task: Task, n_steps: int) -> None:
    """All steps of all columns, in turn; who begins changes from step to step."""
    from tqdm import tqdm

    names = list(columns)
    for name in tqdm(names, desc="Warm-up", unit="way"):
        columns[name].warm_up(task)
    with tqdm(total=n_steps * len(names), desc="Training", unit="step") as progress:
        for number in range(n_steps):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                columns[name].step(number, task)
                progress.update()
                progress.set_postfix(way=name, loss=f"{columns[name].loss[-1]:.4f}")


def run(args: argparse.Namespace) -> int:
    """Loads, trains in every way, compares and reports; returns the exit status."""
    say = reporter()
    folder, gguf_file, records, device = check_inputs(args, NEEDED_PACKAGES)
    import demo_report

    name = model_name(folder, gguf_file)
    hardware = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
    say(f"Loading {name}, to run in {str(args.dtype).removeprefix('torch.')} on {hardware}")
    model, tokenizer = load_model(folder, gguf_file, device)
    longest = getattr(model.config, "max_position_embeddings", args.max_length)
    if args.max_length > longest:
        raise DemoError(f"--max-length {args.max_length}: this model takes {longest} tokens at most")
    examples, n_skipped = choose_pairs(
        args.data, records, tokenizer, None, args.max_length, random.Random(args.seed), args.max_prompt_length
    )
    say(f"{len(examples)} pairs from {args.data.name}, cut to {args.max_length} tokens")
    if n_skipped:
        say(f"Pairs skipped, no token of a completion being left within --max-length {args.max_length}: {n_skipped}")

    n_steps = min(args.steps, -(-len(examples) // args.batch_size))
    task = Task(examples, torch.zeros(2 * len(examples)), args, device)
    columns = {way: Column(WAYS[way], None, steps_of(way, task, n_steps)) for way in args.ways}
    say("Reference: the log-prob of every completion under the untrained model, once")
    used = sorted({i for column in columns.values() for step in column.steps for i in step})
    with autocast(device, args.dtype):
        refs = dpo_fast.reference_logps(model, [examples[i] for i in used], token_budget=args.token_budget)
    task.refs[task.where(used)] = refs.to(task.refs.dtype)

    initial = {key: p.detach().clone() for key, p in model.named_parameters()}
    for column in columns.values():
        column.model = copy.deepcopy(model)
    del model
    say(f"Training in {len(columns)} ways: {n_steps} steps of {args.batch_size} pairs, in turn")
    measure(columns, task, n_steps)

    say("Report")
    report = demo_report.make_report(
        settings={
            "model": name,
            "data": args.data.name,
            "pairs": len(examples),
            "pairs_skipped": n_skipped,
            "steps": n_steps,
            "batch_size": args.batch_size,
            "max_length": args.max_length,
            "max_prompt_length": args.max_prompt_length,
            "token_budget": args.token_budget,
            "dtype": str(args.dtype).removeprefix("torch."),
            "device": str(device),
            "hardware": hardware,
            "beta": args.beta,
            "lr": args.lr,
            "seed": args.seed,
            "torch": torch.__version__,
            "dpo_fast": dpo_fast.__version__,
        },
        columns={way: column.measured() for way, column in columns.items()},
        weights={
            way: difference(column, columns["naive"], initial)
            for way, column in columns.items()
            if way not in ("naive", SORTED)
        },
        token_counts=token_counts(task),
        tolerance=TOLERANCE,
    )
    demo_report.print_tables(report)
    demo_report.write_report(report, args.output)
    say(f"Wrote {args.output / 'report.png'} and {args.output / 'report.json'}")
    if not report["agree"] and args.dtype == torch.float32:
        print(f"FAILED: losses or weights differ by more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Runs the demo; a mistake in the input ends it with one sentence and status 2."""
    args = parse_args()
    try:
        return run(args)
    except DemoError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

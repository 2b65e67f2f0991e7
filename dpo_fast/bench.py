"""`dpo-fast bench`: this machine's speed, dpo_fast beside plain torch, torch.compile and a plain read of the logits.

The suite in benchmarks/ stands on the pieces here: random logits, the naive expressions, the clock, the round-robin.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dpo_fast
from dpo_fast import _cpu, _native

# Vocabularies are those of real models.
MODELS = {"SmolLM2": 49152, "Llama-2": 32000, "Llama-3": 128256, "Qwen2.5": 151936, "Gemma": 262144}
IGNORE_INDEX = -100
BETA = 0.1
SPREAD = 3.0  # standard deviation of the logits, about a language model's

# The caches are passed over by using copies of the logits in turn, of this many bytes together.
ROTATED_BYTES = 256 << 20


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Logits [n_seqs, length, vocab] of a named model, and the share of their rows that is ignored."""

    model: str
    dtype: str
    n_seqs: int
    length: int
    ignored: float = 0.0
    device: str = "cpu"
    vocab: int = 0  # 0: the model's
    hidden: int = 0  # width of the hidden states, for the linear head

    @property
    def V(self) -> int:  # noqa: N802
        """The vocabulary's size."""
        return self.vocab or MODELS[self.model]

    @property
    def rows(self) -> int:
        """Tokens, counted or not."""
        return self.n_seqs * self.length

    @property
    def kept(self) -> int:
        """Tokens that count."""
        return self.n_seqs * kept_length(self.length, self.ignored)

    @property
    def itemsize(self) -> int:
        """Bytes of a logit."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def name(self) -> str:
        """What the case is called in test ids and results."""
        width = f"-H{self.hidden}" if self.hidden else ""
        return (
            f"{self.model}-{self.rows}x{self.V}{width}-{self.dtype}-{round(100 * self.ignored)}%ignored-{self.device}"
        )


class Inputs(NamedTuple):
    """What a loss is computed from."""

    logits: Tensor  # [S, T, V]
    targets: Tensor  # [S, T]
    ref_logps: Tensor  # [S]


def kept_length(length: int, ignored: float) -> int:
    """The tokens of a sequence that count."""
    return length - round(length * ignored)


def make_targets(case: Case, generator: torch.Generator, ignored: float | None = None) -> Tensor:
    """Random targets [S, T], ignored where a prompt (two thirds of the ignored) and padding (the rest) would stand."""
    targets = torch.randint(0, case.V, (case.n_seqs, case.length), generator=generator)
    kept = kept_length(case.length, case.ignored if ignored is None else ignored)
    prompt = (case.length - kept) * 2 // 3
    targets[:, :prompt] = IGNORE_INDEX
    targets[:, prompt + kept :] = IGNORE_INDEX
    return targets.to(case.device)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Fresh random logits of a realistic spread; the reference's log-probs lie some nats around the policy's."""
    generator = torch.Generator().manual_seed(seed)
    targets = make_targets(case, generator)
    on_device = torch.Generator(case.device).manual_seed(seed)
    logits = torch.empty(case.n_seqs, case.length, case.V, dtype=case.torch_dtype, device=case.device)
    ref_logps = torch.empty(case.n_seqs, device=case.device)
    for s in range(case.n_seqs):  # a sequence at a time: the float32 noise of all would need memory of its own
        logits[s] = SPREAD * torch.randn(logits[s].shape, generator=on_device, device=case.device)
        ref_logps[s] = naive_token_logps(logits[s : s + 1], targets[s : s + 1]).sum()
    return Inputs(logits, targets, ref_logps + 5 * torch.randn(case.n_seqs, generator=generator).to(case.device))


# --- plain torch ------------------------------------------------------------------------------------------------------


def naive_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [S, T] as people write them: several [S, T, V] tensors on the way."""
    logps = F.log_softmax(logits.float(), dim=-1)
    logps = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (targets != IGNORE_INDEX)


def naive_sequence_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [S] of whole sequences."""
    return naive_token_logps(logits, targets).sum(-1)


def preference_of(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """The DPO loss of log-probs [S] in plain torch; the first half of the sequences is chosen."""
    chosen, rejected = (logps if ref_logps is None else logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def naive_dpo_loss(logits: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
    """The DPO loss in plain torch."""
    return preference_of(naive_sequence_logps(logits, targets), ref_logps)


def plain_read(x: Tensor) -> Tensor:
    """Reads every byte once: torch's sum over them as float32, whatever their type."""
    return x.view(torch.float32).sum()


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for one shape, without what earlier shapes left behind."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def forward_and_gradient(
    loss: Callable[..., Tensor], leaves: Sequence[Tensor], grad_output: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss of the leaves and its gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = loss(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad_output)


# --- measuring --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of one call: the processor's clock on the CPU, events in the stream on CUDA."""

    def __init__(self, device: str, wall: bool = False) -> None:
        self.cuda = device.startswith("cuda")
        self.wall = wall or not self.cuda

    def time(self, call: Callable[[], Any]) -> float:
        """Calls once. What the call returns is freed after the clock has stopped."""
        if self.wall:
            self.synchronize()
            start = time.perf_counter()
            result = call()
            self.synchronize()
            seconds = time.perf_counter() - start
        else:
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # the device waits a millisecond while the host runs ahead: launches are not what is measured
            torch.cuda._sleep(2_000_000)
            start_event.record()
            result = call()
            end_event.record()
            self.synchronize()
            seconds = start_event.elapsed_time(end_event) / 1e3
        del result
        return seconds

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()


class Pool:
    """Copies of a tensor, used in turn and refilled after use, so that no call finds its input in a cache."""

    def __init__(self, original: Tensor, rotated_bytes: int = ROTATED_BYTES) -> None:
        copies = min(64, max(2, -(-rotated_bytes // max(original.nbytes, 1))))
        self.original = original
        self.copies = [original.clone() for _ in range(copies)]
        self.next = 0
        self.used: Tensor | None = None

    def take(self) -> Tensor:
        """Refills the copy that was used last (always: what that leaves in the caches is then alike for all calls)."""
        if self.used is not None:
            self.used.copy_(self.original)
        self.used = self.copies[self.next].detach()
        self.next = (self.next + 1) % len(self.copies)
        return self.used


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """So many threads for torch and dpo_fast; None: as many as there are."""
    if threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Candidate:
    """Something to time: a call that takes a copy of the input."""

    name: str
    call: Callable[[Tensor], Any]
    threads: int | None = None
    repeat: int = 1  # calls per measurement, for calls of microseconds


def time_once(candidate: Candidate, pool: Pool, clock: Clock) -> float:
    """Seconds of one call on the pool's next copy."""
    with torch_threads(candidate.threads):
        x = pool.take()  # also starts the threads, where their number has changed

        def calls() -> Any:
            for _ in range(candidate.repeat - 1):
                candidate.call(x)
            return candidate.call(x)

        return clock.time(calls) / candidate.repeat


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps the collector out of the measurements."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    candidates: Sequence[Candidate], pool: Pool, clock: Clock, rounds: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Times every candidate once a round, in any order: what disturbs the machine disturbs all of them alike."""
    samples: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    order = random.Random(1)
    with no_garbage_collection():
        for _ in range(rounds):
            for candidate in order.sample(candidates, len(candidates)):
                samples[candidate.name].append(time_once(candidate, pool, clock))
                tick()
    return samples


# --- the machine ------------------------------------------------------------------------------------------------------


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; a package that is missing is said to be."""
    import importlib.metadata

    found = {"dpo_fast": dpo_fast.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    found = {
        "processor": processor_name(),
        "processors usable": str(_native.usable_processors()),
        "threads": str(torch.get_num_threads()),
        "instruction set": _cpu.isa(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    if device.startswith("cuda"):
        found["GPU"] = torch.cuda.get_device_name()
        found["CUDA"] = str(torch.version.cuda)
    return found


# --- the quick benchmark ----------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the quick benchmark's table; times are medians in ms, None where a candidate was left out."""

    logits: str
    work: str
    read_ms: float
    naive_ms: float
    compile_ms: float | None
    dpo_fast_ms: float


class Progress:
    """A bar where tqdm is installed, else a line for each step."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        if importlib.util.find_spec("tqdm") is not None:
            self.bar = importlib.import_module("tqdm").tqdm(total=total, unit="call", file=sys.stderr)

    def say(self, text: str) -> None:
        """Names what comes next."""
        if self.bar is not None:
            self.bar.set_description(text)
        else:
            print(f"{text} ...", file=sys.stderr, flush=True)

    def tick(self, calls: int = 1) -> None:
        """Some calls were timed."""
        if self.bar is not None:
            self.bar.update(calls)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


WORKS = ("forward", "forward + backward")


def quick_cases(device: str) -> list[Case]:
    """Small enough for a minute on two cores, large enough to leave the caches."""
    length = 128 if device == "cpu" else 2048
    return [Case("SmolLM2", dtype, 4, length, device=device) for dtype in ("float32", "bfloat16")]


def quick_candidates(inputs: Inputs, work: str, compile_: bool) -> list[Candidate]:
    """The plain read, naive torch, torch.compile of it, and dpo_fast with its gradient in place."""
    _, targets, ref = inputs
    backward = work == WORKS[1]

    def candidate(name: str, loss: Callable[[Tensor], Tensor]) -> Candidate:
        def call(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            if backward:
                return forward_and_gradient(loss, [x])
            with torch.no_grad():
                return loss(x), ()

        return Candidate(name, call)

    def fast(x: Tensor) -> Tensor:
        loss: Tensor = dpo_fast.dpo_loss(x, targets, ref, beta=BETA, inplace_backward=backward).loss
        return loss

    found = [
        Candidate("plain read", plain_read),
        candidate("naive torch", lambda x: naive_dpo_loss(x, targets, ref)),
        candidate("dpo_fast", fast),
    ]
    if compile_:
        function = compiled(naive_dpo_loss)
        found.append(candidate("torch.compile", lambda x: function(x, targets, ref)))
    return found


def check_agreement(candidates: Sequence[Candidate], pool: Pool, tolerance: float) -> None:
    """Every loss and gradient against naive torch's.

    Raises:
        RuntimeError: one differs by more than the tolerance.
    """
    checked = [candidate for candidate in candidates if candidate.name != "plain read"]
    naive = next(candidate for candidate in checked if candidate.name == "naive torch").call(pool.take())
    for candidate in checked:
        loss, grads = candidate.call(pool.take())
        for found, expected in ((loss, naive[0]), *zip(grads, naive[1], strict=True)):
            difference = relative_difference(found, expected)
            if not difference <= tolerance:
                raise RuntimeError(f"{candidate.name} differs from naive torch by {difference:.1e}: nothing was timed")


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Euclidean norms over everything."""
    norm = 0.0
    difference = 0.0
    # a slice at a time: no copy of all in float64
    for a, b in zip(found.reshape(-1).split(1 << 22), expected.reshape(-1).split(1 << 22), strict=True):
        wide = b.double()
        norm += float(wide.square().sum())
        difference += float((a.double() - wide).square().sum())
    return float((difference / norm) ** 0.5) if norm else float(difference != 0)


def quick(
    cases: Sequence[Case], *, compile_: bool = True, rounds: int = 9, compile_before_s: float = 30.0
) -> tuple[list[Row], list[str]]:
    """Times the cases; a row for each case and each work, and remarks on what was left out.

    compile_before_s: once this many seconds have passed, torch.compile is left out, so that the whole ends in a minute.

    Raises:
        RuntimeError: two candidates disagree.
    """
    started = time.perf_counter()
    rows, remarks = [], []
    progress = Progress(len(cases) * len(WORKS) * rounds * (4 if compile_ else 3))
    try:
        for case in cases:
            inputs = make_inputs(case)
            pool, clock = Pool(inputs.logits), Clock(case.device)
            for work in WORKS:
                with_compile = compile_ and time.perf_counter() - started < compile_before_s
                if compile_ and not with_compile:
                    remarks.append(f"{case.dtype}, {work}: torch.compile left out, the minute would not have sufficed")
                    progress.tick(rounds)
                progress.say(f"{case.dtype}, {work}")
                tolerance = 1e-4 if case.itemsize >= 4 else 0.02
                candidates = quick_candidates(inputs, work, with_compile)
                try:
                    check_agreement(candidates, pool, tolerance)
                except Exception as error:
                    if not with_compile or str(error).startswith("dpo_fast"):
                        raise
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    remarks.append(f"{case.dtype}, {work}: torch.compile failed ({reason})")
                    progress.tick(rounds)
                    candidates = candidates[:3]
                    check_agreement(candidates, pool, tolerance)
                samples = interleave(candidates, pool, clock, rounds, progress.tick)
                ms = {name: 1e3 * statistics.median(times) for name, times in samples.items()}
                rows.append(
                    Row(
                        f"{case.dtype} {case.rows} x {case.V}",
                        work,
                        ms["plain read"],
                        ms["naive torch"],
                        ms.get("torch.compile"),
                        ms["dpo_fast"],
                    )
                )
    finally:
        progress.close()
    return rows, remarks


def quick_table(rows: Sequence[Row]) -> str:
    """The rows as text; `of read`: a plain read's time over dpo_fast's."""
    lines = [
        ("logits", "work", "read ms", "naive ms", "compile ms", "dpo_fast ms", "vs naive", "vs compile", "of read")
    ]
    for row in rows:
        compile_ms = row.compile_ms
        lines.append(
            (
                row.logits,
                row.work,
                f"{row.read_ms:.2f}",
                f"{row.naive_ms:.2f}",
                "-" if compile_ms is None else f"{compile_ms:.2f}",
                f"{row.dpo_fast_ms:.2f}",
                f"{row.naive_ms / row.dpo_fast_ms:.1f}x",
                "-" if compile_ms is None else f"{compile_ms / row.dpo_fast_ms:.1f}x",
                f"{row.read_ms / row.dpo_fast_ms:.0%}" if row.work == WORKS[0] else "",
            )
        )
    return text_table(lines)


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns; the first two are text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(device: str = "cpu", compile_: bool = True) -> None:
    """Measures and prints.

    Raises:
        ValueError: the device is neither cpu nor a usable cuda.
        RuntimeError: results disagree.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, found {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    facts = machine(device) | versions()
    print("\n".join(f"{name:<17}  {value}" for name, value in facts.items()), flush=True)
    rows, remarks = quick(quick_cases(device), compile_=compile_)
    print("\nDPO loss from logits [4, T, V], all tokens kept, gradient in place; medians of calls taken in turn\n")
    print(quick_table(rows))
    for remark in remarks:
        print(remark)

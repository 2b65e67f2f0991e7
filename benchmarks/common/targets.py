"""The targets: what is to be reached, and whether the records of a run reach it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP, copy_rate, gradient_bytes, logits_bytes, read_rate
from dpo_fast.bench import Case

REACHED, MISSED, INCOMPLETE, EXCUSED = "reached", "NOT reached", "not measured", "does not apply"

CPU_READ_SHARE = {"float32": 0.70, "bfloat16": 0.50, "float16": 0.50}
CPU_NAIVE = {"float32": 12.0, "bfloat16": 20.0}
CPU_COMPILE = 3.0
CPU_WHOLE = 1.05
CPU_HALF = 0.55
CPU_SCALING = 1.7
CPU_VARYING = 1.0
INPLACE_MEMORY, ALLOCATED_MEMORY = 0.01, 1.01
CPU_PRODUCTS, CUDA_PRODUCTS = 1.10, 1.15
TOLERANCE_PRODUCTS, TOLERANCE_FLAT = {"2^-8": 0.13, "2^-10": 0.24}, 1.03
CUDA_READ_SHARE, CUDA_COPY_SHARE = 0.90, 0.85
CUDA_RECOMPUTING, CUDA_LIGER = 1.3, 3.0
MEMORY_BUDGET = {"cpu": 256 << 20, "cuda": 1 << 30}  # linear_dpo_loss's default


@dataclass
class Target:
    """A line of the report: what is asked, the figures found, and the peers' beside them."""

    what: str
    bound: str
    figure: str
    verdict: str
    beside: str = ""


class Book:
    """Finds what was measured, by level, work, case and candidate."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.records = list(records)
        self.index: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for record in self.records:
            key = (record["level"], record["work"], record["case_name"], record["candidate"])
            self.index.setdefault(key, record)

    def seconds(self, level: str, work: str, case: Case, candidate: str) -> float | None:
        """The median of a candidate, None where it was not timed."""
        found = self.index.get((level, work, case.name, candidate))
        return None if found is None else found["median_s"]

    def memory(self, level: str, work: str, case: Case, candidate: str) -> int | None:
        """The peak extra bytes of a candidate, None where they were not measured."""
        found = self.index.get((level, work, case.name, candidate))
        return None if found is None else found["peak_extra_bytes"]

    def ratio(self, level: str, work: str, case: Case, slow: str, fast: str) -> float | None:
        """Time of one candidate over that of another: the median over the rounds, each of which timed both."""
        a, b = (self.index.get((level, work, case.name, candidate)) for candidate in (slow, fast))
        if a is None or b is None or not a["samples"] or not b["samples"]:
            return None
        ratios: list[float] = [x / y for x, y in zip(a["samples"], b["samples"], strict=True)]
        return statistics.median(ratios)

    def times(self, level: str, work: str, cases: Sequence[Case], candidates: Sequence[str]) -> str:
        """The medians of several candidates in ms, a figure for each case."""
        parts = []
        for candidate in candidates:
            found = [self.seconds(level, work, case, candidate) for case in cases]
            if any(s is not None for s in found):
                parts.append(f"{candidate} " + " / ".join("-" if s is None else milliseconds(s) for s in found))
        return f"{'; '.join(parts)} ms" if parts else ""


def milliseconds(seconds: float) -> str:
    """Three digits."""
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3g}"


def judge(values: Sequence[float | None], good: Callable[[float], bool]) -> str:
    """One verdict on all figures: a missed one decides, then a missing one."""
    found = [value for value in values if value is not None]
    if any(not good(value) for value in found):
        return MISSED
    return REACHED if found and len(found) == len(values) else INCOMPLETE


def at_least(bound: float) -> Callable[[float], bool]:
    """Whether a figure reaches a lower bound."""
    return lambda value: value >= bound


def at_most(bound: float) -> Callable[[float], bool]:
    """Whether a figure stays below an upper bound."""
    return lambda value: value <= bound


def line(
    what: str,
    bound: str,
    cases: Sequence[Case],
    values: Sequence[float | None],
    good: Callable[[float], bool],
    form: Callable[[float], str],
    beside: str = "",
) -> Target:
    """A target over several cases."""
    figures = [
        f"{case.model} {case.rows} x {case.V}: {'-' if value is None else form(value)}"
        for case, value in zip(cases, values, strict=True)
    ]
    return Target(what, bound, "; ".join(figures), judge(values, good), beside)


def percent(value: float) -> str:
    """A share; two digits where it is small."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.2%}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def targets_of(records: Iterable[dict[str, Any]], device: str) -> list[Target]:
    """All targets of a device, a line for each."""
    book = Book(records)
    return cpu_targets(book) if device == "cpu" else cuda_targets(book)


# --- CPU --------------------------------------------------------------------------------------------------------------


def cpu_targets(book: Book) -> list[Target]:
    """Logits in, then the linear head."""
    by_type = {dtype: [case for case in shapes.target_cases("cpu") if case.dtype == dtype] for dtype in shapes.FLOATS}
    found: list[Target] = []
    for dtype, cases in by_type.items():
        found.append(_cpu_forward(book, dtype, cases))
    for dtype, cases in by_type.items():
        found += _cpu_step(book, dtype, cases)
    for dtype, cases in by_type.items():
        found.append(_cpu_whole(book, dtype, cases))
    for dtype, cases in by_type.items():
        found.append(_cpu_half(book, dtype, cases))
    for dtype, cases in by_type.items():
        found += memory_targets(book, dtype, [case for case in cases if case.model == "Llama-3"])
    for dtype, cases in by_type.items():
        found += [_cpu_scaling(book, dtype, cases, work) for work in (FORWARD, STEP)]
    found += [_small_calls(book, work) for work in (FORWARD, STEP)]
    found += [_varying(book, work, more) for work in (FORWARD, STEP) for more in ("", peers.WEIGHTED)]
    return [*found, *_cpu_linear(book)]


def _cpu_forward(book: Book, dtype: str, cases: Sequence[Case]) -> Target:
    bound = CPU_READ_SHARE[dtype]
    shares = [book.ratio(peers.DPO, FORWARD, case, peers.READ, peers.FAST) for case in cases]
    beside = book.times(peers.DPO, FORWARD, cases, (peers.FAST, peers.READ, *peers.LOGITS_PEERS))
    what, text = f"{dtype} forward", f"≥ {bound:.0%} of a plain read's bandwidth"
    return line(what, text, cases, shares, at_least(bound), percent, beside)


def _cpu_step(book: Book, dtype: str, cases: Sequence[Case]) -> list[Target]:
    found = []
    beside = book.times(peers.DPO, STEP, cases, (peers.INPLACE, peers.FAST, *peers.LOGITS_PEERS))
    bounds = ((peers.NAIVE, CPU_NAIVE.get(dtype)), (peers.COMPILE, CPU_COMPILE))
    for peer, bound in bounds:
        if bound is None:
            continue
        ratios = [book.ratio(peers.DPO, STEP, case, peer, peers.INPLACE) for case in cases]
        what, text = f"{dtype} forward + in-place backward", f"≥ {bound:g}x {peer}"
        found.append(line(what, text, cases, ratios, at_least(bound), times, beside))
    return found


def _cpu_whole(book: Book, dtype: str, cases: Sequence[Case]) -> Target:
    ratios = [book.ratio(peers.DPO, STEP, case, peers.INPLACE, peers.ROW_KERNELS) for case in cases]
    beside = book.times(peers.DPO, STEP, cases, (peers.INPLACE, peers.ROW_KERNELS))
    what, text = f"{dtype} dpo_loss as a whole", f"≤ {CPU_WHOLE:g}x its row kernels"
    return line(what, text, cases, ratios, at_most(CPU_WHOLE), times, beside)


def _cpu_half(book: Book, dtype: str, cases: Sequence[Case]) -> Target:
    shares = [book.ratio(peers.DPO, STEP, case, peers.INPLACE + peers.HALF, peers.INPLACE) for case in cases]
    beside = book.times(peers.DPO, STEP, cases, (peers.INPLACE + peers.HALF, peers.INPLACE))
    what, text = f"{dtype} half the rows ignored", f"≤ {CPU_HALF:.0%} of the time"
    return line(what, text, cases, shares, at_most(CPU_HALF), percent, beside)


def memory_targets(book: Book, dtype: str, cases: Sequence[Case]) -> list[Target]:
    """Peak extra memory of forward + backward, in place and not, over the bytes of the logits."""
    found = []
    for name, bound in ((peers.INPLACE, INPLACE_MEMORY), (peers.FAST, ALLOCATED_MEMORY)):
        memory = [book.memory(peers.DPO, STEP, case, name) for case in cases]
        shares = [
            None if extra is None else extra / (case.rows * case.V * case.itemsize)
            for case, extra in zip(cases, memory, strict=True)
        ]
        others = []
        for peer in peers.LOGITS_PEERS:
            peer_memory = [book.memory(peers.DPO, STEP, case, peer) for case in cases]
            if any(extra is not None for extra in peer_memory):
                others.append(f"{peer} " + " / ".join("-" if m is None else f"{m / 1e6:.0f}" for m in peer_memory))
        beside = f"{'; '.join(others)} MB" if others else ""
        what = f"{dtype} peak extra memory, {'in place' if name == peers.INPLACE else 'gradient allocated'}"
        text = f"≤ {bound:.0%} of the logits"
        found.append(line(what, text, cases, shares, at_most(bound), percent, beside))
    return found


def _cpu_scaling(book: Book, dtype: str, cases: Sequence[Case], work: str) -> Target:
    own = peers.FAST if work == FORWARD else peers.INPLACE
    ratios = [book.ratio(peers.THREADS, work, case, own + peers.ONE_THREAD, own) for case in cases]
    reads = [book.ratio(peers.THREADS, work, case, peers.READ + peers.ONE_THREAD, peers.READ) for case in cases]
    found = line(
        f"{dtype} {work}, all threads over one",
        f"≥ {CPU_SCALING:g}x where a plain read is",
        cases,
        ratios,
        at_least(CPU_SCALING),
        times,
        "plain read " + " / ".join("-" if read is None else times(read) for read in reads),
    )
    held = [v for v, read in zip(ratios, reads, strict=True) if read is None or read >= CPU_SCALING]
    found.verdict = judge(held, at_least(CPU_SCALING)) if held else EXCUSED
    return found


def _small_calls(book: Book, work: str) -> Target:
    cases = shapes.small_cases("cpu")
    ratios = [book.ratio(peers.DPO, work, case, peers.NAIVE, peers.FAST) for case in cases]
    beside = book.times(peers.DPO, work, cases, (peers.FAST, peers.NAIVE, peers.COMPILE, peers.TRL))
    return line(f"small calls, {work}", "≥ 1x naive torch", cases, ratios, at_least(1), times, beside)


def _varying(book: Book, work: str, more: str) -> Target:
    cases = shapes.varying_cases("cpu")
    names = (peers.FAST + more, peers.NAIVE + more)
    ratios = [book.ratio(peers.VARYING, work, case, *names) for case in cases]
    what, text = f"calls of varying shapes, {work}{more}", f"≤ {CPU_VARYING:g}x naive torch"
    beside = book.times(peers.VARYING, work, cases, names)
    return line(what, text, cases, ratios, at_most(CPU_VARYING), times, beside)


def _cpu_linear(book: Book) -> list[Target]:
    found = []
    for case in [case for case in shapes.linear_cases("cpu") if case.ignored == 0.5]:
        found += [_products(book, case, CPU_PRODUCTS), _linear_memory(book, case, "cpu")]
    return [*found, *_tolerance(book)]


def _tolerance(book: Book) -> list[Target]:
    found = []
    for case in shapes.tolerance_cases("cpu"):
        for name, bound in TOLERANCE_PRODUCTS.items() if case.dtype == "float32" else ():
            ratio = book.ratio(peers.TOLERANCE, peers.REAL_PRODUCTS, case, name, peers.TWO_PRODUCTS)
            beside = book.times(peers.TOLERANCE, peers.REAL_PRODUCTS, [case], (name, peers.TWO_PRODUCTS))
            text = f"≤ {bound:g}x the two dense products"
            found.append(line(f"grad_tolerance {name}", text, [case], [ratio], at_most(bound), times, beside))
        for work in (peers.REAL_BACKWARD, peers.FLAT_BACKWARD):
            ratios = [book.ratio(peers.TOLERANCE, work, case, name, peers.EXACT) for name in peers.TOLERANCES]
            worst = None if None in ratios else max(ratio for ratio in ratios if ratio is not None)
            what = f"{case.dtype} grad_tolerance, {work}"
            beside = book.times(peers.TOLERANCE, work, [case], (peers.EXACT, *peers.TOLERANCES))
            found.append(
                line(what, f"≤ {TOLERANCE_FLAT:g}x exact", [case], [worst], at_most(TOLERANCE_FLAT), times, beside)
            )
    return found


def _products(book: Book, case: Case, bound: float) -> Target:
    ratio = book.ratio(peers.LINEAR, STEP, case, peers.FAST, peers.PRODUCTS)
    beside = book.times(peers.LINEAR, STEP, [case], (peers.FAST, peers.PRODUCTS, *peers.LINEAR_PEERS))
    what, text = f"{case.dtype} linear head, half ignored", f"≤ {bound:.2f}x the three bare products"
    return line(what, text, [case], [ratio], at_most(bound), times, beside)


def _linear_memory(book: Book, case: Case, device: str) -> Target:
    extra = book.memory(peers.LINEAR, STEP, case, peers.FAST)
    most = MEMORY_BUDGET[device] + gradient_bytes(case).amount
    others = [(peer, book.memory(peers.LINEAR, STEP, case, peer)) for peer in peers.LINEAR_PEERS]
    beside = "; ".join(f"{peer} {memory / 1e6:.0f} MB" for peer, memory in others if memory is not None)
    return line(
        f"{case.dtype} linear head, peak extra memory",
        f"≤ budget + gradients = {most / 1e6:.0f} MB",
        [case],
        [None if extra is None else float(extra)],
        at_most(most),
        lambda value: f"{value / 1e6:.0f} MB",
        beside,
    )


# --- CUDA -------------------------------------------------------------------------------------------------------------


def cuda_targets(book: Book) -> list[Target]:
    """bfloat16, V = 128256."""
    model, n_seqs, length = shapes.TARGET_SHAPES["cuda"][0]
    full = Case(model, "bfloat16", n_seqs, length, device="cuda")
    found = []
    for ignored in (0.0, 0.5, 0.9):
        case = Case(model, "bfloat16", n_seqs, length, ignored, device="cuda")
        found.append(_cuda_logits(book, case, FORWARD))
        found.append(_cuda_logits(book, case, STEP))
    found += memory_targets(book, "bfloat16", [full])
    for case in [case for case in shapes.linear_cases("cuda") if case.ignored == 0.5]:
        found.append(_products(book, case, CUDA_PRODUCTS))
        for peer, bound in ((peers.TRL_CHUNKED, CUDA_RECOMPUTING), (peers.LIGER, CUDA_LIGER)):
            ratio = book.ratio(peers.LINEAR, STEP, case, peer, peers.FAST)
            beside = book.times(peers.LINEAR, STEP, [case], (peers.FAST, *peers.LINEAR_PEERS))
            what, text = f"{case.dtype} linear head, half ignored", f"≥ {bound:g}x {peer}"
            found.append(line(what, text, [case], [ratio], at_least(bound), times, beside))
        found.append(_linear_memory(book, case, "cuda"))
    return found


def _cuda_logits(book: Book, case: Case, work: str) -> Target:
    own = peers.FAST if work == FORWARD else peers.INPLACE
    limit = peers.READ if work == FORWARD else peers.COPY
    bound = CUDA_READ_SHARE if work == FORWARD else CUDA_COPY_SHARE
    share = share_of_limit(
        case,
        work,
        book.seconds(peers.DPO, work, case, own),
        book.seconds(peers.DPO, work, case, limit),
    )
    beside = book.times(peers.DPO, work, [case], (own, limit, *peers.LOGITS_PEERS))
    ignored = f", {case.ignored:.0%} ignored" if case.ignored else ""
    what, text = f"{case.dtype} {work}{ignored}", f"≥ {bound:.0%} of the {limit}'s bandwidth"
    return line(what, text, [case], [share], at_least(bound), percent, beside)


def share_of_limit(case: Case, work: str, seconds: float | None, limit_seconds: float | None) -> float | None:
    """Bandwidth over that of the plain read (forward) or the copy (forward + backward)."""
    if seconds is None or limit_seconds is None:
        return None
    rate = logits_bytes(case, work).amount / seconds
    return rate / (read_rate if work == FORWARD else copy_rate)(case, limit_seconds)

"""One case: results compared, then every candidate timed in turn, round after round.

A round is a round of pytest-benchmark, whose own figures are those of the first candidate; the records that the report
is made of hold the samples of all of them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import Figure, copy_bytes, logits_bytes, products_flops, read_bytes
from benchmarks.common.memory import memory_of_candidates
from benchmarks.common.peers import AbsentError, first_line
from dpo_fast.bench import (
    ROTATED_BYTES,
    Candidate,
    Case,
    Clock,
    Pool,
    no_garbage_collection,
    relative_difference,
    time_once,
    torch_threads,
)

MIN_ROUNDS, MAX_ROUNDS = 15, 41

# Largest relative difference (Euclidean norms) from naive torch, for the value and each gradient. Half types: some
# peers round every log-prob to the half type, and a preference loss takes the difference of long sums of them.
TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}


@dataclass
class Record:
    """What was found about one candidate on one case. `problem`: why there are no samples."""

    level: str
    work: str
    case: dict[str, Any]
    case_name: str
    candidate: str
    samples: list[float] = field(default_factory=list)
    median_s: float | None = None
    difference: float | None = None  # from naive torch
    bytes: float | None = None
    bytes_formula: str = ""
    flops: float | None = None
    flops_formula: str = ""
    peak_extra_bytes: int | None = None
    problem: str = ""


class Recorder:
    """Collects the records of a session, and what is left to be measured in fresh processes."""

    def __init__(self, quick: bool) -> None:
        self.records: list[Record] = []
        self.quick = quick
        self.pending: list[Record] = []

    def finish(self) -> list[dict[str, Any]]:
        """Measures the memory that is still to be measured; all records as plain dictionaries."""
        memory_of_candidates(self.pending)
        self.pending = []
        return [asdict(record) for record in self.records]


def compare(
    benchmark: Any,
    recorder: Recorder,
    level: str,
    case: Case,
    work: str,
    names: Sequence[str],
    *,
    memory: Sequence[str] = (),
    wall: bool = False,
    repeat: int = 1,
    seconds: float = 6.0,
) -> None:
    """Checks and times the candidates of a case; the first is the one that pytest-benchmark shows.

    memory: whose peak extra memory is wanted. wall: time with the processor's clock on CUDA as well. repeat: calls per
    sample. seconds: how long the rounds may take together, at least MIN_ROUNDS of them.
    """
    inputs = _inputs_of(level, case)
    small = inputs.x.nbytes * 64 < ROTATED_BYTES and level != peers.LINEAR
    pool = Pool(inputs.x, 0 if small else ROTATED_BYTES)
    clock = Clock(case.device, wall)
    records = {name: _record(level, case, work, name) for name in names}
    recorder.records += records.values()
    candidates = _checked(records, inputs, pool, repeat)
    _measure_memory(recorder, [records[c.name] for c in candidates if c.name in memory], inputs, candidates, pool)
    if not candidates or candidates[0].name != names[0]:
        raise AssertionError(f"{names[0]}: {records[names[0]].problem}")

    with no_garbage_collection():
        started = time.perf_counter()
        for candidate in candidates:
            time_once(candidate, pool, clock)
        round_s = time.perf_counter() - started
        fewest = 3 if recorder.quick else MIN_ROUNDS
        rounds = max(fewest, min(MAX_ROUNDS, int((1.0 if recorder.quick else seconds) / round_s)))

        order = random.Random(1)

        def others() -> None:  # untimed by pytest-benchmark, in every round; nobody always follows the same one
            for candidate in order.sample(candidates[1:], len(candidates) - 1):
                records[candidate.name].samples.append(time_once(candidate, pool, clock))

        def first() -> None:
            records[names[0]].samples.append(time_once(candidates[0], pool, clock))

        benchmark.group = f"{level}, {work}"
        benchmark.pedantic(first, setup=others, rounds=rounds)
    for record in records.values():
        if record.samples:
            record.median_s = statistics.median(record.samples)
    benchmark.extra_info["median_ms"] = {n: 1e3 * r.median_s for n, r in records.items() if r.median_s is not None}


def compare_varying(
    benchmark: Any, recorder: Recorder, case: Case, work: str, names: Sequence[str], *, passes: int = 3
) -> None:
    """Checks and times the candidates on one thread, each of shapes.varying_lengths once a pass, after other lengths.

    A sample is one call of one length, so that a ratio's median is over the lengths.
    """
    lengths, warm_up = (each[:: 20 if recorder.quick else 1] for each in shapes.varying_lengths(case))
    records = {name: _record(peers.VARYING, case, work, name) for name in names}
    recorder.records += records.values()
    longest = peers.make_level_inputs(peers.VARYING, replace(case, length=max(warm_up)))

    def calls_of(length: int) -> dict[str, Callable[[], Any]]:
        """Calls on the front of the longest one's memory."""
        cut = replace(case, length=length)
        x = longest.x.view(-1)[: cut.rows * cut.V].view(cut.n_seqs, length, cut.V)
        inputs = longest._replace(case=cut, x=x, targets=longest.targets[:, :length].contiguous())
        calls = {name: peers.build(peers.VARYING, name, inputs, work) for name in names}
        return {name: partial(call, x) for name, call in calls.items()}

    order, clock = random.Random(1), Clock(case.device, wall=True)
    with torch_threads(1), no_garbage_collection():
        for length in warm_up:
            found = {name: call() for name, call in calls_of(length).items()}
        for name, record in records.items():
            reference = found[peers.NAIVE + peers.WEIGHTED * name.endswith(peers.WEIGHTED)]
            record.difference = _difference(found[name], reference)
            if not record.difference <= TOLERANCE[case.dtype]:
                raise AssertionError(f"{name} differs from {peers.NAIVE} by {record.difference:.1e}")
        del found
        calls = {length: calls_of(length) for length in lengths}
        turns = [length for _ in range(passes) for length in order.sample(lengths, len(lengths))]
        turn = iter(turns)
        current: dict[str, Callable[[], Any]] = {}

        def others() -> None:  # untimed by pytest-benchmark: all but the first candidate
            current.update(calls[next(turn)])
            for name in order.sample(names[1:], len(names) - 1):
                records[name].samples.append(clock.time(current[name]))

        def first() -> None:
            records[names[0]].samples.append(clock.time(current[names[0]]))

        benchmark.group = f"{peers.VARYING}, {work}"
        benchmark.pedantic(first, setup=others, rounds=len(turns))
    for record in records.values():
        record.median_s = statistics.median(record.samples)
    benchmark.extra_info["median_ms"] = {name: 1e3 * (r.median_s or 0.0) for name, r in records.items()}


@lru_cache(maxsize=1)
def _inputs_of(level: str, case: Case) -> peers.LevelInputs:
    """Both works of a case follow each other and share its inputs, of which they only ever get copies."""
    return peers.make_level_inputs(level, case)


def _record(level: str, case: Case, work: str, name: str) -> Record:
    record = Record(level, work, asdict(case), case.name, name)
    counted = case
    if name.split(peers.ONE_THREAD)[0].endswith(peers.HALF):
        counted = Case(**{**asdict(case), "ignored": 0.5})
    figure: Figure | None = None
    if name.startswith(peers.READ):
        figure = read_bytes(case)
    elif name.startswith(peers.COPY):
        figure = copy_bytes(case)
    elif level == peers.LINEAR:
        record.flops, record.flops_formula = products_flops(case)
    elif level not in (peers.PREFERENCE, peers.VARYING):
        figure = logits_bytes(counted, work)
    if figure is not None:
        record.bytes, record.bytes_formula = figure
    return record


def _checked(records: dict[str, Record], inputs: peers.LevelInputs, pool: Pool, repeat: int) -> list[Candidate]:
    """The candidates that run and agree with naive torch; the others' records get the problem."""
    reference = None
    order = sorted(records, key=lambda name: name != peers.NAIVE)  # naive first: the others are compared with it
    candidates: dict[str, Candidate] = {}
    for name in order:
        record = records[name]
        threads = 1 if name.endswith(peers.ONE_THREAD) else None
        try:
            call = peers.build(record.level, name, inputs, record.work)
            result = call(pool.take())  # also the warm-up: compilers compile here
            if isinstance(result, tuple) and peers.HALF not in name:
                if name == peers.NAIVE:
                    reference = result
                elif reference is not None:
                    record.difference = _difference(result, reference)
                    if not record.difference <= TOLERANCE[inputs.case.dtype]:
                        raise AbsentError(f"differs from {peers.NAIVE} by {record.difference:.1e}: not timed")
            del result
        except Exception as error:
            record.problem = str(error) if isinstance(error, AbsentError) else f"failed ({first_line(error)})"[:300]
            if inputs.case.device.startswith("cuda"):
                torch.cuda.empty_cache()  # what a candidate that ran out of memory leaves behind
            continue
        candidates[name] = Candidate(name, call, threads, repeat)
    return [candidates[name] for name in records if name in candidates]


def _difference(found: Any, expected: Any) -> float:
    pairs = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    return max(relative_difference(a, b) for a, b in pairs)


def _measure_memory(
    recorder: Recorder,
    records: Sequence[Record],
    inputs: peers.LevelInputs,
    candidates: Sequence[Candidate],
    pool: Pool,
) -> None:
    """By the allocator on CUDA; on the CPU in a fresh process, later."""
    if not inputs.case.device.startswith("cuda"):
        recorder.pending += records
        return
    calls: dict[str, Callable[..., Any]] = {candidate.name: candidate.call for candidate in candidates}
    for record in records:
        x = pool.take()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = calls[record.candidate](x)
        torch.cuda.synchronize()
        record.peak_extra_bytes = torch.cuda.max_memory_allocated() - before
        del result

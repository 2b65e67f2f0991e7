"""Peak extra memory on the CPU: by how much the resident set of a fresh process grows at its highest during a call.

A process for each candidate, which goes through its cases: `python -m benchmarks.common.memory`, cases on the standard
input, one JSON line for each on the standard output.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAR_REFS = Path("/proc/self/clear_refs")
TIMEOUT_S = 600


def memory_of_candidates(records: Sequence[Any]) -> None:
    """Fills in the records' peak_extra_bytes (None where it cannot be measured)."""
    if not CLEAR_REFS.exists():
        return
    keys = list(dict.fromkeys((record.level, record.candidate, record.work) for record in records))
    for key in keys:
        same = [record for record in records if (record.level, record.candidate, record.work) == key]
        lines = _worker({"key": key, "cases": [record.case for record in same]})
        for record, line in zip(same, lines, strict=False):
            record.peak_extra_bytes = line.get("peak")


def _worker(request: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.common.memory"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the resident set grows at its highest during a call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory that malloc kept would be handed out again unseen
    CLEAR_REFS.write_text("5")  # the mark of the highest starts anew
    before = status_bytes("VmRSS")
    result = call()
    growth = status_bytes("VmHWM") - before
    del result
    return growth


def main() -> None:
    """Measures the cases of a request, smallest first use apart: each call runs once before it is measured."""
    from benchmarks.common import peers
    from dpo_fast.bench import Case

    request = json.load(sys.stdin)
    level, name, work = request["key"]
    for fields in request["cases"]:
        line: dict[str, Any]
        try:
            inputs = peers.make_level_inputs(level, Case(**fields))
            call = peers.build(level, name, inputs, work)
            original = inputs.x.clone()
            call(inputs.x)
            inputs.x.copy_(original)
            line = {"peak": peak_growth(lambda call=call, x=inputs.x: call(x))}  # type: ignore[misc]
            del inputs, call, original
        except Exception as error:
            line = {"error": peers.first_line(error)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

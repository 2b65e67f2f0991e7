"""Runs the whole suite and writes benchmarks/results/<machine>/: report.md, results.json and the pictures.

python -m benchmarks                    on the CPU, some ten minutes on two cores
python -m benchmarks --device cuda      on the GPU
python -m benchmarks --quick            one case of each kind: that everything runs
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import peers
from benchmarks.common.pictures import draw_all
from benchmarks.common.report import write_report
from benchmarks.common.targets import targets_of
from dpo_fast.bench import machine, text_table, versions

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "bench_dpo_loss.py",
    "bench_huge_pages.py",
    "bench_token_logps.py",
    "bench_sequence_logps.py",
    "bench_linear_dpo_loss.py",
    "bench_grad_tolerance.py",
    "bench_preference_loss.py",
    "bench_small_calls.py",
)

# What torch reads once, when a process starts.
ENVIRONMENT = {"bench_huge_pages.py": {"THP_MEM_ALLOC_ENABLE": "1"}}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="dpo_fast's benchmark suite.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one case of each kind, few rounds")
    parser.add_argument("--no-step", action="store_true", help="leave the whole training steps out")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<machine>)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: report and pictures from results.json")
    parser.add_argument("-k", dest="select", default="", help="only these tests (pytest's -k)")
    return parser.parse_args()


def folder_name(facts: dict[str, str]) -> str:
    """The machine's name as a folder."""
    name = facts.get("GPU") or f"{facts['processor']}, {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def commit() -> str:
    """The commit that is measured."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def run_files(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Each file in a process of its own; the records, and the files that failed.

    What there is after each file stands in records.json until all are done: a run that is cut short leaves that.
    """
    records: list[dict[str, Any]] = []
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILES:
            path = Path(scratch) / f"{name}.json"
            command = [sys.executable, "-m", "pytest", f"benchmarks/{name}", "-v", "--benchmark-quiet", "--tb=short"]
            command += ["-p", "no:cacheprovider", "-W", "ignore", f"--device={args.device}", f"--results={path}"]
            command += ["--quick"] * args.quick + (["-k", args.select] if args.select else [])
            env = os.environ | ENVIRONMENT.get(name, {})
            status = subprocess.run(command, cwd=ROOT, check=False, env=env).returncode
            if status not in (0, 5):  # 5: nothing selected
                failed.append(f"benchmarks/{name}")
            if path.exists():
                records += json.loads(path.read_text())
                (folder / "records.json").write_text(json.dumps(records) + "\n")
    (folder / "records.json").unlink(missing_ok=True)
    return records, failed


def run_step(args: argparse.Namespace) -> dict[str, Any] | None:
    """benchmarks/step.py in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "step.json"
        command = [sys.executable, "-m", "benchmarks.step", f"--device={args.device}", f"--output={path}"]
        subprocess.run([*command, *["--quick"] * args.quick], cwd=ROOT, check=False)
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
    return {"settings": "", "problems": ["benchmarks/step.py did not run to its end"]}


def main() -> int:
    """Measures, writes, and prints the table of the targets."""
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available() and not args.redraw:
        print("benchmarks: torch finds no CUDA device", file=sys.stderr)
        return 2
    facts = machine(args.device)
    folder = args.output or ROOT / "benchmarks" / "results" / folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    if args.redraw:
        results = json.loads(path.read_text())
    else:
        records, failed = run_files(args, folder)
        results = {
            "device": args.device,
            "quick": args.quick,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "machine": facts,
            "versions": versions(*peers.PACKAGES),
            "failed_files": failed,
            "records": records,
            "step": None if args.no_step or args.select else run_step(args),
        }
        path.write_text(json.dumps(results) + "\n")
    write_report(results, folder, draw_all(results, folder))
    targets = targets_of(results["records"], results["device"])
    print()
    print(text_table([("target", "bound", "found", ""), *((t.what, t.bound, t.figure, t.verdict) for t in targets)]))
    print(f"\nwrote {folder / 'report.md'}")
    return 1 if results["failed_files"] else 0


if __name__ == "__main__":
    sys.exit(main())

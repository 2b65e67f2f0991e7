"""The command `dpo-fast` (also `python -m dpo_fast`)."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import dpo_fast


def cuda_build() -> str:
    """What the CUDA extension is made for, and whether the driver found will do."""
    from dpo_fast import _native

    if not _native.has_cuda_kernels():
        return "none"
    from dpo_fast import _cuda

    needed, found = _cuda.runtime_version(), _cuda.driver_version()
    if found == (0, 0):
        driver = "no driver found"
    else:
        driver = f"the driver serves CUDA {found[0]}.{found[1]}" + ("" if found >= needed[:1] else ", which is too old")
    return f"CUDA {needed[0]}.{needed[1]}, {', '.join(_cuda.archs())}; {driver}"


def info() -> list[tuple[str, str]]:
    """What this installed copy has, as (name, value) lines."""
    lines = [("dpo_fast", dpo_fast.__version__), ("Python", platform.python_version())]
    torch: Any = None
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")  # before the kernels, so that both use one OpenMP library
    from dpo_fast import _cpu, _native

    lines.append(("torch", torch.__version__ if torch else "not installed (dpo_fast.numpy only)"))
    lines.append(("processor", f"{platform.machine()}, {_native.usable_processors()} usable"))
    compiled = ", ".join(name + ("" if supported else " (not on this processor)") for name, supported in _cpu.isas())
    lines.append(("instruction set", f"{_cpu.isa()}; compiled: {compiled}"))
    lines.append(("threads, NumPy", str(_native.get_num_threads())))
    if torch:
        lines.append(("threads, torch", str(torch.get_num_threads())))
    lines.append(("CUDA build", cuda_build()))
    lines.append(("cpu will use", f"native kernels, {_cpu.isa()}"))
    if torch:
        from dpo_fast._torch import tile_type

        lines.append(("the head's products", tile_type.describe()))
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            how = "native kernels" if _native.has_cuda_kernels() else "plain torch, in chunks of rows"
            lines.append((f"cuda:{i} will use", f"{how} ({torch.cuda.get_device_name(i)})"))
        lines.append(("other devices use", "plain torch, in chunks of rows"))
        lines.append(("packed batches", packing_masks()))
    return lines


def packing_masks() -> str:
    """How the mask of a packed batch is chosen."""
    from dpo_fast._packing.models import DENSE_UP_TO, DENSE_UP_TO_ELSEWHERE, ENVIRONMENT

    chosen = os.environ.get(ENVIRONMENT, "auto")
    rule = f"sdpa dense up to {DENSE_UP_TO['cpu']} rows on the cpu, {DENSE_UP_TO_ELSEWHERE} elsewhere, then in runs"
    return f"mask {chosen} ({ENVIRONMENT}); auto: {rule}"


def run_bench(device: str, compile_: bool) -> None:
    """Measures and prints; needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError("bench compares with PyTorch, which is not installed: pip install torch")
    from dpo_fast import bench

    bench.main(device, compile_)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="dpo-fast", description="Fused preference-tuning losses.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this copy has: version, instruction set, threads, CUDA, devices")
    bench = commands.add_parser("bench", help="how fast this machine is: dpo_fast beside plain torch, within a minute")
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args(argv)
    try:
        if args.command == "bench":
            run_bench(args.device, not args.no_compile)
            return 0
        lines = info()
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"dpo-fast: {error}", file=sys.stderr)
        return 1
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0

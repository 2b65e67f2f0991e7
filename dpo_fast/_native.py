"""The compiled CPU kernels, set up: the instruction set that DPO_FAST_ISA asks for, threads, forked children."""

from __future__ import annotations

import importlib.util
import os

from dpo_fast import _cpu

MAX_THREADS = 1024

_num_threads: int | None = None

if os.environ.get("DPO_FAST_ISA"):
    _cpu.set_isa(os.environ["DPO_FAST_ISA"])

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_cpu.after_fork_in_child)


def get_num_threads() -> int:
    """Threads that `dpo_fast.numpy` uses: as set, else OMP_NUM_THREADS (at most 1024), else the processors that this
    process may run on.

    The torch functions follow `torch.get_num_threads()`.
    """
    if _num_threads is not None:
        return _num_threads
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isdigit() and int(first) > 0:
        return min(int(first), MAX_THREADS)
    return usable_processors()


def has_cuda_kernels() -> bool:
    """Whether the CUDA extension was built."""
    return importlib.util.find_spec("dpo_fast._cuda") is not None


def usable_processors() -> int:
    """The processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_num_threads(threads: int) -> None:
    """Sets the number of threads that `dpo_fast.numpy` uses. Results do not depend on it.

    Raises:
        ValueError: fewer than one thread, or more than 1024.
    """
    global _num_threads
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be at least 1 and at most {MAX_THREADS}, found {threads}")
    _num_threads = int(threads)

"""The CUDA launchers, compiled for the host with runner.h, as functions of CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import kernel_calls
import torch
from torch import Tensor

from dpo_fast import _cpu

SEQ_SAVED = 4  # enum SeqSaved in csrc/cuda/launch.h
STATISTICS = _cpu.token_statistics()
PAIR_NUMBERS = _cpu.pair_numbers()
LOGIT_TYPES = {getattr(torch, name): number for number, name in enumerate(kernel_calls.LOGIT_TYPES)}
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# the sanitized library is built with more of them (test_cuda_host.py)
FLAGS = os.environ.get("DPO_FAST_CUDA_HOST_FLAGS", "-O2").split()


def include_folder() -> Path | None:
    """Where CUDA's headers are, if anywhere."""
    homes = [os.environ.get("CUDA_HOME", "")]
    if (nvcc := shutil.which("nvcc")) is not None:
        run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        homes += [line.split("=", 1)[1].strip() for line in run.stderr.splitlines() if line.startswith("#$ TOP=")]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def _made(inputs: Iterable[Path], suffix: str, make: Callable[[Path], None]) -> Path:
    """A file that `make` writes, unless one was made of the same inputs and flags before."""
    key = hashlib.sha256("".join([*FLAGS, *(p.read_text() for p in inputs)]).encode()).hexdigest()[:16]
    folder = ROOT / "build/cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}{suffix}"
    with (folder / "lock").open("w") as lock:  # of several test processes one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            make(partial)
            partial.rename(path)
    return path


def _kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def _kernel_inputs() -> list[Path]:
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.h")]
    return [*_kernel_sources(), *sorted(headers), HERE / "runner.h"]


def build(include: Path) -> Path:
    """Compiles csrc/cuda with g++; the path of the library."""
    flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-x", "c++", f"-I{include}", "-include", f"{HERE}/runner.h"]

    def make(library: Path) -> None:
        def compile_one(source: Path) -> str:
            out = str(library.with_suffix(f".{source.stem}.o"))
            subprocess.run(["g++", *flags, *FLAGS, "-c", str(source), "-o", out], check=True)
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, _kernel_sources()))
        subprocess.run(["g++", "-shared", *FLAGS, *objects, "-o", str(library)], check=True)

    return _made(_kernel_inputs(), ".so", make)


def build_binding(include: Path) -> Path:
    """Compiles dpo_fast/_cuda.pyx against the kernels on the host."""
    kernels, runtime, package = build(include), HERE / "runtime.cpp", ROOT / "dpo_fast"
    sources = [package / name for name in ("_cuda.pyx", "_parse.pxi", "_declarations.pxd")]
    folders = [f"-I{folder}" for folder in (ROOT / "csrc", include, sysconfig.get_paths()["include"])]
    archs = '-DDPO_FAST_CUDA_ARCHS="host"'

    def make(library: Path) -> None:
        code = str(library.with_suffix(".cpp"))
        cython = [sys.executable, "-m", "cython", "--cplus", str(sources[0]), "-o", code]
        subprocess.run(cython, check=True, cwd=ROOT)
        flags = ["-std=c++17", "-fPIC", "-w", "-shared", archs, *folders]
        subprocess.run(["g++", *flags, code, str(runtime), str(kernels), "-o", str(library)], check=True)

    return _made([*sources, runtime, *_kernel_inputs()], "-binding.so", make)


def load_binding(path: Path) -> Any:
    """The module `_cuda` of the host, which is not put where the real one is imported from."""
    spec = importlib.util.spec_from_file_location("dpo_fast._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Struct(ctypes.Structure):
    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class Transform(_Struct):
    _fields_ = [("logit_scale", c_double), ("temperature", c_double), ("softcap", c_double)]


class Rows(_Struct):
    _fields_ = [
        *[(n, c_void_p) for n in ("logits", "targets", "row_mask", "weights")],
        ("transform", Transform),
        *[(n, c_int64) for n in ("seq_stride", "row_stride", "vocab_stride", "rows_per_seq", "n_rows", "n_targets")],
        *[(n, c_int64) for n in ("width", "vocab", "ignore_index")],
        *[(n, c_int32) for n in ("logit_type", "weights_double")],
    ]


class TokenArrays(_Struct):
    _fields_ = [("logps", c_void_p), ("stats", c_void_p), ("statistics", c_void_p * len(STATISTICS))]


class Sequences(_Struct):
    _fields_ = [("cu_seqlens", c_void_p), ("n_seqs", c_int64), ("cu_int64", c_int32), ("average", c_int32)]


class Pairs(_Struct):
    _fields_ = [
        ("pairs", c_void_p),
        ("n_pairs", c_int64),
        ("numbers", c_void_p * len(PAIR_NUMBERS)),
        ("baseline", c_void_p),
        ("divisor", c_double),
        ("order", c_void_p),
        ("offsets", c_void_p),
    ]


class LossOptions(_Struct):
    _fields_ = [
        ("n_terms", c_int),
        ("types", c_int * 8),
        ("weights", c_double * 8),
        *[(name, c_double) for name in _cpu.loss_parameters()],
        ("divergence", c_int),
        ("baseline", c_double),
        ("average", c_bool),
    ]


class Losses(_Struct):
    _fields_ = [(n, c_void_p) for n in ("loss", "losses", "chosen_rewards", "rejected_rewards", "pair_grads")]


class Grads(_Struct):
    _fields_ = [
        ("token_logps", c_void_p),
        ("statistics", c_void_p * len(STATISTICS)),
        *[(n, c_void_p) for n in ("seq_logps", "loss", "losses")],
    ]

    def __init__(self, **values: Any) -> None:
        statistics = (c_void_p * len(STATISTICS))(*[values.pop(name, None) for name in STATISTICS])
        super().__init__(statistics=statistics, **values)


class GradTensor(_Struct):
    _fields_ = [("data", c_void_p), ("seq_stride", c_int64), ("row_stride", c_int64), ("vocab_stride", c_int64)]


def address(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.numel() == 0 or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of float arrays beside the logits."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def strides(x: Tensor) -> dict[str, int]:
    """By the structs' names."""
    seq_stride = x.stride(0) if x.dim() == 3 else 0
    return {"seq_stride": seq_stride, "row_stride": x.stride(-2), "vocab_stride": x.stride(-1)}


class Kernels:
    """The launchers of csrc/cuda/launch.h."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.dpo_fast_forward_scratch_bytes.restype = c_int64

    def launches(self) -> int:
        """How many kernels were launched so far."""
        return ctypes.c_uint.in_dll(self.lib, "cuda_host_launches").value

    def call(self, name: str, *args: Any) -> None:
        def plain(a: Any) -> Any:
            if isinstance(a, Tensor):
                return c_void_p(a.data_ptr())
            return ctypes.byref(a) if isinstance(a, _Struct) else a

        assert getattr(self.lib, f"dpo_fast_{name}")(*map(plain, args), None) == 0


class Batch:
    """Logits with their targets, and what the kernels make of them step by step."""

    def __init__(
        self,
        kernels: Kernels,
        logits: Tensor,
        targets: Tensor,
        *,
        row_mask: Tensor | None = None,
        weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        average: bool = False,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        valid_vocab: int = 0,
    ) -> None:
        self.kernels, self.logits, self.targets = kernels, logits.detach(), targets.contiguous()
        self.wide = wide_type(logits.dtype)
        self.n_targets = targets.shape[-1] if targets.dim() == logits.dim() else 1
        self.alive = (row_mask, weights, cu_seqlens)
        n_rows = logits.shape[:-1].numel()
        self.rows = Rows(
            logits=logits.data_ptr(),
            targets=self.targets.data_ptr(),
            row_mask=address(row_mask),
            weights=address(weights),
            transform=Transform(logit_scale=logit_scale, temperature=temperature, softcap=softcap),
            **strides(logits),
            rows_per_seq=logits.shape[-2],
            n_rows=n_rows,
            n_targets=self.n_targets,
            width=logits.shape[-1],
            vocab=valid_vocab or logits.shape[-1],
            ignore_index=ignore_index,
            logit_type=LOGIT_TYPES[logits.dtype],
            weights_double=weights is not None and weights.dtype is torch.float64,
        )
        self.n_seqs = logits.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.seqs = Sequences(
            cu_seqlens=address(cu_seqlens),
            n_seqs=self.n_seqs,
            cu_int64=cu_seqlens is not None and cu_seqlens.dtype is torch.int64,
            average=average,
        )
        self.statistics: dict[str, Tensor] = {}
        self.pairs: Pairs | None = None
        self.pair_grads: Tensor | None = None

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory in which nothing that was not written looks right."""
        return torch.full(shape, 77, dtype=dtype or self.wide)

    def forward(self, *names: str, stats: bool = True) -> Batch:
        """names: of the statistics wanted."""
        lead, shape = self.logits.shape[:-1], self.targets.shape
        self.logps, self.stats = self.new(*shape), self.new(*lead, 2)
        for name in names:
            top1 = name == "is_top1"
            self.statistics[name] = self.new(*shape, dtype=torch.uint8) if top1 else self.new(*lead)
        out = self.token_arrays(*names)
        if not stats:
            out.stats = None
        n_bytes = self.kernels.lib.dpo_fast_forward_scratch_bytes(ctypes.byref(self.rows))
        self.kernels.call("forward", self.rows, out, torch.full((n_bytes,), 77, dtype=torch.uint8))
        return self

    def token_arrays(self, *names: str) -> TokenArrays:
        """What forward left, with these statistics."""
        found = [address(self.statistics[name]) if name in names else None for name in STATISTICS]
        return TokenArrays(
            logps=self.logps.data_ptr(), stats=self.stats.data_ptr(), statistics=(c_void_p * len(STATISTICS))(*found)
        )

    def sequences(self, double: bool = False) -> Tensor:
        self.seq_saved = self.new(self.n_seqs, SEQ_SAVED, dtype=torch.float64)
        sums = self.new(self.n_seqs, dtype=torch.float64 if double else None)
        self.kernels.call("sequences", self.rows, self.seqs, self.logps, sums, int(double), self.seq_saved)
        return sums

    def losses(
        self,
        ref: Tensor | None = None,
        pairs: Tensor | None = None,
        *,
        mean: bool = True,
        numbers: dict[str, Tensor] | None = None,
        baseline: Tensor | None = None,
        wpo: bool = False,
        loss: Any = None,
    ) -> dict[str, Tensor]:
        """loss: as `kernel_calls.loss_options` makes it."""
        self.pairs, self.pairs_alive = make_pairs(self.n_seqs, mean, pairs, numbers, baseline)
        out = loss_arrays(self.pairs.n_pairs, self.wide)
        self.pair_grads = out["pair_grads"]
        self.seq_logps, self.seq_saved = self.new(self.n_seqs), self.new(self.n_seqs, SEQ_SAVED, dtype=torch.float64)
        tokens = self.token_arrays(*(["log_sum_sq_probs"] if wpo else []))
        ref_double = ref is not None and ref.dtype is torch.float64
        arrays = Losses(**{k: v.data_ptr() for k, v in out.items()})
        args = (self.rows, self.seqs, self.pairs, make_loss(loss), tokens, int(wpo), ref, int(ref_double))
        self.kernels.call("sequences_and_losses", *args, self.seq_logps, self.seq_saved, arrays)
        return out

    def backward(self, inplace: bool = False, sequences: bool = True, **grads: Tensor | None) -> Tensor:
        """grads: by the names of Grads."""
        x = self.logits
        grad = x if inplace else torch.full_like(x, 77, memory_format=torch.contiguous_format)
        names = ["entropy"] if grads.get("entropy") is not None else []
        self.kernels.call(
            "backward",
            self.rows,
            self.seqs if sequences else None,
            self.pairs,
            self.token_arrays(*names),
            self.seq_saved if sequences else None,
            self.pair_grads,
            Grads(**{k: address(v) for k, v in grads.items()}),
            GradTensor(data=grad.data_ptr(), **strides(grad)),
            torch.full((self.n_seqs,), 77, dtype=torch.float64),
        )
        return grad


def by_sequence(pairs: Tensor, n_seqs: int) -> tuple[Tensor, Tensor]:
    """`order` and `offsets` of KernelPairs."""
    entries, order = pairs.reshape(-1).sort(stable=True)
    return order, torch.searchsorted(entries, torch.arange(n_seqs + 1))


def make_pairs(
    n_seqs: int,
    mean: bool = True,
    pairs: Tensor | None = None,
    numbers: dict[str, Tensor] | None = None,
    baseline: Tensor | None = None,
) -> tuple[Pairs, Any]:
    """The struct, and what must stay alive beside it."""
    given = [(numbers or {}).get(name) for name in PAIR_NUMBERS]
    order = offsets = None
    if pairs is not None:
        order, offsets = by_sequence(pairs, n_seqs)
    n_pairs = n_seqs // 2 if pairs is None else len(pairs)
    made = Pairs(
        pairs=address(pairs),
        n_pairs=n_pairs,
        numbers=(c_void_p * len(PAIR_NUMBERS))(*map(address, given)),
        baseline=address(baseline),
        divisor=n_pairs if mean else 1,
        order=address(order),
        offsets=address(offsets),
    )
    return made, (pairs, given, baseline, order, offsets)


def make_loss(loss: Any) -> LossOptions:
    """The struct for a tuple that the bindings take."""
    types, weights, parameters, divergence, average = loss or kernel_calls.loss_options("sigmoid")
    return LossOptions(
        n_terms=len(types),
        types=(c_int * 8)(*types),
        weights=(c_double * 8)(*weights),
        divergence=divergence,
        average=average,
        **dict(zip(_cpu.loss_parameters(), parameters, strict=True)),
    )


def loss_arrays(n_pairs: int, wide: torch.dtype) -> dict[str, Tensor]:
    shapes = {"loss": (), "losses": (n_pairs,), "chosen_rewards": (n_pairs,), "rejected_rewards": (n_pairs,)}
    out = {name: torch.full(shape, 77, dtype=wide) for name, shape in shapes.items()}
    return out | {"pair_grads": torch.full((n_pairs, 2), 77, dtype=torch.float64)}


def toolchains() -> Iterator[str]:
    """What is missing to run the kernels here, in words."""
    if shutil.which("g++") is None:
        yield "no g++"
    if include_folder() is None:
        yield "no CUDA headers (nvcc on PATH or CUDA_HOME)"

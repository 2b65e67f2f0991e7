"""The CUDA extension without a GPU: what the build decides, what it made, and how a call without a device fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dpo_fast import _cpu
from dpo_fast._arguments import (
    KernelGrads,
    KernelLosses,
    KernelOut,
    KernelPairs,
    KernelRows,
    KernelSaved,
    KernelSequences,
)

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "build/ptxas.txt"
NVCC = shutil.which("nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH: the CUDA extension is not built here")


@pytest.fixture
def cuda():
    """The extension, which must be there wherever nvcc is."""
    if NVCC is None or os.environ.get("DPO_FAST_CUDA") == "0":
        pytest.skip("no nvcc on PATH, or DPO_FAST_CUDA=0: the CUDA extension is not built here")
    from dpo_fast import _cuda

    return _cuda


def setup_py(**env: str) -> subprocess.CompletedProcess[str]:
    """What setup.py decides, without building."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def without_nvcc() -> dict[str, str]:
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists()]
    return {"PATH": os.pathsep.join(folders), "CUDA_HOME": ""}


def test_asking_for_cuda_without_nvcc_fails_loudly():
    run = setup_py(DPO_FAST_CUDA="1", **without_nvcc())
    assert run.returncode != 0
    assert "DPO_FAST_CUDA=1, but there is no nvcc on PATH" in run.stderr


@pytest.mark.parametrize(
    ("env", "reason"),
    [({"DPO_FAST_CUDA": "0"}, "DPO_FAST_CUDA=0"), (without_nvcc() | {"DPO_FAST_CUDA": ""}, "no nvcc")],
)
def test_the_build_says_that_it_leaves_cuda_out(env, reason):
    run = setup_py(**env)
    assert run.returncode == 0, run.stderr
    assert re.search(f"without CUDA kernels .*{reason}", run.stdout)


def test_another_value_of_the_switch_is_refused():
    assert "must be 0, 1 or unset, found 'yes'" in setup_py(DPO_FAST_CUDA="yes").stderr


@needs_nvcc
def test_the_build_says_for_which_gpus():
    run = setup_py(DPO_FAST_CUDA="1", DPO_FAST_CUDA_ARCHS="8.0;sm_90")
    assert f"with CUDA kernels for sm_80, sm_90, compute_90, by {NVCC}" in run.stdout
    assert "does not know ['12']" in setup_py(DPO_FAST_CUDA="1", DPO_FAST_CUDA_ARCHS="12").stderr


def test_module_is_abi3_and_keeps_its_cuda_runtime_to_itself(cuda):
    assert ".abi3." in Path(cuda.__file__).name
    dynamic = subprocess.run(["nm", "-D", cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert "PyInit__cuda" in dynamic
    assert not re.search(r"\bcuda[A-Z]|c10|at::|torch", dynamic)
    needed = subprocess.run(["objdump", "-p", cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert "libcuda" not in needed


def test_versions_and_architectures(cuda):
    archs = cuda.archs()
    assert archs
    assert all(re.fullmatch(r"(sm|compute)_\d+", arch) for arch in archs)
    assert archs[-1] == archs[-2].replace("sm_", "compute_")
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"release (\d+)\.(\d+)", text).groups() == tuple(map(str, cuda.runtime_version()))


def test_no_kernel_spills_or_has_local_memory(cuda):
    """By ptxas's own report of the build."""
    if not REPORT.exists():
        pytest.skip("the extension was not built in this folder: there is no report")
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        REPORT.read_text(),
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == {arch for arch in cuda.archs() if arch.startswith("sm_")}
    for name in ("forward_kernel", "finish_kernel", "backward_kernel", "batch_kernel", "seq_grad_kernel"):
        assert any(name in kernel for kernel, *_ in kernels), name
    assert [k for k in kernels if any(int(n) for n in k[2:])] == []


PLACE = (0, 0)
SEQS = KernelSequences(None, True, 3, False)
PAIRS = KernelPairs(None, 1, 0.0, None, (None,) * len(_cpu.pair_numbers()))
LOSS = ((0,), (1.0,), (0.1,) * len(_cpu.loss_parameters()), 0, False)
OUT = KernelOut(1, 5, 5, 1)
# 1: an address that is not read, because another one is refused first
LOSSES = KernelLosses(1, 1, 1, 1, 1)
SAVED = KernelSaved(1, 1, 1, 1, 1)
NO_GRADS = KernelGrads(None, (), None, None, None)


def some_rows(
    logits: int | None = 1, targets: int | None = 1, width: int = 5, valid_vocab: int = 0, **others: object
) -> KernelRows:
    """Three sequences of one row."""
    options = (-100, 1.0, 1.0, 0.0, valid_vocab)
    rows = KernelRows(0, 3, 1, width, width, width, 1, 1, options, logits, targets, None, None, False)
    return rows._replace(**others)


def statistics(**given: int) -> tuple[int | None, ...]:
    return tuple(given.get(name) for name in _cpu.token_statistics())


def refused_calls(cuda) -> dict[str, tuple[object, ...]]:
    """By what is wrong: a function and arguments for it, all good but one."""
    token, sequence, dpo = cuda.token_forward, cuda.sequence_forward, cuda.dpo_forward
    preference, back = cuda.preference_forward, cuda.preference_backward
    rows, named, sorted_ = some_rows(), PAIRS._replace(pairs=1), PAIRS._replace(pairs=1, order=1, offsets=1)
    tail = (1, LOSSES, 1)  # of dpo_forward: seq_logps, losses, seq_saved

    def whole(*, pairs=PAIRS, wpo=False, ref=None, logps=1, stats=1, found=None, end=tail):
        return (dpo, rows, SEQS, pairs, LOSS, PLACE, None, wpo, ref, False, logps, stats, found, *end)

    def backward(saved=SAVED, out=OUT, pairs=PAIRS, scratch=1, **grads):
        grads["statistics"] = statistics(**{name: grads.pop(name, None) for name in ("entropy", "lse")})
        return (cuda.backward, rows, SEQS, pairs, PLACE, scratch, saved, NO_GRADS._replace(**grads), out)

    def number(name):
        return PAIRS._replace(numbers=tuple(0 if name == n else None for n in _cpu.pair_numbers()))

    calls = {
        "logits": (token, some_rows(logits=0), PLACE, None, 1, 1, None),
        "targets": (token, some_rows(targets=0), PLACE, None, 1, 1, None),
        "row_mask": (token, some_rows(row_mask=0), PLACE, None, 1, 1, None),
        "token_weights": (token, some_rows(token_weights=0), PLACE, None, 1, 1, None),
        "logps": (token, rows, PLACE, None, 0, 1, None),
        "stats": (token, rows, PLACE, None, 1, 0, None),
        "scratch": (token, some_rows(width=40000), PLACE, 0, 1, 1, None),
        "cu_seqlens": (sequence, rows, SEQS._replace(cu_seqlens=0), PLACE, None, 1, 1, 1, False, 1),
        "seq_logps": (sequence, rows, SEQS, PLACE, None, 1, 1, 0, False, 1),
        "seq_saved": (sequence, rows, SEQS, PLACE, None, 1, 1, 1, False, 0),
        "pairs": whole(pairs=PAIRS._replace(pairs=0, order=1, offsets=1)),
        "order": whole(pairs=sorted_._replace(order=0)),
        "offsets": whole(pairs=sorted_._replace(offsets=0)),
        "baseline": whole(pairs=PAIRS._replace(baseline=0)),
        "ref_logps": whole(ref=0),
        "grad_logits": backward(out=OUT._replace(data=0)),
        "pair_grads": backward(losses=1, saved=SAVED._replace(pair_grads=0)),
        "entropy": backward(entropy=1, saved=SAVED._replace(entropy=0)),
        "lengths": (preference, PAIRS, LOSS, False, True, 2, PLACE, 1, None, False, 0, LOSSES),
        "grad_logps": (back, PAIRS, False, 2, PLACE, 1, None, None, 0),
    }
    calls |= {f"pair_{name}": whole(pairs=number(name)) for name in _cpu.pair_numbers()}
    calls |= {f"statistic {name}": whole(found=statistics(**{name: 0})) for name in _cpu.token_statistics()}
    losses = {f"losses {name}": whole(end=(1, LOSSES._replace(**{name: 0}), 1)) for name in LOSSES._fields}
    grads = {
        f"grad_{name}": backward(**{name: 0}) for name in (*NO_GRADS._fields, "entropy", "lse") if name != "statistics"
    }
    absent = {
        "logits None": (token, some_rows(logits=None), PLACE, None, 1, 1, None),
        "scratch None": (token, some_rows(width=40000), PLACE, None, 1, 1, None),
        "order None": whole(pairs=named),
        "order None in backward": backward(pairs=named, losses=1),
        "order None of losses alone": (back, named, False, 2, PLACE, 1, None, None, 1),
        "log_sum_sq_probs None": whole(wpo=True),
        "pair_grads None": whole(end=(1, LOSSES._replace(pair_grads=None), 1)),
        "scratch None in backward": backward(losses=1, scratch=None),
        "seq_saved None": backward(saved=SAVED._replace(seq_saved=None)),
    }
    return {**calls, **losses, **grads, **absent}


def test_missing_memory_is_refused(cuda):
    """An address of 0 for what is given, and None for what there has to be; each names the argument."""
    for name, (function, *arguments) in refused_calls(cuda).items():
        argument = name.removeprefix("statistic ").removeprefix("losses ").split()[0]
        says = "must be given.* found None" if " None" in name else "has no memory"
        with pytest.raises(ValueError, match=f"{argument} .*{says}"):
            function(*arguments)


def test_sequences_have_the_rows_there_are(cuda):
    seqs = SEQS._replace(n_seqs=2)
    with pytest.raises(ValueError, match="2 sequences of 1 rows are not the 3 rows there are"):
        cuda.sequence_forward(some_rows(), seqs, PLACE, None, 1, 1, 1, False, 1)
    with pytest.raises(ValueError, match="2 sequences of 1 rows are not the 3 rows there are"):
        cuda.backward(some_rows(), seqs, None, PLACE, None, SAVED, NO_GRADS, OUT)


def test_scratch_is_needed_for_rows_in_pieces(cuda):
    assert cuda.forward_scratch_bytes(some_rows()) == 0
    assert cuda.forward_scratch_bytes(some_rows(width=40000)) > 0
    assert cuda.forward_scratch_bytes(some_rows(width=40000, valid_vocab=5)) == 0


def test_tables_are_those_of_the_cpu_kernels(cuda):
    assert cuda.token_statistics() == _cpu.token_statistics()
    assert cuda.loss_parameters() == _cpu.loss_parameters()
    assert cuda.pair_numbers() == _cpu.pair_numbers()


def test_a_call_that_cannot_run_raises(cuda):
    """Without a GPU every call does; with one, a device that is not there."""
    x, targets, out = np.zeros((3, 5), np.float32), np.zeros(3, np.int64), np.zeros(6, np.float32)
    rows = some_rows(x.ctypes.data, targets.ctypes.data)
    with pytest.raises(RuntimeError, match=r"CUDA error cuda\w+: ") as error:
        cuda.token_forward(rows, (0, 12345), None, out.ctypes.data, out.ctypes.data, None)
    if "InsufficientDriver" in str(error.value):
        needed = "CUDA {}.{}".format(*cuda.runtime_version())
        assert re.search(rf"The NVIDIA driver (is absent|serves CUDA [\d.]+); .*{needed}", str(error.value))
    assert out.sum() == 0


# A driver of CUDA 12.4, as far as asking for its version goes; the runtime's other questions are answered by errors.
OLD_DRIVER = """
static int other(void) { return 3; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuGetProcAddress(const char* name, void** found, int version, unsigned long flags) {
  *found = (void*)other;
  return 0;
}
"""


def test_an_old_driver_is_named(cuda, tmp_path):
    """The first CUDA call says what was found and what is needed; the CPU side goes on."""
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", str(tmp_path / "driver.c"), "-o", library], check=True)
    code = """
        import numpy as np, dpo_fast.numpy
        from dpo_fast import _cuda, cli
        print(cli.cuda_build())
        try:
            _cuda.preference_backward((None, 1, 0.0, None, (None, None, None), None, None), False, 2, (0, 0), 1, 1, 1, 1)
        except RuntimeError as error:
            print(error)
        print(dpo_fast.numpy.preference_loss(np.zeros(2)).loss)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        check=True,
    )
    build, error, loss = run.stdout.splitlines()
    assert build.endswith("the driver serves CUDA 12.4, which is too old")
    needed = r"CUDA 1[3-9]\.\d \(release \d+ or later\)" if cuda.runtime_version()[0] == 13 else r"CUDA \d+\.\d"
    assert re.search(f"The NVIDIA driver serves CUDA 12.4; .*needs one for {needed}: update .*nvcc .*CUDA 12", error)
    assert float(loss) == pytest.approx(0.6931, abs=1e-4)

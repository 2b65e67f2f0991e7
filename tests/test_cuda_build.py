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

from dpo_fast import _checks

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


OPTIONS = (-100, 1.0, 1.0, 0.0)
HEAD = _checks.rows_head(0, (3, 5), (5, 1), 1, OPTIONS)
ROWS = (*HEAD, 0, 0, 0, 0, False)
PAIRS = (0, 1, 0, 0, 0.0)
LOSS = ((0,), (1.0,), 0.1, 0.0, 0.05, 0.5, 0, 0.5, 1.0, 1.0, 0.0, False)


def rows_on_the_host() -> tuple[tuple[object, ...], list[np.ndarray]]:
    x, targets = np.zeros((3, 5), np.float32), np.zeros(3, np.int64)
    return (*HEAD, x.ctypes.data, targets.ctypes.data, 0, 0, False), [x, targets]


def test_null_pointers_are_refused(cuda):
    rows, _alive = rows_on_the_host()
    seqs = (0, 2, False, True)
    calls = [
        lambda: cuda.token_forward(ROWS, 0, 0, *[0] * 7),
        lambda: cuda.token_forward(rows, 0, 0, *[0] * 7),
        lambda: cuda.sequence_forward(rows, seqs, 0, 0, 0, 1, 1, 0, False, 0),
        lambda: cuda.dpo_forward(rows, seqs, PAIRS, LOSS, 0, 0, 0, False, 0, False, 1, 1, 0, 0, 0, 0, 1, *[0] * 6),
        lambda: cuda.backward(rows, None, None, 0, 0, *[0] * 12, 5, 5, 1),
        lambda: cuda.backward(rows, seqs, None, 0, 0, 0, 1, 1, *[0] * 8, 1, 5, 5, 1),
        lambda: cuda.preference_forward(PAIRS, LOSS, False, 2, 0, 0, 0, 0, False, 0, *[0] * 5),
        lambda: cuda.preference_backward(PAIRS, False, 2, 0, 0, *[0] * 4),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="has no memory"):
            call()
    # cut into pieces, for whose sums there must be room
    many = (*_checks.rows_head(0, (3, 40000), (40000, 1), 1, OPTIONS), *rows[len(HEAD) :])
    assert cuda.forward_scratch_bytes(rows) == 0
    assert cuda.forward_scratch_bytes(many) > 0
    with pytest.raises(ValueError, match="scratch has no memory"):
        cuda.token_forward(many, 0, 0, 0, 1, 1, 0, 0, 0, 0)


def test_a_call_that_cannot_run_raises(cuda):
    """Without a GPU every call does; with one, a device that is not there."""
    rows, alive = rows_on_the_host()
    out = np.zeros(6, np.float32)
    with pytest.raises(RuntimeError, match=r"CUDA error cuda\w+: ") as error:
        cuda.token_forward(rows, 0, 12345, 0, out.ctypes.data, out.ctypes.data, 0, 0, 0, 0)
    if "InsufficientDriver" in str(error.value):
        needed = "CUDA {}.{}".format(*cuda.runtime_version())
        assert re.search(rf"The NVIDIA driver (is absent|serves CUDA [\d.]+); .*{needed}", str(error.value))
    assert alive[0].sum() == 0


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
            _cuda.preference_backward((0, 1, 0, 0, 0.0), False, 2, 0, 0, 1, 1, 1, 1)
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

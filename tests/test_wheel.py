"""The built wheel and sdist in fresh environments, used outside the source tree. `make test-wheel` builds and runs this.

Interpreters: those called python3.11 to python3.14 on PATH or in DPO_FAST_PYTHONS (separated as PATH is).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import dpo_fast

ROOT = Path(__file__).resolve().parents[1]
DIST = os.environ.get("DPO_FAST_DIST")
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not DIST, reason="no wheel to test: make test-wheel"),
    pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux"),
]

TORCH = "torch==2.13.0"
NUMPY_SMOKE = """
    import sys, numpy as np, dpo_fast, dpo_fast.numpy, dpo_fast.reference
    assert "torch" not in sys.modules and "site-packages" in dpo_fast.__file__
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 16, 9000)).astype(np.float32), rng.integers(0, 9000, (4, 16))
    y[:, :3] = -100
    dpo_fast.set_num_threads(2)
    out, grad = dpo_fast.numpy.dpo_loss(x, y, with_grad=True)
    logps = dpo_fast.reference.sequence_logps(x, y)
    assert np.abs(out.logps - logps).max() < 1e-3, (out.logps, logps)
    assert grad.shape == x.shape and np.abs(grad).max() > 0 and not grad[:, :3].any()
    print(np.__version__, out.loss)
"""
TORCH_SMOKE = """
    import torch, dpo_fast
    from dpo_fast.integrations.liger import FusedLinearDPOLoss
    torch.manual_seed(0)
    x = torch.randn(4, 16, 9000, requires_grad=True)
    y = torch.randint(0, 9000, (4, 16))
    def naive(x):
        logps = torch.log_softmax(x.double(), -1).gather(-1, y[..., None])[..., 0].sum(-1)
        return -torch.nn.functional.logsigmoid(0.1 * (logps[:2] - logps[2:])).mean()
    loss = dpo_fast.dpo_loss(x, y).loss
    [grad], [expected] = torch.autograd.grad(loss, x), torch.autograd.grad(naive(x), x)
    assert abs(loss - naive(x)) < 1e-5 and torch.allclose(grad, expected, atol=1e-6)
    h, w = torch.randn(4, 16, 32, requires_grad=True), torch.randn(9000, 32, requires_grad=True)
    loss = dpo_fast.linear_dpo_loss(h, w, y).loss
    assert abs(loss - naive(h @ w.t())) < 1e-4
    loss.backward()
    assert w.grad.abs().max() > 0
    [runtime] = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}  # one pool of threads
    print(torch.__version__, runtime)
"""


def interpreters():
    """(version, path) of each Python there is, from 3.11 to 3.14."""
    found = {".".join(map(str, sys.version_info[:2])): getattr(sys, "_base_executable", sys.executable)}
    path = os.environ.get("DPO_FAST_PYTHONS", "") + os.pathsep + os.environ["PATH"]
    roots = [Path(root, "versions") for root in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv") if root]
    path += "".join(os.pathsep + str(folder) for root in roots for folder in sorted(root.glob("3.*/bin")))
    for version in ("3.11", "3.12", "3.13", "3.14"):
        for folder in filter(None, path.split(os.pathsep)):
            candidate = Path(folder, f"python{version}")
            if version not in found and candidate.exists():
                run = subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True, check=False)
                if run.returncode == 0:  # pyenv's shims are there also for what is not selected
                    found[version] = str(candidate)
    return sorted(found.items())


PYTHONS = interpreters() if DIST else []


def dist_file(pattern: str) -> Path:
    [path] = (ROOT / DIST).glob(pattern)
    return path


class Environment:
    """A virtual environment with nothing of this machine's on its PATH but itself."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        self.folder = folder
        subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
        self.bin = folder / "venv/bin"
        # what pip needs to reach its index stays; compilers, settings of dpo_fast and of Python go
        gone = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "CUDA_HOME", "CXX")
        self.env = {k: v for k, v in os.environ.items() if k not in gone and not k.startswith("DPO_FAST")}
        self.env["PATH"] = str(self.bin)

    def run(self, *command: str, expect: int = 0, **env: str) -> str:
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=self.folder,
            env={**self.env, **env},
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    def install(self, *what: object, **env: str) -> None:
        self.run("python", "-m", "pip", "install", "--quiet", *map(str, what), **env)

    def python(self, code: str, expect: int = 0, **env: str) -> str:
        return self.run("python", "-c", textwrap.dedent(code), expect=expect, **env)


def test_wheel_holds_the_package_and_nothing_else():
    wheel = dist_file("*.whl")
    assert re.fullmatch(rf"dpo_fast-{re.escape(dpo_fast.__version__)}-cp311-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_fast").rglob("*.py*")}
    expected = {name for name in sources if name.endswith((".py", ".pyi"))} | {"dpo_fast/py.typed"}
    expected |= {"dpo_fast/_cpu.abi3.so", "dpo_fast/libs/libgomp.so.1", "dpo_fast/libs/libgomp.so.1.LICENSE"}
    if dpo_fast._native.has_cuda_kernels():
        expected.add("dpo_fast/_cuda.abi3.so")
    assert names == expected


def test_sdist_has_every_source_and_no_built_file():
    with tarfile.open(dist_file("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("dpo_fast/**/*.p[xy]*")]:
        if path.suffix != ".pyc":
            assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "build/"))]


@pytest.mark.parametrize(("version", "path"), PYTHONS, ids=[version for version, _ in PYTHONS])
def test_numpy_level_on_each_python(tmp_path, version, path):
    """Without torch and without a compiler on PATH; NumPy as pip chooses it."""
    env = Environment(tmp_path, path)
    env.install(dist_file("*.whl"))
    env.python(NUMPY_SMOKE)
    env.python(NUMPY_SMOKE, DPO_FAST_ISA="portable")
    said = env.python("import dpo_fast; dpo_fast.linear_dpo_loss", expect=1)
    assert "ImportError: dpo_fast.linear_dpo_loss needs PyTorch, which is not installed: `pip install torch`" in said
    said = env.run("dpo-fast", "info")
    assert dpo_fast.__version__ in said
    assert re.search(r"torch +not installed", said)
    assert re.search(r"CUDA build +" + ("CUDA 1" if dpo_fast._native.has_cuda_kernels() else "none"), said)
    assert "libs/libgomp.so.1" in env.python("import dpo_fast.numpy; print(open('/proc/self/maps').read())")


def test_processor_without_avx(tmp_path):
    """x86-64-v2, as qemu imitates it: nothing that such a processor does not know is run."""
    qemu = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64" or not qemu:
        pytest.skip("needs x86-64 and qemu's user emulation")
    env = Environment(tmp_path)
    env.install(dist_file("*.whl"))
    python = os.path.realpath(env.bin / "python")
    for cpu, isa in (("Nehalem", "portable"), ("Haswell", "avx2")):
        code = textwrap.dedent(NUMPY_SMOKE) + f"from dpo_fast import _cpu; assert _cpu.isa() == '{isa}', _cpu.isa()"
        [packages] = env.folder.glob("venv/lib/python*/site-packages")
        command = [qemu, "-cpu", cpu, python, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(packages)}, check=False
        )
        assert done.returncode == 0, done.stderr


def test_oldest_numpy(tmp_path):
    old = [path for version, path in PYTHONS if version in ("3.11", "3.12")]
    if not old:
        pytest.skip("NumPy 1.26 has wheels up to Python 3.12")
    env = Environment(tmp_path, old[0])
    env.install("numpy==1.26.4", dist_file("*.whl"))
    assert env.python(NUMPY_SMOKE).startswith("1.26.4")


def test_torch_level_and_types(tmp_path):
    """With torch: all levels, whichever library comes first; mypy sees the installed copy's types."""
    env = Environment(tmp_path)
    env.install(TORCH, "numpy", "mypy", dist_file("*.whl"))
    assert "torch/lib" in env.python(TORCH_SMOKE)  # torch's own OpenMP runtime, not the wheel's
    assert "dpo_fast/libs" in env.python("import dpo_fast.numpy\n" + textwrap.dedent(TORCH_SMOKE))
    assert re.search(r"torch +2\.13", env.run("dpo-fast", "info"))
    (tmp_path / "user.py").write_text(
        "import dpo_fast, torch\n"
        "x = torch.zeros(2, 1, 5)\n"
        "reveal_type(dpo_fast.dpo_loss(x, torch.zeros(2, 1).long()).loss)\n"
        "from dpo_fast import _cpu\n"
        "reveal_type(_cpu.isas())\n"
        "dpo_fast.dpo_loss(x)\n"
    )
    said = env.run("mypy", "--strict", "user.py", expect=1)
    assert re.search(r'Revealed type is "(torch\._tensor\.)?Tensor"', said), said
    assert re.search(r'Revealed type is "(builtins\.)?list\[.*tuple\[.*str, (builtins\.)?bool', said), said
    assert said.count("error:") == 1, said
    assert 'Missing positional argument "targets"' in said


def test_sdist_builds_in_isolation_without_nvcc(tmp_path):
    env = Environment(tmp_path)
    compilers = [str(Path(tool).parent) for tool in map(shutil.which, ("g++", "ld")) if tool]
    env.env["PATH"] = os.pathsep.join([str(env.bin), *compilers])
    if shutil.which("nvcc", path=env.env["PATH"]):
        pytest.skip("nvcc stands beside g++")
    env.install(dist_file("*.tar.gz"))
    env.python(NUMPY_SMOKE)
    assert re.search(r"CUDA build +none", env.run("dpo-fast", "info"))


def test_editable_install_is_built_again_when_a_source_changes(tmp_path):
    env = Environment(tmp_path)
    env.env["PATH"] += os.pathsep + os.environ["PATH"]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("dpo_fast", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    env.install("--upgrade", "setuptools", "Cython", "numpy")
    install = ("--no-build-isolation", "--no-deps", "-e", source)
    env.install(*install, DPO_FAST_CUDA="0")
    names = "from dpo_fast import _cpu; print(_cpu.isas())"
    assert "portable" in env.python(names)
    rows, kernels = source / "dpo_fast/_cpu.pyx", source / "csrc/cpu/rows_isa.cpp"
    rows.write_text(
        rows.read_text().replace("def isas():\n", 'def isas():\n    return "changed"\n\n\ndef all_isas():\n')
    )
    kernels.write_text(kernels.read_text() + '\nstatic const char kChanged[] __attribute__((used)) = "a new source";\n')
    env.install(*install, DPO_FAST_CUDA="0")
    assert "changed" in env.python(names)
    [module] = (source / "dpo_fast").glob("_cpu*.so")
    assert b"a new source" in module.read_bytes()

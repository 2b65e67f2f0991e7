"""The package from outside: lazy imports, the command, the built module, forked children, missing memory."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import dpo_fast
from dpo_fast import _cpu, cli


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def test_numpy_level_does_not_import_torch():
    run = python("""
        import sys, numpy as np, dpo_fast.numpy, dpo_fast.reference
        x = np.zeros((2, 1, 3), np.float32)
        out, grad = dpo_fast.numpy.dpo_loss(x, np.zeros((2, 1), np.int64), with_grad=True)
        assert abs(out.loss - np.log(2)) < 1e-6 and out.metrics()
        dpo_fast.set_num_threads(1)
        assert "torch" not in sys.modules
    """)
    assert run.returncode == 0, run.stderr


def test_every_public_name_loads():
    for name in dpo_fast.__all__:
        assert getattr(dpo_fast, name) is not None
        assert name in dir(dpo_fast)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = dpo_fast.nope


def test_module_is_abi3_and_imports_no_torch_symbol():
    path = Path(_cpu.__file__)
    assert ".abi3." in path.name
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    assert "Py" in symbols.stdout
    assert not re.search("c10|at::|torch", symbols.stdout)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's instruction sets")
def test_only_the_functions_of_wider_sets_use_wider_instructions():
    """What runs before the processor is asked, and the portable set, keep to SSE2: no VEX or EVEX instruction."""
    path = Path(_cpu.__file__)
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    wide: dict[bool, set[str]] = {True: set(), False: set()}
    function = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"\t(v[a-z]\w+|k(mov|ortest|and|or|xor|not)[bwdq]) ", line):
            wide["::avx2::" in function or "::avx512" in function].add(function)
    assert wide[True]  # the names are there to be read
    assert not wide[False]


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (dpo_fast.__version__, torch.__version__, _cpu.isa(), "CUDA build", "threads", "portable"):
        assert expected in text


def test_info_as_a_module_with_a_forced_instruction_set():
    run = subprocess.run(
        [sys.executable, "-m", "dpo_fast", "info"],
        capture_output=True,
        text=True,
        env={**os.environ, "DPO_FAST_ISA": "portable"},
        check=True,
    )
    assert re.search(r"instruction set +portable;", run.stdout)


def test_unknown_instruction_set_is_an_error():
    run = python("import dpo_fast.numpy", DPO_FAST_ISA="sse9")
    assert run.returncode != 0
    assert "instruction set 'sse9' cannot be used here" in run.stderr


def test_omp_num_threads_is_followed():
    run = python("import dpo_fast; print(dpo_fast.get_num_threads())", OMP_NUM_THREADS="3,2")
    assert run.stdout.strip() == "3"
    run = python("import dpo_fast; print(dpo_fast.get_num_threads())", OMP_NUM_THREADS="99999", DPO_FAST_ISA="")
    assert run.stdout.strip() == "1024"


def test_a_folder_without_the_compiled_modules_is_named(tmp_path):
    shutil.copytree(Path(dpo_fast.__file__).parent, tmp_path / "dpo_fast", ignore=shutil.ignore_patterns("*.so"))
    # without what an editable install adds, which finds the modules wherever the package is
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import dpo_fast.numpy"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert f"ImportError: dpo_fast's compiled kernels are not in {tmp_path}/dpo_fast: in the source" in run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child_works():
    """After the parent has used its threads, a child must not wait for threads that it does not have."""
    run = python("""
        import os, numpy as np, dpo_fast.numpy as dn
        dn.set_num_threads(2)
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(8, 4, 8192)).astype(np.float32), rng.integers(0, 8192, (8, 4))
        expected = dn.dpo_loss(x, y).loss
        child = os.fork()
        if child == 0:
            os._exit(0 if dn.dpo_loss(x, y).loss == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)
    assert run.returncode == 0, run.stderr


def test_forked_child_of_torch_works():
    run = python("""
        import os, torch, dpo_fast
        torch.set_num_threads(2)
        x, y = torch.randn(8, 4, 8192), torch.randint(0, 8192, (8, 4))
        expected = dpo_fast.dpo_loss(x, y).loss
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(dpo_fast.dpo_loss(x, y).loss, expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)
    assert run.returncode == 0, run.stderr


def test_calls_from_several_python_threads():
    """The kernels release the interpreter's lock and share nothing."""
    from concurrent.futures import ThreadPoolExecutor

    x, y = torch.randn(4, 8, 8192), torch.randint(0, 8192, (4, 8))
    expected = dpo_fast.dpo_loss(x, y).logps

    def call(_):
        return torch.equal(dpo_fast.dpo_loss(x, y).logps, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))

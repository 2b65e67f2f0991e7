"""Instructions per logit of every row kernel, counted by callgrind: a guard against slow kernels that no clock disturbs.

`python tests/test_instruction_counts.py` counts again and rewrites the table (instruction_counts.json); do that with a
change that is meant to change the counts, and say in its message why.

callgrind knows no AVX-512, so these are the counts of the AVX2 and the portable kernels. They come from the same
source; what is slow in all of them is seen.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("instruction_counts.json")
ISAS = ("avx2", "portable")
N_LOGITS = 32000
TOLERANCE = 0.05  # compilers of one major version differ by less, a lost optimization does not


def compiler() -> str:
    """What the counts depend on beside the source: for instance `g++ 12`."""
    run = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True)
    return f"g++ {run.stdout.strip().split('.')[0]}"


def setup_variables() -> dict[str, object]:
    """ISA_FLAGS and CXX_FLAGS of setup.py, without running its setup()."""
    source = (ROOT / "setup.py").read_text().split("\ncpu = Extension(")[0]
    names: dict[str, object] = {}
    exec(compile(source, "setup.py", "exec"), names)
    return names


def count(folder: Path) -> dict[str, float]:
    """Builds the driver as setup.py builds the kernels and runs it under callgrind: instructions per logit."""
    names = setup_variables()
    flags, isa_flags = names["CXX_FLAGS"], names["ISA_FLAGS"]
    compiles = [
        [
            "g++",
            *flags,
            *isa,
            f"-DDPO_FAST_ISA={name}",
            "-Icsrc",
            "-c",
            "csrc/cpu/rows_isa.cpp",
            "-o",
            folder / f"{name}.o",
        ]
        for name, isa in isa_flags.items()
    ]
    running = [subprocess.Popen(list(map(str, command)), cwd=ROOT) for command in compiles]
    assert all(process.wait() == 0 for process in running)
    driver = folder / "driver"
    objects = [str(folder / f"{name}.o") for name in isa_flags]
    sources = ["tests/instruction_counts.cpp", "csrc/cpu/rows.cpp"]
    subprocess.run(["g++", *flags, "-Icsrc", *sources, *objects, "-o", str(driver)], cwd=ROOT, check=True)
    run = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=measured",
            "--dump-after=measured",
            f"--callgrind-out-file={folder / 'out'}",
            str(driver),
            *ISAS,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    counts = {}
    for number, name in enumerate(run.stdout.splitlines(), 1):
        found = re.search(r"^(?:totals|summary): (\d+)", (folder / f"out.{number}").read_text(), re.MULTILINE)
        assert found is not None
        counts[name] = round(int(found[1]) / N_LOGITS, 3)
    return counts


def reason_to_skip() -> str | None:
    """Why nothing can be counted here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the table is for x86-64, this is {platform.machine()}"
    for program in ("valgrind", "g++"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not (ROOT / "csrc").is_dir():
        return "the kernels' sources are not here"
    return None


def test_instructions_per_logit(tmp_path):
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    pytest.importorskip("Cython", reason="setup.py, which has the compiler's flags, needs Cython")
    table = json.loads(TABLE.read_text())
    if compiler() not in table:
        pytest.skip(f"the table is for {', '.join(table)}, this is {compiler()}")
    expected, found = table[compiler()], count(tmp_path)
    assert found.keys() == expected.keys()
    wrong = {
        name: f"{expected[name]} -> {found[name]} ({found[name] / expected[name] - 1:+.1%})"
        for name in expected
        if abs(found[name] / expected[name] - 1) > TOLERANCE
    }
    assert not wrong, f"instructions per logit changed by more than {TOLERANCE:.0%}: {wrong}"


def main() -> int:
    reason = reason_to_skip()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        table[compiler()] = count(Path(folder))
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(TABLE.read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

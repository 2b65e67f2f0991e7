"""A C++ compiler for wheels: compiles with g++, links against an older glibc than this machine's.

Set as CXX="python tools/cxx_for_glibc.py 2.28" (PyPI's ziglang has to be installed). Linked by g++, a library asks for
the newest versions of this machine's glibc symbols, whichever it needs; zig knows those of every release. Only the
module's own entry stays visible: the CUDA runtime inside must not meet another one in the process.
"""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

EXPORTS = "{ global: PyInit_*; local: *; };"


def library(name):
    """Where g++ finds a library of its own."""
    run = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def link(glibc, args):
    with tempfile.TemporaryDirectory() as folder:
        exports = Path(folder, "exports.map")
        exports.write_text(EXPORTS)
        kept = [arg for arg in args if arg not in ("-fopenmp", "-Wl,--exclude-libs,ALL", "-g")]
        if "-fopenmp" in args:
            kept.append(library("libgomp.so"))
        target = f"{platform.machine()}-linux-gnu.{glibc}"
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-s", *kept]
        # libgcc.a: which processor this is, __builtin_cpu_supports
        command += [library("libstdc++.so"), library("libgcc.a"), f"-Wl,--version-script={exports}"]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    glibc, *args = sys.argv[1:]
    if "-shared" in args:
        sys.exit(link(glibc, args))
    os.execvp("g++", ["g++", *args])

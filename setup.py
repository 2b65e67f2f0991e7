"""Builds the native kernels. Everything else about the package stands in pyproject.toml."""

import os
import platform
import shlex

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Instruction sets that csrc/cpu/rows_isa.cpp is compiled for, and what each needs from the compiler. `portable` is the
# baseline of the machine: SSE2 on x86-64, NEON on aarch64.
ISA_FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    }
# No contraction, no fast-math: the kernels say themselves where a fused multiply-add stands. -fno-math-errno and
# -fno-trapping-math change no result.
CXX_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-fvisibility=hidden", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
CXX_FLAGS += shlex.split(os.environ.get("DPO_FAST_CXXFLAGS", ""))
LINK_FLAGS = ["-fopenmp", *shlex.split(os.environ.get("DPO_FAST_LDFLAGS", ""))]

HEADERS = ["csrc/row_math.h", "csrc/preference_loss.h", "csrc/cpu/rows.h", "csrc/cpu/simd.h"]
ROWS_ISA = "csrc/cpu/rows_isa.cpp"

if os.environ.get("DPO_FAST_CUDA") == "1":
    raise SystemExit("DPO_FAST_CUDA=1: this version of dpo_fast has no CUDA kernels; unset it or set it to 0")


class BuildExt(build_ext):
    """Compiles rows_isa.cpp once per instruction set and links the objects into the extension."""

    def build_extension(self, ext):
        objects = []
        for isa, flags in ISA_FLAGS.items():
            [compiled] = self.compiler.compile(
                [ROWS_ISA],
                output_dir=os.path.join(self.build_temp, isa),
                include_dirs=ext.include_dirs,
                extra_postargs=[*CXX_FLAGS, *flags, f"-DDPO_FAST_ISA={isa}"],
                depends=ext.depends,
            )
            objects.append(compiled)
        ext.extra_objects = objects
        super().build_extension(ext)


cpu = Extension(
    "dpo_fast._cpu",
    sources=["dpo_fast/_cpu.pyx", "csrc/cpu/rows.cpp"],
    depends=[*HEADERS, ROWS_ISA],
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030B0000"), ("CYTHON_LIMITED_API", "1")],
    extra_compile_args=CXX_FLAGS,
    extra_link_args=LINK_FLAGS,
    py_limited_api=True,
    language="c++",
)

setup(
    ext_modules=cythonize([cpu], build_dir="build/cython", compiler_directives={"embedsignature": True}),
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Builds the native kernels. Everything else about the package is in pyproject.toml."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Instruction sets that ISA_SOURCES are compiled for, and what each needs from the compiler. `portable` is the baseline
# of the machine: SSE2 on x86-64, NEON on aarch64.
ISA_FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    }
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
# No contraction, no fast-math: the kernels say themselves where to fuse a multiply-add. -fno-math-errno and
# -fno-trapping-math change no result.
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-fvisibility=hidden", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
CXX_FLAGS += shlex.split(os.environ.get("DPO_FAST_CXXFLAGS", ""))
LINK_FLAGS = shlex.split(os.environ.get("DPO_FAST_LDFLAGS", ""))
if sys.platform != "darwin":  # Apple's compiler brings no OpenMP: the loops run in one thread there
    CXX_FLAGS.append("-fopenmp")
    LINK_FLAGS.append("-fopenmp")

# One build for every Python from 3.11 on; free-threaded ones have no limited API and get a build of their own.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
LIMITED_API = [] if FREE_THREADED else [("Py_LIMITED_API", "0x030B0000"), ("CYTHON_LIMITED_API", "1")]
CYTHON_DIRECTIVES = {"embedsignature": True, "freethreading_compatible": True}

HEADERS = [f"csrc/{name}.h" for name in ("row_math", "preference_loss", "sequence_math")]  # shared by CPU and CUDA
CPU_HEADERS = [
    f"csrc/cpu/{name}.h"
    for name in ("batch", "exponential", "fresh_memory", "rows", "simd", "sparse_head", "transform")
]
# Included by both bindings; Cython finds only the .pxd by itself.
BINDING_PARTS = ["dpo_fast/_declarations.pxd", "dpo_fast/_parse.pxi"]
ISA_SOURCES = ["csrc/cpu/rows_isa.cpp", "csrc/cpu/sparse_isa.cpp"]

# The one that takes longest first, so that the processors end together.
CUDA_SOURCES = [f"csrc/cuda/{name}.cu" for name in ("losses", "float64", "bfloat16", "float16", "float32", "launch")]
CUDA_HEADERS = [f"csrc/cuda/{name}.h" for name in ("launch", "device", "forward", "backward", "losses")]
# Compute capabilities, as far as the nvcc found knows them; the newest also as PTX, for GPUs to come.
CUDA_ARCHS = ["80", "86", "89", "90", "100", "120"]
# As on the CPU: the kernels say themselves where to fuse a multiply-add.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_OBJECTS, PTXAS_REPORT = Path("build/cuda"), Path("build/ptxas.txt")


def find_nvcc():
    """The nvcc to build with, or None to build without CUDA; prints which. DPO_FAST_CUDA: 1 needs it, 0 skips it."""
    wanted = os.environ.get("DPO_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"DPO_FAST_CUDA must be 0, 1 or unset, found {wanted!r}")
    if wanted == "0":
        print("dpo_fast: without CUDA kernels (DPO_FAST_CUDA=0)")
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH, and CUDA_HOME is not set"
        if wanted == "1":
            raise SystemExit(f"DPO_FAST_CUDA=1, but there is no nvcc {where}")
        print(f"dpo_fast: without CUDA kernels (no nvcc {where})")
    return nvcc


def cuda_archs(nvcc):
    """Architectures to compile for, by DPO_FAST_CUDA_ARCHS (such as "80;90") or the default."""
    run = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [line.removeprefix("compute_") for line in run.stdout.split()]
    asked = os.environ.get("DPO_FAST_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    asked = [arch.removeprefix("sm_").replace(".", "") for arch in asked]
    unknown = [arch for arch in asked if arch not in known]
    if unknown:
        raise SystemExit(f"DPO_FAST_CUDA_ARCHS: {nvcc} does not know {unknown}, only {known}")
    return asked or [arch for arch in CUDA_ARCHS if arch in known]


def cuda_folders(nvcc):
    """Where this nvcc's headers and libraries are: it knows best itself."""
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    [top] = [line.split("=", 1)[1].strip() for line in run.stderr.splitlines() if line.startswith("#$ TOP=")]
    libraries = [Path(top, name) for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    return str(Path(top, "include")), [str(path) for path in libraries if (path / "libcudart_static.a").exists()]


class BuildExt(build_ext):
    """Compiles ISA_SOURCES once per instruction set and the .cu files with nvcc, and links them in."""

    def build_extension(self, ext):
        ext.extra_objects = self.cuda_objects(ext) if ext.name.endswith("_cuda") else self.isa_objects(ext)
        super().build_extension(ext)

    def isa_objects(self, ext):
        objects = []
        for isa, flags in ISA_FLAGS.items():
            objects += self.compiler.compile(
                ISA_SOURCES,
                output_dir=os.path.join(self.build_temp, isa),
                include_dirs=ext.include_dirs,
                extra_postargs=[*CXX_FLAGS, *flags, f"-DDPO_FAST_ISA={isa}"],
                depends=ext.depends,
            )
        return objects

    def cuda_objects(self, ext):
        """Compiles the .cu files, as many at a time as there are processors; ptxas's report goes into a file.

        An object whose sources, flags and compiler are as they were is not made again: it takes minutes.
        """
        archs = cuda_archs(NVCC)
        flags = [*NVCC_FLAGS, *[f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]]
        flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        CUDA_OBJECTS.mkdir(parents=True, exist_ok=True)
        version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
        headers = b"".join(Path(header).read_bytes() for header in [*HEADERS, *CUDA_HEADERS])
        common = version + " ".join(flags).encode() + headers

        def compile_one(source):
            out = CUDA_OBJECTS / Path(source).with_suffix(".o").name
            made_from, report = out.with_suffix(".sha256"), out.with_suffix(".ptxas")
            digest = hashlib.sha256(common + Path(source).read_bytes()).hexdigest()
            if not (made_from.exists() and made_from.read_text() == digest):
                made_from.unlink(missing_ok=True)
                command = [NVCC, *flags, "-c", source, "-o", str(out)]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode != 0:
                    raise SystemExit(f"nvcc failed on {source}:\n{run.stdout}{run.stderr}")
                report.write_text(run.stderr)
                made_from.write_text(digest)
            return str(out), report.read_text()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(compile_one, CUDA_SOURCES))
        PTXAS_REPORT.write_text("".join(report for _, report in results))
        return [out for out, _ in results]


cpu = Extension(
    "dpo_fast._cpu",
    sources=[
        "dpo_fast/_cpu.pyx",
        *[f"csrc/cpu/{name}.cpp" for name in ("batch", "fresh_memory", "rows", "sparse_head")],
    ],
    depends=[*HEADERS, *CPU_HEADERS, *BINDING_PARTS, *ISA_SOURCES],
    include_dirs=["csrc"],
    define_macros=LIMITED_API,
    extra_compile_args=CXX_FLAGS,
    extra_link_args=LINK_FLAGS,
    py_limited_api=not FREE_THREADED,
    language="c++",
)

extensions = [cpu]
NVCC = find_nvcc()
if NVCC is not None:
    names = [f"sm_{arch}" for arch in cuda_archs(NVCC)]
    names.append(names[-1].replace("sm_", "compute_"))
    print(f"dpo_fast: with CUDA kernels for {', '.join(names)}, by {NVCC}")
    cuda_include, cuda_libraries = cuda_folders(NVCC)
    extensions.append(
        Extension(
            "dpo_fast._cuda",
            sources=["dpo_fast/_cuda.pyx"],
            depends=[*HEADERS, *CUDA_HEADERS, *BINDING_PARTS, *CUDA_SOURCES],
            include_dirs=["csrc", cuda_include],
            library_dirs=cuda_libraries,
            # the static runtime: no CUDA library need be installed where the package is used
            libraries=["cudart_static", "dl", "rt", "pthread"],
            define_macros=[*LIMITED_API, ("DPO_FAST_CUDA_ARCHS", '"' + " ".join(names) + '"')],
            extra_compile_args=CXX_FLAGS,
            # its symbols stay inside: another library in the process may bring another version of the runtime
            extra_link_args=[*LINK_FLAGS, "-Wl,--exclude-libs,ALL"],
            py_limited_api=not FREE_THREADED,
            language="c++",
        )
    )

setup(
    ext_modules=cythonize(extensions, build_dir="build/cython", compiler_directives=CYTHON_DIRECTIVES),
    cmdclass={"build_ext": BuildExt},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)

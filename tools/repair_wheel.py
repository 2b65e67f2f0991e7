"""Makes a built Linux wheel one that can be shared: `python tools/repair_wheel.py WHEEL FOLDER [--glibc 2.28]`.

Puts a copy of the OpenMP runtime (libgomp) into the wheel and lets auditwheel give the tag. The copy keeps its name,
libgomp.so.1: a process in which torch has loaded its own goes on with that one, so that there is one pool of threads;
auditwheel by itself would rename it, and with it make a second pool. Needs auditwheel, patchelf and, for --glibc, lief.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RUNTIME = "libgomp.so.1"
LICENSES = ("/usr/share/doc/libgomp1/copyright", "/usr/share/licenses/libgomp/COPYING.RUNTIME")
NOTICE = """libgomp.so.1 is GCC's GNU Offloading and Multi Processing Runtime Library; its code is unchanged.
Licence: GPL version 3 with the GCC Runtime Library Exception 3.1 (https://www.gnu.org/licenses/gcc-exception-3.1.html).
Sources: https://gcc.gnu.org/git/gcc.git and the distribution that the wheel was built on.
"""


def run(*command):
    """Runs a command, first of all one of this environment's, and returns what it printed."""
    env = os.environ | {"PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}
    command = [shutil.which(command[0], path=env["PATH"]) or command[0], *[str(part) for part in command[1:]]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def find_runtime(module):
    """The libgomp that the dynamic linker gives this module here."""
    [found] = re.findall(rf"{re.escape(RUNTIME)} => (\S+)", run("ldd", module))
    return Path(found).resolve()


def is_newer(version, glibc):
    """Whether a symbol's version, such as GLIBC_2.34, is of a later glibc than `glibc`."""
    name, _, number = version.partition("_")
    return name == "GLIBC" and [int(part) for part in number.split(".")] > [int(part) for part in glibc.split(".")]


def forget_newer_versions(library, glibc):
    """Lets a library load with an older glibc: its symbols of later versions become symbols of any version.

    glibc 2.34 moved threads and dlopen into libc.so and gave them a version of that name; what they do is as before.
    """
    import lief

    binary = lief.parse(str(library))
    for symbol in binary.dynamic_symbols:
        version = symbol.symbol_version
        if version and version.has_auxiliary_version and is_newer(version.symbol_version_auxiliary.name, glibc):
            version.drop_version(1)  # 1: global, without a version
    for needed in binary.symbols_version_requirement:
        for requirement in list(needed.get_auxiliary_symbols()):
            if is_newer(requirement.name, glibc):
                needed.remove_aux_requirement(requirement)
    for name in ("libpthread.so.0", "libdl.so.2"):
        binary.add_library(name)
    binary.write(str(library))


def bundle(package, glibc):
    """Puts libgomp and its licence into the unpacked wheel's package and makes the module look there."""
    [module] = package.glob("_cpu*.so")
    libs = package / "libs"
    libs.mkdir()
    copy = libs / RUNTIME
    shutil.copyfile(find_runtime(module), copy)
    if glibc:
        forget_newer_versions(copy, glibc)
    copy.chmod(0o755)
    texts = [Path(name).read_text() for name in LICENSES if Path(name).exists()]
    (libs / f"{RUNTIME}.LICENSE").write_text("\n".join([NOTICE, *texts]))
    run("patchelf", "--set-rpath", "$ORIGIN/libs", module)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the repaired wheel goes")
    parser.add_argument("--glibc", help="make libgomp, too, run on this one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        run("wheel", "unpack", "--dest", work / "unpacked", args.wheel)
        [root] = (work / "unpacked").iterdir()
        bundle(root / "dpo_fast", args.glibc)
        run("wheel", "pack", "--dest-dir", work, root)
        [packed] = work.glob("*.whl")
        print(run("auditwheel", "show", packed).strip())
        tag = f"manylinux_{args.glibc.replace('.', '_')}_{platform.machine()}" if args.glibc else "auto"
        print(run("auditwheel", "repair", "--only-plat", "--plat", tag, "--wheel-dir", args.folder, packed).strip())


if __name__ == "__main__":
    main()

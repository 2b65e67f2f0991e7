#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer beside the ordinary build and runs the
# kernel tests on them. Needs the environment that the Makefile makes (make sanitize).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${VENV:-.venv}/bin/python")
work=build/sanitize
rm -rf "$work" && mkdir -p "$work"
cp -r setup.py pyproject.toml README.md LICENSE csrc dpo_fast tests "$work"
rm -f "$work"/dpo_fast/*.so
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
(cd "$work" && DPO_FAST_CUDA=0 DPO_FAST_CXXFLAGS="$flags -O1" DPO_FAST_LDFLAGS="$flags" "$python" setup.py -q build_ext --inplace)
preload=$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)
# torch and Python never free some of their own memory: leaks are not what is looked for
cd "$work" && LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider \
  tests/test_bindings.py tests/test_kernels.py tests/test_numpy.py tests/test_inplace.py tests/test_bad_input.py \
  -k "not mapping and not 2_31 and not peak_memory" "$@"

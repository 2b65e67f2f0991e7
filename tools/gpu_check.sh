#!/usr/bin/env bash
# Everything that a machine with a GPU can tell, in one go of under 9 minutes: build, tests, compute-sanitizer,
# benchmarks. Logs and reports go into the folder given. Takes the environment that the Makefile makes, or PYTHON.
#   tools/gpu_check.sh FOLDER
# STEPS names some of the steps, to run only those. DPO_FAST_CUDA_ARCHS defaults to the GPU found, which shortens the build; MINUTES bounds the whole.
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_check.sh FOLDER}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
venv=${VENV:-.venv}
python=${PYTHON:-$([ -x "$venv/bin/python" ] && echo "$venv/bin/python" || echo python3)}
deadline=$((SECONDS + 60 * ${MINUTES:-9} - 15))
failed=()

# step NAME SECONDS COMMAND...: runs within its own limit and what is left of the whole; goes on after a failure.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status=0
  shift 2
  [[ -z "${STEPS:-}" || " $STEPS " == *" $name "* ]] || return 0
  if ((left < 5)); then
    echo "== $name: no time left"
    failed+=("$name (no time)")
    return 1
  fi
  echo "== $name"
  timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" > "$out/$name.txt" 2>&1 || status=$?
  tail -n "${SHOW:-12}" "$out/$name.txt"
  echo "== $name: $([ "$status" = 0 ] && echo passed || echo "failed ($status)") after $((SECONDS - start)) s"
  [ "$status" = 0 ] || failed+=("$name")
  return "$status"
}

if ! command -v nvidia-smi > /dev/null; then
  echo "no nvidia-smi: this machine has no NVIDIA GPU"
  exit 1
fi
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem --format=csv \
  | tee "$out/gpu.csv"
git log -1 --format='commit %H %s' 2> /dev/null
export DPO_FAST_CUDA=1
export DPO_FAST_CUDA_ARCHS=${DPO_FAST_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | tr -d . | tr '\n' ' ')}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

step build 300 "$python" setup.py build_ext --inplace || exit 1
cp -f build/ptxas.txt "$out/" 2> /dev/null
step info 60 "$python" -m dpo_fast info

# The tests of the extension itself, and all others that take a device.
step tests 240 "$python" -m pytest -q -p no:cacheprovider tests -k "cuda and not cuda_host"

# The report of few cases; `make bench-cuda` has them all.
step bench 200 "$python" -m benchmarks --device cuda --quick --no-step --output "$out/bench"

# A small suite, because the tools slow kernels down by an order of magnitude or more.
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck; do
    # without torch's cache, so that the tool sees each tensor's own bounds
    step "$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tools/gpu_small.py
  done
else
  echo "== compute-sanitizer is not installed: skipped"
fi

step small 60 "$python" tools/gpu_small.py

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[*]}"
  exit 1
fi
echo "all passed in $SECONDS s"

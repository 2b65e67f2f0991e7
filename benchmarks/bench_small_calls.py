"""Small calls of `dpo_loss`: what a call costs beside its arithmetic."""

import pytest

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP
from benchmarks.common.harness import compare

CASES = {"test_small_calls": shapes.small_cases}


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_small_calls(benchmark, recorder, case, work):
    names = [peers.FAST, peers.NAIVE, peers.COMPILE, peers.TRL]
    compare(benchmark, recorder, peers.DPO, case, work, names, wall=True, repeat=20, seconds=1)

"""Small calls of `dpo_loss`: what a call costs beside its arithmetic, with one shape and with another every time."""

import pytest

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP
from benchmarks.common.harness import compare, compare_varying

CASES = {"test_small_calls": shapes.small_cases, "test_varying_shapes": shapes.varying_cases}


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_small_calls(benchmark, recorder, case, work):
    names = [peers.FAST, peers.NAIVE, peers.COMPILE, peers.TRL]
    compare(benchmark, recorder, peers.DPO, case, work, names, wall=True, repeat=20, seconds=1)


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_varying_shapes(benchmark, recorder, case, work):
    names = [name + more for more in ("", peers.WEIGHTED) for name in (peers.FAST, peers.NAIVE)]
    compare_varying(benchmark, recorder, case, work, names)

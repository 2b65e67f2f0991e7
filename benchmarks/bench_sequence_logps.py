"""Sequence log-probs from logits: `sequence_logps`, padded and packed."""

import pytest

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP
from benchmarks.common.harness import compare

CASES = {"test_sequence_logps": shapes.level_cases}


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_sequence_logps(benchmark, recorder, case, work):
    first = [peers.FAST] if work == FORWARD else [peers.INPLACE, peers.PACKED]
    names = [*first, peers.READ, peers.COPY, peers.NAIVE, peers.TRL]
    compare(benchmark, recorder, peers.SEQUENCES, case, work, names, seconds=2)

"""Token log-probs from logits: `token_logps`, with all of its statistics and without."""

import pytest

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP
from benchmarks.common.harness import compare

CASES = {"test_token_logps": shapes.level_cases}


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_token_logps(benchmark, recorder, case, work):
    first = [peers.FAST, peers.EXTRAS] if work == FORWARD else [peers.INPLACE, peers.FAST]
    names = [*first, peers.READ, peers.COPY, *peers.LOGITS_PEERS]
    compare(benchmark, recorder, peers.TOKENS, case, work, names, seconds=2)

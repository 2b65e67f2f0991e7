"""The DPO loss from hidden states and the LM head: `linear_dpo_loss`, forward + backward."""

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import STEP
from benchmarks.common.harness import compare

CASES = {"test_linear_dpo_loss": shapes.linear_cases}


def test_linear_dpo_loss(benchmark, recorder, case):
    names = [peers.FAST, peers.PRODUCTS, *peers.LINEAR_PEERS]
    memory = (peers.FAST, *peers.LINEAR_PEERS) if case.ignored == 0.5 else ()
    compare(benchmark, recorder, peers.LINEAR, case, STEP, names, memory=memory, seconds=4)

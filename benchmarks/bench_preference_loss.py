"""The loss alone, from log-probs [S]: a call of microseconds."""

from benchmarks.common import peers
from benchmarks.common.formulas import STEP
from benchmarks.common.harness import compare
from dpo_fast.bench import Case

CASES = {
    "test_preference_loss": lambda device: [
        Case("log-probs", "float32", n_seqs, 1, device=device, vocab=1) for n_seqs in (2, 64, 4096)
    ]
}


def test_preference_loss(benchmark, recorder, case):
    names = [peers.FAST, peers.NAIVE, peers.COMPILE]
    compare(benchmark, recorder, peers.PREFERENCE, case, STEP, names, wall=True, repeat=20, seconds=1)

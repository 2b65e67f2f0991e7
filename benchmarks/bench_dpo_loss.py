"""The DPO loss from logits: `dpo_loss` on the shapes of the targets, on ignored tokens, and as V and T grow."""

import pytest

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import FORWARD, STEP
from benchmarks.common.harness import compare

CASES = {
    "test_dpo_loss": shapes.target_cases,
    "test_threads": lambda device: shapes.target_cases(device) if device == "cpu" else [],
    "test_ignored_tokens": shapes.ignored_cases,
    "test_growing_vocabulary": shapes.growth_by_vocab,
    "test_growing_length": shapes.growth_by_length,
}


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_dpo_loss(benchmark, recorder, case, work):
    own = peers.FAST if work == FORWARD else peers.INPLACE
    names = [own, peers.ROW_KERNELS, own + peers.HALF, peers.READ, peers.COPY, *peers.LOGITS_PEERS]
    if work == STEP:
        names.insert(1, peers.FAST)
    # the memory of one shape tells that of the other
    memory = (peers.INPLACE, peers.FAST, *peers.LOGITS_PEERS) if work == STEP and case.model == "Llama-3" else ()
    compare(benchmark, recorder, peers.DPO, case, work, names, memory=memory, seconds=5)


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_threads(benchmark, recorder, case, work):
    """Apart from the rest: a change in the number of threads is felt by the calls that follow it."""
    own = peers.FAST if work == FORWARD else peers.INPLACE
    names = [own, peers.READ, own + peers.ONE_THREAD, peers.READ + peers.ONE_THREAD]
    compare(benchmark, recorder, peers.THREADS, case, work, names, seconds=1)


@pytest.mark.parametrize("work", [FORWARD, STEP])
def test_ignored_tokens(benchmark, recorder, case, work):
    own = [peers.FAST] if work == FORWARD else [peers.INPLACE, peers.FAST]
    names = [*own, peers.READ, peers.COPY, *peers.LOGITS_PEERS]
    compare(benchmark, recorder, peers.DPO, case, work, names, seconds=2)


def growth(benchmark, recorder, case):
    names = [peers.INPLACE, peers.FAST, peers.READ, peers.COPY, *peers.LOGITS_PEERS]
    memory = (peers.INPLACE, peers.FAST, *peers.LOGITS_PEERS)
    compare(benchmark, recorder, peers.DPO, case, STEP, names, memory=memory, seconds=2)


def test_growing_vocabulary(benchmark, recorder, case):
    growth(benchmark, recorder, case)


def test_growing_length(benchmark, recorder, case):
    growth(benchmark, recorder, case)

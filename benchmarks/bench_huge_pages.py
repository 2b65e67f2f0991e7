"""The DPO loss from logits beside peers whose memory, too, comes in huge pages: most of their time is page faults."""

import os

import pytest

from benchmarks.common import peers, shapes
from benchmarks.common.formulas import STEP
from benchmarks.common.harness import compare

pytestmark = pytest.mark.skipif(
    os.environ.get("THP_MEM_ALLOC_ENABLE") != "1", reason="torch asks for huge pages with THP_MEM_ALLOC_ENABLE=1 alone"
)

CASES = {"test_huge_pages": lambda device: shapes.target_cases(device) if device == "cpu" else []}


def test_huge_pages(benchmark, recorder, case):
    names = [peers.INPLACE, peers.FAST, peers.READ, peers.COPY, peers.NAIVE, peers.COMPILE, peers.TRL]
    compare(benchmark, recorder, peers.HUGE_PAGES, case, STEP, names, seconds=5)

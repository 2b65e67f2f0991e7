"""The head's backward pass with `grad_tolerance`: selection and sparse products beside the dense ones they replace."""

import statistics
import time
from dataclasses import asdict

import pytest
import torch

import dpo_fast
from benchmarks.common import peers, shapes
from benchmarks.common.harness import MIN_ROUNDS, Record
from benchmarks.common.real_tokens import RealTokens, real_tokens
from dpo_fast._checks import LogitOptions
from dpo_fast._torch import register, sparse_head  # noqa: F401  (register: what `call` calls)
from dpo_fast._torch.head import HeadSums
from dpo_fast._torch.linear import _logits_gradient
from dpo_fast._torch.operators import TOKEN_FORWARD, Grads, Head, Rows, TokenForward, call
from dpo_fast.bench import no_garbage_collection

CASES = {"test_products": shapes.tolerance_products, "test_backward": shapes.tolerance_cases}
ROUNDS = 11


def inputs_of(case, flat):
    """Real tokens, or random hidden states of the same head, whose softmax leaves nothing to skip."""
    pytest.importorskip("transformers")
    real = real_tokens(case.rows)
    hidden = torch.randn(real.hidden.shape, generator=torch.Generator().manual_seed(0)) if flat else real.hidden
    dtype = getattr(torch, case.dtype)
    return RealTokens(hidden.to(dtype), real.weight.to(dtype), real.targets)


def row_gradients(n_rows):
    return torch.randn(n_rows, generator=torch.Generator().manual_seed(1)) / n_rows


def measure(benchmark, recorder, case, work, candidates, prepare):
    """Times candidates in turn; `prepare` runs before each, untimed."""
    records = {n: Record(peers.TOLERANCE, work, asdict(case), case.name, n) for n in candidates}
    recorder.records += records.values()
    first, *others = candidates

    def timed(name):
        prepare(name)
        started = time.perf_counter()
        candidates[name]()
        records[name].samples.append(time.perf_counter() - started)

    with no_garbage_collection():
        for name, function in candidates.items():
            prepare(name)
            function()
        benchmark.group = f"{peers.TOLERANCE}, {work}"
        rounds = MIN_ROUNDS if recorder.quick else ROUNDS
        benchmark.pedantic(lambda: timed(first), setup=lambda: [timed(name) for name in others] and None, rounds=rounds)
    for record in records.values():
        record.median_s = statistics.median(record.samples)
    benchmark.extra_info["median_ms"] = {name: 1e3 * r.median_s for name, r in records.items()}


def test_products(benchmark, recorder, case):
    """A tile of several: all products are added to sums that are there."""
    hidden, weight, targets = inputs_of(case, flat=False)
    logits = hidden @ weight.T
    z, dz = logits.clone(), torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    rows = Rows(targets, None, None, LogitOptions())
    tokens = call(TOKEN_FORWARD, z, TokenForward(rows, 0, True))
    grad, n_rows, needs = row_gradients(case.rows), case.rows, (True, True, False, False, False)
    sums = HeadSums(Head(weight, None, None, None, 1.0, 0), hidden, needs, 2, hidden.dtype)
    sums.add(dz, hidden, slice(None))

    def sparse(tolerance):
        head = Head(weight, None, None, None, 1.0, 0, tolerance, tolerance)
        tile = sparse_head.Tile(z, hidden, torch.arange(n_rows), rows, tokens.logps, tokens.stats, grad, None)

        def run():
            allowed = sparse_head.allowance(head, needs, Grads(grad), n_rows)
            assert sparse_head.add_tile(sums, tile, allowed, _logits_gradient) is not None

        return run

    candidates = {peers.TWO_PRODUCTS: lambda: sums.add(dz, hidden, slice(None))}
    candidates |= {name: sparse(tolerance) for name, tolerance in peers.TOLERANCES.items()}
    measure(benchmark, recorder, case, peers.REAL_PRODUCTS, candidates, lambda name: z.copy_(logits))


@pytest.mark.parametrize("flat", [False, True], ids=["real", "flat"])
def test_backward(benchmark, recorder, case, flat):
    """The whole backward pass of `linear_token_logps`, into new memory."""
    hidden, weight, targets = inputs_of(case, flat)
    grad, ready = row_gradients(case.rows), {}

    def forward(tolerance):
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
        return dpo_fast.linear_token_logps(*leaves, targets, grad_tolerance=tolerance).logps

    tolerances = {peers.EXACT: 0.0} | peers.TOLERANCES

    def prepare(name):
        ready.clear()
        ready[name] = forward(tolerances[name])

    candidates = {name: lambda name=name: ready[name].backward(grad) for name in tolerances}
    work = peers.FLAT_BACKWARD if flat else peers.REAL_BACKWARD
    measure(benchmark, recorder, case, work, candidates, prepare)

"""PackedSampler: budgets, whole examples, resuming anywhere, even ranks, and gradients that packing does not change."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

import dpo_fast
from dpo_fast.sampler import pack


def lengths_of(n: int, low: int = 20, high: int = 700) -> list[int]:
    rng = random.Random(n)
    return [rng.randint(low, high) for _ in range(n)]


def ranks_of(lengths, budget, world, epoch=0, seed=3):
    samplers = [dpo_fast.PackedSampler(lengths, budget, seed=seed, rank=r, world=world) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return samplers, [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("n", "budget"),
    [
        (1000, 2048),  # many windows
        (37, 1500),  # one window, batches split to be even
        (9, 100_000),  # all fit in one batch: split for every rank
        (200, 600),  # some examples longer than the budget
    ],
)
def test_every_example_once_within_the_budget(n, budget, world):
    lengths = lengths_of(n)
    for epoch in (0, 5):
        samplers, batches = ranks_of(lengths, budget, world, epoch)
        assert {len(b) for b in batches} == {len(samplers[0])}
        assert Counter(i for rank in batches for batch in rank for i in batch) == Counter(range(n))
        for batch in (b for rank in batches for b in rank):
            assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
        assert samplers[0].repeated == 0
        for step, ranks in enumerate(zip(*batches, strict=True)):
            assert samplers[0].examples_in(step) == sum(map(len, ranks))
        assert samplers[0].examples_in(0, len(samplers[0]) + 7) == n


def test_repeats_only_where_unavoidable():
    samplers, batches = ranks_of([10, 20, 30], 1000, world=8)
    found = Counter(i for rank in batches for batch in rank for i in batch)
    assert set(found) == {0, 1, 2}
    assert sum(found.values()) == 8
    assert samplers[0].repeated == 5
    samplers, batches = ranks_of([10] * 9, 10, world=4)  # all alone
    assert sorted(Counter(i for rank in batches for batch in rank for i in batch).values()) == [1] * 6 + [2] * 3


def test_orders():
    """The same for the same seed and epoch, another for others; in place of the epoch's, not after it."""
    lengths = lengths_of(300)
    _, [first] = ranks_of(lengths, 2048, 1)
    assert ranks_of(lengths, 2048, 1)[1] == [first]
    _, [later] = ranks_of(lengths, 2048, 1, epoch=1)
    _, [other] = ranks_of(lengths, 2048, 1, seed=4)
    sets = [{frozenset(b) for b in batches} for batches in (first, later, other)]
    assert len(sets[0] & sets[1]) < len(first) / 10  # other batches, not the same ones in another order
    assert len(sets[0] & sets[2]) < len(first) / 10
    sampler = dpo_fast.PackedSampler(lengths, 2048, seed=3)
    assert list(sampler) == list(sampler) == first


def test_the_plan_of_this_version():
    """A state is worth something only if the next version makes the same plan: a change here needs a new _STATE_VERSION."""
    found = ranks_of([5, 3, 8, 2, 9, 4, 7, 1], 12, world=2)[1]
    assert found == [[[4, 1], [6, 0]], [[2, 5], [3, 7]]]


@pytest.mark.parametrize("world", [1, 3])
def test_resuming_equals_going_on(world):
    lengths = lengths_of(120)
    for rank in range(world):

        def fresh(rank=rank):
            return dpo_fast.PackedSampler(lengths, 2048, seed=1, rank=rank, world=world)

        whole = []
        sampler = fresh()
        for epoch in range(2):
            sampler.set_epoch(epoch)
            whole += list(sampler)
        per_epoch = len(fresh())
        for stop in (0, 1, per_epoch - 1, per_epoch, per_epoch + 2):
            before, seen = fresh(), []
            state = before.state_dict()
            for epoch in range(2):
                before.set_epoch(epoch)
                for batch in before:
                    if len(seen) == stop:
                        break
                    seen.append(batch)
                    state = before.state_dict()
                if len(seen) == stop:
                    break
            after = fresh()
            after.load_state_dict(json.loads(json.dumps(state)))  # as a checkpoint keeps it
            assert after.state_dict() == state
            assert after.start == state["batches"]
            first, *_ = [*enumerate(after, after.start), (None, None)]
            assert first[0] in (state["batches"], None)
            assert after.start == 0
            after.load_state_dict(state)
            for epoch in range(state["epoch"], 2):
                after.set_epoch(epoch)
                seen += list(after)
            assert seen == whole, stop
            after.set_epoch(0)
            assert list(after) == whole[:per_epoch]  # the place is taken up once


def test_states_that_do_not_fit():
    lengths = lengths_of(50)
    state = dpo_fast.PackedSampler(lengths, 2048, seed=1).state_dict()
    for name, other in {
        "lengths": dpo_fast.PackedSampler(lengths[::-1], 2048, seed=1),
        "token_budget": dpo_fast.PackedSampler(lengths, 2049, seed=1),
        "seed": dpo_fast.PackedSampler(lengths, 2048, seed=2),
        "world": dpo_fast.PackedSampler(lengths, 2048, seed=1, world=2),
    }.items():
        with pytest.raises(ValueError, match=f"of another {name}"):
            other.load_state_dict(state)
    sampler = dpo_fast.PackedSampler(lengths, 2048, seed=1)
    with pytest.raises(ValueError, match=r"batches must be in \[0, "):
        sampler.load_state_dict({**state, "batches": 10_000})
    assert sampler.state_dict(batches=2)["batches"] == 2
    with pytest.raises(ValueError, match="of another version"):
        sampler.load_state_dict({})


def test_density_and_balance():
    lengths = lengths_of(2000)
    for budget in (2048, 8192):
        for world in (1, 4):
            samplers, batches = ranks_of(lengths, budget, world)
            needed = sum(lengths) / budget
            assert samplers[0].fill >= 0.985 * needed / (needed + world - 1)  # world - 1 batches more, to be even
            tokens = [[sum(lengths[i] for i in batch) for batch in rank] for rank in batches]
            totals = [sum(rank) for rank in tokens]
            assert samplers[0].fill == pytest.approx(sum(totals) / (budget * world * len(samplers[0])))
            assert max(totals) <= 1.02 * min(totals)
            waited = world * sum(map(max, zip(*tokens, strict=True))) / sum(totals)
            assert waited <= 1.03  # every step is as long as its longest rank's


def test_pack_is_best_fit_decreasing():
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert pack([30, 5], 10) == [[0], [1]]
    assert pack([], 10) == []


def test_packed_lengths_are_those_of_packed_batch():
    rng = random.Random(0)
    examples = []
    for i in range(12):
        ids = [[rng.randrange(9) for _ in range(rng.randint(3, 12))] for _ in range(4)]
        examples.append({"prompt_ids": ids[0][:3], "chosen_ids": ids[1], "rejected_ids": ids[2:] if i % 2 else ids[2]})
    as_tensors = [{k: v if isinstance(v[0], list) else torch.tensor(v) for k, v in e.items()} for e in examples]
    for share in (False, True):
        for max_length in (None, 9):
            expected = [
                dpo_fast.packed_batch([e], share_prompts=share, max_length=max_length)["input_ids"].numel()
                for e in examples
            ]
            assert dpo_fast.packed_lengths(examples, share_prompts=share, max_length=max_length) == expected
            assert dpo_fast.packed_lengths(as_tensors, share_prompts=share, max_length=max_length) == expected


def test_bad_arguments():
    for arguments, error, message in (
        (([], 10), ValueError, "lengths is empty"),
        (([3, 0], 10), ValueError, "lengths must be at least 1, found 0 at 1"),
        (([3, 1.5], 10), TypeError, r"lengths\[1\]"),
        (([3], 0), ValueError, "token_budget must be at least 1"),
        (([3], None), TypeError, "token_budget"),
    ):
        with pytest.raises(error, match=message):
            dpo_fast.PackedSampler(*arguments, seed=0)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be in"):
            dpo_fast.PackedSampler([3], 10, seed=0, rank=rank, world=world)
    with pytest.raises(TypeError, match="seed"):
        dpo_fast.PackedSampler([3], 10, seed="a")
    with pytest.raises(TypeError, match="epoch"):
        dpo_fast.PackedSampler([3], 10, seed=0).set_epoch(None)


def test_as_a_data_loaders_batch_sampler():
    lengths = lengths_of(60)
    sampler = dpo_fast.PackedSampler(lengths, 2048, seed=0)
    loader = torch.utils.data.DataLoader(range(60), batch_sampler=sampler, collate_fn=list)
    assert len(loader) == len(sampler)
    assert list(loader) == list(sampler)


def test_needs_no_torch():
    code = "import sys; from dpo_fast import PackedSampler; list(PackedSampler([3, 4], 5, seed=0)); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("world", [1, 2])
def test_packing_changes_no_gradient(world):
    """Batches over ranks and steps, each divided by the global number of pairs, sum to the gradient of one batch."""
    torch.manual_seed(0)
    counts = torch.randint(2, 9, (14, 2)).tolist()  # tokens of chosen and rejected
    H, V = 6, 17
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    examples = [[(torch.randn(n, H, dtype=torch.float64), torch.randint(V, (n,))) for n in pair] for pair in counts]
    references = -10 * torch.rand(14, 2, dtype=torch.float64)

    def loss_of(numbers, num_pairs):
        sequences = [sequence for i in numbers for sequence in examples[i]]
        bounds = torch.tensor([0, *(len(targets) for _, targets in sequences)]).cumsum(0)
        return dpo_fast.linear_dpo_loss(
            torch.cat([hidden for hidden, _ in sequences]), weight, torch.cat([targets for _, targets in sequences]),
            references[numbers].flatten(), cu_seqlens=bounds, pairs=torch.arange(2 * len(numbers)).view(-1, 2),
            num_pairs=num_pairs, beta=0.5,
        ).loss  # fmt: skip

    whole = loss_of(list(range(14)), None)
    (expected,) = torch.autograd.grad(whole, weight)
    samplers, batches = ranks_of([sum(pair) for pair in counts], 30, world)
    num_pairs = samplers[0].examples_in(0, len(samplers[0]))
    total = sum(loss_of(batch, num_pairs) for rank in batches for batch in rank)
    (found,) = torch.autograd.grad(total, weight)
    assert len({len(batch) for rank in batches for batch in rank}) > 1  # else a mean of means would do
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(found, expected)

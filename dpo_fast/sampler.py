"""Batches of whole examples by token budget: deterministic, resumable, even over ranks. Needs neither torch nor NumPy.

An epoch's plan is a function of lengths, token_budget, seed, epoch and world alone, so every rank makes the same one
and takes its own batches from it; ranks never talk to each other:

    a) the examples are shuffled, and packed best fit decreasing within windows of some batches' worth of tokens:
       packing all of them at once would put the same examples together in every epoch;
    b) where the number of batches is no multiple of world, batches are split in two until it is. No example is lost.
       Only where nothing is left to split (world does not divide the number of examples, each alone) are up to
       world - 1 examples repeated;
    c) a step is one batch for each rank. Its batches are of similar size, because ranks wait for the largest one, and
       the larger ones go to the ranks that have had fewer tokens so far.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_fast._checks import integer

# In batches' worth of tokens: enough to fill batches, few against an epoch.
_WINDOW = 32
# In steps: how many are sorted by size before their batches are dealt out.
_SIMILAR = 16
_STATE_VERSION = 1


def packed_lengths(
    examples: Sequence[Mapping[str, Any]], *, share_prompts: bool = True, max_length: int | None = None
) -> list[int]:
    """The rows that each example takes in `packed_batch(examples, share_prompts=..., max_length=...)`.

    Args:
        examples: dictionaries of token ids, as for `packed_batch`.
        share_prompts: the prompt stands once, and its last token before every completion.
        max_length: of prompt and completion together.

    Returns:
        [E], token counts.
    """
    found = []
    for example in examples:
        prompt, rejected = len(example["prompt_ids"]), example["rejected_ids"]
        several = len(rejected) > 0 and (isinstance(rejected[0], Sequence) or getattr(rejected[0], "ndim", 0) > 0)
        completions = [example["chosen_ids"], *(rejected if several else [rejected])]
        limit = max_length if max_length is not None else prompt + max(map(len, completions))
        sequences = [min(prompt + len(ids), limit) for ids in completions]
        shared = (len(sequences) - 1) * (prompt - 1) if share_prompts else 0
        found.append(sum(sequences) - shared)
    return found


def pack(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Best fit decreasing: the examples' numbers in batches of at most token_budget; longer ones are alone.

    Of equal lengths the earlier one is placed first. Takes O(E log E) comparisons.
    """
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, batch), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], 0))
        if at == len(room):
            batches.append([i])
            left, batch = token_budget - lengths[i], len(batches) - 1
        else:
            left, batch = room.pop(at)
            batches[batch].append(i)
            left -= lengths[i]
        insort(room, (left, batch))
    return batches


class PackedSampler:
    """Batches of example numbers whose summed lengths stay within a token budget; a DataLoader's `batch_sampler`.

    Args:
        lengths: [E] positive integers, the tokens of each example in the batch made of it (`packed_lengths`).
        token_budget: of one batch on one rank. An example that is longer is alone in its batch.
        seed: of the shuffling; the epoch is the other half, see `set_epoch`.
        rank, world: this process's number and the number of processes; each gets as many batches as the others.

    Each pass over the sampler is one epoch: every example in exactly one batch of one rank (but see `repeated`). The
    order changes with `set_epoch`, not by itself, as with torch's DistributedSampler.

    Batches differ in their number of pairs. For a gradient that does not depend on the packing, divide every batch's
    loss by the pairs of the whole optimizer step: `num_pairs=sampler.examples_in(step)` for one rejected completion an
    example (over `world` where gradients are averaged over ranks, as DDP does), with the steps of
    `enumerate(sampler, sampler.start)`.

    Raises:
        TypeError: numbers that are not whole.
        ValueError: no examples, a length or budget below 1, rank outside [0, world).
    """

    def __init__(self, lengths: Sequence[int], token_budget: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        self.lengths = [integer(f"lengths[{i}]", length) for i, length in enumerate(lengths)]
        self.token_budget = integer("token_budget", token_budget)
        self.seed, self.rank, self.world = integer("seed", seed), integer("rank", rank), integer("world", world)
        if not self.lengths:
            raise ValueError("lengths is empty: there are no examples")
        if min(self.lengths) < 1:
            i = next(i for i, length in enumerate(self.lengths) if length < 1)
            raise ValueError(f"lengths must be at least 1, found {self.lengths[i]} at {i}")
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, found {token_budget}")
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be in [0, world), found rank {rank} and world {world}")
        self.epoch = 0
        self._start = self._given = 0  # in batches: where the next pass starts, and what this one has handed out
        self._steps: list[list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass. The epoch that a loaded state is of keeps the state's place in it."""
        epoch = integer("epoch", epoch)
        if epoch != self.epoch:
            self.epoch, self._start, self._given, self._steps = epoch, 0, 0, None

    def __len__(self) -> int:
        """Batches of a whole pass of this epoch, the same for every rank; it may differ from epoch to epoch."""
        return len(self._plan())

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._plan()
        self._given, self._start = self._start, 0
        for step in steps[self._given :]:
            self._given += 1
            yield list(step[self.rank])

    @property
    def start(self) -> int:
        """The number of the next pass's first batch: 0, or after `load_state_dict` the batches that were used."""
        return self._start

    def examples_in(self, step: int, steps: int = 1) -> int:
        """Examples in `steps` batches from number `step` on, over all ranks: what a global batch's mean divides by."""
        return sum(len(batch) for ranks in self._plan()[step : step + steps] for batch in ranks)

    @property
    def repeated(self) -> int:
        """Examples that stand twice in this epoch: 0, unless world does not divide examples that are all alone."""
        return sum(len(batch) for ranks in self._plan() for batch in ranks) - len(self.lengths)

    @property
    def fill(self) -> float:
        """Tokens of this epoch over what its batches have room for: the budget, or the one example that is longer."""
        tokens = [self._tokens(batch) for ranks in self._plan() for batch in ranks]
        return sum(tokens) / sum(max(n, self.token_budget) for n in tokens)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """The place in the epoch, and what the plan depends on; one rank's state serves all ranks.

        Args:
            batches: of this epoch that were used; by default those that were handed out. A DataLoader with workers asks
                for batches ahead of time: count them where they are used.
        """
        given = self._given if batches is None else integer("batches", batches)
        return {"version": _STATE_VERSION, "epoch": self.epoch, "batches": given, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next pass continues where the state was taken; the passes after it are whole.

        Raises:
            ValueError: the state is of other lengths, budget, seed or world, where the same place means other examples.
        """
        for name, own in {"version": _STATE_VERSION, **self._identity()}.items():
            if state.get(name) != own:
                raise ValueError(f"this state is of another {name}: {state.get(name)!r}, not {own!r}")
        before = self.epoch
        self.set_epoch(state["epoch"])
        batches = integer("batches", state["batches"])
        if not 0 <= batches <= len(self):
            self.set_epoch(before)
            raise ValueError(f"batches must be in [0, {len(self)}], found {batches}")
        self._start = self._given = batches

    def _identity(self) -> dict[str, Any]:
        lengths = hashlib.sha256(",".join(map(str, self.lengths)).encode()).hexdigest()
        return {"lengths": lengths, "token_budget": self.token_budget, "seed": self.seed, "world": self.world}

    def _tokens(self, batch: list[int]) -> int:
        return sum(self.lengths[i] for i in batch)

    def _plan(self) -> list[list[list[int]]]:
        """[steps][world] batches of example numbers."""
        if self._steps is None:
            # only random() is promised to give the same numbers in every Python; a text is hashed by SHA-512
            rng = random.Random(f"{self.seed} {self.epoch}")
            batches = self._packed(_shuffled(range(len(self.lengths)), rng))
            self._steps = self._dealt(self._even(batches, rng), rng)
        return self._steps

    def _packed(self, order: list[int]) -> list[list[int]]:
        """Batches of the examples in this order, by windows; a window's emptiest batch goes into the next."""
        batches: list[list[int]] = []
        window: list[int] = []
        tokens = 0
        for n, i in enumerate(order, 1):
            window.append(i)
            tokens += min(self.lengths[i], self.token_budget)
            if tokens < _WINDOW * self.token_budget and n < len(order):
                continue
            found = [[window[k] for k in batch] for batch in pack([self.lengths[k] for k in window], self.token_budget)]
            found.sort(key=self._tokens, reverse=True)
            window = found.pop() if n < len(order) else []
            tokens = min(self._tokens(window), self.token_budget)
            batches += found
        return batches

    def _even(self, batches: list[list[int]], rng: random.Random) -> list[list[int]]:
        """As many batches for each rank, in random order."""
        missing = -len(batches) % self.world
        if missing:
            batches.sort(key=len)
        while missing and len(batches[-1]) > 1:
            halves: list[list[int]] = [[], []]
            for i in sorted(batches.pop(), key=lambda i: -self.lengths[i]):
                min(halves, key=self._tokens).append(i)
            for half in halves:
                insort(batches, half, key=len)
            missing -= 1
        # all are alone now; a small world's worth of them may have to stand more than once
        batches += [list(batches[k % len(batches)]) for k in range(missing)]
        return _shuffled(batches, rng)

    def _dealt(self, batches: list[list[int]], rng: random.Random) -> list[list[list[int]]]:
        """Steps of one batch for each rank, see c) above."""
        if self.world == 1:
            return [[batch] for batch in batches]
        steps = []
        for first in range(0, len(batches), _SIMILAR * self.world):
            similar = sorted(batches[first : first + _SIMILAR * self.world], key=self._tokens, reverse=True)
            groups = [similar[k : k + self.world] for k in range(0, len(similar), self.world)]
            steps += _shuffled(groups, rng)
        totals = [0] * self.world
        dealt = []
        for step in steps:
            ranks = sorted(range(self.world), key=totals.__getitem__)
            of_rank = dict(zip(ranks, step, strict=True))
            dealt.append([of_rank[rank] for rank in range(self.world)])
            for rank, batch in of_rank.items():
                totals[rank] += self._tokens(batch)
        return dealt


def _shuffled(items: Sequence[Any], rng: random.Random) -> list[Any]:
    """In random order, by `random()` alone."""
    keys = [rng.random() for _ in items]
    return [items[k] for k in sorted(range(len(items)), key=keys.__getitem__)]

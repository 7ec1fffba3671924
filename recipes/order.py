"""The order of an epoch as a function: any position is found without reading what is before it."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate


class EpochOrder:
    """Which sample of which shard stands at a position of an epoch.

    The shards, permuted, are laid end to end as one line, which closes to a ring and is cut at a
    random place; stretches of `block` samples of it are permuted each. What is read together so
    lies near together, and a position's sample is known from its block alone.

    The same (counts, seed, epoch, block) give the same order, whatever the machine.

    Args:
        counts: samples of each shard.
        seed: of the order.
        epoch: each has an order of its own.
        block: samples that are mixed with each other; 0 leaves the order of the shards.
    """

    def __init__(self, counts: Sequence[int], seed: int, epoch: int, block: int) -> None:
        self.block = block
        self._name = f"{seed}/{epoch}"
        self._shards = list(range(len(counts)))
        self._turn = 0
        self.total = sum(counts)
        if block and self.total:
            rng = random.Random(self._name)
            rng.shuffle(self._shards)
            # Without this turn, the blocks of a single shard would be the same for ever.
            self._turn = rng.randrange(self.total)
        self._ends = list(accumulate(counts[shard] for shard in self._shards))
        # Of this order alone: a cache of the class would keep orders of epochs long gone.
        self._permutation = lru_cache(maxsize=4)(self._permuted)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, sample in it) at a position from 0.

        Raises:
            IndexError: no such position.
        """
        if not 0 <= position < self.total:
            raise IndexError(f"found position {position}; expected 0 to {self.total - 1}")
        if self.block:
            number, place = divmod(position, self.block)
            position = number * self.block + self._permutation(number)[place]
            position = (position + self._turn) % self.total
        slot = bisect_right(self._ends, position)
        return self._shards[slot], position - (self._ends[slot - 1] if slot else 0)

    def following(self, shard: int, count: int) -> list[int]:
        """The shards that come after one in the line, which is a ring; at most so many."""
        slot = self._shards.index(shard) + 1
        return (self._shards[slot:] + self._shards[: slot - 1])[:count]

    def _permuted(self, number: int) -> list[int]:
        places = list(range(min(self.block, self.total - number * self.block)))
        random.Random(f"{self._name}/{number}").shuffle(places)
        return places

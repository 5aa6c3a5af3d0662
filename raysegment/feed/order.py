"""Which tile, in which step, on which worker: integer arithmetic and nothing else.

Glossary of the indices
    position     place on the infinite line 0, 1, 2, … of tiles to be consumed; every position is consumed once
    epoch        position // tiles: one pass over all tiles
    place        position % tiles: place within the epoch
    tile         which sample of the shards: the epoch's permutation of the place
    step         one optimizer update; step s consumes the positions [s·G, (s+1)·G), G the global batch
    cursor       the next position to be consumed; s·G before step s: the whole state of the data plane
    micro-batch  m consecutive positions of a step, the unit of computation; a step has G/m of them
    rank         a worker's place in the group of `world_size` workers; it computes a contiguous share of a step's
                 micro-batches and may get none

    window       tiles that are mixed with each other; all of them unless the order is told otherwise
    block        consecutive tiles that enter a window together: those of one shard

A step may straddle two epochs (G need not divide the number of tiles). The permutation is a keyed bijection, computed
for one place in O(1) time and memory, so it serves 10⁹ tiles as well as ten: a Feistel network (Luby and Rackoff 1988)
on the smallest even number of bits that holds all places, walked until it lands inside (Black and Rogaway 2002, §3).
With a window, blocks are permuted and the tiles of each window of them are: a worker then needs the shards of a window at
a time, and a cache of that size reads each shard once per epoch, where mixing all tiles would read it for every tile.
Nothing here depends on who computes it: resuming, shrinking and growing the group need the cursor alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

_WORD = (1 << 64) - 1
_ROUNDS = 6  # four make a pseudo-random permutation of many bits; tiny ones (4 tiles: 2 + 2 bits) mix better with more


@dataclass(frozen=True)
class Order:
    """The order in which `tiles` tiles are consumed, `global_batch` a step, `micro_batch` at a time.

    `window` 0 mixes all tiles; otherwise that many (a multiple of `block`) are mixed with each other.
    """

    tiles: int
    global_batch: int
    micro_batch: int
    seed: int = 0
    window: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        if self.tiles < 1:
            raise ValueError(f"tiles: expected at least one, got {self.tiles}")
        if self.micro_batch < 1 or self.global_batch < 1 or self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch: expected a multiple of micro_batch {self.micro_batch}, both 1 or more, got {self.global_batch}"
            )
        if self.window < 0 or self.block < 1 or self.window % self.block:
            raise ValueError(f"window: expected a multiple of block {self.block}, or 0, got {self.window}")

    @property
    def micro_batches_per_step(self) -> int:
        return self.global_batch // self.micro_batch

    def epoch(self, position: int) -> int:
        return position // self.tiles

    def tile(self, position: int) -> int:
        """The tile consumed at a position: the permutation of its epoch, at its place."""
        epoch, place = divmod(position, self.tiles)
        if not self.window:
            return permute(place, self.tiles, _keys(self.seed, epoch))
        tile = self._windowed(place, epoch)
        while tile >= self.tiles:  # a place that only fills up the last block
            tile = self._windowed(tile, epoch)
        return tile

    def _windowed(self, place: int, epoch: int) -> int:
        """A bijection of whole blocks' places: mixed within its window, whose blocks come from anywhere."""
        blocks = -(-self.tiles // self.block)
        window, inside = divmod(place, self.window)
        size = min(self.window, blocks * self.block - window * self.window)
        slot = window * self.window + permute(inside, size, _keys(self.seed, epoch, window))
        block, rest = divmod(slot, self.block)
        return permute(block, blocks, _keys(self.seed, epoch)) * self.block + rest

    def cursor(self, step: int) -> int:
        """First position of a step."""
        return step * self.global_batch

    def steps(self, epochs: float) -> int:
        """Fewest steps that consume `epochs` passes over the tiles."""
        return -int(-epochs * self.tiles // self.global_batch)

    def step_positions(self, step: int) -> range:
        return range(self.cursor(step), self.cursor(step + 1))

    def micro_positions(self, step: int, micro: int) -> range:
        """Positions of the micro-batch number `micro` of a step."""
        first = self.cursor(step) + micro * self.micro_batch
        return range(first, first + self.micro_batch)

    def share(self, rank: int, world_size: int) -> range:
        """Numbers of the micro-batches in every step that fall to `rank`: contiguous, sizes differ by one at most."""
        assert 0 <= rank < world_size, (rank, world_size)
        count = self.micro_batches_per_step
        return range(rank * count // world_size, (rank + 1) * count // world_size)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """Positions of each micro-batch of `step` that falls to `rank`; an empty list where there are more ranks than work."""
        return [list(self.micro_positions(step, micro)) for micro in self.share(rank, world_size)]

    def line(self, first_step: int, last_step: int, rank: int, world_size: int) -> Line:
        """Everything `rank` computes in the steps [first_step, last_step), as one sequence of micro-batches."""
        share = self.share(rank, world_size)
        return Line(self, first_step, share.start, len(share), max(0, last_step - first_step) * len(share))


@dataclass(frozen=True)
class Line:
    """A worker's own micro-batches over many steps, counted 0, 1, 2, …: `per_step` from each, from number `first` on."""

    order: Order
    first_step: int
    first: int
    per_step: int
    count: int

    def positions(self, start: int, stop: int) -> list[int]:
        """Positions of the micro-batches [start, stop) of the line, in order."""
        return [position for index in range(start, min(stop, self.count)) for position in self.micro(index)]

    def micro(self, index: int) -> range:
        """Positions of micro-batch number `index` of the line."""
        step, micro = divmod(index, self.per_step)
        return self.order.micro_positions(self.first_step + step, self.first + micro)

    def __iter__(self) -> Iterator[range]:
        return (self.micro(index) for index in range(self.count))


def permute(place: int, size: int, keys: tuple[int, ...]) -> int:
    """A bijection of [0, size): the Feistel network's walk from `place` until it is inside again (at most 4 on average)."""
    assert 0 <= place < size, (place, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int, window: int = -1) -> tuple[int, ...]:
    """Round keys of one epoch's permutation, or of one of its windows'."""
    state = mix(mix(seed & _WORD) ^ (epoch & _WORD))
    state = state if window < 0 else mix(state ^ mix(window))
    return tuple(mix(state + round_) for round_ in range(1, _ROUNDS + 1))


def mix(word: int) -> int:
    """A well-mixed 64-bit hash of a 64-bit integer: splitmix64 (Steele, Lea and Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)

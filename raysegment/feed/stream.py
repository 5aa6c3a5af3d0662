"""A worker's own stream over its own slice of every step: in order, ahead of time, resumable at any step.

The order is arithmetic, so nobody hands out tiles: a worker knows its positions, threads copy their tiles into reused
memory some micro-batches ahead of the trainer, and Ray Data tasks (`ahead`) have them on the node before that. A stream
never waits for the tasks: a tile that is not here is fetched by the thread that needs it. Hence a change of membership
costs nothing but a new plan: `replan` starts at any step with any share, in the same threads.

Copies of a tile, shards in place: page cache → the worker's buffer, whose views the trainer gets. Cached: source → file
in the node's cache → the worker's buffer. In flight are the micro-batches `ahead` of the trainer and those it holds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray

from raysegment.archive.places import Place
from raysegment.feed.ahead import Ahead
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.feed.direct import DirectStream
from raysegment.feed.gather import Buffers, gather
from raysegment.feed.order import Line, Order
from raysegment.feed.quarantine import Quarantine
from raysegment.feed.store import Source, TileStore

KINDS = ("ray", "direct")


@dataclass(frozen=True)
class FeedConfig:
    """How tiles reach a worker: `kind` "ray" (ahead of it, by threads and Ray Data tasks) or "direct" (when asked for).

    `readers` threads keep `ahead_mib` of tiles (two micro-batches at least) ready for the trainer. `tasks` Ray Data tasks
    prepare windows of `window_mib` before that. `cache` is a folder of the node's disk for at most `cache_gib` of shards:
    needed for shards in an object store ("" is a folder below the temporary one), of use for those on a slow disk. Of all
    tiles, `max_damaged` (a share below 1, rounded up, or a number; 0 is strict) may be damaged and are left out.
    """

    kind: str = "ray"
    readers: int = 2
    ahead_mib: float = 256.0
    tasks: int = 2
    window_mib: float = 1024.0
    cache: str = ""
    cache_gib: float = 64.0
    max_damaged: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"feed.kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.readers < 1 or self.tasks < 1 or self.max_damaged < 0:
            raise ValueError(f"feed: expected at least one of readers and tasks and no negative max_damaged, got {self}")
        if min(self.ahead_mib, self.window_mib, self.cache_gib) <= 0:
            raise ValueError(f"feed: expected positive ahead_mib, window_mib and cache_gib, got {self}")

    def source(self, shards: str | Path | Place) -> Source:
        return Source(str(Place.of(shards).text), self.cache, self.cache_gib)

    def micro_batches_ahead(self, micro_bytes: int) -> int:
        """How many micro-batches are read before they are asked for."""
        return max(2, int(self.ahead_mib * 2**20 / micro_bytes))

    def micro_batches_planned(self, micro_bytes: int) -> int:
        """How many micro-batches one plan of Ray Data covers: two plans fit into half the cache."""
        return max(1, int(min(self.window_mib, self.cache_gib * 1024 / 4) * 2**20 / micro_bytes))


class Stream:
    """`rank`'s share of the steps [first_step, last_step), an iterator of `StepInput`; several plans, one after the other.

    Reading begins at once, before the first step is asked for. `load_s` of each is the time that the caller had to wait.
    """

    def __init__(self, store: TileStore, order: Order, last_step: int, config: FeedConfig, quarantine: Quarantine):
        assert order.tiles == store.manifest.tiles, (order.tiles, store.manifest.tiles)
        self._store, self._order, self._last, self._config, self._quarantine = store, order, last_step, config, quarantine
        self._pool = ThreadPoolExecutor(config.readers, "feed")
        self._buffers, self._pending = Buffers(), deque[Future[MicroBatch]]()
        self._ahead: Ahead | None = None
        self._line: Line | None = None

    @property
    def tiles_in_flight(self) -> int:
        """Tiles that are read or being read and not yet asked for, at most."""
        return self._config.micro_batches_ahead(self._micro_bytes) * self._order.micro_batch

    def replan(self, step: int, rank: int, world_size: int) -> None:
        """From now on the share of `rank` in a group of `world_size`, beginning with `step`; what was ahead is let go."""
        self._let_go()
        self._step, self._sent = step, 0
        self._line = self._order.line(step, self._last, rank, world_size)
        self._fill()
        if self._config.kind == "ray" and ray.is_initialized() and self._line.count:
            window = self._config.micro_batches_planned(self._micro_bytes)
            per_task = max(1, int(self._config.ahead_mib * 2**20 / 4 / self._store.tile_bytes))
            self._ahead = Ahead(self._store, self._line, window, per_task, self._config.tasks)

    def __iter__(self) -> Iterator[StepInput]:
        return self

    def __next__(self) -> StepInput:
        if self._line is None or self._step >= self._last:
            raise StopIteration  # `replan` may still begin again; whoever owns the stream closes it
        started = time.perf_counter()
        share = [self._next_micro_batch() for _ in range(self._line.per_step)]
        item = StepInput(self._step, share, time.perf_counter() - started)
        self._step += 1
        return item

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; an iteration that goes on ends."""
        self._let_go()
        self._line = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_micro_batch(self) -> MicroBatch:
        self._fill()
        batch = self._pending.popleft().result()
        self._fill()
        if self._ahead is not None:
            self._ahead.advance(self._sent - len(self._pending))
        return batch

    def _fill(self) -> None:
        """Have as many micro-batches in work as may be ahead."""
        assert self._line is not None
        while self._sent < self._line.count and len(self._pending) < self._config.micro_batches_ahead(self._micro_bytes):
            positions = self._line.micro(self._sent)
            self._pending.append(
                self._pool.submit(gather, self._store, self._order, positions, self._quarantine, self._buffers)
            )
            self._sent += 1

    def _let_go(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None
        while self._pending:
            self._pending.popleft().cancel()

    @property
    def _micro_bytes(self) -> int:
        return self._order.micro_batch * self._store.tile_bytes


def make_stream(
    shards: str | Path | Place, order: Order, last_step: int, config: FeedConfig, quarantine: Quarantine
) -> Stream | DirectStream:
    """A stream of `order` over a shard set up to `last_step`; `replan` sets it going. Damaged tiles go into `quarantine`."""
    store = TileStore(config.source(shards))
    if config.kind == "direct":
        return DirectStream(store, order, last_step, quarantine)
    return Stream(store, order, last_step, config, quarantine)


def open_stream(
    shards: str | Path | Place,
    order: Order,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    config: FeedConfig | None = None,
    quarantine: Quarantine | None = None,
) -> Stream | DirectStream:
    """`rank`'s share of the steps [first_step, last_step) of `order` over a shard set, step by step.

    Damaged tiles go into `quarantine` (one of this stream's own unless given). Without a Ray that this process is
    connected to, the stream's threads read alone.
    """
    config = config or FeedConfig()
    quarantine = Quarantine(order.tiles, config.max_damaged) if quarantine is None else quarantine
    stream = make_stream(shards, order, last_step, config, quarantine)
    stream.replan(first_step, rank, world_size)
    return stream

"""A worker's own Ray Data stream over its own slice of every step: in order, ahead of time, resumable at any step.

What travels as rows is the number of a *chunk*: some consecutive micro-batches of this worker's line of work (`Order.line`),
possibly of several steps. A read task computes the chunk's positions, maps the shards, gathers the tiles and returns
them as one block, so that Ray's ≈ 14 ms per block are paid once for a chunk's tiles. Tasks need no CPU of their own in Ray's
books (they copy memory) and their number is bounded instead: however many CPUs the trainers hold, a stream can always
proceed, and there is nothing to wait for each other about. No coordinator serves more than one worker.

Copies of a tile: page cache → the task's block → object store → the trainer's views of it (none).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysegment.archive.shards import ShardSet, open_shards
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.feed.chunks import Chunks, tile_bytes
from raysegment.feed.direct import direct_steps, micro_batch
from raysegment.feed.order import Line, Order

KINDS = ("ray", "direct")
_Block = dict[str, NDArray[Any]]  # columns positions (n,), fields (n, 16, h, w), mask (n, h, w)
_WINDOW = 1024  # chunks in one Ray Data execution: their plan is made at its start


@dataclass(frozen=True)
class FeedConfig:
    """How tiles reach a worker: `kind` "ray" (read ahead by Ray Data tasks) or "direct" (read in place, when asked for).

    `chunk_mib` is a block's size, `readers` how many read tasks a worker has at once, `ahead` how many finished chunks
    wait: at most (readers + ahead + 2) · chunk_mib are in flight per worker, and no less than one micro-batch each.
    """

    kind: str = "ray"
    chunk_mib: float = 24.0
    readers: int = 2
    ahead: int = 2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"feed.kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.chunk_mib <= 0 or self.readers < 1 or self.ahead < 1:
            raise ValueError(f"feed: expected positive chunk_mib, readers and ahead, got {self}")

    def micro_batches_per_chunk(self, shards: ShardSet, micro_batch_size: int) -> int:
        height, width = shards.manifest.tile
        bytes_each = micro_batch_size * height * width * (2 * len(shards.manifest.channels) + 1)
        return max(1, int(self.chunk_mib * 2**20 / bytes_each))


def open_stream(
    shards_dir: str | Path,
    order: Order,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    config: FeedConfig | None = None,
) -> Iterator[StepInput]:
    """`rank`'s share of the steps [first_step, last_step) of `order` over the shards in a folder, step by step.

    Reading begins at once, before the first step is asked for. `load_s` of each is the time that the caller had to wait.
    """
    shards, config = open_shards(shards_dir), config or FeedConfig()
    assert order.tiles == len(shards), (order.tiles, len(shards))
    if config.kind == "direct":
        return direct_steps(shards, order, first_step, last_step, rank, world_size)
    line = order.line(first_step, last_step, rank, world_size)
    blocks = _blocks(Path(shards_dir), line, config.micro_batches_per_chunk(shards, order.micro_batch), config)
    return _steps(_micro_batches(blocks, line), line, last_step)


def _steps(batches: Iterator[MicroBatch], line: Line, last_step: int) -> Iterator[StepInput]:
    for step in range(line.first_step, last_step):
        started = time.perf_counter()
        share = [next(batches) for _ in range(line.per_step)]
        yield StepInput(step, share, time.perf_counter() - started)


def _micro_batches(blocks: Iterator[_Block], line: Line) -> Iterator[MicroBatch]:
    """Blocks of any number of rows cut into micro-batches, which are views wherever one block holds them whole."""
    size, rest = line.order.micro_batch, None
    expected = iter(line)
    for block in blocks:
        rest = block if rest is None else {name: np.concatenate([rest[name], block[name]]) for name in block}
        whole = len(rest["positions"]) // size * size
        for start in range(0, whole, size):
            batch = {name: column[start : start + size] for name, column in rest.items()}
            assert batch["positions"].tolist() == list(next(expected)), "the stream is out of order"
            yield micro_batch(batch["positions"].tolist(), batch["fields"], batch["mask"])
        rest = {name: column[whole:] for name, column in rest.items()} if whole < len(rest["positions"]) else None
    assert rest is None, "the stream ended within a micro-batch"


def _blocks(folder: Path, line: Line, chunk: int, config: FeedConfig) -> Iterator[_Block]:
    """The chunks of a line, one window of them after the other; the first begins now, each next while one is consumed."""
    count = line.chunks(chunk)
    windows = [(start, min(start + _WINDOW, count)) for start in range(0, count, _WINDOW)]
    pool = ThreadPoolExecutor(1, "next-window")
    opened = pool.submit(_open_window, folder, line, chunk, windows[0], config) if windows else None

    def consume(opened: Future[Iterator[_Block]] | None) -> Iterator[_Block]:
        with pool:
            for number, (start, stop) in enumerate(windows):
                assert opened is not None
                current, opened = opened, None
                for place, block in enumerate(current.result()):
                    if place >= (stop - start) // 2 and opened is None and number + 1 < len(windows):
                        opened = pool.submit(_open_window, folder, line, chunk, windows[number + 1], config)
                    yield block

    return consume(opened)


def _open_window(folder: Path, line: Line, chunk: int, window: tuple[int, int], config: FeedConfig) -> Iterator[_Block]:
    """A started Ray Data execution over the chunks [window), its first block already here."""
    start, stop = window
    data = ray.data.read_datasource(
        Chunks(str(folder), line, chunk, start, stop),
        override_num_blocks=stop - start,
        concurrency=min(config.readers, stop - start),
        num_cpus=0,
    )
    data.context.scheduling_strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = data.context.execution_options
    options.preserve_order = True
    options.verbose_progress = False
    bytes_each = chunk * line.order.micro_batch * tile_bytes(str(folder))
    options.resource_limits = options.resource_limits.copy(object_store_memory=(config.readers + config.ahead) * bytes_each)
    blocks = data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=config.ahead)
    iterator = cast(Iterator[_Block], iter(blocks))
    return chain([next(iterator)], iterator)

"""The stream gives what reading tile by tile gives: for any number of workers, from any step on, in order."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from raysegment.archive.manifest import Manifest
from raysegment.archive.shards import TileId, open_shards, write_shard
from raysegment.climate.grid import Grid
from raysegment.feed.ahead import Ahead, missing, tasks_of
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.feed.gather import Buffers
from raysegment.feed.order import Order
from raysegment.feed.quarantine import Quarantine
from raysegment.feed.store import Source, TileStore
from raysegment.feed.stream import FeedConfig, Stream, open_stream
from tests.small_archive import fields_and_mask

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eleven tiles in shards of 4, 4 and 3."""
    out, parts = tmp_path_factory.mktemp("shards"), []
    for number, tiles in enumerate((range(4), range(4, 8), range(8, 11))):
        rows = [(*fields_and_mask(tile), TileId(f"{tile}.nc", 0, "", 0, 0)) for tile in tiles]
        parts.append(write_shard(out / f"part-{number:05d}.arrow", rows))
    Manifest.of(parts, (16, 32), Grid.global_(16, 32), "test").save(out)
    return out


def same(left, right) -> bool:
    pairs = list(zip(left.micro_batches, right.micro_batches, strict=True))
    return left.step == right.step and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("positions", "fields", "mask")
    )


def expected(folder: Path, order: Order, first: int, last: int, rank: int = 0, world_size: int = 1) -> list[StepInput]:
    """Steps as the arithmetic of the order and the mapped files give them, one tile at a time."""
    shards, steps = open_shards(folder), []
    for step in range(first, last):
        batches = []
        for positions in order.micro_batches(step, rank, world_size):
            tiles = [shards.tile(order.tile(position)) for position in positions]
            fields, masks = (np.stack([getattr(tile, name) for tile in tiles]) for name in ("fields", "mask"))
            batches.append(MicroBatch(torch.tensor(positions), torch.from_numpy(fields), torch.from_numpy(masks)))
        steps.append(StepInput(step, batches))
    return steps


KINDS = [
    FeedConfig(kind="direct"),
    FeedConfig(ahead_mib=0.1, window_mib=0.2),  # 17 KiB a tile: six ahead, plans of twelve
    FeedConfig(readers=5, ahead_mib=1e-6, window_mib=1e-6),
    FeedConfig(cache="CACHE", ahead_mib=0.1, window_mib=0.2),
    FeedConfig(cache="CACHE", cache_gib=1e-6),  # room for no shard but the one in use
]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 5)])
@pytest.mark.parametrize("config", KINDS, ids=["direct", "in place", "two ahead", "cached", "cached, no room"])
def test_the_stream_is_the_order_for_any_group(folder, tmp_path, rank, world_size, config):
    if config.cache:
        config = replace(config, cache=str(tmp_path / "cache"))
    order = Order(11, 6, 2, seed=5)
    got = list(open_stream(folder, order, 2, 14, rank, world_size, config))
    assert all(same(a, b) for a, b in zip(got, expected(folder, order, 2, 14, rank, world_size), strict=True))


@pytest.mark.parametrize("cached", [False, True])
def test_a_change_of_membership_goes_on_from_the_cursor(folder, tmp_path, cached):
    """Three members, then one and two, then five: the same threads, every position of every step once."""
    order = Order(11, 12, 2, seed=5)
    config = FeedConfig(cache=str(tmp_path) if cached else "", ahead_mib=0.3)
    store = TileStore(config.source(folder))
    streams = [Stream(store, order, 40, config, Quarantine(11, 0)) for _ in range(5)]
    step = 3
    for steps, world_size in ((4, 3), (1, 1), (3, 2), (5, 5)):
        for rank in range(world_size):
            streams[rank].replan(step, rank, world_size)
            wanted = expected(folder, order, step, step + steps, rank, world_size)
            assert all(same(next(streams[rank]), want) for want in wanted)
        step += steps
    for stream in streams:
        stream.close()
        assert next(stream, None) is None


def test_tasks_have_the_tiles_of_the_coming_steps_ready(folder, tmp_path):
    """What is planned is fetched and proved by Ray Data's tasks, before the trainer asks, a window at a time."""
    config = FeedConfig(cache=str(tmp_path), window_mib=0.2)
    store, order = TileStore(config.source(folder)), Order(11, 6, 2, seed=5)
    line = order.line(0, 6, 0, 1)
    assert len(missing(store, line, 0, line.count)) == 11
    ahead = Ahead(store, line, window=2, per_task=1, tasks=1)
    wait_until(lambda: not missing(store, line, 0, 2))
    for taken in range(line.count):
        ahead.advance(taken)
        wait_until(lambda taken=taken: not missing(store, line, taken, taken + 2))
    ahead.stop()
    assert ahead.prepared <= 11
    assert sorted(path.name for path in store.cache.folder.glob("*.arrow")) == [f"part-{n:05d}.arrow" for n in range(3)]


def test_tasks_are_shards_in_a_cache_and_tiles_in_place(folder, tmp_path):
    in_place, cached = TileStore(Source(str(folder))), TileStore(Source(str(folder), str(tmp_path)))
    numbers = [9, 0, 8, 5, 1]
    assert tasks_of(in_place, numbers, 2) == [[9, 0], [8, 5], [1]]
    assert tasks_of(cached, numbers, 2) == [[9, 8], [0, 1], [5]]


def test_planning_costs_a_worker_its_own_share_however_many_there_are(folder, monkeypatch):
    """Nobody hands out tiles: 64 workers together look up each position as often as one worker alone does."""
    order, counts = Order(11, 128, 1, seed=5), []
    store = TileStore(Source(str(folder)))
    monkeypatch.setattr(Order, "tile", lambda self, position: counts.append(position) or permuted(self, position))
    for world_size in (1, 4, 16, 64):
        counts.clear()
        for rank in range(world_size):
            line = order.line(0, 4, rank, world_size)
            missing(store, line, 0, line.count)
        assert sorted(counts) == list(range(4 * 128))


permuted = Order.tile


def test_sixty_four_consumers_get_every_position_once(folder):
    order, config = Order(11, 128, 1, seed=5), FeedConfig(readers=1)
    assert TileStore(config.source(folder)).prepare(list(range(11))) == 11
    with ThreadPoolExecutor(64) as pool:
        work = [pool.submit(lambda r: list(open_stream(folder, order, 0, 4, r, 64, config)), rank) for rank in range(64)]
        steps = [step for future in work for step in future.result()]
    assert sorted(p for step in steps for b in step.micro_batches for p in b.positions.tolist()) == list(range(512))


def test_trainers_may_hold_every_cpu(folder):
    """Tasks are never queued behind the workers that wait for them."""

    @ray.remote(num_cpus=1)
    class Trainer:
        def run(self, rank: int, cache: str) -> int:
            config = FeedConfig(cache=cache)
            return sum(step.samples for step in open_stream(folder, Order(11, 6, 2), 0, 6, rank, 2, config))

    with tempfile.TemporaryDirectory() as cache:
        trainers = [Trainer.remote() for _ in range(2)]
        samples = ray.get([trainer.run.remote(rank, cache) for rank, trainer in enumerate(trainers)], timeout=60)
    assert sum(samples) == 36


def test_a_stream_that_is_left_early_ends(folder):
    stream = open_stream(folder, Order(11, 6, 2), 0, 500)
    assert next(stream).step == 0
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(stream, None) is None
    assert next(open_stream(folder, Order(11, 6, 2), 7, 9)).step == 7


def test_what_is_in_flight_is_bounded(folder):
    """However slow the trainer, no more tiles are read than are to be ahead of it; and memory is used again."""
    read, order, config = [], Order(11, 4, 2), FeedConfig(ahead_mib=0.1)

    class Counted(TileStore):
        def read(self, number, *arrays):
            read.append(number)
            return super().read(number, *arrays)

    stream = Stream(Counted(config.source(folder)), order, 100, config, Quarantine(11, 0))
    stream.replan(0, 0, 1)
    addresses = set()
    for step in range(40):
        batches = next(stream).micro_batches
        addresses.update(batch.fields.data_ptr() for batch in batches)
        wait_until(lambda step=step: len(read) == 4 * (step + 1) + stream.tiles_in_flight)
    assert stream.tiles_in_flight == 6
    assert len(addresses) <= (6 + 2 * 4) // 2
    stream.close()


def test_memory_is_not_lent_twice():
    buffers = Buffers()
    first = torch.from_numpy(buffers.take((3, 4), np.float16))
    part, second = first[1:], torch.from_numpy(buffers.take((3, 4), np.float16))
    assert first.data_ptr() != second.data_ptr()
    address = first.data_ptr()
    del first
    assert torch.from_numpy(buffers.take((3, 4), np.float16)).data_ptr() != address, "a view of it lives"
    del part
    assert buffers.take((3, 4), np.float16).ctypes.data == address


def test_impossible_settings_are_refused():
    for changes in ({"kind": "disk"}, {"readers": 0}, {"ahead_mib": 0}, {"max_damaged": -1}):
        with pytest.raises(ValueError, match="expected"):
            FeedConfig(**changes)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)  # polls a condition

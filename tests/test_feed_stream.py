"""The stream gives what reading tile by tile gives: for any number of workers, from any step on, in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from raysegment.archive.shards import Manifest, TileId, open_shards, write_shard
from raysegment.climate.grid import Grid
from raysegment.feed import stream
from raysegment.feed.direct import direct_steps
from raysegment.feed.order import Order
from raysegment.feed.stream import FeedConfig, open_stream
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


def test_reading_in_place_is_the_order(folder):
    shards, order = open_shards(folder), Order(11, 6, 2, seed=5)
    for step in direct_steps(shards, order, 3, 6):
        positions = [p for batch in step.micro_batches for p in batch.positions.tolist()]
        assert positions == list(order.step_positions(step.step))
        for batch in step.micro_batches:
            for row, position in enumerate(batch.positions.tolist()):
                tile = shards.tile(order.tile(position))
                np.testing.assert_array_equal(batch.fields[row].numpy(), tile.fields)
                np.testing.assert_array_equal(batch.mask[row].numpy(), tile.mask)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (2, 5), (4, 5)])
def test_the_stream_is_what_reading_in_place_gives(folder, rank, world_size, monkeypatch):
    monkeypatch.setattr(stream, "_WINDOW", 3)  # several executions, one after the other
    order = Order(11, 6, 2, seed=5)
    config = FeedConfig(chunk_mib=0.1)  # 17 KiB a tile: three micro-batches a chunk
    got = list(open_stream(folder, order, 2, 14, rank, world_size, config))
    expected = list(direct_steps(open_shards(folder), order, 2, 14, rank, world_size))
    assert len(got) == 12
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_trainers_may_hold_every_cpu(folder):
    """Read tasks are never queued behind the workers that wait for them."""

    @ray.remote(num_cpus=1)
    class Trainer:
        def run(self, rank: int) -> int:
            return sum(step.samples for step in open_stream(folder, Order(11, 6, 2), 0, 6, rank, 2))

    trainers = [Trainer.remote() for _ in range(2)]
    assert sum(ray.get([trainer.run.remote(rank) for rank, trainer in enumerate(trainers)], timeout=60)) == 36


def test_a_stream_that_is_left_early_ends(folder):
    stream = open_stream(folder, Order(11, 6, 2), 0, 500, config=FeedConfig(chunk_mib=0.05))
    assert next(stream).step == 0
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(open_stream(folder, Order(11, 6, 2), 7, 9)).step == 7


def test_direct_needs_no_ray_data(folder):
    steps = open_stream(folder, Order(11, 4, 1), 0, 3, config=FeedConfig(kind="direct"))
    assert [step.samples for step in steps] == [4, 4, 4]
    with pytest.raises(ValueError, match="one of ray, direct"):
        FeedConfig(kind="disk")

"""A training run of seconds: eleven small tiles, a network of a few hundred weights."""

from __future__ import annotations

from pathlib import Path

from raysegment.archive.manifest import Manifest
from raysegment.archive.shards import TileId, write_shard
from raysegment.climate.grid import Grid
from raysegment.elastic.settings import CheckpointConfig, TrainConfig
from raysegment.feed.stream import FeedConfig
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import LearnConfig
from raysegment.networks import NetworkConfig, TiramisuConfig
from tests.small_archive import fields_and_mask


def write_shards(folder: Path, tiles: int = 11, first: int = 0) -> Path:
    """A shard set of `tiles` maps of 16 x 32 cells."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(*fields_and_mask(tile), TileId(f"{tile}.nc", 0, "", 0, 0)) for tile in range(first, first + tiles)]
    part = write_shard(folder / "part-00000.arrow", rows)
    Manifest.of([part], (16, 32), Grid.global_(16, 32), "test").save(folder)
    return folder


def spoil(shards: Path, tile: int) -> None:
    """Flip a bit of a tile."""
    part, manifest = shards / "part-00000.arrow", Manifest.load(shards)
    content = bytearray(part.read_bytes())
    content[manifest.shards[0].offsets[tile] + 2000] ^= 1
    part.write_bytes(content)


def config(shards: Path, out: Path, **changes) -> TrainConfig:
    """Twelve steps of six tiles in micro-batches of two, exact exchange."""
    settings = {
        "shards": str(shards),
        "out": str(out),
        "steps": 12,
        "cpus_per_worker": 0.5,
        "network": NetworkConfig(tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1), dropout=0.1)),
        "learn": LearnConfig(global_batch=6, micro_batch=2, seed=3, optim=OptimConfig(lr=1e-2, larc=True)),
        "feed": FeedConfig(ahead_mib=0.2, window_mib=0.5),
        "checkpoint": CheckpointConfig(every_steps=3),
    }
    return TrainConfig(**{**settings, **changes})

"""What tiles and rules cost, beside a plain memory map of the same bytes. The training step has `bench_step`."""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from raysegment.archive.manifest import Manifest
from raysegment.archive.quantise import quantise
from raysegment.archive.shards import TileId, open_shards, write_shard
from raysegment.climate.rules import RULES, parse_rules
from raysegment.climate.synthetic import SyntheticConfig, generate


@dataclass(frozen=True)
class BenchConfig:
    """Size of the map, and how often each thing is timed (the median counts)."""

    height: int = 96
    width: int = 192
    repeats: int = 5

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.repeats) < 1:
            raise ValueError(f"expected sizes and repeats of at least 1, got {self}")


def bench(config: BenchConfig) -> dict[str, float]:
    """Medians of `repeats` timings: tiles per second from a shard and from a plain memory map, seconds of the
    rules by name, and the most memory that each holds above its input."""
    return {**_reading(config), **_rules(config)}


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work` over `repeats` calls after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _reading(config: BenchConfig) -> dict[str, float]:
    """Tiles from a shard against a plain memory map of the same bytes, both copied into a tensor."""
    made = [generate(SyntheticConfig(8, config.height, config.width), i) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        tiles = [(s.fields, s.mask, TileId(f"bench-{i}.nc", 0, "", 0, 0)) for i, s in enumerate(made)]
        part = write_shard(Path(folder) / "part.arrow", tiles)
        Manifest.of([part], (config.height, config.width), made[0].grid, "bench").save(folder)
        shards = open_shards(folder)
        np.save(Path(folder) / "plain.npy", np.stack([quantise(s.fields) for s in made]))
        plain = np.load(Path(folder) / "plain.npy", mmap_mode="r")
        ours = 8 / median_s(lambda: [torch.from_numpy(shards.tile(i).fields.copy()) for i in range(8)], config.repeats)
        theirs = 8 / median_s(lambda: [torch.from_numpy(np.array(plain[i])) for i in range(8)], config.repeats)
    return {"tiles_per_s": ours, "memory_map_tiles_per_s": theirs, "tiles_share_of_memory_map": ours / theirs}


def _rules(config: BenchConfig) -> dict[str, float]:
    """Seconds and peak memory (MB above the fields) of every rule set by name on one map."""
    snapshot = generate(SyntheticConfig(1, config.height, config.width), 0)
    costs = {}
    for name in RULES:
        label = partial(parse_rules(name).label, snapshot.fields, snapshot.grid)
        costs[f"rules_{name}_s"] = median_s(label, config.repeats)
        costs[f"rules_{name}_peak_mb"] = _peak_mb(label)
    return costs


def _peak_mb(work: Callable[[], object]) -> float:
    """Most memory (MB) that one call held at a time beyond what was there before, in arrays and Python objects."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()

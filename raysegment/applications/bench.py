"""Measured speed beside the machine's own limits, in one run: what a step reaches of what this machine can do."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from raysegment.archive.shards import Manifest, TileId, open_shards, quantise, write_shard
from raysegment.climate.rules import parse_rules
from raysegment.climate.synthetic import SyntheticConfig, generate
from raysegment.learning.flops import training_flops
from raysegment.networks import NetworkConfig, build


@dataclass(frozen=True)
class BenchConfig:
    """Size of the map, the network, and how often each thing is timed (the median counts)."""

    height: int = 96
    width: int = 192
    batch: int = 2
    repeats: int = 5
    threads: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.batch, self.repeats) < 1:
            raise ValueError(f"expected sizes and repeats of at least 1, got {self}")


def bench(config: BenchConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """Medians of `repeats` timings; FLOP/s count multiply and add separately (as the 2018 paper does)."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    parts = (_limits, _training, _reading, _rules)
    result: dict[str, float] = {"threads": float(torch.get_num_threads())}
    for number, part in enumerate(parts):
        result |= part(config, result)
        if progress:
            progress(number + 1, len(parts))
    return result


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work` over `repeats` calls after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _limits(config: BenchConfig, _: dict[str, float]) -> dict[str, float]:
    """The machine's best at a matrix product (2048³) and at a 3×3 convolution of 128 channels, GFLOP/s."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(2048, 2048, dtype=dtype)
        matmul = 2 * 2048**3 / median_s(lambda a=a: a @ a, config.repeats)
        x = torch.randn(2, 128, 96, 96, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        convolution = 2 * 2 * 128 * 128 * 9 * 94 * 94 / median_s(lambda x=x, w=w: torch.conv2d(x, w), config.repeats)
        found[f"limit_{name}_gflop_s"] = max(matmul, convolution) / 1e9
    return found


def _training(config: BenchConfig, limits: dict[str, float]) -> dict[str, float]:
    """Forward and backward of the network in bf16 autocast and float32: samples/s, GFLOP/s, share of the machine's limit."""
    network = build(config.network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    fields = torch.randn(config.batch, config.network.channels, config.height, config.width)
    fields = fields.to(memory_format=torch.channels_last)
    flops = training_flops(network, (config.height, config.width))

    def step(mixed: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            network(fields).float().square().mean().backward()
        network.zero_grad()

    found = {"training_gflop_per_sample": flops / 1e9}
    for name, mixed in (("bfloat16", True), ("float32", False)):
        rate = config.batch / median_s(lambda mixed=mixed: step(mixed), config.repeats)
        found[f"training_{name}_samples_per_s"] = rate
        found[f"training_{name}_share_of_limit"] = rate * flops / 1e9 / limits[f"limit_{name}_gflop_s"]
    return found


def _reading(config: BenchConfig, _: dict[str, float]) -> dict[str, float]:
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


def _rules(config: BenchConfig, _: dict[str, float]) -> dict[str, float]:
    """Seconds of the default rules on one map."""
    snapshot = generate(SyntheticConfig(1, config.height, config.width), 0)
    rules = parse_rules("rules:default")
    return {"rules_default_s": median_s(lambda: rules.label(snapshot.fields, snapshot.grid), config.repeats)}

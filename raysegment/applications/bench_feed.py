"""Tiles per second from a plain memory map, from our stream and from other libraries' formats, in turn on one machine.

The same tiles (16 fields of float16 and a mask of uint8) are written in every format, read once to warm the page cache and
start every worker, and then pass after pass, the readers taking turns (A B C … A B C …). A pass is one epoch: every tile
reaches the consumer as torch tensors, and one byte of each of its pages is read. The bytes that count are those of fields
and mask. Each consumer is a process of its own; two read half of the tiles each, at the same time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from raysegment.applications.readers.apart import Consumers, LeftOut, call_apart, rate, write
from raysegment.archive.manifest import Manifest
from raysegment.archive.quantise import dequantise
from raysegment.archive.shards import TileId, open_shards, write_shard
from raysegment.climate.channels import CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.feed.order import Order
from raysegment.feed.session import ensure_ray
from raysegment.feed.stream import open_stream

OURS = ("mmap", "stream", "stream_cached")
PEERS = {  # name in the result: module of `readers`
    "mmap_reused": "mmap_reused",
    "hdf5_dataloader": "hdf5",
    "webdataset": "web",
    "litdata": "lit",
    "ray_parquet": "parquet",
    "mosaic": "mosaic",
}
MODULES = {**{name: name for name in OURS}, **PEERS}
STEP_S = 0.3  # a step of the consumer that computes: short for these tiles, so that waiting shows
_STEP_TILES = 2
_PART_TILES = 8
_PATIENCE_S = 300.0  # a reader that says nothing for so long is left out
_CLEAR = 0xBFFF  # random bits without float16's top exponent bit are finite and below 2

Report = Callable[..., None]


@dataclass(frozen=True)
class FeedBenchConfig:
    """Rows and columns of a tile, how many there are, at most how many timed passes (the median counts) and about how many
    seconds for each number of consumers; `directory` is where the formats are written and removed again ("": the temporary
    one), `peers` is "all", "none" or names with commas, `steps` how many steps the computing consumer takes."""

    height: int = 768
    width: int = 1152
    tiles: int = 24
    repeats: int = 5
    seconds: float = 300.0
    consumers: tuple[int, ...] = (1, 2)
    steps: int = 12
    peers: str = "all"
    directory: str = ""
    step_s: float = STEP_S

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 2 or min(self.repeats, self.steps) < 1 or min(self.seconds, self.step_s) <= 0:
            raise ValueError(f"expected tiles of 2 x 2 cells or more, one of repeats and steps, seconds above 0, got {self}")
        if sorted(set(self.consumers)) not in ([1], [1, 2]):
            raise ValueError(f"consumers: expected [1] or [1, 2], got {list(self.consumers)}")
        if self.tiles < 4 or self.tiles % 2:
            raise ValueError(f"tiles: expected an even number of at least 4, got {self.tiles}")
        if unknown := set(self.others) - set(PEERS):
            raise ValueError(f"peers: expected all, none or some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")

    @property
    def others(self) -> tuple[str, ...]:
        """The peers that are to take part."""
        named = {"all": tuple(PEERS), "none": ()}
        return named.get(self.peers, tuple(self.peers.split(",")))

    @property
    def tile_bytes(self) -> int:
        return self.height * self.width * (2 * len(NAMES) + 1)

    @property
    def disk_bytes(self) -> int:
        """What all formats take, about."""
        return int(1.1 * self.tile_bytes * self.tiles * (len(OURS) + len(self.others)))


def bench_feed(config: FeedBenchConfig, progress: Report = lambda done, total, note="": None) -> dict[str, Any]:
    """Everything that `raysegment bench feed` reports; rates in MiB/s, of fields and mask."""
    with tempfile.TemporaryDirectory(prefix="raysegment-feed-", dir=_roomy(config)) as name:
        folder = Path(name)
        folders, left_out = prepare(config, folder, progress)
        ensure_ray()
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        measured = {world: measure(config, folders, world, environment, left_out, progress) for world in config.consumers}
        waiting = call_apart(_waiting, (folder / "source", config.steps, config.step_s, environment), _PATIENCE_S)
    return {**_rates(measured), **waiting, "left_out": left_out, **_what(config)}


def _roomy(config: FeedBenchConfig) -> str:
    """The folder for the formats; BadInput when they do not fit."""
    folder = config.directory or tempfile.gettempdir()
    if not Path(folder).is_dir():
        raise BadInput("directory", "a folder", f"{folder!r}", "Create it, or leave it out for the temporary one")
    free, needed = shutil.disk_usage(folder).free, config.disk_bytes
    if free < needed:
        expected, got = f"{needed / 2**30:.1f} GiB free in {folder}", f"{free / 2**30:.1f}"
        raise BadInput("directory", expected, got, "Name another directory, or ask for fewer tiles or peers")
    return folder


def _what(config: FeedBenchConfig) -> dict[str, Any]:
    shape = [len(NAMES), config.height, config.width]
    return {"tiles": config.tiles, "tile": shape, "tile_mib": config.tile_bytes / 2**20, "cores": os.cpu_count(),
            "step_s": config.step_s}  # fmt: skip


# ---------------------------------------------------------------- formats


def prepare(config: FeedBenchConfig, folder: Path, progress: Report) -> tuple[dict[str, Path], dict[str, str]]:
    """The folder of each reader's format below `folder`, and for each peer that cannot take part the reason why."""
    source = folder / "source"
    source.mkdir()
    write_source(source, config)
    folders, left_out = {}, {}
    for done, name in enumerate((*OURS, *config.others)):
        progress(done, len(OURS) + len(config.others), f"writing {name}")
        try:
            call_apart(write, (MODULES[name], source, folder / name), _PATIENCE_S)
            folders[name] = folder / name
        except LeftOut as reason:
            _leave_out(name, reason, left_out)
    return folders, left_out


def _leave_out(name: str, reason: LeftOut, left_out: dict[str, str]) -> None:
    if name in OURS:
        raise RuntimeError(f"{name}: {reason}")
    left_out[name] = str(reason)


def write_source(folder: Path, config: FeedBenchConfig) -> None:
    """A shard set of random tiles: incompressible, and the same for every run."""
    parts = []
    for first in range(0, config.tiles, _PART_TILES):
        numbers = range(first, min(first + _PART_TILES, config.tiles))
        parts.append(write_shard(folder / f"part-{first:05d}.arrow", (_random(config, number) for number in numbers)))
    Manifest.of(parts, (config.height, config.width), Grid.global_(config.height, config.width), "bench").save(folder)


def _random(config: FeedBenchConfig, number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8], TileId]:
    """Tile `number` in SI units."""
    random, shape = np.random.default_rng(number), (config.height, config.width)
    bits = random.integers(0, 1 << 16, (len(NAMES), *shape), np.uint16) & np.uint16(_CLEAR)
    mask = random.integers(0, len(CLASSES), shape, np.uint8)
    return dequantise(bits.view(np.float16)), mask, TileId(f"bench-{number}.nc", 0, "", 0, 0)


# ---------------------------------------------------------------- passes


@dataclass
class Measured:
    """MiB/s of each timed pass, and the seconds from opening a format to its first tile (workers and all)."""

    rates: dict[str, list[float]]
    start_s: dict[str, float]


def measure(
    config: FeedBenchConfig,
    folders: dict[str, Path],
    world: int,
    environment: dict[str, str],
    left_out: dict[str, str],
    progress: Report,
) -> Measured:
    """Passes of every reader with `world` consumers, in turn; a peer that fails is added to `left_out`."""
    names = [name for name in folders if name not in left_out]
    consumers = {name: Consumers(MODULES[name], folders[name], world, environment, _PATIENCE_S) for name in names}
    try:
        start_s = _warm_up(consumers, left_out)
        ready = {name: consumers[name] for name in start_s}
        return Measured(_rounds(config, ready, world, left_out, progress), start_s)
    finally:
        for each in consumers.values():
            each.dismiss()
        for each in consumers.values():
            each.close()


def _warm_up(consumers: dict[str, Consumers], left_out: dict[str, str]) -> dict[str, float]:
    """Seconds from opening to the first tile, of each reader that gets so far; a whole pass, which is not counted."""
    start_s = {}
    for name, each in consumers.items():
        try:
            start_s[name] = each.first_pass_s()
        except LeftOut as reason:
            _leave_out(name, reason, left_out)
    return start_s


def _rounds(
    config: FeedBenchConfig, consumers: dict[str, Consumers], world: int, left_out: dict[str, str], progress: Report
) -> dict[str, list[float]]:
    """MiB/s of every pass, round by round; whoever has used up an equal share of the time sits out the rounds that remain."""
    rates: dict[str, list[float]] = {name: [] for name in consumers}
    spent, share_s = dict.fromkeys(consumers, 0.0), config.seconds / len(consumers)
    for done in range(config.repeats):
        progress(done, config.repeats, f"{world} consumer{'s' if world > 1 else ''}")
        for name in [name for name in rates if spent[name] < share_s]:
            started = time.monotonic()
            try:
                rates[name].append(rate(consumers[name].one_pass()))
            except LeftOut as reason:
                del rates[name]
                _leave_out(name, reason, left_out)
            spent[name] += time.monotonic() - started
    return rates


def _rates(measured: dict[int, Measured]) -> dict[str, Any]:
    """Medians over the passes, and the slowest and the fastest of them."""
    one = measured[1].rates
    medians = {name: statistics.median(rates) for name, rates in one.items()}
    result = {
        "mmap_mib_s": medians["mmap"], "stream_mib_s": medians["stream"],
        "stream_cached_mib_s": medians["stream_cached"],
        "ratio_to_mmap": medians["stream"] / medians["mmap"],
        "peers": {name: medians[name] for name in PEERS if name in medians},
        "spread": {name: [min(rates), max(rates)] for name, rates in one.items()},
        "passes": {name: len(rates) for name, rates in one.items()}, "start_s": measured[1].start_s,
    }  # fmt: skip
    if 2 in measured:
        two = measured[2].rates
        result["two_consumers"] = {name: statistics.median(rates) for name, rates in two.items()}
        result["two_consumers_spread"] = {name: [min(rates), max(rates)] for name, rates in two.items()}
    return result


# ---------------------------------------------------------------- waiting


def _waiting(source: Path, steps: int, step_s: float, environment: dict[str, str]) -> dict[str, float]:
    """Seconds to a stream's first step, and the share of a computing consumer's time that is spent waiting after it."""
    os.environ.update(environment)
    ensure_ray()
    tiles = len(open_shards(source))
    order = Order(tiles, _STEP_TILES, _STEP_TILES)
    _first_batch_s(source, order)
    firsts = [_first_batch_s(source, order) for _ in range(5)]
    return {"first_batch_s": statistics.median(firsts), "data_wait_share": _wait_share(source, order, steps, step_s)}


def _first_batch_s(source: Path, order: Order) -> float:
    started = time.perf_counter()
    stream = open_stream(source, order, 0, order.steps(1))
    next(stream)
    seconds = time.perf_counter() - started
    for _ in stream:  # to its end, so that no thread of it disturbs what is timed next
        pass
    return seconds


def _wait_share(source: Path, order: Order, steps: int, step_s: float) -> float:
    """Over `steps` steps of `step_s` each, after a first one that is start-up."""
    stream = open_stream(source, order, 0, steps + 1)
    next(stream)
    _compute(step_s)
    waited, started = 0.0, time.perf_counter()
    for step in stream:
        waited += step.load_s
        _compute(step_s)
    return waited / (time.perf_counter() - started)


def _compute(seconds: float) -> None:
    """Keep one core busy for so long."""
    torch.set_num_threads(1)
    matrix, until = torch.rand(256, 256), time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.mm(matrix, matrix)


def lines(result: dict[str, Any]) -> Iterator[list[Any]]:
    """Rows of the table for people: reader, MiB/s, slowest, fastest, ratio to the memory map, two consumers, start s."""
    medians = {"mmap": result["mmap_mib_s"], "stream": result["stream_mib_s"], "stream_cached": result["stream_cached_mib_s"]}
    medians |= result["peers"]
    for name, median in sorted(medians.items(), key=lambda item: -item[1]):
        two = result.get("two_consumers", {}).get(name, "")
        yield [name, median, *result["spread"][name], median / medians["mmap"], two, result["start_s"][name]]

"""What a training run is asked to do, and which of it may change when the run is taken up again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raysegment.archive.manifest import Manifest
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic.chaos import Plan
from raysegment.elastic.ladder import Ladder
from raysegment.feed.order import Order
from raysegment.feed.stream import FeedConfig
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import LearnConfig, initialise
from raysegment.networks import NetworkConfig
from raysegment.networks.blocks import choose

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where state is kept.

    Files: every `every_steps` steps; or every `every_s` seconds; or, where both are 0, as often as their measured cost and
    the failures of the run make best (Young 1974, Daly 2006). The last `keep` stay, in `place`: a folder or URI
    (s3://bucket/prefix) that all nodes reach, "" being the run's own folder.
    Memory: the first worker of each node keeps the newest state every `memory_steps` steps (0: as often as costs 1 % of
    the time) in the folder `memory` of the node ("" is below /dev/shm, "off" nowhere): it outlives the processes.
    """

    every_s: float = 0.0
    every_steps: int = 0
    keep: int = 3
    place: str = ""
    memory: str = ""
    memory_steps: int = 0

    def __post_init__(self) -> None:
        if self.every_s < 0 or self.every_steps < 0 or self.keep < 1 or self.memory_steps < 0:
            raise ValueError(f"checkpoint: expected keep >= 1 and no negative every_s, every_steps, memory_steps, got {self}")


@dataclass(frozen=True)
class ElasticConfig:
    """The fleet: how many cells of how many workers, and how patient it is.

    `cells` (least, most): training goes on while at least `least` are there, and takes up to `most` as there is room. A cell
    is a Ray Train `TorchTrainer` with a fixed number of workers on one node: `workers_per_cell`, or where that is 0 the run's
    `workers`, of which a single cell's may be on several nodes. All time limits follow from `patience_s` (see `elastic.ladder`).
    `eject_stragglers`: members more than three times slower than the median over 20 steps are replaced, not only named.
    """

    cells: tuple[int, int] = (1, 1)
    workers_per_cell: int = 0
    patience_s: float = 2.0
    eject_stragglers: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(self.cells))
        if len(self.cells) != 2 or not 1 <= self.cells[0] <= self.cells[1]:
            raise ValueError(f"elastic.cells: expected [least, most] with 1 <= least <= most, got {list(self.cells)}")
        if self.workers_per_cell < 0:
            raise ValueError(f"elastic.workers_per_cell: expected 1 or more (0: the run's workers), got {self.workers_per_cell}")
        Ladder(self.patience_s)


@dataclass(frozen=True)
class ValidationConfig:
    """IoU on tiles that are not trained on: all those of the set `shards`, every `every_steps` steps; "" for none."""

    shards: str = ""
    every_steps: int = 100

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"validation.every_steps: expected 1 or more, got {self.every_steps}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run: `shards` to learn from, the run folder `out`, how long, with how many workers, what and how.

    `channels` are those that the network reads, in this order; none named means all 16. Shards always hold all 16.
    `steps` or, where it is 0, `epochs` says how long; the learning-rate schedule spans exactly that. `window_tiles` 0
    mixes all tiles of an epoch; otherwise so many at a time, for shards that come through a cache smaller than they are,
    which then reads each of them once per epoch. `cpus_per_worker` CPUs are reserved for each worker, which computes with
    as many threads. `max_failures` bounds the restarts of each cell (−1: no bound), `max_fruitless` failures in a row
    without one new step. `chaos` injects faults: "kill@step=12,member=1; seed=7,every=5s" (see `elastic.chaos`).
    """

    shards: str = ""
    out: str = "runs/train"
    name: str = "train"
    channels: tuple[str, ...] = ()
    steps: int = 0
    epochs: float = 10.0
    window_tiles: int = 0
    workers: int = 1
    cpus_per_worker: float = 1.0
    device: str = "auto"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    learn: LearnConfig = field(default_factory=LearnConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    max_failures: int = -1
    max_fruitless: int = 5
    chaos: str = ""

    def __post_init__(self) -> None:
        check_channels(self.channels)
        if self.device not in DEVICES:
            raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise ValueError(f"steps or epochs: expected one of them above 0, got {self.steps} and {self.epochs}")
        if self.window_tiles < 0:
            raise ValueError(f"window_tiles: expected 0 or more, got {self.window_tiles}")
        if self.workers < 1 or self.cpus_per_worker <= 0:
            raise ValueError(f"workers, cpus_per_worker: expected more than 0, got {self.workers} and {self.cpus_per_worker}")
        if self.max_failures < -1 or self.max_fruitless < 1:
            raise ValueError(
                f"expected max_failures >= -1 and max_fruitless >= 1, got {self.max_failures} and {self.max_fruitless}"
            )
        plan = Plan.parse(self.chaos)
        if self.elastic.cells[1] == 1 and "driver" in {*(fault.kind for fault in plan.faults), *plan.kinds}:
            raise ValueError("chaos: expected several cells for `driver`, whose death is the run's where there is one")

    @property
    def workers_per_cell(self) -> int:
        """Workers of each cell."""
        return self.elastic.workers_per_cell or self.workers

    @property
    def members(self) -> int:
        """Workers of all cells, at most."""
        return self.elastic.cells[1] * self.workers_per_cell

    @property
    def checkpoint_place(self) -> str:
        """Where checkpoints are, as a path or URI."""
        return self.checkpoint.place or f"{self.out}/checkpoints"

    @property
    def threads(self) -> int:
        """Threads a worker computes with."""
        return max(1, int(self.cpus_per_worker))

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What the network reads, by name."""
        return self.channels or NAMES

    def resolved(self, manifest: Manifest) -> TrainConfig:
        """With steps, the schedule's length and `network.channels` filled in; BadInput where the shards do not fit.

        `learn.augment.roll` is switched off for tiles that do not close the circle.
        """
        network = self._network(manifest)
        steps = self.steps or self.order(manifest).steps(self.epochs)
        total = self.learn.optim.total_steps
        if total not in (OptimConfig().total_steps, steps):
            raise BadInput("learn.optim.total_steps", f"the run's {steps} steps", total, "Leave it out: `steps` decides.")
        augment = self.learn.augment
        if not manifest.periodic:  # a tile that does not close the circle has no other side to roll in from
            augment = replace(augment, roll=False)
        learn = replace(self.learn, optim=replace(self.learn.optim, total_steps=steps), augment=augment)
        return replace(self, steps=steps, learn=learn, network=network)

    def order(self, manifest: Manifest) -> Order:
        """The order of tiles; the tiles of a shard enter a window together, which is at least one shard wide."""
        learn, block = self.learn, max(shard.tiles for shard in manifest.shards)
        if not self.window_tiles:
            return Order(manifest.tiles, learn.global_batch, learn.micro_batch, learn.seed)
        window = max(1, self.window_tiles // block) * block
        return Order(manifest.tiles, learn.global_batch, learn.micro_batch, learn.seed, window, block)

    def _network(self, manifest: Manifest) -> NetworkConfig:
        """The network with its number of channels; BadInput where it cannot read or label the tiles."""
        count, asked = len(self.channel_names), self.network
        if asked.channels not in (NetworkConfig().channels, count) or asked.classes != len(manifest.classes):
            expected = f"{count} channels and {len(manifest.classes)} classes"
            remedy = "Leave network.channels and network.classes at their defaults; `channels` decides."
            raise BadInput("network", expected, f"{asked.channels} and {asked.classes}", remedy)
        network = replace(asked, channels=count)
        self._check_tiles(manifest, network)
        return network

    def _check_tiles(self, manifest: Manifest, network: NetworkConfig) -> None:
        multiple = int(initialise(network, 0).multiple)  # pyright: ignore[reportArgumentType]
        height, width = manifest.tile
        if height % multiple or width % multiple:
            remedy = f"Stage with --tile {max(1, height // multiple) * multiple}x{max(1, width // multiple) * multiple}."
            raise BadInput(self.shards, f"tiles whose sides divide by the network's {multiple}", f"{height}x{width}", remedy)


def check_channels(channels: tuple[str, ...]) -> None:
    """Raise a ValueError unless these are names of channels, each once."""
    if any(len(name) == 1 for name in channels):  # a text has been taken for a list of letters
        raise ValueError("channels: expected a list like [TMQ, PSL], got a text without brackets")
    for name in channels:
        choose("channels", name, NAMES)
    if len(set(channels)) < len(channels):
        raise ValueError(f"channels: expected each name once, got {', '.join(channels)}")


# What may differ when a run is continued: it changes how the result is reached, not the result.
_FREE = ("shards", "out", "name", "epochs", "workers", "cpus_per_worker", "device", "feed", "checkpoint", "elastic",
         "validation", "max_failures", "max_fruitless", "chaos")  # fmt: skip
_SAME = {"learn.optim.total_steps", "learn.checkpointing"}  # follows from `steps`; changes no bit


def identity(config: TrainConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The keys (dotted) and values that make a run the run it is."""
    tree = config if isinstance(config, Mapping) else plain(config)
    tree = {**tree, "channels": list(tree.get("channels") or NAMES)}  # none named means all
    return {key: value for key, value in flat(tree) if key.split(".")[0] not in _FREE and key not in _SAME}


def other_values(before: Mapping[str, Any], config: TrainConfig) -> str:
    """The keys in which a run differs from one so configured, with both values, in words; "" where it is the same run."""
    was, now = identity(before), identity(config)
    differing = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key)]
    return ", ".join(f"{key} ({was.get(key)} there, {now.get(key)} now)" for key in differing)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as YAML and JSON can hold it."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

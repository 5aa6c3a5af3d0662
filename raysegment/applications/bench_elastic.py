"""What being elastic costs while nothing happens: members of a fleet against a bare loop, in the same processes, in turn.

Each member of a small world lives its life (`elastic.loop`): a roster in a process of its own, a heart beside it, exact exchange,
states into the node's memory and into files. After every block of its steps, all members together do a block of bare ones: the
same learner with the plain floating-point exchange over a process group that never changes, tiles already in memory, nothing
else. A cost is the median over the rounds of one block's time over that of the bare one next to it. Then the same with each
part switched off. What is still being saved when a block ends is waited for within the block.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysegment import config as configurations
from raysegment.applications.bench_exchange import Case
from raysegment.archive.manifest import Manifest
from raysegment.archive.shards import TileId, write_shard
from raysegment.climate.channels import CHANNELS, CLASSES
from raysegment.climate.grid import Grid
from raysegment.elastic.chaos import Fault, Injector, Plan
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.loop import Loop
from raysegment.elastic.membership import Member, Over
from raysegment.elastic.roster import Address, Roster
from raysegment.elastic.runs import Run
from raysegment.elastic.safe import Safe
from raysegment.elastic.settings import TrainConfig, plain
from raysegment.elastic.worker import make_learner
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.feed.quarantine import Quarantine
from raysegment.feed.stream import make_stream
from raysegment.learning.exchange import Distributed
from raysegment.learning.step import Learner
from raysegment.networks import NetworkConfig, TiramisuConfig

# What each variant has besides (or instead of) the defaults
VARIANTS: dict[str, tuple[str, ...]] = {
    "everything": (),
    "exchange fast": ("learn.exchange=fast",),
    "nothing kept in memory": ('checkpoint.memory="off"',),
    "no files": ("checkpoint.every_s=1e9",),
    "nothing kept, no files": ('checkpoint.memory="off"', "checkpoint.every_s=1e9"),
    "roster and heart alone": ("learn.exchange=fast", 'checkpoint.memory="off"', "checkpoint.every_s=1e9"),
}
_TILES, _PATIENCE_S = 8, 120.0


@dataclass(frozen=True)
class ElasticBenchConfig:
    """`world` members of one thread; per variant `rounds` of `block` steps, which take about `step_s` seconds each.

    The case's tiles are one micro-batch, and there are as many of those as the step's time asks for.
    """

    world: int = 2
    rounds: int = 8
    block: int = 20
    step_s: float = 0.3
    variants: tuple[str, ...] = tuple(VARIANTS)
    case: Case = field(
        default_factory=lambda: Case(
            NetworkConfig(tiramisu=TiramisuConfig(first=16, growth=8, kernel=3, blocks=(2, 2, 4))), 96, 144
        )
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "variants", tuple(self.variants))
        if min(self.world, self.rounds, self.block) < 1 or self.step_s <= 0:
            raise ValueError(f"expected counts of at least 1 and step_s above 0, got {self}")
        if not {*self.variants} <= {*VARIANTS}:
            raise ValueError(f"variants: expected some of {', '.join(VARIANTS)}, got {', '.join(self.variants)}")


def bench_elastic(config: ElasticBenchConfig, progress: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Per variant the seconds of a step, of a bare one beside it, and the cost as a share of that (quartiles of the rounds)."""
    with tempfile.TemporaryDirectory(prefix="raysegment-elastic-") as folder:
        shards = _shards(config, Path(folder) / "shards")
        train = _training(config, shards)
        micro_batches = max(1, round(config.step_s / _micro_batch_s(train)))
        found = {}
        for number, variant in enumerate(config.variants):
            progress(number, len(config.variants), variant)
            found[variant] = _variant(config, train, micro_batches, VARIANTS[variant], Path(folder) / f"run-{number}")
        return {"world": config.world, "micro_batches": micro_batches, "load_before": os.getloadavg()[0], "variants": found}


def _shards(config: ElasticBenchConfig, folder: Path) -> Path:
    """Tiles of noise about the channels' usual values."""
    random, shape = np.random.default_rng(0), (config.case.height, config.case.width)
    usual = [np.array([getattr(channel, key) for channel in CHANNELS])[:, None, None] for key in ("reference", "scale")]
    folder.mkdir()
    rows = [
        (
            (usual[0] + 0.1 * usual[1] * random.standard_normal((len(CHANNELS), *shape))).astype(np.float32),
            random.integers(0, len(CLASSES), shape, np.uint8),
            TileId(f"bench-{number}.nc", 0, "", 0, 0),
        )
        for number in range(_TILES)
    ]
    Manifest.of([write_shard(folder / "part-00000.arrow", rows)], shape, Grid.global_(*shape), "bench").save(folder)
    return folder


def _training(config: ElasticBenchConfig, shards: Path) -> TrainConfig:
    tree = {
        "shards": str(shards), "steps": 10**6, "network": config.case.network, "elastic": {"cells": [config.world, config.world]},
        "learn": {"micro_batch": config.case.tiles, "global_batch": config.case.tiles, "precision": "fp32"},
    }  # fmt: skip
    return configurations.load(TrainConfig, tree)


def _micro_batch_s(train: TrainConfig) -> float:
    """Seconds of a step of one micro-batch, alone."""
    torch.set_num_threads(1)
    manifest = Manifest.load(train.shards)
    learner = make_learner(train.resolved(manifest), manifest, "cpu")
    bare = Bare(learner, manifest, 1)
    bare.block(3)
    return bare.block(10)


class Bare:
    """A learner with as much to do in every step, from memory."""

    def __init__(self, learner: Learner, manifest: Manifest, micro_batches: int):
        self.learner, self.micro_batches = learner, micro_batches
        size, (height, width) = learner.config.micro_batch, manifest.tile
        self.fields = torch.randn(size, len(CHANNELS), height, width).half()
        self.mask = torch.randint(0, len(CLASSES), (size, height, width)).to(torch.uint8)

    def block(self, steps: int) -> float:
        """Seconds per step of so many."""
        started = time.perf_counter()
        for step in range(self.learner.step, self.learner.step + steps):
            self.learner.run(self._input(step))
        self.learner.settle()
        return (time.perf_counter() - started) / steps

    def _input(self, step: int) -> StepInput:
        size, world = self.learner.config.micro_batch, self.learner.world
        first = step * self.learner.config.global_batch + world.rank * size * self.micro_batches
        starts = range(first, first + size * self.micro_batches, size)
        return StepInput(step, [MicroBatch(torch.arange(s, s + size), self.fields, self.mask) for s in starts])


class Turns(Injector):
    """In a member's life, where faults would be injected between steps: after each block, a block of bare steps."""

    def __init__(self, config: ElasticBenchConfig, bare: Bare, safe: Safe, told: Connection):
        super().__init__(Plan(), Path(), lambda _: None)
        self.config, self.bare, self.safe, self.told = config, bare, safe, told
        self.began, self.rounds = 0.0, 0

    def fire(self, step: int, member: int, at: str = "step") -> list[Fault]:
        if at == "commit" and (step + 1) % self.config.block == 0:
            self._turn()
        return []

    def _turn(self) -> None:
        self.safe.saver.drain(_PATIENCE_S)
        own = (time.perf_counter() - self.began) / self.config.block
        dist.barrier()
        bare = self.bare.block(self.config.block)
        if self.rounds:  # the first was for warming up
            self.told.send((own, bare))
        self.rounds += 1
        if self.rounds > self.config.rounds:
            raise Over
        dist.barrier()
        self.began = time.perf_counter()


def _variant(
    config: ElasticBenchConfig, train: TrainConfig, micro_batches: int, options: tuple[str, ...], out: Path
) -> dict[str, Any]:
    """A fleet of its own, with a roster of its own."""
    size = train.learn.micro_batch * micro_batches * config.world
    words = [*options, f"out={out}", f"learn.global_batch={size}"]
    tree = configurations.apply_overrides(plain(train), words)
    mine = configurations.load(TrainConfig, tree).resolved(Manifest.load(train.shards))
    run = Run(mine.out)
    run.prepare(mine)
    run.event("start")
    context = mp.get_context("spawn")
    roster = context.Process(target=_serve, args=(mine, out / "address"), daemon=True)
    roster.start()
    members, heard = [], []
    try:
        for rank in range(config.world):
            ours, theirs = context.Pipe(duplex=False)
            members.append(context.Process(target=_member, args=(config, mine, micro_batches, rank, out, theirs), daemon=True))
            members[-1].start()
            theirs.close()
            heard.append(ours)
        return _summary([np.max([_hear(one) for one in heard], axis=0).tolist() for _ in range(config.rounds)])
    finally:
        for process in (*members, roster):
            process.kill()
            process.join()


def _hear(told: Connection) -> tuple[float, float]:
    try:
        if told.poll(10 * _PATIENCE_S):
            return told.recv()
    except EOFError:
        pass
    raise RuntimeError("a member of the bench says nothing any more")


def _summary(rounds: list[list[float]]) -> dict[str, Any]:
    shares = [own / bare - 1 for own, bare in rounds]
    cost = dict(zip(("low", "median", "high"), np.percentile(shares, (25, 50, 75)).tolist(), strict=True))
    own, bare = (statistics.median(one[place] for one in rounds) for place in (0, 1))
    return {"step_s": own, "bare_step_s": bare, "cost": cost}


# ---------------------------------------------------------------- the processes


def _serve(config: TrainConfig, file: Path) -> None:
    async def serve() -> None:
        address = await Roster(config, "127.0.0.1").start()
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps([address.host, address.port, address.token]))
        temporary.rename(file)
        await asyncio.Event().wait()

    asyncio.run(serve())


class _Alone:
    """What Ray Train would be."""

    def __init__(self) -> None:
        self.news: dict[str, Any] = {}
        self.warned = False


def _member(config: ElasticBenchConfig, train: TrainConfig, micro_batches: int, rank: int, out: Path, told: Connection) -> None:
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    patience = timedelta(seconds=_PATIENCE_S)
    dist.init_process_group("gloo", init_method=f"file://{out / 'store'}", rank=rank, world_size=config.world, timeout=patience)
    manifest, run = Manifest.load(train.shards), Run(train.out)
    member = Member(lambda: _address(out / "address"), f"0.{rank}-bench", {"node": "bench", "cell": 0},
                    Ladder(train.elastic.patience_s), "127.0.0.1", "gloo")  # fmt: skip
    learner, safe = make_learner(train, manifest, "cpu"), Safe(train, run, manifest, member, "bench")
    plain_learn = replace(train.learn, exchange="fast")
    bare = Bare(make_learner(replace(train, learn=plain_learn), manifest, "cpu"), manifest, micro_batches)
    bare.learner.world = Distributed()
    stream = make_stream(train.shards, train.order(manifest), train.steps, train.feed, Quarantine(manifest.tiles, 0, out / "q"))
    turns = Turns(config, bare, safe, told)
    try:
        Loop(train, run, member, learner, stream, train.order(manifest), safe, _Alone(), turns).run()
    except Over:
        pass
    finally:
        stream.close()


def _address(file: Path) -> Address:
    deadline = time.monotonic() + _PATIENCE_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return Address(*json.loads(file.read_text()))


def lines(found: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of a table."""
    for variant, one in found["variants"].items():
        cost = one["cost"]
        share = f"{100 * cost['median']:+.2f} %", f"{100 * cost['low']:+.2f} … {100 * cost['high']:+.2f} %"
        yield [variant, f"{one['step_s']:.4f}", f"{one['bare_step_s']:.4f}", *share]

"""What the exchange of a step costs: exact over fast, and with overlap over without, in processes over gloo on this machine.

All kinds of step live in the same processes and the same process group and take turns: a round is a block of steps of each
kind, and every other round goes backwards (A B … B A). A cost is the median over the rounds of one kind's time over
another's in the same round, so that what else the machine does weighs on both alike.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raysegment.applications.bench_step import WEIGHTS
from raysegment.climate.channels import BY_NAME, NAMES
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.learning.exchange import Distributed
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import LearnConfig, Learner, StepInfo, initialise
from raysegment.networks import NetworkConfig, TiramisuConfig
from raysegment.networks.blocks import check_size, choose

_PATIENCE_S = 120.0  # for a member's next word, beside what its steps take
# Name: exchange, lag, overlap, wire. "after": all buckets leave after backward
KINDS: dict[str, tuple[str, int, bool, str]] = {
    "fast": ("fast", 0, True, "fp32"),
    "exact": ("exact", 0, True, "fp32"),
    "fast_after": ("fast", 0, False, "fp32"),
    "exact_after": ("exact", 0, False, "fp32"),
    "fast_bf16": ("fast", 0, True, "bf16"),
    "fast_lag1": ("fast", 1, True, "fp32"),
    "exact_lag1": ("exact", 1, True, "fp32"),
}
# What is said of them: one kind's time over another's
COSTS = {
    "exact over fast": ("exact", "fast"),
    "exact over fast, after backward": ("exact_after", "fast_after"),
    "exact over fast, lag 1": ("exact_lag1", "fast_lag1"),
    "exact, during over after backward": ("exact", "exact_after"),
    "fast, during over after backward": ("fast", "fast_after"),
    "exact, lag 1 over lag 0": ("exact_lag1", "exact"),
    "bf16 over fp32 on the wire": ("fast_bf16", "fast"),
}


@dataclass(frozen=True)
class Case:
    """A network, and the micro-batch (tiles of height × width) that each member computes in a step."""

    network: NetworkConfig
    height: int
    width: int
    tiles: int = 1

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.tiles) < 1:
            raise ValueError(f"expected sizes and tiles of at least 1, got {self}")
        check_size(self.height, self.width, self.network.multiple)


def _small() -> Case:
    return Case(NetworkConfig(tiramisu=TiramisuConfig(first=16, growth=8, kernel=3, blocks=(2, 2, 4))), 96, 144, 3)


@dataclass(frozen=True)
class ExchangeBenchConfig:
    """`world` processes with `threads` threads each; `rounds` of `block` steps of each of some kinds, for two networks."""

    world: int = 2
    threads: int = 1
    rounds: int = 30
    block: int = 2
    kinds: tuple[str, ...] = tuple(KINDS)
    precision: str = "fp32"
    small: Case = field(default_factory=_small)
    large: Case = field(default_factory=lambda: Case(NetworkConfig(), 16, 64))

    def __post_init__(self) -> None:
        if min(self.world, self.threads, self.rounds, self.block) < 1:
            raise ValueError(f"expected counts of at least 1, got {self}")
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for kind in self.kinds:
            choose("kinds", kind, tuple(KINDS))

    def learn(self, case: Case, kind: str) -> LearnConfig:
        exchange, lag, overlap, wire = KINDS[kind]
        return LearnConfig(
            global_batch=case.tiles * self.world, micro_batch=case.tiles, precision=self.precision, exchange=exchange,
            lag=lag, overlap=overlap, wire=wire, optim=OptimConfig(optimizer="sgd", larc=True, schedule="constant", lr=1e-3),
        )  # fmt: skip


def bench_exchange(config: ExchangeBenchConfig, progress: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Seconds of each kind of step and what each choice costs (shares of a step), per case; the load of the machine."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    cases = {"small": config.small, "large": config.large}
    found = {name: _case(config, case, partial(_report, progress, config.rounds, name)) for name, case in cases.items()}
    return {"world": config.world, "threads": config.threads, "cores": cores, "load_before": load, "cases": found}


def _report(progress: Callable[..., None], rounds: int, name: str, done: int) -> None:
    progress(done, rounds, name)


def _case(config: ExchangeBenchConfig, case: Case, progress: Callable[[int], None]) -> dict[str, Any]:
    """Start the members of a world, and evaluate what they measured."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="raysegment-exchange-") as folder:
        pipes, members = [], []
        for rank in range(config.world):
            ours, theirs = context.Pipe(duplex=False)
            members.append(context.Process(target=_member, args=(config, case, rank, str(Path(folder) / "store"), theirs)))
            members[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            rounds = list(_heard(pipes, config.rounds, progress))
        finally:
            for member in members:
                member.join(10)
                member.kill()
    return summary(rounds, sum(p.numel() for p in initialise(case.network, 0).parameters()), case)


def _heard(pipes: list[Connection], rounds: int, progress: Callable[[int], None]) -> Iterator[dict[str, list[float]]]:
    """For each round the seconds per step of each kind, and those waited or spent in its exchange; of the slowest member."""
    for done in range(rounds):
        said = []
        for pipe in pipes:
            if not pipe.poll(_PATIENCE_S + 60 * len(KINDS)):
                raise RuntimeError("a member of the bench says nothing any more")
            said.append(pipe.recv())
        yield {kind: np.max([one[kind] for one in said], axis=0).tolist() for kind in said[0]}
        progress(done + 1)


def _member(config: ExchangeBenchConfig, case: Case, rank: int, store: str, pipe: Connection) -> None:
    """One process of the world: a learner of each kind, whose blocks of steps take turns."""
    torch.set_num_threads(config.threads)
    patience = timedelta(seconds=_PATIENCE_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=config.world, timeout=patience)
    learners = {kind: _learner(config, case, kind) for kind in config.kinds}
    for learner in learners.values():
        _block(learner, case, rank, 2)  # to warm up
    for number in range(config.rounds):
        order = list(learners) if number % 2 == 0 else list(reversed(learners))
        pipe.send({kind: _block(learners[kind], case, rank, config.block) for kind in order})
    dist.barrier()
    dist.destroy_process_group()


def _learner(config: ExchangeBenchConfig, case: Case, kind: str) -> Learner:
    names = NAMES[: case.network.channels]
    normaliser = Normaliser.of([c.reference for c in BY_NAME.values()], [c.scale for c in BY_NAME.values()], names)
    network = initialise(case.network, 0)
    return Learner(network, config.learn(case, kind), normaliser, WEIGHTS[: case.network.classes], Distributed())


def _block(learner: Learner, case: Case, rank: int, steps: int) -> tuple[float, float]:
    """Seconds per step of so many steps, all of them settled at the end, and those of their exchanges alone."""
    generator = torch.Generator().manual_seed(rank)
    fields = torch.randn(case.tiles, len(NAMES), case.height, case.width, generator=generator).half()
    mask = torch.zeros(case.tiles, case.height, case.width, dtype=torch.uint8)
    dist.barrier()
    started, infos = time.perf_counter(), []
    for step in range(learner.step, learner.step + steps):
        first = step * learner.config.global_batch + rank * case.tiles
        item = StepInput(step, [MicroBatch(torch.arange(first, first + case.tiles), fields, mask)])
        infos.append(learner.run(item))
    infos.append(learner.settle())
    seconds = (time.perf_counter() - started) / steps
    told: list[StepInfo] = [info for info in infos if info is not None]
    assert len(told) == steps
    return seconds, sum(info.exchange_s for info in told) / steps


def summary(rounds: list[dict[str, list[float]]], parameters: int, case: Case) -> dict[str, Any]:
    """Medians over rounds; costs with the quartiles of the rounds."""
    steps = {kind: statistics.median(one[kind][0] for one in rounds) for kind in rounds[0]}
    waits = {kind: statistics.median(one[kind][1] for one in rounds) for kind in rounds[0]}
    costs = {}
    for name, (ours, theirs) in COSTS.items():
        if not {ours, theirs} <= {*steps}:
            continue
        shares = [one[ours][0] / one[theirs][0] - 1 for one in rounds]
        costs[name] = dict(zip(("low", "median", "high"), np.percentile(shares, (25, 50, 75)).tolist(), strict=True))
    size = [case.tiles, case.height, case.width]
    return {"parameters": parameters, "size": size, "rounds": len(rounds), "step_s": steps, "exchange_s": waits, "costs": costs}


def lines(found: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of a table: what, and its seconds or its cost in % of a step."""
    for kind, seconds in found["step_s"].items():
        yield [kind, f"{seconds:.4f} s", f"of which {1e3 * found['exchange_s'][kind]:.1f} ms in the exchange"]
    for name, cost in found["costs"].items():
        yield [name, f"{100 * cost['median']:+.2f} %", f"quartiles {100 * cost['low']:+.2f} … {100 * cost['high']:+.2f} %"]

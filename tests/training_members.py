"""Members that train, without Ray: what a worker of a cell does, from its network to its last checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raysegment.archive.manifest import Manifest
from raysegment.elastic.chaos import Injector, Plan
from raysegment.elastic.loop import Loop
from raysegment.elastic.membership import Over
from raysegment.elastic.runs import Run
from raysegment.elastic.safe import Safe
from raysegment.elastic.settings import TrainConfig
from raysegment.elastic.worker import make_learner
from raysegment.feed.quarantine import FILE, Quarantine
from raysegment.feed.store import open_store
from raysegment.feed.stream import make_stream
from tests.members import RosterProcess, kill, member_of, start, wait_for

torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # its first use imports for a second and more: once, here


class Alone:
    """What Ray Train would be."""

    def __init__(self) -> None:
        self.news: dict[str, Any] = {}
        self.warned = False


def live(config: TrainConfig, file: Path, uid: str) -> None:
    """A member's life; its end by an exception is its exit code 1."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    started, run, manifest = time.perf_counter(), Run(config.out), Manifest.load(config.shards)
    learner = make_learner(config, manifest, "cpu")
    member = member_of(file, uid, config.elastic.patience_s)
    learner.warm_up(*manifest.tile)
    quarantine = Quarantine(manifest.tiles, config.feed.max_damaged, run.folder / FILE)
    stream = make_stream(config.shards, config.order(manifest), config.steps, config.feed, quarantine)
    safe = Safe(config, run, manifest, member, uid)
    held_out = open_store(config.feed.source(config.validation.shards)) if config.validation.shards else None
    injector = Injector(Plan.parse(config.chaos), run.folder / "chaos", lambda fault: run.event("fault", fault=str(fault)))
    loop = Loop(config, run, member, learner, stream, config.order(manifest), safe, Alone(), injector, held_out, started=started)
    safe.on_write = loop.at_checkpoint
    try:
        loop.run()
    except Over:
        pass
    finally:
        stream.close()
        safe.stop()
        member.close()


class TrainingFleet:
    """A run of members that train: started, killed, brought back; `wait` until it is over."""

    def __init__(self, config: TrainConfig):
        self.config = config.resolved(Manifest.load(config.shards))
        self.run = Run(config.out)
        self.run.prepare(self.config)
        self.run.event("start")
        self.roster = RosterProcess(self.config, self.run.folder)
        self.members: dict[str, Any] = {}
        self.named = 0

    def add(self, members: int = 1) -> list[str]:
        """So many members more; their names."""
        names = [f"0.{self.named + number}-m" for number in range(members)]
        self.named += members
        for name in names:
            self.members[name] = start(live, self.config, self.roster.file, name)
        return names

    @property
    def living(self) -> list[str]:
        return [name for name, process in self.members.items() if process.is_alive()]

    def kill(self, name: str) -> float:
        return kill(self.members[name])

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.read_events() if event["event"] == kind]

    def steps(self) -> int:
        """Steps in the log."""
        return self.run.steps.read_bytes().count(b"\n") if self.run.steps.exists() else 0

    def wait(self, what=None, seconds: float = 300.0) -> None:
        """Until `what` is true, by default until all members have ended."""
        wait_for(what or (lambda: not self.living), "the fleet", seconds)

    def exit_codes(self) -> dict[str, int]:
        return {name: process.exitcode for name, process in self.members.items()}

    def end(self) -> None:
        for process in self.members.values():
            process.kill()
            process.join()
        self.roster.end()


def alone(config: TrainConfig, out: Path, members: int = 1) -> TrainingFleet:
    """The same run by so many members whom nothing happens to, ended."""
    fleet = TrainingFleet(replace(config, out=str(out), chaos=""))
    try:
        fleet.add(members)
        fleet.wait()
    finally:
        fleet.end()
    return fleet

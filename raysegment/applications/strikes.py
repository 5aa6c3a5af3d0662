"""Strikes from outside at a training run that is going on: what can be done to it, to whom, and a proof that it was done.

kill      a member's process ends at once (SIGKILL)
node      a member's node ends at once, all its processes; it is added again when Ray has seen that
stop      a member stands still for ever (SIGSTOP); it has to be replaced
absent    it stands still for three times `elastic.patience_s`, is let go meanwhile, and wants back in
pause     it stands still for a quarter of that, and nobody need be let go
all       every member ends at once
roster    the roster's process ends
driver    a cell's driver ends, and its workers with it
keeper    what is kept in the memory of a member's node is gone
job       the command that trains ends at once; the same command is started again
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from raysegment.applications.fake_cluster import FakeCluster, FakeNode, wait_for
from raysegment.elastic import chaos
from raysegment.elastic.keeper import memory_folder
from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.settings import TrainConfig, plain

KINDS = ("kill", "node", "stop", "absent", "pause", "all", "roster", "driver", "keeper", "job", "drain", "term")
DEADLY = ("kill", "node", "stop", "absent", "driver", "drain")  # one cell loses members, and gets them back
GENTLE = ("pause", "roster", "keeper")  # break no generation, as a rule
# How often each kind comes in an endless mixture: those that cost the run little, oftener
_MIXTURE = {"kill": 8, "node": 2, "stop": 2, "absent": 2, "pause": 30, "all": 1, "roster": 2, "driver": 2, "keeper": 30, "job": 1,
            "drain": 1, "term": 1}  # fmt: skip
_GENTLE_STEPS = 10
_STOPPED = 143  # the exit code of a command that has ended on SIGTERM
_FIRED_S = 10.0  # for a signal to show
_ABSENT, _PAUSE = 3.0, 0.25  # times the patience


@dataclass(frozen=True)
class Strike:
    """One blow: at `time`, in round `round`, when the run was at step `step` in generation `generation`.

    `members` and `cells` were hit; `fired`: it was seen to have happened; `back`: when a lost node was there again, or the
    command that was asked to end had ended.
    """

    kind: str
    round: int
    time: float
    step: int
    generation: int
    members: tuple[str, ...] = ()
    cells: tuple[int, ...] = ()
    fired: bool = False
    back: float | None = None


@dataclass(frozen=True)
class Actor:
    """A member as its generation's record has it."""

    uid: str
    node: str
    cell: int
    pid: int


def sequence(counts: Mapping[str, int], seed: int) -> list[str]:
    """So many of each kind in an order that the same seed repeats."""
    kinds = [kind for kind, number in counts.items() for _ in range(number)]
    random.Random(seed).shuffle(kinds)
    return kinds


def mixture(seed: int, cells: int) -> Iterator[str]:
    """Kinds without end; `driver` only where cells have drivers of their own."""
    weights = {kind: weight for kind, weight in _MIXTURE.items() if kind != "driver" or cells > 1}
    draw = random.Random(seed)
    while True:
        yield draw.choices(list(weights), list(weights.values()))[0]


class Scene:
    """What a run's files say about it now: `look` reads what is new."""

    def __init__(self, run: Run):
        self.run = run
        self.generation, self.step, self.stepped, self.roster = 0, -1, 0, 0
        self.members: list[Actor] = []
        self.drivers: dict[int, int] = {}
        self.broken = True
        self._events = self._steps = 0

    def look(self) -> Scene:
        events, self._events = read_lines(self.run.events, self._events)
        steps, self._steps = read_lines(self.run.steps, self._steps)
        for event in events:
            self._hear(event)
        if steps:
            self.step, self.stepped = steps[-1]["step"], steps[-1]["generation"]
        return self

    def _hear(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "generation":
            self.generation, self.broken = event["generation"], False
            self.members = [Actor(*who) for who in zip(event["members"], event["node"], event["cell"], event["pid"], strict=True)]
        elif kind == "broken":
            self.broken = True
        elif kind in ("roster", "roster_restarted"):
            self.roster = event["pid"]
        elif kind == "cell" and event["what"] == "driven":
            self.drivers[event["cell"]] = event["pid"]

    @property
    def living(self) -> list[Actor]:
        """Members of the newest generation whose processes are there and not stopped."""
        return [member for member in self.members if _state(member.pid) not in ("", "Z", "T")]

    @property
    def going(self) -> bool:
        """Whether the newest generation has finished a step."""
        return not self.broken and self.stepped == self.generation


class Job:
    """`raysegment train` as a process of its own, which may be killed and started again with the same words."""

    def __init__(self, config: TrainConfig, address: str):
        self.run, self.config = Run(config.out), config
        self.run.folder.parent.mkdir(parents=True, exist_ok=True)
        self.words_file = self.run.folder.with_suffix(".yaml")
        self.words_file.write_text(yaml.safe_dump(plain(config), sort_keys=False))
        self.log = self.run.folder.with_suffix(".log")
        self.environment = {**os.environ, "RAY_ADDRESS": address}
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again."""
        words = [sys.executable, "-m", "raysegment", "train", str(self.words_file)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """SIGKILL it and whatever it started, if it still runs."""
        if self.code is None:
            for pid in (*chaos.descendants(self.process.pid), self.process.pid):
                chaos.end(pid)
            self.process.wait()

    def last_words(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-2000:]


class Striker:
    """Does to one job on a cluster what is asked for. Lost nodes are added again by `mend`, in the main thread."""

    def __init__(self, cluster: FakeCluster, job: Job, number: int, draw: random.Random):
        self.cluster, self.job, self.number, self.draw = cluster, job, number, draw
        self.scene = Scene(job.run)
        self.strikes: list[Strike] = []
        self._lost: list[tuple[int, FakeNode]] = []  # which strike, which node
        self._draining: list[tuple[int, FakeNode]] = []
        self._roster = 0  # the one there was at the last strike

    def strike(self, kind: str) -> Strike:
        """Now. The victim is drawn among the living members."""
        scene = self.scene.look()
        self._roster = scene.roster
        possible = [member for member in scene.living if self._strikable(kind, member)]
        hit = possible if kind == "all" else [self.draw.choice(possible)] if possible else []
        before = Strike(kind, self.number, time.time(), scene.step, scene.generation)
        if kind in ("node", "drain", "driver"):
            where = (lambda member: member.cell) if kind == "driver" else (lambda member: member.node)
            hit = [member for member in scene.members if hit and where(member) == where(hit[0])]
        fired = bool(hit) and self._deed(kind, hit)
        uids, cells = tuple(member.uid for member in hit), tuple(sorted({member.cell for member in hit}))
        back = time.time() if kind == "term" else None
        self.strikes.append(replace(before, members=uids, cells=cells, fired=fired, back=back))
        return self.strikes[-1]

    @property
    def felt(self) -> bool:
        """Whether the last strike has had its effect: a new generation, a new roster; of other gentle ones, a few steps."""
        if not self.strikes:
            return True
        last, scene = self.strikes[-1], self.scene
        if last.kind == "roster":
            return scene.roster != self._roster
        return scene.generation > last.generation if last.kind not in GENTLE else scene.step >= last.step + _GENTLE_STEPS

    def possible(self, kind: str) -> bool:
        """Whether there is something to strike."""
        scene = self.scene
        if kind == "roster":
            return _runs(scene.roster)
        if kind == "driver":
            return all(_runs(scene.drivers.get(member.cell, 0)) for member in scene.living)
        return any(self._strikable(kind, member) for member in scene.living)

    def _strikable(self, kind: str, member: Actor) -> bool:
        if kind == "keeper":
            return bool(self._kept(member.node))
        return kind != "drain" or all(node.id != member.node for _, node in self._draining)  # an end is announced once

    def mend(self) -> None:
        """Add again the nodes that Ray knows to be dead."""
        self._draining = [one for one in self._draining if one[1] in self.cluster.nodes]  # no other strike has ended it
        for index, node in list(self._draining):
            if not any(member.node == node.id for member in self.scene.living):
                self._draining.remove((index, node))
                self.cluster.kill_node(node)
                self._lost.append((index, node))
        if not self._lost:
            return
        living = self.cluster.living()
        for index, node in [lost for lost in self._lost if lost[1].id not in living]:
            self._lost.remove((index, node))
            self.cluster.add_node()
            self.strikes[index] = replace(self.strikes[index], back=time.time())

    def _deed(self, kind: str, hit: list[Actor]) -> bool:
        pids = [member.pid for member in hit]
        if kind in ("kill", "all"):
            return _killed(pids)
        if kind in ("stop", "absent", "pause"):
            return self._stopped(kind, pids[0])
        if kind == "node":
            return self._node(hit[0].node, pids)
        if kind == "roster":
            return _killed([self.scene.roster])
        if kind == "driver":
            return _killed([self.scene.drivers[hit[0].cell]])
        if kind == "keeper":
            return self._keeper(hit[0].node)
        return self._drain(hit[0].node) if kind == "drain" else self._command(kind)

    def _command(self, kind: str) -> bool:
        """End the command, one way or the other, and start it again."""
        self.job.process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        code = self.job.process.wait()
        self.job.start()
        return code == (_STOPPED if kind == "term" else -signal.SIGKILL)

    def _drain(self, name: str) -> bool:
        node = next((node for node in self.cluster.nodes if node.id == name), None)
        if node is None:
            return False
        self.cluster.announce_end(node)
        self._draining.append((len(self.strikes), node))
        return True

    def _stopped(self, kind: str, pid: int) -> bool:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        if not _shows(lambda: _state(pid) in ("T", "", "Z")) or not _runs(pid):
            return False
        if kind != "stop":
            patience = self.job.config.elastic.patience_s
            chaos.continue_later(pid, patience * (_ABSENT if kind == "absent" else _PAUSE))
        return True

    def _node(self, name: str, pids: list[int]) -> bool:
        node = next((node for node in self.cluster.nodes if node.id == name), None)
        if node is None:
            return False
        self.cluster.kill_node(node)
        self._lost.append((len(self.strikes), node))
        return _shows(lambda: not any(map(_runs, pids)))

    def _kept(self, node: str) -> list[Path]:
        memory = memory_folder(self.job.config.checkpoint.memory)
        return sorted((memory / self.job.run.key / node).glob("*")) if memory is not None else []

    def _keeper(self, node: str) -> bool:
        files = self._kept(node)
        for file in files:
            file.unlink(missing_ok=True)
        return bool(files)


def _killed(pids: list[int]) -> bool:
    """End processes at once, and see that they have; False where none of them was there."""
    if not any(map(_runs, pids)):
        return False
    for pid in pids:
        chaos.end(pid)
    return _shows(lambda: not any(map(_runs, pids)))


def _shows(condition: Any) -> bool:
    try:
        wait_for(condition, _FIRED_S, "a signal to show")
    except TimeoutError:
        return False
    return True


def _runs(pid: int) -> bool:
    return _state(pid) not in ("", "Z")


def _state(pid: int) -> str:
    """A process's state as the kernel has it (R, S, D, T, Z); "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

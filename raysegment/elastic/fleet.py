"""The fleet: starts the roster and the cells, finds them room, starts again those whose driver died, ends when training does.

    one cell        its trainer is driven by this process
    several cells   each is driven by an actor, whose death takes down only that cell; it is started again for ever

The first few cells' drivers live on the command's node: they outlive the nodes of their cells, so that a trainer that waits
for room, natively, is ready when a node comes back. To spare that node the others' drivers live where their cells do. Their
room is asked for with a placement group on one node: Ray grants it where and when there is some (and an autoscaler sees the
wish); it is given back at once, and the cell's trainer, bound to that node, takes its place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysegment.elastic.cells import CellDriver, Room, drive
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.roster import RosterActor
from raysegment.elastic.runs import Run
from raysegment.elastic.settings import TrainConfig

_LOOK_S = 0.1
_DRIVEN_FROM_HERE = 4  # cells at most: each driver and its controller take half a gigabyte here
_PATIENCE_WITH_FAILURES = 2.0  # seconds before a cell that failed at once is tried again, doubled each time, up to a minute


@dataclass
class Cell:
    """One of the fleet's cells: without room, or driven by an actor (`node` "": bound to none) whose work ends with `running`."""

    number: int
    wish: PlacementGroup | None = None
    driver: Any = None
    running: Any = None
    node: str = ""
    started: float = 0.0
    not_before: float = 0.0
    failures: int = 0


class Fleet:
    """All cells of a run. `run` blocks until training is over and returns the roster's last word."""

    def __init__(self, config: TrainConfig, run: Run, room: Room, say: Callable[[str], None]):
        self.config, self.run_files, self.room, self.say = config, run, room, say
        self.ladder = Ladder(config.elastic.patience_s)
        # Not "soft", which Ray takes for leave to place it anywhere now and then: roster and command share their fate
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.roster = RosterActor.options(scheduling_strategy=self._here).remote(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.cells = [Cell(number) for number in range(config.elastic.cells[1])]
        self._heard = (0, 0)  # the roster's process, how many of its news
        self._inside: set[int] = set()  # cells with members in the newest generation
        self._stop = ""
        self._over_at: float | None = None

    def stop(self, why: str) -> None:
        """Ask for an end with a committed state; may be called from a signal handler."""
        self._stop = self._stop or why

    def run(self) -> dict[str, Any]:
        """Until training is done, stopped or given up: `done`, `stopping`, `gave_up`, … of the roster's status."""
        ray.get(self.roster.address.remote())
        try:
            status = self._run_one() if len(self.cells) == 1 else self._run_many()
            ray.get(self.roster.close.remote())
            return status
        finally:
            self._end()

    # ------------------------------------------------------------ one cell

    def _run_one(self) -> dict[str, Any]:
        """This process drives the only cell; its trainer restarts it by itself."""
        while True:
            outcome: list[Any] = []
            thread = threading.Thread(target=self._drive_here, args=(outcome,), name="cell", daemon=True)
            thread.start()
            status = self._watch(lambda: not thread.is_alive())  # noqa: B023
            if status["done"]:
                return status
            if outcome and isinstance(outcome[0], BaseException):
                raise outcome[0]

    def _drive_here(self, outcome: list[Any]) -> None:
        try:
            outcome.append(drive(self.config, 0, self.room, self.roster))
        except BaseException as error:
            outcome.append(error)

    # ------------------------------------------------------------ several cells

    def _run_many(self) -> dict[str, Any]:
        return self._watch(lambda: False)

    def _tend(self) -> None:
        """One look at every cell."""
        for cell in self.cells:
            if cell.running is not None:
                self._look_at(cell)
            elif cell.wish is not None:
                self._start_if_room(cell)
            elif time.monotonic() >= cell.not_before:
                self._find_room(cell)

    def _find_room(self, cell: Cell) -> None:
        """Its trainer waits for room, or a wish does."""
        if cell.number < _DRIVEN_FROM_HERE:
            self._start(cell, "", self._here)
        else:
            cell.wish = placement_group([self.room.per_worker] * self.room.workers, strategy="STRICT_PACK")

    def _start_if_room(self, cell: Cell) -> None:
        assert cell.wish is not None
        if not cell.wish.wait(0):
            return
        nodes = set(placement_group_table(cell.wish)["bundles_to_node_id"].values())
        remove_placement_group(cell.wish)
        cell.wish, node = None, nodes.pop()
        self._start(cell, node, NodeAffinitySchedulingStrategy(node, soft=False))

    def _start(self, cell: Cell, node: str, where: NodeAffinitySchedulingStrategy) -> None:
        cell.node, cell.started = node, time.monotonic()
        room = Room(self.room.workers, self.room.per_worker, self.room.gpu, node, together=True)
        cell.driver = cell.driver or CellDriver.options(scheduling_strategy=where).remote()  # pyright: ignore[reportAttributeAccessIssue]
        cell.running = cell.driver.drive.remote(self.config, cell.number, room, self.roster)
        self.run_files.event("cell", cell=cell.number, node=node, what="started")

    def _look_at(self, cell: Cell) -> None:
        """A cell that has ended though training has not is given room anew; one that keeps failing, later and later."""
        if not ray.wait([cell.running], timeout=0)[0]:
            return
        try:
            why = cast(dict[str, Any], ray.get(cell.running))["error"] or "left"
        except RayError as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            cell.driver = None
        quick = time.monotonic() - cell.started < self.ladder.absence_s and "Died" not in why
        cell.failures = cell.failures + 1 if quick else 0
        wait = min(60.0, _PATIENCE_WITH_FAILURES * 2 ** (cell.failures - 1)) if cell.failures else 0.0
        cell.driver, cell.running = (None if cell.node else cell.driver), None  # one that is here can drive again
        cell.not_before = time.monotonic() + wait
        self.run_files.event("cell", cell=cell.number, node=cell.node, what="ended", why=why[:500])

    # ------------------------------------------------------------ watching

    def _watch(self, ended: Callable[[], bool]) -> dict[str, Any]:
        """Look after cells and roster until training is over, or `ended`; the roster's status then."""
        while True:
            if len(self.cells) > 1 and self._over_at is None:
                self._tend()
            status = self._ask()
            if status is not None and self._finished(status, ended):
                return status
            if ended() and status is not None and not status["done"]:
                return status
            time.sleep(_LOOK_S)

    def _ask(self) -> dict[str, Any] | None:
        """The roster's status; its news are told. None while it is being restarted."""
        try:
            if self._stop:
                ray.get(self.roster.stop.remote(self._stop), timeout=self.ladder.silence_s)
            ray.get(self.roster.address.remote(), timeout=self.ladder.silence_s)
            pid, news = ray.get(self.roster.news.remote(self._heard[1]), timeout=self.ladder.silence_s)
            if pid != self._heard[0]:
                self._heard = (pid, 0)
                return None
            self._heard = (pid, self._heard[1] + len(news))
            for note in news:
                self._tell(note)
            return ray.get(self.roster.status.remote(), timeout=self.ladder.silence_s)
        except (GetTimeoutError, ActorUnavailableError):
            return None

    def _tell(self, note: dict[str, Any]) -> None:
        """Say on the terminal what an operator would want to know."""
        kind = note["event"]
        if kind == "waits":
            self.say(f"waiting: {note['why']}")
        elif kind == "lost":
            self.say(f"lost member {note['member']}: {note['why']}")
        elif kind == "generation":
            self._inside = set(note["cell"])
            self.say(f"generation {note['generation']}: {len(note['members'])} members from step {note['committed']}")
        elif kind == "straggler":
            who = f"rank {note['rank']} on node {note['node'][:8]}"
            self.say(f"straggler: {who} is {note['factor']:.1f} times slower ({note['cause']})")

    def _finished(self, status: dict[str, Any], ended: Callable[[], bool]) -> bool:
        """True once training is over and the cells that took part have returned, or have had time to."""
        if not status["done"]:
            return False
        if self._over_at is None:
            self._over_at = time.monotonic()
            self._withdraw_wishes()
        running = [cell.running for cell in self.cells if cell.running is not None and cell.number in self._inside]
        back = not ray.wait(running, num_returns=len(running), timeout=0)[1] if running else len(self.cells) > 1 or ended()
        return back or time.monotonic() - self._over_at > self.ladder.return_s

    def _withdraw_wishes(self) -> None:
        for cell in self.cells:
            if cell.wish is not None:
                remove_placement_group(cell.wish)
                cell.wish = None

    def _end(self) -> None:
        """Nothing of this fleet stays."""
        self._withdraw_wishes()
        for cell in self.cells:
            if cell.driver is not None:
                ray.kill(cell.driver)
        ray.kill(self.roster)

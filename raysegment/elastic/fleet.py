"""The fleet: starts the roster and the cells, finds them room, starts again those whose driver died, ends when training does.

    one cell        its trainer is driven by this process
    several cells   each is driven by an actor on the node that has room for it, and tried again there or elsewhere for ever;
                    once training has begun one more is kept ready here, for the next cell that finds room again, so that it
                    is back sooner (for a few cells only: the others' drivers start on their own nodes)

Room is asked for with a placement group on one node: Ray grants it where and when there is some (and an autoscaler sees the
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
_LOOK_AT_NODES_S = 0.5
_DRIVEN_FROM_HERE = 4  # cells at most, besides those that have this node's room
_PATIENCE_WITH_FAILURES = 2.0  # seconds before a cell that failed at once is tried again, doubled each time, up to a minute


@dataclass
class Cell:
    """One of the fleet's cells: without room, or driven by an actor whose work ends with `running`."""

    number: int
    wish: PlacementGroup | None = None
    driver: Any = None
    running: Any = None
    node: str = ""
    started: float = 0.0
    not_before: float = 0.0
    failures: int = 0
    from_here: bool = False


class Fleet:
    """All cells of a run. `run` blocks until training is over and returns the roster's last word."""

    def __init__(self, config: TrainConfig, run: Run, room: Room, say: Callable[[str], None]):
        self.config, self.run_files, self.room, self.say = config, run, room, say
        self.ladder = Ladder(config.elastic.patience_s)
        # Not "soft", which Ray takes for leave to place it anywhere now and then: roster and command share their fate
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._spare: Any = None  # a driver without a cell
        self._warm: Any = None
        self._looked_at_nodes = 0.0
        self.roster = RosterActor.options(scheduling_strategy=self._here).remote(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.cells = [Cell(number) for number in range(config.elastic.cells[1])]
        self._heard = (0, 0)  # the roster's process, how many of its news
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
        self._end_drivers_of_the_dead()
        for cell in self.cells:
            if cell.running is not None:
                self._look_at(cell)
            elif cell.wish is not None:
                self._start_if_room(cell)
            elif time.monotonic() >= cell.not_before:
                cell.wish = placement_group([self.room.per_worker] * self.room.workers, strategy="STRICT_PACK")

    def _start_if_room(self, cell: Cell) -> None:
        assert cell.wish is not None
        if not cell.wish.wait(0):
            return
        nodes = set(placement_group_table(cell.wish)["bundles_to_node_id"].values())
        remove_placement_group(cell.wish)
        cell.wish, cell.node, cell.started = None, nodes.pop(), time.monotonic()
        room = Room(self.room.workers, self.room.per_worker, self.room.gpu, cell.node)
        spare = self._take_spare()
        cell.driver, cell.from_here = spare or _driver(NodeAffinitySchedulingStrategy(cell.node, soft=False)), spare is not None
        cell.running = cell.driver.drive.remote(self.config, cell.number, room, self.roster)
        self.run_files.event("cell", cell=cell.number, node=cell.node, what="started")

    def _end_drivers_of_the_dead(self) -> None:
        """A driver on this node survives the node of its cell, and would wait for that to come back under the same name."""
        suspects = [cell for cell in self.cells if cell.from_here and cell.running is not None]
        if not suspects or time.monotonic() - self._looked_at_nodes < _LOOK_AT_NODES_S:
            return
        self._looked_at_nodes = time.monotonic()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for cell in suspects:
            if cell.node not in alive:
                ray.kill(cell.driver)

    def _take_spare(self) -> Any:
        """The driver that is ready here; None when there is none, or enough cells are driven from here."""
        if self._spare is None or not ray.wait([self._warm], timeout=0)[0]:
            return None
        if sum(cell.from_here and cell.running is not None for cell in self.cells) >= _DRIVEN_FROM_HERE:
            return None
        spare, self._spare = self._spare, None
        return spare

    def _keep_spare(self) -> None:
        if self._spare is None:
            self._spare = _driver(self._here)
            self._warm = self._spare.warm.remote()

    def _look_at(self, cell: Cell) -> None:
        """A cell that has ended though training has not is given room anew; one that keeps failing, later and later."""
        if not ray.wait([cell.running], timeout=0)[0]:
            return
        try:
            why = cast(dict[str, Any], ray.get(cell.running))["error"] or "left"
        except RayError as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        quick = time.monotonic() - cell.started < self.ladder.absence_s and "Died" not in why
        cell.failures = cell.failures + 1 if quick else 0
        wait = min(60.0, _PATIENCE_WITH_FAILURES * 2 ** (cell.failures - 1)) if cell.failures else 0.0
        cell.driver = cell.running = None
        cell.not_before = time.monotonic() + wait
        self.run_files.event("cell", cell=cell.number, node=cell.node, what="ended", why=why[:500])

    # ------------------------------------------------------------ watching

    def _watch(self, ended: Callable[[], bool]) -> dict[str, Any]:
        """Look after cells and roster until training is over, or `ended`; the roster's status then."""
        while True:
            if len(self.cells) > 1 and self._over_at is None:
                self._tend()
            status = self._ask()
            if status is not None and status["logged"] and self._over_at is None and len(self.cells) > 1:
                self._keep_spare()
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
            self.say(f"generation {note['generation']}: {len(note['members'])} members from step {note['committed']}")
        elif kind == "straggler":
            who = f"rank {note['rank']} on node {note['node'][:8]}"
            self.say(f"straggler: {who} is {note['factor']:.1f} times slower ({note['cause']})")

    def _finished(self, status: dict[str, Any], ended: Callable[[], bool]) -> bool:
        """True once training is over and the cells have returned, or have had time to."""
        if not status["done"]:
            return False
        if self._over_at is None:
            self._over_at = time.monotonic()
            self._withdraw_wishes()
        running = [cell.running for cell in self.cells if cell.running is not None]
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
        for driver in [self._spare, *(cell.driver for cell in self.cells)]:
            if driver is not None:
                ray.kill(driver)
        ray.kill(self.roster)


def _driver(where: NodeAffinitySchedulingStrategy) -> Any:
    return CellDriver.options(scheduling_strategy=where).remote()  # pyright: ignore[reportAttributeAccessIssue]

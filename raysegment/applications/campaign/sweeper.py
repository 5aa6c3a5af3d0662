"""Gives back the room of trials that Tune ended or paused.

Ray Train leaves a detached cleaner behind to remove a dead run's placement group. It asks Ray's State API whether the run
lives, and where several Rays are on a machine, or the dashboard is off, that call fails and the cleaner with it (Ray 2.60:
"Found multiple active Ray instances"): the groups stay, and the next trials wait for their CPUs for ever. A run's log names
the groups that its workers lived in, so here they are removed once the run's driver is gone.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import ray
from filelock import FileLock, Timeout
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raysegment.elastic.keeper import forget
from raysegment.elastic.runs import Run

_LOOK_S, _CONTROLLER_ENDS_S = 0.5, 2.0  # after a driver, Ray ends what it owned within a second


def groups(folder: Path) -> list[str]:
    """The placement groups that a run's workers have lived in."""
    events = Run(folder).read_events()
    return list(dict.fromkeys(event["group"] for event in events if event["event"] == "worker" and event.get("group")))


def remove(folder: Path) -> None:
    """Remove all of a run's groups; for when nobody works on it. Those that are gone already do no harm."""
    for group in groups(folder):
        with suppress(ValueError):  # of another Ray
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


class Sweeper:
    """Removes the groups of the runs given to it, each when its driver has ended; in a thread of its own."""

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._waiting: dict[Path, float | None] = {}  # run folder → since when nobody works there
        self._over_with: set[Path] = set()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._thread.start()

    def give(self, folder: Path, over: bool) -> None:
        """A run whose trial was ended or paused; `over`: nobody will want the state that this node's memory keeps of it."""
        with self._lock:
            self._waiting[folder] = None
            if over:
                self._over_with.add(folder)

    def close(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            with self._lock:
                folders = list(self._waiting.items())
            for folder, since in folders:
                self._look(folder, since)

    def _look(self, folder: Path, since: float | None) -> None:
        """Note that the driver has gone; a little later remove the groups, unless somebody works there again."""
        try:
            with FileLock(folder / "fleet.lock", timeout=0):
                if since is not None and time.monotonic() - since > _CONTROLLER_ENDS_S:
                    self._clean(folder)
                    self._set(folder, None, done=True)
                elif since is None:
                    self._set(folder, time.monotonic())
        except Timeout:
            self._set(folder, None, done=since is not None)  # it was taken up again, and cleans up by itself

    def _clean(self, folder: Path) -> None:
        remove(folder)
        memory = self._memory
        if memory is not None and folder in self._over_with and (folder / "run.json").exists():
            forget(memory, Run(folder).key)

    def _set(self, folder: Path, since: float | None, done: bool = False) -> None:
        with self._lock:
            if done:
                self._waiting.pop(folder, None)
            else:
                self._waiting[folder] = since

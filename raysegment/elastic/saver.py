"""Saves captured states in the background: in the node's memory, and as checkpoints that somebody else publishes.

Two threads, because a checkpoint may take longer than the time between two states kept in memory. Each does one thing at a
time and has at most one waiting; a newer one takes the place of the one that waits, never of the one under way. For states
in memory that is all there is to say; a checkpoint that was replaced is reported as `Superseded`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raysegment.archive.places import Place
from raysegment.elastic.capture import Capture, joined
from raysegment.elastic.checkpoints import Draft, Facts, discard, draft
from raysegment.elastic.keeper import Keeper
from raysegment.learning.state import TrainState

MEMORY, FILE = "memory", "file"


class Refused(Exception):
    """Whoever publishes checkpoints will not publish this one."""


class Superseded(Exception):
    """A newer checkpoint was due before this one was begun."""


@dataclass(frozen=True)
class Saved:
    """What was saved: `kind` "memory" or "file", which step, and the seconds it took in the background."""

    kind: str
    step: int
    seconds: float


class Saver:
    """Takes captures and saves them; training neither waits nor ends for what goes wrong.

    `commit(draft, seconds)` has a draft published and returns when it is; it raises `Refused` when it will not be (the
    draft is then deleted) and anything else when that is unknown (the draft stays for `remove_orphans`).
    `failed(kind, error)` and `saved(Saved)` are called from the saving threads, for `Superseded` from the caller's. `tag`
    names this writer among all that draft at `place`.
    """

    def __init__(
        self,
        place: Place,
        tag: str,
        commit: Callable[[Draft, float], None],
        failed: Callable[[str, Exception], None],
        saved: Callable[[Saved], None] = lambda _: None,
        keeper: Keeper | None = None,
    ):
        self.place, self.tag, self.keeper = place, tag, keeper
        self._commit, self._failed, self._saved = commit, failed, saved
        self._lanes = {kind: _Lane(kind) for kind in (MEMORY, FILE)}

    def keep(self, capture: Capture, facts: Mapping[str, Any]) -> None:
        """Keep a state in the node's memory, with `facts` beside those of the state; the caller's hold is not used up."""
        if self.keeper is not None and not self.keeper.off:
            self._put(MEMORY, capture, lambda: self._keep(capture.state, facts), lambda: None)

    def checkpoint(self, capture: Capture, facts: Callable[[TrainState], Facts]) -> None:
        """Draft a checkpoint and commit it; `facts` is called in the background. The caller's hold is not used up."""
        step = capture.state.facts["step"]
        replaced = lambda: self._failed(FILE, Superseded(f"checkpoint of step {step}"))
        self._put(FILE, capture, lambda: self._write(capture.state, facts), replaced)

    def busy(self, kind: str) -> bool:
        """True while something of that kind is under way or waits."""
        return not self._lanes[kind].idle(0)

    def drain(self, timeout_s: float) -> bool:
        """Wait until all is saved or has failed; False when that takes longer."""
        end = time.monotonic() + timeout_s
        return all(lane.idle(max(0.0, end - time.monotonic())) for lane in self._lanes.values())

    def close(self, timeout_s: float) -> bool:
        """Drain, and end the threads when they are done; nothing may be given after that."""
        drained = self.drain(timeout_s)
        for lane in self._lanes.values():
            lane.end()
        return drained

    def _put(self, kind: str, capture: Capture, work: Callable[[], None], replaced: Callable[[], None]) -> None:
        capture.hold()
        job = _Job(lambda: self._attempt(kind, work), replaced, capture.release)
        self._lanes[kind].put(job)

    def _attempt(self, kind: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, training goes on and hears of it
            self._failed(kind, error)

    def _keep(self, state: TrainState, facts: Mapping[str, Any]) -> None:
        assert self.keeper is not None
        seconds = self.keeper.keep(state.facts["step"], joined(state), {**state.facts, **facts})
        if self.keeper.off:
            raise OSError(self.keeper.off)
        self._saved(Saved(MEMORY, state.facts["step"], seconds))

    def _write(self, state: TrainState, facts: Callable[[TrainState], Facts]) -> None:
        started = time.perf_counter()
        drafted = draft(self.place, facts(state), state.weights, state.tensors, self.tag)
        try:
            self._commit(drafted, time.perf_counter() - started)
        except Refused:
            discard(self.place, drafted)
            raise
        self._saved(Saved(FILE, drafted.step, time.perf_counter() - started))


@dataclass(frozen=True)
class _Job:
    work: Callable[[], None]
    replaced: Callable[[], None]
    release: Callable[[], None]


class _Lane:
    """A thread that does one job at a time; the newest of those that came meanwhile is next."""

    def __init__(self, name: str):
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._running = self._ended = False
        threading.Thread(target=self._loop, name=f"save-{name}", daemon=True).start()

    def put(self, job: _Job) -> None:
        with self._changed:
            assert not self._ended, "saving has ended"
            old, self._waiting = self._waiting, job
            self._changed.notify_all()
        if old is not None:
            old.release()
            old.replaced()

    def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is under way or waits; False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running and self._waiting is None, timeout_s)

    def end(self) -> None:
        """No more jobs; the thread ends after those it has."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _loop(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.work()
            finally:
                job.release()
                with self._changed:
                    self._running = False
                    self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._ended)
            job, self._waiting = self._waiting, None
            self._running = job is not None
            return job

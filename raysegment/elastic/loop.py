"""A member's life: meet, be brought up to date, train until something changes, meet again; to the end.

    meet → [state from the source] → step, step, step … → (a peer is lost: the step is redone | somebody joins | all end)

The loop remembers nothing about the world but what the generation says. A step that is interrupted leaves no trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch

from raysegment.elastic.chaos import Fault, Injector
from raysegment.elastic.group import Group, Setback
from raysegment.elastic.membership import Generation, Member
from raysegment.elastic.runs import Run
from raysegment.elastic.safe import Safe
from raysegment.elastic.settings import TrainConfig
from raysegment.elastic.sync import synchronise
from raysegment.elastic.validate import validate
from raysegment.feed.batches import StepInput
from raysegment.feed.direct import DirectStream
from raysegment.feed.order import Order
from raysegment.feed.store import TileStore
from raysegment.feed.stream import Stream
from raysegment.learning.exchange import Interrupted
from raysegment.learning.step import Learner, StepInfo

# What a member may wish with a step, each counted over the members in 20 bits: all act at the same boundary
JOIN, STOP = (1 << 20 * place for place in range(2))
_COUNT = (1 << 20) - 1
_TILES_LISTED = 1024  # a larger global batch's tiles are not written out step by step


class Cell(Protocol):
    """What Ray Train is to the loop: takes `news` (metrics), says whether the node is about to go."""

    news: dict[str, Any]
    warned: bool


def count(signals: int, wish: int) -> int:
    """How many members wished that."""
    return signals // wish & _COUNT


@dataclass
class Loop:
    """A member with all it needs; `run` returns when training is over, or when this cell has to leave."""

    config: TrainConfig
    run_files: Run
    member: Member
    learner: Learner
    stream: Stream | DirectStream
    order: Order
    safe: Safe
    cell: Cell
    injector: Injector
    validation: TileStore | None = None
    place: Generation | None = None
    started: float = field(default_factory=time.perf_counter)
    leaving: bool = False
    cell_fault: Callable[[Fault], None] = field(default=lambda _: None)  # what happens to roster or driver (chaos)
    on_place: Callable[[], None] = field(default=lambda: None)  # called whenever this member is ready to train

    def __post_init__(self) -> None:
        self._committed_at = time.perf_counter()
        self._waiting = True  # nothing to tell outside steps
        self._drag, self._drag_steps = 1.0, 0
        self._validated = 0
        self.learner.before_micro_batch = self.member.check

    def run(self) -> str:
        """ "done" or "left"."""
        origin = self.safe.take_best(self.learner)
        while True:
            self.place = self.member.meet(self.learner.committed, origin)
            if self.place.rank in self.place.behind:
                origin = "stale"  # until the source's state is here: what this member has, others do not go on from
            try:
                self._take_up(self.place)
                origin = "generation"
                last = self._train()
                if last is not None and self._leaves(last):
                    return "left"
                if self.learner.committed == self.config.steps or (last is not None and count(last.signals, STOP)):
                    self._conclude()
                    return "done"
            except (Interrupted, Setback):
                self.learner.interrupt()

    # ------------------------------------------------------------ beginning of a generation

    def _take_up(self, place: Generation) -> None:
        """The source's state, the log's missing lines, this member's share of what comes next."""
        group = self._group()
        self.learner.world = group
        step = place.committed
        if place.rank in place.behind or (place.rank == place.source and place.behind):
            self._fire("join", step)
        synchronise(
            self.learner, place.source, place.behind, place.rank, place.generation, self.member.store_of(place), self.member.host,
            self.member.backend, self.member.broken, self.member.ladder,
        )  # fmt: skip
        if place.rank == place.source:
            self.member.send_records()
        if self.learner.step < self.config.steps:
            self.stream.replan(self.learner.step, place.rank, place.size)
        self.safe.new_generation(place)
        group.on_wait = self._waits
        self.on_place()
        self._committed_at, self._waiting = time.perf_counter(), True
        self._recall_validation(group)
        if place.rank == 0:
            seconds = time.perf_counter() - self.started
            self.run_files.event("ready", world=place.size, step=place.committed, generation=place.generation, seconds=seconds)
        self._validate_if_due()

    # ------------------------------------------------------------ steps

    def _train(self) -> StepInfo | None:
        """Steps until training is finished or members are to meet again; the last one, with what was wished with it."""
        info = None
        for item in self.stream:
            info = self._step(item)
            if info is not None and self._must_meet(info):
                break
        last = self.learner.settle()
        if last is not None:
            self._after(last)
            info = last if info is None or not self._must_meet(info) else info
        return info

    def _step(self, item: StepInput) -> StepInfo | None:
        self._begun, self._waiting, self._item = time.perf_counter(), False, item
        self._fire("step", item.step)
        self.member.check()
        info = self.learner.run(item, signal=self._wishes())
        step_s = self._after(info) if info is not None else time.perf_counter() - self._begun
        newest = self.learner.step - 1  # with lag 1 it is under way, and the one that a saved or validated state would end with
        save = self.safe.due(newest, step_s)
        if save or self._validates_at(newest + 1):
            info = self._settled(info)
        if info is None:
            return None
        if save:
            self.safe.save(self.learner, info.step)
        self._fire("commit", info.step)
        return info

    def _settled(self, info: StepInfo | None) -> StepInfo | None:
        """With lag 1 the next step is under way: make that certain too. The newest step, with what was wished with either."""
        last = self.learner.settle()
        if last is None:
            return info
        self._after(last)
        return replace(last, signals=last.signals | (info.signals if info is not None else 0))

    def _waits(self) -> None:
        """Called when this member begins to wait for the others: the first time in a step, tell how long its own part took."""
        if self._waiting:
            return
        self._waiting = True
        computed = time.perf_counter() - self._begun
        if self._drag_steps:
            self._drag_steps -= 1
            time.sleep((self._drag - 1) * computed)
        self._fire("exchange", self._item.step)
        micro_batches = len(self._item.micro_batches)
        own = time.perf_counter() - self._begun
        self.member.at(self._item.step, {"load_s": self._item.load_s, "compute_s": own, "micro_batches": micro_batches})

    def _wishes(self) -> int:
        """What this member would have happen after a step."""
        self.leaving = self.cell.warned
        return (JOIN if self.member.pending or self.leaving else 0) + (STOP if self.member.stopping else 0)

    def _after(self, info: StepInfo) -> float:
        """A step is certain: say so; the seconds since the one before."""
        now = time.perf_counter()
        step_s, self._committed_at = now - self._committed_at, now
        self.member.record(info.step, self._line(info, step_s), send=self._place().rank == 0)
        self.cell.news = {"step": info.step, "loss": info.loss, "lr": info.lr, "samples": info.samples,
                          "quarantined": info.quarantined, "generation": self._place().generation}  # fmt: skip
        self._validate_if_due()
        return step_s

    def _line(self, info: StepInfo, step_s: float) -> dict[str, Any]:
        """A step's line in the log."""
        place, batch = self._place(), self.config.learn.global_batch
        cursor = info.step * batch
        line = {**asdict(info), "cursor": cursor, "positions": batch, "world": place.size, "generation": place.generation}
        if batch <= _TILES_LISTED:
            line["tiles"] = [int(self.order.tile(position)) for position in range(cursor, cursor + batch)]
        return {**line, "step_s": step_s, "checkpoint_s": self.safe.take_stall(), "time": time.time()}

    def _must_meet(self, info: StepInfo) -> bool:
        return bool(count(info.signals, JOIN) or count(info.signals, STOP))

    def _leaves(self, info: StepInfo) -> bool:
        """Whether this member goes: its node has been announced to end. The state stays with those who stay, or in a file."""
        if not self.leaving or not count(info.signals, JOIN):
            return False
        if self._place().rank == 0:
            self.safe.write_now(self.learner)
        self.member.bye("the node is about to end")
        return True

    # ------------------------------------------------------------ validation, end, chaos

    def _validates_at(self, step: int) -> bool:
        """Whether a state of so many steps is one to validate."""
        return self.validation is not None and step > 0 and step % self.config.validation.every_steps == 0

    def _recall_validation(self, group: Group) -> None:
        """Whether the state at hand has been validated: the first member looks it up and the others hear it from there.

        What each remembers differs (one has just come, another died or was interrupted in the middle of it), and members that
        do not do the same collectives in the same order would take one's sums for the other's.
        """
        self._validated, done = 0, self.learner.committed
        if not self._validates_at(done):
            return
        known = torch.zeros(1, device=self.learner.device)
        if self._place().rank == 0:
            known += any((event["event"], event.get("step")) == ("validation", done) for event in self.run_files.read_events())
        group.all_reduce(known)
        self._validated = done if known.item() else 0

    def _validate_if_due(self) -> None:
        """IoU of the held-out tiles, once for every so many steps, by all members."""
        done = self.learner.committed
        if self.validation is None or not self._validates_at(done) or not self.learner.settled or self._validated == done:
            return
        self._fire("validation", done)
        scores = validate(self.learner, self.validation, self._group().all_reduce, self.member.check)
        self._validated = done
        if self._place().rank == 0:
            self.run_files.event(
                "validation", step=done, iou=scores.iou().tolist(), mean_iou=scores.mean_iou(), mlperf=scores.mlperf()
            )

    def _conclude(self) -> None:
        """The last state is on record before anybody goes; Interrupted when the first member dies over it."""
        if self._place().rank == 0:
            self._write_last()
            self.member.bye("done")
        if not self.member.wait_until_over():
            raise Interrupted("the first member is gone before the end")
        self.safe.close(finished=self.learner.committed == self.config.steps)

    def _write_last(self) -> None:
        """A file; who is only asked to end is content with the node's memory where that fails (a full disk, say)."""
        try:
            self.safe.write_now(self.learner)
        except OSError as error:
            if self.learner.committed == self.config.steps or not self.safe.keep_now(self.learner):
                raise
            self.run_files.event("save_failed", what="file", error=f"{error}; the state is in this node's memory")

    def at_checkpoint(self, step: int) -> None:
        """Called in the background when a checkpoint is being written."""
        self._fire("checkpoint", step)

    def _fire(self, at: str, step: int) -> None:
        """Chaos: what is due at this place."""
        for fault in self.injector.fire(step, self._place().rank, at):
            self._suffer(fault)
        while self.member.faults:
            for fault in self.injector.suffer(self.member.faults.popleft()):
                self._suffer(fault)

    def _suffer(self, fault: Fault) -> None:
        """A fault that is not a signal to this process."""
        if fault.kind == "slow":
            self._drag, self._drag_steps = fault.factor, fault.steps or self.config.steps
        elif fault.kind == "enospc":
            self.safe.full_disk = True
        elif fault.kind == "keeper":
            self.safe.forget_node()
        else:
            self.cell_fault(fault)

    def _place(self) -> Generation:
        assert self.place is not None
        return self.place

    def _group(self) -> Group:
        assert self.member.group is not None
        return self.member.group

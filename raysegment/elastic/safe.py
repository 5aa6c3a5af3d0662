"""What a member does for the day when all die: when it copies its state away, where to, and which of all it finds it takes.

    memory   the first member of each node, every few steps, into the node's memory     (`keeper`)
    files    the first member of the group, every few minutes, published by the roster   (`checkpoints`)

Both in the background (`saver`); a step waits for the copy alone (`capture`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from raysegment.elastic import checkpoints
from raysegment.elastic.capture import Buffers, parted
from raysegment.elastic.checkpoints import Draft, Facts
from raysegment.elastic.intervals import Mtbf, checkpoint_every_s, snapshot_every
from raysegment.elastic.keeper import Keeper, Kept, forget, memory_folder, newest
from raysegment.elastic.membership import UNHEARD, Generation, Member
from raysegment.elastic.roster import writer_tag
from raysegment.elastic.runs import Run
from raysegment.elastic.saver import FILE, MEMORY, Refused, Saved, Saver, Superseded
from raysegment.elastic.settings import TrainConfig, other_values, plain
from raysegment.learning.losses import class_weights
from raysegment.learning.state import TrainState, restore, views
from raysegment.learning.step import Learner

_LINES_KEPT = 16  # step lines kept with a state: those that a roster which dies with everybody may not have written
_USUAL = 0.1  # weight of the newest step in the usual seconds of a step


@dataclass
class Safe:
    """A member's states. `on_write(step)` is called in the background when a file is begun (chaos)."""

    config: TrainConfig
    run: Run
    manifest: Manifest
    member: Member
    node: str
    on_write: Callable[[int], None] = field(default=lambda _: None)
    full_disk: bool = False  # chaos: the next file meets a full disk

    def __post_init__(self) -> None:
        config = self.config
        self.place = Place.of(config.checkpoint_place)
        self.memory = memory_folder(config.checkpoint.memory)
        self.buffers = Buffers()
        self.saver = Saver(self.place, writer_tag(self.member.uid), self._commit, self._failed, self._saved)
        self.manifest_sha256 = set_id(manifest_bytes(config.shards))
        self.writes = self.keeps = False
        self._every, self._cost_s = max(1, config.checkpoint.memory_steps), 0.0
        self._file_s, self._step_s, self._stall_s = 0.0, 0.0, 0.0
        self._kept_at = self._filed_at = -1  # steps
        self._filed_time = self._begun = time.monotonic()
        self._starts = sum(event["event"] == "start" for event in self.run.read_events())

    # ------------------------------------------------------------ beginning

    def take_best(self, learner: Learner) -> str:
        """Put the learner into the newest whole state there is on this node or in files; where that was from."""
        kept = newest(self.memory, self.run.key) if self.memory is not None and self.memory.exists() else None
        filed = checkpoints.newest_valid(self.place, data=False)
        if filed is not None and (kept is None or step_of(filed) > kept.step):
            whole = checkpoints.read_newest(self.place)
            if whole is not None and (kept is None or whole.facts.step > kept.step):
                restore(learner, TrainState(whole.weights, whole.state, whole.facts.training))
                return "file"
        if kept is None:
            return "new"
        self._take_kept(learner, kept)
        return "kept"

    def _take_kept(self, learner: Learner, kept: Kept) -> None:
        weights, tensors = parted(kept.tensors)
        restore(learner, TrainState(weights, tensors, kept.facts))
        self.member.records.extend((int(step), line) for step, line in kept.facts["records"])

    def new_generation(self, place: Generation) -> None:
        """Whose turn it is to keep and to write."""
        self.writes, self.keeps = place.rank == 0, place.keeps and self.memory is not None
        if not self.keeps:
            self.saver.keeper = None
        elif self.saver.keeper is None:
            assert self.memory is not None
            self.memory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.saver.keeper = Keeper(self.memory, self.run.key, self.node)
            if self.saver.keeper.off:
                self.run.event("memory_off", node=self.node, why=self.saver.keeper.off)
        self._filed_time = time.monotonic()

    # ------------------------------------------------------------ when

    def due(self, step: int, step_s: float) -> bool:
        """Whether state is to be saved after a step (which took so long): then call `save` with the learner settled."""
        self._step_s = step_s if not self._step_s else (1 - _USUAL) * self._step_s + _USUAL * step_s
        return self._memory_due(step) or self._file_due(step)

    def _memory_due(self, step: int) -> bool:
        if not self.keeps or self.saver.busy(MEMORY):
            return False
        return self.member.away or step - self._kept_at >= self._every

    def _file_due(self, step: int) -> bool:
        """After the last step the file is written by `write_now`."""
        when = self.config.checkpoint
        if not self.writes or step + 1 >= self.config.steps:
            return False
        if when.every_steps:
            return (step + 1) % when.every_steps == 0 and step > self._filed_at
        return time.monotonic() - self._filed_time >= (when.every_s or self._best_interval_s())

    def _best_interval_s(self) -> float:
        mtbf = Mtbf().after(time.monotonic() - self._begun, self._starts - 1)
        return checkpoint_every_s(self._file_s, mtbf.seconds)

    # ------------------------------------------------------------ saving

    def save(self, learner: Learner, step: int) -> None:
        """Copy the state after a step and have it saved; nothing while all memory for copies is in use."""
        memory, file = self._memory_due(step), self._file_due(step)
        taken = self.buffers.take(views(learner))
        if taken is None:
            return
        self._stall_s += taken.seconds
        if memory:
            self._kept_at = step
            self._choose_interval(taken.seconds)
            self.saver.keep(taken, {"records": self._lines()})
        if file:
            self._filed_at, self._filed_time = step, time.monotonic()
            self.saver.checkpoint(taken, self._about)
        taken.release()

    def _choose_interval(self, cost_s: float) -> None:
        self._cost_s = cost_s if not self._cost_s else 0.5 * (self._cost_s + cost_s)
        if not self.config.checkpoint.memory_steps:
            self._every = snapshot_every(self._cost_s, max(1e-6, self._step_s), before=self._every)

    def _lines(self) -> list[tuple[int, dict[str, Any]]]:
        lines = list(self.member.records)
        return lines if self.member.away else lines[-_LINES_KEPT:]

    def write_now(self, learner: Learner) -> None:
        """The state as a published checkpoint before this returns; Interrupted when the generation ends, else OSError."""
        self.saver.drain(self.member.ladder.absence_s)
        state = views(learner)
        while True:
            started = time.perf_counter()
            drafted = checkpoints.draft(self.place, self._about(state), state.weights, state.tensors, self.saver.tag)
            why = self.member.commit(drafted, time.perf_counter() - started)
            if not why:
                return
            self.member.check()
            if why != UNHEARD:
                raise OSError(f"{self.place}: the last checkpoint was not published: {why}")
            self.member.wait_for_roster()

    def keep_now(self, learner: Learner) -> bool:
        """The state in this node's memory before this returns; False where it is not kept."""
        taken = self.buffers.take(views(learner)) if self.keeps else None
        if taken is None or self.memory is None:
            return False
        self.saver.keep(taken, {"records": self._lines()})
        taken.release()
        kept = newest(self.memory, self.run.key) if self.saver.drain(self.member.ladder.meeting_s) else None
        return kept is not None and kept.step == learner.committed

    def _about(self, state: TrainState) -> Facts:
        step, held = int(state.facts["step"]), self.manifest
        self.on_write(step)
        if self.full_disk:
            self.full_disk = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        names = self.config.channel_names
        moments = [(held.mean[i], max(held.std[i], 1e-30)) for i in (held.channels.index(name) for name in names)]
        provenance = {
            "run": self.config.name,
            "manifest_sha256": self.manifest_sha256,
            "labels": held.labels,
            "class_weights": list(class_weights(held.class_counts, self.config.learn.loss.weights)),
            "weights_sha256": state_sha256(state.weights, {}),
            "state_sha256": state_sha256(state.weights, state.tensors),
            "config": plain(self.config),
            "torch": torch.__version__,
        }
        return Facts(
            step=step, cursor=int(state.facts["cursor"]), network=self.config.network, channels=names,
            mean=tuple(mean for mean, _ in moments), std=tuple(std for _, std in moments),
            spacing_deg=held.spacing_deg, classes=held.classes, provenance=provenance, training=dict(state.facts),
        )  # fmt: skip

    def _commit(self, drafted: Draft, seconds: float) -> None:
        why = self.member.commit(drafted, seconds)
        if "is over" in why:
            raise Refused(why)
        if why:
            raise OSError(why)

    def _saved(self, saved: Saved) -> None:
        if saved.kind == FILE:
            self._file_s = saved.seconds

    def _failed(self, kind: str, error: Exception) -> None:
        if not isinstance(error, Superseded):
            self.run.event("save_failed", what=kind, node=self.node, error=f"{type(error).__name__}: {error}")

    # ------------------------------------------------------------ end, chaos

    def take_stall(self) -> float:
        """Seconds that steps have waited for copies since the last call."""
        stall, self._stall_s = self._stall_s, 0.0
        return stall

    def forget_node(self) -> None:
        """Chaos: as if the node's memory were gone."""
        if self.memory is not None:
            forget(self.memory / self.run.key, self.node)
            self.saver.keeper = None
            self.keeps = False

    def close(self, finished: bool) -> None:
        """Nothing more comes; what was kept in memory goes when the run is complete."""
        self.saver.drain(self.member.ladder.meeting_s)
        if finished and self.keeps and self.memory is not None:
            forget(self.memory, self.run.key)

    def stop(self) -> None:
        """End the threads."""
        self.saver.close(0.0)


def step_of(path: Any) -> int:
    """The step in a checkpoint's name."""
    return int(str(path).partition("?")[0].rstrip("/").rpartition("step-")[2])


def check_same(facts: Facts, config: TrainConfig, where: object) -> None:
    """BadInput that names what differs between a checkpoint and a run that wants to go on from it."""
    was, now = facts.provenance.get("manifest_sha256"), set_id(manifest_bytes(config.shards))
    if was != now:
        expected, remedy = f"the shards that the run began with (manifest {was})", "Continue with those, or start a new run."
        raise BadInput(config.shards, expected, f"manifest {now}", remedy)
    differing = other_values(facts.provenance["config"], config)
    if differing:
        expected, remedy = "a checkpoint of the same configuration", "Continue with what it was trained with, or start a new run."
        raise BadInput(where, expected, f"other values of {differing}", remedy)


def state_sha256(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors: equal exactly when the states are."""
    digest = hashlib.sha256()
    for kind, tensors in (("weights", weights), ("state", state)):
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{kind}/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Saving in the background: nothing waits, nothing is lost silently, and what goes wrong does not end training."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raysegment.archive.places import Place
from raysegment.climate.channels import NAMES
from raysegment.elastic import saver as module
from raysegment.elastic.capture import Buffers, Capture, joined, parted
from raysegment.elastic.checkpoints import Draft, list_checkpoints, publish, read_newest
from raysegment.elastic.keeper import Keeper, newest, steps
from raysegment.elastic.loop import Loop
from raysegment.elastic.saver import FILE, MEMORY, Refused, Saver, Superseded
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import TrainState, capture, restore, views
from raysegment.learning.step import LearnConfig, Learner, initialise
from raysegment.networks import NetworkConfig, TiramisuConfig
from tests.faulty_disk import facts, full, same, tensors

PATIENCE_S = 60.0


def state(step: int) -> TrainState:
    weights, rest = tensors(step)
    return TrainState(weights, rest, {"step": step})


def about(given: TrainState):
    return facts(given.facts["step"])


class Office:
    """A saver with what it tells, and an arbiter that publishes, refuses, or is waited for."""

    def __init__(self, folder: Path):
        self.place, self.memory = Place.of(folder / "checkpoints"), folder / "memory"
        self.keeper = Keeper(self.memory, "run", "node")
        self.buffers = Buffers()
        self.failures: list[tuple[str, Exception]] = []
        self.saved: list[tuple[str, int]] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.held, self.refusal = False, None
        note = lambda saved: self.saved.append((saved.kind, saved.step))
        self.saver = Saver(self.place, "writer", self.commit, lambda *what: self.failures.append(what), note, self.keeper)

    def commit(self, drafted: Draft, seconds: float) -> None:
        assert seconds > 0
        self.begun.release()
        if self.held:
            assert self.go.acquire(timeout=PATIENCE_S)
        if self.refusal is not None:
            raise self.refusal
        publish(self.place, drafted)

    def take(self, step: int) -> Capture:
        taken = self.buffers.take(state(step))
        assert taken is not None
        return taken

    def checkpoint(self, step: int) -> None:
        taken = self.take(step)
        self.saver.checkpoint(taken, about)
        taken.release()

    def keep(self, step: int) -> None:
        taken = self.take(step)
        self.saver.keep(taken, {"generation": 1})
        taken.release()

    def drain(self) -> None:
        assert self.saver.drain(PATIENCE_S)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    made.go.release(1000)
    assert made.saver.close(PATIENCE_S)
    assert len(made.buffers.free) == made.buffers.made, "all memory has been given back"


def test_one_capture_is_kept_and_published(office):
    taken = office.take(4)
    office.saver.keep(taken, {"generation": 1})
    office.saver.checkpoint(taken, about)
    taken.release()
    office.drain()
    assert sorted(office.saved) == [(FILE, 4), (MEMORY, 4)]
    read, kept = read_newest(office.place), newest(office.memory, "run")
    assert read is not None
    assert kept is not None
    assert read.facts == facts(4)
    assert kept.facts == {"step": 4, "generation": 1}
    for weights, rest in ((read.weights, read.state), parted(kept.tensors)):
        assert same(weights, tensors(4)[0])
        assert same(rest, tensors(4)[1])
    assert office.failures == []


def test_a_checkpoint_that_takes_long_holds_up_neither_training_nor_memory(office):
    office.held = True
    office.checkpoint(1)
    assert office.begun.acquire(timeout=PATIENCE_S)
    assert office.saver.busy(FILE)
    for step in (2, 3):
        office.keep(step)
        assert office.saver._lanes[MEMORY].idle(PATIENCE_S)
    assert [one.step for one in steps(office.memory, "run")] == [3, 2]
    assert list_checkpoints(office.place) == []
    assert not office.saver.drain(0)
    office.go.release()
    office.drain()
    assert len(list_checkpoints(office.place)) == 1


def test_a_checkpoint_that_waits_gives_way_to_a_newer_one_and_says_so(office):
    office.held = True
    office.checkpoint(1)
    assert office.begun.acquire(timeout=PATIENCE_S)
    office.checkpoint(2)
    office.checkpoint(3)  # 1 is being written, 2 waited
    assert [(kind, str(error)) for kind, error in office.failures] == [(FILE, "checkpoint of step 2")]
    assert isinstance(office.failures[0][1], Superseded)
    office.go.release(2)
    office.drain()
    assert office.saved == [(FILE, 1), (FILE, 3)]


def test_of_states_for_memory_that_wait_the_newest_wins(office, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    whole = office.keeper.keep

    def slow(step: int, *args: Any) -> float:
        begun.set()
        assert go.wait(PATIENCE_S)
        return whole(step, *args)

    monkeypatch.setattr(office.keeper, "keep", slow)
    office.keep(1)
    assert begun.wait(PATIENCE_S)
    office.keep(2)
    office.keep(3)
    go.set()
    office.drain()
    assert office.saved == [(MEMORY, 1), (MEMORY, 3)]
    assert office.failures == []


def test_without_memory_for_a_copy_there_is_none(office):
    held = [office.take(step) for step in (1, 2, 3)]
    assert office.buffers.take(state(4)) is None
    held[0].release()
    office.keep(4)
    office.drain()
    for taken in held[1:]:
        taken.release()
    assert office.saved == [(MEMORY, 4)]


def test_a_refused_checkpoint_is_deleted_and_an_unanswered_one_is_not(office):
    office.refusal = Refused("generation 1 is over")
    office.checkpoint(1)
    office.drain()
    assert office.place.walk() == []
    office.refusal = TimeoutError("no answer")
    office.checkpoint(2)
    office.drain()
    assert [(kind, type(error)) for kind, error in office.failures] == [(FILE, Refused), (FILE, TimeoutError)]
    assert list_checkpoints(office.place) == []
    assert len(office.place.walk()) == 3, "it may be published any time"
    office.refusal = None
    office.checkpoint(3)
    office.drain()
    assert office.saved == [(FILE, 3)]


def test_a_full_disk_is_told_and_the_next_checkpoint_is_written(office, tmp_path):
    with full(100).installed():
        office.checkpoint(1)
        office.keep(1)
        office.drain()
    assert sorted((kind, error.errno) for kind, error in office.failures) == [(FILE, errno.ENOSPC), (MEMORY, errno.ENOSPC)]
    office.checkpoint(2)
    office.keep(2)
    office.drain()
    assert sorted(office.saved) == [(FILE, 2), (MEMORY, 2)]


def test_storage_that_cannot_be_written_is_told(office, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    office.checkpoint(1)
    office.drain()
    assert [kind for kind, _ in office.failures] == [FILE]
    assert isinstance(office.failures[0][1], OSError)


def test_facts_that_cannot_be_made_are_told(office):
    taken = office.take(1)
    office.saver.checkpoint(taken, lambda _: 1 / 0)
    taken.release()
    office.drain()
    assert isinstance(office.failures[0][1], ZeroDivisionError)


def test_a_keeper_without_room_says_so_once(office, monkeypatch):
    monkeypatch.setattr("raysegment.elastic.keeper.room_bytes", lambda _: 0)
    for step in (1, 2):
        office.keep(step)
        office.drain()
    assert [kind for kind, _ in office.failures] == [MEMORY]
    assert "GiB" in str(office.failures[0][1])


def test_training_does_not_wait_for_the_disk(office, monkeypatch):
    """The caller's thread neither writes nor hashes: all of it happens in the saving threads."""
    threads = set()
    for name in ("draft", "joined"):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, whole=whole: threads.add(threading.current_thread().name) or whole(*args))
    office.checkpoint(1)
    office.keep(1)
    office.drain()
    assert threads == {"save-file", "save-memory"}


# copies


def test_a_copy_does_not_change_with_the_original(office):
    original = state(1)
    taken = office.buffers.take(original)
    assert taken is not None
    for tensor in joined(original).values():
        tensor.zero_()
    assert same(joined(taken.state), joined(state(1)))
    taken.release()


def test_the_memory_of_a_copy_is_used_again():
    buffers = Buffers(count=1)
    seen = set()
    for step in (1, 2, 3):
        taken = buffers.take(state(step))
        assert taken is not None
        assert same(joined(taken.state), joined(state(step)))
        seen.add(tuple(tensor.data_ptr() for tensor in joined(taken.state).values()))
        taken.release()
    assert len(seen) == 1
    small = buffers.take(TrainState({"other": torch.ones(2)}, {}, {"step": 4}))
    assert small is not None
    assert joined(small.state).keys() == {"weights/other"}


def test_memory_is_given_back_by_the_last_holder():
    buffers = Buffers(count=1)
    taken = buffers.take(state(1))
    assert taken is not None
    taken.hold().release()
    assert buffers.take(state(2)) is None
    taken.release()
    assert buffers.take(state(2)) is not None
    with pytest.raises(AssertionError, match="given back"):
        taken.release()


def test_a_copy_that_fails_gives_its_memory_back(monkeypatch):
    buffers = Buffers(count=1)
    with monkeypatch.context() as patch:
        patch.setattr("raysegment.elastic.capture._copied", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            buffers.take(state(1))
    taken = buffers.take(state(1))
    assert taken is not None
    assert same(joined(taken.state), joined(state(1)))


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["plain", "averaged"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("lag", [0, 1])
def test_live_tensors_are_those_that_capture_copies(optimizer, lag, ema):
    network = NetworkConfig(channels=4, tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1), dropout=0.1))
    config = LearnConfig(global_batch=2, micro_batch=1, lag=lag, optim=OptimConfig(optimizer=optimizer, ema=ema))
    normaliser = Normaliser.of([0.0] * 16, [1.0] * 16, NAMES[:4])
    make = lambda: Learner(initialise(network, 3), config, normaliser, torch.ones(3))
    learner = make()
    for vector in learner.optimizer.vectors().values():
        vector.normal_()
    if lag:
        learner.lagged = torch.randn_like(learner.flat.values)
    expected, seen = capture(learner), views(learner)
    taken = Buffers().take(seen)
    assert taken is not None
    again = make()
    restore(again, taken.state)
    assert same(joined(capture(again)), joined(expected))
    owned = {t.untyped_storage().data_ptr() for t in (learner.flat.values, *learner.network.buffers())}
    assert {t.untyped_storage().data_ptr() for t in seen.weights.values()} <= owned | (
        {learner.optimizer.ema.untyped_storage().data_ptr()} if learner.optimizer.ema is not None else set()
    ), "views, no copies"


@pytest.mark.parametrize(("committed", "kept", "ends"), [(5, True, True), (5, False, False), (9, True, False)])
def test_who_is_asked_to_end_needs_no_file_if_memory_has_the_state(committed, kept, ends):
    def full(_learner):
        raise OSError(errno.ENOSPC, "No space left on device")

    told: list[str] = []
    loop: Any = SimpleNamespace(
        safe=SimpleNamespace(write_now=full, keep_now=lambda _learner: kept), learner=SimpleNamespace(committed=committed),
        config=SimpleNamespace(steps=9), run_files=SimpleNamespace(event=lambda kind, **facts: told.append(kind)),
    )  # fmt: skip
    with nullcontext() if ends else pytest.raises(OSError, match="No space"):
        Loop._write_last(loop)
    assert told == ["save_failed"] * ends

"""Exchanges that break off: the same bits as if nothing had happened, and members that join in the middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.feed.batches import StepInput
from raysegment.learning.augment import AugmentConfig
from raysegment.learning.exchange import Interrupted, Solo, Work
from raysegment.learning.flat import Flat
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import adopt, capture, facts, live
from raysegment.learning.step import LearnConfig, Learner, StepInfo, initialise
from raysegment.networks import DeepLabConfig, NetworkConfig
from tests.test_learning_step import CONFIG, NET, NORMALISER, Meeting, _Seat, digest
from tests.test_learning_step import share as wide_share

STEPS = 3
DEEPLAB = NetworkConfig("deeplab", deeplab=DeepLabConfig(width=4, blocks=(1, 1, 1, 1), rates=(1, 2)))
SMALL = replace(CONFIG, global_batch=4, augment=AugmentConfig(mirror=True))
SGD = replace(SMALL, optim=OptimConfig(optimizer="sgd", lr=0.05, larc=True, larc_mode="scale", total_steps=6))
TINY = {"tiramisu": (NET, 3000), "deeplab": (DEEPLAB, 1 << 20)}  # with bucket sizes that give some buckets, and one


def learner(config: LearnConfig, net: str = "tiramisu", world=None, seed: int = 7) -> Learner:
    network, bucket_bytes = TINY[net]
    return Learner(initialise(network, seed), config, NORMALISER, (0.5, 3.0, 2.0), world, bucket_bytes=bucket_bytes)


def share(step: int, rank: int, size: int, config: LearnConfig) -> StepInput:
    """A member's share, of maps whose sides divide by 8."""
    item = wide_share(step, rank, size, config)
    cut = [replace(m, fields=m.fields[..., :8].contiguous(), mask=m.mask[..., :8].contiguous()) for m in item.micro_batches]
    return replace(item, micro_batches=cut)


@dataclass
class Script:
    """A world of one in which numbered events (a collective's start, and its end) are interruptions that leave garbage."""

    broken: Sequence[int] = ()
    happened: int = 0
    raised: int = 0
    rank: int = 0
    size: int = 1
    lost: list[torch.Tensor] = field(default_factory=list)

    def event(self, tensor: torch.Tensor) -> None:
        self.happened += 1
        if self.happened - 1 in self.broken:
            self.raised += 1
            self.lost.append(tensor)
            raise Interrupted(f"event {self.happened - 1}")

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        self.start_all_reduce(tensor, op).wait()

    def start_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Work:
        self.scribble()
        self.event(tensor)
        return _Scripted(self, tensor)

    def scribble(self) -> None:
        """Aborted collectives go on writing for a while."""
        for tensor in self.lost:
            tensor.fill_(77)


@dataclass
class _Scripted:
    script: Script
    tensor: torch.Tensor

    def wait(self) -> None:
        self.script.event(self.tensor)


def drive(one: Learner, items: Sequence, until: int = STEPS) -> list[StepInfo]:
    """Run to the end of a list of inputs, as a member does whose group may change; what it was told."""
    told = []
    while one.committed < until:
        try:
            info = one.run(items[one.step]) if one.step < until else one.settle()
        except Interrupted:
            one.interrupt()
            assert one.step == one.committed
            continue
        if info is not None:
            told.append(info)
    return told


def outcome(one: Learner, told: Sequence[StepInfo]) -> tuple:
    seconds = {"load_s": 0, "compute_s": 0, "exchange_s": 0, "optimizer_s": 0}
    return digest(capture(one)), [repr(replace(info, **seconds)) for info in told]


def straight(config: LearnConfig, net: str, steps: int = STEPS) -> tuple[tuple, int]:
    """What comes out if nothing happens, and how many events there are."""
    world = Script()
    one = learner(config, net, world)
    told = drive(one, [share(step, 0, 1, config) for step in range(steps)], steps)
    return outcome(one, told), world.happened


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("net", "config"), [("tiramisu", SMALL), ("deeplab", SGD)], ids=["tiramisu-adamw", "deeplab-sgd"])
def test_every_interruption_leaves_the_same_bits(net, config, lag):
    config = replace(config, lag=lag)
    expected, events = straight(config, net)
    assert [info.split(",")[0] for info in expected[1]] == [f"StepInfo(step={step}" for step in range(STEPS)]
    items = [share(step, 0, 1, config) for step in range(STEPS)]
    assert events > 2 * 3 * STEPS if net == "tiramisu" else events == 2 * 3 * STEPS
    for event in range(events):
        world = Script([event])
        one = learner(config, net, world)
        assert outcome(one, drive(one, items)) == expected, event
        assert world.raised == 1


@given(
    data=st.data(), lag=st.integers(0, 1), optimizer=st.sampled_from(["adamw", "sgd", "lamb"]), ema=st.sampled_from([0.0, 0.9])
)
@settings(max_examples=12, deadline=None)
def test_interruptions_of_what_is_redone_leave_the_same_bits(data, lag, optimizer, ema):
    config = replace(SMALL, lag=lag, optim=replace(SMALL.optim, optimizer=optimizer, ema=ema))
    expected, events = straight(config, "tiramisu")
    broken = data.draw(st.sets(st.integers(0, events - 1), min_size=2, max_size=8))
    world = Script(sorted(broken))
    one = learner(config, world=world)
    assert outcome(one, drive(one, [share(step, 0, 1, config) for step in range(STEPS)])) == expected
    assert world.raised == len(broken)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", ["exact64", "fast"])
def test_other_modes_are_interrupted_alike(mode, lag):
    config = replace(SMALL, lag=lag, exchange=mode)
    expected, events = straight(config, "tiramisu", 2)
    items = [share(step, 0, 1, config) for step in range(2)]
    for event in range(0, events, 3):
        one = learner(config, world=Script([event]))
        assert outcome(one, drive(one, items, 2)) == expected


class Mortal(_Seat):
    """A member of a meeting that dies at its n-th collective; the other one notices."""

    def __init__(self, meeting: Meeting, rank: int, last: int):
        super().__init__(meeting, rank)
        self.left = last

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        self.left -= 1
        if not self.left:
            self.meeting.barrier.abort()
            raise KeyboardInterrupt
        try:
            super().all_reduce(tensor, op)
        except threading.BrokenBarrierError as error:
            tensor.fill_(1 << 20)
            raise Interrupted("the other one is gone") from error


@pytest.mark.parametrize("lag", [0, 1])
def test_a_survivor_takes_over_the_share_of_the_dead(lag):
    """A group of two loses one at any of its collectives; the other goes on alone with all micro-batches."""
    config = replace(SMALL, lag=lag)
    expected, events = straight(config, "tiramisu")
    for last in range(1, events // 2 + 1):
        meeting = Meeting(2)

        def dies(meeting=meeting, last=last) -> bool:
            with meeting.turn:
                one = learner(config, world=Mortal(meeting, 1, last))
                try:
                    drive(one, [share(step, 1, 2, config) for step in range(STEPS)])
                except KeyboardInterrupt:
                    return True
                return False

        def survives(meeting=meeting) -> tuple:
            with meeting.turn:
                one, told = learner(config, world=Mortal(meeting, 0, 1000)), []
                while one.committed < STEPS:
                    alone = isinstance(one.world, Solo)
                    try:
                        item = share(min(one.step, STEPS - 1), 0, 1 if alone else 2, config)
                        told.append(one.run(item) if one.step < STEPS else one.settle())
                    except Interrupted:
                        one.interrupt()
                        one.world = Solo()
                return outcome(one, [info for info in told if info])

        with ThreadPoolExecutor(2) as pool:
            dead, found = pool.submit(dies), pool.submit(survives)
            assert found.result(100) == expected, last
            assert dead.result(100)


def copy_live(source: Learner, target: Learner) -> None:
    told = json.loads(json.dumps(facts(source)))
    adopt(target, told)
    theirs, ours = live(source), live(target)
    assert list(theirs) == list(ours)
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        tensor.copy_(theirs[name])
    assert facts(target) == told


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize("event", [-1, 0, 9, 15, 20, 27])
def test_a_member_that_joins_goes_on_with_the_same_bits(event, optimizer, lag):
    """Taken from a settled member (−1), or from one whose exchange was interrupted; by a fresh one, and by a straggler."""
    config = replace(SMALL, lag=lag, optim=replace(SMALL.optim, optimizer=optimizer, ema=0.5))
    expected, _ = straight(config, "tiramisu")
    items = [share(step, 0, 1, config) for step in range(STEPS)]
    source, told = learner(config, world=Script([event])), []
    try:
        told = [source.run(items[0]), source.run(items[1]), source.settle()]
    except Interrupted:
        source.interrupt()
    for steps in (0, 1, 2):
        target = learner(config, seed=3)
        for item in items[:steps]:
            target.run(item)
        copy_live(source, target)
        drive(target, items)
        assert digest(capture(target)) == expected[0]
    later = drive(source, items)
    assert digest(capture(source)) == expected[0]
    assert [info.step for info in [*told, *later] if info][-1] == STEPS - 1


def test_live_tensors_are_the_learners_own():
    one = learner(replace(SMALL, lag=1))
    assert {"lagged", "previous"}.isdisjoint(live(one))
    one.run(share(0, 0, 1, SMALL))
    with pytest.raises(AssertionError, match="settle"):
        facts(one)
    with pytest.raises(AssertionError, match="settle"):
        capture(one)
    one.settle()
    found = live(one)
    assert found["values"].data_ptr() == one.flat.values.data_ptr()
    assert {"values", "exp_avg.0", "exp_avg_sq.1", "ema", "statistics", "tracked.0", "lagged", "previous"} <= {*found}
    found["tracked.0"].fill_(9)
    assert one.statistics.norms[0].num_batches_tracked == 9


@pytest.mark.parametrize("lag", [0, 1])
def test_warming_up_leaves_no_trace(lag):
    config = replace(SMALL, lag=lag)
    expected, _ = straight(config, "tiramisu")
    one = learner(config)
    before, state = torch.random.get_rng_state(), digest(capture(one))
    one.warm_up(8, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert digest(capture(one)) == state
    drive(one, [share(step, 0, 1, config) for step in range(STEPS)])
    assert digest(capture(one)) == expected[0]
    assert isinstance(one.flat, Flat)

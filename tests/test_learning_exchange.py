"""Buckets and messages of a step: cut alike everywhere, leaving during backward, the same bits in turn or together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysegment.learning.augment import AugmentConfig
from raysegment.learning.buckets import GRADIENTS, STATISTICS, apart, buckets
from raysegment.learning.exchange import Done, Scale, Solo, Terms, Work
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import capture
from raysegment.learning.step import initialise
from tests.test_learning_quarantine import spoiled
from tests.test_learning_step import CONFIG, NET, conversation, digest, learner, meet, share

STEPS = 3


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    weights=st.integers(0, 12),
    statistics=st.integers(0, 30),
    most=st.integers(1, 2000),
    alone=st.booleans(),
)
def test_buckets_hold_everything_once_in_the_order_of_backward(sizes, weights, statistics, most, alone):
    weights = min(weights, len(sizes))
    cut = buckets(sizes, weights, statistics, most)
    small = 4 * (sum(sizes) + statistics) <= most
    assert (len(cut) == 1) or not small
    cut = apart(cut) if alone else cut
    segments = [segment for bucket in cut for segment in bucket.segments]
    for vector, size in ((GRADIENTS, sum(sizes)), (STATISTICS, statistics)):
        held = sorted(i for s in segments if s.vector == vector for i in range(s.start, s.stop))
        assert held == list(range(size))
    assert sorted(index for bucket in cut for index in bucket.parameters) == list(range(len(sizes)))
    for bucket in cut:
        own = sum(sizes[index] for index in bucket.parameters)
        assert own == sum(s.size for s in bucket.segments if s.vector == GRADIENTS)
        assert not alone or len({s.vector for s in bucket.segments}) == 1
    if not small:
        full = [bucket for bucket in cut if bucket.parameters and max(bucket.parameters) < weights]
        assert all(4 * sum(bucket.sizes) <= most or len(bucket.parameters) == 1 for bucket in full)
        firsts = [min(bucket.parameters) for bucket in full]
        assert firsts == sorted(firsts, reverse=True)


class Watched(Solo):
    """A world of one that notes messages between other events."""

    def __init__(self) -> None:
        object.__setattr__(self, "events", [])

    def start_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Work:
        self.events.append((op, tensor.numel()))
        return Done()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_buckets_leave_during_the_last_backward(mode, checkpointing):
    world = Watched()
    one = learner(replace(CONFIG, exchange=mode, checkpointing=checkpointing), world, bucket_bytes=2000)
    first = one.flat.parameters[0]
    first.register_hook(lambda gradient: world.events.append("first weights"))
    for step in range(2):
        world.events.clear()
        one.run(share(step, 0, 1))
        assert world.events[:5] == ["first weights"] * 5  # nothing leaves in the micro-batches before
        before = world.events[5 : world.events.index("first weights", 5)]
        assert len(before) >= 3, world.events
        assert len(world.events) > 6 + len(before)


@pytest.mark.parametrize("mode", ["exact", "exact64", "fast"])
def test_overlap_changes_no_bit(mode):
    found = set()
    for overlap in (True, False):
        for checkpointing in (True, False):
            one = learner(replace(CONFIG, exchange=mode, overlap=overlap, checkpointing=checkpointing))
            infos = list(one.steps(spoiled(share(step, 0, 1), {1, 10, 11, 12, 13}) for step in range(STEPS)))
            found.add((digest(capture(one)), repr([(info.loss, info.grad_norm, info.samples) for info in infos])))
    assert len(found) == 1


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("overlap", [True, False])
def test_overlapped_or_not_members_agree(size, overlap):
    expected = digest(meet(1, CONFIG, STEPS)[0][0])
    for state, _ in meet(size, replace(CONFIG, overlap=overlap), STEPS):
        assert digest(state) == expected


def test_frozen_parameters_and_those_without_gradient_do_not_hold_a_step_up():
    one = learner(CONFIG)
    item = share(0, 0, 1)
    one.run(item)
    plain = learner(replace(CONFIG, overlap=False))
    for each in (one, plain):
        list(each.network.parameters())[-1].requires_grad_(False)  # in the flat vector, but backward passes it by
    if one.step == 1:
        one.run(share(1, 0, 1))
    list(plain.steps(share(step, 0, 1) for step in range(2)))[-1]
    assert torch.isfinite(one.flat.values).all()


@pytest.mark.parametrize("lag", [0, 1])
def test_lag_does_what_it_did_before_it_was_overlapped(lag):
    """Against a loop: g of each step by a learner at given weights, then update(g of the step before) at this step's rate."""
    config = replace(CONFIG, lag=lag, augment=AugmentConfig(), optim=OptimConfig("sgd", 0.1, 0.0, momentum=0.0, total_steps=6))
    one, weights, waiting = learner(config), None, None
    for step in range(4):
        probe = learner(replace(config, lag=0, optim=replace(config.optim, lr=1.0, schedule="constant")))
        probe.step = probe.committed = step
        if weights is not None:
            probe.flat.values.copy_(weights)
        weights = probe.flat.values.clone() if weights is None else weights
        probe.run(share(step, 0, 1, config))
        gradient = probe.flat.grads.clone()  # what the exchange left there
        due, waiting = (waiting, gradient) if lag else (gradient, None)
        rate = 0.1 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6, dtype=torch.float64)).item())
        if due is not None:
            weights = weights.add(due, alpha=-rate)
    infos = list(one.steps(share(step, 0, 1, config) for step in range(4)))
    assert [info.step for info in infos] == [0, 1, 2, 3]
    torch.testing.assert_close(one.flat.values, weights, rtol=1e-6, atol=1e-7)
    if lag:
        assert torch.equal(one.lagged, gradient) or torch.allclose(one.lagged, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["exact", "exact64", "fast"])
def test_any_number_that_is_not_finite_is_seen(mode, bad):
    for place in range(3):
        row = torch.ones(3)
        row[place] = bad
        assert not conversation(Solo(), mode, [(1, torch.ones(3), 1.0), (1, row, 1.0)], 1)[0].summable
    assert not conversation(Solo(), mode, [(1, torch.ones(3), bad), (1, torch.ones(3), 1.0)], 1)[0].summable
    assert conversation(Solo(), mode, [(1, torch.ones(3), 1.0)], 1)[0].summable


@pytest.mark.parametrize("loss", [1e6, 1e12, 3e38])
def test_a_huge_loss_is_told_as_huge(loss):
    """Two of 1e12 once made the sum of integers 0, so that a run that had diverged seemed to have learnt everything."""
    head, *_ = conversation(Solo(), "exact", [(1, torch.ones(3), loss), (1, torch.ones(3), loss)], 1)
    assert 2.0**18 <= head.loss <= loss


@given(
    value=st.floats(0, allow_infinity=False, allow_nan=False, width=32),
    micro_batches=st.integers(1, 1 << 20),
    wide=st.booleans(),
)
def test_sums_cannot_overflow(value, micro_batches, wide):
    """Not even if every micro-batch has the largest value of the world in the same place."""
    tops = torch.tensor([value]).view(torch.int32)
    scale = Scale.of(tops, Terms("exact64" if wide else "exact", micro_batches, 1))
    up, down = float(scale.up), float(scale.down)
    assert up * down == 1
    assert abs(round(value * up)) * micro_batches <= 2 ** (62 if wide else 30)


def test_bf16_wires_round_gradients_and_not_statistics():
    config = replace(CONFIG, exchange="fast", augment=AugmentConfig())
    plain, short = learner(config), learner(replace(config, wire="bf16"))
    for one in (plain, short):
        one.run(share(0, 0, 1))
    assert torch.equal(plain.statistics.values, short.statistics.values)
    one = replace(config, wire="bf16", lag=1)
    rounded, whole = learner(one), learner(replace(one, wire="fp32"))
    for each in (rounded, whole):
        list(each.steps([share(0, 0, 1)]))
    assert rounded.lagged is not None
    assert whole.lagged is not None
    assert not torch.equal(rounded.lagged, whole.lagged)
    torch.testing.assert_close(rounded.lagged, whole.lagged, rtol=2**-8, atol=0)


def test_signals_have_64_bits():
    one = learner()
    info = one.run(share(0, 0, 1), signal=3 + (5 << 16) + (7 << 48))
    assert info is not None
    assert info.signals == 3 + (5 << 16) + (7 << 48)


def test_the_cut_follows_from_the_network_alone():
    assert learner()._cut == learner(replace(CONFIG, seed=9, lag=1))._cut
    assert sum(p.numel() for p in initialise(NET, 0).parameters()) == sum(
        s.size for bucket in learner()._cut for s in bucket.segments if s.vector == GRADIENTS
    )

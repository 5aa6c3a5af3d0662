"""Damaged tiles in the step: consumed, not learnt from, and the same bits in any world."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.learning.augment import AugmentConfig
from raysegment.learning.exchange import Done, OutOfOrder, Solo, Work
from raysegment.learning.flat import Statistics
from raysegment.learning.losses import LossConfig
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import capture
from raysegment.learning.step import LearnConfig, Learner, StepInfo, initialise, key
from tests.test_learning_step import CONFIG, NET, NORMALISER, Meeting, conversation, digest, learner, share

PLAIN_NET = replace(NET, tiramisu=replace(NET.tiramisu, dropout=0.0))
SIX = replace(CONFIG, global_batch=6, micro_batch=3)
PLAIN = replace(SIX, augment=AugmentConfig(), optim=OptimConfig(optimizer="sgd", momentum=0, lr=1.0, weight_decay=0))
WEIGHTS = torch.tensor([0.5, 3.0, 2.0])


def spoil(batch: MicroBatch, damaged: Collection[int], filler: float = 0.0) -> MicroBatch:
    """The micro-batch with some positions marked and their rows filled; all marked usable where none is damaged."""
    usable = torch.tensor([position not in damaged for position in batch.positions.tolist()])
    fields, mask = batch.fields.clone(), batch.mask.clone()
    fields[~usable], mask[~usable] = filler, 0 if filler == 0 else 255
    return MicroBatch(batch.positions, fields, mask, usable)


def spoiled(item: StepInput, damaged: Collection[int], filler: float = 0.0) -> StepInput:
    return replace(item, micro_batches=[spoil(batch, damaged, filler) for batch in item.micro_batches])


def run(config: LearnConfig, damaged: Collection[int], steps: int = 1, filler: float = 0.0) -> tuple[Learner, list[StepInfo]]:
    """A learner alone after some steps, and what it said."""
    one = learner(config)
    return one, list(one.steps(spoiled(share(step, 0, 1, config), damaged, filler) for step in range(steps)))


def plainly(item: StepInput, damaged: Collection[int]) -> tuple[dict[str, torch.Tensor], float, torch.Tensor]:
    """Gradient and mean of the loss over the usable tiles and the statistics, by torch's own accumulation."""
    network, total = initialise(PLAIN_NET, 7).train(), 0.0
    statistics = Statistics(network)
    kept, used = torch.zeros_like(statistics.values), 0
    with statistics:
        for batch in item.micro_batches:
            rows = [row for row, position in enumerate(batch.positions.tolist()) if position not in damaged]
            logits, truth = network(NORMALISER.tiles(batch.fields[rows])), batch.mask[rows].long()
            loss = torch.nn.functional.cross_entropy(logits, truth, WEIGHTS, reduction="sum") / truth[0].numel()
            loss.backward()
            total, used = total + loss.item(), used + len(rows)
            kept += len(rows) * statistics.values
    gradient = {name: p.grad / used for name, p in network.named_parameters() if p.grad is not None}
    return gradient, total / used, kept / used


@pytest.mark.parametrize("damaged", [{1, 4}, {0, 1, 5}, {2}])
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_step_learns_the_mean_over_usable_tiles(mode, damaged):
    config, item = replace(PLAIN, exchange=mode), share(0, 0, 1, PLAIN)
    gradient, loss, statistics = plainly(item, damaged)
    one = learner(config, net=PLAIN_NET)
    before, running = one.flat.named(one.flat.values), one.statistics.values.clone()
    info = one.run(spoiled(item, damaged))
    after = one.flat.named(one.flat.values)
    for name, expected in gradient.items():
        torch.testing.assert_close(before[name] - after[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.statistics.values, running.lerp(statistics, one.statistics.momentum), rtol=1e-4, atol=1e-5)
    assert info.loss == pytest.approx(loss, rel=1e-5)
    assert (info.samples, info.quarantined, info.skipped) == (6 - len(damaged), len(damaged), False)


def meet(size: int, config: LearnConfig, damaged: Collection[int], steps: int = 3) -> list[tuple[str, list[tuple]]]:
    """For every member of a world: the digest of its state, and what it said of each step but the seconds."""
    meeting = Meeting(size)

    def work(rank: int) -> tuple[str, list[tuple]]:
        with meeting.turn:
            one = learner(config, meeting.member(rank))
            infos = list(one.steps(spoiled(share(step, rank, size, config), damaged) for step in range(steps)))
            told = [(repr(i.loss), repr(i.grad_norm), i.samples, i.quarantined, i.skipped, i.lr) for i in infos]
            return digest(capture(one)), told

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


HARM = {1, 2, 3, 18, 19, 20, *range(24, 36)}  # some of a micro-batch, one whole (all that a member of four has), a whole step


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("mode", "micro_batch", "precision"), [("exact", 2, "fp32"), ("exact", 3, "bf16"), ("exact64", 3, "fp32")]
)
def test_same_bits_in_any_world_with_damaged_tiles(mode, micro_batch, precision, lag):
    config = replace(CONFIG, exchange=mode, micro_batch=micro_batch, precision=precision, lag=lag)
    ((found, told),) = meet(1, config, HARM, steps=4)
    assert [(samples, quarantined, skipped) for _, _, samples, quarantined, skipped, _ in told] == [
        (9, 3, False), (9, 3, False), (0, 12, True), (12, 0, False),
    ]  # fmt: skip
    for size in (2, 3, 4) if mode == "exact" else (3,):
        assert meet(size, config, HARM, steps=4) == [(found, told)] * size


@pytest.mark.parametrize("mode", ["exact", "exact64", "fast"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_marked_usable_is_none_marked(mode, precision):
    config = replace(CONFIG, exchange=mode, precision=precision, micro_batch=3)
    marked, plain = run(config, set(), 2)[0], learner(config)
    infos = [plain.run(share(step, 0, 1, config)) for step in range(2)]
    assert digest(capture(marked)) == digest(capture(plain))
    assert [(info.samples, info.quarantined) for info in infos] == [(12, 0)] * 2


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("damaged", [{1, 4}, {0, 3}, {3, 4, 5}])
def test_what_fills_the_rows_does_not_matter(mode, damaged):
    config = replace(SIX, exchange=mode)
    zeros, nans = (run(config, damaged, filler=filler)[0] for filler in (0.0, float("nan")))
    assert digest(capture(zeros)) == digest(capture(nans))
    assert digest(capture(zeros)) != digest(capture(run(config, {1})[0]))


def test_a_micro_batch_without_a_usable_tile_is_not_computed():
    """And dropout of the other one is drawn as for its first position, though that is damaged too."""
    one, seen = learner(SIX), []
    one.network.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.initial_seed())))
    info = one.run(spoiled(share(0, 0, 1, SIX), {0, 3, 4, 5}))
    assert seen == [(2, key(SIX.seed, 0))]
    assert (info.samples, info.quarantined, info.skipped) == (2, 4, False)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_a_usable_tile_changes_nothing_but_the_step(precision):
    """The scale of float16 losses stays too: nothing has overflowed."""
    one = learner(replace(SIX, precision=precision))
    one.run(share(0, 0, 1, SIX))
    before = capture(one)
    info = one.run(spoiled(share(1, 0, 1, SIX), range(6, 12)))
    after = capture(one)
    assert (info.skipped, info.samples, info.quarantined) == (True, 0, 6)
    assert (info.loss != info.loss, info.grad_norm != info.grad_norm) == (True, True)  # not numbers
    assert digest(replace(before, facts={})) == digest(replace(after, facts={}))
    assert after.facts == {**before.facts, "step": 2, "cursor": 12}
    assert not one.run(share(2, 0, 1, SIX)).skipped


def test_with_lag_an_empty_step_applies_the_gradient_before_it_and_leaves_none():
    one = learner(replace(SIX, lag=1))
    one.run(share(0, 0, 1, SIX))
    start = one.flat.values.clone()
    one.run(spoiled(share(1, 0, 1, SIX), range(6, 12)))
    moved = one.flat.values.clone()
    one.run(share(2, 0, 1, SIX))
    assert not torch.equal(moved, start)
    assert torch.equal(one.flat.values, moved)


def test_a_usable_tile_varies_as_if_all_were_usable():
    one, batch = learner(), share(0, 0, 1, SIX).micro_batches[0]
    fields, mask = one.prepare(batch)
    fewer, fewer_mask = one.prepare(spoil(batch, {1}, float("nan")))
    assert torch.equal(fewer, fields[[0, 2]])
    assert torch.equal(fewer_mask, mask[[0, 2]])


def test_jaccard_weighs_as_the_rest():
    """A term that is not a sum over tiles: micro-batches of as many usable tiles count alike, one of half as many half."""
    config, alone = replace(PLAIN, loss=LossConfig(jaccard=1.0), exchange="fast"), []
    for damaged in ({1, 3, 4, 5}, {0, 1, 2, 5}):
        alone.append(run(config, damaged)[1][0].loss)
    assert run(config, {1, 5})[1][0].loss == pytest.approx(sum(alone) / 2, rel=1e-6)
    one = run(config, {0, 1, 3, 4, 5})[1][0].loss
    assert run(config, {0, 1, 5})[1][0].loss == pytest.approx((one + 2 * alone[1]) / 3, rel=1e-6)


@pytest.mark.parametrize("damaged", [set(), {0, 1}, {10, 11}, set(range(12))])
def test_positions_without_a_tile_are_consumed_exactly_once(damaged):
    good = spoiled(share(0, 0, 1), damaged).micro_batches
    learner().run(StepInput(0, good))
    for wrong in (good[:-1], [*good, good[0]], [*good[:-1], good[0]]):
        with pytest.raises(OutOfOrder, match="expected 12 samples"):
            learner().run(StepInput(0, wrong))


def test_marks_must_fit():
    batch = share(0, 0, 1, SIX).micro_batches[0]
    for bad in (torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.uint8), torch.ones(3, 1, dtype=torch.bool)):
        with pytest.raises(AssertionError):
            replace(batch, usable=bad)
    assert (batch.used, spoil(batch, {1}).used, spoil(batch, {0, 1, 2}).used) == (3, 2, 0)
    assert batch.only_usable() is batch
    assert spoil(batch, {1}).only_usable().positions.tolist() == [0, 2]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3)),
        min_size=1, max_size=9,
    ),
    mode=st.sampled_from(["exact", "exact64", "fast"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_weighted_sums_are_right_to_the_stated_precision(rows, mode):
    given_rows = [(used, torch.tensor(values), float(used)) for used, values in rows]
    head, got, statistics = conversation(Solo(), mode, given_rows, 3)
    total = sum(used for used, _ in rows)
    head.check_order(3 * len(rows))
    assert (head.positions, head.used, head.summable) == (3 * len(rows), total, total > 0)
    if not total:
        return
    assert head.loss == pytest.approx(sum(used**2 for used, _ in rows) / total)
    expected = sum(row.double() * used for used, row, _ in given_rows) / total
    largest = max(float(row.abs().max()) * used / 3 for used, row, _ in given_rows)
    bits = 29 - (len(rows) - 1).bit_length() if mode == "exact" else 20
    atol = 3 * len(rows) / total * max(largest * 2.0**-bits, 2.0**-100)
    for found in (got, statistics):
        torch.testing.assert_close(found.double(), expected, rtol=2**-20, atol=atol)


class Listens:
    """A world of one that notes the kind, type and length of every message."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.heard: list[tuple[str, torch.dtype, int]] = []

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        self.heard.append((op, tensor.dtype, tensor.numel()))

    def start_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Work:
        self.all_reduce(tensor, op)
        return Done()


@pytest.mark.parametrize("mode", ["exact", "exact64", "fast"])
@pytest.mark.parametrize("lag", [0, 1])
def test_messages_are_as_many_and_as_long_whatever_a_member_has(mode, lag):
    """Damaged tiles or whole damaged micro-batches; overlapped or not; no micro-batch at all, where the order is then missed."""
    found = set()
    for damaged in (set(), {1, 4}, {3, 4, 5}, range(6)):
        for overlap in (True, False):
            world = Listens()
            one = learner(replace(SIX, exchange=mode, lag=lag, overlap=overlap), world)
            list(one.steps([spoiled(share(0, 0, 1, SIX), damaged)]))
            found.add(tuple(world.heard))
    world = Listens()
    with pytest.raises(OutOfOrder):
        list(learner(replace(SIX, exchange=mode, lag=lag), world).steps([StepInput(0, [])]))
    found.add(tuple(world.heard))
    assert len(found) == 1
    kinds = [op for op, _, _ in found.pop()]
    parts = len(learner(SIX)._cut)
    assert parts > 2
    if mode == "fast":
        assert kinds == ["sum"] * (parts + 1)
    elif lag:
        assert kinds == ["max"] + ["sum"] * (parts + 1)
    else:
        assert kinds == ["max", "max", *["max", "sum"] * (parts - 2), "sum", "sum", "sum"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_networks_take_fewer_tiles_too():
    losses = []
    for compiled in (False, True):
        one = learner(replace(PLAIN, global_batch=2, micro_batch=2, compile=compiled), net=PLAIN_NET)
        items = [share(step, 0, 1, one.config) for step in range(3)]
        losses.append([one.run(spoiled(item, {3})).loss for item in items])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

"""The step: same bits in any world, resumable bit for bit, order checked, not-finite steps skipped by all alike."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.climate.channels import CHANNELS
from raysegment.climate.checks import BadInput
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.learning.augment import AugmentConfig
from raysegment.learning.buckets import buckets
from raysegment.learning.exchange import Distributed, Done, Exchange, Interrupted, OutOfOrder, Solo, Terms, Work
from raysegment.learning.losses import LossConfig
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import TrainState, capture, restore
from raysegment.learning.step import LearnConfig, Learner, StepInfo, initialise
from raysegment.networks import DeepLabConfig, NetworkConfig, TiramisuConfig
from tests.members import CONTEXT

NET = NetworkConfig(tiramisu=TiramisuConfig(first=4, growth=4, kernel=3, blocks=(1, 1), dropout=0.2))
CONFIG = LearnConfig(
    global_batch=12,
    micro_batch=2,
    precision="fp32",
    optim=OptimConfig(lr=0.01, larc=True, ema=0.9, clip_norm=1.0, total_steps=6, warmup_steps=2),
    augment=AugmentConfig(roll=True, mirror=True, gain=0.1, offset=0.1, drop=0.1, noise=0.05, smooth=0.3),
    seed=4,
)
NORMALISER = Normaliser.of([c.reference for c in CHANNELS], [c.scale for c in CHANNELS])


def micro(first: int, count: int = 2, spoil: float = 0.0) -> MicroBatch:
    """Tiles that are a function of their positions."""
    tiles = [torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(p)) for p in range(first, first + count)]
    fields = torch.stack(tiles)
    mask = fields[:, :3].argmax(1).to(torch.uint8)
    fields[0, 0, 0, 0] += spoil
    return MicroBatch(torch.arange(first, first + count), fields.half(), mask)


def share(step: int, rank: int, size: int, config: LearnConfig = CONFIG, spoil: float = 0.0) -> StepInput:
    """A member's contiguous share of a step's micro-batches; uneven, and empty where there are more members than work."""
    numbers = [v for v in range(config.micro_batches) if v * size // config.micro_batches == rank]
    cursor = step * config.global_batch
    bad = spoil if rank == size - 1 else 0.0
    return StepInput(step, [micro(cursor + v * config.micro_batch, config.micro_batch, bad) for v in numbers], load_s=0.25)


def learner(config: LearnConfig = CONFIG, world=None, net: NetworkConfig = NET, bucket_bytes: int = 4096) -> Learner:
    """Its buckets are so small that it has several."""
    return Learner(initialise(net, 7), config, NORMALISER, (0.5, 3.0, 2.0), world, bucket_bytes=bucket_bytes)


def digest(state: TrainState) -> str:
    """SHA-256 of all tensors and facts."""
    found = hashlib.sha256(json.dumps(state.facts, sort_keys=True).encode())
    for tensors in (state.weights, state.tensors):
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


class Meeting:
    """A world of threads of which only one computes at a time (torch's random state is the process's)."""

    def __init__(self, size: int):
        self.size, self.turn, self.barrier, self.sums = size, threading.Lock(), threading.Barrier(size), {}

    def member(self, rank: int) -> _Seat:
        return _Seat(self, rank)


class _Seat:
    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def start_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Work:
        self.all_reduce(tensor, op)
        return Done()

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
        meeting, join = self.meeting, torch.add if op == "sum" else torch.maximum
        meeting.sums[self.rank] = tensor.clone()
        meeting.turn.release()
        try:
            meeting.barrier.wait(60)
            order = [(self.size - 1 - i) for i in range(self.size)]  # not the order of the ranks
            total = functools.reduce(join, (meeting.sums[r] for r in order))
            meeting.barrier.wait(60)
        finally:
            meeting.turn.acquire()
        tensor.copy_(total)


def meet(
    size: int, config: LearnConfig = CONFIG, steps: int = 3, spoil_at: int = -1, prepare: Callable[[Learner], object] = repr
) -> list[tuple[TrainState, list[StepInfo]]]:
    """What every member of a world of `size` ends with; the last has infinite fields at step `spoil_at`."""
    meeting = Meeting(size)

    def work(rank: int) -> tuple[TrainState, list[StepInfo]]:
        with meeting.turn:
            one = learner(config, meeting.member(rank))
            prepare(one)
            items = [share(s, rank, size, config, float("inf") if s == spoil_at else 0.0) for s in range(steps)]
            infos = [one.run(item, signal=rank) for item in items] + [one.settle()]
            return capture(one), [info for info in infos if info is not None]

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def train(size: int, config: LearnConfig = CONFIG, steps: int = 3, spoil_at: int = -1) -> list[tuple[str, list[StepInfo]]]:
    """The digests of what every member ends with."""
    return [(digest(state), infos) for state, infos in meet(size, config, steps, spoil_at)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("mode", ["exact", "exact64"])
def test_same_bits_in_any_world(precision, lag, mode):
    config = replace(CONFIG, precision=precision, lag=lag, exchange=mode)
    alone = train(1, config)[0]
    for size in (2, 3, 4, 8) if mode == "exact" else (4,):  # 4: uneven shares; 8: two members without work
        for rank, (found, infos) in enumerate(train(size, config)):
            assert found == alone[0], (size, rank)
            assert [(i.loss, i.grad_norm, i.samples, i.lr) for i in infos] == [
                (i.loss, i.grad_norm, i.samples, i.lr) for i in alone[1]
            ]
            assert [i.signals for i in infos] == [size * (size - 1) // 2] * 3


def test_fast_exchange_agrees_within_rounding_and_among_members():
    config = replace(CONFIG, exchange="fast")
    results = train(3, config)
    assert len({found for found, _ in results}) == 1
    exact = train(1)[0][1]
    for info, other in zip(results[0][1], exact, strict=True):
        assert info.loss == pytest.approx(other.loss, rel=1e-4)
        assert info.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


def test_exact_gradient_is_the_mean_gradient():
    """Against torch's own accumulation over the whole batch of one step."""
    config = replace(CONFIG, augment=AugmentConfig(), optim=OptimConfig(optimizer="sgd", momentum=0, lr=1.0, weight_decay=0))
    net = replace(NET, tiramisu=replace(NET.tiramisu, dropout=0.0))
    one, plain = learner(config, net=net), initialise(net, 7)
    item = share(0, 0, 1, config)
    for batch in item.micro_batches:
        logits = plain(NORMALISER.tiles(batch.fields))
        loss = torch.nn.functional.cross_entropy(logits, batch.mask.long(), torch.tensor([0.5, 3.0, 2.0]), reduction="sum")
        (loss / batch.mask.numel() / 6).backward()
    before = one.flat.named(one.flat.values)
    info = one.run(item)
    after, expected = one.flat.named(one.flat.values), {name: p.grad for name, p in plain.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-4, atol=1e-5)
    assert info.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in expected.values()]).norm()), rel=1e-4)
    assert (info.load_s, info.samples, info.skipped) == (0.25, 12, False)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("lag", [0, 1])
def test_not_finite_is_skipped_by_all(size, lag):
    results = train(size, replace(CONFIG, lag=lag), spoil_at=1)
    assert len({found for found, _ in results}) == 1
    assert results[0][0] == train(1, replace(CONFIG, lag=lag, global_batch=12), spoil_at=1)[0][0]
    for _, infos in results:
        assert [i.skipped for i in infos] == [False, True, False]
        assert infos[1].loss != infos[1].loss  # not a number
        assert infos[2].loss == infos[2].loss


def test_a_skipped_step_changes_nothing():
    one = learner()
    before = capture(one)
    one.run(share(0, 0, 1, spoil=float("nan")))
    after = capture(one)
    assert all(torch.equal(before.weights[n], after.weights[n]) for n in before.weights)
    assert all(torch.equal(before.tensors[n], after.tensors[n]) for n in before.tensors)
    assert after.facts["step"] == 1


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_wrong_positions_are_noticed(mode):
    config = replace(CONFIG, exchange=mode)
    good = share(0, 0, 1).micro_batches
    for wrong in (good[:-1], [*good, good[0]], [*good[:-1], micro(11)], [*good[:-1], good[0]]):
        one = learner(config)
        before = digest(capture(one))
        with pytest.raises(OutOfOrder, match="expected 12 samples"):
            one.run(StepInput(0, wrong))
        assert digest(capture(one)) == before


def test_interrupted_step_leaves_no_trace():
    class Breaks(Solo):
        def start_all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> Work:
            raise Interrupted("member gone")

    one, other = learner(), learner()
    one.world = Breaks()
    with pytest.raises(Interrupted):
        one.run(share(0, 0, 1))
    one.interrupt()
    one.world = Solo()
    for each in (one, other):
        each.run(share(0, 0, 1))
    assert digest(capture(one)) == digest(capture(other))


def check_resume(config: LearnConfig, spoil_at: int = -1, prepare: Callable[[Learner], object] = repr) -> TrainState:
    """Four steps in one go and with an interruption after two end with the same bits; returns the state between."""
    items = [share(step, 0, 1, config, float("inf") if step == spoil_at else 0.0) for step in range(4)]
    straight, first = learner(config), learner(config)
    for one, part in ((straight, items), (first, items[:2])):
        prepare(one)
        list(one.steps(part))
    saved = capture(first)
    json.dumps(saved.facts)
    assert all(t.is_contiguous() for t in (*saved.weights.values(), *saved.tensors.values()))
    resumed = Learner(initialise(NET, 99), config, NORMALISER, (0.5, 3.0, 2.0))
    restore(resumed, saved)
    assert digest(capture(resumed)) == digest(saved)
    infos = list(resumed.steps(items[2:]))
    assert [info.skipped for info in infos] == [spoil_at == 2, spoil_at == 3]
    assert digest(capture(resumed)) == digest(capture(straight))
    assert digest(saved) != digest(capture(straight))
    return saved


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_run_is_the_same_run(lag, optimizer, ema):
    saved = check_resume(replace(CONFIG, lag=lag, optim=replace(CONFIG.optim, optimizer=optimizer, ema=ema)))
    assert any(name.startswith("lagged.") for name in saved.tensors) == bool(lag)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("spoil_at", [-1, 0, 1, 2])
def test_resumed_float16_run_is_the_same_run(lag, spoil_at):
    """Also with a skipped step before, at and after the interruption; without one the scale grows after it, at step 2."""
    config = replace(CONFIG, precision="fp16", lag=lag, optim=replace(CONFIG.optim, optimizer="lamb"))

    def almost_due(one: Learner) -> None:
        one.scale.value, one.scale.good, one.scale.before = 2.0**10, 997, 2.0**10

    saved = check_resume(config, spoil_at, almost_due)
    expected = {-1: (2.0**10, 999), 0: (2.0**9, 1), 1: (2.0**9, 0), 2: (2.0**10, 999)}
    assert (saved.facts["loss_scale"], saved.facts["good_steps"]) == expected[spoil_at]
    assert any(name.startswith("lagged.") for name in saved.tensors) == (lag == 1 and spoil_at != 1)


def test_weights_for_others_are_the_average():
    one = learner()
    for step in range(2):
        one.run(share(step, 0, 1))
    saved = capture(one)
    name = one.flat.names[0]
    assert not torch.equal(saved.weights[name], one.flat.named(one.flat.values)[name])
    assert torch.equal(saved.tensors[f"value.{name}"], one.flat.named(one.flat.values)[name])


def test_state_of_another_configuration_is_refused():
    saved = capture(learner())
    with pytest.raises(BadInput, match="training state"):
        restore(learner(replace(CONFIG, optim=replace(CONFIG.optim, optimizer="sgd"))), saved)
    with pytest.raises(BadInput, match="training state"):
        restore(learner(replace(CONFIG, optim=replace(CONFIG.optim, ema=0.0))), saved)
    with pytest.raises(BadInput, match="expected"):
        restore(learner(net=replace(NET, tiramisu=replace(NET.tiramisu, growth=8))), saved)
    with pytest.raises(BadInput, match="expected"):
        restore(learner(net=replace(NET, tiramisu=replace(NET.tiramisu, blocks=(1, 2)))), saved)


def test_lag_applies_the_gradient_of_the_step_before():
    lagged, plain = learner(replace(CONFIG, lag=1)), learner()
    start = lagged.flat.values.clone()
    lagged.run(share(0, 0, 1))
    plain.run(share(0, 0, 1))
    assert torch.equal(lagged.flat.values, start)
    assert lagged.lagged is None  # not before it is there
    assert lagged.settle().step == 0
    held = lagged.lagged.clone()
    assert lagged.run(share(1, 0, 1)) is None
    assert lagged.settle().step == 1
    assert not torch.equal(lagged.flat.values, start)
    assert not torch.equal(lagged.lagged, held)


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"global_batch": 6},
        {"micro_batch": 3},
        {"lag": 1},
        {"seed": 5},
        {"exchange": "exact64"},
        {"exchange": "fast"},
        {"loss": LossConfig(jaccard=1.0)},
        {"augment": AugmentConfig()},
        {"optim": OptimConfig(lr=0.5)},
    ],
    ids=str,
)
def test_every_option_matters(changed):
    def outcome(config: LearnConfig) -> str:
        """Of the tensors alone: facts like the cursor and the loss scale differ by themselves."""
        one = learner(config)
        list(one.steps(share(step, 0, 1, config) for step in range(2)))
        return digest(replace(capture(one), facts={}))

    assert outcome(replace(CONFIG, **changed)) != outcome(CONFIG)


def test_float16_scale_is_halved_when_a_step_is_skipped_and_grows_again():
    one = learner(replace(CONFIG, precision="fp16"))
    start = one.scale.value
    one.run(share(0, 0, 1, spoil=float("inf")))
    assert one.scale.value == start / 2
    assert not one.run(share(1, 0, 1)).skipped
    one.scale.good = 999
    one.run(share(2, 0, 1))
    assert one.scale.value == start


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("where", ["fields", "gradient"])
def test_float16_overflow_of_one_member_is_skipped_by_all(where, lag):
    """At step 1 the scale is halved once on all three alike; they end as a world of one that met the same."""

    def overflow(one: Learner) -> None:
        if where == "gradient" and one.world.rank == one.world.size - 1:
            one.flat.parameters[0].register_hook(lambda g: g * float("inf") if one.step == 1 else g)

    config = replace(CONFIG, precision="fp16", lag=lag)
    results = meet(3, config, 3, 1 if where == "fields" else -1, overflow)
    for state, infos in results:
        assert [info.skipped for info in infos] == [False, True, False]
        assert (state.facts["loss_scale"], state.facts["good_steps"]) == (2.0**15, 1)
    ((alone, _),) = meet(1, config, 3, 1 if where == "fields" else -1, overflow)
    assert {digest(state) for state, _ in results} == {digest(alone)}


def test_it_learns():
    config = replace(CONFIG, precision="bf16", augment=AugmentConfig(), optim=OptimConfig(lr=0.02, total_steps=30))
    net = replace(NET, tiramisu=replace(NET.tiramisu, dropout=0.0))
    one = learner(config, net=net)
    infos = list(one.steps(share(step, 0, 1, config) for step in range(25)))
    assert infos[-1].loss < 0.6 * infos[0].loss
    assert [i.step for i in infos] == list(range(25))


def test_all_members_start_equal_and_the_process_keeps_its_random_state():
    before = torch.random.get_rng_state()
    a, b, c = initialise(NET, 1), initialise(NET, 1), initialise(NET, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in pairs)
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


@given(
    values=st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=9),
    mode=st.sampled_from(["exact", "exact64", "fast"]),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_right_to_the_stated_precision(values, mode):
    rows = [torch.tensor(row) for row in values]
    head, got, statistics = conversation(Solo(), mode, [(1, row, 1.5) for row in rows], 1)
    head.check_order(len(values))
    assert head.loss == 1.5
    expected = torch.stack(rows).double().mean(0)
    largest = max(float(row.abs().max()) for row in rows)
    bits = 29 - (len(values) - 1).bit_length() if mode == "exact" else 21
    for found in (got, statistics):
        torch.testing.assert_close(found.double(), expected, rtol=2**-21, atol=max(largest * 2.0**-bits, 2.0**-100))


def conversation(world, mode: str, rows, micro_batch: int):
    """Head, mean gradient and mean statistics of micro-batches given as (usable tiles, vector (3,), loss), both the vector."""
    exchange = Exchange(world, Terms(mode, len(rows), micro_batch), buckets([1, 2], 1, 3, 1), torch.device("cpu"))
    for index, (used, row, loss) in enumerate(rows):
        offsets = range(micro_batch * index, micro_batch * (index + 1))
        exchange.add([row, row], offsets, torch.tensor(loss), used) if used else exchange.pass_over(offsets)
    gradient = torch.empty(3)
    head, statistics = exchange.finish(gradient)
    return head, gradient, statistics


@pytest.mark.parametrize(
    "bad",
    [
        {"global_batch": 7},
        {"precision": "bf61"},
        {"exchange": "exakt"},
        {"lag": 2},
        {"micro_batch": 0},
        {"wire": "bf16"},
        {"exchange": "fast", "wire": "fp8"},
    ],
    ids=str,
)
def test_bad_configurations_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        LearnConfig(**bad)


def _gloo(rank: int, size: int, store: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    one = learner(world=Distributed())
    for step in range(2):
        one.run(share(step, rank, size))
    queue.put(digest(capture(one)))
    dist.destroy_process_group()


def test_same_bits_over_gloo(tmp_path):
    """Three processes (their own random states) against one."""
    queue = CONTEXT.Queue()
    members = [CONTEXT.Process(target=_gloo, args=(rank, 3, str(tmp_path / "store"), queue)) for rank in range(3)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)  # their words are short enough for the queue's pipe
        assert member.exitcode == 0
    found = {queue.get(timeout=10) for _ in members}
    one = learner()
    for step in range(2):
        one.run(share(step, 0, 1))
    assert found == {digest(capture(one))}


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("net", [
    NET, NetworkConfig("deeplab", deeplab=DeepLabConfig(width=4, blocks=(1, 1, 1, 1), rates=(1, 2))),
], ids=["tiramisu", "deeplab"])  # fmt: skip
def test_compiled_step_is_the_step(net):
    """The same loss, weights and statistics up to the order of sums: after one step, in float32, without dropout."""
    net = replace(net, tiramisu=replace(net.tiramisu, dropout=0.0))
    config = replace(CONFIG, global_batch=2, augment=AugmentConfig(), optim=OptimConfig(optimizer="sgd", lr=0.1))
    fields = torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(1))
    tiles = MicroBatch(torch.arange(2), fields.half(), fields[:, :3].argmax(1).to(torch.uint8))
    plain, compiled = (learner(replace(config, compile=wanted), net=net) for wanted in (False, True))
    losses = [one.run(StepInput(0, [tiles])).loss for one in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(compiled.flat.values, plain.flat.values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled.statistics.values, plain.statistics.values, rtol=1e-4, atol=1e-5)

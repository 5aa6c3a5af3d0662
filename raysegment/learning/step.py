"""One optimisation step: micro-batches in, new weights and a `StepInfo` out, the same on every member.

    compute    each micro-batch: normalise, augment, forward, loss, backward
    exchange   what all computed becomes what all know; buckets leave while backward still computes
    commit     clip, LARC, optimizer, statistics, average; only now does anything change

With lag 1 the exchange of a step is under way while the next step is computed, and its gradient waits for that step's update:

    run(s)     compute step s with weights w_s
               finish the exchange of s − 1: statistics, StepInfo; s − 1 is now committed
               w_{s+1} ← w_s − update(g_{s−1}) at the rate of step s; w_s is kept as `previous`
               start the exchange of step s

A step whose exchange is interrupted (a member died) leaves no trace but weights that were due anyway, and is computed again,
perhaps by others: with lag 0 as if it had never begun, with lag 1 at `previous`, without another update. All randomness is
keyed by (seed, position).

A position whose tile is damaged is consumed and teaches nothing: networks see the usable tiles alone, and loss, gradient and
statistics are means over the usable tiles of the whole step, each micro-batch weighing as many as it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from raysegment.climate.channels import NAMES
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.learning.augment import AugmentConfig, augment
from raysegment.learning.buckets import BUCKET_BYTES, buckets
from raysegment.learning.exchange import MODES, WIRES, Exchange, Solo, Terms, World
from raysegment.learning.flat import Flat, Statistics
from raysegment.learning.losses import LossConfig, loss
from raysegment.learning.memory import keep_freed_memory
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig, Optimizer, learning_rate
from raysegment.networks import NetworkConfig, build
from raysegment.networks.blocks import choose

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
_LARGEST_SCALE, _GROWTH_STEPS = 2.0**16, 1000  # float16 loss scale: at most, and doubled after so many good steps


@dataclass(frozen=True)
class LearnConfig:
    """How a network learns. `global_batch` tiles per step, computed `micro_batch` at a time; all else has its own page.

    `lag` 1 applies the gradient of the step before, and hides the exchange behind the next step. `exchange`: "exact" (same
    bits in any world), "exact64", "fast", the last with gradients as float32 or "bf16" on the `wire`. `overlap`: with lag 0,
    buckets leave during backward; the same bits without. `compile`: network and loss go through torch.compile, on GPUs into
    CUDA graphs; on CPUs it needs a C++ compiler and minutes, and wherever it is used, once more for a micro-batch with a
    number of usable tiles that has not been met.
    `checkpointing`: less memory for up to a third more arithmetic, and the same bits.
    """

    global_batch: int = 8
    micro_batch: int = 2
    precision: str = "bf16"
    lag: int = 0
    exchange: str = "exact"
    wire: str = "fp32"
    overlap: bool = True
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        choose("learn.precision", self.precision, tuple(PRECISIONS))
        choose("learn.exchange", self.exchange, MODES)
        choose("learn.wire", self.wire, tuple(WIRES))
        if self.wire != "fp32" and self.exchange != "fast":
            raise ValueError(
                f"learn.wire: expected fp32 with learn.exchange={self.exchange}, whose integers travel whole, got {self.wire}; "
                "set learn.exchange=fast, or leave learn.wire out"
            )
        if self.lag not in (0, 1):
            raise ValueError(f"learn.lag: expected 0 or 1, got {self.lag}")
        if self.micro_batch < 1 or self.global_batch < 1 or self.global_batch % self.micro_batch:
            raise ValueError(
                f"learn: expected a global_batch that divides by micro_batch, got {self.global_batch} and {self.micro_batch}"
            )

    @property
    def micro_batches(self) -> int:
        return self.global_batch // self.micro_batch


@dataclass(frozen=True)
class StepInfo:
    """What happened in a step. Equal on all members but for the seconds; `loss` is the mean over the step's usable tiles.

    `samples` tiles were learnt from, `quarantined` positions had none; together they are the global batch. `skipped`:
    somebody's gradient was not finite, or no tile was usable, and all went on without this one. `grad_norm` is that of the
    mean gradient before clipping. `signals` is the sum of what members said with `run(…, signal=…)`, in 64 bits.
    `exchange_s` is what the step waited for its exchange or spent on rounding, not what passed beside computing.
    """

    step: int
    loss: float
    samples: int
    load_s: float
    compute_s: float
    exchange_s: float
    optimizer_s: float
    grad_norm: float
    lr: float
    skipped: bool
    signals: int = 0
    quarantined: int = 0


def initialise(config: NetworkConfig, seed: int) -> nn.Module:
    """The network as every member starts with it; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


def key(seed: int, position: int) -> int:
    """A seed for whatever a micro-batch draws, from the run's seed and the micro-batch's first position."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class LossScale:
    """Factor on float16 losses, a power of two: halved after a skipped step, doubled after many good ones.

    With lag 1 a step is computed before it is known how the one before it ended, so it takes the factor `before`.
    """

    value: float = 1.0
    good: int = 0
    before: float = 1.0  # the value one committed step ago

    def update(self, skipped: bool, taken: float) -> None:
        """After a step that took the factor `taken`; one overflow halves once, though the next step overflowed as well."""
        if skipped:
            self.value, self.good = max(1.0, min(self.value, taken / 2)), 0
        else:
            self.good += 1
            if self.good % _GROWTH_STEPS == 0:
                self.value = min(_LARGEST_SCALE, self.value * 2)


@dataclass
class Flight:
    """A computed step whose exchange is not finished."""

    step: int
    exchange: Exchange
    load_s: float
    compute_s: float = 0.0
    optimizer_s: float = 0.0


class Learner:
    """A network that learns: its parameters, optimizer and statistics, and the world it learns with.

    `weights` (K,) are the class weights. `world` may be exchanged for another between steps. `step` is the next step to
    compute; `committed` steps are part of the state. With lag 1 the newest step may be computed and not yet committed.
    """

    def __init__(
        self,
        network: nn.Module,
        config: LearnConfig,
        normaliser: Normaliser,
        weights: tuple[float, ...],
        world: World | None = None,
        device: torch.device | str = "cpu",
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.device, self.config, self.normaliser = torch.device(device), config, normaliser
        if self.device.type == "cpu":
            keep_freed_memory()
        self.network = network.to(self.device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
        self.world: World = world if world is not None else Solo()
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.device)
        self.flat, self.statistics = Flat(self.network), Statistics(self.network)
        self.optimizer = Optimizer(self.flat, config.optim)
        largest = _LARGEST_SCALE if config.precision == "fp16" else 1.0
        self.scale = LossScale(largest, 0, largest)
        self.lagged: Tensor | None = None  # mean gradient (P,) that waits for the next step
        self.previous: Tensor | None = None  # weights (P,) before the last update, with lag 1
        self.redoing = False  # the weights of step + 1 exist, and step is to be computed again at `previous`
        self.step = self.committed = 0
        self._flight: Flight | None = None
        self._news: StepInfo | None = None  # of a committed step, not yet told
        self._zero = normaliser.zero(self.device)
        self.network.checkpointing = config.checkpointing  # pyright: ignore[reportArgumentType]
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # into CUDA graphs
        self._objective = torch.compile(self.objective, mode=mode, dynamic=False) if config.compile else self.objective
        self._terms = Terms(config.exchange, config.micro_batches, config.micro_batch, config.wire)
        sizes = [p.numel() for p in self.flat.parameters]
        self._cut = buckets(sizes, self.flat.weights, len(self.statistics.values), bucket_bytes)
        self.before_micro_batch: Callable[[], None] = lambda: None  # may raise Interrupted: no need to compute more then
        self._followed: Exchange | None = None  # the one that is told which gradients are there
        for index, parameter in enumerate(self.flat.parameters if config.overlap and not config.lag else ()):
            parameter.register_post_accumulate_grad_hook(partial(self._ready, index))

    # ------------------------------------------------------------ steps

    def steps(self, inputs: Iterable[StepInput]) -> Iterator[StepInfo]:
        """One `StepInfo` per input, as steps become certain; settled at the end."""
        for item in inputs:
            if (info := self.run(item)) is not None:
                yield info
        if (info := self.settle()) is not None:
            yield info

    def run(self, item: StepInput, signal: int = 0) -> StepInfo | None:
        """Compute this member's share of a step, exchange, commit; what happened in the step that this made certain.

        That is the step itself with lag 0. With lag 1 it is the one before, or None where that was settled already.
        After `Interrupted`, call `interrupt`, and go on with step `committed`.
        """
        assert item.step == self.step, (item.step, self.step)
        flight = self._computed(item, signal)
        if self.config.lag:
            self._run_behind(flight)
        else:
            self._run_at_once(flight)
        return self._tell()

    def settle(self) -> StepInfo | None:
        """Finish what is under way, and say what happened in that step; needed before the state is taken."""
        if self._flight is not None:
            self.lagged = self._certain(self._flight, torch.empty_like(self.flat.values))
            self._flight = None
        return self._tell()

    @property
    def settled(self) -> bool:
        """Whether all that was computed is committed, so that the learner's tensors are its state."""
        return self._flight is None and not self.redoing

    @property
    def under_way(self) -> bool:
        """Whether an exchange is."""
        return self._flight is not None

    def interrupt(self) -> None:
        """Forget the exchange under way: the next step to run is `committed`, in whatever world, and gives the same bits."""
        self.redoing = self.redoing or (self._flight is not None and self._flight.step == self.committed)
        self._flight, self.step = None, self.committed

    def warm_up(self, height: int, width: int) -> None:
        """One forward and backward on zeros, so that whatever is set up lazily is there; nothing that counts changes."""
        size = self.config.micro_batch
        fields = torch.zeros(size, len(NAMES), height, width, dtype=torch.float16)  # tiles hold all channels
        micro = MicroBatch(torch.arange(size), fields, torch.zeros(size, height, width, dtype=torch.uint8))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.statistics:
            self._objective(*self.prepare(micro)).backward()
        self.flat.grads.zero_()

    def _run_at_once(self, flight: Flight) -> None:
        gradient = self._certain(flight, self.flat.grads)
        started = time.perf_counter()
        if gradient is not None:
            self.optimizer.apply(gradient, flight.step)
        self.step = self.committed
        self._add_optimizer_s(time.perf_counter() - started)

    def _run_behind(self, flight: Flight) -> None:
        if self.redoing:
            self.redoing = False
        else:
            if self._flight is not None:
                self.lagged = self._certain(self._flight, torch.empty_like(self.flat.values))
            flight.optimizer_s = self._move_on(flight.step)
        self._flight, self.step = flight, flight.step + 1  # before anything can be interrupted
        flight.exchange.start()

    def _move_on(self, step: int) -> float:
        """Weights of step + 1, from the gradient that waited; returns the seconds."""
        started = time.perf_counter()
        if self.previous is None:
            self.previous = torch.empty_like(self.flat.values)
        self.previous.copy_(self.flat.values)
        due, self.lagged = self.lagged, None
        if due is not None:
            self.optimizer.apply(due, step)
        return time.perf_counter() - started

    def _tell(self) -> StepInfo | None:
        news, self._news = self._news, None
        return news

    def _add_optimizer_s(self, seconds: float) -> None:
        assert self._news is not None
        self._news = replace(self._news, optimizer_s=self._news.optimizer_s + seconds)

    # ------------------------------------------------------------ computing

    def _computed(self, item: StepInput, signal: int) -> Flight:
        """The step with this member's share computed, and its exchange begun as far as that may be."""
        exchange, started = Exchange(self.world, self._terms, self._cut, self.device, signal), time.perf_counter()
        under_way = self._flight.exchange.seconds if self._flight else 0.0
        last = max((index for index, micro in enumerate(item.micro_batches) if micro.used), default=-1)
        try:
            with self.statistics, self._weights_of_step():
                for index, micro in enumerate(item.micro_batches):
                    self.before_micro_batch()
                    self._compute(micro, item.step, exchange, follow=index == last and not self.config.lag)
        finally:
            self._followed = None
        spent = exchange.seconds + (self._flight.exchange.seconds - under_way if self._flight else 0.0)
        return Flight(item.step, exchange, item.load_s, time.perf_counter() - started - spent)

    def _compute(self, micro: MicroBatch, step: int, exchange: Exchange, follow: bool) -> None:
        """Gradient, statistics and loss of one micro-batch's usable tiles, handed to the exchange, if so wished as they come."""
        positions, used, scale = micro.positions.tolist(), micro.used, self._loss_scale(step)
        cursor = step * self.config.global_batch
        offsets = [position - cursor for position in positions]
        if not used:  # normalisation has no statistics of nothing
            exchange.pass_over(offsets)
            return
        self.flat.grads.zero_()
        self.statistics.values.zero_()
        fields, mask = self.prepare(micro)
        torch.manual_seed(key(self.config.seed, positions[0]))  # dropout; of the first position, usable or not
        value = self._objective(fields, mask)
        if self._flight is not None:  # by now the others have their scales too, most likely
            self._flight.exchange.advance()
        vectors = [self.flat.grads, self.statistics.values]
        if follow:
            exchange.follow(vectors, offsets, value, used, 1 / scale)
            self._followed = exchange
        (value * scale).backward()
        if not follow:
            exchange.add(vectors, offsets, value, used, 1 / scale)

    def _ready(self, index: int, parameter: Tensor) -> None:
        """Called by backward when a parameter has its gradient."""
        if self._followed is not None:
            self._followed.ready(index)

    def _loss_scale(self, step: int) -> float:
        """The factor on the losses of a step: known one step earlier with lag 1, whether the step before is committed or not."""
        return self.scale.before if self.config.lag and self.committed == step else self.scale.value

    @contextmanager
    def _weights_of_step(self) -> Iterator[None]:
        """The weights with which the step at hand is computed: `previous` where it is computed again."""
        if not self.redoing:
            yield
            return
        assert self.previous is not None
        newer = self.flat.values.clone()
        self.flat.values.copy_(self.previous)
        try:
            yield
        finally:
            self.flat.values.copy_(newer)

    def objective(self, fields: Tensor, mask: Tensor) -> Tensor:
        """The loss of normalised fields (m, C, H, W), a float32 scalar."""
        with self.autocast():
            logits = self.network(fields)  # (m, K, H, W)
        return loss(logits, mask, self.weights, self.config.loss)

    def prepare(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Normalised and varied fields (u, C, H, W) float32 and mask (u, H, W) of the u usable tiles, on the device."""
        micro = micro.only_usable()
        fields = self.normaliser.tiles(micro.fields.to(self.device, non_blocking=True))
        mask = micro.mask.to(self.device, non_blocking=True)
        config = self.config
        return augment(fields, mask, micro.positions, config.seed, config.augment, self._zero, self.normaliser.names)

    def autocast(self):
        """The context in which the network computes."""
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, dtype) if dtype is not None else nullcontext()

    # ------------------------------------------------------------ committing

    def _certain(self, flight: Flight, into: Tensor) -> Tensor | None:
        """Finish a step's exchange and commit it but for the weights; its mean gradient, which is `into`, None if skipped.

        Nothing changes unless the exchange is complete. Two words from the device: the exchange's numbers, and the norm.
        """
        head, statistics = flight.exchange.finish(into)
        head.check_order(self.config.global_batch)
        gradient, started = (into if head.summable else None), time.perf_counter()
        norm = float(torch.linalg.vector_norm(into)) if head.summable else float("nan")
        if head.summable:
            self.statistics.update(statistics)
        self._rescale(skipped=not head.summable, taken=self._loss_scale(flight.step), heard=head.used > 0)
        self.committed = flight.step + 1
        self._news = StepInfo(
            step=flight.step,
            loss=head.loss,
            samples=head.used,
            load_s=flight.load_s,
            compute_s=flight.compute_s,
            exchange_s=flight.exchange.seconds,
            optimizer_s=flight.optimizer_s + time.perf_counter() - started,
            grad_norm=norm,
            lr=learning_rate(flight.step, self.config.optim),
            skipped=not head.summable,
            signals=head.signals,
            quarantined=head.positions - head.used,
        )
        return gradient

    def _rescale(self, skipped: bool, taken: float, heard: bool) -> None:
        """The factor on float16 losses after a step; one without a usable tile says nothing about overflow."""
        value = self.scale.value
        if self.config.precision == "fp16" and heard:
            self.scale.update(skipped, taken)
        self.scale.before = value

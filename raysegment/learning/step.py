"""One optimisation step: micro-batches in, new weights and a `StepInfo` out, the same on every member.

    compute    each micro-batch: normalise, augment, forward, loss, backward
    exchange   what all computed becomes what all know
    commit     clip, LARC, optimizer, statistics, average; only now does anything change

A step that is interrupted before it commits (a member died during the exchange) leaves no trace and can be run again,
in another world. All randomness is keyed by (seed, position).

A position whose tile is damaged is consumed and teaches nothing: networks see the usable tiles alone, and loss, gradient and
statistics are means over the usable tiles of the whole step, each micro-batch weighing as many as it has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.learning.augment import AugmentConfig, augment
from raysegment.learning.exchange import MODES, Exchange, Head, Solo, World
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

    `lag` 1 applies the gradient of the step before. `exchange`: "exact" (same bits
    in any world), "exact64", "fast". `compile`: network and loss go through torch.compile, on GPUs into CUDA graphs; on
    CPUs it needs a C++ compiler and minutes, and wherever it is used, once more for a micro-batch with a number of usable
    tiles that has not been met.
    `checkpointing`: less memory for up to a third more arithmetic, and the same bits.
    """

    global_batch: int = 8
    micro_batch: int = 2
    precision: str = "bf16"
    lag: int = 0
    exchange: str = "exact"
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        choose("learn.precision", self.precision, tuple(PRECISIONS))
        choose("learn.exchange", self.exchange, MODES)
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
    mean gradient before clipping. `signals` is the sum of what members said with `run(…, signal=…)`.
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
    """Factor on float16 losses, a power of two: halved after a skipped step, doubled after many good ones."""

    value: float = 1.0
    good: int = 0

    def update(self, skipped: bool) -> None:
        if skipped:
            self.value, self.good = max(1.0, self.value / 2), 0
        else:
            self.good += 1
            if self.good % _GROWTH_STEPS == 0:
                self.value = min(_LARGEST_SCALE, self.value * 2)


class Learner:
    """A network that learns: its parameters, optimizer and statistics, and the world it learns with.

    `weights` (K,) are the class weights. `world` may be exchanged for another between steps. `step` is the next step.
    """

    def __init__(
        self,
        network: nn.Module,
        config: LearnConfig,
        normaliser: Normaliser,
        weights: tuple[float, ...],
        world: World | None = None,
        device: torch.device | str = "cpu",
    ):
        self.device, self.config, self.normaliser = torch.device(device), config, normaliser
        if self.device.type == "cpu":
            keep_freed_memory()
        self.network = network.to(self.device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
        self.world: World = world if world is not None else Solo()
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.device)
        self.flat, self.statistics = Flat(self.network), Statistics(self.network)
        self.optimizer = Optimizer(self.flat, config.optim)
        self.scale = LossScale(_LARGEST_SCALE if config.precision == "fp16" else 1.0)
        self.lagged: Tensor | None = None  # mean gradient (P,) that waits for the next step
        self.step = 0
        self._zero = normaliser.zero(self.device)
        self.network.checkpointing = config.checkpointing  # pyright: ignore[reportArgumentType]
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # into CUDA graphs
        self._objective = torch.compile(self.objective, mode=mode, dynamic=False) if config.compile else self.objective

    def steps(self, inputs: Iterable[StepInput]) -> Iterator[StepInfo]:
        """One `StepInfo` per input, as training goes on."""
        return (self.run(item) for item in inputs)

    def run(self, item: StepInput, signal: int = 0) -> StepInfo:
        """Compute this member's share of a step, exchange, commit."""
        assert item.step == self.step, (item.step, self.step)
        cursor, started = item.step * self.config.global_batch, time.perf_counter()
        like = [self.flat.grads, self.statistics.values]
        exchange = Exchange(self.world, self.config.exchange, self.config.micro_batches, like, signal)
        with self.statistics:
            for micro in item.micro_batches:
                self._compute(micro, cursor, exchange)
        computed = time.perf_counter()
        head = exchange.head()
        head.check_order(self.config.global_batch)
        gradient, statistics = self._mean(exchange, head)
        exchanged = time.perf_counter()
        grad_norm, lr = self._commit(gradient, statistics, head)
        return StepInfo(
            step=item.step,
            loss=head.loss,
            samples=head.used,
            load_s=item.load_s,
            compute_s=computed - started,
            exchange_s=exchanged - computed,
            optimizer_s=time.perf_counter() - exchanged,
            grad_norm=grad_norm,
            lr=lr,
            skipped=gradient is None,
            signals=head.signals,
            quarantined=head.positions - head.used,
        )

    def _compute(self, micro: MicroBatch, cursor: int, exchange: Exchange) -> None:
        """Gradient, statistics and loss of one micro-batch's usable tiles, handed to the exchange."""
        positions, used = micro.positions.tolist(), micro.used
        offsets = [position - cursor for position in positions]
        if not used:  # normalisation has no statistics of nothing
            exchange.pass_over(offsets)
            return
        self.flat.grads.zero_()
        self.statistics.values.zero_()
        fields, mask = self.prepare(micro)
        torch.manual_seed(key(self.config.seed, positions[0]))  # dropout; of the first position, usable or not
        value = self._objective(fields, mask)
        (value * self.scale.value).backward()
        if self.scale.value != 1.0:
            self.flat.grads /= self.scale.value
        exchange.add([self.flat.grads, self.statistics.values], offsets, value.item(), used)

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

    def _mean(self, exchange: Exchange, head: Head) -> tuple[Tensor | None, Tensor | None]:
        """Mean gradient and statistics over the usable tiles of the world; (None, None) without any, or if not finite."""
        if not head.summable:
            return None, None
        whole = head.used / self.config.micro_batch  # Σ u/m over the micro-batches: their number, where no tile is damaged
        gradient, statistics = (total.div_(whole) for total in exchange.body(head))
        if self.config.exchange == "fast" and not bool(torch.isfinite(gradient.sum())):  # a sum can overflow
            return None, None
        return gradient, statistics

    def _commit(self, gradient: Tensor | None, statistics: Tensor | None, head: Head) -> tuple[float, float]:
        """Change the weights; returns the norm of this step's gradient and the learning rate."""
        norm = float(torch.linalg.vector_norm(gradient)) if gradient is not None else float("nan")
        due = gradient
        if self.config.lag:
            due, self.lagged = self.lagged, gradient
        if due is not None:
            self.optimizer.apply(due, self.step)
        if statistics is not None:
            self.statistics.update(statistics)
        if self.config.precision == "fp16" and head.used:  # a step without a tile says nothing about overflow
            self.scale.update(skipped=gradient is None)
        rate = learning_rate(self.step, self.config.optim)
        self.step += 1
        return norm, rate

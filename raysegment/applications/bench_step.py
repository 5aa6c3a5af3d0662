"""The training step's speed beside the machine's own limits and beside plain torch, measured in turn in one process.

A step is a whole one: normalisation, forward, loss, backward, exchange, optimizer, as `train` runs it (`Learner`).
FLOP/s are the network's arithmetic (3 × the forward convolutions, multiply and add counted separately) over the step's
time: median over steps with the 16th and 84th percentile, peak = the best step (Kurth et al. 2018, §VI).
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from raysegment.climate.channels import BY_NAME, NAMES
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.learning.flops import training_flops
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import PRECISIONS, LearnConfig, Learner, initialise
from raysegment.networks import NetworkConfig
from raysegment.networks.blocks import check_size, choose
from raysegment.networks.kernels import Geometry, convolve, multiplies, wide

AGAINST = ("eager", "none")
WEIGHTS = (0.02, 0.81, 0.17)  # about those of the 2018 run; speed does not depend on them
MATMUL, CONVOLUTION = 4096, (256, 192, 288)  # sizes at which the machine's own peaks are measured: rows; channels and map
_FULL = 768 * 1152
_ENOUGH_S = 2.0  # so long one peak is tried for at most, but at least twice
_SLOW_S = 10.0  # a first step this long needs no warming up: what it sets up is a small part of it


@dataclass(frozen=True)
class StepConfig:
    """What is measured: `size` of the map, tiles per step (`batch` 0: as many small maps as half a full one holds), and
    how long: at most `repeats` steps of each kind and about `seconds` for all, but always one."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    height: int = 192
    width: int = 288
    precision: str = "both"
    batch: int = 0
    repeats: int = 7
    seconds: float = 240.0
    against: str = "eager"
    threads: int = 0
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        choose("precision", self.precision, ("both", *PRECISIONS))
        choose("against", self.against, AGAINST)
        if min(self.height, self.width, self.repeats) < 1 or self.batch < 0 or self.seconds <= 0:
            raise ValueError(f"expected sizes and repeats of at least 1 and seconds above 0, got {self}")
        check_size(self.height, self.width, self.network.multiple)

    @property
    def tiles(self) -> int:
        """Tiles per step."""
        return self.batch or max(1, min(16, _FULL // 2 // (self.height * self.width)))

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("bf16", "fp32") if self.precision == "both" else (self.precision,)


# ---------------------------------------------------------------- limits


@dataclass(frozen=True)
class Peaks:
    """Best FLOP/s of a 4096³ matrix product and of a 3×3 convolution (256 channels, 192×288), per precision."""

    matmul: dict[str, float]
    convolution: dict[str, float]

    def best(self, precision: str) -> float:
        return max(self.matmul[precision], self.convolution[precision])


def peaks(names: tuple[str, ...] = ("bf16", "fp32"), repeats: int = 3) -> Peaks:
    """What this machine reaches, in this process; a CPU that does not multiply a type itself is measured widening it."""
    return Peaks({n: _matmul(n, repeats) for n in names}, {n: _convolution(n, repeats) for n in names})


def _dtype(precision: str) -> torch.dtype:
    return PRECISIONS[precision] or torch.float32


def _best_rate(flops: float, work: Callable[[], object], repeats: int) -> float:
    times: list[float] = []
    while len(times) < 2 or (len(times) <= repeats and sum(times) < _ENOUGH_S):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return flops / min(times)


def _matmul(precision: str, repeats: int) -> float:
    dtype, size = _dtype(precision), MATMUL
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    compute = wide(dtype)
    return _best_rate(2 * size**3, lambda: (a.to(compute) @ b.to(compute)).to(dtype), repeats)


def _convolution(precision: str, repeats: int) -> float:
    dtype, (channels, height, width) = _dtype(precision), CONVOLUTION
    compute = wide(dtype)
    fields, weight = torch.randn(1, channels, height, width), torch.randn(channels, channels, 3, 3)
    fields, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (fields, weight))
    flops = 2 * 9 * channels**2 * (height - 2) * (width - 2)
    work = lambda: convolve(fields.to(compute), weight.to(compute), None, Geometry(3), 0).to(dtype)
    return _best_rate(flops, work, repeats)


# ---------------------------------------------------------------- steps


Step = Callable[[], float]


def ours(config: StepConfig, precision: str) -> Step:
    """A function that runs one whole training step as `train` does and gives its seconds."""
    learn = LearnConfig(
        global_batch=config.tiles, micro_batch=config.tiles, precision=precision, exchange="fast",
        compile=config.compile, checkpointing=config.checkpointing,
        optim=OptimConfig(optimizer="sgd", larc=True, schedule="constant", lr=1e-3),
    )  # fmt: skip
    names = NAMES[: config.network.channels]
    normaliser = Normaliser.of([c.reference for c in BY_NAME.values()], [c.scale for c in BY_NAME.values()], names)
    learner = Learner(initialise(config.network, 0), learn, normaliser, WEIGHTS[: config.network.classes])
    fields, mask = tiles(config)

    def step() -> float:
        first = learner.step * config.tiles
        item = StepInput(learner.step, [MicroBatch(torch.arange(first, first + config.tiles), fields, mask)])
        started = time.perf_counter()
        learner.run(item)
        return time.perf_counter() - started

    return step


def eager(config: StepConfig, precision: str) -> Step:
    """The same network and arithmetic as plain torch has it: NCHW memory, autocast, torch's own SGD."""
    network = initialise(config.network, 0).train()
    network.engine = "plain"  # pyright: ignore[reportArgumentType]
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    fields, mask = tiles(config)
    inputs, truth = fields.float()[:, : config.network.channels].contiguous(), mask.long()
    weights = torch.tensor(WEIGHTS[: config.network.classes])

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(inputs)
        F.cross_entropy(logits.float(), truth, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def tiles(config: StepConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Staged tiles of noise: fields (B, 16, H, W) float16 and mask (B, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.tiles, len(NAMES), config.height, config.width)
    fields = torch.randn(shape, generator=generator).half()
    return fields, torch.randint(0, config.network.classes, (shape[0], *shape[2:]), generator=generator, dtype=torch.uint8)


def alternate(
    steps: dict[str, Step], repeats: int, seconds: float, progress: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """Seconds of each kind of step, taken in turn (A B A B), after one step each to warm up unless that one was long."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    for name, step in steps.items():
        first = step()
        if first > _SLOW_S:
            times[name].append(first)
    for done in range(repeats):
        progress(done, repeats)
        for name, step in steps.items():
            if not times[name] or time.perf_counter() - started < seconds:
                times[name].append(step())
    return times


# ---------------------------------------------------------------- the bench


def bench_step(config: StepConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Everything that `raysegment bench step` reports; rates in TFLOP/s and samples/s."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    network = initialise(config.network, 0)
    tflop = training_flops(network, (config.height, config.width), config.network.channels) / 1e12
    limits = peaks()
    steps = {precision: ours(config, precision) for precision in config.precisions}
    if config.against == "eager":
        steps["eager"] = eager(config, eager_precision(config))
    if config.checkpointing:
        steps["kept"] = ours(replace(config, checkpointing=False), config.precisions[0])
    times = alternate(steps, config.repeats, config.seconds, progress)
    again = peaks(repeats=1)
    best = {name: max(limits.best(name), again.best(name)) for name in ("bf16", "fp32")}
    result: dict[str, Any] = {
        "network": config.network.name, "height": config.height, "width": config.width, "batch": config.tiles,
        "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability(),
        "bf16_in_hardware": multiplies(torch.bfloat16), "tflop_per_sample": tflop,
        "parameters": sum(p.numel() for p in network.parameters()),
        "peak_bf16_tflops": best["bf16"] / 1e12, "peak_fp32_tflops": best["fp32"] / 1e12,
        "limits": asdict(limits), "bf16": None, "fp32": None, "bf16_over_fp32": None, "over_eager": None,
    }  # fmt: skip
    precision_of = {"eager": eager_precision(config), "kept": config.precisions[0]}
    for name in times:
        kind = precision_of.get(name, name)
        peak = best["fp32" if kind == "fp32" else "bf16"] / 1e12
        result[name] = {"precision": kind, **summary(times[name], tflop, config.tiles, peak)}
    if "bf16" in times and "fp32" in times:
        result["bf16_over_fp32"] = _ratio(times["fp32"], times["bf16"])
    for other in ("eager", "kept"):
        if other in times:
            result[f"over_{other}"] = _ratio(times[other], times[config.precisions[0]])
    result["resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def eager_precision(config: StepConfig) -> str:
    """Plain torch is compared in the precision in which it is fast: half where the machine multiplies it."""
    first = config.precisions[0]
    return first if multiplies(_dtype(first)) else "fp32"


def summary(times: list[float], tflop: float, samples: int, peak: float) -> dict[str, Any]:
    """Rates of some steps; percentiles are those of the rates, `peak_tflops` the best step's."""
    rates = sorted(samples / t for t in times)
    low, middle, high = (float(np.percentile(rates, q)) for q in (16, 50, 84))
    return {
        "samples_per_s": middle, "samples_per_s_16": low, "samples_per_s_84": high, "tflops": middle * tflop,
        "sustained_tflops": middle * tflop, "peak_tflops": rates[-1] * tflop, "share_of_peak": middle * tflop / peak,
        "step_s": statistics.median(times), "steps": len(times),
    }  # fmt: skip


def _ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(slow) / statistics.median(fast)


# ---------------------------------------------------------------- where the time goes


@dataclass
class Spent:
    """What one kind of operation cost."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


class Ledger(TorchDispatchMode):
    """Time, arithmetic and traffic (tensors read and written) of every operation that torch runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, Spent] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        taken = time.perf_counter() - started
        entry = self.spent.setdefault(_name(func, args), Spent())
        entry.calls += 1
        entry.seconds += taken
        counter = flop_registry.get(func.overloadpacket)
        entry.flops += counter(*args, **(kwargs or {}), out_val=out) if counter else 0
        if not func.is_view:
            entry.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, out)))
        return out


def _name(func: Any, args: tuple) -> str:
    """Operation, and for the gradients of a convolution which of them."""
    name = func.overloadpacket.__name__
    if name == "convolution_backward":
        wanted = [what for what, asked in zip(("fields", "weights", "bias"), args[-1], strict=True) if asked]
        return f"{name} ({', '.join(wanted)})"
    return name


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def profile(config: StepConfig, precision: str) -> list[dict[str, Any]]:
    """Rows of one warm step, dearest operation first: calls, ms, share, GFLOP/s as a share of the peak, GB/s."""
    step, limit = ours(replace(config, against="none"), precision), peaks((precision,)).best(precision)
    step()
    whole = step()
    with Ledger() as ledger:
        step()
    spent = sorted(ledger.spent.items(), key=lambda item: -item[1].seconds)
    counted = sum(entry.seconds for _, entry in spent)
    spent.append(("outside torch's operations", Spent(seconds=max(0.0, whole - counted))))
    return [
        {"operation": name, "calls": e.calls, "ms": 1e3 * e.seconds, "share": e.seconds / whole, "gflop": e.flops / 1e9,
         "share_of_peak": e.flops / e.seconds / limit if e.seconds else 0.0, "gb": e.bytes / 1e9,
         "gb_s": e.bytes / e.seconds / 1e9 if e.seconds else 0.0}
        for name, e in spent
    ]  # fmt: skip

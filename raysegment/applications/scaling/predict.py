"""Throughput on GPUs nobody has measured, with what is not known about it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from raysegment.applications.scaling.control import ControlPlane
from raysegment.applications.scaling.fit import NOISE, Model
from raysegment.applications.scaling.machines import PRECISIONS
from raysegment.applications.scaling.points import Point
from raysegment.applications.scaling.step import CAUSES, Where, times
from raysegment.applications.scaling.workloads import workload
from raysegment.climate.checks import BadInput

# What the model leaves out, relative (one standard deviation): checked by leaving points out, docs/notes/2026-11-scaling.md
MISFIT = 0.03  # at measured points: 2 to 3.5 % where a system has several
PER_DOUBLING = 0.03  # of the GPUs beyond a system's largest point: 0.6, 1.8, 2.0 and 5.2 %
PER_BATCH_DOUBLING = 0.03  # of the local batch away from the nearest measured one
OTHER_NETWORK, OTHER_PRECISION = 0.20, 0.25


@dataclass(frozen=True)
class Query:
    """What is asked; None: as the system's points have it. `plane`: the control plane as it was measured, for today's."""

    system: str
    gpus: int
    local_batch: int | None = None
    network: str | None = None
    precision: str | None = None
    lag: int = 0
    algorithm: str = "best"
    control: str | None = None
    plane: ControlPlane | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise BadInput("--gpus", "at least one GPU", self.gpus, "Give how many GPUs train.")
        if self.local_batch is not None and self.local_batch < 1:
            raise BadInput("--local-batch", "at least one sample", self.local_batch, "Give how many samples a GPU has in a step.")
        if self.lag not in (0, 1):
            raise BadInput("--lag", "0 or 1", self.lag, "Gradients are applied at once, or one step late.")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise BadInput("--precision", f"one of {', '.join(PRECISIONS)}", self.precision, "Choose one of these.")


@dataclass(frozen=True)
class Prediction:
    """Samples per second with their 90 % interval; `efficiency` over so many single GPUs; `shares` of a step's time."""

    system: str
    gpus: int
    local_batch: int
    network: str
    precision: str
    lag: int
    samples_per_s: float
    low: float
    high: float
    efficiency: float
    efficiency_low: float
    efficiency_high: float
    step_s: float
    shares: dict[str, float]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "warnings": list(self.warnings)}


def complete(model: Model, query: Query) -> Query:
    """The query with what it leaves open taken from the system's largest point."""
    model.machine_of(query.system)
    if not (mine := model.of(query.system)):
        return _said(query)
    last = max(mine, key=lambda point: point.gpus)
    return replace(
        query, local_batch=query.local_batch or last.local_batch, network=query.network or last.network,
        precision=query.precision or last.precision,
    )  # fmt: skip


def _said(query: Query) -> Query:
    """The query for a system without points, which must say everything."""
    for option, value in (("--local-batch", query.local_batch), ("--network", query.network), ("--precision", query.precision)):
        if value is None:
            raise BadInput(option, f"a value, since {query.system} has no points", "nothing", f"Give {option}.")
    return query


def where(model: Model, query: Query) -> Where:
    """The configuration that a query means; BadInput for an unknown network."""
    query = complete(model, query)
    machine, of = model.machine_of(query.system), workload(query.network or "")
    return Where(
        machine, of, query.gpus, query.local_batch or 1, query.precision or "", query.lag, query.algorithm, query.control,
        query.plane,
    )


def predict(model: Model, query: Query, without: Collection[str] = ()) -> Prediction:
    """The prediction for a query; the interval covers parameters, measurement noise and what the model leaves out."""
    query = complete(model, query)
    here = where(model, query)
    drawn, count = model.draws, len(model.draws)
    rates = model.rates(drawn, query.system, here.precision)
    found = {cause: np.broadcast_to(value, count) for cause, value in times(here, rates, without).items()}
    step = sum(found.values(), np.zeros(count))
    alone = sum(times(replace(here, gpus=1), rates, without).values(), np.zeros(count))
    noise = _missed(beyond(model, query), count) if not without else 0.0  # an ablation answers what its terms say
    rate = here.gpus * here.local_batch / step
    low, high = np.quantile(rate * np.exp(noise), (0.05, 0.95))
    bottom, efficiency, top = np.quantile(alone / step, (0.05, 0.5, 0.95))
    central = float(np.median(rate))
    return Prediction(
        query.system, here.gpus, here.local_batch, query.network or "", here.precision, here.lag, central,
        float(low), float(high),
        float(efficiency), float(bottom), float(top), here.gpus * here.local_batch / central,
        {cause: float(np.mean(found[cause] / step)) for cause in CAUSES}, tuple(warnings(model, query)),
    )  # fmt: skip


def _missed(further: float, count: int) -> np.ndarray:
    """Draws of what a measured throughput's logarithm differs by from the model's: noise and misfit where there are points,
    and `further` beyond them, which four left-out points told: Student's t of four degrees."""
    random = np.random.default_rng(1)
    there = random.standard_t(6, count) / np.sqrt(1.5) * np.linalg.norm([NOISE, MISFIT])
    return there + random.standard_t(4, count) * further


def beyond(model: Model, query: Query) -> float:
    """Relative uncertainty for what lies outside the system's points: more GPUs, other batches, networks, precisions."""
    query = complete(model, query)
    mine, local_batch = model.of(query.system), query.local_batch or 1
    if not mine:
        return 0.0  # priors say what is not known
    further = max(0.0, np.log2(query.gpus / max(point.gpus for point in mine)))
    batches = min(abs(np.log2(local_batch / point.local_batch)) for point in mine)
    network = OTHER_NETWORK * (query.network not in {point.network for point in mine})
    precision = OTHER_PRECISION * (query.precision not in {point.precision for point in mine})
    return float(np.linalg.norm([PER_DOUBLING * further, PER_BATCH_DOUBLING * batches, network, precision]))


def warnings(model: Model, query: Query) -> list[str]:
    """What a reader must know of a prediction beyond its interval."""
    mine, machine = model.of(query.system), model.machine_of(query.system)
    found = _outside(mine, query) if mine else [f"extrapolation: {query.system} has no points; it is what other systems are"]
    if query.gpus > machine.gpus:
        found.append(f"{machine.name} has {machine.gpus} GPUs")
    if query.plane is not None:
        found += query.plane.warnings(query.gpus)
    if machine.generic:
        found.append(f"machine {machine.name} has no file: its links and disks are typical ones")
    if kept := model.at_prior(query.system):
        found.append(f"too few points of {query.system} to tell: {', '.join(kept)}; they stay at their priors")
    return found


def _outside(mine: Sequence[Point], query: Query) -> list[str]:
    """In what a query goes beyond a system's points."""
    largest, found = max(point.gpus for point in mine), []
    if query.gpus > largest:
        more = f"{query.gpus / largest:.3g} times the most that {query.system} was measured on ({largest})"
        found.append(f"extrapolation: {query.gpus} GPUs are {more}; the interval is wider for it")
    for word, asked, known in (
        ("local batch", query.local_batch, {point.local_batch for point in mine}),
        ("network", query.network, {point.network for point in mine}),
        ("precision", query.precision, {point.precision for point in mine}),
    ):
        if asked not in known:
            found.append(f"{word} {asked} of {query.system} was never measured (only {', '.join(map(str, sorted(known)))})")
    return found

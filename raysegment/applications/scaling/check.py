"""How far the model can be trusted: measured points it did not see, and the largest runs of 2018 from what was known below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raysegment.applications.scaling import points
from raysegment.applications.scaling.fit import Model, fit
from raysegment.applications.scaling.points import Point
from raysegment.applications.scaling.predict import Prediction, Query, predict

PAPER = Path(__file__).parents[2] / "configs" / "scaling" / "paper_points.csv"
MOST = 1024  # GPUs of a point that the 2018 runs are predicted from
# The published runs: what to ask, efficiency, what is allowed (Kurth et al. 2018, abstract)
RUNS = (
    (Query("summit_deeplab", 27360, 2, "deeplab", "fp16", lag=1), 0.907, 0.03),
    (Query("daint_tiramisu", 5300, 1, "tiramisu_4ch", "fp32", lag=0), 0.790, 0.05),
)
ABLATIONS: tuple[tuple[str, frozenset[str], str, str | None], ...] = (
    ("everything", frozenset(), "best", None),
    ("no exchange", frozenset({"exchange"}), "best", None),
    ("no straggling", frozenset({"straggling"}), "best", None),
    ("no input", frozenset({"input"}), "best", None),
    ("no control plane", frozenset({"control"}), "best", None),
    ("nothing overlaps", frozenset({"overlap"}), "best", None),
    ("hierarchical ring, nothing overlaps", frozenset({"overlap"}), "ring", None),
    ("flat ring, nothing overlaps", frozenset({"overlap"}), "flat_ring", None),
    ("flat control plane", frozenset(), "best", "flat"),
)


@dataclass(frozen=True)
class Left:
    """A point that was left out, and what the others said about it; `error` is signed and relative."""

    point: Point
    low: float
    predicted: float
    high: float

    @property
    def error(self) -> float:
        return self.predicted / self.point.samples_per_s - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.point.samples_per_s <= self.high


def leave_largest(found: Sequence[Point]) -> Iterable[Left]:
    """Each system's largest point, predicted from all others, where the system has another one."""
    for system in dict.fromkeys(point.system for point in found):
        mine = [point for point in found if point.system == system]
        most = max(point.gpus for point in mine)
        if min(point.gpus for point in mine) < most:
            yield from _left(found, lambda p, system=system, most=most: p.system == system and p.gpus == most)


def leave_above(found: Sequence[Point], gpus: int) -> list[Left]:
    """All points above so many GPUs, predicted from the rest; those of systems with none below are not asked."""
    return _left(found, lambda point: point.gpus > gpus)


def _left(found: Sequence[Point], out: Callable[[Point], bool]) -> list[Left]:
    rest = [point for point in found if not out(point)]
    known = {point.system for point in rest}
    if not rest:
        return []
    model = fit(rest)
    return [_compare(model, point) for point in found if out(point) and point.system in known]


def _compare(model: Model, point: Point) -> Left:
    found = predict(model, Query(point.system, point.gpus, point.local_batch, point.network, point.precision))
    return Left(point, found.low, found.samples_per_s, found.high)


def summary(left: Sequence[Left]) -> dict[str, float]:
    """Median and worst |error|, and the share of points inside their 90 % interval."""
    errors = [abs(one.error) for one in left]
    if not errors:
        return {"rows": 0, "median": math.nan, "worst": math.nan, "inside": math.nan}
    inside = sum(one.inside for one in left) / len(left)
    return {"rows": len(left), "median": float(np.median(errors)), "worst": max(errors), "inside": inside}


# ---------------------------------------------------------------- the runs of 2018


def paper_model(more: Sequence[Point] = ()) -> Model:
    """A model of what was known on at most 1,024 GPUs, with such points of `more`."""
    known = [*points.read(PAPER), *(point for point in more if point.gpus <= MOST)]
    return fit(list(dict.fromkeys(known)))


def paper_runs(model: Model) -> list[tuple[Prediction, float, float]]:
    """Each published run as (prediction, published efficiency, what is allowed)."""
    return [(predict(model, query), published, allowed) for query, published, allowed in RUNS]


def ablation(model: Model, query: Query) -> Iterable[tuple[str, Prediction]]:
    """The run with one cause left out, or done differently, at a time; lag 0 as well."""
    for name, without, algorithm, control in ABLATIONS:
        changed = Query(
            query.system, query.gpus, query.local_batch, query.network, query.precision, query.lag, algorithm, control
        )
        yield name, predict(model, changed, without)
    other = 1 - query.lag
    changed = Query(query.system, query.gpus, query.local_batch, query.network, query.precision, other)
    yield f"lag {other}", predict(model, changed)

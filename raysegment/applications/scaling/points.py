"""Measured points: throughput of a system on so many GPUs, read from a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from raysegment.applications.scaling.machines import PRECISIONS
from raysegment.applications.scaling.workloads import workload
from raysegment.climate.checks import BadInput

COLUMNS = ("system", "machine", "gpus", "local_batch", "samples_per_s", "network", "precision")
CONTRADICTION = 1.25  # points of the same configuration differ by at most this factor
_SUPERLINEAR = 3.0  # a GPU among more GPUs is at most so much faster (caches do help)


@dataclass(frozen=True)
class Point:
    """`system` (hardware with its software) on `gpus` GPUs trained `samples_per_s` samples of `network` a second."""

    system: str
    machine: str
    gpus: int
    local_batch: int
    samples_per_s: float
    network: str
    precision: str

    def __post_init__(self) -> None:
        if not (self.gpus >= 1 and self.local_batch >= 1 and 0 < self.samples_per_s < math.inf):
            raise ValueError(f"expected gpus and local_batch of at least 1 and samples_per_s above 0, got {self}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"expected a precision of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not (self.system and self.machine):
            raise ValueError(f"expected names of a system and a machine, got {self}")

    @property
    def step_s(self) -> float:
        return self.gpus * self.local_batch / self.samples_per_s

    @property
    def configuration(self) -> tuple[str, int, int, str, str]:
        return self.system, self.gpus, self.local_batch, self.network, self.precision


def read(path: str | Path) -> list[Point]:
    """The points of a CSV file; BadInput names the line or the column."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(line for line in file if line.strip() and not line.startswith("#"))
            return check(path, [_point(path, row, number) for number, row in _numbered(path, rows)])
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(path, "a readable CSV file of points", error, "Check the path.") from None


def _numbered(path: Path, rows: csv.DictReader[str]) -> Iterable[tuple[int, dict[str, str]]]:
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise BadInput(path, f"columns {', '.join(COLUMNS)}", f"none named {', '.join(missing)}", "Correct the first line.")
    return enumerate(rows, 1)


def _point(path: Path, row: dict[str, str], number: int) -> Point:
    where = f"{path}, point {number}"
    try:
        workload(row["network"].strip(), where)
        system, machine, network, precision = (row[name].strip() for name in ("system", "machine", "network", "precision"))
        machine = machine or system  # a file of that name, or else typical numbers
        rate = float(row["samples_per_s"])
        return Point(system, machine, int(row["gpus"]), int(row["local_batch"]), rate, network, precision)
    except BadInput:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(where, "whole numbers of GPUs and samples, a rate, names", error, "Correct the line.") from None


def check(path: object, points: Sequence[Point]) -> list[Point]:
    """The points, unless there are none, or they contradict themselves."""
    if not points:
        raise BadInput(path, "at least one point", "none", "Measure at least one, e.g. with `raysegment scale calibrate`.")
    for group in _groups(points, lambda p: (p.system,)):
        machines = sorted({p.machine for p in group})
        if len(machines) > 1:
            raise BadInput(
                path, f"one machine for system {group[0].system}", ", ".join(machines), "Give each its own system name."
            )
    for group in _groups(points, lambda p: p.configuration):
        low, high = min(p.samples_per_s for p in group), max(p.samples_per_s for p in group)
        if high > CONTRADICTION * low:
            _contradict(path, group[0], f"{low:g} and {high:g} samples/s on {group[0].gpus} GPUs")
    for group in _groups(points, lambda p: (p.system, p.local_batch, p.network, p.precision)):
        ordered = sorted(group, key=lambda p: p.gpus)
        for few, many in pairwise(ordered):
            if few.step_s > _SUPERLINEAR * many.step_s:
                got = f"{few.samples_per_s:g} samples/s on {few.gpus} GPUs and {many.samples_per_s:g} on {many.gpus}"
                _contradict(path, few, f"{got}: more than {_SUPERLINEAR:g} times as much for each GPU")
    return list(points)


def _contradict(path: object, point: Point, got: str) -> None:
    remedy = "Remove the wrong point, or give what differs (software, settings) a system name of its own."
    raise BadInput(path, f"points of {point.system} that agree with each other", got, remedy)


def _groups(points: Sequence[Point], key: Callable[[Point], tuple]) -> list[list[Point]]:
    found: dict[tuple, list[Point]] = {}
    for point in points:
        found.setdefault(key(point), []).append(point)
    return list(found.values())

"""Bootstrap intervals of IoU: whole blocks of maps are drawn again and again, never pixels, which are not independent.

A block is all maps of one calendar month (of one year) where the maps span at least `MIN_MONTHS` of those, otherwise all maps
of one day, and one map where its time is not known: weather of neighbouring hours is much the same weather. Held are one
confusion matrix per stratum and day, whatever the number of maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput

MIN_MONTHS = 12
LEVEL_PERCENT = 95.0
_COUNT = len(CLASSES)
_NO_DAY = "unknown: "
_AT_ONCE = 100  # resamples whose sums are held together
Stratum = tuple[str, str]  # kind and name, e.g. ("month", "07")
Interval = list[list[float] | None]  # [low, high] of the classes' IoU and of their mean, None where there is none


@dataclass(frozen=True)
class Bootstrap:
    """How many times blocks are drawn, and the seed of the draws; 0 resamples make no intervals."""

    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise BadInput("resamples", "at least 0", self.resamples, "Correct the option")


DEFAULT = Bootstrap()


class Blocks:
    """Confusion matrices (3, 3) by day and stratum, put in map by map."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[Stratum, NDArray[np.int64]]] = {}

    def add(self, time: Any, unit: str, counts: Mapping[Stratum, NDArray[np.int64]]) -> None:
        """The counts of one map of a time; where the time is None, `unit` is a name that only this map has."""
        day = f"{_NO_DAY}{unit}" if time is None else f"{time.year:04d}-{time.month:02d}-{time.day:02d}"
        held = self._counts.setdefault(day, {})
        for stratum, part in counts.items():
            held[stratum] = held[stratum] + part if stratum in held else part

    def sums(self) -> dict[Stratum, NDArray[np.int64]]:
        """All maps together, by stratum."""
        return _sum(self._counts.values())

    def intervals(self, bootstrap: Bootstrap) -> dict[Stratum, Interval]:
        """The 95 % percentile interval of each stratum's IoU, where at least two blocks have any of its cells."""
        blocks, strata = list(self._blocks().values()), sorted(self.sums())
        empty = np.zeros((_COUNT, _COUNT), np.int64)
        counts = np.array([[block.get(stratum, empty) for stratum in strata] for block in blocks], np.float64)
        several = (counts.sum((2, 3)) > 0).sum(0) >= 2
        if bootstrap.resamples == 0 or not several.any():
            return {stratum: [None] * (_COUNT + 1) for stratum in strata}
        scores = _resample(counts, bootstrap)  # (R, S, 4)
        return {
            stratum: _range(scores[:, place]) if several[place] else [None] * (_COUNT + 1) for place, stratum in enumerate(strata)
        }

    def about(self, bootstrap: Bootstrap) -> dict[str, Any]:
        """How the intervals were made."""
        unit = "month" if self._by_month() else "day"
        about = {"unit": unit, "blocks": len(self._blocks()), "resamples": bootstrap.resamples, "seed": bootstrap.seed}
        return {**about, "level_percent": LEVEL_PERCENT}

    def _by_month(self) -> bool:
        return len({day[:7] for day in self._counts}) >= MIN_MONTHS and not any(day.startswith(_NO_DAY) for day in self._counts)

    def _blocks(self) -> dict[str, dict[Stratum, NDArray[np.int64]]]:
        if not self._by_month():
            return self._counts
        months = sorted({day[:7] for day in self._counts})
        return {month: _sum([held for day, held in self._counts.items() if day[:7] == month]) for month in months}


def _sum(parts: Any) -> dict[Stratum, NDArray[np.int64]]:
    total: dict[Stratum, NDArray[np.int64]] = {}
    for part in parts:
        for stratum, counts in part.items():
            total[stratum] = total[stratum] + counts if stratum in total else counts
    return total


def _resample(counts: NDArray[np.float64], bootstrap: Bootstrap) -> NDArray[np.float64]:
    """IoU per class and mean (R, S, 4) of R draws, with replacement, of as many blocks as there are (B, S, 3, 3)."""
    random, found = np.random.default_rng(bootstrap.seed), []
    blocks = len(counts)
    for start in range(0, bootstrap.resamples, _AT_ONCE):
        draws = min(_AT_ONCE, bootstrap.resamples - start)
        weights = random.multinomial(blocks, np.full(blocks, 1.0 / blocks), draws)
        sums = np.einsum("rb,bsij->rsij", weights, counts, optimize=True)
        both = np.diagonal(sums, axis1=2, axis2=3)
        union = sums.sum(2) + sums.sum(3) - both
        iou = np.divide(both, union, out=np.full(both.shape, np.nan), where=union > 0)
        there = np.isfinite(iou)
        mean = np.divide(np.nansum(iou, -1), there.sum(-1), out=np.full(iou.shape[:2], np.nan), where=there.any(-1))
        found.append(np.concatenate([iou, mean[..., None]], -1))
    return np.concatenate(found)


def _range(scores: NDArray[np.float64]) -> Interval:
    """Percentiles of the draws (R, 4) that have the class."""
    tail = (100.0 - LEVEL_PERCENT) / 2.0
    columns = [column[np.isfinite(column)] for column in scores.T]
    return [[float(x) for x in np.percentile(column, [tail, 100.0 - tail])] if column.size else None for column in columns]

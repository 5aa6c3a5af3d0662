"""The maps of many mask files in the order of time, one in memory at a time, however the archive is cut into files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import cftime
import numpy as np
from numpy.typing import NDArray

from raysegment.archive.masks import MaskSource
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

EPOCH = "hours since 1900-01-01 00:00:00"
_OPEN_AT_ONCE = 4


@dataclass(frozen=True)
class Moment:
    """One map: which file and place, its time (None where unknown) and the same as `hour` since 1900 in its calendar."""

    file: Path
    index: int
    time: Any
    hour: float | None


def list_moments(files: Sequence[Path]) -> list[Moment]:
    """Every map of the files, by time, then file name; those of unknown time come last.

    BadInput where calendars differ, or two maps of one grid have the same time (members of an ensemble, say: what they show
    are not objects of one world).
    """
    moments, calendars, taken = list[Moment](), dict[str, Path](), dict[tuple, Path]()
    for file in files:
        with MaskSource(file) as source:
            place = _place(source.axes.grid)
            for index, time in enumerate(source.times):
                hour = None if time is None else hours(time)
                if time is not None:
                    calendars.setdefault(_calendar(time), file)
                    _take(taken, (hour, *place), file, time)
                moments.append(Moment(file, index, time, hour))
    if len(calendars) > 1:
        got = " and ".join(f"{calendar} in {file}" for calendar, file in sorted(calendars.items()))
        raise BadInput(files[0].parent, "one calendar", got, "Make a table of each model by itself")
    return sorted(moments, key=lambda one: (one.hour is None, one.hour or 0.0, one.file.name, str(one.file), one.index))


def _place(grid: Grid) -> tuple[float, ...]:
    """What tells grids apart: their corners, to a thousandth of a degree."""
    return tuple(round(float(edge), 3) for edge in (grid.lat[0], grid.lat[-1], grid.lon[0], grid.lon[-1]))


def _take(taken: dict[tuple, Path], key: tuple, file: Path, time: Any) -> None:
    if key in taken:
        got = f"{time.isoformat()} also in {taken[key]}"
        raise BadInput(file, "one map of each time", got, "Make a table of each model, member or labeller by itself")
    taken[key] = file


def hours(time: Any) -> float:
    """Hours since 1900 in the time's own calendar, to the second."""
    return round(float(cftime.date2num(time, EPOCH, time.calendar)) * 3600.0) / 3600.0


def _calendar(time: Any) -> str:
    return {"gregorian": "standard", "proleptic_gregorian": "standard"}.get(time.calendar, str(time.calendar))


class MaskSeries:
    """Opens mask files as their maps are asked for and keeps a few open; a context manager."""

    def __init__(self) -> None:
        self._open: dict[Path, MaskSource] = {}
        self._grids: list[Grid] = []

    def __enter__(self) -> MaskSeries:
        return self

    def __exit__(self, *_) -> None:
        while self._open:
            self._open.popitem()[1].__exit__()

    def read(self, moment: Moment) -> tuple[NDArray[np.uint8], Grid]:
        """Mask (H, W) and its grid; equal grids are one object, whatever file they come from."""
        if moment.file not in self._open:
            while len(self._open) >= _OPEN_AT_ONCE:
                self._open.pop(next(iter(self._open))).__exit__()
            self._open[moment.file] = MaskSource(moment.file)
            self._open[moment.file].read_once()
        source = self._open[moment.file]
        return source.read(moment.index), self._same(source.axes.grid)

    def _same(self, grid: Grid) -> Grid:
        known = next((one for one in self._grids if one.same_as(grid)), None)
        if known is None:
            self._grids.append(grid)
        return grid if known is None else known


def by_time(moments: Sequence[Moment]) -> Iterator[list[Moment]]:
    """The maps of each time together; those of unknown time one by one."""
    for (_, _), group in groupby(enumerate(moments), lambda pair: (pair[1].hour, pair[0] if pair[1].hour is None else -1)):
        yield [moment for _, moment in group]

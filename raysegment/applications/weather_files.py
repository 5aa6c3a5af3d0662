"""What the strengths of objects are read from: pressure, wind, vapour transport and rain of the masks' source files.

A file with all 16 channels is read and checked as `segment` reads it; of any other what it has is taken. A file's own vapour
transport (its magnitude, or both components) goes before the stand-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cftime
import numpy as np
from numpy.typing import NDArray

from raysegment.archive.aliases import TRANSPORT, TRANSPORT_PARTS, Recipe, find
from raysegment.archive.deepcam import DeepcamFile, open_maps
from raysegment.archive.masks import MASK_SUFFIX
from raysegment.archive.netcdf import NetcdfFile
from raysegment.archive.snapshots import Source, list_sources, open_source
from raysegment.climate.channels import BY_NAME
from raysegment.climate.checks import BadInput
from raysegment.climate.events import Weather
from raysegment.climate.grid import Grid
from raysegment.climate.rivers import IVT_SLOPE

_WANTED = (*(BY_NAME[name] for name in ("PSL", "UBOT", "VBOT", "TMQ", "U850", "V850", "PRECT")), TRANSPORT, *TRANSPORT_PARTS)
_TRANSPORT = tuple(channel.name for channel in (TRANSPORT, *TRANSPORT_PARTS))
_OPEN_AT_ONCE = 4


class WeatherFile:
    """One source file, open; a context manager. `weather(index)` gives the maps of one time."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._source, self._stack = Path(path), None, ExitStack()
        self._file = self._stack.enter_context(open_maps(path))
        try:
            self._recipes = self._find()
            self._source = self._whole()
            if self._source is None and not self._recipes:
                expected = f"any of {', '.join(channel.name for channel in _WANTED)}"
                raise BadInput(path, expected, "none of them", "Name files that hold fields")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WeatherFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def grid(self) -> Grid:
        return self._file.axes.grid

    @property
    def times(self) -> tuple[cftime.datetime | None, ...]:
        return tuple(self._file.times)

    def weather(self, index: int) -> Weather:
        """The maps (H, W) of one time that the file has."""
        own = {
            name: self._read(recipe, index)
            for name, recipe in self._recipes.items()
            if self._source is None or name in _TRANSPORT
        }
        ivt = own.get("transport", _speed(own, "transport_east", "transport_north"))
        if self._source is not None:
            return Weather.of(self._source.read(index).fields, ivt)
        wind, low_level = _speed(own, "UBOT", "VBOT"), _speed(own, "U850", "V850")
        if ivt is None and low_level is not None and "TMQ" in own:
            ivt = IVT_SLOPE * np.maximum(own["TMQ"], 0.0) * low_level
        return Weather(*(_some(field) for field in (own.get("PSL"), wind, ivt, own.get("PRECT"))))

    def _find(self) -> dict[str, Recipe]:
        if isinstance(self._file, DeepcamFile):
            return {}
        variables = self._file.variables()
        return {channel.name: recipe for channel in _WANTED if (recipe := find(self.path, channel, variables)) is not None}

    def _whole(self) -> Source | None:
        """The file as `segment` reads it, where it has every channel."""
        try:
            return self._stack.enter_context(open_source(self.path))
        except BadInput:
            if isinstance(self._file, DeepcamFile):
                raise
            return None

    def _read(self, recipe: Recipe, index: int) -> NDArray:
        assert isinstance(self._file, NetcdfFile)
        return self._file.read(recipe.variable, index, recipe.level) * recipe.factor + recipe.offset


def _speed(fields: dict[str, NDArray], east: str, north: str) -> NDArray | None:
    return np.hypot(fields[east], fields[north]) if east in fields and north in fields else None


def _some(field: NDArray | None) -> NDArray | None:
    """The map, unless it has no value anywhere."""
    return None if field is None or np.isnan(field).all() else field


class WeatherFiles:
    """Source files (also folders, patterns) found by the name of a mask file, else by time; a few are kept open."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._files = list_sources(paths)
        self._names = {file.stem: file for file in self._files}
        self._times: dict[tuple[int, ...], tuple[Path, int]] | None = None
        self._open: dict[Path, WeatherFile] = {}

    def __enter__(self) -> WeatherFiles:
        return self

    def __exit__(self, *_) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def weather(self, masks: Path, grid: Grid, index: int, time: Any) -> Weather:
        """The maps of the time that a mask is of: place `index` of the file `masks`, on `grid`."""
        stem = masks.name.removesuffix(MASK_SUFFIX) if masks.name.endswith(MASK_SUFFIX) else masks.stem
        path = self._names.get(stem)
        place = None if path is None else _place(self._file(path), index, time)
        if path is None or place is None:
            path, place = self._at(masks, stem, time)
        file = self._file(path)
        if not file.grid.same_as(grid) or place >= len(file.times):
            got = f"{len(file.times)} maps of {file.grid.shape[0]} × {file.grid.shape[1]} cells in {path}"
            expected = f"the {grid.shape[0]} × {grid.shape[1]} cells of the masks, place {index}"
            raise BadInput(masks, expected, got, "Use the masks made for these fields")
        return file.weather(place)

    def _file(self, path: Path) -> WeatherFile:
        """The file, open; the one opened first is closed when there are too many."""
        if path not in self._open:
            while len(self._open) >= _OPEN_AT_ONCE:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = WeatherFile(path)
        return self._open[path]

    def _at(self, masks: Path, stem: str, time: Any) -> tuple[Path, int]:
        """File and place of a time; every file's time axis is read the first time this is asked."""
        if self._times is None:
            self._times = {}
            for file in self._files:
                with open_maps(file) as maps:
                    self._times |= {_key(one): (file, place) for place, one in enumerate(maps.times) if one is not None}
        found = None if time is None else self._times.get(_key(time))
        if found is None:
            when = "" if time is None else f", or one that has {time.isoformat()}"
            expected = f"a source file {stem}.nc among those given{when}"
            raise BadInput(masks, expected, f"{len(self._files)} others", "Give the archive of the masks as --fields")
        return found


def _place(file: WeatherFile, index: int, time: Any) -> int | None:
    """Where a file has a time, None where it has not; the place `index` where either does not say its time."""
    if time is None or None in file.times:
        return index
    places = {_key(one): place for place, one in enumerate(file.times)}
    return places.get(_key(time))


def _key(time: Any) -> tuple[int, ...]:
    """A time to the minute, whatever its calendar; empty where unknown."""
    return () if time is None else (time.year, time.month, time.day, time.hour, time.minute)

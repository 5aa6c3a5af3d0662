"""One field of a file to draw, by the name of a channel or the file's own, whatever else the file lacks.

"IVT" is the file's own vapour transport where it has one (its magnitude, or both components), else the stand-in;
"WIND" is the speed of the lowest level.
"""

from __future__ import annotations

import re
from pathlib import Path

import cftime
import numpy as np
from numpy.typing import NDArray

from raysegment.archive.aliases import Recipe, find, find_transport
from raysegment.archive.deepcam import DeepcamFile, open_maps
from raysegment.archive.netcdf import NetcdfFile
from raysegment.archive.snapshots import LabelMap, magnitude, merged_labels
from raysegment.climate.channels import BY_NAME, INDEX
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.rivers import IVT_SLOPE

IVT, WIND = "IVT", "WIND"
_LABELS = {
    IVT: "integrated vapour transport (kg m⁻¹ s⁻¹)",
    WIND: "wind of the lowest level (m s⁻¹)",
}
STAND_IN = "vapour transport, 0.97 · TMQ · |V850| (kg m⁻¹ s⁻¹)"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_MOST_NAMES = 24


class Drawable:
    """A file open for drawing, one map at a time; a context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = open_maps(path)
        self._variables = {} if isinstance(self._file, DeepcamFile) else self._file.variables()

    def __enter__(self) -> Drawable:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    @property
    def grid(self) -> Grid:
        return self._file.axes.grid

    @property
    def times(self) -> tuple[cftime.datetime | None, ...]:
        return tuple(self._file.times)

    @property
    def time_labels(self) -> tuple[str, ...]:
        return tuple(self._file.time_labels)

    def mask(self, index: int, label_map: LabelMap = 0) -> NDArray[np.uint8] | None:
        """The labels (H, W) inside the file at one time, None without."""
        return merged_labels(self.path, self._file, index, label_map) if self._file.label_maps() else None

    def read(self, name: str, index: int) -> tuple[NDArray, str]:
        """Field (H, W) of one time, NaN where the file has no value, and its name with the unit; BadInput when it has none."""
        values, label = self._wind(index) if name == WIND else self._ivt(index) if name == IVT else self._plain(name, index)
        if values is None:
            raise self._unknown(name)
        if not np.isfinite(values).any():
            raise BadInput(self.path, f"values of {name}", f"none at {self.time_labels[index]}", "Draw another field or time")
        return values, label

    def _ivt(self, index: int) -> tuple[NDArray | None, str]:
        own = find_transport(self.path, self._variables)
        if own:
            return magnitude([self._cook(recipe, index) for recipe in own]), _LABELS[IVT]
        wind, vapour = self._speed("U850", "V850", index), self._channel("TMQ", index)
        return (None if wind is None or vapour is None else IVT_SLOPE * np.maximum(vapour, 0.0) * wind), STAND_IN

    def _wind(self, index: int) -> tuple[NDArray | None, str]:
        return self._speed("UBOT", "VBOT", index), _LABELS[WIND]

    def _speed(self, east: str, north: str, index: int) -> NDArray | None:
        parts = [self._channel(name, index) for name in (east, north)]
        return None if parts[0] is None or parts[1] is None else np.hypot(parts[0], parts[1])

    def _plain(self, name: str, index: int) -> tuple[NDArray | None, str]:
        if name in BY_NAME and (values := self._channel(name, index)) is not None:
            return values, f"{BY_NAME[name].long_name} ({pretty_unit(BY_NAME[name].unit)})"
        if not self._has(name):
            return None, ""
        unit = self._variables[name].unit
        return self._own(name, index), f"{name} ({pretty_unit(unit)})" if unit else name

    def _channel(self, name: str, index: int) -> NDArray | None:
        """One of the 16 channels in its own unit, None when the file has it under no known name."""
        if isinstance(self._file, DeepcamFile):
            return self._file.fields(index)[INDEX[name]]
        recipe = find(self.path, BY_NAME[name], self._variables)
        if recipe is None:
            return None
        return self._cook(recipe, index)

    def _cook(self, recipe: Recipe, index: int) -> NDArray:
        assert isinstance(self._file, NetcdfFile)
        return self._file.read(recipe.variable, index, recipe.level) * recipe.factor + recipe.offset

    def _has(self, name: str) -> bool:
        variable = self._variables.get(name)
        return variable is not None and variable.usable and variable.levels_hpa is None

    def _own(self, name: str, index: int) -> NDArray:
        assert isinstance(self._file, NetcdfFile)
        return self._file.read(name, index).astype(np.float32)

    def _unknown(self, name: str) -> BadInput:
        channels = list(BY_NAME) if isinstance(self._file, DeepcamFile) else self._channels()
        own = sorted(other for other in self._variables if self._has(other) and other not in channels)
        names = ", ".join([*channels, *own][:_MOST_NAMES]) or "maps on its latitude and longitude"
        expected = f"a field that the file holds: {names}, or what gives {IVT} or {WIND}"
        return BadInput(self.path, expected, name, "Choose one of those with --field")

    def _channels(self) -> list[str]:
        return [channel.name for channel in BY_NAME.values() if find(self.path, channel, self._variables) is not None]


def pretty_unit(unit: str) -> str:
    """A unit as it is printed: "kg m-2" → "kg m⁻²"."""
    return re.sub(r"(?<=[A-Za-z])(\*\*)?(-?\d+)", lambda power: power[2].translate(_SUPERSCRIPT), unit)

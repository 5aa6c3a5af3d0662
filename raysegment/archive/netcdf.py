"""One netCDF file seen as maps: its axes, its times, its variables, and one map at a time in canonical orientation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import cftime
import h5py
import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.archive import times
from raysegment.archive.aliases import Variable
from raysegment.archive.axes import Axes
from raysegment.archive.chunkwise import Chunkwise, Place
from raysegment.archive.files import damaged
from raysegment.archive.stored import BROKEN, Stored, numeric, open_dataset, text
from raysegment.archive.units import parse
from raysegment.climate.checks import BadInput

LABELS = "LABELS"
_LAT = (("lat", "latitude"), "latitude", "degrees_north")
_LON = (("lon", "longitude"), "longitude", "degrees_east")
_TIME = ("valid_time", "time", "Time", "TIME")
_PRESSURE_AXIS = ("plev", "level", "pressure_level", "isobaricInhPa", "isobaric", "pressure", "lev", "lv_ISBL0")
_CAM_MARKS = ("hyam", "datesec", "gw", "nsteph", "ndcur")  # variables that CAM puts into each history file


class NetcdfFile:
    """An open netCDF file (one process, one user: the HDF5 library is not for threads); close it or use `with`."""

    def __init__(self, path: str | Path, file: h5py.File | None = None):
        self.path = Path(path)
        self._data = open_dataset(self.path, file)
        try:
            self._read_axes()
            self._read_times()
            self._planes = self._chunkwise()
        except BROKEN as error:
            self.close()
            raise damaged(self.path, error) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._data.close()

    def __enter__(self) -> NetcdfFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # axes ---------------------------------------------------------------------------------------------------------

    def _read_axes(self) -> None:
        lat, lon = self._coordinate(*_LAT), self._coordinate(*_LON)
        self._lat_dim, self._lon_dim = lat.dimensions[0], lon.dimensions[0]
        try:
            self.axes = Axes(_values(lat), _values(lon))
        except ValueError as error:
            remedy = "Regrid the file to one (for example `cdo remapbil`)"
            raise BadInput(self.path, "a regular latitude–longitude grid", error, remedy) from None

    def _coordinate(self, names: tuple[str, ...], standard_name: str, unit: str) -> Stored:
        """The 1-D coordinate with one of the usual names, else with the attributes."""
        data = self._data.variables
        named = [data[name] for name in names if name in data]
        known = (v for v in data.values() if text(v, "standard_name") == standard_name or text(v, "units") == unit)
        found = next((v for v in chain(named, known) if len(v.shape) == 1), None)
        if found is not None:
            return found
        got = "none" if not named else f"{named[0].name}{named[0].dimensions}, {len(named[0].shape)} dimensions"
        remedy = f"Name it {names[0]}, with one dimension; regrid the file when its grid is not regular"
        raise BadInput(self.path, f"a {standard_name} coordinate with one dimension", got, remedy)

    # times --------------------------------------------------------------------------------------------------------

    def _read_times(self) -> None:
        """`times` (known ones), `labels_of_time`, `count`, `string_time`."""
        variable = next((self._data.variables[name] for name in _TIME if name in self._data.variables), None)
        self._time_dim = self._find_time_dim(variable)
        self.count = self._data.sizes[self._time_dim] if self._time_dim else 1
        if self.count == 0:
            raise BadInput(self.path, "at least one time", f"dimension {self._time_dim} of length 0", "Leave this file out")
        self.string_time, self.unknown_time = False, variable is None
        self.times, named = self._decode(variable)
        self.time_labels = tuple(times.label(t, i, name) for i, (t, name) in enumerate(zip(self.times, named, strict=True)))
        times.check_increasing(self.path, self.times, self.time_labels)

    def _find_time_dim(self, variable: Stored | None) -> str | None:
        letters = 1 if variable is not None and variable.dtype != str and np.dtype(variable.dtype).kind == "S" else 0
        dimensions = list[str]() if variable is None else list(variable.dimensions)
        if len(dimensions) > letters and dimensions[0] not in (self._lat_dim, self._lon_dim):
            return dimensions[0]
        return next((name for name in _TIME if name in self._data.sizes), None)

    def _decode(self, variable: Stored | None) -> tuple[tuple, list[str]]:
        """Times (None where unknown) and the words that the file has for them."""
        words = [""] * self.count
        if variable is not None:
            values = _strings(variable)
            if values is not None:
                self.string_time, words = True, (values + words)[: self.count]
                return tuple(self._time_of_name(variable, word) for word in words), words
            units = text(variable, "units")
            if " since " in units and not text(variable, "comment").startswith(times.UNKNOWN):
                calendar = text(variable, "calendar") or "standard"
                values = np.atleast_1d(_values(variable)).ravel()
                if values.size != self.count:
                    got = f"{variable.name}{variable.dimensions} of shape {variable.shape}"
                    remedy = "Select one forecast step, or flatten the axes"
                    raise BadInput(self.path, "a time axis with one dimension", got, remedy)
                return times.decode(self.path, values, units, calendar), words
            self.unknown_time = True
        return ((times.time_from_name(self.path.name),) if self.count == 1 else (None,) * self.count), words

    def time_bounds(self) -> tuple[tuple[cftime.datetime, cftime.datetime], ...] | None:
        """Of each time, beginning and end of what it stands for (CF-1.8, 7.1); None where the file does not say."""
        time = next((self._data.variables[name] for name in _TIME if name in self._data.variables), None)
        named = None if time is None else self._data.variables.get(text(time, "bounds"))
        if time is None or named is None or named.shape != (self.count, 2) or None in self.times:
            return None
        values = _values(named).ravel()
        if not np.isfinite(values).all():
            return None
        units = text(named, "units") or text(time, "units")
        ends = times.decode(self.path, values, units, text(time, "calendar") or "standard")
        return tuple(zip(ends[::2], ends[1::2], strict=True))

    def _time_of_name(self, variable: Stored, word: str):
        """Time of a ClimateNet string; the attributes that this project adds say it exactly."""
        calendar = text(variable, "calendar") or times.MODEL_CALENDAR
        if self.count > 1:
            return times.time_from_name(word, calendar)
        exact = times.from_iso(text(variable, "iso8601"), calendar)
        return exact or times.time_from_name(word, calendar) or times.time_from_name(self.path.name, calendar)

    # variables ----------------------------------------------------------------------------------------------------

    def variables(self) -> dict[str, Variable]:
        """What can be planned with: every variable of the file by name."""
        return {name: self._describe(variable) for name, variable in self._data.variables.items()}

    def _describe(self, variable: Stored) -> Variable:
        dims = variable.dimensions
        rest = self._rest(variable)
        levels = {d: self._levels_hpa(d) for d in rest}
        axis = [d for d in rest if levels[d] is not None]
        spare = all(self._data.sizes[d] == 1 for d in rest if d not in axis)
        usable = self._lat_dim in dims and self._lon_dim in dims and spare and len(axis) <= 1 and numeric(variable)
        return Variable(variable.name, text(variable, "units"), usable, levels[axis[0]] if len(axis) == 1 else None)

    def _levels_hpa(self, dimension: str) -> tuple[float, ...] | None:
        """Pressures along a dimension, None when it is not a pressure axis (hybrid levels are not)."""
        variable = self._data.variables.get(dimension)
        if variable is None or len(variable.shape) != 1 or not numeric(variable) or "sigma" in text(variable, "standard_name"):
            return None
        unit = parse(text(variable, "units")) if text(variable, "units") else None
        values = _values(variable)
        if unit is not None and unit.exponents == (-1, 1, -2, 0):
            return tuple(float(v) * unit.factor / 100.0 for v in values)
        if dimension in _PRESSURE_AXIS and not text(variable, "units"):
            return tuple(float(v) / (100.0 if values.max() > 2000.0 else 1.0) for v in values)
        return None

    def read(self, name: str, index: int, level: int | None = None) -> NDArray:
        """Map (H, W) of variable `name` at time `index`, canonical, NaN where the file has no value."""
        return self._map(self.place(name, level), index)

    def place(self, name: str, level: int | None = None) -> Place:
        """Where the maps of a variable, on one level where it has several, lie beside time, latitude and longitude."""
        rest = self._rest(self._data.variables[name])
        return name, tuple(level if level is not None and self._levels_hpa(d) is not None else 0 for d in rest)

    def label_place(self, label_map: int = 0, name: str = LABELS) -> Place:
        """The same for one of several label maps."""
        sizes = [self._data.sizes[d] for d in self._rest(self._data.variables[name])]
        return name, tuple(int(i) for i in np.unravel_index(label_map, sizes)) if sizes else ()

    def read_once(self, places: Iterable[Place], memory_bytes: int) -> int:
        """From now on `read` and `labels` at these places, time after time, read each stored byte once (see Chunkwise).

        How many bytes the file has for them comes out.
        """
        self._planes = self._chunkwise(places, memory_bytes)
        return self._planes.stored_bytes

    def _chunkwise(self, places: Iterable[Place] = (), memory_bytes: int = 0) -> Chunkwise:
        dims = (self._time_dim, self._lat_dim, self._lon_dim)
        return Chunkwise(self._data.variables, dims, self.count, places, memory_bytes)

    def _map(self, place: Place, index: int) -> NDArray:
        variable = self._data.variables[place[0]]
        try:
            plane = variable.packing.unpack(self._planes.plane(place, index))
        except (*BROKEN, IndexError, ValueError) as error:
            raise damaged(self.path, error) from None
        if variable.dimensions.index(self._lat_dim) > variable.dimensions.index(self._lon_dim):
            plane = plane.T
        return self.axes.to_canonical(plane)

    def _rest(self, variable: Stored) -> list[str]:
        return [d for d in variable.dimensions if d not in (self._time_dim, self._lat_dim, self._lon_dim)]

    def unit(self, name: str) -> str:
        return text(self._data.variables[name], "units")

    # labels -------------------------------------------------------------------------------------------------------

    def label_maps(self, name: str = LABELS) -> int:
        """How many label maps the file holds per time: 0 without labels, several when several people labelled it."""
        if name not in self._data.variables:
            return 0
        variable = self._data.variables[name]
        if self._lat_dim not in variable.dimensions or self._lon_dim not in variable.dimensions:
            got = f"{name}{variable.dimensions} of shape {variable.shape}"
            remedy = "Write the labels on the fields' own grid"
            raise BadInput(self.path, f"{name} on ({self._lat_dim}, {self._lon_dim})", got, remedy)
        if self._time_dim not in variable.dimensions and self.count > 1:
            got = f"{name}{variable.dimensions} for {self.count} times"
            raise BadInput(self.path, f"{name} for every time", got, "Give it the time dimension")
        return int(np.prod([self._data.sizes[d] for d in self._rest(variable)], dtype=int))

    def labels(self, index: int, label_map: int = 0, name: str = LABELS) -> NDArray:
        """Label map (H, W) as stored (not checked), canonical."""
        return self._map(self.label_place(label_map, name), index)

    # provenance ---------------------------------------------------------------------------------------------------

    def made_by_cam(self) -> bool:
        """True for a CAM history file, by what CAM writes into each."""
        return any(mark in self._data.variables for mark in _CAM_MARKS) or text(self._data, "source").upper() in ("CAM", "EAM")

    def attribute(self, name: str) -> str:
        """A global attribute, empty when absent."""
        return text(self._data, name)


def _values(variable: Stored) -> NDArray:
    """All numbers of a variable, NaN where it has none."""
    return variable.packing.unpack(variable.read())


def _strings(variable: Stored) -> list[str] | None:
    """Texts of a string or character variable, None for a numeric one."""
    if numeric(variable):
        return None
    values = variable.read()
    if values.dtype.kind == "S" and values.dtype.itemsize == 1 and values.ndim:
        values = netCDF4.chartostring(values)
    return [_decode(value) for value in np.atleast_1d(values).ravel()]


def _decode(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return re.sub(r"[\x00\s]+$", "", text)



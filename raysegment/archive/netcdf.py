"""One netCDF file seen as maps: its axes, its times, its variables, and one map at a time in canonical orientation."""

from __future__ import annotations

import re
from pathlib import Path

import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.archive import times
from raysegment.archive.aliases import Variable
from raysegment.archive.axes import Axes
from raysegment.archive.files import container, damaged
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

    def __init__(self, path: str | Path):
        self.path = Path(path)
        container(self.path)
        try:
            self._data = netCDF4.Dataset(str(self.path))
        except (OSError, RuntimeError) as error:
            raise damaged(self.path, error) from None
        try:
            self._read_axes()
            self._read_times()
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            self.close()
            raise damaged(self.path, error) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._data.isopen():
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
            self.axes = Axes(_filled(lat[:]), _filled(lon[:]))
        except ValueError as error:
            remedy = "Regrid the file to one (for example `cdo remapbil`)"
            raise BadInput(self.path, "a regular latitude–longitude grid", error, remedy) from None

    def _coordinate(self, names: tuple[str, ...], standard_name: str, unit: str) -> netCDF4.Variable:
        """The 1-D coordinate with one of the usual names, else with the attributes."""
        data = self._data.variables
        named = [data[name] for name in names if name in data]
        known = [v for v in data.values() if _text(v, "standard_name") == standard_name or _text(v, "units") == unit]
        found = next((v for v in named + known if v.ndim == 1), None)
        if found is not None:
            return found
        got = "none" if not named else f"{named[0].name}{named[0].dimensions}, {named[0].ndim} dimensions"
        remedy = f"Name it {names[0]}, with one dimension; regrid the file when its grid is not regular"
        raise BadInput(self.path, f"a {standard_name} coordinate with one dimension", got, remedy)

    # times --------------------------------------------------------------------------------------------------------

    def _read_times(self) -> None:
        """`times` (known ones), `labels_of_time`, `count`, `string_time`."""
        variable = next((self._data.variables[name] for name in _TIME if name in self._data.variables), None)
        self._time_dim = self._find_time_dim(variable)
        self.count = self._data.dimensions[self._time_dim].size if self._time_dim else 1
        if self.count == 0:
            raise BadInput(self.path, "at least one time", f"dimension {self._time_dim} of length 0", "Leave this file out")
        self.string_time, self.unknown_time = False, variable is None
        self.times, named = self._decode(variable)
        self.time_labels = tuple(times.label(t, i, name) for i, (t, name) in enumerate(zip(self.times, named, strict=True)))
        times.check_increasing(self.path, self.times, self.time_labels)

    def _find_time_dim(self, variable: netCDF4.Variable | None) -> str | None:
        letters = 1 if variable is not None and variable.dtype != str and np.dtype(variable.dtype).kind == "S" else 0
        if variable is not None and variable.ndim > letters and variable.dimensions[0] not in (self._lat_dim, self._lon_dim):
            return variable.dimensions[0]
        return next((name for name in _TIME if name in self._data.dimensions), None)

    def _decode(self, variable: netCDF4.Variable | None) -> tuple[tuple, list[str]]:
        """Times (None where unknown) and the words that the file has for them."""
        words = [""] * self.count
        if variable is not None:
            values = _strings(variable)
            if values is not None:
                self.string_time, words = True, (values + words)[: self.count]
                return tuple(self._time_of_name(variable, word) for word in words), words
            units = _text(variable, "units")
            if " since " in units and not _text(variable, "comment").startswith(times.UNKNOWN):
                calendar = _text(variable, "calendar") or "standard"
                values = np.ma.atleast_1d(variable[...]).ravel()
                if values.size != self.count:
                    got = f"{variable.name}{variable.dimensions} of shape {variable.shape}"
                    remedy = "Select one forecast step, or flatten the axes"
                    raise BadInput(self.path, "a time axis with one dimension", got, remedy)
                return times.decode(self.path, values, units, calendar), words
            self.unknown_time = True
        return ((times.time_from_name(self.path.name),) if self.count == 1 else (None,) * self.count), words

    def _time_of_name(self, variable: netCDF4.Variable, word: str):
        """Time of a ClimateNet string; the attributes that this project adds say it exactly."""
        calendar = _text(variable, "calendar") or times.MODEL_CALENDAR
        if self.count > 1:
            return times.time_from_name(word, calendar)
        exact = times.from_iso(_text(variable, "iso8601"), calendar)
        return exact or times.time_from_name(word, calendar) or times.time_from_name(self.path.name, calendar)

    # variables ----------------------------------------------------------------------------------------------------

    def variables(self) -> dict[str, Variable]:
        """What can be planned with: every variable of the file by name."""
        return {name: self._describe(variable) for name, variable in self._data.variables.items()}

    def _describe(self, variable: netCDF4.Variable) -> Variable:
        dims = variable.dimensions
        rest = [d for d in dims if d not in (self._time_dim, self._lat_dim, self._lon_dim)]
        levels = {d: self._levels_hpa(d) for d in rest}
        axis = [d for d in rest if levels[d] is not None]
        spare = all(self._data.dimensions[d].size == 1 for d in rest if d not in axis)
        usable = self._lat_dim in dims and self._lon_dim in dims and spare and len(axis) <= 1 and _numeric(variable)
        return Variable(variable.name, _text(variable, "units"), usable, levels[axis[0]] if len(axis) == 1 else None)

    def _levels_hpa(self, dimension: str) -> tuple[float, ...] | None:
        """Pressures along a dimension, None when it is not a pressure axis (hybrid levels are not)."""
        variable = self._data.variables.get(dimension)
        if variable is None or variable.ndim != 1 or not _numeric(variable) or "sigma" in _text(variable, "standard_name"):
            return None
        unit = parse(_text(variable, "units")) if _text(variable, "units") else None
        values = _filled(variable[:])
        if unit is not None and unit.exponents == (-1, 1, -2, 0):
            return tuple(float(v) * unit.factor / 100.0 for v in values)
        if dimension in _PRESSURE_AXIS and not _text(variable, "units"):
            return tuple(float(v) / (100.0 if values.max() > 2000.0 else 1.0) for v in values)
        return None

    def read(self, name: str, index: int, level: int | None = None) -> NDArray:
        """Map (H, W) of variable `name` at time `index`, canonical, NaN where the file has no value."""
        variable = self._data.variables[name]
        rest = {d: level if level is not None and self._levels_hpa(d) is not None else 0 for d in variable.dimensions}
        return self._plane(variable, index, rest)

    def _plane(self, variable: netCDF4.Variable, index: int, rest: dict[str, int]) -> NDArray:
        fixed = {**rest, self._time_dim: index}
        where = tuple(slice(None) if d in (self._lat_dim, self._lon_dim) else fixed[d] for d in variable.dimensions)
        try:
            plane = _filled(variable[where])
        except (OSError, RuntimeError, IndexError, ValueError) as error:
            raise damaged(self.path, error) from None
        if variable.dimensions.index(self._lat_dim) > variable.dimensions.index(self._lon_dim):
            plane = plane.T
        return self.axes.to_canonical(plane)

    def unit(self, name: str) -> str:
        return _text(self._data.variables[name], "units")

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
        return int(np.prod([self._data.dimensions[d].size for d in self._label_dims(variable)], dtype=int))

    def _label_dims(self, variable: netCDF4.Variable) -> list[str]:
        return [d for d in variable.dimensions if d not in (self._time_dim, self._lat_dim, self._lon_dim)]

    def labels(self, index: int, label_map: int = 0, name: str = LABELS) -> NDArray:
        """Label map (H, W) as stored (not checked), canonical."""
        variable = self._data.variables[name]
        dims = self._label_dims(variable)
        sizes = [self._data.dimensions[d].size for d in dims]
        place = [int(i) for i in np.unravel_index(label_map, sizes)] if dims else []
        return self._plane(variable, index, dict(zip(dims, place, strict=True)))

    # provenance ---------------------------------------------------------------------------------------------------

    def made_by_cam(self) -> bool:
        """True for a CAM history file, by what CAM writes into each."""
        return any(mark in self._data.variables for mark in _CAM_MARKS) or _text(self._data, "source").upper() in ("CAM", "EAM")

    def attribute(self, name: str) -> str:
        """A global attribute, empty when absent."""
        return _text(self._data, name)


def _text(holder: netCDF4.Variable | netCDF4.Dataset, name: str) -> str:
    return str(holder.getncattr(name)).strip() if name in holder.ncattrs() else ""


def _numeric(variable: netCDF4.Variable) -> bool:
    return variable.dtype is not str and np.dtype(variable.dtype).kind in "iuf"


def _filled(values: NDArray) -> NDArray:
    """Plain array; masked values become NaN."""
    if not isinstance(values, np.ma.MaskedArray):
        return np.asarray(values)
    plain = np.ma.getdata(values)
    if not np.ma.is_masked(values):
        return plain
    return np.where(np.ma.getmaskarray(values), np.nan, plain.astype(np.promote_types(values.dtype, np.float32)))


def _strings(variable: netCDF4.Variable) -> list[str] | None:
    """Texts of a string or character variable, None for a numeric one."""
    if _numeric(variable):
        return None
    values = np.asarray(variable[...])
    if values.dtype.kind == "S" and values.dtype.itemsize == 1 and values.ndim:
        values = netCDF4.chartostring(values)
    return [_decode(value) for value in np.atleast_1d(values).ravel()]


def _decode(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return re.sub(r"[\x00\s]+$", "", text)



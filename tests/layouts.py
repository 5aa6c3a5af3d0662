"""Writes one small file of each source layout, all showing the same weather: what a reader must give back is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import GRAVITY_M_S2, INDEX, NAMES
from raysegment.climate.grid import Grid

GRID = Grid.global_(19, 36)  # 10 degrees
_FROM_180 = np.argsort((GRID.lon + 180.0) % 360.0)  # columns from −180
LON_180 = (GRID.lon[_FROM_180] + 180.0) % 360.0 - 180.0


def weather(step: int = 0, grid: Grid = GRID, mountain_m: float = 3000.0) -> NDArray[np.float32]:
    """Plausible fields (16, H, W) that differ in every cell and step, with one mountain, following CAM's below-ground rule."""
    lat, lon = np.deg2rad(grid.lat)[:, None], np.deg2rad(grid.lon)[None, :]
    wave = np.sin(3 * lon + step) * np.cos(lat) + 0.1 * np.sin(lat + 2 * lon)
    t2m = 300.0 - 45.0 * np.sin(lat) ** 2 + 3.0 * wave
    height_m = orography_m(grid, mountain_m)
    psl = 101300.0 - 1500.0 * wave - 400.0 * np.cos(2 * lat)
    ps = psl * np.exp(-GRAVITY_M_S2 * height_m / (287.04 * (t2m + 0.5 * 6.5e-3 * height_m)))
    z1000 = 8.3 * (psl - 100000.0) / 100.0
    fields = {
        "TMQ": 25.0 + 20.0 * np.cos(2 * lat) + 3.0 * wave, "U850": 12.0 * wave + 2.0, "V850": 9.0 * np.cos(lon) + wave,
        "UBOT": 7.0 * wave + 1.0, "VBOT": 5.0 * np.cos(lon) - wave, "QREFHT": 0.009 + 0.006 * np.cos(2 * lat) + 5e-4 * wave,
        "PS": ps, "PSL": psl, "T200": 215.0 + 4.0 * wave, "T500": 255.0 + 10.0 * np.cos(2 * lat) + wave,
        "PRECT": 4e-8 * (1.0 + wave) + 1e-8, "TS": t2m + 1.0 + 0.5 * wave, "TREFHT": t2m, "Z1000": z1000,
        "Z200": 11700.0 + 500.0 * np.cos(2 * lat) + 30.0 * wave, "ZBOT": 0.22 * t2m,
    }  # fmt: skip
    fields = {name: np.broadcast_to(field, grid.shape) for name, field in fields.items()}
    for level, bottom in (("U850", "UBOT"), ("V850", "VBOT")):
        fields[level] = np.where(0.9925 * ps < 85000.0, fields[bottom], fields[level])
    fields["Z1000"] = np.where(0.9925 * ps < 100000.0, height_m + fields["ZBOT"], fields["Z1000"])
    return np.stack([fields[name] for name in NAMES]).astype(np.float32)


def orography_m(grid: Grid = GRID, mountain_m: float = 3000.0) -> NDArray:
    """One mountain at 40N 90E."""
    lat, lon = grid.lat[:, None], grid.lon[None, :]
    return mountain_m * np.exp(-(((lat - 40.0) / 15.0) ** 2) - ((lon - 90.0) / 20.0) ** 2)


def classes(step: int = 0, grid: Grid = GRID) -> NDArray[np.uint8]:
    """A mask (H, W) without symmetry."""
    lat, lon = grid.lat[:, None], grid.lon[None, :]
    river = (np.abs(lat - 35.0 - 5.0 * step) < 12.0) & ((lon - 310.0) % 360.0 < 75.0)  # across Greenwich
    cyclone = (np.abs(lat + 15.0) < 11.0) & (np.abs(lon - 180.0 - 10.0 * step) < 16.0)  # across the date line
    return np.where(cyclone, 1, np.where(river, 2, 0)).astype(np.uint8)


def _dims(data: netCDF4.Dataset, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        data.createDimension(name, size)


def _put(data: netCDF4.Dataset, name: str, kind, dims: tuple[str, ...], values, **attributes) -> None:
    variable = data.createVariable(name, kind, dims)
    variable.setncatts(attributes)
    variable[...] = values


def climatenet(path: Path, time: str = "dimension", labels: str = "i8", label_maps: int = 0, label_time: bool = False) -> Path:
    """ClimateNet: CAM names without attributes, string time, LABELS.

    `time`: "dimension" (coordinate), "variable" (scalar beside an unnamed time dimension), "characters", "absent".
    `label_maps` > 0 adds a dimension of that length: the true mask first, then masks of later steps.
    """
    stamp = "data-1996-06-09-01-1.nc"
    with netCDF4.Dataset(path, "w") as data:
        _dims(data, {"time": 1, "lat": 19, "lon": 36})
        _put(data, "lat", "f8", ("lat",), GRID.lat)
        _put(data, "lon", "f8", ("lon",), GRID.lon)
        if time == "characters":
            _dims(data, {"letters": len(stamp)})
            _put(data, "time", "S1", ("time", "letters"), netCDF4.stringtochar(np.array([stamp], f"S{len(stamp)}")))
        elif time != "absent":
            variable = data.createVariable("time", str, ("time",) if time == "dimension" else ())
            variable[...] = np.array([stamp], object) if time == "dimension" else stamp
        for name, field in zip(NAMES, weather(), strict=True):
            _put(data, name, "f4", ("time", "lat", "lon"), field[None])
        masks = np.stack([classes(step) for step in range(max(1, label_maps))])
        extra = ("labeller",) if label_maps else ()
        _dims(data, {"labeller": label_maps} if label_maps else {})
        if labels:
            values = (masks if label_maps else masks[0])[None] if label_time else (masks if label_maps else masks[0])
            _put(data, "LABELS", labels, (("time",) if label_time else ()) + extra + ("lat", "lon"), values)
    return path


def cam(path: Path, steps: int = 8) -> Path:
    """A CAM history file: several times, noleap calendar, staggered dimensions, hybrid levels and odd variables besides."""
    lev, units = 4, "days since 1995-02-01 00:00:00"
    with netCDF4.Dataset(path, "w", format="NETCDF3_64BIT_OFFSET") as data:
        data.setncatts({"Conventions": "CF-1.0", "source": "CAM", "case": "fvCAM5"})
        _dims(
            data, {"time": None, "lat": 19, "lon": 36, "slat": 18, "slon": 36, "lev": lev, "ilev": lev + 1, "nbnd": 2, "chars": 8}
        )
        hybrid = {"units": "level", "standard_name": "atmosphere_hybrid_sigma_pressure_coordinate", "positive": "down"}
        _put(data, "slat", "f8", ("slat",), GRID.lat[:-1] + 5.0, units="degrees_north", long_name="staggered latitude")
        _put(data, "slon", "f8", ("slon",), GRID.lon - 5.0, units="degrees_east", long_name="staggered longitude")
        _put(data, "lat", "f8", ("lat",), GRID.lat, units="degrees_north", long_name="latitude")
        _put(data, "lon", "f8", ("lon",), GRID.lon, units="degrees_east", long_name="longitude")
        _put(data, "lev", "f8", ("lev",), [850.0, 900.0, 950.0, 992.5], **hybrid)
        _put(data, "time", "f8", ("time",), 485.0 + np.arange(steps) / 8, units=units, calendar="noleap", bounds="time_bnds")
        _put(data, "time_bnds", "f8", ("time", "nbnd"), np.zeros((steps, 2)))
        _put(data, "hyam", "f8", ("lev",), 0.0)
        _put(data, "gw", "f8", ("lat",), np.cos(np.deg2rad(GRID.lat)))
        _put(data, "date", "i4", ("time",), 19960531)
        _put(data, "datesec", "i4", ("time",), np.arange(steps) * 10800)
        _put(data, "co2vmr", "f8", ("time",), 3.6e-4)
        _put(data, "date_written", "S1", ("time", "chars"), np.full((steps, 8), b"0"))
        _put(data, "US", "f4", ("time", "lev", "slat", "lon"), 1e30, units="m/s")
        _put(data, "T", "f4", ("time", "lev", "lat", "lon"), 273.0, units="K")
        units_of = {"TMQ": "kg/m2", "QREFHT": "kg/kg", "PRECT": "m/s", **dict.fromkeys(("PS", "PSL"), "Pa")}
        units_of |= dict.fromkeys(("U850", "V850", "UBOT", "VBOT"), "m/s") | dict.fromkeys(("T200", "T500", "TS", "TREFHT"), "K")
        for channel, name in enumerate(NAMES):
            values = np.stack([weather(step)[channel] for step in range(steps)])
            _put(data, name, "f4", ("time", "lat", "lon"), values, units=units_of.get(name, "m"), cell_methods="time: point")
    return path


def deepcam(path: Path, channel_first: bool = False) -> Path:
    """DeepCAM HDF5: channel last, two label maps, statistics, no coordinates; give the path the time in its name."""
    data = weather() if channel_first else np.moveaxis(weather(), 0, -1)
    with h5py.File(path, "w") as file:
        file["climate/data"] = data
        file["climate/data_stats"] = np.zeros((4, 16), np.float32)
        for number in range(2):
            file[f"climate/labels_{number}"] = classes(number).astype(np.float32)
            file[f"climate/labels_{number}_stats"] = np.zeros((7, 1), np.float32)
    return path


def era5(path: Path, steps: int = 2) -> Path:
    """ERA5 from the new CDS: valid_time, pressure_level, north first, geopotential, dew point, hourly accumulated tp in m,
    packed as integers; size-1 dimension `number`."""
    north_first = np.s_[..., ::-1, :]
    with netCDF4.Dataset(path, "w") as data:
        _dims(data, {"valid_time": steps, "number": 1, "pressure_level": 4, "latitude": 19, "longitude": 36})
        since = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian", "standard_name": "time"}
        _put(data, "valid_time", "i8", ("valid_time",), 834_278_400 + 3600 * np.arange(steps), **since)
        _put(data, "number", "i8", ("number",), 0)
        _put(data, "latitude", "f8", ("latitude",), GRID.lat[::-1], units="degrees_north", standard_name="latitude")
        _put(data, "longitude", "f8", ("longitude",), GRID.lon, units="degrees_east", standard_name="longitude")
        _put(data, "pressure_level", "f8", ("pressure_level",), [1000.0, 850.0, 500.0, 200.0], units="hPa")
        flat, deep = ("valid_time", "number", "latitude", "longitude"), ("valid_time", "pressure_level", "latitude", "longitude")
        maps = np.stack([weather(step) for step in range(steps)]).astype(np.float64)
        one = {name: maps[:, INDEX[name]] for name in NAMES}
        q, ps = one["QREFHT"], one["PS"]
        log_e = np.log(q * ps / (0.622 + 0.378 * q) / 611.2)
        single = {
            "tcwv": (one["TMQ"], "kg m**-2"), "u10": (one["UBOT"], "m s**-1"), "v10": (one["VBOT"], "m s**-1"),
            "d2m": ((17.67 * 273.15 - 29.65 * log_e) / (17.67 - log_e), "K"), "sp": (ps, "Pa"), "msl": (one["PSL"], "Pa"),
            "tp": (one["PRECT"] * 3600.0, "m"), "skt": (one["TS"], "K"), "t2m": (one["TREFHT"], "K"),
            "z_surface": (np.zeros_like(ps), "m**2 s**-2"),
        }  # fmt: skip
        for name, (values, unit) in single.items():
            _put(data, name, "f8", flat, values[:, None][north_first], units=unit)
        nothing = np.zeros_like(ps)
        columns = {
            "u": ([nothing, one["U850"], nothing, nothing], "m s**-1"),
            "v": ([nothing, one["V850"], nothing, nothing], "m s**-1"),
            "t": ([nothing + 290, nothing + 280, one["T500"], one["T200"]], "K"),
            "z": ([GRAVITY_M_S2 * one["Z1000"], nothing, nothing, GRAVITY_M_S2 * one["Z200"]], "m**2 s**-2"),
        }  # fmt: skip
        for name, (levels, unit) in columns.items():
            _put(data, name, "f8", deep, np.stack(levels, 1)[north_first], units=unit)
    return path


def cmip6(path: Path, steps: int = 2) -> Path:
    """CMIP6: plev in Pa, 360-day calendar, bounds, orog; no value on pressure levels below the ground."""
    with netCDF4.Dataset(path, "w") as data:
        _dims(data, {"time": steps, "plev": 4, "lat": 19, "lon": 36, "bnds": 2})
        _put(
            data,
            "time",
            "f8",
            ("time",),
            45.25 + 0.25 * np.arange(steps),
            units="days since 2000-01-01",
            calendar="360_day",
            axis="T",
        )
        _put(data, "lat", "f8", ("lat",), GRID.lat, units="degrees_north", standard_name="latitude", bounds="lat_bnds")
        _put(data, "lat_bnds", "f8", ("lat", "bnds"), 0.0)
        _put(data, "lon", "f8", ("lon",), GRID.lon, units="degrees_east", standard_name="longitude")
        _put(data, "plev", "f8", ("plev",), [100000.0, 85000.0, 50000.0, 20000.0], units="Pa", positive="down")
        _put(data, "height", "f8", (), 2.0, units="m")
        maps = np.stack([weather(step) for step in range(steps)]).astype(np.float64)
        one = {name: maps[:, INDEX[name]] for name in NAMES}
        single = {
            "prw": "TMQ",
            "uas": "UBOT",
            "vas": "VBOT",
            "huss": "QREFHT",
            "ps": "PS",
            "psl": "PSL",
            "ts": "TS",
            "tas": "TREFHT",
        }
        units = {"prw": "kg m-2", "uas": "m s-1", "vas": "m s-1", "huss": "1", "ps": "Pa", "psl": "Pa", "ts": "K", "tas": "K"}
        for name, channel in single.items():
            _put(data, name, "f8", ("time", "lat", "lon"), one[channel], units=units[name])
        _put(data, "pr", "f8", ("time", "lat", "lon"), 1000.0 * one["PRECT"], units="kg m-2 s-1")
        _put(data, "orog", "f8", ("lat", "lon"), orography_m(), units="m")
        nothing = np.zeros_like(one["PS"])
        columns = {
            "ua": [nothing, one["U850"], nothing, nothing],
            "va": [nothing, one["V850"], nothing, nothing],
            "ta": [nothing + 290.0, nothing + 280.0, one["T500"], one["T200"]],
            "zg": [one["Z1000"], nothing, nothing, one["Z200"]],
        }  # fmt: skip
        below = one["PS"][:, None] < np.array([100000.0, 85000.0, 50000.0, 20000.0])[:, None, None]
        for name, levels in columns.items():
            unit = {"ua": "m s-1", "va": "m s-1", "ta": "K", "zg": "m"}[name]
            values = np.where(below, 1e20, np.stack(levels, 1))
            _put(data, name, "f8", ("time", "plev", "lat", "lon"), values, units=unit, missing_value=1e20)
    return path


def merra2(path: Path) -> Path:
    """MERRA-2 names, longitudes from −180 with Greenwich as −1.8e-13, one time, humidity in g/kg for good measure."""
    lon = np.where(np.abs(LON_180) < 1e-9, -1.8e-13, LON_180)
    names = {
        "TMQ": ("TQV", "kg m-2", 1.0), "U850": ("U850", "m s-1", 1.0), "V850": ("V850", "m s-1", 1.0),
        "UBOT": ("ULML", "m s-1", 1.0), "VBOT": ("VLML", "m s-1", 1.0),
        "QREFHT": ("QV2M", "g kg-1", 1e3), "PS": ("PS", "Pa", 1.0), "PSL": ("SLP", "hPa", 1e-2),
        "T200": ("T200", "K", 1.0), "T500": ("T500", "K", 1.0), "PRECT": ("PRECTOT", "kg m-2 s-1", 1e3), "TS": ("TS", "K", 1.0),
        "TREFHT": ("T2M", "K", 1.0), "Z1000": ("H1000", "m", 1.0), "Z200": ("H200", "m", 1.0),
    }  # fmt: skip
    with netCDF4.Dataset(path, "w") as data:
        _dims(data, {"time": 1, "lat": 19, "lon": 36})
        _put(data, "time", "i4", ("time",), 90, units="minutes since 2017-02-28 00:00:00")
        _put(data, "lat", "f8", ("lat",), GRID.lat, units="degrees_north")
        _put(data, "lon", "f8", ("lon",), lon, units="degrees_east")
        for channel, (name, unit, factor) in names.items():
            values = weather().astype(np.float64)[INDEX[channel]][:, _FROM_180] * factor
            _put(data, name, "f8", ("time", "lat", "lon"), values[None], units=unit)
        _put(data, "PHIS", "f8", ("lat", "lon"), GRAVITY_M_S2 * orography_m()[:, _FROM_180], units="m+2 s-2")
    return path


def gfs(path: Path) -> Path:
    """A forecast under CAM names that extrapolates below the ground, with the orography in metres (PHIS_M)."""
    fields = weather()
    buried = 0.9925 * fields[INDEX["PS"]] < 100000.0
    fields[INDEX["Z1000"]][buried] = 8.3 * (fields[INDEX["PSL"]][buried] - 100000.0) / 100.0
    fields[INDEX["U850"]][0.9925 * fields[INDEX["PS"]] < 85000.0] += 3.0
    with netCDF4.Dataset(path, "w", format="NETCDF4_CLASSIC") as data:
        data.setncatts({"source": "GFS forecast"})
        _dims(data, {"time": 1, "lat": 19, "lon": 36})
        _put(data, "time", "f8", ("time",), 103248.0, units="hours since 2000-01-01 00:00:00", calendar="standard")
        _put(data, "lat", "f8", ("lat",), GRID.lat, units="degrees_north")
        _put(data, "lon", "f8", ("lon",), GRID.lon, units="degrees_east")
        for name, field in zip(NAMES, fields, strict=True):
            if name != "ZBOT":
                _put(data, name, "f4", ("time", "lat", "lon"), field[None], units={"TMQ": "kg/m2"}.get(name, ""))
        _put(data, "PHIS_M", "f4", ("time", "lat", "lon"), orography_m()[None], units="m")
    return path

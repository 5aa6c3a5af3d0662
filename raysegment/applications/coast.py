"""Where land is: signed distance to the coast from the `landmetrics` package, on its grid or as a share of cells."""

from __future__ import annotations

import warnings
from functools import lru_cache

import landmetrics
import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.climate.grid import Grid
from raysegment.climate.regrid import regrid

_VARIABLE = "distance_to_land"  # km, negative over land (GSHHG coast lines, 0.1 degrees)


@lru_cache(maxsize=2)
def coast_distance_km(stride: int = 1) -> tuple[Grid, NDArray[np.float32]]:
    """Distance to the coast (h, w), km, negative over land, at every `stride`-th tenth of a degree; its zero is the coast."""
    assert 1800 % stride == 0, stride
    with warnings.catch_warnings(), netCDF4.Dataset(_path()) as data:
        warnings.simplefilter("ignore")  # its valid_min is not of the variable's type; nothing is masked by it
        values = np.ma.filled(data[_VARIABLE][::stride, :3600:stride], np.nan).astype(np.float32)
    values[0] = values[1]  # the file has 0 at the pole itself, which lies inland
    half = values.shape[1] // 2  # from −180 to [0, 360)
    height, width = values.shape
    grid = Grid(np.linspace(-90.0, 90.0, height), np.arange(width) * (360.0 / width))
    return grid, np.roll(values, -half, axis=1)


def _path() -> str:
    """The file inside the package; nothing is downloaded."""
    return str(landmetrics.grid_path("distance_to_land", 0.1, 0.0, download=False))


def land_share(grid: Grid) -> NDArray[np.float32]:
    """Share of each cell (H, W) that is land, 0 to 1."""
    fine, distance_km = coast_distance_km()
    return np.clip(regrid((distance_km < 0.0).astype(np.float32), fine, grid), 0.0, 1.0)

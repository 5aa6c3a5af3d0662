"""World maps in the projections of cartopy, where it is installed.

Everything is looked up at the pixels of the finished picture: no outline is cut where the map is, and nothing that cartopy
would download is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

AUTO, PLATE_CARREE = "auto", "plate-carree"
_CLASSES: Mapping[str, str] = {"robinson": "Robinson", "mollweide": "Mollweide", "equal-earth": "EqualEarth"}
PROJECTIONS = (AUTO, PLATE_CARREE, *_CLASSES)
_AUTO = "robinson"
_ROWS, _COLUMNS = 700, 1400  # about the pixels of a world map that is 16 inches wide


@dataclass(frozen=True)
class Projection:
    """A projection of the whole world: cartopy's `crs`, and the latitude and longitude (rows, columns) of each pixel of the
    rectangle around it, row 0 in the south; NaN outside the world."""

    crs: Any
    lat: NDArray[np.float64]
    lon: NDArray[np.float64]

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """West, east, south and north end of the rectangle, in the projection's metres."""
        return *self.crs.x_limits, *self.crs.y_limits

    @property
    def axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The pixels' x and y."""
        return _middles(self.crs.x_limits, self.lat.shape[1]), _middles(self.crs.y_limits, self.lat.shape[0])

    def place(self, lat: float, lon: float) -> tuple[float, float]:
        """x and y of a point."""
        return self.crs.transform_point(lon, lat, self.crs.as_geodetic())

    def sample(self, field: NDArray, grid: Grid, smooth: bool = True) -> NDArray:
        """A map (H, W) at the pixels, linear between cells or (not `smooth`) each pixel as its cell; NaN where there is none."""
        row, column = (self.lat - grid.lat[0]) / grid.dlat, (self.lon - grid.lon[0]) / grid.dlon
        if grid.periodic:
            column = column % grid.lon.size
            field = np.concatenate([field[:, -1:], field, field[:, :1]], axis=1)
            column = column + 1.0
        else:
            column = (self.lon - grid.lon[0] + grid.dlon) % 360.0 / grid.dlon - 1.0
        height, width = field.shape
        outside = ~((np.abs(row - (height - 1) / 2) <= height / 2) & (column >= -0.5) & (column <= width - 0.5))
        places = np.where(outside, 0.0, row), np.where(outside, 0.0, column)
        found = ndimage.map_coordinates(field.astype(np.float64), places, order=int(smooth), mode="nearest")
        return np.where(outside, np.nan, found)


def _middles(ends: tuple[float, float], count: int) -> NDArray[np.float64]:
    low, high = ends
    return low + (np.arange(count) + 0.5) * (high - low) / count


def projection_of(name: str, middle_deg: float) -> Projection | None:
    """A projection by name with longitude `middle_deg` in its middle; None for plate carrée, which needs no cartopy.

    `auto` is Robinson's where cartopy is installed, else plate carrée. BadInput for an unknown name, or without cartopy.
    """
    if name not in PROJECTIONS:
        raise BadInput("--projection", ", ".join(PROJECTIONS), name, "Choose one of those")
    installed = _has_cartopy()
    if name == PLATE_CARREE or (name == AUTO and not installed):
        return None
    if not installed:
        raise BadInput("--projection", "cartopy, for this projection", "none", "pip install cartopy, or choose plate-carree")
    return _projection(_AUTO if name == AUTO else name, middle_deg)


def _has_cartopy() -> bool:
    try:
        import cartopy.crs  # noqa: F401
    except ImportError:
        return False
    return True


@lru_cache(maxsize=2)
def _projection(name: str, middle_deg: float) -> Projection:
    import cartopy.crs

    crs: Any = getattr(cartopy.crs, _CLASSES[name])(central_longitude=middle_deg)
    x, y = np.meshgrid(_middles(crs.x_limits, _COLUMNS), _middles(crs.y_limits, _ROWS))
    round_earth: Any = crs.as_geodetic()
    lon, lat, _ = np.moveaxis(round_earth.transform_points(crs, x, y), -1, 0)
    back_x, back_y, _ = np.moveaxis(crs.transform_points(round_earth, lon, lat), -1, 0)
    tolerance_m = 2.0 * (crs.x_limits[1] - crs.x_limits[0]) / _COLUMNS
    outside = ~(np.hypot(back_x - x, back_y - y) < tolerance_m)  # outside the world another point comes back, or none
    return Projection(crs, np.where(outside, np.nan, lat), np.where(outside, np.nan, lon))


def draw_graticule(panel: Any) -> None:
    """Lines at every 30 degrees and their names at the rim."""
    panel.set_global()
    lines = panel.gridlines(draw_labels=["left", "bottom"], color="0.6", linewidth=0.3, alpha=0.6)
    lines.xlabel_style = lines.ylabel_style = {"size": 9}

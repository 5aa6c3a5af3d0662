"""What a map is drawn on: a rectangle of the world in plate carrée, or the whole world in a projection of cartopy's.

Both take maps (H, W) with their grid, and know where a point of the world lies on the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.coast import coast_distance_km
from raysegment.applications.projections import Projection, draw_graticule
from raysegment.climate.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COAST = "#5b4636"
FILL = 0.28  # opacity of a class
_WEST_DEG = 20.0  # the world is cut where it harms least: through Africa and eastern Europe
_COAST_STRIDE, _ZOOM_COAST_STRIDE = 3, 1  # tenths of a degree
_SMOOTH_DEG = 0.35  # coarser masks are outlined along their cells


@dataclass(frozen=True)
class Frame:
    """A rectangle of the world, degrees; `east` may pass 360."""

    west: float
    east: float
    south: float
    north: float

    @property
    def size(self) -> tuple[float, float]:
        return self.east - self.west, self.north - self.south

    @property
    def wide(self) -> bool:
        """Whether it shows so much of the world that details would crowd it."""
        return self.size[0] > 180.0


WORLD = Frame(_WEST_DEG, _WEST_DEG + 360.0, -90.0, 90.0)
MIDDLE_DEG = _WEST_DEG + 180.0


class FlatCanvas:
    """A rectangle of the world, with degrees as its axes."""

    def __init__(self, panel: Axes, frame: Frame = WORLD):
        self.panel, self.frame, self.wide = panel, frame, frame.wide

    def image(self, field: NDArray, grid: Grid, smooth: bool = True, **style: Any) -> Any:
        """Draws a map in shades; returns matplotlib's image, for a colour bar."""
        columns, lon = turned(grid, self.frame)
        edges = lon[0] - grid.dlon / 2, lon[-1] + grid.dlon / 2, grid.lat[0] - grid.dlat / 2, grid.lat[-1] + grid.dlat / 2
        smoothing = "bilinear" if smooth else "nearest"
        return self.panel.imshow(
            field[:, columns], extent=edges, origin="lower", interpolation=smoothing, aspect="auto", **style
        )  # fmt: skip

    def coast(self) -> None:
        """Coast lines."""
        grid, distance_km = coast_distance_km(_COAST_STRIDE if self.wide else _ZOOM_COAST_STRIDE)
        columns, lon = turned(grid, self.frame)
        rows = np.flatnonzero((grid.lat >= self.frame.south - 1) & (grid.lat <= self.frame.north + 1))
        near = (lon >= self.frame.west - 1) & (lon <= self.frame.east + 1)
        _line(self.panel, lon[near], grid.lat[rows], distance_km[rows][:, columns[near]], 0.0, COAST, 0.7 if self.wide else 1.0)

    def region(self, inside: NDArray[np.bool_], grid: Grid, colour: str, hatch: str | None = None) -> None:
        """Light fill and outline of the cells `inside` (H, W); on coarse grids the outline follows the cells' edges."""
        frame, (columns, lon) = self.frame, turned(grid, self.frame)
        inside = inside[:, columns]
        rows = _near(inside.any(axis=1) & (grid.lat > frame.south - grid.dlat) & (grid.lat < frame.north + grid.dlat))
        cols = _near(inside.any(axis=0) & (lon > frame.west - grid.dlon) & (lon < frame.east + grid.dlon))
        inside, lat, lon = inside[rows, cols], grid.lat[rows], lon[cols]
        if not inside.any():
            return
        times = max(1, int(np.ceil(max(grid.dlat, grid.dlon) / _SMOOTH_DEG)))
        fine = np.repeat(np.repeat(inside, times, axis=0), times, axis=1).astype(np.float32)
        part = (np.arange(times) - (times - 1) / 2) / times
        lats, lons = (lat[:, None] + part * grid.dlat).ravel(), (lon[:, None] + part * grid.dlon).ravel()
        _region(self.panel, lons, lats, fine, colour, hatch, 1.1 if self.wide else 1.8)

    def place(self, lat: float, lon: float) -> tuple[float, float] | None:
        """Where a point lies, None outside."""
        lon = self.frame.west + (lon - self.frame.west) % 360.0
        return (lon, lat) if lon <= self.frame.east and self.frame.south <= lat <= self.frame.north else None

    def finish(self) -> None:
        """Frame, ticks in degrees, names of the axes."""
        (west, east, south, north), size = (self.frame.west, self.frame.east, self.frame.south, self.frame.north), self.frame.size
        step = next(s for s in (5, 10, 20, 30, 60) if size[0] / s <= 8 or s == 60)
        lat_step = next(s for s in (5, 10, 20, 30) if size[1] / s <= 6 or s == 30)
        lons = np.arange(np.ceil(west / step) * step, east + 1e-6, step)
        lats = np.arange(np.ceil(south / lat_step) * lat_step, north + 1e-6, lat_step)
        self.panel.set(xlim=(west, east), ylim=(south, north), xlabel="longitude", ylabel="latitude")
        self.panel.set_xticks(lons, [east_of(lon) for lon in lons])
        self.panel.set_yticks(lats, [f"{abs(lat):.0f}°{'N' if lat > 0 else 'S' if lat < 0 else ''}" for lat in lats])
        self.panel.tick_params(labelsize=9)
        self.panel.grid(color="0.6", linewidth=0.3, alpha=0.6)


class RoundCanvas:
    """The whole world in a projection; its panel is one of cartopy's axes."""

    wide = True

    def __init__(self, panel: Any, projection: Projection):
        self.panel, self.projection = panel, projection

    def image(self, field: NDArray, grid: Grid, smooth: bool = True, **style: Any) -> Any:
        """Draws a map in shades; returns matplotlib's image, for a colour bar."""
        filled = np.ma.filled(field.astype(np.float64), np.nan)
        seen = np.ma.masked_invalid(self.projection.sample(filled, grid, smooth))
        return self.panel.imshow(seen, extent=self.projection.extent, origin="lower", interpolation="nearest", **style)

    def coast(self) -> None:
        """Coast lines."""
        grid, distance_km = coast_distance_km(_COAST_STRIDE)
        _line(self.panel, *self.projection.axes, self.projection.sample(distance_km, grid), 0.0, COAST, 0.7)

    def region(self, inside: NDArray[np.bool_], grid: Grid, colour: str, hatch: str | None = None) -> None:
        """Light fill and outline of the cells `inside` (H, W), along their edges."""
        seen = np.nan_to_num(self.projection.sample(inside, grid, smooth=False))
        if seen.any():
            _region(self.panel, *self.projection.axes, seen, colour, hatch, 1.1)

    def place(self, lat: float, lon: float) -> tuple[float, float] | None:
        """Where a point lies."""
        return self.projection.place(lat, lon)

    def finish(self) -> None:
        """Lines of latitude and longitude with their names."""
        draw_graticule(self.panel)


Canvas = FlatCanvas | RoundCanvas


def panel_style(projection: Projection | None) -> dict[str, Any]:
    """What matplotlib has to know to make the panel of a map of the world."""
    return {} if projection is None else {"projection": projection.crs}


def world_canvas(panel: Axes, projection: Projection | None) -> Canvas:
    """The whole world on a panel that was made with `panel_style`."""
    return FlatCanvas(panel) if projection is None else RoundCanvas(panel, projection)


def _line(panel: Any, x: NDArray, y: NDArray, values: NDArray, level: float, colour: str, width: float) -> None:
    panel.contour(x, y, values, levels=[level], colors=[colour], linewidths=width)


def _region(panel: Any, x: NDArray, y: NDArray, inside: NDArray, colour: str, hatch: str | None, width: float) -> None:
    """Fill, hatching and outline of where `inside` is 1."""
    panel.contourf(x, y, inside, levels=[0.5, 1.5], colors=[colour], alpha=FILL)
    if hatch:
        panel.contourf(x, y, inside, levels=[0.5, 1.5], colors="none", hatches=[hatch]).set_edgecolor(colour)
    _line(panel, x, y, inside, 0.5, colour, width)


def _near(used: NDArray[np.bool_]) -> slice:
    """From the first to the last place in use, with one more at either end."""
    places = np.flatnonzero(used)
    return slice(max(int(places[0]) - 1, 0), int(places[-1]) + 2) if places.size else slice(0)


def turned(grid: Grid, frame: Frame) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Columns of the grid in the frame's order and their longitudes; a global grid is turned to begin at its west."""
    if not grid.periodic:
        turns = 360.0 * np.round((frame.west + frame.east - grid.lon[0] - grid.lon[-1]) / 720.0)
        return np.arange(grid.lon.size), grid.lon + turns
    start = int(np.ceil(((frame.west - grid.lon[0]) % 360.0) / grid.dlon - 1e-9))
    order = np.arange(start - 1, start + grid.lon.size + 1)  # a column more at either end fills the frame
    first = frame.west + ((grid.lon[0] - frame.west) % grid.dlon)
    return order % grid.lon.size, first + (np.arange(order.size) - 1) * grid.dlon


def east_of(lon: float) -> str:
    """A longitude as people write it."""
    lon = (lon + 180.0) % 360.0 - 180.0
    text = f"{abs(lon):.1f}".removesuffix(".0")
    return f"{text}°" if abs(lon) in (0.0, 180.0) else f"{text}°{'E' if lon > 0 else 'W'}"

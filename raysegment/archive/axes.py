"""A file's own latitude and longitude axes, and the way between them and the project's canonical grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.grid import Grid

_SAME = 1e-3  # columns closer than this share of the spacing are one column (the cyclic point of a plotting library)


@dataclass(frozen=True, eq=False)
class Axes:
    """Latitudes `lat (H,)` and longitudes `lon (W,)` in degrees as in the file: either direction, from 0 or from −180.

    `grid` is canonical: south to north, eastward from [0, 360); a region across Greenwich continues past 360. A column
    given twice (0 and 360) appears once in `grid` and twice again in what `from_canonical` returns.
    """

    lat: NDArray[np.float64]
    lon: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lat", np.array(self.lat, np.float64))
        object.__setattr__(self, "lon", np.array(self.lon, np.float64))
        for name, axis in (("lat", self.lat), ("lon", self.lon)):
            if axis.ndim != 1 or axis.size < 2 or not np.isfinite(axis).all():
                got = f"shape {axis.shape}: {axis.ravel()[:4]}…"
                raise ValueError(f"{name}: expected one axis of two or more finite degrees, got {got}")
        _ = self.grid  # Grid refuses what is not regular
        _check_order("lat", self.lat, np.diff(self.lat) > 0)
        _check_order("lon", self.lon, np.diff(self.lon) % 360.0 < 180.0)
        turned = float(np.abs((np.diff(self.lon) + 180.0) % 360.0 - 180.0).sum())
        if turned > 360.0 + 0.5 * self.grid.dlon:
            raise ValueError(f"lon: expected columns once around the Earth, got {turned:g} degrees")

    @staticmethod
    def of(grid: Grid) -> Axes:
        """The axes of a file written in canonical orientation."""
        return Axes(grid.lat, grid.lon)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns as in the file."""
        return self.lat.size, self.lon.size

    @cached_property
    def _rows(self) -> NDArray[np.intp]:
        return np.argsort(self.lat, kind="stable")

    @cached_property
    def _columns(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        """File column of each canonical column, canonical column of each file column, canonical degrees."""
        spacing = float(np.median(np.abs(np.diff(self.lon))))
        degrees = self.lon % 360.0
        degrees = np.where(degrees > 360.0 - _SAME * spacing, 0.0, degrees)  # MERRA-2 writes Greenwich as −1.8e-13
        order = np.argsort(degrees, kind="stable")
        new = np.append(True, np.diff(degrees[order]) > _SAME * spacing)
        group = np.empty(order.size, np.intp)
        group[order] = np.cumsum(new) - 1
        first, degrees = order[new], degrees[order][new]
        gaps = np.diff(np.append(degrees, degrees[0] + 360.0))
        start = 0 if gaps[-1] > gaps.max() - _SAME * spacing else int(gaps.argmax()) + 1  # a region begins after its gap
        lon = np.append(degrees[start:], degrees[:start] + 360.0)
        return np.roll(first, -start), (group - start) % degrees.size, lon

    @cached_property
    def grid(self) -> Grid:
        return Grid(self.lat[self._rows], self._columns[2])

    def to_canonical(self, array: NDArray) -> NDArray:
        """`array (…, H, W)` in the file's orientation → canonical, contiguous."""
        assert array.shape[-2:] == self.shape, (array.shape, self.shape)
        return np.ascontiguousarray(array[..., _index(self._rows), :][..., _index(self._columns[0])])

    def from_canonical(self, array: NDArray) -> NDArray:
        """Canonical `array (…, H, W)` → the file's orientation, contiguous."""
        assert array.shape[-2:] == self.grid.shape, (array.shape, self.grid.shape)
        return np.ascontiguousarray(array[..., _index(np.argsort(self._rows)), :][..., _index(self._columns[1])])


def _check_order(name: str, axis: NDArray, up: NDArray[np.bool_]) -> None:
    """Raise unless the steps of an axis all go up or all go down."""
    if up.any() and not up.all():
        turn = int(np.flatnonzero(up != up[0])[0])
        got = f"{', '.join(f'{value:g}' for value in axis[max(turn - 1, 0) : turn + 3])} from element {max(turn - 1, 0)} on"
        raise ValueError(f"{name}: expected degrees that go one way, got {got}")


def _index(order: NDArray[np.intp]) -> NDArray[np.intp] | slice:
    """`order` as a slice where it runs straight forward from 0 or backward to 0, which copies nothing."""
    forward = np.arange(order.size)
    if np.array_equal(order, forward):
        return slice(order.size)
    return slice(order.size - 1, None, -1) if np.array_equal(order, forward[::-1]) else order

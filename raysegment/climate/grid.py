"""A regular latitude–longitude grid on the sphere, and what follows from it: distances, areas, derivatives.

Inside the project latitude always runs south to north and longitude eastward from [0, 360); readers turn other layouts
into this one (`archive.snapshots`) and writers turn masks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

EARTH_RADIUS_KM = 6371.0  # mean radius (IUGG 1980)
KM_PER_DEGREE = np.pi / 180.0 * EARTH_RADIUS_KM
_REGULAR = 1e-3  # largest departure of a spacing from the mean one, as a share of it (float32 coordinates need 1e-4)


@dataclass(frozen=True, eq=False)
class Grid:
    """Latitudes `lat (H,)` and longitudes `lon (W,)` in degrees, both ascending and regular."""

    lat: NDArray[np.float64]
    lon: NDArray[np.float64]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lat", np.asarray(self.lat, np.float64))
        object.__setattr__(self, "lon", np.asarray(self.lon, np.float64))
        for name, axis in (("lat", self.lat), ("lon", self.lon)):
            steps = np.diff(axis)
            if axis.ndim != 1 or axis.size < 2 or not np.all(steps > 0):
                raise ValueError(f"{name}: expected an ascending axis of two or more degrees, got {axis[:4]}…")
            if np.ptp(steps) > _REGULAR * steps.mean():
                raise ValueError(f"{name}: expected a regular spacing, got steps from {steps.min()} to {steps.max()} degrees")
        if self.lat[0] < -90.001 or self.lat[-1] > 90.001:
            raise ValueError(f"lat: expected degrees within ±90, got {self.lat[0]} to {self.lat[-1]}")
        if self.lon[-1] - self.lon[0] >= 360.0:
            raise ValueError(f"lon: expected less than one turn, got {self.lon[0]} to {self.lon[-1]}")

    @staticmethod
    def global_(height: int, width: int) -> Grid:
        """The global grid with rows on both poles and the first column at Greenwich (ClimateNet's, CAM's)."""
        return Grid(np.linspace(-90.0, 90.0, height), np.arange(width, dtype=np.float64) * (360.0 / width))

    @property
    def shape(self) -> tuple[int, int]:
        return self.lat.size, self.lon.size

    @property
    def dlat(self) -> float:
        """Spacing in latitude, degrees."""
        return float((self.lat[-1] - self.lat[0]) / (self.lat.size - 1))

    @property
    def dlon(self) -> float:
        """Spacing in longitude, degrees."""
        return float((self.lon[-1] - self.lon[0]) / (self.lon.size - 1))

    @property
    def periodic(self) -> bool:
        """True when the columns close the circle."""
        return abs(self.dlon * self.lon.size - 360.0) < 0.5 * self.dlon

    @cached_property
    def area_km2(self) -> NDArray[np.float64]:
        """Cell areas (H, 1): R² Δλ (sin φ₂ − sin φ₁); cells at a pole end there."""
        edges = np.deg2rad(np.clip(np.append(self.lat - self.dlat / 2, self.lat[-1] + self.dlat / 2), -90.0, 90.0))
        return (EARTH_RADIUS_KM**2 * np.deg2rad(self.dlon) * np.diff(np.sin(edges)))[:, None]

    def distance_km(self, lat: float, lon: float) -> NDArray[np.float64]:
        """Great-circle distance of every cell (H, W) from one point."""
        return great_circle_km(self.lat[:, None], self.lon[None, :], lat, lon)

    def nearest(self, lat: float, lon: float) -> tuple[int, int]:
        """Row and column of the cell nearest to a point."""
        turn = np.abs((self.lon - lon + 180.0) % 360.0 - 180.0)
        return int(np.abs(self.lat - lat).argmin()), int(turn.argmin())

    def same_as(self, other: Grid) -> bool:
        """True when every cell centre agrees within a thousandth of the spacing."""
        return (
            self.shape == other.shape
            and bool(np.allclose(self.lat, other.lat, atol=1e-3 * self.dlat))
            and bool(np.allclose(self.lon, other.lon, atol=1e-3 * self.dlon))
        )


def great_circle_km(lat1, lon1, lat2, lon2):
    """Great-circle distance in km between points in degrees; arrays broadcast (haversine formula)."""
    phi1, phi2 = np.deg2rad(lat1), np.deg2rad(lat2)
    half = np.sin((phi2 - phi1) / 2) ** 2 + np.cos(phi1) * np.cos(phi2) * np.sin(np.deg2rad(lon2 - lon1) / 2) ** 2
    return 2.0 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(half, 0.0, 1.0)))


def unit_vectors(lat, lon) -> NDArray[np.float64]:
    """Points (…, 3) of the unit sphere at latitudes and longitudes (…) in degrees."""
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    return np.stack(np.broadcast_arrays(np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)), -1)


def gradient(field: NDArray, grid: Grid) -> tuple[NDArray, NDArray]:
    """Eastward and northward derivative (per metre) of `field (…, H, W)`; centred, periodic where the grid is.

    At a pole the eastward derivative is not defined; the row there takes its neighbour's metric.
    """
    metres_north = np.deg2rad(grid.dlat) * EARTH_RADIUS_KM * 1e3
    cos = np.maximum(np.cos(np.deg2rad(grid.lat)), np.cos(np.deg2rad(90.0 - grid.dlat / 2)))
    metres_east = np.deg2rad(grid.dlon) * EARTH_RADIUS_KM * 1e3 * cos[:, None]
    if grid.periodic:
        east = (np.roll(field, -1, -1) - np.roll(field, 1, -1)) / (2 * metres_east)
    else:
        east = np.gradient(field, axis=-1) / metres_east
    return east, np.gradient(field, axis=-2) / metres_north


def vorticity(u: NDArray, v: NDArray, grid: Grid) -> NDArray:
    """Relative vorticity (s⁻¹) of winds (…, H, W) in m/s: ∂v/∂x − (1/cos φ) ∂(u cos φ)/∂y."""
    cos = np.maximum(np.cos(np.deg2rad(grid.lat)), np.cos(np.deg2rad(90.0 - grid.dlat / 2)))[:, None]
    return gradient(v, grid)[0] - gradient(u * cos, grid)[1] / cos

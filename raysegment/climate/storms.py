"""The structures of the synthetic atmosphere: warm-core vortices, extratropical lows, moist filaments.

Each is a frozen value with a place and sizes; functions give what it adds to the fields at every cell of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from raysegment.climate.grid import EARTH_RADIUS_KM, KM_PER_DEGREE, Grid, great_circle_km, unit_vectors

AIR_DENSITY_KG_M3 = 1.1  # near 900 hPa
EARTH_ROTATION_S = 7.292e-5
_RADII_KM = np.concatenate([[0.0], np.geomspace(2.0, 4000.0, 400)])


def coriolis(lat) -> NDArray:
    """2 Ω sin φ, s⁻¹."""
    return 2 * EARTH_ROTATION_S * np.sin(np.deg2rad(lat))


@dataclass(frozen=True)
class Vortex:
    """A warm-core cyclone: V(r) = V_max x exp((1 − x^b)/b) exp(−(r/r_outer)²), x = r/r_max (Chan & Williams 1987, eq. 2.10,
    with an outer edge).

    `wind_m_s` at 850 hPa; `decay` is b; `warmth` the share of the surface low that a warm column explains
    (1: the low vanishes at 200 hPa); `moist_radius_km` and `moisture_kg_m2` its humid core.
    """

    lat: float
    lon: float
    wind_m_s: float
    core_km: float
    decay: float
    outer_km: float
    warmth: float
    upper_share: float
    moisture_kg_m2: float
    moist_radius_km: float
    inflow_deg: float

    def __post_init__(self) -> None:
        if not 5.0 < self.wind_m_s < 120.0 or self.core_km <= 0 or self.outer_km <= self.core_km:
            raise ValueError(f"expected a vortex of 5–120 m/s with core inside its outer radius, got {self}")

    def speed(self, radius_km: NDArray) -> NDArray:
        """Tangential wind (m/s) at distances from the centre."""
        x, b = radius_km / self.core_km, self.decay
        return self.wind_m_s * x * np.exp((1 - x**b) / b - (radius_km / self.outer_km) ** 2)

    def deficit_pa(self, radius_km: NDArray) -> NDArray:
        """Pressure below the surroundings: ∫_r^∞ ρ (V²/r + |f| V) dr (gradient wind balance)."""
        speed = self.speed(_RADII_KM)
        metres = np.maximum(_RADII_KM, 1.0) * 1e3
        slope = AIR_DENSITY_KG_M3 * (speed**2 / metres + abs(float(coriolis(self.lat))) * speed)
        steps = 0.5 * (slope[1:] + slope[:-1]) * np.diff(_RADII_KM) * 1e3
        total = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
        return np.interp(radius_km, _RADII_KM, total)

    def radius_of(self, wind_m_s: float) -> float:
        """Largest radius (km) at which the wind still reaches `wind_m_s`; 0 when it never does."""
        reached = np.flatnonzero(self.speed(_RADII_KM) >= wind_m_s)
        return float(_RADII_KM[reached[-1]]) if reached.size else 0.0

    def winds(self, grid: Grid, inflow_deg: float = 0.0) -> tuple[NDArray, NDArray]:
        """Eastward and northward wind (H, W), cyclonic in its hemisphere, turned inward by `inflow_deg`."""
        east_km, north_km = local_km(grid, self.lat, self.lon)
        radius_km = np.maximum(grid.distance_km(self.lat, self.lon), 1e-3)
        planar = np.maximum(np.hypot(east_km, north_km), 1e-3)
        turn = np.deg2rad(90.0 + inflow_deg) * (1.0 if self.lat >= 0 else -1.0)
        along_e, along_n = east_km / planar, north_km / planar
        speed = self.speed(radius_km)
        return (
            speed * (along_e * np.cos(turn) - along_n * np.sin(turn)),
            speed * (along_e * np.sin(turn) + along_n * np.cos(turn)),
        )


@dataclass(frozen=True)
class Low:
    """An extratropical low: a Gaussian hole in pressure with cold air behind it aloft and a moist comma before it."""

    lat: float
    lon: float
    depth_pa: float
    radius_km: float
    cold_k: float
    tilt_km: float

    def shape(self, grid: Grid, east_km: float = 0.0) -> NDArray:
        """exp(−r²/2R²) (H, W) around the centre displaced eastward by `east_km`."""
        lon = self.lon + east_km / (KM_PER_DEGREE * max(np.cos(np.deg2rad(self.lat)), 0.2))
        return np.exp(-0.5 * (grid.distance_km(self.lat, lon) / self.radius_km) ** 2)


@dataclass(frozen=True)
class Filament:
    """A moist filament along a path of points; `river` says whether it is long enough to count as an atmospheric river."""

    lat: tuple[float, ...]
    lon: tuple[float, ...]
    width_km: float
    moisture_kg_m2: float
    jet_m_s: float
    river: bool

    def profile(self, grid: Grid) -> tuple[NDArray, NDArray, NDArray]:
        """(cross-section 0–1, eastward, northward component of the unit vector along the axis), each (H, W).

        Cross-section exp(−d²/2σ²) tapered at both ends; d the distance to the nearest point of the path.
        """
        lat, lon = np.asarray(self.lat), np.asarray(self.lon)
        east, north = _bearings(lat, lon)
        taper = np.minimum(1.0, np.minimum(np.arange(lat.size), np.arange(lat.size)[::-1]) / max(1.0, 0.15 * lat.size) + 0.25)
        path = KDTree(unit_vectors(lat, lon))
        chord, index = path.query(unit_vectors(*np.meshgrid(grid.lat, grid.lon, indexing="ij")))
        best = 2 * EARTH_RADIUS_KM * np.arcsin(np.clip(chord / 2, 0.0, 1.0))
        return taper[index] * np.exp(-0.5 * (best / self.width_km) ** 2), east[index], north[index]


def filament_path(lat: float, lon: float, bearing_deg: float, turn_deg: float, length_km: float, step_km: float = 60.0):
    """Points every `step_km` of a curve that starts at (lat, lon) with a compass bearing and turns evenly by `turn_deg`."""
    steps = max(2, round(length_km / step_km))
    lats, lons = [lat], [lon]
    for k in range(steps):
        bearing = np.deg2rad(bearing_deg + turn_deg * k / steps)
        lat = lat + step_km * np.cos(bearing) / KM_PER_DEGREE
        lon = lon + step_km * np.sin(bearing) / (KM_PER_DEGREE * max(np.cos(np.deg2rad(lat)), 0.1))
        lats.append(float(lat))
        lons.append(float(lon % 360.0))
    return tuple(lats), tuple(lons)


def local_km(grid: Grid, lat: float, lon: float) -> tuple[NDArray, NDArray]:
    """East and north offsets (km, H×W) of the cells from a point, in its tangent plane (azimuthal equidistant)."""
    phi, lam = np.deg2rad(grid.lat)[:, None], np.deg2rad(grid.lon - lon)[None, :]
    phi0 = np.deg2rad(lat)
    east = np.cos(phi) * np.sin(lam)
    north = np.cos(phi0) * np.sin(phi) - np.sin(phi0) * np.cos(phi) * np.cos(lam)
    norm = np.maximum(np.hypot(east, north), 1e-12)
    radius_km = great_circle_km(grid.lat[:, None], grid.lon[None, :], lat, lon)
    return radius_km * east / norm, radius_km * north / norm


def _bearings(lat: NDArray, lon: NDArray) -> tuple[NDArray, NDArray]:
    dlon = (np.gradient(np.unwrap(np.deg2rad(lon)))) * np.cos(np.deg2rad(lat))
    dlat = np.gradient(np.deg2rad(lat))
    norm = np.maximum(np.hypot(dlon, dlat), 1e-12)
    return dlon / norm, dlat / norm



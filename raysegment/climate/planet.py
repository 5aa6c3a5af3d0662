"""A planet for the synthetic archive: land, mountains, and the climate that its weather departs from.

Zonal means are rounded values of reanalysis climatologies (seasonal means of the last decades), one number per latitude
knot; between knots they are linear. A *run* is one planet: its own mountains and its own biases, as the members of a
perturbed-physics ensemble differ, so that nothing learnt on the archive can hang on one model's mean state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.grid import Grid
from raysegment.climate.noise import smooth_noise, sphere_points

LAPSE_K_M = 6.5e-3  # ICAO standard atmosphere
GAS_CONSTANT_DRY = 287.05  # J kg-1 K-1
GRAVITY_M_S2 = 9.80665

_KNOTS = np.array([-90.0, -75.0, -60.0, -45.0, -30.0, -15.0, 0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0])
_SEA_K = np.array([245.0, 256.0, 271.0, 282.0, 292.5, 298.5, 300.0, 300.0, 294.0, 284.5, 275.5, 264.0, 252.0])
_T500_K = np.array([232.0, 236.0, 243.5, 251.0, 260.0, 267.0, 268.3, 267.5, 262.5, 254.0, 247.0, 240.0, 236.5])
_T200_K = np.array([207.0, 209.0, 213.0, 216.5, 218.0, 219.8, 220.5, 220.0, 218.0, 217.0, 216.5, 217.0, 216.0])
_PSL_HPA = np.array([1005.0, 995.0, 988.0, 1010.5, 1019.5, 1014.0, 1010.5, 1011.0, 1017.5, 1015.5, 1007.0, 1008.0, 1012.0])
_U850_M_S = np.array([0.0, -1.0, 10.5, 11.5, 1.5, -5.0, -3.0, -4.0, 0.0, 6.0, 5.5, 0.5, 0.0])
_WATER_KG_M2 = np.array([0.8, 2.0, 7.5, 12.0, 17.0, 29.0, 42.0, 40.0, 24.0, 14.0, 9.5, 5.5, 4.0])
# What summer adds and winter takes (amplitude of the annual cycle, K), over sea and land, at 500 and at 200 hPa.
_SEASON_LATITUDE = np.array([0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0])
_SEASON_SEA_K = np.array([0.5, 1.5, 3.0, 4.0, 4.5, 10.0, 13.0])
_SEASON_LAND_K = np.array([1.0, 4.0, 9.0, 12.0, 15.0, 16.0, 15.0])
_SEASON_500_K = np.array([0.2, 0.8, 3.0, 5.0, 6.0, 6.5, 7.0])
_SEASON_200_K = np.array([0.3, 0.3, 1.0, 2.0, 5.0, 9.0, 11.0])


@dataclass(frozen=True, eq=False)
class Planet:
    """Land fraction (0–1) and orography (m), both (H, W), and this run's biases."""

    grid: Grid
    land: NDArray
    height_m: NDArray
    warm_bias_k: float
    moist_factor: float
    storm_track_factor: float


@dataclass(frozen=True, eq=False)
class MeanState:
    """The season's climate (H, W each): K, Pa, m/s, kg/m², and the latitude of the thermal equator."""

    surface_k: NDArray
    t500_k: NDArray
    t200_k: NDArray
    psl_pa: NDArray
    u850_m_s: NDArray
    water_kg_m2: NDArray
    thermal_equator_deg: float


def make_planet(grid: Grid, seed: int, run: int, land: NDArray | None = None) -> Planet:
    """The planet of a run: land (shares of cells, H×W) with mountains of its own and a polar plateau in the south.

    Without `land` it has continents of its own: about a third of it, some thousand kilometres across.
    """
    rng = np.random.default_rng([seed, run, 1])
    points = sphere_points(grid)
    land = _continents(rng, points) if land is None else np.asarray(land, np.float64)
    ridges = 1.0 - np.abs(smooth_noise(rng, points, 9000.0, 96, 3.0))
    rough = np.maximum(0.0, 0.6 * ridges + 0.35 * smooth_noise(rng, points, 3000.0, 96, 3.0))
    height_m = land * (120.0 + 2600.0 * rough**2)
    south = np.clip((-grid.lat - 68.0) / 8.0, 0.0, 1.0)[:, None]
    land = np.maximum(land, south)
    height_m = np.minimum(np.maximum(height_m, 2700.0 * south * (0.8 + 0.2 * rough)), 5600.0)
    return Planet(grid, land, height_m, rng.normal(0.0, 0.8), float(np.exp(rng.normal(0.0, 0.06))), rng.uniform(0.75, 1.2))


def _continents(rng: np.random.Generator, points: NDArray) -> NDArray:
    noise = smooth_noise(rng, points, 14000.0, 96, 3.0)
    edge = np.quantile(noise, rng.uniform(0.62, 0.72))
    return np.clip(0.5 + (noise - edge) / 0.16, 0.0, 1.0)


def mean_state(planet: Planet, season: float) -> MeanState:
    """The climate at `season` = cos of the annual angle: +1 in the middle of the northern summer, −1 of the southern."""
    lat = planet.grid.lat
    equator = 7.0 * season
    moved = lat - equator * np.exp(-((lat / 35.0) ** 2))
    sign = season * np.tanh(lat / 12.0)

    def annual(amplitude: NDArray) -> NDArray:
        return sign * np.interp(np.abs(lat), _SEASON_LATITUDE, amplitude)

    def zonal(values: NDArray, at: NDArray = moved) -> NDArray:
        return np.interp(at, _KNOTS, values)[:, None]

    sea = zonal(_SEA_K) + annual(_SEASON_SEA_K)[:, None]
    ground = zonal(_SEA_K) + annual(_SEASON_LAND_K)[:, None]
    surface = sea + planet.land * (ground - sea) - LAPSE_K_M * planet.height_m * 0.9 + planet.warm_bias_k
    water = zonal(_WATER_KG_M2) * (1.0 + 0.25 * annual(np.array([0.0, 0.2, 0.9, 1.0, 1.1, 1.2, 1.2]))[:, None])
    water = water * np.exp(-planet.height_m / 2200.0) * (1.0 - 0.18 * planet.land) * planet.moist_factor
    return MeanState(
        surface_k=surface,
        t500_k=zonal(_T500_K) + annual(_SEASON_500_K)[:, None] + 0.8 * planet.warm_bias_k,
        t200_k=zonal(_T200_K) + annual(_SEASON_200_K)[:, None] + 0.5 * planet.warm_bias_k,
        psl_pa=100.0 * (zonal(_PSL_HPA) - planet.land * annual(np.array([0.0, 2.0, 5.0, 5.0, 3.0, 1.0, 0.0]))[:, None]),
        u850_m_s=zonal(_U850_M_S) * np.ones_like(planet.land),
        water_kg_m2=water,
        thermal_equator_deg=equator,
    )


def spread(per_latitude: NDArray, grid: Grid) -> NDArray:
    """A column (H, 1) of values given at 0, 15, …, 90 degrees of latitude, the same on both hemispheres."""
    return np.interp(np.abs(grid.lat), _SEASON_LATITUDE, per_latitude)[:, None]


def surface_pressure_pa(psl_pa: NDArray, surface_k: NDArray, height_m: NDArray) -> NDArray:
    """Pressure at the ground: psl · exp(−g z / (R T̄)), T̄ the mean of the column down to sea level (hypsometric)."""
    column_k = surface_k + 0.5 * LAPSE_K_M * height_m
    return psl_pa * np.exp(-GRAVITY_M_S2 * height_m / (GAS_CONSTANT_DRY * column_k))


def saturation_humidity(temperature_k: NDArray, pressure_pa: NDArray) -> NDArray:
    """Saturation specific humidity (kg/kg) over water: e = 611.2 exp(17.67 (T−273.15)/(T−29.65)) (Bolton 1980)."""
    vapour_pa = 611.2 * np.exp(17.67 * (temperature_k - 273.15) / (temperature_k - 29.65))
    return 0.622 * vapour_pa / (pressure_pa - 0.378 * vapour_pa)

"""A quiet atmosphere, and vortices and moist streams that tests put into it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import INDEX, NAMES
from raysegment.climate.grid import KM_PER_DEGREE, Grid

QUIET = {
    "TMQ": 15.0, "U850": 0.0, "V850": 0.0, "UBOT": 0.0, "VBOT": 0.0, "QREFHT": 0.015, "PS": 101200.0, "PSL": 101200.0,
    "T200": 218.0, "T500": 266.0, "PRECT": 1e-9, "TS": 301.0, "TREFHT": 300.0, "Z1000": 105.0, "Z200": 12400.0, "ZBOT": 65.0,
}  # fmt: skip


def quiet(grid: Grid) -> NDArray[np.float32]:
    """Fields (16, H, W) without weather."""
    return np.stack([np.full(grid.shape, QUIET[name], np.float32) for name in NAMES])


def add_vortex(
    fields: NDArray, grid: Grid, lat: float, lon: float, depth_pa: float = 4500.0, wind_m_s: float = 45.0, warm_k: float = 5.0,
    rise_m: float = 30.0,
) -> None:  # fmt: skip
    """A vortex in place: a Gaussian low, its warm core, and cyclonic wind v = V (r / R) exp((1 − (r / R)²) / 2), R = 150 km."""
    radius_km = grid.distance_km(lat, lon)
    bell = np.exp(-((radius_km / 300.0) ** 2))
    east = ((grid.lon[None, :] - lon + 180.0) % 360.0 - 180.0) * np.cos(np.deg2rad(lat)) * KM_PER_DEGREE
    north = (grid.lat[:, None] - lat) * KM_PER_DEGREE + 0.0 * east
    swirl = wind_m_s / 150.0 * np.exp(0.5 * (1.0 - (radius_km / 150.0) ** 2)) * (1.0 if lat >= 0 else -1.0)
    for names, share in ((("U850", "V850"), 1.0), (("UBOT", "VBOT"), 0.8)):
        fields[INDEX[names[0]]] -= share * swirl * north
        fields[INDEX[names[1]]] += share * swirl * east
    fields[INDEX["PSL"]] -= depth_pa * bell
    fields[INDEX["PS"]] -= depth_pa * bell
    fields[INDEX["T200"]] += warm_k * bell
    fields[INDEX["T500"]] += warm_k * bell
    fields[INDEX["Z200"]] += rise_m * bell
    fields[INDEX["TMQ"]] += 40.0 * bell
    fields[INDEX["PRECT"]] += 5e-7 * bell


def add_stream(
    fields: NDArray, grid: Grid, lat: float, lon: float, length_km: float = 4500.0, width_km: float = 500.0,
    slope_deg: float = 45.0,
) -> None:  # fmt: skip
    """A moist stream in place: an ellipse of vapour with wind along it, rising `slope_deg` poleward going east."""
    east = ((grid.lon[None, :] - lon + 180.0) % 360.0 - 180.0) * np.cos(np.deg2rad(lat)) * KM_PER_DEGREE
    north = (grid.lat[:, None] - lat) * KM_PER_DEGREE + 0.0 * east
    turn = np.deg2rad(slope_deg) * np.sign(lat)
    along, across = east * np.cos(turn) + north * np.sin(turn), -east * np.sin(turn) + north * np.cos(turn)
    band = np.exp(-((2.0 * along / length_km) ** 8) - (2.0 * across / width_km) ** 2)
    fields[INDEX["TMQ"]] += 25.0 * band
    fields[INDEX["U850"]] += 25.0 * band * np.cos(turn)
    fields[INDEX["V850"]] += 25.0 * band * np.sin(turn)

"""What an importer adds to fields of another archive so that they are like CAM's: below-ground levels, humidity, ZBOT."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import GRAVITY_M_S2, INDEX, ZBOT_M_PER_K

LOWEST_LEVEL = 0.9925  # pressure of CAM5's lowest level as a share of the surface pressure
GAS_CONSTANT_DRY = 287.04  # J kg⁻¹ K⁻¹
LAPSE_K_M = 6.5e-3  # standard atmosphere
BURIED = ("U850", "V850", "Z1000")  # channels that the below-ground rule changes
_SAME_WIND_M_S = 1e-3


def apply_below_ground(fields: NDArray[np.float32], orography_m: NDArray) -> NDArray[np.float32]:
    """`fields (16, H, W)` with pressure levels under the lowest model level repeating that level, as CAM writes them.

    Where 0.9925·PS < 850 hPa, U850 and V850 become UBOT and VBOT; where it is < 1000 hPa, Z1000 becomes
    `orography_m (H, W)` + ZBOT. Deduced from ClimateNet's own values (identical winds and Z1000 = 2836 m at the South
    Pole; |Z1000 − ZBOT| ≤ 0.9 m at sea where PS < 1000 hPa); other archives extrapolate (ERA5, GFS) or have no value there
    (CMIP6). Fields that follow the rule already are returned with the same values; what a
    file does not hold (NaN) is left as it is.
    """
    out = fields.copy()
    lowest_pa = LOWEST_LEVEL * fields[INDEX["PS"]]
    for level, bottom in (("U850", "UBOT"), ("V850", "VBOT")):
        buried = (lowest_pa < 85000.0) & np.isfinite(fields[INDEX[bottom]])
        out[INDEX[level]] = np.where(buried, fields[INDEX[bottom]], fields[INDEX[level]])
    surface_m = orography_m + fields[INDEX["ZBOT"]]
    out[INDEX["Z1000"]] = np.where((lowest_pa < 100000.0) & np.isfinite(surface_m), surface_m, fields[INDEX["Z1000"]])
    return out


def follows_below_ground(fields: NDArray[np.float32]) -> bool:
    """True when the file's maker applied the rule: 850 hPa winds repeat the bottom ones wherever 850 hPa is buried.

    False also where there is no such place (all sea): there the rule changes little and can be applied again.
    """
    buried = LOWEST_LEVEL * fields[INDEX["PS"]] < 84000.0  # clear of rounding at the edge
    if not buried.any():
        return False
    apart = np.abs(fields[INDEX["U850"]] - fields[INDEX["UBOT"]])[buried]
    return float(np.mean(apart <= _SAME_WIND_M_S)) > 0.99


def estimate_orography_m(fields: NDArray[np.float32]) -> NDArray[np.float64]:
    """Height of the surface (H, W) from PS, PSL and TREFHT, for archives that do not hold it.

    PSL = PS·exp(g z / (R T)) with T = TREFHT + Γ z / 2, hence z = a TREFHT / (1 − a Γ / 2), a = (R/g) ln(PSL/PS).
    """
    ps, psl, t2m = (fields[INDEX[name]].astype(np.float64) for name in ("PS", "PSL", "TREFHT"))
    a = GAS_CONSTANT_DRY / GRAVITY_M_S2 * np.log(psl / ps)
    return a * t2m / (1.0 - 0.5 * LAPSE_K_M * a)


def specific_humidity(dewpoint_k: NDArray, pressure_pa: NDArray) -> NDArray:
    """Specific humidity (kg/kg) from dew point and pressure: e = 611.2 exp(17.67 (Td − 273.15)/(Td − 29.65)) Pa (Bolton
    1980, eq. 10), q = 0.622 e / (p − 0.378 e)."""
    e_pa = 611.2 * np.exp(17.67 * (dewpoint_k - 273.15) / (dewpoint_k - 29.65))
    return 0.622 * e_pa / (pressure_pa - 0.378 * e_pa)


def bottom_height_m(trefht_k: NDArray) -> NDArray:
    """Height of CAM's lowest level above ground (m) from the 2 m temperature (K)."""
    return ZBOT_M_PER_K * trefht_k

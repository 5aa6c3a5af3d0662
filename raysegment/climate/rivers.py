"""Atmospheric rivers of one map: long, narrow regions of strong vapour transport (or of much vapour).

The 16 fields have no vertically integrated vapour transport; IVT ≈ 0.97 · TMQ · |V850| stands in (r = 0.96 to 0.97
against the true one on GFS maps, poleward of 20 degrees), unless the true field is given. No region is cut at a
meridian, and cells near tropical cyclones (`blank`) are left out before regions are formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from raysegment.climate.channels import INDEX
from raysegment.climate.grid import KM_PER_DEGREE, Grid, great_circle_km
from raysegment.climate.regions import EIGHT, FOUR, Region, axis_km, cut_regions, label_regions, region_areas_km2
from raysegment.climate.regrid import destination, regrid, sample, to_spacing

IVT_SLOPE = 0.97  # regression of IVT on TMQ · |V850|, poleward of 20 degrees, on two GFS maps (0.974, 0.971)
IVT_MIN_KG_M_S = 250.0  # Rutz et al. 2014
LAPLACIAN_DEG, LAPLACIAN_POINTS = 10.0, 8  # TempestExtremes _LAPLACIAN{8,10}
TROPICAL_EDGE_DEG = 3.0  # an axis with half its way this close to where the tropics were cut off is their edge
_RING_SPACING_DEG = 1.0  # a mean over a circle of 10 degrees needs no finer map


@dataclass(frozen=True)
class RiverPreset:
    """Named thresholds of a published detector, with their source; a limit of 0 or infinity is not applied.

    `field` is what is thresholded: "ivt" (kg m⁻¹ s⁻¹, ≥ `minimum`), "laplacian" (of IVT, kg m⁻¹ s⁻¹ rad⁻², ≤ −`minimum`),
    "zonal_percentile" (IVT ≥ the `percentile` of this map at this latitude and ≥ `minimum`) or "damped_tmq" (TMQ in kg m⁻²
    times 1 − exp(−φ² / 2·19²), > `minimum`). `min_elongation` is length / width with width = area / length.
    """

    name: str
    source: str
    field: str
    minimum: float
    min_length_km: float = 0.0
    min_elongation: float = 0.0
    min_area_km2: float = 0.0
    min_abs_lat: float = 0.0
    percentile: float = 0.0
    max_turn_deg: float = np.inf
    min_poleward_kg_m_s: float = -np.inf
    paper_box: bool = False

    def __post_init__(self) -> None:
        assert self.field in FIELDS, self
        assert self.minimum > 0 <= self.percentile < 100, self

    @property
    def needs(self) -> frozenset[str]:
        """Names of the channels that are read where no IVT is given."""
        return frozenset({"TMQ"}) if self.field == "damped_tmq" else frozenset({"TMQ", "U850", "V850"})

    @property
    def can_use_ivt(self) -> bool:
        """True when IVT alone is enough (rules about direction then do not apply)."""
        return self.field != "damped_tmq"


def transport(fields: NDArray) -> tuple[NDArray, NDArray]:
    """Stand-in for the eastward and northward vapour transport (H, W), kg m⁻¹ s⁻¹: 0.97 · TMQ · (U850, V850)."""
    vapour = IVT_SLOPE * np.maximum(fields[INDEX["TMQ"]], 0.0)
    return vapour * fields[INDEX["U850"]], vapour * fields[INDEX["V850"]]


def ivt_stand_in(fields: NDArray) -> NDArray:
    """Stand-in for IVT (H, W), kg m⁻¹ s⁻¹."""
    return np.hypot(*transport(fields))


def detect_rivers(
    fields: NDArray | None, grid: Grid, preset: RiverPreset, blank: NDArray[np.bool_] | None = None, ivt: NDArray | None = None
) -> NDArray[np.bool_]:
    """Cells (H, W) of atmospheric rivers.

    `fields (16, H, W)` may be None for presets that read nothing but the IVT given (kg m⁻¹ s⁻¹, H × W); rules about
    direction then do not apply. `blank` marks cells that no river may have.
    """
    if ivt is None and preset.field != "damped_tmq":
        assert fields is not None, f"{preset.name}: fields or ivt needed"
        ivt = ivt_stand_in(fields)
    candidate = FIELDS[preset.field](fields, ivt, grid, preset) & (np.abs(grid.lat) >= preset.min_abs_lat)[:, None]
    if blank is not None:
        candidate &= ~blank
    labels, count = label_regions(candidate, grid.periodic, FOUR if preset.paper_box else EIGHT)
    if count == 0:
        return candidate
    areas = region_areas_km2(labels, count, grid)
    chosen = np.flatnonzero(areas >= max(preset.min_area_km2, _least_area_km2(preset, grid))) + 1
    kept = np.zeros(count + 1, bool)
    for number, region in zip(chosen, cut_regions(labels, chosen), strict=True):
        kept[number] = _is_river(region, float(areas[number - 1]), fields, grid, preset)
    return kept[labels]


def _by_ivt(fields: NDArray | None, ivt: NDArray | None, grid: Grid, preset: RiverPreset) -> NDArray[np.bool_]:
    assert ivt is not None
    return ivt >= preset.minimum


def _by_percentile(fields: NDArray | None, ivt: NDArray | None, grid: Grid, preset: RiverPreset) -> NDArray[np.bool_]:
    """IVT above a percentile of the cells of the same latitude (± 5 degrees) in this map."""
    assert ivt is not None
    rows = np.percentile(ivt, preset.percentile, axis=1)
    smooth = ndimage.uniform_filter1d(rows, max(1, round(10.0 / grid.dlat)), mode="nearest")
    return (ivt >= smooth[:, None]) & (ivt >= preset.minimum)


def _by_laplacian(fields: NDArray | None, ivt: NDArray | None, grid: Grid, preset: RiverPreset) -> NDArray[np.bool_]:
    assert ivt is not None
    return laplacian(ivt, grid) <= -preset.minimum


def laplacian(field: NDArray, grid: Grid) -> NDArray:
    """Laplacian of a map (H, W) per rad²: 4 / r² · (mean of 8 points on a circle of r = 10 degrees − centre).

    The mean over the circle is smooth, so it is taken on a 1-degree map and brought back.
    """
    coarse = to_spacing(grid, max(grid.dlat, _RING_SPACING_DEG), max(grid.dlon, _RING_SPACING_DEG))
    bearings = np.arange(LAPLACIAN_POINTS)[:, None, None] * (360.0 / LAPLACIAN_POINTS)
    lats, lons = destination(coarse.lat[:, None], coarse.lon[None, :], bearings, np.array(LAPLACIAN_DEG * KM_PER_DEGREE))
    ring = sample(regrid(field, grid, coarse), coarse, lats, lons).mean(axis=0)
    return 4.0 / np.deg2rad(LAPLACIAN_DEG) ** 2 * (regrid(ring, coarse, grid) - field)


def _by_damped_tmq(fields: NDArray | None, ivt: NDArray | None, grid: Grid, preset: RiverPreset) -> NDArray[np.bool_]:
    """TMQ · (1 − exp(−φ² / (2 · 19²))) > minimum: the moist tropics are damped away (Kurth et al. 2018)."""
    assert fields is not None, f"{preset.name}: fields needed"
    damping = 1.0 - np.exp(-(grid.lat**2) / (2.0 * 19.0**2))
    return fields[INDEX["TMQ"]] * damping[:, None] > preset.minimum


FIELDS = {
    "ivt": _by_ivt,
    "laplacian": _by_laplacian,
    "zonal_percentile": _by_percentile,
    "damped_tmq": _by_damped_tmq,
}


def _paper(name: str, labels: str, minimum: float) -> RiverPreset:
    source = (
        f"label scripts of Kurth et al. 2018 ({labels}): damped TMQ > {minimum:.0f} kg/m², box diagonal > 1500 km, area / length "
        "< 1000 km, where length is the north–south side of the box; joined over Greenwich, where the original was cut"
    )
    return RiverPreset(name, source, "damped_tmq", minimum, paper_box=True)


RIVER_PRESETS: dict[str, RiverPreset] = {
    preset.name: preset
    for preset in (
        RiverPreset(
            "ivt",
            "Rutz et al. 2014 (IVT ≥ 250 kg/m/s, ≥ 2000 km), with length / width > 2 of Guan & Waliser 2015 and outside "
            "the tropics (20 degrees), where so much transport is no event",
            "ivt", IVT_MIN_KG_M_S, min_length_km=2000.0, min_elongation=2.0, min_abs_lat=20.0,
        ),
        _paper("paper2018", "labels_0", 24.0),
        _paper("paper2018_21", "labels_1", 21.0),
        RiverPreset(
            "tempest",
            "TempestExtremes DetectBlobs (McClenny et al. 2020; Ullrich et al. 2021): Laplacian of IVT ≤ −2e4, |latitude| ≥ 15, "
            "area ≥ 4e5 km²",
            "laplacian", 2e4, min_area_km2=4e5, min_abs_lat=15.0,
        ),
        RiverPreset(
            "guan_waliser",
            "Guan & Waliser 2015: IVT > 85th percentile and > 100, length > 2000 km, length / width > 2, mean transport within "
            "45 degrees of the axis and > 50 kg/m/s poleward. Their percentile is of the place and season over many years; "
            "one map has only its own, so that of the latitude circle stands in. Their rising percentiles for regions "
            "that fail the shape tests are not repeated",
            "zonal_percentile", 100.0, min_length_km=2000.0, min_elongation=2.0, percentile=85.0, max_turn_deg=45.0,
            min_poleward_kg_m_s=50.0,
        ),
    )
}  # fmt: skip


def _least_area_km2(preset: RiverPreset, grid: Grid) -> float:
    """No region smaller than this can be long enough: a chain of single cells, corner to corner."""
    cell_km = min(grid.dlat, grid.dlon * np.cos(np.deg2rad(80.0))) * KM_PER_DEGREE
    return 0.5 * preset.min_length_km * cell_km


def _is_river(region: Region, area_km2: float, fields: NDArray | None, grid: Grid, preset: RiverPreset) -> bool:
    """True when a region passes every limit of the preset on shape and direction."""
    if preset.paper_box:
        return _paper_box(region, area_km2, grid)
    if preset.min_length_km == 0 and preset.min_elongation == 0:
        return True
    length_km, lats, lons = axis_km(region, grid)
    if length_km < preset.min_length_km or length_km**2 <= preset.min_elongation * area_km2:  # width = area / length
        return False
    if preset.min_abs_lat > 0 and np.median(np.abs(lats)) < preset.min_abs_lat + TROPICAL_EDGE_DEG:
        return False
    return fields is None or not np.isfinite(preset.max_turn_deg) or _flows_along(region, fields, grid, preset, lats, lons)


def _flows_along(region: Region, fields: NDArray, grid: Grid, preset: RiverPreset, lats: NDArray, lons: NDArray) -> bool:
    """True when the mean transport runs poleward enough and within the preset's angle of the axis from end to end."""
    east, north = (float(part[region.cells].mean()) for part in transport(fields))
    if np.isnan(east + north):  # only the IVT is known: a rule about direction cannot be applied
        return True
    poleward = north * np.sign(float(grid.lat[region.cells[0]].mean()))
    dx = (lons[-1] - lons[0] + 180.0) % 360.0 - 180.0
    axis = np.arctan2(lats[-1] - lats[0], dx * np.cos(np.deg2rad(lats.mean())))
    turn = np.rad2deg(np.abs((np.arctan2(north, east) - axis + np.pi / 2) % np.pi - np.pi / 2))
    return bool(poleward > preset.min_poleward_kg_m_s and turn <= preset.max_turn_deg)


def _paper_box(region: Region, area_km2: float, grid: Grid) -> bool:
    """The 2018 shape test on the bounding box: diagonal > 1500 km and area / north–south side < 1000 km."""
    south, north = grid.lat[region.rows[0]], grid.lat[region.rows[-1]]
    west, east = grid.lon[region.cols[0]], grid.lon[region.cols[-1]]
    length_km = float(great_circle_km(south, west, north, west))
    diagonal_km = float(great_circle_km(south, west, north, east))
    return length_km > 0 and west != east and diagonal_km > 1500.0 and area_km2 / length_km < 1000.0

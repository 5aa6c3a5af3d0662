"""Objects of a mask as a table: where each cyclone and river lies, how large and strong it is, and which were one storm.

An object is a connected region of one class (8 neighbours), joined over Greenwich and the date line, never over a pole.
A region of cyclone that holds several prominent pressure minima (`lows`) is as many storms, where fields are given.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import CLASSES, CYCLONE, INDEX, RIVER
from raysegment.climate.cyclones import refined_minimum
from raysegment.climate.grid import Grid
from raysegment.climate.lows import split_cells
from raysegment.climate.regions import Region, axis_km, cut_regions, label_regions, region_areas_km2
from raysegment.climate.rivers import ivt_stand_in

PRECT_MM_H = 3.6e6  # mm/h in a m/s of water
WATER_KG_M3 = 1000.0
LAND_SHARE = 0.5  # a cell is land from this share on


@dataclass(frozen=True)
class Event:
    """One object of a mask.

    Position: for a cyclone the pressure minimum within it where fields are given, otherwise the centroid on the sphere.
    `west` to `east` runs eastward and may pass 360. Strengths are extremes or means by area within the object, None without
    the field; `land_share` is the share of its area over land, `landfall` whether any of its cells is land (half of it at
    least), None without a land map.
    """

    kind: int  # class: 1 cyclone, 2 river
    lat: float  # degrees north
    lon: float  # degrees east, [0, 360)
    cells: int
    area_km2: float
    length_km: float  # along the medial axis
    width_km: float  # area / length
    south: float  # centres of the outermost cells, degrees
    north: float
    west: float
    east: float
    min_psl_pa: float | None = None
    max_wind_m_s: float | None = None  # lowest level
    max_ivt_kg_m_s: float | None = None  # the file's own, otherwise the stand-in 0.97 · TMQ · |V850|
    land_share: float | None = None
    mean_ivt_kg_m_s: float | None = None
    mean_precip_mm_h: float | None = None
    max_precip_mm_h: float | None = None
    precip_kg_s: float | None = None  # water that falls out of the object: rate · area
    landfall: bool | None = None

    @property
    def name(self) -> str:
        """The class's name."""
        return CLASSES[self.kind]

    def row(self) -> dict[str, Any]:
        """The event as a row of a table: its fields in order, with the name of the class in place of its number."""
        return {"class": self.name, **{key: value for key, value in asdict(self).items() if key != "kind"}}


@dataclass(frozen=True, eq=False)
class MapObject:
    """An event with what links it to others: its `cells` (flat places in the map, ascending) on `grid`, and the centroid
    (lat, lon) of its cells over land, None where there are none."""

    event: Event
    cells: NDArray[np.int64]
    grid: Grid
    land_place: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Weather:
    """The maps (H, W) that strengths are read from, None where there is none; NaN where a map has no value."""

    psl_pa: NDArray | None = None
    wind_m_s: NDArray | None = None
    ivt_kg_m_s: NDArray | None = None
    precip_m_s: NDArray | None = None

    def __post_init__(self) -> None:
        if self.psl_pa is not None and np.isnan(self.psl_pa).any():  # a search for minima must not meet NaN
            object.__setattr__(self, "psl_pa", np.where(np.isnan(self.psl_pa), np.nanmax(self.psl_pa), self.psl_pa))

    @classmethod
    def of(cls, fields: NDArray, ivt_kg_m_s: NDArray | None = None) -> Weather:
        """From `fields (16, H, W)`, and the true transport where there is one."""
        wind_m_s = np.hypot(fields[INDEX["UBOT"]], fields[INDEX["VBOT"]])
        ivt = ivt_stand_in(fields) if ivt_kg_m_s is None else ivt_kg_m_s
        return cls(fields[INDEX["PSL"]], wind_m_s, ivt, fields[INDEX["PRECT"]])


def find_events(
    mask: NDArray[np.uint8], grid: Grid, fields: NDArray | None = None, land: NDArray | None = None, min_area_km2: float = 0.0
) -> list[Event]:
    """Objects of `mask (H, W)` of at least `min_area_km2`, cyclones first, each kind from the largest down.

    `fields (16, H, W)` give positions of cyclones and strengths, `land (H, W)` (0 sea to 1) the share over land.
    """
    weather = None if fields is None else Weather.of(fields)
    return [found.event for found in find_objects(mask, grid, weather, land, min_area_km2)]


def find_objects(
    mask: NDArray[np.uint8],
    grid: Grid,
    weather: Weather | None = None,
    land: NDArray | None = None,
    min_area_km2: float = 0.0,
) -> list[MapObject]:
    """The same, each with its cells."""
    assert mask.shape == grid.shape, (mask.shape, grid.shape)
    weather = Weather() if weather is None else weather
    found = []
    for kind in (CYCLONE, RIVER):
        labels, count = label_regions(mask == kind, grid.periodic)
        if kind == CYCLONE and weather.psl_pa is not None:
            labels, count = split_storms(labels, count, weather.psl_pa, grid)
        areas = region_areas_km2(labels, count, grid)
        order = np.argsort(-areas, kind="stable")
        chosen = order[areas[order] >= min_area_km2] + 1
        for number, region in zip(chosen, cut_regions(labels, chosen), strict=True):
            found.append(_object(kind, region, float(areas[number - 1]), grid, weather, land))
    return found


def split_storms(labels: NDArray[np.int32], count: int, psl_pa: NDArray, grid: Grid) -> tuple[NDArray[np.int32], int]:
    """Labels (H, W) with every region that holds several prominent lows cut into one region per low, and their count."""
    labels = labels.copy()
    for number in range(1, count + 1):
        rows, cols = np.nonzero(labels == number)
        for group in split_cells(psl_pa, grid, rows, cols)[1:]:
            count += 1
            labels[rows[group], cols[group]] = count
    return labels, count


def _object(kind: int, region: Region, area_km2: float, grid: Grid, weather: Weather, land: NDArray | None) -> MapObject:
    """What there is to say about one object."""
    cells = region.cells
    lat, lon = centroid(grid, cells)
    if kind == CYCLONE and weather.psl_pa is not None:
        lowest = int(weather.psl_pa[cells].argmin())
        lat, lon = refined_minimum(weather.psl_pa, grid, int(cells[0][lowest]), int(cells[1][lowest]))
    length_km = axis_km(region, grid)[0]
    west = float(grid.lon[region.cols[0]])
    event = Event(
        kind, lat, lon, cells[0].size, area_km2, length_km, area_km2 / length_km,
        float(grid.lat[region.rows[0]]), float(grid.lat[region.rows[-1]]), west, west + (region.cols.size - 1) * grid.dlon,
        **_strengths(weather, cells, grid.area_km2[cells[0], 0]),
        **_land(land, cells, grid.area_km2[cells[0], 0]),
    )  # fmt: skip
    ashore = None if land is None else land[cells] >= LAND_SHARE
    place = None if ashore is None or not ashore.any() else centroid(grid, (cells[0][ashore], cells[1][ashore]))
    return MapObject(event, np.sort(cells[0].astype(np.int64) * grid.shape[1] + cells[1]), grid, place)


def _strengths(weather: Weather, cells: tuple[NDArray, NDArray], area_km2: NDArray) -> dict[str, float]:
    """Extremes and means of the maps there are, over the cells that have a value."""
    found = {}
    for name, field, how, factor in (
        ("min_psl_pa", weather.psl_pa, np.min, 1.0),
        ("max_wind_m_s", weather.wind_m_s, np.max, 1.0),
        ("max_ivt_kg_m_s", weather.ivt_kg_m_s, np.max, 1.0),
        ("max_precip_mm_h", weather.precip_m_s, np.max, PRECT_MM_H),
    ):
        values = np.empty(0) if field is None else field[cells][np.isfinite(field[cells])]
        if values.size:
            found[name] = float(how(values)) * factor
    for name, field, factor in (
        ("mean_ivt_kg_m_s", weather.ivt_kg_m_s, 1.0),
        ("mean_precip_mm_h", weather.precip_m_s, PRECT_MM_H),
        ("precip_kg_s", weather.precip_m_s, WATER_KG_M3 * 1e6 * float(area_km2.sum())),
    ):
        if field is not None and np.isfinite(field[cells]).any():
            known = np.isfinite(field[cells])
            found[name] = float(np.average(field[cells][known].astype(np.float64), weights=_weights(area_km2[known]))) * factor
    return found


def _land(land: NDArray | None, cells: tuple[NDArray, NDArray], area_km2: NDArray) -> dict[str, Any]:
    if land is None:
        return {}
    share = float(np.average(land[cells], weights=_weights(area_km2)))
    return {"land_share": share, "landfall": bool((land[cells] >= LAND_SHARE).any())}


def _weights(area_km2: NDArray) -> NDArray:
    """Areas as weights that are not all zero at a pole."""
    return np.maximum(area_km2, 1e-9)


def centroid(grid: Grid, cells: tuple[NDArray, NDArray]) -> tuple[float, float]:
    """Area-weighted centroid (degrees) of cells (rows, columns): the mean of their unit vectors, brought to the sphere."""
    phi, lam = np.deg2rad(grid.lat[cells[0]]), np.deg2rad(grid.lon[cells[1]])
    weights = np.maximum(grid.area_km2[cells[0], 0], 1e-9)
    vectors = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    x, y, z = np.average(vectors, axis=1, weights=weights)
    return float(np.rad2deg(np.arctan2(z, np.hypot(x, y)))), float(np.rad2deg(np.arctan2(y, x)) % 360.0)

"""Objects of a mask as a table: where each cyclone and river lies, how large and strong it is, and which were one storm.

An object is a connected region of one class (8 neighbours), joined over Greenwich and the date line, never over a pole.
A region of cyclone that holds several prominent pressure minima (`lows`) is as many storms, where fields are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from raysegment.climate.channels import CLASSES, CYCLONE, INDEX, RIVER
from raysegment.climate.cyclones import refined_minimum
from raysegment.climate.grid import Grid, great_circle_km
from raysegment.climate.lows import split_cells
from raysegment.climate.regions import Region, axis_km, cut_regions, label_regions, region_areas_km2
from raysegment.climate.rivers import ivt_stand_in

# The farthest an object's centre moves (km/h): TECA's 1600 km a day for cyclones; a river's centroid also moves as it
# grows and breaks, and is given twice that.
MAX_SPEED_KM_H = {CYCLONE: 1600.0 / 24.0, RIVER: 3200.0 / 24.0}
MAX_GAP_H = 24.0  # a track survives this long without an object (TempestExtremes StitchNodes --maxgap 24h)


@dataclass(frozen=True)
class Event:
    """One object of a mask.

    Position: for a cyclone the pressure minimum within it where fields are given, otherwise the centroid on the sphere.
    `west` to `east` runs eastward and may pass 360. Strengths are extremes within the object, None without fields;
    `land_share` is the share of its area over land, None without a land map.
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
    max_ivt_kg_m_s: float | None = None  # stand-in, 0.97 · TMQ · |V850|
    land_share: float | None = None

    @property
    def name(self) -> str:
        """The class's name."""
        return CLASSES[self.kind]

    def row(self) -> dict[str, Any]:
        """The event as a row of a table: its fields in order, with the name of the class in place of its number."""
        return {"class": self.name, **{key: value for key, value in asdict(self).items() if key != "kind"}}


def find_events(
    mask: NDArray[np.uint8], grid: Grid, fields: NDArray | None = None, land: NDArray | None = None, min_area_km2: float = 0.0
) -> list[Event]:
    """Objects of `mask (H, W)` of at least `min_area_km2`, cyclones first, each kind from the largest down.

    `fields (16, H, W)` give positions of cyclones and strengths, `land (H, W)` (0 sea to 1) the share over land.
    """
    assert mask.shape == grid.shape, (mask.shape, grid.shape)
    measured = None if fields is None else _Strength(fields)
    events = []
    for kind in (CYCLONE, RIVER):
        labels, count = label_regions(mask == kind, grid.periodic)
        if kind == CYCLONE and measured is not None:
            labels, count = split_storms(labels, count, measured.psl_pa, grid)
        areas = region_areas_km2(labels, count, grid)
        order = np.argsort(-areas, kind="stable")
        chosen = order[areas[order] >= min_area_km2] + 1
        for number, region in zip(chosen, cut_regions(labels, chosen), strict=True):
            events.append(_event(kind, region, float(areas[number - 1]), grid, measured, land))
    return events


def split_storms(labels: NDArray[np.int32], count: int, psl_pa: NDArray, grid: Grid) -> tuple[NDArray[np.int32], int]:
    """Labels (H, W) with every region that holds several prominent lows cut into one region per low, and their count."""
    labels = labels.copy()
    for number in range(1, count + 1):
        rows, cols = np.nonzero(labels == number)
        for group in split_cells(psl_pa, grid, rows, cols)[1:]:
            count += 1
            labels[rows[group], cols[group]] = count
    return labels, count


class _Strength:
    """The three maps (H, W) that strengths are read from."""

    def __init__(self, fields: NDArray) -> None:
        self.psl_pa = fields[INDEX["PSL"]]
        self.wind_m_s = np.hypot(fields[INDEX["UBOT"]], fields[INDEX["VBOT"]])
        self.ivt_kg_m_s = ivt_stand_in(fields)


def _event(
    kind: int, region: Region, area_km2: float, grid: Grid, measured: _Strength | None, land: NDArray | None
) -> Event:
    """What there is to say about one object."""
    cells = region.cells
    lat, lon = centroid(grid, cells)
    if kind == CYCLONE and measured is not None:
        lowest = int(measured.psl_pa[cells].argmin())
        lat, lon = refined_minimum(measured.psl_pa, grid, int(cells[0][lowest]), int(cells[1][lowest]))
    length_km = axis_km(region, grid)[0]
    west = float(grid.lon[region.cols[0]])
    weights = grid.area_km2[cells[0], 0]
    return Event(
        kind, lat, lon, cells[0].size, area_km2, length_km, area_km2 / length_km,
        float(grid.lat[region.rows[0]]), float(grid.lat[region.rows[-1]]), west, west + (region.cols.size - 1) * grid.dlon,
        None if measured is None else float(measured.psl_pa[cells].min()),
        None if measured is None else float(measured.wind_m_s[cells].max()),
        None if measured is None else float(measured.ivt_kg_m_s[cells].max()),
        None if land is None else float(np.average(land[cells], weights=weights)),
    )  # fmt: skip


def centroid(grid: Grid, cells: tuple[NDArray, NDArray]) -> tuple[float, float]:
    """Area-weighted centroid (degrees) of cells (rows, columns): the mean of their unit vectors, brought to the sphere."""
    phi, lam = np.deg2rad(grid.lat[cells[0]]), np.deg2rad(grid.lon[cells[1]])
    weights = np.maximum(grid.area_km2[cells[0], 0], 1e-9)
    vectors = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)])
    x, y, z = np.average(vectors, axis=1, weights=weights)
    return float(np.rad2deg(np.arctan2(z, np.hypot(x, y)))), float(np.rad2deg(np.arctan2(y, x)) % 360.0)


def link_tracks(
    events: Sequence[Sequence[Event]],
    times: Sequence[Any],
    max_speed_km_h: dict[int, float] | None = None,
    max_gap_h: float = MAX_GAP_H,
) -> list[list[int]]:
    """Track number of every event, per time; the events of one storm share one.

    `times` are hours, or date-times that differ by a timedelta, ascending; None (time unknown) links nothing. Between
    times the pairing with the smallest total distance (as a share of what could be travelled) is taken among those
    that exceed no `max_speed_km_h` (by class); a track without an object for longer than `max_gap_h` has ended.
    """
    assert len(events) == len(times), (len(events), len(times))
    speeds = MAX_SPEED_KM_H if max_speed_km_h is None else max_speed_km_h
    ends: dict[int, tuple[Event, Any]] = {}  # track → its last event and when
    numbers: list[list[int]] = []
    count = 0
    for now, found in zip(times, events, strict=True):
        ends = {track: end for track, end in ends.items() if _hours(end[1], now) <= max_gap_h}
        links = _pair(found, ends, now, speeds)
        row = []
        for place, event in enumerate(found):
            track = links.get(place, count)
            count += track == count
            row.append(track)
            ends[track] = (event, now)
        numbers.append(row)
    return numbers


def _hours(earlier: Any, later: Any) -> float:
    """Hours between two times; infinite where one is unknown."""
    if earlier is None or later is None:
        return np.inf
    gap = later - earlier
    hours = gap.total_seconds() / 3600.0 if hasattr(gap, "total_seconds") else float(gap)
    assert hours >= 0, f"times must ascend, got {earlier} before {later}"
    return hours


def _pair(found: Sequence[Event], ends: dict[int, tuple[Event, Any]], now: Any, speeds: dict[int, float]) -> dict[int, int]:
    """Which event (by place) continues which track: smallest total distance among the possible pairs."""
    if not found or not ends:
        return {}
    tracks = list(ends)
    share = np.full((len(found), len(tracks)), np.inf)  # of the distance that could have been travelled
    for column, track in enumerate(tracks):
        last, when = ends[track]
        for place, event in enumerate(found):
            if event.kind == last.kind:
                km = great_circle_km(event.lat, event.lon, last.lat, last.lon)
                share[place, column] = km / max(speeds[event.kind] * _hours(when, now), 1e-9)
    cost = np.where(share <= 1.0, share, 1e6)  # an impossible pair is never worth two possible ones
    return {int(p): tracks[c] for p, c in zip(*linear_sum_assignment(cost), strict=True) if share[p, c] <= 1.0}

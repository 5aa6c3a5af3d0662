"""Prominent lows: one storm stays one, two storms in one region become two, also across the seam."""

from __future__ import annotations

import numpy as np
import pytest

from raysegment.climate.channels import CYCLONE, INDEX, NAMES
from raysegment.climate.events import find_events
from raysegment.climate.grid import Grid
from raysegment.climate.lows import prominent_lows, split_cells

GRID = Grid.global_(73, 144)


def pressure(*storms: tuple[float, float, float]) -> np.ndarray:
    psl = np.full(GRID.shape, 101000.0)
    for lat, lon, depth in storms:
        psl -= depth * np.exp(-((GRID.distance_km(lat, lon) / 350.0) ** 2))
    return psl


def cells(lat: float, lons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row = GRID.nearest(lat, 0.0)[0]
    rows, cols = np.meshgrid(np.arange(row - 2, row + 3), [GRID.nearest(lat, lon)[1] for lon in lons], indexing="ij")
    return rows.ravel(), cols.ravel()


@pytest.mark.parametrize("middle", [250.0, 0.0, 180.0])
def test_two_storms_in_one_region_are_two(middle: float) -> None:
    psl = pressure((17.5, middle - 6.25, 1500.0), (17.5, middle + 6.25, 800.0))
    rows, cols = cells(17.5, (middle + np.arange(-12.5, 12.6, 2.5)) % 360)
    groups = split_cells(psl, GRID, rows, cols)
    assert len(groups) == 2
    assert sorted(np.concatenate(groups)) == list(range(rows.size))
    centres = [GRID.lon[cols[g][psl[rows[g], cols[g]].argmin()]] for g in groups]
    for centre, storm in zip(centres, (middle - 6.25, middle + 6.25), strict=True):
        assert abs((centre - storm + 180) % 360 - 180) <= 2.5


def test_a_dent_of_less_than_the_prominence_is_no_storm() -> None:
    rows, cols = cells(17.5, 250.0 + np.arange(-15.0, 15.1, 2.5))
    psl = pressure((17.5, 245.0, 1500.0), (17.5, 260.0, 150.0))
    assert len(split_cells(psl, GRID, rows, cols)) == 1
    assert len(split_cells(psl, GRID, rows, cols, prominence_pa=50.0)) == 2


def test_minima_closer_than_a_storm_is_wide_are_one() -> None:
    rows, cols = cells(17.5, 250.0 + np.arange(-7.5, 7.6, 2.5))
    psl = np.full(GRID.shape, 101000.0)
    for lon in (247.5, 252.5):
        psl[GRID.nearest(17.5, lon)] -= 1000.0
    assert len(prominent_lows(psl, rows, cols, 144)) == 2
    assert len(split_cells(psl, GRID, rows, cols, apart_km=600.0)) == 1
    assert len(split_cells(psl, GRID, rows, cols, apart_km=400.0)) == 2


def test_events_count_both_storms_of_a_merged_region_where_pressure_is_known() -> None:
    fields = np.zeros((len(NAMES), *GRID.shape), np.float32)
    fields[INDEX["PSL"]] = pressure((17.5, 242.5, 900.0), (17.5, 255.0, 1500.0))
    mask = np.zeros(GRID.shape, np.uint8)
    rows, cols = cells(17.5, 250.0 + np.arange(-10.0, 10.1, 2.5))
    mask[rows, cols] = CYCLONE
    assert len(find_events(mask, GRID)) == 1
    events = find_events(mask, GRID, fields)
    assert sorted(event.lon for event in events) == pytest.approx([242.5, 255.0], abs=1.0)
    assert sum(event.cells for event in events) == rows.size

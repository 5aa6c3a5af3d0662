"""Objects of masks: joined over seams, never over poles; measured on the sphere; linked in time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raysegment.climate.channels import CYCLONE, INDEX, RIVER
from raysegment.climate.events import Weather, centroid, find_events, find_objects
from raysegment.climate.grid import Grid, great_circle_km
from raysegment.climate.regions import EIGHT, FOUR, cut_regions, label_regions, window
from tests.weather import add_vortex, quiet

GRID = Grid.global_(91, 180)


def disc(grid: Grid, lat: float, lon: float, radius_km: float, kind: int = CYCLONE) -> np.ndarray:
    return np.where(grid.distance_km(lat, lon) <= radius_km, kind, 0).astype(np.uint8)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.integers(0, 39), eight=st.booleans())
def test_labels_agree_with_a_tripled_map(seed, shift, eight):
    """Regions of a periodic map are those of three copies side by side, seen in the middle one."""
    structure = EIGHT if eight else FOUR
    mask = np.roll(np.random.default_rng(seed).random((20, 40)) < 0.4, shift, axis=1)
    labels, count = label_regions(mask, True, structure)
    assert set(np.unique(labels)) == set(range(count + 1)) if not mask.all() else count == 1
    triple, _ = ndimage.label(np.tile(mask, 9), structure)
    middle = triple[:, 160:200]
    pairs = {(int(a), int(b)) for a, b in zip(labels[mask], middle[mask], strict=True)}
    assert len({b for _, b in pairs}) == len(pairs)  # one of ours for each of theirs …
    assert len({a for a, _ in pairs}) == count  # … and regions are not split more than three copies explain
    assert label_regions(mask, False, structure)[1] == ndimage.label(mask, structure)[1]


def test_an_object_over_the_seam_is_one_and_is_cut_in_the_right_place():
    mask = disc(GRID, 20.0, 0.0, 900.0)
    (event,) = find_events(mask, GRID)
    assert event.west > 340
    assert 360 < event.east < 380
    assert great_circle_km(event.lat, event.lon, 20.0, 0.0) < 60
    assert event.cells == mask.sum()
    labels, count = label_regions(mask > 0, True)
    (region,) = cut_regions(labels, range(1, count + 1))
    assert region.inside.sum() == mask.sum()
    assert region.inside.any(axis=0).all()


def test_poles_do_not_join():
    mask = np.zeros(GRID.shape, np.uint8)
    mask[-4:, 10:14] = RIVER
    mask[-4:, 100:104] = RIVER
    assert len(find_events(mask, GRID)) == 2


def test_classes_are_apart_and_sorted():
    mask = np.maximum(disc(GRID, 20.0, 100.0, 500.0), disc(GRID, 20.0, 140.0, 900.0))
    mask[GRID.distance_km(45.0, 250.0) < 1200.0] = RIVER
    mask[mask.shape[0] // 2, 0] = RIVER
    events = find_events(mask, GRID)
    assert [event.kind for event in events] == [CYCLONE, CYCLONE, RIVER, RIVER]
    assert events[0].area_km2 > events[1].area_km2
    assert events[0].area_km2 == pytest.approx(np.pi * 900.0**2, rel=0.1)
    assert [event.kind for event in find_events(mask, GRID, min_area_km2=1e5)] == [CYCLONE, CYCLONE, RIVER]
    assert events[0].width_km * events[0].length_km == pytest.approx(events[0].area_km2)
    assert events[0].length_km == pytest.approx(1800.0, rel=0.15)
    assert events[0].row()["class"] == "tropical_cyclone"
    assert events[0].row()["min_psl_pa"] is None


@given(lat=st.floats(-80, 80), lon=st.floats(0, 359.9))
@settings(max_examples=30, deadline=None)
def test_centroid_of_a_disc_is_its_centre(lat, lon):
    cells = np.nonzero(disc(GRID, lat, lon, 1500.0))
    assert great_circle_km(*centroid(GRID, cells), lat, lon) < 120


def test_with_fields_a_cyclone_lies_at_its_pressure_minimum():
    fields = quiet(GRID)
    add_vortex(fields, GRID, 17.0, 101.0, depth_pa=4000.0)
    mask = disc(GRID, 19.0, 104.0, 900.0)
    (without,) = find_events(mask, GRID)
    land = np.broadcast_to((GRID.lon >= 104.0).astype(float), GRID.shape)
    (event,) = find_events(mask, GRID, fields, land)
    assert great_circle_km(event.lat, event.lon, 17.0, 101.0) < 120
    assert great_circle_km(without.lat, without.lon, 19.0, 104.0) < 120
    inside = mask > 0
    assert event.min_psl_pa == pytest.approx(float(fields[INDEX["PSL"]][inside].min()))
    assert event.max_wind_m_s == pytest.approx(float(np.hypot(fields[INDEX["UBOT"]], fields[INDEX["VBOT"]])[inside].max()))
    assert event.max_ivt_kg_m_s > 250
    assert event.land_share == pytest.approx(0.5, abs=0.1)


@settings(max_examples=40, deadline=None)
@given(lat=st.floats(-90, 90), lon=st.floats(0, 359.9), radius_km=st.floats(100, 4000))
def test_a_window_misses_no_cell(lat, lon, radius_km):
    near = window(GRID, lat, lon, radius_km)
    assert np.unique(near.cols).size == near.cols.size
    everywhere = GRID.distance_km(lat, lon) <= radius_km
    assert everywhere.sum() == (near.distance_km <= radius_km).sum()
    assert np.allclose(near.distance_km, GRID.distance_km(lat, lon)[near.index])


def test_means_and_water_are_by_area_and_landfall_is_land_that_is_touched():
    fields = quiet(GRID)
    fields[INDEX["PRECT"]] = 1e-7 * (1.0 + np.arange(GRID.shape[0])[:, None])
    mask = disc(GRID, 50.0, 100.0, 1500.0, RIVER)
    inside = mask > 0
    area_km2 = np.broadcast_to(GRID.area_km2, GRID.shape)
    land = (np.broadcast_to(GRID.lon, GRID.shape) < 95.0).astype(float)
    (found,) = find_objects(mask, GRID, Weather.of(fields), land)
    event = found.event
    assert event.precip_kg_s == pytest.approx(float((fields[INDEX["PRECT"]] * area_km2)[inside].sum()) * 1e9, rel=1e-5)
    assert event.mean_precip_mm_h == pytest.approx(event.precip_kg_s / event.area_km2 / 1e6 * 3600.0, rel=1e-5)
    assert event.max_precip_mm_h == pytest.approx(3.6e6 * float(fields[INDEX["PRECT"]][inside].max()))
    assert event.mean_ivt_kg_m_s == pytest.approx(0.0, abs=1e-6)
    assert event.landfall
    assert found.land_place is not None
    assert found.land_place[1] < 95.0
    assert np.array_equal(np.sort(np.flatnonzero(inside)), found.cells)
    (sea,) = find_objects(mask, GRID, None, np.zeros(GRID.shape))
    assert sea.event.landfall is False
    assert sea.land_place is None
    assert find_events(mask, GRID)[0].landfall is None


def test_cells_without_a_value_are_left_out():
    mask = disc(GRID, 20.0, 100.0, 900.0)
    wind = np.full(GRID.shape, np.nan)
    wind[GRID.nearest(20.0, 100.0)] = 30.0
    psl = np.where(GRID.distance_km(20.0, 100.0) < 300.0, 99000.0, np.nan)
    (found,) = find_objects(mask, GRID, Weather(psl_pa=psl, wind_m_s=wind, ivt_kg_m_s=np.full(GRID.shape, np.nan)))
    assert (found.event.max_wind_m_s, found.event.min_psl_pa, found.event.max_ivt_kg_m_s) == (30.0, 99000.0, None)
    assert found.event.precip_kg_s is None

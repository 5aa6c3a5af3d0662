"""Cyclone rules: every storm wherever it lies, nothing else, and every threshold matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from raysegment.archive.snapshots import open_source
from raysegment.climate.channels import INDEX
from raysegment.climate.cyclones import (
    CYCLONE_PRESETS,
    VORTICITY_EXPONENT,
    Contour,
    closed_along_rays,
    closed_by_flood,
    cyclone_mask,
    detect_cyclones,
    scaled_vorticity_s,
    scaled_wind_m_s,
    surface_height_m,
    thickness_m,
)
from raysegment.climate.grid import KM_PER_DEGREE, Grid, great_circle_km
from raysegment.climate.regions import label_regions
from raysegment.climate.regrid import regrid, to_spacing
from tests.helpers import real_data
from tests.weather import add_vortex, quiet

COARSE, MIDDLE, FINE = Grid.global_(73, 144), Grid.global_(181, 360), Grid.global_(361, 720)
STRICT = ("teca", "tempest")
PLACES = [(17.5, 180.0), (-15.0, 0.0), (22.0, 359.9), (-12.0, 179.9), (30.0, 75.0), (-28.3, 231.7)]


def storm_at(grid: Grid, lat: float, lon: float, **properties: float) -> np.ndarray:
    fields = quiet(grid)
    add_vortex(fields, grid, lat, lon, **properties)
    return fields


@pytest.mark.parametrize("preset", CYCLONE_PRESETS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("grid", [COARSE, MIDDLE, FINE], ids=["2.5", "1", "0.5"])
@pytest.mark.parametrize("place", PLACES)
def test_found_once_wherever_it_lies(preset, grid, place):
    storms = detect_cyclones(storm_at(grid, *place), grid, preset)
    assert len(storms) == 1
    (storm,) = storms
    assert great_circle_km(storm.lat, storm.lon, *place) < 0.75 * grid.dlat * KM_PER_DEGREE
    assert 96500 < storm.psl_pa < 101000
    assert storm.wind_m_s > 15
    assert storm.vorticity_s > 0
    assert storm.warm_core_k > 1
    assert 200 <= storm.radius_km <= 900


def test_neighbours_are_two_storms_and_deepest_comes_first():
    fields = storm_at(MIDDLE, 15.0, 178.0, depth_pa=3000.0)
    add_vortex(fields, MIDDLE, 17.0, 192.0)
    for name in STRICT:
        storms = detect_cyclones(fields, MIDDLE, CYCLONE_PRESETS[name])
        assert [round(storm.lon) for storm in storms] == [192, 178]


@pytest.mark.parametrize("name", STRICT)
def test_a_cold_low_is_no_tropical_cyclone(name):
    cold = storm_at(MIDDLE, 40.0, 330.0, warm_k=-5.0, rise_m=-600.0)
    assert not detect_cyclones(cold, MIDDLE, CYCLONE_PRESETS[name])


def test_a_heat_low_over_a_plateau_is_none_for_tempest():
    fields = storm_at(MIDDLE, 25.0, 70.0)
    tempest = CYCLONE_PRESETS["tempest"]
    assert detect_cyclones(fields, MIDDLE, tempest)
    fields[INDEX["PS"]] *= np.exp(-500.0 / 8780.0)  # ground at about 500 m: R T / g = 8780 m at 300 K
    assert surface_height_m(fields).mean() == pytest.approx(500.0, rel=0.02)
    assert not detect_cyclones(fields, MIDDLE, tempest)
    assert detect_cyclones(fields, MIDDLE, replace(tempest, max_height_m=np.inf))


@pytest.mark.parametrize("name", CYCLONE_PRESETS)
@pytest.mark.parametrize(
    "change", [{"min_wind_m_s": 90.0}, {"max_abs_lat": 10.0}, {"min_vorticity_s": 1.0}, {"max_height_m": -1000.0}], ids=str
)
def test_every_limit_matters(name, change):
    preset = CYCLONE_PRESETS[name]
    if preset.seeds == "pressure" and "min_vorticity_s" in change:
        pytest.skip("starts from pressure")
    fields = storm_at(MIDDLE, 17.5, 180.0)
    assert detect_cyclones(fields, MIDDLE, preset)
    assert not detect_cyclones(fields, MIDDLE, replace(preset, **change))


@pytest.mark.parametrize("name", CYCLONE_PRESETS)
def test_every_contour_matters(name):
    preset = CYCLONE_PRESETS[name]
    fields = storm_at(MIDDLE, 17.5, 180.0)
    for place, contour in enumerate(preset.contours):
        steep = tuple(replace(c, delta=c.delta * 1e3) if k == place else c for k, c in enumerate(preset.contours))
        assert not detect_cyclones(fields, MIDDLE, replace(preset, contours=steep)), contour


def test_merging_distance_keeps_the_deeper():
    fields = storm_at(MIDDLE, 15.0, 100.0, depth_pa=3000.0)
    add_vortex(fields, MIDDLE, 15.0, 109.0)
    tempest = CYCLONE_PRESETS["tempest"]
    assert len(detect_cyclones(fields, MIDDLE, tempest)) == 2
    (kept,) = detect_cyclones(fields, MIDDLE, replace(tempest, apart_deg=12.0))
    assert kept.lon == pytest.approx(109.0, abs=0.5)


def test_core_distance_is_how_far_the_low_may_lie_from_the_vorticity():
    fields = storm_at(FINE, 15.0, 100.0)
    for name in ("PSL", "PS", "T200", "T500", "Z200"):
        fields[INDEX[name]] = np.roll(fields[INDEX[name]], 6, axis=1)  # 3 degrees east of the winds
    teca = replace(CYCLONE_PRESETS["teca"], contours=(Contour("psl_pa", 400.0, 5.0),))
    near = detect_cyclones(fields, FINE, teca)
    far = detect_cyclones(fields, FINE, replace(teca, core_deg=4.0))
    assert not any(abs(storm.lon - 103.0) < 0.3 for storm in near)
    assert any(abs(storm.lon - 103.0) < 0.3 for storm in far)


def test_thickness_does_not_depend_on_the_below_ground_rule():
    fields = storm_at(MIDDLE, 17.5, 180.0)
    other = fields.copy()
    other[INDEX["Z1000"]] = 65.0
    assert np.array_equal(thickness_m(fields), thickness_m(other))


def test_vorticity_threshold_follows_the_spacing():
    assert scaled_vorticity_s(1.6e-4, Grid.global_(721, 1440)) == pytest.approx(1.6e-4)
    assert scaled_vorticity_s(1.6e-4, Grid.global_(768, 1152)) == pytest.approx(1.6e-4 * (0.3125 / 0.25) ** VORTICITY_EXPONENT)
    assert scaled_vorticity_s(1.6e-4, Grid.global_(65, 128)) == pytest.approx(3.5e-5, rel=0.03)  # Bengtsson et al. 1995, T42


def test_wind_threshold_follows_the_spacing():
    assert scaled_wind_m_s(17.0, Grid.global_(721, 1440)) == scaled_wind_m_s(17.0, Grid.global_(1441, 2880)) == 17.0
    fine_km, coarse_km = 0.25 * KM_PER_DEGREE, 2.5 * KM_PER_DEGREE
    expected = 17.0 * (1 - coarse_km / 700.0) / (1 - fine_km / 700.0)  # 17.5 m/s at 0 km, 10 m/s at 300 km
    assert scaled_wind_m_s(17.0, COARSE) == pytest.approx(expected)
    weak = storm_at(COARSE, 17.5, 180.0)
    weak[[INDEX["UBOT"], INDEX["VBOT"]]] *= 14.0 / np.hypot(weak[INDEX["UBOT"]], weak[INDEX["VBOT"]]).max()
    teca, tempest = CYCLONE_PRESETS["teca"], CYCLONE_PRESETS["tempest"]
    assert detect_cyclones(weak, COARSE, teca)
    assert detect_cyclones(weak, COARSE, tempest)
    assert not detect_cyclones(weak, COARSE, replace(tempest, min_wind_m_s=14.5))  # as published on every grid


def closed_oracle(field, grid, row, col, delta, radius_km):
    """Cell-by-cell flood of the whole map."""
    sign, todo, seen = np.sign(delta), [(row, col)], {(row, col)}
    height, width = field.shape
    while todo:
        y, x = todo.pop()
        if great_circle_km(grid.lat[y], grid.lon[x], grid.lat[row], grid.lon[col]) > radius_km:
            return False
        for b, a in ((y + 1, x), (y - 1, x), (y, (x + 1) % width), (y, (x - 1) % width)):
            inside = 0 <= b < height and (float(field[b, a]) - float(field[row, col])) * sign < abs(delta)
            if inside and (b, a) not in seen:
                seen.add((b, a))
                todo.append((b, a))
    return True


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), row=st.integers(8, 28), col=st.integers(0, 71), sign=st.sampled_from([1.0, -1.0]))
def test_flood_agrees_with_a_cell_by_cell_search(seed, row, col, sign):
    grid = Grid.global_(37, 72)
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=grid.shape), 1.5, mode=("nearest", "wrap"))
    field -= sign * 0.4 * np.exp(-((grid.distance_km(grid.lat[row], grid.lon[col]) / 900.0) ** 2))
    delta, radius_km = sign * 0.15, 1600.0
    assert closed_by_flood(field, grid, row, col, delta, radius_km) == closed_oracle(field, grid, row, col, delta, radius_km)


def test_flood_sees_a_leak_that_rays_miss():
    grid = Grid.global_(361, 720)
    row, col = grid.nearest(10.0, 0.0)
    distance = grid.distance_km(10.0, 0.0)
    field = np.where(distance < 200.0, 0.0, 300.0)
    assert closed_by_flood(field, grid, row, col, 200.0, 600.0)
    east = ((grid.lon[None, :] + 180.0) % 360.0 - 180.0) * np.cos(np.deg2rad(10.0))
    bearing = np.rad2deg(np.arctan2(east, grid.lat[:, None] - 10.0))
    field[np.abs(bearing - 22.5) < 8.0] = 0.0  # a gap to the north-north-east
    assert closed_along_rays(field, grid, row, col, 200.0, 600.0)
    assert not closed_by_flood(field, grid, row, col, 200.0, 600.0)


@settings(max_examples=12, deadline=None)
@given(shift=st.integers(0, 143), lat=st.sampled_from([-22.0, 12.0, 31.0]), lon=st.floats(0.0, 359.9))
def test_turning_or_mirroring_the_world_does_so_with_the_storms(shift, lat, lon):
    fields = storm_at(COARSE, lat, lon)
    add_vortex(fields, COARSE, -lat, lon + 140.0, depth_pa=3500.0)
    mirrored = fields[:, ::-1].copy()
    mirrored[[INDEX["V850"], INDEX["VBOT"]]] *= -1.0
    for name in STRICT:
        preset = CYCLONE_PRESETS[name]
        mask = cyclone_mask(fields, COARSE, detect_cyclones(fields, COARSE, preset))
        turned, flipped = np.roll(fields, shift, axis=2), mirrored
        assert mask.any()
        assert np.array_equal(np.roll(mask, shift, axis=1), cyclone_mask(turned, COARSE, detect_cyclones(turned, COARSE, preset)))
        assert np.array_equal(mask[::-1], cyclone_mask(flipped, COARSE, detect_cyclones(flipped, COARSE, preset)))


@pytest.mark.parametrize("grid", [COARSE, MIDDLE, FINE], ids=["2.5", "1", "0.5"])
@pytest.mark.parametrize("shape", ["wind", "paper2018"])
@pytest.mark.parametrize("place", PLACES[:4])
def test_mask_is_one_region_around_the_centre(grid, shape, place):
    fields = storm_at(grid, *place)
    storms = detect_cyclones(fields, grid, CYCLONE_PRESETS["tempest"])
    mask = cyclone_mask(fields, grid, storms, shape)
    assert label_regions(mask, True)[1] == 1
    area_km2 = float((mask * grid.area_km2).sum())
    assert 1.5e5 < area_km2 < 1.5e6
    if shape == "wind":
        assert mask[grid.nearest(*place)]
        assert grid.distance_km(storms[0].lat, storms[0].lon)[mask].max() <= storms[0].radius_km
    if grid is COARSE and shape == "wind":
        assert 3 <= mask.sum() <= 12


def test_a_stronger_wind_field_gives_a_larger_mask():
    small, large = (storm_at(FINE, 15.0, 60.0, wind_m_s=wind) for wind in (15.0, 60.0))
    preset = CYCLONE_PRESETS["tempest"]
    sizes = [cyclone_mask(fields, FINE, detect_cyclones(fields, FINE, preset)).sum() for fields in (small, large)]
    assert 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize("name", CYCLONE_PRESETS)
@pytest.mark.parametrize("spacing", [2.5, 1.0, 0.5])
def test_jova_and_irwin_on_the_real_map(name, spacing):
    with open_source(real_data("gfs_2011-10-11T00.nc")) as source:
        snapshot = source.read(0)
    grid = to_spacing(snapshot.grid, spacing, spacing)
    fields = regrid(snapshot.fields, snapshot.grid, grid)
    storms = detect_cyclones(fields, grid, CYCLONE_PRESETS[name])
    shift = round(105.0 / spacing)  # Jova goes to Greenwich
    turned = detect_cyclones(np.roll(fields, shift, axis=2), grid, CYCLONE_PRESETS[name])
    south = fields[:, ::-1].copy()
    south[[INDEX["V850"], INDEX["VBOT"]]] *= -1.0
    mirrored = detect_cyclones(south, grid, CYCLONE_PRESETS[name])
    assert [round(s.lat, 3) for s in storms] == [round(s.lat, 3) for s in turned] == [round(-s.lat, 3) for s in mirrored]
    away = np.array([[great_circle_km(*place, s.lat, s.lon) for s in storms] for place in ((17.5, 255.0), (17.5, 242.5))])
    assert (away.min(axis=1) < 3.0 * KM_PER_DEGREE).all()
    others = sum(abs(s.lat) <= 50 and far > 3.0 * KM_PER_DEGREE for s, far in zip(storms, away.min(axis=0), strict=True))
    assert others <= 2

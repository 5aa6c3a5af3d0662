"""Regridding: constants and integrals stay, lines stay lines, the seam does not show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.climate.grid import EARTH_RADIUS_KM, Grid, great_circle_km
from raysegment.climate.regrid import destination, regrid, sample, to_spacing

GRID = Grid.global_(46, 90)
REGION = Grid(np.linspace(10.0, 50.0, 41), np.linspace(100.0, 160.0, 61))


def wave(grid: Grid) -> np.ndarray:
    phi, lam = np.deg2rad(grid.lat)[:, None], np.deg2rad(grid.lon)[None, :]
    return np.sin(phi) + 0.5 * np.cos(phi) ** 2 * np.cos(2 * lam)


@settings(max_examples=30, deadline=None)
@given(dlat=st.floats(0.7, 12.0), dlon=st.floats(0.7, 12.0), seed=st.integers(0, 999))
def test_probabilities_stay_probabilities(dlat, dlon, seed):
    logits = np.random.default_rng(seed).normal(size=(3, *GRID.shape))
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    there = regrid(shares, GRID, to_spacing(GRID, dlat, dlon))
    assert np.allclose(there.sum(axis=0), 1.0)
    assert there.min() >= shares.min() - 1e-12
    assert there.max() <= shares.max() + 1e-12


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1.3, 6.0), seed=st.integers(0, 999))
def test_coarsening_keeps_the_integral(factor, seed):
    field = np.random.default_rng(seed).normal(size=GRID.shape) + 3.0
    rows = Grid(np.arange(-89.0, 90.0, 2.0), GRID.lon)  # cells that end at the poles, as do the coarse ones
    field = regrid(field, GRID, rows)
    coarse = Grid(np.arange(-90.0 + 90.0 / 15, 90.0, 180.0 / 15), np.arange(int(90 / factor)) * (360.0 / int(90 / factor)))
    assert (regrid(field, rows, coarse) * coarse.area_km2).sum() == pytest.approx((field * rows.area_km2).sum(), rel=1e-9)


def test_refining_converges_with_the_square_of_the_spacing():
    fine = Grid.global_(361, 720)
    errors = [np.abs(regrid(wave(g), g, fine) - wave(fine)).max() for g in (Grid.global_(46, 90), Grid.global_(91, 180))]
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.2)


def test_there_and_back_is_close():
    coarse = to_spacing(GRID, 8.0, 8.0)
    assert np.abs(regrid(regrid(wave(coarse), coarse, GRID), GRID, coarse) - wave(coarse)).max() < 0.05


def test_the_seam_does_not_show():
    for target in (to_spacing(GRID, 1.0, 1.0), to_spacing(GRID, 10.0, 12.0)):
        columns = target.lon.size // 6
        turned = regrid(np.roll(wave(GRID), GRID.lon.size // 6, axis=1), GRID, target)
        assert np.allclose(turned, np.roll(regrid(wave(GRID), GRID, target), columns, axis=1), atol=1e-6)


def test_the_same_grid_changes_nothing_and_types_stay():
    field = wave(GRID).astype(np.float32)
    assert np.array_equal(regrid(field, GRID, GRID), field)
    assert regrid(field, GRID, to_spacing(GRID, 1.0, 1.0)).dtype == np.float32
    assert regrid(field.astype(np.float16), GRID, to_spacing(GRID, 9.0, 9.0)).dtype == np.float32


def test_a_region_keeps_its_edges():
    linear = REGION.lat[:, None] + 2.0 * REGION.lon[None, :]
    target = to_spacing(REGION, 0.5, 0.5)
    assert not target.periodic
    assert np.allclose(regrid(linear, REGION, target), target.lat[:, None] + 2.0 * target.lon[None, :])
    coarse = regrid(np.full(REGION.shape, 7.0), REGION, to_spacing(REGION, 5.0, 6.0))
    assert np.allclose(coarse, 7.0)


def test_spacing_of_the_new_grid():
    grid = to_spacing(Grid.global_(73, 144), 0.25, 0.3125)
    assert grid.shape == (721, 1152)
    assert grid.periodic
    assert grid.lat[0] == -90
    assert grid.lat[-1] == 90
    offset = Grid(np.arange(-89.5, 90.0), np.arange(360) + 0.5)
    assert to_spacing(offset, 1.0, 1.0).same_as(offset)


def test_samples_between_cells_and_over_greenwich():
    field = np.broadcast_to(np.cos(np.deg2rad(GRID.lon)), GRID.shape)
    assert sample(field, GRID, np.array(0.0), np.array(358.0)) == pytest.approx((field[0, -1] + field[0, 0]) / 2)
    assert sample(field, GRID, np.array(95.0), np.array(-4.0)) == pytest.approx(field[0, -1])


@given(lat=st.floats(-89, 89), lon=st.floats(0, 359), bearing=st.floats(0, 360), km=st.floats(1, 9000))
def test_a_destination_lies_at_its_distance(lat, lon, bearing, km):
    there = destination(np.array(lat), np.array(lon), np.array(bearing), np.array(km))
    assert great_circle_km(lat, lon, *there) == pytest.approx(km, rel=1e-6, abs=1e-3)


def test_north_and_east_are_where_they_should_be():
    degree_km = np.pi * EARTH_RADIUS_KM / 180
    lat, lon = destination(np.array(10.0), np.array(350.0), np.array([0.0, 90.0]), np.array(20.0 * degree_km))
    assert lat[0] == pytest.approx(30.0)
    assert lon[0] == pytest.approx(350.0)
    assert 0 < lon[1] < 15

"""River rules: long and narrow streams in either hemisphere, over any meridian; every limit matters."""

from __future__ import annotations

from dataclasses import replace

import netCDF4
import numpy as np
import pytest

from raysegment.archive.axes import Axes
from raysegment.climate.channels import INDEX
from raysegment.climate.grid import KM_PER_DEGREE, Grid
from raysegment.climate.regions import axis_km, cut_regions, label_regions, region_areas_km2
from raysegment.climate.rivers import IVT_SLOPE, RIVER_PRESETS, detect_rivers, ivt_stand_in, laplacian
from tests.helpers import real_data
from tests.weather import add_stream, quiet

COARSE, FINE = Grid.global_(73, 144), Grid.global_(181, 360)
PLACES = [(42.0, 0.0), (-40.0, 180.0), (38.0, 300.0), (-48.0, 359.0)]
BY_SHAPE = ("ivt", "guan_waliser")


def stream_at(grid: Grid, lat: float, lon: float, **properties: float) -> np.ndarray:
    fields = quiet(grid)
    add_stream(fields, grid, lat, lon, **properties)
    return fields


@pytest.mark.parametrize("name", ["ivt", "tempest", "guan_waliser"])
@pytest.mark.parametrize("grid", [COARSE, FINE], ids=["2.5", "1"])
@pytest.mark.parametrize("place", PLACES)
def test_found_once_wherever_it_lies(name, grid, place):
    river = detect_rivers(stream_at(grid, *place), grid, RIVER_PRESETS[name])
    labels, count = label_regions(river, grid.periodic)
    assert count == 1
    assert river[grid.nearest(*place)]
    (region,) = cut_regions(labels, [1])
    length_km = axis_km(region, grid)[0]
    assert 2500 < length_km < 5500
    assert region_areas_km2(labels, count, grid)[0] / length_km < 1000


def test_paper_rule_finds_a_meridional_plume():
    fields = stream_at(FINE, 45.0, 0.0, length_km=3500.0, slope_deg=75.0)
    river = detect_rivers(fields, FINE, RIVER_PRESETS["paper2018"])
    assert river[FINE.nearest(45.0, 0.0)]
    fields = stream_at(FINE, 45.0, 0.0, length_km=3500.0, slope_deg=3.0)  # a zonal one fails its width test
    assert not detect_rivers(fields, FINE, RIVER_PRESETS["paper2018"]).any()


@pytest.mark.parametrize("name", BY_SHAPE)
def test_short_and_round_are_no_rivers(name):
    assert not detect_rivers(stream_at(FINE, 42.0, 100.0, length_km=1400.0), FINE, RIVER_PRESETS[name]).any()
    assert not detect_rivers(stream_at(FINE, 45.0, 100.0, length_km=3000.0, width_km=3000.0), FINE, RIVER_PRESETS[name]).any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ivt", {"minimum": 5000.0}), ("ivt", {"min_length_km": 9000.0}), ("ivt", {"min_elongation": 30.0}),
        ("ivt", {"min_abs_lat": 70.0}), ("tempest", {"minimum": 1e6}), ("tempest", {"min_area_km2": 1e8}),
        ("tempest", {"min_abs_lat": 70.0}), ("guan_waliser", {"percentile": 99.99}), ("guan_waliser", {"max_turn_deg": 0.01}),
        ("guan_waliser", {"min_poleward_kg_m_s": 900.0}), ("paper2018", {"minimum": 80.0}),
    ],
    ids=str,
)  # fmt: skip
def test_every_limit_matters(name, change):
    preset = RIVER_PRESETS[name]
    fields = stream_at(FINE, 42.0, 250.0, slope_deg=60.0)
    assert detect_rivers(fields, FINE, preset).any()
    assert not detect_rivers(fields, FINE, replace(preset, **change)).any()


def test_equatorward_transport_is_none_for_guan_waliser():
    fields = stream_at(FINE, 42.0, 100.0)
    fields[[INDEX["U850"], INDEX["V850"]]] *= -1.0
    assert not detect_rivers(fields, FINE, RIVER_PRESETS["guan_waliser"]).any()
    assert detect_rivers(fields, FINE, RIVER_PRESETS["ivt"]).any()


def test_the_edge_of_the_humid_tropics_is_no_river():
    fields = quiet(FINE)
    fields[INDEX["U850"]] = np.where(np.abs(FINE.lat) < 23.0, -20.0, 0.0)[:, None]  # 300 kg/m/s of trade wind
    fields[INDEX["U850"]][:, 180:] = 0.0
    assert (ivt_stand_in(fields) > 250).any()
    assert not detect_rivers(fields, FINE, RIVER_PRESETS["ivt"]).any()


def test_blanked_cells_are_left_out_before_shapes_are_judged():
    fields = stream_at(FINE, 42.0, 100.0, length_km=3600.0)
    preset = RIVER_PRESETS["ivt"]
    nowhere = np.zeros(FINE.shape, bool)
    assert np.array_equal(detect_rivers(fields, FINE, preset, nowhere), detect_rivers(fields, FINE, preset))
    middle = FINE.distance_km(42.0, 100.0) < 500.0
    assert not detect_rivers(fields, FINE, preset, middle).any()  # two halves of 1300 km


def test_a_given_ivt_takes_the_place_of_the_stand_in():
    fields = stream_at(FINE, 42.0, 100.0)
    expected = detect_rivers(fields, FINE, RIVER_PRESETS["ivt"])
    assert np.array_equal(detect_rivers(None, FINE, RIVER_PRESETS["ivt"], ivt=ivt_stand_in(fields)), expected)
    assert not detect_rivers(fields, FINE, RIVER_PRESETS["ivt"], ivt=np.zeros(FINE.shape)).any()


def test_stand_in_is_vapour_times_wind_speed():
    fields = quiet(COARSE)
    fields[INDEX["TMQ"]], fields[INDEX["U850"]], fields[INDEX["V850"]] = 40.0, -3.0, 4.0
    assert ivt_stand_in(fields) == pytest.approx(IVT_SLOPE * 200.0)
    fields[INDEX["TMQ"]] = -0.01  # packed files undershoot
    assert (ivt_stand_in(fields) == 0).all()


def test_laplacian_of_the_lowest_harmonic():
    """∇² sin φ = −2 sin φ; the mean over a circle of radius r is cos r sin φ, so 4 / r² (cos r − 1) sin φ is exact."""
    grid = Grid.global_(361, 720)
    field = np.broadcast_to(np.sin(np.deg2rad(grid.lat))[:, None], grid.shape)
    r = np.deg2rad(10.0)
    assert np.allclose(laplacian(field, grid), 4.0 / r**2 * (np.cos(r) - 1.0) * field, atol=0.02)
    assert 4.0 / r**2 * (np.cos(r) - 1.0) == pytest.approx(-2.0, rel=0.01)


def test_length_follows_a_bend():
    """Three quarters of a circle of 1500 km, 300 km wide, over the date line: its axis, not its chord."""
    distance = FINE.distance_km(0.0, 180.0)
    ring = (np.abs(distance - 1500.0) < 150.0) & ~((FINE.lat[:, None] > 0) & (FINE.lon[None, :] > 180.0))
    labels, count = label_regions(ring, True)
    assert count == 1
    assert axis_km(cut_regions(labels, [1])[0], FINE)[0] == pytest.approx(1.5 * np.pi * 1500.0, rel=0.06)


@pytest.mark.parametrize("lon", [0, 90])
def test_length_of_a_meridional_bar_is_its_cells(lon):
    bar = np.zeros(FINE.shape, bool)
    bar[100:131, [lon - 1, lon, lon + 1]] = True
    labels, _ = label_regions(bar, True)
    assert axis_km(cut_regions(labels, [1])[0], FINE)[0] == pytest.approx(31 * KM_PER_DEGREE, rel=0.04)


def test_a_band_around_the_world_has_its_length():
    band = np.zeros(FINE.shape, bool)
    band[148:153] = True  # 60N: half round is the farthest that two cells can be apart
    labels, count = label_regions(band, True)
    assert count == 1
    assert axis_km(cut_regions(labels, [1])[0], FINE)[0] == pytest.approx(180 * 0.5 * KM_PER_DEGREE, rel=0.1)


@pytest.mark.parametrize("name", ["ivt", "tempest", "guan_waliser"])
def test_rivers_of_the_real_map(name):
    """MERRA-2, 28 February 2017: the great river off Chile, one across the North Atlantic, none on the equator."""
    with netCDF4.Dataset(str(real_data("merra2_iwv_ivt_2017-02-28T00.nc"))) as data:
        axes = Axes(data["lat"][:].data, data["lon"][:].data)
        ivt = axes.to_canonical(data["IVT"][0].data)
    grid = axes.grid
    river = detect_rivers(None, grid, RIVER_PRESETS[name], ivt=ivt)
    assert river[grid.nearest(-43.0, 278.0)]
    assert river[grid.nearest(45.0, 330.0)]
    share = float((river * grid.area_km2).sum() / (grid.area_km2.sum() * grid.lon.size))
    assert 0.02 < share < 0.15
    turned = np.roll(ivt, 200, axis=1)
    assert np.mean(np.roll(river, 200, axis=1) != detect_rivers(None, grid, RIVER_PRESETS[name], ivt=turned)) < 0.005

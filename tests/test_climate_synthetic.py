"""The synthetic atmosphere: reproducible, plausible, in balance, and labelled as promised."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from raysegment.climate.channels import CHANNELS, CYCLONE, INDEX, RIVER
from raysegment.climate.grid import Grid, gradient, vorticity
from raysegment.climate.noise import smooth_noise, sphere_points
from raysegment.climate.storms import AIR_DENSITY_KG_M3, Filament, Vortex, coriolis, filament_path
from raysegment.climate.synthetic import SyntheticConfig, SyntheticSnapshot, generate, mask_radius_km

CONFIG = SyntheticConfig(snapshots=24, seed=7)


@lru_cache
def snapshot(index: int) -> SyntheticSnapshot:
    return generate(CONFIG, index)


def field(s: SyntheticSnapshot, name: str) -> np.ndarray:
    return s.fields[INDEX[name]]


def vortex(**changes) -> Vortex:
    values = dict(lat=15.0, lon=180.0, wind_m_s=40.0, core_km=100.0, decay=0.5, outer_km=1000.0, warmth=1.0, upper_share=0.4,
                  moisture_kg_m2=65.0, moist_radius_km=400.0, inflow_deg=20.0)  # fmt: skip
    return Vortex(**{**values, **changes})


def test_same_index_same_bytes_and_another_seed_another_world() -> None:
    assert generate(CONFIG, 5).fields.tobytes() == snapshot(5).fields.tobytes()
    assert not np.array_equal(generate(SyntheticConfig(snapshots=24, seed=8), 5).fields, snapshot(5).fields)


@pytest.mark.parametrize("index", [0, 7, 12, 19])
def test_every_field_is_plausible(index: int) -> None:
    for channel, values in zip(CHANNELS, snapshot(index).fields, strict=True):
        assert np.isfinite(values).all(), channel.name
        assert channel.minimum <= values.min(), channel.name
        assert values.max() <= channel.maximum, channel.name


def test_storms_stand_on_both_seams_and_both_hemispheres() -> None:
    lons = np.array([c.lon for i in range(0, 12, 3) for c in snapshot(i).cyclones[:1]])
    assert (np.abs((lons + 180) % 360 - 180) < 6).any(), "none across Greenwich"
    assert (np.abs(lons - 180) < 6).any(), "none across the date line"
    lats = np.array([c.lat for i in range(12) for c in snapshot(i).cyclones])
    assert (lats > 5).any()
    assert (lats < -5).any()


def test_seasons_warm_the_right_hemisphere() -> None:
    july, january = snapshot(13), snapshot(0)
    assert 150 < july.day_of_year < 230
    assert january.day_of_year < 40
    north = CONFIG.grid.lat > 40
    assert field(july, "TREFHT")[north].mean() > field(january, "TREFHT")[north].mean() + 4
    assert field(july, "TREFHT")[~north & (CONFIG.grid.lat < -40)].mean() < field(january, "TREFHT")[CONFIG.grid.lat < -40].mean()


def test_cyclones_are_lows_with_warm_cores_and_cyclonic_wind() -> None:
    grid, checked = CONFIG.grid, 0
    for index in range(6):
        s = snapshot(index)
        spin = vorticity(field(s, "U850"), field(s, "V850"), grid) * np.sign(grid.lat)[:, None]
        for storm in s.cyclones:
            away = grid.distance_km(storm.lat, storm.lon)
            near, ring = away < 300, (away > 900) & (away < 1300)
            if storm.wind_m_s < 28:
                continue
            assert field(s, "PSL")[near].min() < field(s, "PSL")[ring].mean() - 300
            assert field(s, "T500")[near].max() > field(s, "T500")[ring].mean()
            assert spin[near].max() > 3e-5
            checked += 1
    assert checked > 5


def test_labels_cover_the_storms_and_rivers_are_long() -> None:
    for index in range(6):
        s = snapshot(index)
        for storm in s.cyclones:
            inside = CONFIG.grid.distance_km(storm.lat, storm.lon) <= mask_radius_km(storm, CONFIG.grid)
            assert (s.mask[inside] == CYCLONE).all()
        assert (s.mask == RIVER).any()
        assert 0.9 < (s.mask == 0).mean() < 0.999


def test_wind_follows_pressure_in_the_middle_latitudes() -> None:
    s, grid = snapshot(3), CONFIG.grid
    band = (np.abs(grid.lat) > 35) & (np.abs(grid.lat) < 60)
    east, _ = gradient(field(s, "PSL").astype(float), grid)
    geostrophic = east / (coriolis(grid.lat)[:, None] * AIR_DENSITY_KG_M3)
    ocean = field(s, "PS")[band] > 97000
    assert np.corrcoef(geostrophic[band][ocean], field(s, "V850")[band][ocean])[0, 1] > 0.75


def test_below_ground_levels_repeat_the_lowest_as_in_cam() -> None:
    s = snapshot(2)
    high = 0.9925 * field(s, "PS") < 85000
    assert high.any()
    assert np.array_equal(field(s, "U850")[high], field(s, "UBOT")[high])
    assert field(s, "Z1000")[high].min() > 500


def test_land_is_where_it_is_said_to_be() -> None:
    land = np.zeros(CONFIG.grid.shape)
    land[:, :40] = 1.0
    s = generate(CONFIG, 2, land)
    tropics = np.abs(CONFIG.grid.lat) < 60
    height = field(s, "PSL") - field(s, "PS")
    assert height[tropics][:, :40].mean() > 500
    assert np.abs(height[tropics][:, 41:]).max() < 50
    assert not np.array_equal(s.fields, snapshot(2).fields)


def test_gradient_wind_balance_holds() -> None:
    storm, radius = vortex(), np.array([60.0, 100.0, 250.0, 600.0])
    slope = (storm.deficit_pa(radius - 2) - storm.deficit_pa(radius + 2)) / 4e3
    speed = storm.speed(radius)
    expected = AIR_DENSITY_KG_M3 * (speed**2 / (radius * 1e3) + coriolis(15.0) * speed)
    assert slope == pytest.approx(expected, rel=0.02)
    assert storm.speed(np.array([100.0]))[0] == pytest.approx(40.0, rel=0.02)


@pytest.mark.parametrize(("lat", "sign"), [(15.0, 1), (-15.0, -1)])
def test_vortex_turns_with_its_hemisphere_across_the_seam(lat: float, sign: int) -> None:
    grid = Grid.global_(181, 360)
    _, v = vortex(lat=lat, lon=0.5).winds(grid)
    row, column = grid.nearest(lat, 2.5)
    assert sign * v[row, column] > 20  # east of the centre the wind blows poleward
    west = grid.nearest(lat, 358.5)
    assert sign * v[west] < -20


def test_radius_of_a_wind_is_where_it_blows() -> None:
    storm = vortex()
    assert storm.speed(np.array([storm.radius_of(17.0)]))[0] == pytest.approx(17.0, rel=0.05)
    assert storm.radius_of(90.0) == 0.0


def test_filament_peaks_on_its_path_and_points_along_it() -> None:
    lat, lon = filament_path(30.0, 350.0, 45.0, 0.0, 3000.0)
    cross, east, north = Filament(lat, lon, 250.0, 20.0, 15.0, True).profile(Grid.global_(91, 180))
    middle = Grid.global_(91, 180).nearest(lat[25], lon[25])
    assert cross[middle] > 0.9
    assert east[middle] > 0.4
    assert north[middle] > 0.4
    assert cross[Grid.global_(91, 180).nearest(-40.0, 180.0)] < 1e-6


def test_noise_has_unit_variance_and_the_asked_for_scale() -> None:
    points = sphere_points(Grid.global_(91, 180))
    broad, fine = (smooth_noise(np.random.default_rng(1), points, scale, 256) for scale in (8000.0, 1500.0))
    assert np.std(broad) == pytest.approx(1.0, abs=0.35)
    assert np.std(np.diff(fine, axis=1)[30:60]) > 3 * np.std(np.diff(broad, axis=1)[30:60])


@pytest.mark.parametrize("bad", [dict(snapshots=0), dict(height=3), dict(runs=0)])
def test_config_refuses_nonsense(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected at least"):
        SyntheticConfig(**bad)

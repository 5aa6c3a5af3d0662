"""Maps in cartopy's projections: every point of the world where the projection has it, and nothing without cartopy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from raysegment.applications.canvas import MIDDLE_DEG
from raysegment.applications.densities import draw_density
from raysegment.applications.maps import Scene, draw_map
from raysegment.applications.projections import AUTO, PLATE_CARREE, PROJECTIONS, Projection, projection_of
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.climate.channels import CYCLONE
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from tests.test_applications_maps import STORM, pixels

GRID = Grid.global_(37, 72)
ROUND = [name for name in PROJECTIONS if name not in (AUTO, PLATE_CARREE)]


def opened(name: str) -> Projection:
    found = projection_of(name, MIDDLE_DEG)
    assert found is not None
    return found


def pixel_of(projection: Projection, lat: float, lon: float) -> tuple[int, int]:
    (x, y), (xs, ys) = projection.place(lat, lon), projection.axes
    return int(np.abs(ys - y).argmin()), int(np.abs(xs - x).argmin())


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(ROUND), lat=st.floats(-75.0, 75.0), lon=st.floats(0.0, 359.9))
def test_every_pixel_shows_the_point_that_lies_there(name, lat, lon):
    pytest.importorskip("cartopy")
    projection = opened(name)
    place = pixel_of(projection, lat, lon)
    assert projection.lat[place] == pytest.approx(lat, abs=0.5) or np.isnan(projection.lat[place])  # the rim's last pixel
    height = np.repeat(GRID.lat[:, None], GRID.lon.size, axis=1)
    seen = projection.sample(height, GRID)
    np.testing.assert_allclose(seen, np.where(np.isnan(projection.lat), np.nan, projection.lat), atol=1e-6)
    row, column = GRID.nearest(lat, lon)
    inside = np.zeros(GRID.shape, bool)
    inside[row, column] = True
    shown = np.nan_to_num(projection.sample(inside, GRID, smooth=False)) > 0.5
    away = np.abs((projection.lon[shown] - GRID.lon[column] + 180.0) % 360.0 - 180.0)
    assert away.size
    assert away.max() <= GRID.dlon / 2 + 1e-6
    assert np.abs(projection.lat[shown] - GRID.lat[row]).max() <= GRID.dlat / 2 + 1e-6


def test_the_corners_are_outside_the_world_and_a_region_ends_where_it_ends():
    pytest.importorskip("cartopy")
    projection = opened("robinson")
    assert np.isnan(projection.lat[[0, 0, -1, -1], [0, -1, 0, -1]]).all()
    assert 0.75 < np.isfinite(projection.lat).mean() < 0.95
    region = Grid(np.arange(10.0, 31.0), np.arange(350.0, 371.0))
    seen = projection.sample(np.ones(region.shape), region)
    lon = (projection.lon + 180.0) % 360.0 - 180.0
    expected = (np.abs(projection.lat - 20.0) <= 10.5) & (np.abs(lon) <= 10.5)
    assert (np.isfinite(seen) != expected).mean() < 0.001


def test_pictures_use_cartopy_where_it_is_and_never_need_it(tmp_path, monkeypatch):
    mask = np.zeros(GRID.shape, np.uint8)
    mask[GRID.distance_km(17.0, 255.0) < 900.0] = CYCLONE
    scene = Scene(np.ones(GRID.shape), GRID, {"one": mask}, "TMQ", "cyclone", tracks=[STORM])
    write_masks(tmp_path / "one.mask.nc", mask[None], Axes.of(GRID), [None], "test")
    flat = draw_map(tmp_path / "flat.png", scene, zoom=False, projection=PLATE_CARREE)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cartopy", None)
        plain = draw_map(tmp_path / "plain.png", scene, zoom=False)
        with pytest.raises(BadInput, match="pip install cartopy"):
            draw_map(tmp_path / "no.png", scene, projection="robinson")
    np.testing.assert_array_equal(image.imread(plain), image.imread(flat))
    with pytest.raises(BadInput, match=r"robinson.*mercator"):
        projection_of("mercator", MIDDLE_DEG)
    pytest.importorskip("cartopy")
    curved = draw_map(tmp_path / "curved.png", scene, zoom=False)
    assert pixels(curved, True) > 2000
    assert image.imread(curved).shape != image.imread(flat).shape or (image.imread(curved) != image.imread(flat)).mean() > 0.05
    often = draw_density([tmp_path / "one.mask.nc"], tmp_path / "often.png", counts=False)
    assert pixels(often["picture"], True) > 500

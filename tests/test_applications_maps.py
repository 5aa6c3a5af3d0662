"""Pictures: of the promised size, with every class, storm and coast where it belongs."""

from __future__ import annotations

import netCDF4
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image

from raysegment.applications.canvas import WORLD, Frame
from raysegment.applications.coast import coast_distance_km, land_share
from raysegment.applications.drawable import Drawable
from raysegment.applications.maps import Scene, draw_map, home, zoom_frames
from raysegment.applications.pictures import draw_files
from raysegment.applications.tracks import Storm
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.archive.snapshots import open_source, write_climatenet
from raysegment.climate.channels import CYCLONE, INDEX, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.rivers import RIVER_PRESETS, detect_rivers, ivt_stand_in
from raysegment.climate.rules import parse_rules
from tests.helpers import real_data
from tests.weather import add_stream, add_vortex, quiet

GRID = Grid.global_(37, 72)
STORM = Storm("JOVA", 17.0, 255.0, status="HU", wind_kt=105.0)


def pixels(path, red: bool) -> int:
    """Pixels that are clearly red (cyclones) or blue (rivers)."""
    r, _, b = (image.imread(path)[..., channel] for channel in range(3))
    return int((r - b > 0.2).sum() if red else (b - r > 0.12).sum())


def test_classes_have_their_colours(tmp_path):
    field = quiet(GRID)[INDEX["TMQ"]]
    mask = np.zeros(GRID.shape, np.uint8)
    empty = draw_map(tmp_path / "empty.png", Scene(field, GRID, {"nothing": mask}, "TMQ (kg m-2)", "empty"))
    mask[GRID.distance_km(17.0, 255.0) < 900.0] = CYCLONE
    red = draw_map(tmp_path / "red.png", Scene(field, GRID, {"one": mask}, "TMQ (kg m-2)", "cyclone"))
    blue = draw_map(tmp_path / "blue.png", Scene(field, GRID, {"two": (mask * 2).astype(np.uint8)}, "TMQ (kg m-2)", "river"))
    assert image.imread(empty).shape[1] >= 1600
    assert pixels(red, True) > pixels(empty, True) + 2000
    assert abs(pixels(red, False) - pixels(empty, False)) < 500
    assert pixels(blue, False) > pixels(empty, False) + 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blue.png", "empty.png", "red.png"]


def test_panels_for_every_labeller_and_group_of_storms(tmp_path):
    fields = quiet(GRID)
    add_vortex(fields, GRID, 17.0, 255.0)
    add_stream(fields, GRID, 42.0, 0.0)
    field = ivt_stand_in(fields)
    masks = {name: parse_rules(name).label(fields, GRID) for name in ("default", "teca+ivt")}
    world = image.imread(draw_map(tmp_path / "w.png", Scene(field, GRID, masks, tracks=[STORM]), zoom=False))
    one = image.imread(draw_map(tmp_path / "z.png", Scene(field, GRID, masks, tracks=[STORM])))
    storms = [STORM, Storm("X", -15.0, 60.0)]
    two = image.imread(draw_map(tmp_path / "y.png", Scene(field, GRID, masks, tracks=storms)))
    assert world.shape[0] < one.shape[0] < two.shape[0]
    assert world.shape[1] == one.shape[1] == two.shape[1]


@settings(max_examples=50, deadline=None)
@given(places=st.lists(st.tuples(st.floats(-60, 60), st.floats(0, 359.9)), min_size=1, max_size=8))
def test_every_storm_lies_in_a_zoomed_frame(places):
    storms = [Storm(str(k), lat, lon) for k, (lat, lon) in enumerate(places)]
    frames = zoom_frames(storms)
    assert 1 <= len(frames) <= len(storms)
    for storm in storms:
        assert any(f.west <= storm.lon <= f.east and f.south <= storm.lat <= f.north for f in frames)
    for frame in frames:
        assert frame.size[0] == pytest.approx(2 * frame.size[1])
        assert -90 <= frame.south < frame.north <= 90
    assert zoom_frames([]) == []


def test_near_storms_share_a_frame():
    near = [Storm("a", 15.0, 243.0), Storm("b", 17.0, 254.0), Storm("c", 8.0, 129.0)]
    assert len(zoom_frames(near)) == 2


def test_land_is_where_it_is():
    grid = Grid.global_(181, 360)
    land = land_share(grid)
    places = {(23.0, 10.0): 1.0, (45.0, 100.0): 1.0, (-49.0, 237.0): 0.0, (-90.0, 0.0): 1.0, (-40.0, 330.0): 0.0}
    for place, share in places.items():
        assert land[grid.nearest(*place)] == pytest.approx(share)
    assert float((land * grid.area_km2).sum() / (grid.area_km2.sum() * 360)) == pytest.approx(0.292, abs=0.01)
    fine, distance_km = coast_distance_km(10)
    assert distance_km[fine.nearest(-49.0, 237.0)] > 2600  # Point Nemo
    assert distance_km[fine.nearest(45.0, 86.0)] < -1000


def test_fields_by_name(tmp_path):
    fields = quiet(GRID)
    fields[INDEX["UBOT"]], fields[INDEX["VBOT"]] = 3.0, -4.0
    fields[INDEX["U850"]], fields[INDEX["V850"]] = 0.0, 10.0
    path = tmp_path / "data-2001-07-01-02-1.nc"
    write_climatenet(path, fields, GRID, None)
    with Drawable(path) as file:
        assert file.read("WIND", 0)[0] == pytest.approx(5.0)
        assert file.read("PSL", 0)[1] == "pressure at sea level (Pa)"
        assert file.read("TMQ", 0)[1] == "total precipitable water (kg m⁻²)"
        values, label = file.read("IVT", 0)
        assert values == pytest.approx(0.97 * 15.0 * 10.0)
        assert "0.97" in label
        assert file.mask(0) is None
        with pytest.raises(BadInput, match=r"holds: TMQ, U850.*got SST"):
            file.read("SST", 0)


def test_a_file_that_holds_little_else_than_its_vapour_transport(tmp_path):
    path = tmp_path / "flux.nc"
    with netCDF4.Dataset(path, "w") as data:
        for name, values in (("lat", GRID.lat), ("lon", GRID.lon)):
            data.createDimension(name, values.size)
            data.createVariable(name, "f8", (name,))[:] = values
        for name, value in (("viwve", 300.0), ("viwvn", -400.0), ("CAPE", 7.0)):
            data.createVariable(name, "f4", ("lat", "lon"))[:] = np.full(GRID.shape, value)
            data[name].units = "J kg**-1" if name == "CAPE" else "kg m**-1 s**-1"
        data.createVariable("empty", "f4", ("lat", "lon"))
    with Drawable(path) as file:
        assert file.read("IVT", 0)[0] == pytest.approx(500.0)
        assert file.read("CAPE", 0)[1] == "CAPE (J kg⁻¹)"
        for absent in ("TMQ", "WIND"):
            with pytest.raises(BadInput, match=f"CAPE.*got {absent}"):
                file.read(absent, 0)
        with pytest.raises(BadInput, match="values of empty"):
            file.read("empty", 0)


def test_real_vapour_transport_with_rivers(tmp_path):
    source = real_data("merra2_iwv_ivt_2017-02-28T00.nc")
    with Drawable(source) as opened:
        ivt, label = opened.read("IVT", 0)
        mask = np.where(detect_rivers(None, opened.grid, RIVER_PRESETS["ivt"], ivt=ivt), RIVER, 0).astype(np.uint8)
        axes = Axes.of(opened.grid)
        write_masks(tmp_path / "m" / f"{source.stem}.mask.nc", mask[None], axes, opened.times, "rules:ivt")
    assert 1000.0 < ivt.max() < 3000.0
    assert label == "integrated vapour transport (kg m⁻¹ s⁻¹)"
    picture = draw_files(source, [tmp_path / "m"], tmp_path / "map.png", "IVT")
    assert pixels(picture, False) > 5000


def test_regional_and_turned_grids_are_drawn(tmp_path):
    region = Grid(np.linspace(5.0, 30.0, 26), np.linspace(230.0, 279.0, 50))
    mask = np.where(region.distance_km(17.0, 255.0) < 400.0, CYCLONE, 0).astype(np.uint8)
    field = np.broadcast_to(region.lon, region.shape)
    assert pixels(draw_map(tmp_path / "r.png", Scene(field, region, {"region": mask}, tracks=[STORM])), True) > 2000
    assert home(GRID) == Frame(20.0, 380.0, -90.0, 90.0) == WORLD
    assert home(region) == Frame(228.5, 280.5, 4.5, 30.5), "the region, not a world that is empty but for it"


def test_a_file_with_masks_of_two_labellers(tmp_path):
    fields = quiet(GRID)
    add_vortex(fields, GRID, 17.0, 255.0)
    source = tmp_path / "data-2001-07-01-02-1.nc"
    write_climatenet(source, fields, GRID, None)
    with open_source(source) as opened:
        paths = []
        for name in ("default", "teca"):
            paths.append(tmp_path / name / "data-2001-07-01-02-1.mask.nc")
            write_masks(paths[-1], parse_rules(name).label(fields, GRID)[None], opened.axes, opened.times, name)
    assert pixels(draw_files(source, paths, tmp_path / "map.png", "PSL"), True) > 500
    safe = image.imread(draw_files(source, paths[:1], tmp_path / "safe.png", "PSL", colours="colour-blind"))
    assert (np.abs(safe[..., :3] - np.array([213, 94, 0]) / 255).max(axis=-1) < 0.02).sum() > 50, "vermilion"
    with pytest.raises(BadInput, match="standard, colour-blind"):
        draw_files(source, paths, tmp_path / "none.png", colours="pink")
    with pytest.raises(BadInput, match=r"ends in .png"):
        draw_files(source, paths, tmp_path / "none.doc")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="mask files"):
        draw_files(source, [tmp_path / "empty"], tmp_path / "none.png")
    with pytest.raises(BadInput, match="index from 0 to 0"):
        draw_files(source, paths, tmp_path / "none.png", index=3)
    assert not (tmp_path / "none.png").exists()


def test_the_real_map(tmp_path):
    source, tracks = real_data("gfs_2011-10-11T00.nc"), real_data("ibtracs_2011-10-11T00.csv")
    with open_source(source) as opened:
        snapshot = opened.read(0)
        path = tmp_path / "gfs.mask.nc"
        write_masks(path, parse_rules("default").label(snapshot.fields, snapshot.grid)[None], opened.axes, opened.times, "rules")
    picture = draw_files(source, [path], tmp_path / "map.png", tracks=tracks)
    assert image.imread(picture).shape[1] >= 1600
    assert pixels(picture, True) > 3000
    assert pixels(picture, False) > 3000

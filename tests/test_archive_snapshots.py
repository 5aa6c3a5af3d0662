"""Every layout of source file gives back the same weather, times and labels; the real files open."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cftime
import netCDF4
import numpy as np
import pytest

from raysegment.archive import ground
from raysegment.archive.axes import Axes
from raysegment.archive.snapshots import list_sources, open_source, read_variables, write_climatenet
from raysegment.climate.channels import INDEX, NAMES
from raysegment.climate.grid import Grid
from tests import layouts
from tests.helpers import real_data


def assert_same_weather(fields: np.ndarray, truth: np.ndarray) -> None:
    """Equal to the rounding of a float32 unit conversion, channel by channel."""
    for name, got, wanted in zip(NAMES, fields, truth, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize(
    ("write", "name", "layout", "calendar", "first", "steps"),
    [
        (layouts.climatenet, "data-1996-06-09-01-1.nc", "climatenet", "noleap", (1996, 6, 9, 3), 1),
        (layouts.cam, "CAM5.cam.h2.1996-06-01-00000.nc", "cam", "noleap", (1996, 6, 1, 0), 8),
        (layouts.deepcam, "data-1996-06-09-01-1.h5", "deepcam", "noleap", (1996, 6, 9, 3), 1),
        (layouts.era5, "era5.nc", "cf", "proleptic_gregorian", (1996, 6, 9, 0), 2),
        (layouts.cmip6, "cmip6.nc", "cf", "360_day", (2000, 2, 16, 6), 2),
        (layouts.merra2, "merra2.nc", "cf", "standard", (2017, 2, 28, 1, 30), 1),
        (layouts.gfs, "gfs.nc", "cf", "standard", (2011, 10, 12, 0), 1),
    ],
)
def test_each_layout_gives_back_the_weather(tmp_path, write, name, layout, calendar, first, steps):
    with open_source(write(tmp_path / name)) as source:
        assert (source.layout, source.count, len(source.times)) == (layout, steps, steps)
        assert source.times[0] == cftime.datetime(*first, calendar=calendar)
        assert source.times[0].calendar == calendar
        for step in range(steps):
            snapshot = source.read(step)
            assert_same_weather(snapshot.fields, layouts.weather(step))
            assert snapshot.fields.dtype == np.float32
            assert snapshot.grid.same_as(layouts.GRID)
            assert (snapshot.time, snapshot.index) == (source.times[step], step)
            assert snapshot.source == tmp_path / name


def test_cam_times_are_three_hours_apart_and_leap_day_free(tmp_path):
    with open_source(layouts.cam(tmp_path / "h2.nc")) as source:
        assert [time.hour for time in source.times] == [0, 3, 6, 9, 12, 15, 18, 21]
        assert source.time_labels[1] == "1996-06-01T03:00:00"  # 485 days after 1995-02-01, without a 29 February
        assert not source.has_mask


@pytest.mark.parametrize("time", ["dimension", "variable", "characters", "absent"])
@pytest.mark.parametrize("labels", ["i8", "i1", "f4"])
@pytest.mark.parametrize("label_time", [False, True])
def test_climatenet_editions(tmp_path, time, labels, label_time):
    path = layouts.climatenet(tmp_path / "data-1996-06-09-01-1.nc", time, labels, label_time=label_time)
    with open_source(path) as source:
        snapshot = source.read(0)
    assert source.layout == "climatenet"
    assert snapshot.time == cftime.datetime(1996, 6, 9, 3, calendar="noleap")
    assert snapshot.mask is not None
    assert snapshot.mask.dtype == np.uint8
    np.testing.assert_array_equal(snapshot.mask, layouts.classes())


def test_climatenet_time_comes_from_inside_even_when_the_file_is_renamed(tmp_path):
    assert open_source(layouts.climatenet(tmp_path / "renamed.nc")).read(0).time_label == "1996-06-09T03:00:00"
    nameless = open_source(layouts.climatenet(tmp_path / "nameless.nc", time="absent")).read(0)
    assert (nameless.time, nameless.time_label) == (None, "step 0")


@pytest.mark.parametrize("label_time", [False, True])
def test_one_of_several_label_maps_is_chosen(tmp_path, label_time):
    path = layouts.climatenet(tmp_path / "several.nc", label_maps=3, label_time=label_time)
    for number in range(3):
        mask = open_source(path, label_map=number).read(0).mask
        np.testing.assert_array_equal(mask, layouts.classes(number))


def test_a_file_without_labels_has_no_mask(tmp_path):
    with open_source(layouts.climatenet(tmp_path / "bare.nc", labels="")) as source:
        assert not source.has_mask
        assert source.read(0).mask is None


@pytest.mark.parametrize("channel_first", [False, True])
def test_deepcam_labels(tmp_path, channel_first):
    path = layouts.deepcam(tmp_path / "data-1996-06-09-01-1-ANOMALY.h5", channel_first)
    first, second = (open_source(path, label_map=number).read(0) for number in range(2))
    np.testing.assert_array_equal(first.mask, layouts.classes(0))
    np.testing.assert_array_equal(second.mask, layouts.classes(1))
    np.testing.assert_array_equal(first.fields, layouts.weather())
    assert first.grid.lat[0] == -90.0
    assert first.grid.lon[0] == 0.0


def test_derived_channels_follow_their_formulas(tmp_path):
    with open_source(layouts.era5(tmp_path / "era5.nc")) as source:
        fields = source.read(0).fields
        where = source.describe()
    np.testing.assert_allclose(fields[INDEX["ZBOT"]], 0.22 * fields[INDEX["TREFHT"]], rtol=1e-6)
    np.testing.assert_allclose(fields[INDEX["QREFHT"]], layouts.weather()[INDEX["QREFHT"]], rtol=1e-5)
    assert where["QREFHT"] == "dew point and surface pressure"
    assert where["U850"] == "u[level 1]"
    # a dew point of 20 °C at 1000 hPa: e = 23.38 hPa (Bolton 1980), q = 14.66 g/kg
    assert ground.specific_humidity(np.array(293.15), np.array(1e5)) == pytest.approx(0.01466, rel=2e-3)


def test_below_ground_rule_is_an_option_and_changes_only_what_is_buried(tmp_path):
    path = layouts.gfs(tmp_path / "gfs.nc")
    with_rule, without = open_source(path).read(0).fields, open_source(path, below_ground=False).read(0).fields
    buried_1000 = 0.9925 * without[INDEX["PS"]] < 1e5
    buried_850 = 0.9925 * without[INDEX["PS"]] < 8.5e4
    assert buried_850.any()
    changed = np.abs(with_rule - without) > 1e-3
    assert not changed[[i for i, name in enumerate(NAMES) if name not in ("U850", "V850", "Z1000")]].any()
    assert not (changed[INDEX["U850"]] & ~buried_850).any()
    assert not (changed[INDEX["Z1000"]] & ~buried_1000).any()
    assert changed[INDEX["Z1000"]].sum() > 0.9 * buried_1000.sum()
    np.testing.assert_array_equal(with_rule[INDEX["U850"]][buried_850], without[INDEX["UBOT"]][buried_850])


def test_below_ground_rule_leaves_cam_as_it_is():
    cam = layouts.weather()
    again = ground.apply_below_ground(cam, layouts.orography_m())
    np.testing.assert_allclose(again, cam, rtol=1e-6)
    np.testing.assert_array_equal(ground.apply_below_ground(again, layouts.orography_m()), again)
    assert ground.follows_below_ground(cam)
    assert not ground.follows_below_ground(layouts.weather(mountain_m=0.0)), "no buried level: nothing to tell by"


def test_orography_from_pressures():
    height_m = ground.estimate_orography_m(layouts.weather())
    np.testing.assert_allclose(height_m, layouts.orography_m(), atol=1.0)


@pytest.mark.parametrize("lat_north_first", [False, True])
@pytest.mark.parametrize("start", [-180.0, -90.0, 0.0, 175.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_orientation(tmp_path, lat_north_first, start, transposed):
    order = np.argsort((layouts.GRID.lon - start) % 360.0)
    lon = start + np.arange(36) * 10.0
    lon = np.where(lon > 180.0, lon - 360.0, lon) if start < 0 else lon
    lon = layouts.GRID.lon[order] if start == 175.0 else lon  # begins and ends between two columns
    rows = slice(None, None, -1) if lat_north_first else slice(None)
    dims = ("time", "lon", "lat") if transposed else ("time", "lat", "lon")
    with netCDF4.Dataset(tmp_path / "x.nc", "w") as data:
        for name, size in (("time", 1), ("lat", 19), ("lon", 36)):
            data.createDimension(name, size)
        data.createVariable("lat", "f8", ("lat",))[:] = layouts.GRID.lat[rows]
        data.createVariable("lon", "f8", ("lon",))[:] = lon
        for name, field in zip(NAMES, layouts.weather(), strict=True):
            plane = field[rows][:, order]
            data.createVariable(name, "f4", dims)[0] = plane.T if transposed else plane
    snapshot = open_source(tmp_path / "x.nc", below_ground=False).read(0)
    np.testing.assert_array_equal(snapshot.fields, layouts.weather())
    assert snapshot.grid.same_as(layouts.GRID)
    assert snapshot.time_label == "step 0"


def test_a_region_across_greenwich(tmp_path):
    grid = Grid(np.arange(-20.0, 21.0, 2.0), np.arange(330.0, 391.0, 2.0))
    path = tmp_path / "region.nc"
    write_climatenet(
        path, layouts.weather(0, grid), grid, layouts.classes(0, grid), cftime.datetime(2000, 1, 1, calendar="noleap")
    )
    snapshot = open_source(path).read(0)
    assert snapshot.grid.same_as(grid)
    assert not snapshot.grid.periodic
    np.testing.assert_array_equal(snapshot.fields, layouts.weather(0, grid))


@pytest.mark.parametrize("compression", [0, 4])
def test_climatenet_file_round_trip(tmp_path, compression):
    time = cftime.datetime(1999, 2, 30, 22, 45, calendar="360_day") if compression else cftime.datetime(2004, 2, 29, 21)
    path = tmp_path / "deep" / "data-2004-02-29-07-1.nc"
    write_climatenet(path, layouts.weather(2), layouts.GRID, layouts.classes(2), time, compression)
    with open_source(path) as source:
        snapshot = source.read(0)
    assert source.layout == "climatenet"
    assert (snapshot.time, snapshot.time.calendar) == (time, time.calendar)
    np.testing.assert_array_equal(snapshot.fields, layouts.weather(2))
    np.testing.assert_array_equal(snapshot.mask, layouts.classes(2))
    with netCDF4.Dataset(path) as data:  # as ClimateNet's own loader finds it
        assert data["LABELS"].dtype == np.int64
        assert data["LABELS"].dimensions == ("lat", "lon")
        assert data["time"][0].startswith("data-")
        assert bool(data["TMQ"].filters()["zlib"]) == bool(compression)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_list_sources_takes_files_folders_and_patterns(tmp_path):
    for name in (
        "b/x.nc",
        "b/c/y.h5",
        "a.nc4",
        "a.mask.nc",
        "a.artmip.nc",
        "b/stats.h5",
        "b/.x.nc.17.tmp",
        ".hidden/z.nc",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = [tmp_path / "a.nc4", tmp_path / "b/c/y.h5", tmp_path / "b/x.nc"]
    assert list_sources([tmp_path]) == everything
    assert list_sources([tmp_path / "b", tmp_path / "b/x.nc", tmp_path / "*.nc4"]) == everything
    assert list_sources([str(tmp_path / "**" / "*.h5")]) == [tmp_path / "b/c/y.h5", tmp_path / "b/stats.h5"]


def test_sources_and_snapshots_travel_between_processes(tmp_path):
    source = open_source(layouts.cam(tmp_path / "cam.nc"), below_ground=False)
    twin = pickle.loads(pickle.dumps(source))
    assert (twin.path, twin.below_ground, twin.count) == (source.path, False, 8)
    snapshot = pickle.loads(pickle.dumps(source.read(3)))
    np.testing.assert_array_equal(snapshot.fields, layouts.weather(3))
    assert snapshot.time == source.times[3]


def _mean(path: Path) -> float:
    with open_source(path) as source:
        return float(np.mean([source.read(step).fields.mean() for step in range(source.count)]))


def test_parallel_readers_see_the_same_values(tmp_path):
    paths = [layouts.cmip6(tmp_path / "a.nc"), layouts.deepcam(tmp_path / "data-1996-06-09-01-1.h5")] * 4
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_mean, paths)) == [_mean(path) for path in paths[:2]] * 4


def test_axes_of_source_survive_in_the_snapshot(tmp_path):
    snapshot = open_source(layouts.era5(tmp_path / "era5.nc")).read(1)
    assert snapshot.axes.lat[0] == 90.0
    assert isinstance(snapshot.axes, Axes)


def test_real_forecast():
    with open_source(real_data("gfs_2011-10-11T00.nc")) as source:
        snapshot = source.read(0)
    assert source.layout == "cf"
    assert snapshot.time == cftime.datetime(2011, 10, 11, calendar="standard")
    assert snapshot.grid.shape == (73, 144)
    means = snapshot.fields.mean((1, 2))  # against the published values of ClimateNet
    assert means[INDEX["PSL"]] == pytest.approx(100_900, abs=500)
    assert means[INDEX["Z1000"]] == pytest.approx(470, abs=25), "the below-ground rule makes a forecast like CAM"
    assert snapshot.fields[INDEX["Z1000"]].std() == pytest.approx(810, abs=60)
    jova = snapshot.grid.nearest(17.5, 255.0)
    assert snapshot.fields[INDEX["PSL"]][jova] < 100_000


def test_real_orography_is_recovered_from_pressures():
    path = real_data("gfs_2011-10-11T00.nc")
    fields, height_m = open_source(path, below_ground=False).read(0).fields, read_variables(path, ["PHIS_M"])["PHIS_M"]
    apart = ground.estimate_orography_m(fields) - height_m
    assert np.sqrt(np.mean(apart**2)) < 25.0


def test_real_vapour_transport_is_readable_alone():
    fields = read_variables(real_data("merra2_iwv_ivt_2017-02-28T00.nc"), ["IVT", "IWV"])
    assert fields["IVT"].shape == (361, 576)
    assert 1000.0 < fields["IVT"].max() < 2500.0
    row = fields["IWV"].argmax() // 576
    assert abs(row - 180) < 60, "the most vapour is in the tropics"

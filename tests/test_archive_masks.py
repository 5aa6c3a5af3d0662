"""Masks are CF files that outsiders read, and come back as they were written."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import cftime
import netCDF4
import numpy as np
import pytest
import xarray as xr

from raysegment.archive.axes import Axes
from raysegment.archive.masks import artmip_path, mask_path, read_masks, read_probabilities, write_masks
from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from tests import layouts

NORTH_FIRST = Axes(layouts.GRID.lat[::-1], layouts.LON_180)  # as ERA5, from −180
MASKS = np.stack([layouts.classes(step) for step in range(3)])


def hours(calendar: str) -> list[cftime.datetime]:
    """Three times over the end of February, which every calendar puts elsewhere."""
    day = 30 if calendar == "360_day" else 28
    return [cftime.datetime(2004, 2, day, hour, 30 * (hour > 0), calendar=calendar) for hour in (0, 3, 21)]


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "standard", "proleptic_gregorian", "all_leap", "julian"])
def test_masks_come_back_in_their_calendar(tmp_path, calendar):
    path = tmp_path / "x.mask.nc"
    assert write_masks(path, MASKS, NORTH_FIRST, hours(calendar), "rules:teca+ivt") == [path]
    masks = read_masks(path)
    np.testing.assert_array_equal(masks.masks, MASKS)
    assert masks.masks.dtype == np.uint8
    assert list(masks.times) == hours(calendar)
    assert {time.calendar for time in masks.times} == {calendar}
    assert masks.labeller == "rules:teca+ivt"
    assert masks.grid.same_as(layouts.GRID)
    np.testing.assert_array_equal(masks.axes.lat, NORTH_FIRST.lat)


def test_file_keeps_the_orientation_of_its_source(tmp_path):
    write_masks(tmp_path / "x.mask.nc", MASKS, NORTH_FIRST, hours("noleap"), "x")
    with netCDF4.Dataset(tmp_path / "x.mask.nc") as data:
        assert data.data_model == "NETCDF4_CLASSIC"
        assert data["lat"][0] == 90.0
        assert data["lon"][0] == -180.0
        labels = data["LABELS"]
        assert (labels.dtype, labels.dimensions) == (np.int8, ("time", "lat", "lon"))
        assert labels.flag_values.dtype == np.int8
        assert list(labels.flag_values) == [0, 1, 2]
        assert labels.flag_meanings == "background tropical_cyclone atmospheric_river"
        assert "_FillValue" not in labels.ncattrs()
        assert labels.filters()["zlib"]
        east = (layouts.GRID.lon[5] + 180.0) % 360.0 - 180.0
        np.testing.assert_array_equal(labels[1, ::-1, list(layouts.LON_180).index(east)], MASKS[1, :, 5])
        assert {"title", "institution", "source", "history", "references", "Conventions"} <= set(data.ncattrs())


def test_xarray_sees_integers_and_model_time(tmp_path):
    write_masks(tmp_path / "x.mask.nc", MASKS, Axes.of(layouts.GRID), hours("noleap"), "x", title="Three maps")
    with xr.open_dataset(tmp_path / "x.mask.nc") as data:
        assert data["LABELS"].dtype == np.int8
        np.testing.assert_array_equal(data["LABELS"], MASKS)
        assert data["time"].values[0] == cftime.DatetimeNoLeap(2004, 2, 28)
        assert data.attrs["title"] == "Three maps"


def test_probabilities(tmp_path):
    probabilities = np.random.default_rng(3).dirichlet((4, 1, 1), (3, 19, 36)).astype(np.float32).transpose(0, 3, 1, 2)
    path = tmp_path / "x.mask.nc"
    write_masks(path, MASKS, NORTH_FIRST, hours("noleap"), "network", probabilities=probabilities)
    np.testing.assert_array_equal(read_probabilities(path), probabilities)
    with netCDF4.Dataset(path) as data:
        assert data["LABELS"].ancillary_variables.split() == [f"PROB_{name}" for name in CLASSES]
    write_masks(path, MASKS, NORTH_FIRST, hours("noleap"), "rules")
    assert read_probabilities(path) is None


def test_artmip_file_holds_four_variables(tmp_path):
    path = mask_path(tmp_path, "/archive/1996.h2.nc")
    written = write_masks(path, MASKS, NORTH_FIRST, hours("noleap"), "rules:ivt", artmip=True)
    assert written == [artmip_path(path), path]
    assert artmip_path(path) == tmp_path / "1996.h2.artmip.nc"
    with netCDF4.Dataset(artmip_path(path)) as data:
        assert set(data.variables) == {"ar_binary_tag", "time", "lat", "lon"}
        assert (data["ar_binary_tag"].scheme, data["ar_binary_tag"].version) == ("rules:ivt", "1.0")
    rivers = read_masks(artmip_path(path))
    np.testing.assert_array_equal(rivers.masks, np.where(MASKS == 2, 2, 0))


@pytest.mark.parametrize("value", [0, 1, 2, 3])
def test_other_people_s_tags_are_read_as_one_class(tmp_path, value):
    with netCDF4.Dataset(tmp_path / "tc.nc", "w") as data:
        for name, size in (("time", 1), ("lat", 19), ("lon", 36)):
            data.createDimension(name, size)
        data.createVariable("lat", "f8", ("lat",))[:] = layouts.GRID.lat
        data.createVariable("lon", "f8", ("lon",))[:] = layouts.GRID.lon
        data.createVariable("tc_binary_tag", "i1", ("time", "lat", "lon"))[:] = value
    if value > 1:
        with pytest.raises(BadInput, match="0 or 1"):
            read_masks(tmp_path / "tc.nc")
    else:
        assert (read_masks(tmp_path / "tc.nc").masks == value).all()


def test_labels_inside_sources_are_masks_too(tmp_path):
    climatenet = read_masks(layouts.climatenet(tmp_path / "renamed.nc", label_maps=2), label_map=1)
    deepcam = read_masks(layouts.deepcam(tmp_path / "data-1996-06-09-01-1.h5"), label_map=1)
    for masks in (climatenet, deepcam):
        np.testing.assert_array_equal(masks.masks, layouts.classes(1)[None])
        assert masks.times == (cftime.datetime(1996, 6, 9, 3, calendar="noleap"),)
    with pytest.raises(BadInput, match="labels"):
        read_masks(layouts.cam(tmp_path / "h2.nc"))
    with pytest.raises(BadInput, match="label map below 2"):
        read_masks(tmp_path / "renamed.nc", label_map=2)


def test_unknown_times_are_counted_and_said_to_be_unknown(tmp_path):
    path = tmp_path / "x.mask.nc"
    write_masks(path, MASKS, NORTH_FIRST, [None] * 3, "x")
    masks = read_masks(path)
    assert masks.times == (None, None, None)
    assert masks.time_labels == ("step 0", "step 1", "step 2")
    with netCDF4.Dataset(path) as data:
        assert data["time"].comment.startswith("time unknown")
        assert " since " in data["time"].units, "TempestExtremes reads no file without"


def test_same_input_same_bytes(tmp_path):
    digests = set()
    for name in ("a", "b"):
        path = tmp_path / name / "x.mask.nc"
        write_masks(
            path, MASKS, NORTH_FIRST, hours("noleap"), "x", probabilities=np.full((3, 3, 19, 36), 1 / 3, np.float32), artmip=True
        )
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.parent.iterdir())))
    assert len(digests) == 1


def test_bad_masks_are_refused_and_nothing_is_left(tmp_path):
    path = tmp_path / "x.mask.nc"
    with pytest.raises(BadInput, match="labels of shape"):
        write_masks(path, MASKS[:, :-1], NORTH_FIRST, hours("noleap"), "x")
    with pytest.raises(BadInput, match="3 in 684 of 684"):
        write_masks(path, np.full_like(MASKS, 3), NORTH_FIRST, hours("noleap"), "x")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.mask.nc"
    write_masks(path, MASKS, NORTH_FIRST, hours("noleap"), "x")
    before = path.read_bytes()

    def out_of_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raysegment.archive.masks._create_labels", out_of_space)
    with pytest.raises(OSError, match="No space left"):
        write_masks(path, MASKS[::-1], NORTH_FIRST, hours("noleap"), "y")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_masks_of_a_region_with_a_cyclic_column(tmp_path):
    grid = Grid(np.arange(-20.0, 21.0, 2.0), np.arange(330.0, 391.0, 2.0))
    axes = Axes(grid.lat, (grid.lon + 180.0) % 360.0 - 180.0)
    write_masks(tmp_path / "region.mask.nc", layouts.classes(0, grid)[None], axes, hours("noleap")[:1], "x")
    np.testing.assert_array_equal(read_masks(tmp_path / "region.mask.nc").masks[0], layouts.classes(0, grid))
    cyclic = Axes(layouts.GRID.lat, np.append(layouts.GRID.lon, 360.0))
    write_masks(tmp_path / "cyclic.mask.nc", MASKS, cyclic, hours("noleap"), "x")
    np.testing.assert_array_equal(read_masks(tmp_path / "cyclic.mask.nc").masks, MASKS)


def _checker() -> list[str]:
    """The outside judge of CF files, beside this interpreter."""
    beside = Path(sys.executable).with_name("compliance-checker")
    found = str(beside) if beside.exists() else shutil.which("compliance-checker")
    return [found] if found else pytest.skip("compliance-checker is not installed")


@pytest.mark.parametrize("known", [True, False])
def test_compliance_checker_finds_nothing(tmp_path, known):
    path = tmp_path / "x.mask.nc"
    times = hours("noleap") if known else [None] * 3
    chances = np.full((3, 3, 19, 36), 1 / 3, np.float32)
    files = write_masks(path, MASKS, NORTH_FIRST, times, "rules:teca+ivt", probabilities=chances, artmip=True)
    for file in files:
        report = subprocess.run(
            [*_checker(), "--test=cf:1.8", str(file)], capture_output=True, text=True, timeout=120, check=False
        )
        assert report.returncode == 0, report.stdout + report.stderr
        assert "All tests passed" in report.stdout, report.stdout

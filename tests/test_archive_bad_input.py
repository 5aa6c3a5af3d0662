"""Every kind of unusable file is refused with what was expected, what was found, what to do, and which file."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest

from raysegment.archive.classic import expected_bytes
from raysegment.archive.files import committed
from raysegment.archive.masks import read_masks
from raysegment.archive.snapshots import list_sources, open_source, read_variables, write_climatenet
from raysegment.climate.channels import INDEX
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from tests import layouts
from tests.helpers import real_data


def read_all(path: Path, **options) -> None:
    with open_source(path, **options) as source:
        for index in range(source.count):
            source.read(index)


def refusal(path: Path, **options) -> BadInput:
    """The error that reading all of `path` raises; it names the file and survives pickling."""
    with pytest.raises(BadInput) as caught:
        read_all(path, **options)
    error = caught.value
    assert error.where == str(path)
    assert all((error.expected, error.got, error.remedy))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def _edit(change: Callable[[netCDF4.Dataset], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with netCDF4.Dataset(path, "a") as data:
            change(data)

    return apply


def _set(name: str, where: tuple, value: float) -> Callable[[Path], None]:
    return _edit(lambda data: data[name].__setitem__(where, value))


def _attribute(name: str, key: str, value: object) -> Callable[[Path], None]:
    return _edit(lambda data: data[name].setncattr(key, value))


CAM_DAMAGE = {
    "missing channel": (_edit(lambda data: data.renameVariable("T200", "T250")), "all 16 channels", "none for T200"),
    "wrong unit": (_attribute("PSL", "units", "K"), "PSL", "'K'"),
    "unknown unit": (_attribute("TMQ", "units", "pints"), "TMQ", "pints"),
    "not a number": (_set("QREFHT", (5, 3, 7), np.nan), "QREFHT", "NaN"),
    "fill value": (_set("TS", (2, 18, 35), 9.969209968386869e36), "TS", "NaN"),
    "declared fill value": (
        _attribute("V850", "missing_value", np.float32(layouts.weather(3)[INDEX["V850"]][4, 4])),
        "V850",
        "NaN",
    ),
    "infinite": (_set("U850", (0, 0, 0), np.inf), "U850", "inf"),
    "out of range": (_set("TREFHT", (7, 9, 9), 25.0), "TREFHT", "25 at row 9, column 9 of 1996-06-01T21:00:00"),
    "sea level pressure in hPa without a unit": (_edit(lambda data: _in_hpa(data)), "PSL", "10"),
    "time twice": (_set("time", (3,), 485.25), "ascending", "1996-06-01T06:00:00 twice (step 3)"),
    "time unsorted": (_set("time", (3,), 484.0), "ascending", "1996-05-31T00:00:00 after 1996-06-01T06:00:00"),
    "time not known": (_set("time", (3,), np.nan), "time for every step", "missing value"),
    "time unit": (_attribute("time", "units", "days since yesterday"), "CF time axis", "yesterday"),
    "calendar": (_attribute("time", "calendar", "mayan"), "CF time axis", "mayan"),
    "irregular latitude": (_set("lat", (3,), -59.0), "regular latitude–longitude grid", "lat"),
    "latitude in 2-D": (
        _edit(lambda data: (data.renameVariable("lat", "y"), data.renameVariable("slat", "lat"))),
        "16 channels",
        "none",
    ),
}


def _in_hpa(data: netCDF4.Dataset) -> None:
    data["PSL"].delncattr("units")
    data["PSL"][:] = data["PSL"][:] / 100.0


@pytest.mark.parametrize("damage", CAM_DAMAGE)
def test_damaged_history_file(tmp_path, damage):
    change, expected, got = CAM_DAMAGE[damage]
    path = layouts.cam(tmp_path / "h2.nc")
    read_all(path)
    change(path)
    error = refusal(path)
    assert expected in error.expected
    assert got in error.got


LABEL_DAMAGE = {
    "a fourth class": (_set("LABELS", (4, 5), 3), "0 background", "3 in 1 of 684"),
    "a negative class": (_set("LABELS", (4, 5), -1), "0 background", "-1"),
    "half a class": (_set("LABELS", (4, 5), 0.5), "0 background", "0.5"),
    "no class": (_set("LABELS", (4, 5), np.nan), "0 background", "nan"),
}


@pytest.mark.parametrize("damage", LABEL_DAMAGE)
def test_damaged_labels(tmp_path, damage):
    change, expected, got = LABEL_DAMAGE[damage]
    path = layouts.climatenet(tmp_path / "data-1996-06-09-01-1.nc", labels="f4")
    change(path)
    with pytest.raises(BadInput) as caught:
        read_masks(path)
    for error in (refusal(path), caught.value):
        assert expected in error.expected
        assert got in error.got


def test_labels_of_another_shape(tmp_path):
    path = layouts.climatenet(tmp_path / "x.nc", labels="")
    with netCDF4.Dataset(path, "a") as data:
        data.createDimension("rows", 10)
        data.createVariable("LABELS", "i1", ("rows", "lon"))[:] = 0
    assert "(10, 36)" in refusal(path).got


def test_one_label_map_for_several_times(tmp_path):
    path = layouts.cam(tmp_path / "x.nc")
    with netCDF4.Dataset(path, "a") as data:
        data.createVariable("LABELS", "i1", ("lat", "lon"))[:] = 0
    assert "8 times" in refusal(path).got


def test_a_label_map_that_is_not_there(tmp_path):
    assert "below 3" in refusal(layouts.climatenet(tmp_path / "x.nc", label_maps=3), label_map=3).expected
    deepcam = layouts.deepcam(tmp_path / "data-1996-06-09-01-1.h5")
    assert "below 2" in refusal(deepcam, label_map=2).expected


@pytest.mark.parametrize("write", [layouts.cam, layouts.cmip6, layouts.climatenet, layouts.deepcam])
@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-3, 0.01, 0.3, 0.999])
@pytest.mark.filterwarnings("error")
def test_truncated_file(tmp_path, write, share):
    whole = write(tmp_path / "data-1996-06-09-01-1.nc")
    path = tmp_path / "cut.nc"
    size = int(share * whole.stat().st_size)
    path.write_bytes(whole.read_bytes()[:size])
    error = refusal(path)
    assert "whole" in error.expected or "a netCDF or HDF5 file" in error.expected
    assert "opy or download" in error.remedy
    with pytest.raises(BadInput, match=str(path)):
        read_masks(path)


@pytest.mark.parametrize("kind", ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA"])
@pytest.mark.parametrize("records", [0, 1, 2, 3])
def test_length_of_a_classic_file(tmp_path, kind, records):
    """The library pads to four bytes; the last value ends within that."""
    path = tmp_path / "x.nc"
    with netCDF4.Dataset(path, "w", format=kind) as data:
        data.setncatts({"title": "odd", "numbers": np.arange(3.0)})
        data.createDimension("time", None)
        data.createDimension("x", 3)
        for number in range(records):
            data.createVariable(f"v{number}", "i1" if number == 0 else "f8", ("time", "x"))[:] = np.ones((5, 3))
        last = data.createVariable("fixed", "i2", ("x",))
        last.units = "m"
        last[:] = [1, 2, 3]
    assert 0 <= path.stat().st_size - expected_bytes(path) < 4


def test_real_classic_file_has_its_length():
    path = real_data("merra2_iwv_ivt_2017-02-28T00.nc")
    assert expected_bytes(path) == path.stat().st_size


@pytest.mark.parametrize("flip", [0.4, 0.8])
def test_a_flipped_bit_in_compressed_data(tmp_path, flip):
    path = tmp_path / "x.nc"
    write_climatenet(path, layouts.weather(), layouts.GRID, layouts.classes(), compression=4)
    with h5py.File(path) as file:
        chunk = file["PSL"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + int(flip * chunk.size)] ^= 0xFF
    path.write_bytes(content)
    refusal(path)


def test_not_a_file_of_ours(tmp_path):
    text = tmp_path / "notes.nc"
    text.write_text("hello, I am text")
    assert "begins with" in refusal(text).got
    assert refusal(tmp_path).got == "a folder"
    assert "No such file" in refusal(tmp_path / "absent.nc").got
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = np.zeros(3)
    assert "coordinate" in refusal(tmp_path / "other.h5").expected
    with pytest.raises(BadInput, match="archive files"):
        list_sources([tmp_path / "*.cdf"])


def test_deepcam_of_another_shape(tmp_path):
    path = tmp_path / "data-1996-06-09-01-1.h5"
    with h5py.File(path, "w") as file:
        file["climate/data"] = np.zeros((19, 36, 4), np.float32)
    assert "(19, 36, 4)" in refusal(path).got


def test_a_value_missing_above_the_ground_is_not_forgiven(tmp_path):
    path = layouts.cmip6(tmp_path / "cmip6.nc")
    read_all(path)
    assert "NaN" in refusal(path, below_ground=False).got
    with netCDF4.Dataset(path, "a") as data:
        above = np.argwhere(data["ps"][1] > 100900.0)[0]
        data["ua"][1, 1, above[0], above[1]] = 1e20
    error = refusal(path)
    assert "U850" in error.expected
    assert f"NaN) at row {above[0]}, column {above[1]}" in error.got


@pytest.mark.parametrize("where", [(3, 4, 7), (18, 35, 0)])
def test_deepcam_with_a_missing_value(tmp_path, where):
    path = layouts.deepcam(tmp_path / "data-1996-06-09-01-1.h5")
    with h5py.File(path, "a") as file:
        file["climate/data"][where] = np.nan
    assert "NaN" in refusal(path).got


def test_no_times_at_all(tmp_path):
    with netCDF4.Dataset(tmp_path / "x.nc", "w") as data:
        for name, size in (("time", None), ("lat", 19), ("lon", 36)):
            data.createDimension(name, size)
        data.createVariable("lat", "f8", ("lat",))[:] = layouts.GRID.lat
        data.createVariable("lon", "f8", ("lon",))[:] = layouts.GRID.lon
    assert "length 0" in refusal(tmp_path / "x.nc").got


def test_curvilinear_grid(tmp_path):
    with netCDF4.Dataset(tmp_path / "x.nc", "w") as data:
        data.createDimension("y", 19)
        data.createDimension("x", 36)
        data.createVariable("lat", "f8", ("y", "x"))[:] = 0.0
    error = refusal(tmp_path / "x.nc")
    assert "latitude" in error.expected
    assert "2 dimensions" in error.got


def test_real_file_without_the_channels_names_them():
    error = refusal(real_data("merra2_iwv_ivt_2017-02-28T00.nc"))
    assert "U850" in error.got
    assert "TMQ" not in error.got, "IWV is TMQ"
    assert "IVT" in error.got, "what the file has is said too"


def test_variables_that_are_not_there(tmp_path):
    with pytest.raises(BadInput, match=r"variables IVT on its grid, got maps .*TMQ"):
        read_variables(layouts.cam(tmp_path / "x.nc"), ["PSL", "IVT"])


def test_nothing_half_written_is_left(tmp_path):
    def fail() -> None:
        with committed(tmp_path / "x.nc") as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    (tmp_path / "x.nc").write_text("the old one")
    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["x.nc"]
    assert (tmp_path / "x.nc").read_text() == "the old one"
    with pytest.raises(BadInput, match="labels"):
        write_climatenet(tmp_path / "y.nc", layouts.weather(), layouts.GRID, layouts.classes() + np.uint8(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x.nc"]


def test_reading_leaves_nothing_behind(tmp_path):
    path = layouts.cam(tmp_path / "x.nc")
    before = path.read_bytes()
    shutil.copy(path, tmp_path / "y.nc")
    read_all(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.nc", "y.nc"]


def test_grid_of_two_sources_is_compared_by_masks(tmp_path):
    masks = read_masks(layouts.climatenet(tmp_path / "x.nc"))
    masks.check_fits(layouts.GRID, 1)
    for grid, count in ((Grid.global_(19, 72), 1), (layouts.GRID, 2)):
        with pytest.raises(BadInput, match="mask"):
            masks.check_fits(grid, count)

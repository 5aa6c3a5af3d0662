"""Classic netCDF files are read without the netCDF library, and what is read is what the library reads."""

from __future__ import annotations

from pathlib import Path

import netCDF4
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysegment.archive.classic import expected_bytes
from raysegment.archive.masks import write_masks
from raysegment.archive.meter import ReadMeter
from raysegment.archive.snapshots import open_source
from raysegment.archive.stored import open_dataset
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.feed.part import Item, Job, make_part
from tests import layouts
from tests.helpers import real_data

OLD = ["i1", "S1", "i2", "i4", "f4", "f8"]
KINDS = {"NETCDF3_CLASSIC": OLD, "NETCDF3_64BIT_OFFSET": OLD, "NETCDF3_64BIT_DATA": [*OLD, "u1", "u2", "u4", "i8", "u8"]}
SIZES = {"time": None, "x": 3, "y": 5, "one": 1}
SHAPES = [(), ("x",), ("y", "x"), ("one", "x", "y"), ("time",), ("time", "x"), ("time", "y", "x"), ("time", "one", "y")]
needs_counts = pytest.mark.skipif(not ReadMeter().exact, reason="this system does not count what a thread reads")


def values_of(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(kind).itemsize), np.uint8)
    return np.ascontiguousarray(draws % 100 + 20).view(kind)[..., 0]  # plain letters, and numbers that are finite


@st.composite
def texts_or_numbers(draw, kinds: list[str]):
    kind = draw(st.sampled_from([*kinds, "text"]))
    if kind in ("text", "S1"):
        return draw(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=9))
    return values_of(kind, (draw(st.integers(1, 4)),), draw(st.integers(0, 9)))


@st.composite
def files(draw):
    """(container, variables as (kind, dimensions, attributes, fill value?), records, global attributes)."""
    container = draw(st.sampled_from(sorted(KINDS)))
    kinds = KINDS[container]
    attributes = st.dictionaries(st.sampled_from(["units", "valid_range", "scale_factor", "né"]), texts_or_numbers(kinds))
    one = st.tuples(st.sampled_from(kinds), st.sampled_from(SHAPES), attributes, st.sampled_from([None, False, 1]))
    return container, draw(st.lists(one, max_size=5)), draw(st.integers(0, 4)), draw(attributes)


def write(path: Path, container: str, variables: list, records: int, attributes: dict) -> Path:
    with netCDF4.Dataset(path, "w", format=container) as data:
        data.setncatts(attributes)
        for name, size in SIZES.items():
            data.createDimension(name, size)
        for number, (kind, dimensions, own, fill) in enumerate(variables):
            fill = b"1" if fill == 1 and kind == "S1" else fill
            variable = data.createVariable(f"v{number}", kind, dimensions, fill_value=fill)
            variable.set_auto_maskandscale(False)
            variable.setncatts(own)
            shape = tuple(records if name == "time" else SIZES[name] for name in dimensions)
            variable[...] = values_of(kind, shape, number)
    with path.open("r+b") as file:
        file.truncate(expected_bytes(path))  # the library may leave a page behind the last value
    return path


def same(got, wanted) -> None:
    assert type(got) is type(wanted)
    np.testing.assert_array_equal(got, wanted)
    assert np.asarray(got).dtype == np.asarray(wanted).dtype


@given(files(), st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_everything_is_as_the_netcdf_library_reads_it(tmp_path, held, data):
    path = write(tmp_path / "x.nc", *held)
    ours = open_dataset(path)
    with netCDF4.Dataset(path) as library:
        library.set_auto_maskandscale(False)
        assert {name: dimension.size for name, dimension in library.dimensions.items()} == ours.sizes
        assert list(ours.variables) == list(library.variables)
        assert list(ours.attributes) == library.ncattrs()
        for name in library.ncattrs():
            same(ours.attributes[name], library.getncattr(name))
        for name, wanted in library.variables.items():
            got = ours.variables[name]
            assert (got.dtype, got.dimensions, got.shape) == (wanted.dtype, wanted.dimensions, wanted.shape)
            assert list(got.attributes) == wanted.ncattrs()
            for attribute in wanted.ncattrs():
                same(got.attributes[attribute], wanted.getncattr(attribute))
            same(got.read(), np.asarray(wanted[...]))
            where = tuple(data.draw(st.integers(0, size - 1) | st.slices(size)) if size else slice(None) for size in got.shape)
            np.testing.assert_array_equal(got.read(where), np.asarray(wanted[...])[where])
    ours.close()


@pytest.mark.parametrize("container", KINDS)
@pytest.mark.parametrize("kinds", [(), ("i1",), ("i2",), ("i1", "f8"), ("i2", "i1", "f4")], ids="-".join)
def test_boxes_of_records(tmp_path, container, kinds):
    """One variable with records has no padding, several have; a box is read into the array that is given."""
    variables = [(kind, ("time", "y", "x"), {}, None) for kind in kinds] + [("i2", ("y", "x"), {}, None)]
    path = write(tmp_path / "x.nc", container, variables, 5, {})
    ours = open_dataset(path)
    with netCDF4.Dataset(path) as library:
        library.set_auto_maskandscale(False)
        for name, variable in ours.variables.items():
            for inner in (np.s_[:5, :3], np.s_[2:3, :3], np.s_[1:4, 1:3], np.s_[2:2, :3]):
                box = (slice(1, 4),) * (len(variable.shape) - 2) + tuple(slice(part.start or 0, part.stop) for part in inner)
                into = np.empty([part.stop - part.start for part in box], variable.dtype)
                assert variable.read(box, into) is into
                np.testing.assert_array_equal(into, library[name][box])
                assert variable.stored_bytes(box) == into.nbytes
    ours.close()


def test_records_that_the_header_does_not_count_are_as_many_as_there_is_room_for(tmp_path):
    variables = [("f4", ("time", "x"), {}, None), ("i1", ("time",), {}, None)]
    path = write(tmp_path / "x.nc", "NETCDF3_CLASSIC", variables, 4, {})
    content = bytearray(path.read_bytes().ljust(-(-path.stat().st_size // 4) * 4, b"\x00"))
    content[4:8] = b"\xff" * 4
    path.write_bytes(content)
    ours = open_dataset(path)
    assert ours.sizes["time"] == 4
    np.testing.assert_array_equal(ours.variables["v0"].read(), values_of("f4", (4, 3), 0))
    ours.close()


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_bad_input_or_another_header(tmp_path, at, byte):
    """Nothing but BadInput comes of it, and no damage makes the reader ask for memory that the file does not fill."""
    path = tmp_path / "x.nc"
    if not path.exists():
        write(path, "NETCDF3_64BIT_DATA", [("f4", ("time", "x"), {"units": "m"}, 1), ("i2", ("y",), {}, None)], 2, {"title": "x"})
    content = bytearray(path.read_bytes())
    content[4 + at % (len(content) - 4)] = byte
    damaged = tmp_path / "damaged.nc"
    damaged.write_bytes(content)
    try:
        ours = open_dataset(damaged)
    except BadInput:
        return
    for variable in ours.variables.values():
        variable.read()
    ours.close()


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = write(tmp_path / "x.nc", "NETCDF3_CLASSIC", [("f8", ("y",), {}, None)], 0, {})
    ours = open_dataset(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="ends before"):
        ours.variables["v0"].read()
    ours.close()


def test_a_real_file_is_as_the_netcdf_library_reads_it():
    path = real_data("merra2_iwv_ivt_2017-02-28T00.nc")
    ours = open_dataset(path)
    with netCDF4.Dataset(path) as library:
        library.set_auto_maskandscale(False)
        assert path.stat().st_size == expected_bytes(path)
        for name, wanted in library.variables.items():
            np.testing.assert_array_equal(ours.variables[name].read(), wanted[...])
    ours.close()


# bytes read -------------------------------------------------------------------------------------------------------

GRID = Grid.global_(192, 288)


def classic(path: Path, container: str, records: bool, times: int) -> Path:
    """Sixteen maps of 192 x 288 cells for each time."""
    with netCDF4.Dataset(path, "w", format=container) as data:
        for name, size in (("time", None if records else times), ("lat", 192), ("lon", 288)):
            data.createDimension(name, size)
        data.createVariable("lat", "f8", ("lat",))[:] = GRID.lat
        data.createVariable("lon", "f8", ("lon",))[:] = GRID.lon
        time = data.createVariable("time", "f8", ("time",))
        time.setncatts({"units": "days since 2000-01-01", "calendar": "noleap"})
        time[:] = np.arange(times)
        fields = np.stack([layouts.weather(step, GRID) for step in range(times)])
        for channel, name in enumerate(NAMES):
            data.createVariable(name, "f4", ("time", "lat", "lon"))[:] = fields[:, channel]
    return path


@needs_counts
@pytest.mark.parametrize("container", KINDS)
@pytest.mark.parametrize(("records", "times"), [(False, 1), (True, 1), (True, 3)])
def test_of_a_classic_file_hardly_more_is_read_than_is_needed(tmp_path, container, records, times):
    """A part of one file with its masks, all that staging reads after the first file's grid."""
    path = classic(tmp_path / "x.nc", container, records, times)
    with open_source(path) as source:
        masks = np.stack([layouts.classes(step, GRID) for step in range(times)])
        write_masks(tmp_path / "x.mask.nc", masks, source.axes, source.times, "rules:ivt")
    lat, lon = tuple(GRID.lat.tolist()), tuple(GRID.lon.tolist())
    items = (Item(str(path), "x.nc", str(tmp_path / "x.mask.nc")),)
    result = make_part(Job(0, items, lat, lon, None, 0, 64.0, str(tmp_path / "out")))
    assert not result.skipped
    assert result.source_bytes <= result.bytes_read <= 1.015 * result.source_bytes

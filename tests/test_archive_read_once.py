"""Each stored byte of a source is read once, whatever its chunks, and what is read is what the netCDF library reads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from raysegment.archive.chunkwise import Chunkwise
from raysegment.archive.masks import MaskSource, write_masks
from raysegment.archive.meter import ReadMeter
from raysegment.archive.packing import Packing
from raysegment.archive.snapshots import open_source
from raysegment.archive.stored import numeric, open_dataset
from raysegment.climate.channels import NAMES
from raysegment.climate.grid import Grid
from tests import layouts

GRID = Grid.global_(192, 288)
needs_counts = pytest.mark.skipif(not ReadMeter().exact, reason="this system does not count what a thread reads")


def several_times(path: Path, times: int = 5, **options) -> Path:
    """Times of 192 x 288 cells with CAM's names and labels; `options` are those of createVariable."""
    size = {"time": times, "lat": 192, "lon": 288}
    with netCDF4.Dataset(path, "w") as data:
        for name, length in size.items():
            data.createDimension(name, length)
        data.createVariable("lat", "f8", ("lat",))[:] = GRID.lat
        data.createVariable("lon", "f8", ("lon",))[:] = GRID.lon
        time = data.createVariable("time", "f8", ("time",))
        time.setncatts({"units": "days since 2000-01-01", "calendar": "noleap"})
        time[:] = np.arange(times)
        noise = 1.0 + 1e-4 * np.random.default_rng(1).random((times, *GRID.shape), np.float32)
        for channel, name in enumerate(NAMES):
            values = np.stack([layouts.weather(step, GRID)[channel] for step in range(times)])
            data.createVariable(name, "f4", tuple(size), **options)[:] = values * noise
        labels = data.createVariable("LABELS", "i1", tuple(size), **options)
        labels[:] = np.stack([layouts.classes(step, GRID) for step in range(times)])
    return path


def levels(path: Path, chunks: tuple[int, ...] | None, times: int = 2) -> Path:
    """CMIP6's names on 192 x 288 cells with eight levels, four of them ours; chunks of the variables with levels."""
    plev = [1e5, 92500.0, 85000.0, 7e4, 5e4, 3e4, 2e4, 1e4]
    with netCDF4.Dataset(path, "w") as data:
        for name, length in (("time", times), ("plev", len(plev)), ("lat", 192), ("lon", 288)):
            data.createDimension(name, length)
        for name, values, unit in (("lat", GRID.lat, "degrees_north"), ("lon", GRID.lon, "degrees_east"), ("plev", plev, "Pa")):
            variable = data.createVariable(name, "f8", (name,))
            variable.units = unit
            variable[:] = values
        fields = np.stack([layouts.weather(step, GRID) for step in range(times)])
        one = {name: fields[:, channel] for channel, name in enumerate(NAMES)}
        single = {"prw": "TMQ", "uas": "UBOT", "vas": "VBOT", "huss": "QREFHT"}
        single |= {"ps": "PS", "psl": "PSL", "ts": "TS", "tas": "TREFHT"}
        for name, channel in single.items():
            data.createVariable(name, "f4", ("time", "lat", "lon"))[:] = one[channel]
        data.createVariable("pr", "f4", ("time", "lat", "lon"))[:] = 1000.0 * one["PRECT"]
        data["pr"].units = "kg m-2 s-1"
        data.createVariable("LABELS", "i1", ("time", "lat", "lon"))[:] = 0
        columns = {"ua": {2: "U850"}, "va": {2: "V850"}, "ta": {4: "T500", 6: "T200"}, "zg": {0: "Z1000", 6: "Z200"}}
        for name, held in columns.items():
            storage = {"zlib": True, "complevel": 1, "shuffle": True, "chunksizes": chunks} if chunks else {}
            variable = data.createVariable(name, "f4", ("time", "plev", "lat", "lon"), **storage)
            variable[:] = np.random.default_rng(0).random((times, len(plev), *GRID.shape), np.float32)
            for level, channel in held.items():
                variable[:, level] = one[channel]
    return path


def deepcam(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["climate/data"] = np.moveaxis(layouts.weather(0, GRID), 0, -1)
        for number in range(2):
            file[f"climate/labels_{number}"] = layouts.classes(number, GRID).astype(np.float32)
    return path


PACKED = {"zlib": True, "complevel": 1, "shuffle": True}
FILES = {
    "in one piece": lambda path: several_times(path),
    "a chunk per map": lambda path: several_times(path, chunksizes=(1, 192, 288), **PACKED),
    "a chunk for three of five times": lambda path: several_times(path, chunksizes=(3, 192, 288), **PACKED),
    "a chunk for all times": lambda path: several_times(path, chunksizes=(5, 192, 288), **PACKED),
    "chunks of a part of the map": lambda path: several_times(path, chunksizes=(3, 50, 70), **PACKED),
    "chunks without compression": lambda path: several_times(path, chunksizes=(2, 64, 288)),
    "deflated without shuffling": lambda path: several_times(path, zlib=True, shuffle=False, chunksizes=(2, 192, 288)),
    "with checksums": lambda path: several_times(path, fletcher32=True, chunksizes=(4, 96, 288), **PACKED),
    "levels in one piece": lambda path: levels(path, None),
    "a chunk per level": lambda path: levels(path, (1, 1, 192, 288)),
    "a chunk for all levels": lambda path: levels(path, (1, 8, 192, 288)),
    "a chunk for some levels and all times": lambda path: levels(path, (2, 5, 100, 288)),
    "DeepCAM": lambda path: deepcam(path.with_name("data-1996-06-09-01-1.h5")),
}


def read_through(path: Path, memory_mib: float) -> tuple[int, int, list[np.ndarray], list[np.ndarray]]:
    """Bytes stored, bytes read from opening to the end, fields and masks."""
    meter, needed = ReadMeter(), []

    def snapshots():
        with open_source(path, below_ground=False) as source:
            needed.append(source.read_once(memory_mib))
            yield from source.snapshots()

    fields, masks = zip(*((s.fields, s.mask) for s in meter.counted(snapshots())), strict=True)
    return needed[0], meter.bytes_read, list(fields), list(masks)


@needs_counts
@pytest.mark.parametrize("memory_mib", [1024.0, 3.0])
@pytest.mark.parametrize("kind", FILES)
def test_each_byte_is_read_once(tmp_path, kind, memory_mib):
    path = FILES[kind](tmp_path / "x.nc")
    needed, read, fields, masks = read_through(path, memory_mib)
    assert needed <= read <= 1.05 * needed
    with open_source(path, below_ground=False) as source:
        for index in range(source.count):
            snapshot = source.read(index)
            np.testing.assert_array_equal(fields[index], snapshot.fields)
            np.testing.assert_array_equal(masks[index], snapshot.mask)


@needs_counts
def test_what_is_needed_is_less_than_the_file_where_it_holds_more(tmp_path):
    """Two of eight levels, a chunk each: only theirs count, and only theirs are read."""
    path = levels(tmp_path / "x.nc", (1, 1, 192, 288))
    needed, read, _, _ = read_through(path, 1024.0)
    assert read < 0.5 * path.stat().st_size
    plane = 4 * GRID.lat.size * GRID.lon.size
    with h5py.File(path) as file:
        wanted = {"ua": (2,), "va": (2,), "ta": (4, 6), "zg": (0, 6)}
        chunks = [file[name].id.get_chunk_info_by_coord((t, k, 0, 0)) for name, of in wanted.items() for k in of for t in (0, 1)]
        assert needed == sum(chunk.size for chunk in chunks) + 2 * (9 * plane + plane // 4)  # and nine maps, and labels


@needs_counts
def test_between_small_maps_nothing_is_read(tmp_path):
    """Maps of 42 kB, two of eight levels, without chunks: what lies between them stays where it is."""
    values = np.random.default_rng(0).random((4, 8, 73, 144), np.float32)
    with netCDF4.Dataset(tmp_path / "x.nc", "w") as data:
        for name, size in zip("tzyx", values.shape, strict=True):
            data.createDimension(name, size)
        data.createVariable("v", "f4", tuple("tzyx"))[:] = values
    held, meter = open_dataset(tmp_path / "x.nc"), ReadMeter()
    with meter.counting():
        for time, level in ((time, level) for time in range(4) for level in (2, 5)):
            got = held.variables["v"].read(np.s_[time : time + 1, level : level + 1, :73, :144], np.empty((1, 1, 73, 144), "f4"))
            np.testing.assert_array_equal(got[0, 0], values[time, level])
    held.close()
    assert meter.bytes_read <= values.nbytes / 4 + 1000


@needs_counts
def test_masks_are_read_once(tmp_path):
    masks = (np.random.default_rng(0).random((5, *GRID.shape)) < 0.5).astype(np.uint8)
    with open_source(several_times(tmp_path / "x.nc")) as source:
        write_masks(tmp_path / "x.mask.nc", masks, source.axes, source.times, "rules:ivt")
    meter = ReadMeter()
    with meter.counting(), MaskSource(tmp_path / "x.mask.nc") as source:
        needed = source.read_once()
        again = [source.read(index) for index in range(5)]
    np.testing.assert_array_equal(again, masks)
    assert needed <= meter.bytes_read <= needed + 60_000  # a mask file is small: its metadata is seen


def test_a_variable_without_time_is_handed_out_at_every_time(tmp_path):
    """The orography lies in the file once; asked for at each time it is read at the first."""
    path = layouts.cmip6(tmp_path / "x.nc", steps=5)
    with open_source(path) as source:
        slow = [source.read(index).fields for index in range(5)]
    with open_source(path) as source:
        source.read_once()
        np.testing.assert_array_equal([s.fields for s in source.snapshots()], slow)


def test_a_block_is_let_go_when_its_last_map_has_been_handed_out(tmp_path):
    path = several_times(tmp_path / "x.nc", 6, chunksizes=(4, 192, 288), **PACKED)
    data = open_dataset(path)
    places = [("PSL", ()), ("TMQ", ())]
    planes = Chunkwise(data.variables, ("time", "lat", "lon"), 6, places, 1 << 30)
    for time in range(6):
        for place in places:
            planes.plane(place, time)
            kept = planes._columns[place]._block
            assert (kept is None) == (time in (3, 5))
    data.close()


LONG = """
    import resource, sys
    from pathlib import Path
    from raysegment.archive.snapshots import open_source

    def anonymous_mib():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if "RssAnon" in line)

    with open_source(sys.argv[1]) as source:
        before = anonymous_mib()
        source.read_once(memory_mib=float(sys.argv[2]))
        print(max(anonymous_mib() - before for _ in source.snapshots()))
"""


@needs_counts
def test_a_long_file_whose_chunks_span_all_times_does_not_fill_the_memory(tmp_path):
    """24 times of 16 maps are 81 MiB; kept in memory are the maps of a variable or two."""
    path = several_times(tmp_path / "x.nc", 24, chunksizes=(24, 192, 288))
    command = [sys.executable, "-c", textwrap.dedent(LONG), str(path)]
    freely, bounded = (float(subprocess.check_output([*command, mib])) for mib in ("1024", "12"))
    assert freely > 75.0
    assert bounded < 45.0


# what the numbers mean --------------------------------------------------------------------------------------------

KINDS = ("i1", "u1", "i2", "u2", "i4", "f4", "f8")


def numbers(kind: str) -> st.SearchStrategy:
    if kind[0] == "f":
        return st.sampled_from([0.0, 1.5, -7.0, 1e20, float(np.float32(1e20)), np.nan, np.inf, netCDF4.default_fillvals[kind]])
    info = np.iinfo(kind)
    return st.sampled_from([0, 1, 5, info.max, info.min, info.max - 1, int(netCDF4.default_fillvals[kind])])


@st.composite
def variables(draw):
    kind = draw(st.sampled_from(KINDS))
    values = np.array(draw(st.lists(numbers(kind), min_size=1, max_size=6)), kind)
    attributes = {
        name: np.array(draw(numbers(kind)), kind) for name in ("missing_value", "valid_min", "valid_max") if draw(st.booleans())
    }
    if draw(st.booleans()):
        attributes["valid_range"] = np.sort(np.array([draw(numbers(kind)), draw(numbers(kind))], kind))
    for name in ("scale_factor", "add_offset"):
        if draw(st.booleans()):
            attributes[name] = draw(st.sampled_from([np.float32(0.5), np.float64(1.0), np.float64(0.0), np.float64(-3.25)]))
    if draw(st.booleans()):
        attributes["_Unsigned"] = "true"
    return values, attributes, draw(st.sampled_from([None, False, 1])), draw(st.sampled_from(["NETCDF4", "NETCDF3_CLASSIC"]))


def as_the_library_reads(variable: netCDF4.Variable) -> np.ndarray:
    values = variable[:]
    plain = np.ma.getdata(values)
    if not np.ma.is_masked(values):
        return plain
    return np.where(np.ma.getmaskarray(values), np.nan, plain.astype(np.promote_types(values.dtype, np.float32)))


@given(variables())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_mean_what_the_netcdf_library_says(tmp_path, held):
    values, attributes, fill, container = held
    if container != "NETCDF4" and values.dtype.str[1:] in ("u1", "u2"):
        container = "NETCDF3_64BIT_DATA"
    path = tmp_path / "x.nc"
    with netCDF4.Dataset(path, "w", format=container) as data:
        data.createDimension("n", values.size)
        variable = data.createVariable("x", values.dtype, ("n",), fill_value=fill)
        variable.setncatts(attributes)
        variable.set_auto_maskandscale(False)
        variable[:] = values
    with warnings.catch_warnings(), np.errstate(all="ignore"), netCDF4.Dataset(path) as data:
        warnings.simplefilter("ignore")
        try:
            wanted = as_the_library_reads(data["x"])
        except TypeError:  # it fails for unsigned numbers out of the valid range that have no fill value
            reject()
        ours = open_dataset(path)
        got = ours.variables["x"].packing.unpack(ours.variables["x"].read())
        ours.close()
    np.testing.assert_array_equal(got, wanted)
    assert got.dtype == wanted.dtype


def test_an_attribute_that_the_type_cannot_hold_is_left_aside():
    assert Packing.of(np.dtype("i2"), {"missing_value": 1e20, "_FillValue": "none"}, True).missing == (-32767,)


@pytest.mark.parametrize(
    "write", [layouts.climatenet, layouts.cam, layouts.era5, layouts.cmip6, layouts.merra2, layouts.gfs, None]
)
def test_variables_and_dimensions_are_those_of_the_netcdf_library(tmp_path, write):
    path = (write or (lambda path: levels(path, None)))(tmp_path / "x.nc")
    ours = open_dataset(path)
    with netCDF4.Dataset(path) as data:
        assert list(ours.variables) == list(data.variables)
        assert {name: data.dimensions[name].size for name in ours.sizes} == ours.sizes
        for name, variable in data.variables.items():
            assert ours.variables[name].dimensions == variable.dimensions, name
            assert ours.variables[name].shape == variable.shape
            assert (ours.variables[name].dtype == str) == (variable.dtype is str)
            assert set(ours.variables[name].attributes) == set(variable.ncattrs())
            if numeric(ours.variables[name]):
                np.testing.assert_array_equal(ours.variables[name].read(), variable[...].data)
    ours.close()

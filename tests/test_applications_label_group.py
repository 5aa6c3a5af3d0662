"""One mask file: what is read for it, what is refused, what is in memory meanwhile, and what outsiders say of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import netCDF4
import numpy as np
import pytest

from raysegment.applications.labellers import RulesLabeller, parse_labeller
from raysegment.applications.mask_layout import Group, groups_of
from raysegment.applications.segment import BadSource, SegmentConfig, label_group
from raysegment.archive import ground
from raysegment.archive.masks import artmip_path, mask_path, read_masks
from raysegment.archive.skipped import Skipped
from raysegment.archive.snapshots import open_source, read_variables
from raysegment.climate.channels import INDEX, NAMES, RIVER
from raysegment.climate.rules import parse_rules
from tests import layouts
from tests.helpers import real_data


def label(path: Path, labeller, out: Path, **options) -> Path:
    """The mask file of one source."""
    (group,), bad = groups_of([path], "source")
    assert not bad
    label_group(group, labeller, out, SegmentConfig(**options))
    return group.file(out)


def refused(path: Path, out: Path, labeller="rules:ivt") -> Skipped:
    """Why a source cannot be labelled; nothing of its mask is left."""
    with pytest.raises(BadSource) as caught:
        label(path, parse_labeller(labeller), out)
    assert not list(out.glob("*")) or not list(out.glob(f"*{path.stem}*"))
    assert caught.value.skipped.file == str(path)
    return caught.value.skipped


def set_values(path: Path, **values: object) -> Path:
    with netCDF4.Dataset(path, "a") as data:
        for name, value in values.items():
            data[name][:] = value
    return path


class Seen(RulesLabeller):
    """Keeps what it is given."""

    def label(self, fields, grid, ivt=None):
        SEEN.append((fields.copy(), None if ivt is None else ivt.copy()))
        return np.zeros(grid.shape, np.uint8), None

    def needs(self, path, available, has_ivt):
        return NAMES if self.name == "all" else super().needs(path, available, has_ivt)


SEEN: list[tuple[np.ndarray, np.ndarray | None]] = []


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


def seen(path: Path, out: Path, rules: str) -> tuple[np.ndarray, np.ndarray | None]:
    label(path, Seen(parse_rules("rules:default" if rules == "all" else rules), rules), out)
    return SEEN[-1]


def test_real_transport_alone_is_labelled_and_other_rules_are_told_what_would_work(tmp_path):
    path = real_data("merra2_iwv_ivt_2017-02-28T00.nc")
    mask = read_masks(label(path, parse_labeller("rules:ivt"), tmp_path))
    ivt = read_variables(path, ["IVT"])["IVT"]
    assert 0.02 < (mask.masks == RIVER).mean() < 0.15
    assert (ivt[mask.masks[0] == RIVER] >= 250.0).all()
    with netCDF4.Dataset(mask_path(tmp_path, path)) as data:
        assert data["lon"][0] == -180.0
    why = refused(path, tmp_path / "no", "rules:teca")
    assert "PSL" in why.got
    assert "rules:ivt" in why.remedy


@pytest.mark.parametrize(
    ("write", "names", "unit"),
    [
        (layouts.merra2, {"UFLXQV": 300.0, "VFLXQV": -400.0}, "kg m-1 s-1"),
        (layouts.era5, {"viwve": 300.0, "viwvn": -400.0}, "kg m**-1 s**-1"),
        (layouts.cmip6, {"intuaw": 300.0, "intvaw": -400.0}, "kg m-1 s-1"),
        (layouts.merra2, {"IVT": 500.0}, ""),
    ],
)
def test_transport_is_found_under_each_archives_names(tmp_path, write, names, unit):
    path = write(tmp_path / "x.nc")
    with netCDF4.Dataset(path, "a") as data:
        maps = (variable.dimensions for variable in data.variables.values() if variable.ndim > 2)
        dims = tuple(dimension for dimension in next(maps) if dimension not in ("plev", "pressure_level"))
        for name, value in names.items():
            data.createVariable(name, "f4", dims)[:] = value
            if unit:
                data[name].units = unit
    _, ivt = seen(path, tmp_path / "out", "rules:ivt")
    assert ivt is not None
    np.testing.assert_allclose(ivt, 500.0, rtol=1e-6)


def test_what_has_no_part_in_the_mask_may_be_broken(tmp_path):
    path = layouts.cam(tmp_path / "x.nc", steps=1)
    whole = read_masks(label(path, parse_labeller("rules:ivt"), tmp_path / "whole")).masks
    set_values(path, T500=np.nan, TS=-5.0, PRECT=1e30)
    assert np.array_equal(read_masks(label(path, parse_labeller("rules:ivt"), tmp_path / "out")).masks, whole)
    assert "T500" in refused(path, tmp_path / "out2", "rules:teca").expected
    with netCDF4.Dataset(path, "a") as data:
        data.createVariable("IVT", "f4", ("time", "lat", "lon"))[:] = 300.0
    set_values(path, U850=np.nan)
    label(path, parse_labeller("rules:ivt"), tmp_path / "ivt")
    fields, ivt = seen(path, tmp_path / "seen", "rules:ivt")
    assert ivt is not None
    assert np.isnan(fields).all(), "with a transport of its own nothing else is read"
    assert "U850" in refused(path, tmp_path / "direction", "rules:guan_waliser").expected


def test_missing_values_everywhere_are_refused_by_name(tmp_path):
    path = layouts.cam(tmp_path / "x.nc", steps=1)
    set_values(path, TMQ=netCDF4.default_fillvals["f4"])
    assert "TMQ" in refused(path, tmp_path / "out").expected
    with netCDF4.Dataset(path, "a") as data:
        data.createVariable("IVT", "f4", ("time", "lat", "lon"))
    why = refused(path, tmp_path / "out")
    assert "IVT" in why.expected
    assert "all missing" in why.got


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data["time"].setncattr("calendar", "mayan"), "mayan"),
        (lambda data: data["lat"].__setitem__(slice(None), data["lat"][:][[0, 2, 1, *range(3, 19)]] ** 2 / 90), "lat"),
        (lambda data: data["lon"].__setitem__(5, 52.0), "lon"),
        (lambda data: data["lat"].__setitem__(5, data["lat"][4]), "lat"),
    ],
)
def test_strange_calendars_and_grids_are_refused(tmp_path, damage, said):
    path = layouts.cam(tmp_path / "x.nc", steps=1)
    with netCDF4.Dataset(path, "a") as data:
        damage(data)
    why = refused(path, tmp_path / "out")
    assert said in why.got
    assert why.remedy


@pytest.mark.parametrize(
    ("axis", "order"),
    [
        ("lat", [0, 2, 1, *range(3, 19)]),
        ("lat", [*range(9, -1, -1), *range(18, 9, -1)]),
        ("lat", [*range(0, 19, 2), *range(1, 19, 2)]),
        ("lon", [0, 2, 1, *range(3, 36)]),
        ("lon", [*range(0, 36, 2), *range(1, 36, 2)]),
        ("lon", [*range(18, -1, -1), *range(19, 36)]),
    ],
)
def test_axis_that_goes_back_and_forth_is_refused(tmp_path, axis, order):
    """Every degree once, but in no order: a mistake somewhere, and who knows whether the maps share it."""
    path = layouts.cam(tmp_path / "x.nc", steps=1)
    set_values(path, **{axis: getattr(layouts.GRID, axis)[order]})
    why = refused(path, tmp_path / "out")
    assert f"{axis}: expected" in why.got
    assert why.expected == "a regular latitude–longitude grid"


@pytest.mark.parametrize("write", [layouts.gfs, layouts.cmip6, layouts.era5])
def test_below_ground_values_are_as_in_the_training_data(tmp_path, write):
    """The network sees what a CAM file would hold, of all channels or of a part of them."""
    path = write(tmp_path / "x.nc")
    fields, _ = seen(path, tmp_path / "out", "all")
    with open_source(path) as source:
        truth = layouts.weather(source.count - 1)
    np.testing.assert_allclose(fields, truth, rtol=1e-3, atol=1e-2)
    buried = ground.LOWEST_LEVEL * fields[INDEX["PS"]] < 85000.0
    assert buried.any()
    wind, _ = seen(path, tmp_path / "part", "rules:ivt")
    np.testing.assert_array_equal(wind[INDEX["U850"]], fields[INDEX["U850"]])
    assert np.isnan(wind[INDEX["Z1000"]]).all()


class Probable(RulesLabeller):
    """Gives probabilities, and knows how many of those it gave are still in memory."""

    gives_probabilities = True  # pyright: ignore[reportAssignmentType]

    def label(self, fields, grid, ivt=None):
        HELD.append(sum(given() is not None for given in GIVEN))
        probabilities = np.full((3, *grid.shape), 1 / 3, np.float32)
        GIVEN.append(weakref.ref(probabilities))
        return probabilities.argmax(0).astype(np.uint8), probabilities


GIVEN: list[weakref.ref] = []
HELD: list[int] = []


def test_a_year_in_one_file_needs_no_more_memory_than_a_day(tmp_path):
    path = layouts.cam(tmp_path / "year.nc", steps=40)
    label(path, Probable(parse_rules("rules:default"), "x"), tmp_path / "out", probabilities=True, artmip=True)
    assert len(HELD) == 40
    assert max(HELD) <= 1


def test_files_of_two_calendars_do_not_share_a_mask_file(tmp_path):
    paths = [layouts.cam(tmp_path / name, steps=1) for name in ("a.nc", "b.nc")]
    with netCDF4.Dataset(paths[1], "a") as data:
        data["time"].calendar = "360_day"
        data["time"][:] = 482.0  # the same year
    groups, _ = groups_of(paths, "yearly")
    with pytest.raises(BadSource) as caught:
        label_group(groups[0], parse_labeller("rules:ivt"), tmp_path / "out", SegmentConfig(layout="yearly"))
    assert (caught.value.skipped.expected, caught.value.skipped.got) == ("the calendar noleap of the files before it", "360_day")


def test_bounds_with_gaps_are_no_bounds(tmp_path):
    path = layouts.cam(tmp_path / "x.nc", steps=2)
    with netCDF4.Dataset(path, "a") as data:
        data["time_bnds"][1, 0] = np.nan
    with netCDF4.Dataset(label(path, parse_labeller("rules:ivt"), tmp_path / "out")) as data:
        assert "time_bnds" not in data.variables
        assert "bounds" not in data["time"].ncattrs()


def test_outside_judge_finds_nothing_in_masks_with_bounds_probabilities_and_tags(tmp_path):
    """compliance-checker itself, on every kind of file that segment writes."""
    beside = Path(sys.executable).with_name("compliance-checker")
    checker = str(beside) if beside.exists() else shutil.which("compliance-checker")
    if checker is None:
        pytest.skip("compliance-checker is not installed")
    path = layouts.cam(tmp_path / "x.nc", steps=2)
    set_values(path, time_bnds=484.9375 + np.arange(2)[:, None] / 8 + np.array([0, 0.125]))
    files = [label(path, parse_labeller("rules:ivt"), tmp_path / "plain", artmip=True)]
    files += [artmip_path(files[0]), label(path, Probable(parse_rules("rules:ivt"), "x"), tmp_path / "more", probabilities=True)]
    with netCDF4.Dataset(files[-1]) as data:
        assert "time_bnds" in data.variables
        assert "PROB_tropical_cyclone" in data.variables
    asked = [checker, "--test=cf:1.8", *map(str, files)]
    report = subprocess.run(asked, capture_output=True, text=True, timeout=200, check=False)
    assert report.returncode == 0, report.stdout + report.stderr
    assert report.stdout.count("All tests passed") == len(files), report.stdout


def test_a_month_is_complete_only_with_all_its_files(tmp_path):
    """One that comes later, or grows, makes it a month to be labelled again."""
    paths = [layouts.cam(tmp_path / name, steps=2) for name in ("a.nc", "b.nc")]
    set_values(paths[1], time=[486.0, 486.5])
    config = SegmentConfig(layout="monthly")
    (both,), _ = groups_of(paths, "monthly")
    (one,), _ = groups_of(paths[:1], "monthly")
    assert not one.is_complete(tmp_path)
    label_group(one, parse_labeller("rules:ivt"), tmp_path, config)
    assert one.is_complete(tmp_path)
    assert not both.is_complete(tmp_path)
    label_group(both, parse_labeller("rules:ivt"), tmp_path, config)
    assert both.is_complete(tmp_path)
    layouts.cam(paths[0], steps=3)
    assert not groups_of(paths, "monthly")[0][0].is_complete(tmp_path)


def test_a_source_that_breaks_off_leaves_nothing(tmp_path):
    whole = layouts.cam(tmp_path / "x.nc", steps=3)
    set_values(whole, PSL=np.concatenate([np.full((2, 19, 36), 1e5), np.full((1, 19, 36), np.nan)]))
    with pytest.raises(BadSource):
        label_group(Group("x", ((whole, None),)), parse_labeller("rules:default"), tmp_path / "out", SegmentConfig())
    assert not list((tmp_path / "out").iterdir())

"""Mask files by source, day, month and year; what a source says of its times stays; a part of the channels is enough."""

from __future__ import annotations

from pathlib import Path

import netCDF4
import numpy as np
import pytest

from raysegment.applications.labellers import RulesLabeller
from raysegment.applications.mask_layout import Group, groups_of
from raysegment.applications.segment import BadSource, SegmentConfig, label_group
from raysegment.archive.masks import read_masks
from raysegment.archive.snapshots import open_source
from raysegment.climate.channels import INDEX
from raysegment.climate.checks import BadInput
from raysegment.climate.rules import parse_rules
from tests import layouts
from tests.small_archive import write_archive


def rules(name: str) -> RulesLabeller:
    return RulesLabeller(parse_rules(name), name)


class Counted(RulesLabeller):
    """Marks every map with the last bits of its pressure; enough to tell maps apart."""

    def label(self, fields, grid, ivt=None):
        return (fields[INDEX["PSL"]] * 64 % 3).astype(np.uint8), None


COUNTED = Counted(parse_rules("rules:default"), "rules:default")


def of_day(folder: Path, day: int) -> Path:
    """A CAM file of eight steps, moved to another day."""
    path = layouts.cam(folder / f"cam.h2.{day:02d}.nc")
    with netCDF4.Dataset(path, "a") as data:
        data["time"][:] = data["time"][:] + day
        if "time_bnds" in data.variables:
            data["time_bnds"][:] = data["time_bnds"][:] + day
    return path


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("cam")
    return [of_day(folder, day) for day in (0, 1, 40)]


def masks_by_time(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.mask.nc"):
        read = read_masks(file)
        found |= {label: mask.tobytes() for label, mask in zip(read.time_labels, read.masks, strict=True)}
    return found


def test_the_same_masks_whatever_shares_a_file(days, tmp_path):
    files, masks = {}, {}
    for layout in ("source", "daily", "monthly", "yearly"):
        groups, bad = groups_of(days[::-1], layout)
        assert not bad
        for group in groups:
            label_group(group, COUNTED, tmp_path / layout, SegmentConfig(layout=layout))
        files[layout] = len(groups)
        masks[layout] = masks_by_time(tmp_path / layout)
    assert len(masks["source"]) == 24
    assert masks["source"] == masks["daily"] == masks["monthly"] == masks["yearly"]
    assert files["source"] == 3
    assert files["daily"] >= 3 > files["monthly"] >= files["yearly"] >= 1


def test_bounds_of_times_and_calendar_are_kept(days, tmp_path):
    groups, _ = groups_of(days, "monthly")
    for group in groups:
        label_group(group, COUNTED, tmp_path, SegmentConfig(layout="monthly"))
    kept = {}
    for file in tmp_path.glob("*.mask.nc"):
        with netCDF4.Dataset(file) as data:
            time = data["time"]
            assert time.calendar == "noleap"
            assert time.bounds == "time_bnds"
            ends = netCDF4.num2date(data["time_bnds"][:], time.units, time.calendar)
            times = netCDF4.num2date(time[:], time.units, time.calendar)
            kept |= {str(at): tuple(map(str, pair)) for at, pair in zip(times, ends, strict=True)}
    expected = {}
    for path in days:
        with open_source(path) as source:
            assert source.time_bounds is not None
            expected |= {str(at): tuple(map(str, pair)) for at, pair in zip(source.times, source.time_bounds, strict=True)}
    assert kept == expected


def test_one_time_in_two_files_and_files_without_times_do_not_fit_a_layout_by_time(days, tmp_path):
    twin = tmp_path / "twin.nc"
    twin.write_bytes(days[0].read_bytes())
    _, bad = groups_of([days[0], twin], "daily")
    assert [one.file for one in bad] == [str(twin)]
    assert "also in" in bad[0].got
    nameless = write_archive(tmp_path / "nameless", 1)[0].rename(tmp_path / "nameless.nc")
    with netCDF4.Dataset(nameless, "a") as data:
        data.renameVariable("time", "when")
    assert groups_of([nameless], "source")[0] == [Group("nameless", ((nameless, None),))]
    _, bad = groups_of([nameless], "yearly")
    assert "known times" in bad[0].expected
    with pytest.raises(BadInput, match="--layout"):
        SegmentConfig(layout="weekly")


def without(source: Path, target: Path, *names: str, **added: np.ndarray) -> Path:
    """A copy of a netCDF file without some variables, with others (lat, lon) added."""
    with netCDF4.Dataset(source) as old, netCDF4.Dataset(target, "w") as new:
        for dimension in old.dimensions.values():
            new.createDimension(dimension.name, dimension.size)
        for variable in old.variables.values():
            if variable.name not in names:
                copy = new.createVariable(variable.name, variable.dtype, variable.dimensions)
                copy.setncatts({key: variable.getncattr(key) for key in variable.ncattrs() if key != "_FillValue"})
                copy[:] = variable[:]
        for name, values in added.items():
            new.createVariable(name, "f4", ("lat", "lon"))[:] = values
            new[name].units = "kg m-1 s-1"
    return target


def test_rules_take_a_file_that_holds_what_they_read(tmp_path):
    whole = write_archive(tmp_path / "archive", 1)[0]
    with open_source(whole) as source:
        fields, grid = source.read(0).fields, source.axes.grid
    expected = parse_rules("rules:ivt").label(fields, grid)
    part = without(whole, tmp_path / "part.nc", *(set(INDEX) - parse_rules("rules:ivt").needs))
    label_group(Group("part", ((part, None),)), rules("rules:ivt"), tmp_path, SegmentConfig())
    assert np.array_equal(read_masks(tmp_path / "part.mask.nc").masks[0], expected)
    with pytest.raises(BadSource) as caught:
        label_group(Group("no", ((part, None),)), rules("rules:tempest"), tmp_path, SegmentConfig())
    assert "rules:ivt" in caught.value.skipped.remedy
    assert not (tmp_path / "no.mask.nc").exists()


def test_a_files_own_transport_goes_before_the_stand_in(tmp_path):
    path = write_archive(tmp_path / "archive", 1)[0]
    with open_source(path) as source:
        fields, grid = source.read(0).fields, source.axes.grid
    ivt = np.zeros(grid.shape)
    ivt[np.abs(grid.lat) > 30] = 0.0
    ivt[(grid.lat > 30) & (grid.lat < 50), : grid.shape[1] // 2] = 400.0
    own = without(path, tmp_path / "own.nc", IVT=ivt)
    label_group(Group("own", ((own, None),)), rules("rules:ivt"), tmp_path, SegmentConfig())
    mask = read_masks(tmp_path / "own.mask.nc").masks[0]
    assert np.array_equal(mask, parse_rules("rules:ivt").label(fields, grid, ivt))
    assert not np.array_equal(mask, parse_rules("rules:ivt").label(fields, grid))
    alone = without(path, tmp_path / "alone.nc", *INDEX, "LABELS", IVT=ivt)
    label_group(Group("alone", ((alone, None),)), rules("rules:ivt"), tmp_path, SegmentConfig())
    assert np.array_equal(read_masks(tmp_path / "alone.mask.nc").masks[0], mask)

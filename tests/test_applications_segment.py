"""Masks for an archive: one file per source, resumable, bad files reported, nothing half-written."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import netCDF4
import numpy as np
import pytest

from raysegment.applications.segment import SegmentConfig, segment
from raysegment.applications.synthesize import synthesize
from raysegment.archive.masks import artmip_path, mask_path, read_masks
from raysegment.archive.places import Place
from raysegment.archive.skipped import Skipped, allowed, check_budget, write_skipped
from raysegment.archive.snapshots import open_source
from raysegment.climate.channels import RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.rules import parse_rules
from raysegment.climate.synthetic import SyntheticConfig
from tests import layouts

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]
CONFIG = SyntheticConfig(snapshots=5, height=36, width=72)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    assert len(synthesize(folder, CONFIG)) == 5
    return folder


def test_synthesize_keeps_what_is_there(archive: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in archive.iterdir()}
    synthesize(archive, CONFIG)
    assert {p: p.stat().st_mtime_ns for p in archive.iterdir()} == before


def test_masks_equal_the_labeller_and_a_second_run_skips_them(archive: Path, tmp_path: Path) -> None:
    report = segment([archive], "rules:default", tmp_path / "masks")
    assert (len(report.written), report.snapshots, report.skipped) == (5, 5, [])
    assert sorted(report.written) == sorted((tmp_path / "masks").glob("*.nc"))
    for path in archive.iterdir():
        with open_source(path) as source:
            snapshot = source.read(0)
        expected = parse_rules("rules:default").label(snapshot.fields, snapshot.grid)
        assert np.array_equal(read_masks(mask_path(tmp_path / "masks", path)).masks[0], expected)
    before = {p: p.read_bytes() for p in (tmp_path / "masks").glob("*.nc")}
    next(iter(before)).unlink()
    again = segment([archive], "rules:default", tmp_path / "masks")
    assert (len(again.written), len(again.complete)) == (1, 4)
    assert {p: p.read_bytes() for p in (tmp_path / "masks").glob("*.nc")} == before


KILLED = """
import os, signal, sys
from pathlib import Path
from raysegment.applications.labellers import RulesLabeller
from raysegment.applications.mask_layout import groups_of
from raysegment.applications.segment import SegmentConfig, label_group
from raysegment.archive.snapshots import list_sources
from raysegment.climate.rules import parse_rules

class Mortal(RulesLabeller):
    def label(self, fields, grid, ivt=None):
        LEFT.pop()
        if not LEFT:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().label(fields, grid, ivt)

LEFT = [None] * int(sys.argv[3])
for group in groups_of(list_sources([sys.argv[1]]), sys.argv[4])[0]:
    labeller = Mortal(parse_rules("rules:default"), "rules:default")
    label_group(group, labeller, Path(sys.argv[2]), SegmentConfig(artmip=True, layout=sys.argv[4]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """A process dies in the second of two mask files, in its fourth snapshot of eight."""
    archive, out, config = tmp_path / "archive", tmp_path / "out", SegmentConfig(artmip=True, layout="monthly")
    archive.mkdir()
    for day in (0, 40):
        with netCDF4.Dataset(layouts.cam(archive / f"{day:02d}.nc"), "a") as data:
            data["time"][:] = data["time"][:] + day
    died = subprocess.run([sys.executable, "-c", KILLED, str(archive), str(out), "12", "monthly"], check=False, timeout=200)
    assert died.returncode == -signal.SIGKILL
    before = contents(out)
    whole = {name for name in before if not name.endswith(".tmp")}
    assert whole == {"1996-06.mask.nc", "1996-06.artmip.nc"}
    assert len(before) == 4, "two half-written files lie there"
    again = segment([archive], "rules:default", out, config)
    assert (len(again.written), len(again.complete), again.snapshots) == (1, 1, 8)
    segment([archive], "rules:default", tmp_path / "undisturbed", config)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert {name: contents(out)[name] for name in whole} == {name: before[name] for name in whole}


def test_with_one_bad_file_its_month_is_not_written_and_all_of_it_is_said(tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for day in range(3):
        with netCDF4.Dataset(layouts.cam(archive / f"{day}.nc", steps=1), "a") as data:
            data["time"][:] = data["time"][:] + day
            data["PSL"][:] = data["PSL"][:] if day else np.nan
    with pytest.raises(BadInput, match=r"0\.nc.*PSL.*3 of 3 files are bad"):
        segment([archive], "rules:default", out, SegmentConfig(layout="monthly", max_skipped=2))
    rows = list(csv.DictReader((out / "skipped.csv").open()))
    assert [(Path(row["file"]).name, "0.nc, which is bad" in row["got"]) for row in rows] == [
        ("0.nc", False), ("1.nc", True), ("2.nc", True)]  # fmt: skip
    assert not list(out.glob("*.mask.nc"))


def test_artmip_files_stand_beside_the_masks(archive: Path, tmp_path: Path) -> None:
    first = sorted(archive.iterdir())[0]
    segment([first], "rules:default", tmp_path, SegmentConfig(artmip=True))
    masks = read_masks(mask_path(tmp_path, first)).masks
    with netCDF4.Dataset(artmip_path(mask_path(tmp_path, first))) as data:
        assert np.array_equal(data["ar_binary_tag"][:], masks == RIVER)


def test_another_labeller_does_not_mix_in(archive: Path, tmp_path: Path) -> None:
    segment([archive], "rules:default", tmp_path)
    with pytest.raises(BadInput, match="another --out"):
        segment([archive], "rules:teca", tmp_path)


def test_bad_file_becomes_a_row_within_the_budget_and_an_error_beyond(archive: Path, tmp_path: Path) -> None:
    good = sorted(archive.iterdir())[:2]
    bad = tmp_path / "cut.nc"
    bad.write_bytes(good[0].read_bytes()[:5000])
    report = segment([*good, bad], "rules:default", tmp_path / "one", SegmentConfig(max_skipped=1))
    assert len(report.written) == 2
    rows = list(csv.DictReader((tmp_path / "one" / "skipped.csv").open()))
    assert [row["file"] for row in rows] == [str(bad)]
    assert rows[0]["expected"]
    assert rows[0]["remedy"]
    with pytest.raises(BadInput, match=r"cut\.nc.*max-skipped"):
        segment([*good, bad], "rules:default", tmp_path / "two")
    assert not list((tmp_path / "two").glob("*cut*"))  # of the good file, another process may have been in the middle


def test_two_sources_of_one_name_are_refused(archive: Path, tmp_path: Path) -> None:
    first = sorted(archive.iterdir())[0]
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / first.name
    twin.write_bytes(first.read_bytes())
    with pytest.raises(BadInput, match="different names"):
        segment([first, twin], "rules:default", tmp_path / "out")


@pytest.mark.parametrize(
    ("limit", "files", "expected"), [(0, 10, 0), (0.01, 99, 0), (0.01, 100, 1), (0.5, 3, 1), (1, 100, 1), (7, 3, 7)]
)
def test_budget_is_a_share_below_one_and_a_number_from_one_on(limit: float, files: int, expected: int) -> None:
    assert allowed(limit, files) == expected


def test_budget_and_report(tmp_path: Path) -> None:
    row = Skipped("a.nc", "16 channels", "15", "Add TS.")
    check_budget([row], 100, 1, tmp_path / "skipped.csv")
    with pytest.raises(BadInput, match="Add TS"):
        check_budget([row, row], 100, 1, tmp_path / "skipped.csv")
    with pytest.raises(BadInput, match="share below 1"):
        allowed(-1, 3)
    write_skipped(Place.of(tmp_path), [row])
    assert (tmp_path / "skipped.csv").exists()
    write_skipped(Place.of(tmp_path), [])
    assert not (tmp_path / "skipped.csv").exists()

"""Masks for an archive: one file per source, resumable, bad files reported, nothing half-written."""

from __future__ import annotations

import csv
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
    assert not list((tmp_path / "two").glob("cut*"))
    assert not list((tmp_path / "two").glob(".*tmp"))


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

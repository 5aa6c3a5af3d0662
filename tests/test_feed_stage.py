"""Staging: every tile as the source says, the same manifest however it was made, nothing official after an accident."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import cftime
import numpy as np
import pytest

from raysegment.archive.masks import mask_path, write_masks
from raysegment.archive.meter import ReadMeter
from raysegment.archive.shards import Manifest, open_shards, quantise
from raysegment.archive.snapshots import open_source, write_climatenet
from raysegment.climate.channels import CHANNELS
from raysegment.climate.checks import BadInput
from raysegment.climate.consensus import CONSENSUS, merge_labels
from raysegment.climate.grid import Grid
from raysegment.feed import stage as module
from raysegment.feed.pack import pack
from raysegment.feed.part import make_part
from raysegment.feed.stage import INSIDE, StageConfig, stage
from raysegment.feed.tiling import Tiling
from tests.small_archive import fields_and_mask, write_archive, write_with_labellers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]


@pytest.fixture
def archive(tmp_path) -> Path:
    write_archive(tmp_path / "archive", 5)
    return tmp_path / "archive"


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def test_tiles_and_totals_are_the_sources(archive, tmp_path):
    seen = []
    report = stage([archive], None, tmp_path / "s", StageConfig(files_per_part=2), progress=lambda *a: seen.append(a))
    shards = open_shards(tmp_path / "s")
    shards.verify()
    assert (len(shards), report.tiles, report.snapshots, report.shards, report.sources) == (5, 5, 5, 3, 5)
    fields, masks = zip(*(fields_and_mask(number) for number in range(5)), strict=True)
    for number, tile in enumerate(shards):
        np.testing.assert_array_equal(tile.fields, quantise(fields[number]))
        np.testing.assert_array_equal(tile.mask, masks[number])
    all_fields = np.stack(fields).astype(np.float64)
    np.testing.assert_allclose(shards.manifest.mean, all_fields.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(shards.manifest.std, all_fields.std((0, 2, 3)), rtol=1e-9)
    assert shards.manifest.class_counts == tuple(np.bincount(np.stack(masks).ravel(), minlength=3)) == report.class_counts
    assert shards.manifest.labels == INSIDE
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_tiles_of_a_size_are_cut_around_greenwich(archive, tmp_path):
    stage([archive], None, tmp_path / "s", StageConfig(tile=(12, 20)))
    shards, grid = open_shards(tmp_path / "s"), Grid.global_(16, 32)
    tiling = Tiling.of(grid.shape, (12, 20), periodic=True)
    assert len(shards) == 5 * 4
    with open_source(sorted(archive.iterdir())[1]) as source:
        fields = source.read(0).fields
    for tile in (shards.tile(number) for number in range(4, 8)):
        expected = tiling.cut(fields, tile.origin.row, tile.origin.column)
        np.testing.assert_array_equal(tile.fields, quantise(expected))
    assert not shards.manifest.periodic


def test_tiles_with_a_halo_share_its_cells_with_their_neighbours(archive, tmp_path):
    report = stage([archive], None, tmp_path / "s", StageConfig(tile=(12, 16), halo=4))
    shards = open_shards(tmp_path / "s")
    tiling = Tiling.of((16, 32), (12, 16), True, halo=4)
    assert len(shards) == report.tiles == 5 * len(tiling.corners) == 5 * 2 * 4
    first = [shards.tile(number) for number in range(8)]
    assert [(tile.origin.row, tile.origin.column) for tile in first] == tiling.corners
    for tile, neighbour in zip(first[:4], [*first[1:4], first[0]], strict=True):  # around the circle
        np.testing.assert_array_equal(tile.fields[..., 8:], neighbour.fields[..., :8])
        np.testing.assert_array_equal(tile.mask[..., 8:], neighbour.mask[..., :8])
    assert shards.manifest.halo == 4
    assert sum(shards.manifest.class_counts) == report.tiles * 12 * 16
    assert stage([archive], None, tmp_path / "s", StageConfig(tile=(12, 16), halo=3)).parts_reused == 0
    with pytest.raises(BadInput, match="two halos"):
        stage([archive], None, tmp_path / "s", StageConfig(tile=(12, 16), halo=6))


def test_the_bytes_do_not_depend_on_who_made_them(archive, tmp_path):
    """All parts in one process, and each alone in a run that was cut short before it."""
    stage([archive], None, tmp_path / "a", StageConfig(files_per_part=1))
    for number in (4, 1, 3):
        whole = tmp_path / "b"
        stage([archive], None, whole, StageConfig(files_per_part=1))
        (whole / f"part-{number:05d}.arrow").unlink()
        (whole / "manifest.json").unlink()
    report = stage([archive], None, whole, StageConfig(files_per_part=1))
    assert report.parts_reused == 4
    for name in ("manifest.json", *(f"part-{number:05d}.arrow" for number in range(5))):
        assert (tmp_path / "a" / name).read_bytes() == (whole / name).read_bytes()


def test_the_bytes_do_not_depend_on_the_number_of_processes(archive, tmp_path, monkeypatch):
    """Two at once, in whatever order they end; this one alone, one part after the other, the last one first."""
    made = []
    for name in ("two", "one"):
        stage([archive], None, tmp_path / name, StageConfig(files_per_part=1, tile=(12, 20)))
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")})
        monkeypatch.setattr(module, "_run", lambda jobs: map(make_part, reversed(jobs)))
    assert made[0] == made[1]
    assert len(made[0]) == 6


@pytest.mark.skipif(not ReadMeter().exact, reason="this system does not count what a thread reads")
@pytest.mark.parametrize("compression", [0, 1])
def test_each_source_byte_is_read_once(tmp_path, compression):
    for number in range(4):
        fields, mask = fields_and_mask(number, 192, 288)
        path = tmp_path / "a" / f"data-2000-01-0{number + 1}-00-1.nc"
        write_climatenet(path, fields, Grid.global_(192, 288), mask, cftime.DatetimeNoLeap(2000, 1, 1 + number), compression)
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    report = stage([tmp_path / "a"], None, tmp_path / "s", StageConfig(files_per_part=1))
    assert 0.95 * size < report.source_bytes < size
    assert report.source_bytes <= report.bytes_read <= 1.05 * report.source_bytes
    assert report.read_ratio == report.bytes_read / report.source_bytes
    again = stage([tmp_path / "a"], None, tmp_path / "s", StageConfig(files_per_part=1))
    assert (again.parts_reused, again.source_bytes, again.read_ratio) == (4, 0, 0.0)
    assert 0 < again.bytes_read < 100_000, "the first file's metadata"
    (tmp_path / "s" / "part-00002.arrow").unlink()
    again = stage([tmp_path / "a"], None, tmp_path / "s", StageConfig(files_per_part=1))
    assert again.source_bytes == pytest.approx(report.source_bytes / 4, rel=0.02)


def test_packing_is_quantising():
    for seed in range(3):
        fields, _ = fields_and_mask(seed, 20, 30)
        np.testing.assert_array_equal(pack(fields).view(np.uint16), quantise(fields).view(np.uint16))
        np.testing.assert_array_equal(pack(fields[:, 3:9, 5:]), quantise(fields[:, 3:9, 5:]))
    for limit in ("minimum", "maximum"):
        extreme = np.array([getattr(channel, limit) for channel in CHANNELS], np.float32)
        fields = np.broadcast_to(extreme[:, None, None], (len(CHANNELS), 2, 2)).copy()
        np.testing.assert_array_equal(pack(fields), quantise(fields))


def test_a_second_run_makes_nothing_again_and_a_changed_source_does(archive, tmp_path):
    out, config = tmp_path / "s", StageConfig(files_per_part=1)
    stage([archive], None, out, config)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")}
    assert stage([archive], None, out, config).parts_reused == 5
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrow")} == before
    fresh = write_archive(tmp_path / "new", 6)
    shutil.copy(fresh[5], archive / "data-2000-01-03-00-1.nc")
    assert stage([archive], None, out, config).parts_reused == 4
    assert stage([archive], None, out, StageConfig(tile=(8, 8), files_per_part=1)).parts_reused == 0
    shutil.rmtree(archive)
    write_archive(archive, 2)
    stage([archive], None, out, config)
    assert sorted(path.name for path in out.glob("*.arrow")) == ["part-00000.arrow", "part-00001.arrow"]
    open_shards(out).verify()


def test_masks_from_another_folder(archive, tmp_path):
    paths = sorted(archive.iterdir())
    with open_source(paths[0]) as source:
        axes = source.axes
    for number, path in enumerate(paths):
        with open_source(path) as source:
            mask = np.full((1, 16, 32), number % 3, np.uint8)
            write_masks(mask_path(tmp_path / "m", path), mask, axes, source.times, "rules:ivt")
    report = stage([archive], tmp_path / "m", tmp_path / "s")
    shards = open_shards(tmp_path / "s")
    assert shards.manifest.labels == "rules:ivt"
    assert [int(tile.mask.max()) for tile in shards] == [0, 1, 2, 0, 1]
    assert not report.skipped
    last = mask_path(tmp_path / "m", paths[4])
    shutil.copy(mask_path(tmp_path / "m", paths[3]), last)
    with pytest.raises(BadInput, match="times"):
        stage([archive], tmp_path / "m", tmp_path / "s")
    last.unlink()
    with pytest.raises(BadInput, match="no such file"):
        stage([archive], tmp_path / "m", tmp_path / "s")


def test_the_maps_of_several_labellers_become_one_by_the_rule_that_was_asked_for(tmp_path):
    (tmp_path / "a").mkdir()
    maps = np.random.default_rng(7).integers(0, 3, (2, 3, 16, 32)).astype(np.uint8)
    for number in range(2):
        write_with_labellers(tmp_path / "a" / f"data-2000-01-0{number + 1}-00-1.nc", maps[number], number)
    for rule in (*CONSENSUS, None):
        report = stage([tmp_path / "a"], None, tmp_path / "s", StageConfig(consensus=rule))
        expected = [maps[n][0] if rule is None else merge_labels(maps[n], rule) for n in range(2)]
        shards = open_shards(tmp_path / "s")
        for tile, mask in zip(shards, expected, strict=True):
            np.testing.assert_array_equal(tile.mask, mask)
        assert report.parts_reused == 0, "parts of another rule are made again"
        assert report.class_counts == tuple(np.bincount(np.stack(expected).ravel(), minlength=3))
        assert report.labels == shards.manifest.labels
        assert shards.manifest.labels == (INSIDE if rule is None else f"{INSIDE} ({rule} of each file's labellers)")
        assert report.source_bytes <= report.bytes_read
    assert stage([tmp_path / "a"], None, tmp_path / "s").parts_reused == 1
    with pytest.raises(BadInput, match="majority, any, all"):
        StageConfig(consensus="most")


@pytest.mark.parametrize("bad", [0, 3])
def test_bad_files_are_left_out_within_the_budget_only(archive, tmp_path, bad):
    victim = sorted(archive.iterdir())[bad]
    spoil(victim)
    out = tmp_path / "s"
    with pytest.raises(BadInput, match="1 of 5 files are bad"):
        stage([archive], None, out)
    assert not (out / "manifest.json").exists()
    for budget in (1, 0.2):
        report = stage([archive], None, out, max_skipped=budget)
        assert report.tiles == 4
        assert [row.file for row in report.skipped] == [str(victim)]
        rows = list(csv.DictReader((out / "skipped.csv").open()))
        assert [row["file"] for row in rows] == [str(victim)]
        assert rows[0]["expected"]
        assert rows[0]["got"]
    with pytest.raises(BadInput, match="1 of 5 files are bad"):
        stage([archive], None, out, max_skipped=0.19)
    assert not (out / "manifest.json").exists()


def test_other_grids_and_missing_labels_are_bad_files(tmp_path):
    write_archive(tmp_path / "a", 2)
    write_archive(tmp_path / "a" / "z", 1, height=20, width=40)
    write_archive(tmp_path / "a" / "y", 1, labels=False)
    report = stage([tmp_path / "a"], None, tmp_path / "s", max_skipped=2)
    assert sorted(Manifest.load(tmp_path / "s").sources) == ["data-2000-01-01-00-1.nc", "data-2000-01-02-00-1.nc"]
    reasons = " ".join(row.expected for row in report.skipped)
    assert "grid" in reasons
    assert "labels inside" in reasons


def test_nothing_usable_is_an_error(tmp_path):
    for path in write_archive(tmp_path / "a", 2):
        spoil(path)
    with pytest.raises(BadInput):
        stage([tmp_path / "a"], None, tmp_path / "s", max_skipped=2)
    assert not (tmp_path / "s" / "manifest.json").exists()
    with pytest.raises(BadInput, match="archive files"):
        stage([tmp_path / "nothing"], None, tmp_path / "s")
    write_archive(tmp_path / "b", 1)
    with pytest.raises(BadInput, match="no larger than the map"):
        stage([tmp_path / "b"], None, tmp_path / "s", StageConfig(tile=(17, 8)))


def test_tile_sizes_are_read_as_written():
    assert StageConfig.parse_tile("256x384") == (256, 384)
    assert StageConfig.parse_tile("64") == (64, 64)
    for text in ("axb", "", "0x3", "3x-1"):
        with pytest.raises(BadInput, match="256x384"):
            StageConfig.parse_tile(text)

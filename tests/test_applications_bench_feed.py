"""The bench of the feed: every reader delivers every tile once and unchanged; what cannot take part says why."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import ray

from raysegment.applications import bench_feed
from raysegment.applications.bench_feed import MODULES, OURS, FeedBenchConfig, prepare, write_source
from raysegment.applications.readers.apart import Apart, LeftOut, call_apart, write
from raysegment.archive.shards import open_shards
from raysegment.cli import BAD_INPUT, main
from tests.reader_passes import checksums, deliver, fail, sleep, vanish

ROOT = Path(__file__).resolve().parents[1]
TINY = FeedBenchConfig(height=16, width=32, tiles=6, repeats=1)
OPTIONAL = {"webdataset": "webdataset", "litdata": "litdata", "mosaic": "streaming"}
WORDS = ["bench", "feed", "height=16", "width=32", "tiles=4", "repeats=1", "steps=2", "step_s=0.02"]
WITH_RAY = ("stream", "stream_cached", "ray_parquet")
PATIENCE_S = 120.0


def ray_address() -> dict[str, str]:
    """The environment in which processes find this one's Ray."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def ready(name: str) -> str:
    """The name, or a skip where its library is not installed."""
    if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name]) is None:
        pytest.skip(f"{OPTIONAL[name]} is not installed")
    return name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_source(folder, TINY)
    return folder


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own find this file."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def readers() -> list:
    """(reader, consumers); one of them in a pair, the others alone, Ray's own, which takes a minute, among the slow tests."""
    pairs = [(name, world) for name in MODULES for world in (1, 2)]
    quick = {(name, 2 if name == "mmap_reused" else 1) for name in MODULES if name != "ray_parquet"}
    slow = {*pairs} - quick
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair in slow)) for pair in pairs]


@pytest.mark.ray
@pytest.mark.parametrize(("name", "world"), readers())
@pytest.mark.usefixtures("children", "two_cpus")
def test_every_reader_delivers_every_tile_once(name: str, world: int, source: Path, tmp_path: Path) -> None:
    ready(name)
    environment = ray_address() if name in WITH_RAY else {}
    call_apart(write, (MODULES[name], source, tmp_path / name), PATIENCE_S)
    ranks = [Apart(deliver, (MODULES[name], tmp_path / name, rank, world, environment), PATIENCE_S) for rank in range(world)]
    try:
        passes = [[rank.hear() for rank in ranks] for _ in range(2)]
    finally:
        for rank in ranks:
            rank.close()
    expected = sorted(crc for tile in open_shards(source) for crc in checksums(tile.fields, tile.mask))
    assert len(set(expected)) == TINY.tiles
    for shares in passes:
        assert sorted(crc for share in shares for crc in share) == expected
        assert [len(share) for share in shares] == [TINY.tiles // world] * world


def test_a_missing_library_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_feed.MODULES, "webdataset", "absent")
    monkeypatch.setattr(bench_feed, "OURS", ("mmap",))
    config = FeedBenchConfig(height=16, width=32, tiles=4, peers="webdataset,mmap_reused")
    folders, left_out = prepare(config, tmp_path, lambda *_: None)
    assert set(folders) == {"mmap", "mmap_reused"}
    assert left_out == {"webdataset": "raysegment.applications.readers.absent is not installed"}


@pytest.mark.parametrize(
    ("target", "patience_s", "reason"),
    [
        (fail, PATIENCE_S, "ValueError: chunks are"),
        (vanish, PATIENCE_S, "its process has ended"),
        (sleep, 0.1, "no answer within 0 s"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.usefixtures("children")
def test_a_failing_reader_says_why(target, patience_s: float, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysegment.applications.readers.apart._END_S", 0.1 if target is sleep else 10.0)
    apart = Apart(target, (), patience_s)
    with pytest.raises(LeftOut, match=reason):
        apart.hear()
    apart.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("consumers", ["[1]", "[1, 2]"])
def test_json_has_what_is_promised_and_nothing_else_is_printed(consumers: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, f"consumers={consumers}", "peers=hdf5_dataloader,mmap_reused", "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    result = json.loads(line)
    assert {"mmap_mib_s", "stream_mib_s", "ratio_to_mmap", "peers", "first_batch_s", "data_wait_share"} <= set(result)
    assert set(result["peers"]) == {"hdf5_dataloader", "mmap_reused"}
    assert set(result.get("two_consumers", {})) in (set(), {*OURS, "hdf5_dataloader", "mmap_reused"})
    assert ("two_consumers" in result) == (consumers == "[1, 2]")
    assert result["ratio_to_mmap"] == pytest.approx(result["stream_mib_s"] / result["mmap_mib_s"])
    assert (result["tiles"], result["tile"], result["left_out"]) == (4, [16, 16, 32], {})
    assert 0 <= result["data_wait_share"] <= 1


@pytest.mark.parametrize(
    "word", ["tiles=3", "height=0", "consumers=[2]", "peers=nobody", "directory=/nowhere", "step_s=0"], ids=str
)
def test_bad_input(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, word]) == BAD_INPUT
    message = " ".join(capsys.readouterr().err.split())
    assert "expected" in message
    assert "got" in message


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 0))
    assert main([*WORDS, f"directory={tmp_path}"]) == BAD_INPUT
    assert "GiB free" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())

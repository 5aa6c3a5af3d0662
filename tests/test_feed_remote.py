"""Shards in an object store: read through the node's cache, each once, and trained on as if they were on the disk."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from raysegment.archive.manifest import Manifest
from raysegment.archive.places import Place
from raysegment.archive.shards import ShardSet, open_shards
from raysegment.climate.checks import BadInput
from raysegment.elastic.train import train
from raysegment.feed.session import ensure_ray
from raysegment.feed.stage import StageConfig, stage
from raysegment.feed.store import Source, TileStore
from tests.s3 import Server, below
from tests.small_archive import write_archive, write_shards_of_one
from tests.small_training import config

pytestmark = pytest.mark.ray
TILES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shards_of_one(tmp_path_factory.mktemp("shards"), TILES)


@pytest.fixture(scope="module")
def remote(s3_server: Server, folder: Path) -> str:
    """The same set in an object store."""
    place = Place.of(below(s3_server.uri, "remote/shards"))
    for file in sorted(folder.iterdir()):
        with place.committed(file.name) as temporary:
            temporary.write_bytes(file.read_bytes())
    return place.text


def test_a_set_reads_the_same_from_either_place(folder, remote):
    here, there = open_shards(folder), open_shards(remote)
    assert here.manifest == there.manifest == Manifest.load(remote)
    there.verify()
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a.fields, b.fields)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.origin == b.origin
        assert b.intact


def test_a_tile_is_fetched_once_whatever_happens_to_the_line(folder, remote, s3_server, tmp_path):
    store = TileStore(Source(remote, str(tmp_path)))
    assert not store.source.in_place
    with s3_server.faults.answering("GET", "503 Slow Down", "SlowDown", times=2) as faults:
        assert store.prepare([0, 1]) == 2
        assert faults.fired == 2
    s3_server.faults.seen.clear()
    again = TileStore(Source(remote, str(tmp_path)))
    manifest_only = len(s3_server.faults.seen)
    assert again.prepare([1, 0, 1]) == 2 + 1
    assert len(s3_server.faults.seen) == manifest_only
    fields, mask = store.empty(1)
    again.read(1, fields[0], mask[0])
    np.testing.assert_array_equal(fields[0], ShardSet(folder).tile(1).fields)


def test_missing_rights_stop_at_once(remote, s3_server, tmp_path):
    store = TileStore(Source(remote, str(tmp_path)))
    with (
        s3_server.faults.answering("HEAD", "403 Forbidden", "AccessDenied", times=1000) as faults,
        pytest.raises(BadInput, match="credentials"),
    ):
        store.prepare([3])
    assert faults.fired >= 1


@pytest.fixture(scope="module")
def two_cpus_after(remote, end_of_ray):
    """A local Ray started after the store, so that its processes know the credentials."""
    ray.shutdown()
    ensure_ray(num_cpus=2)


@pytest.mark.usefixtures("two_cpus_after")
def test_staging_into_an_object_store_makes_the_same_bytes(s3_server, tmp_path):
    """Interrupted and run again too: parts that are there are not made again, what is no part of it goes."""
    archive, out = write_archive(tmp_path / "archive", 3), Place.of(below(s3_server.uri, "remote/staged"))
    one_each = StageConfig(files_per_part=1)
    stage(archive, None, tmp_path / "here", one_each)
    with out.committed("part-00007.arrow") as temporary:
        temporary.write_bytes(b"of an older set")
    first = stage(archive, None, out.text, one_each)
    out.remove("part-00001.arrow")
    out.remove("manifest.json")
    again = stage(archive, None, out.text, one_each)
    assert (first.parts_reused, again.parts_reused) == (0, 2)
    assert out.names() == ["manifest.json", *(f"part-{n:05d}.arrow" for n in range(3))]
    for name in out.names():
        assert out.read(name) == (tmp_path / "here" / name).read_bytes()
    write_archive(tmp_path / "more", 1, height=20)
    report = stage([tmp_path / "archive", tmp_path / "more"], None, out.text, one_each, max_skipped=1)
    assert [Path(row.file).parent.name for row in report.skipped] == ["more"]
    assert b"grid" in out.read("skipped.csv")


@pytest.mark.slow
@pytest.mark.usefixtures("two_cpus_after")
def test_training_from_an_object_store_gives_the_same_weights(folder, remote, tmp_path):
    assert os.environ["AWS_ACCESS_KEY_ID"]
    base = config(folder, tmp_path / "here", steps=3)
    cached = replace(base, shards=remote, out=str(tmp_path / "there"), workers=2,
                     feed=replace(base.feed, cache=str(tmp_path / "cache")))  # fmt: skip
    here, there = train(base), train(cached)
    assert here["state_sha256"] == there["state_sha256"]
    fetched = sorted(path.name for path in (tmp_path / "cache").rglob("*.arrow"))
    assert fetched == [f"part-{number:05d}.arrow" for number in range(TILES)]

"""A node's cache fetches a shard once for all its processes, keeps to its limit, and forgets the longest unused first."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from raysegment.archive import cache
from raysegment.archive.cache import ShardCache
from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from tests.small_archive import write_shards_of_one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shards_of_one(tmp_path_factory.mktemp("shards"), 6)


def open_cache(folder: Path, root: Path, shards: float) -> ShardCache:
    """With room for so many shards."""
    manifest = Manifest.load(folder)
    largest = max(shard.bytes for shard in manifest.shards)
    return ShardCache(root, set_id(manifest_bytes(folder)), manifest, Place.of(folder), int(shards * largest))


def fetched(shards: ShardCache, number: int) -> Path:
    """The path of a shard that has been fetched."""
    os.close(shards.open(number))
    return shards.path(number)


def held(root: Path) -> set[int]:
    return {int(path.stem[-5:]) for path in root.glob("*/*.arrow")}


def use(shards: ShardCache, *numbers: int) -> None:
    for number in numbers:
        path = fetched(shards, number)
        newest = max((lock.stat().st_mtime_ns for lock in path.parent.glob("*.lock")), default=0)
        os.utime(f"{path}.lock", ns=(newest + 1, newest + 1))  # the clock of a file system may be coarse


def test_a_shard_is_fetched_once_and_whole(folder, tmp_path, monkeypatch):
    asked, plain = [], Place.fetch
    monkeypatch.setattr(Place, "fetch", lambda self, name, target: asked.append(name) or plain(self, name, target))
    one, other = open_cache(folder, tmp_path, 9), open_cache(folder, tmp_path, 9)
    assert fetched(one, 2) == fetched(other, 2)
    assert asked == ["part-00002.arrow"]
    assert one.path(2).read_bytes() == (folder / "part-00002.arrow").read_bytes()
    assert one.holds(2)
    assert not one.holds(3)


def test_the_longest_unused_go_first(folder, tmp_path):
    shards = open_cache(folder, tmp_path, 3.5)
    use(shards, 0, 1, 2)
    assert held(tmp_path) == {0, 1, 2}
    use(shards, 0, 3)
    assert held(tmp_path) == {0, 2, 3}
    use(shards, 4, 5)
    assert held(tmp_path) == {3, 4, 5}
    use(open_cache(folder, tmp_path, 0.1), 1)
    assert held(tmp_path) == {1}, "the one that is asked for is always there"


def test_an_interrupted_fetch_is_no_shard(folder, tmp_path, monkeypatch):
    shards = open_cache(folder, tmp_path, 9)

    def cut_short(self, name, target):
        target.write_bytes(b"half")
        raise OSError("the line is down")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "fetch", cut_short)
        with pytest.raises(OSError, match="line"):
            shards.open(0)
    assert not held(tmp_path)
    assert fetched(shards, 0).stat().st_size == shards.manifest.shards[0].bytes


def test_a_full_disk_is_said_before_it_is_full(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(cache._SPARE_BYTES + 100))
    with pytest.raises(BadInput, match=r"room for .* MiB, got 256 MiB free"):
        open_cache(folder, tmp_path, 9).open(0)
    assert not held(tmp_path)


def test_a_file_that_is_evicted_stays_readable_for_its_reader(folder, tmp_path):
    shards = open_cache(folder, tmp_path, 1.5)
    with fetched(shards, 0).open("rb") as file:
        fetched(shards, 1)
        assert held(tmp_path) == {1}
        assert file.read() == (folder / "part-00000.arrow").read_bytes()


def test_a_shard_that_goes_at_the_worst_moment_is_fetched_again(folder, tmp_path, monkeypatch):
    """Another process fetches it while this one waits for the lock, and evicts it before this one opens it."""
    shards, evicted, plain = open_cache(folder, tmp_path, 0.1), [], os.open

    class Lock(cache.FileLock):
        def __enter__(self):
            if self.lock_file.endswith(".arrow.lock"):
                shutil.copy(folder / shards.path(0).name, shards.path(0))
            return super().__enter__()

    def evicting(path, *arguments):
        if path == shards.path(0) and shards.path(0).exists():
            shards.path(0).unlink()
            evicted.append(path)
        return plain(path, *arguments)

    monkeypatch.setattr(cache, "FileLock", Lock)
    monkeypatch.setattr(cache.os, "open", evicting)
    handle = shards.open(0)
    assert evicted
    assert os.pread(handle, shards.manifest.shards[0].bytes, 0) == (folder / "part-00000.arrow").read_bytes()
    os.close(handle)


def _fetch_all(folder: Path, root: Path, log: Path) -> None:
    plain = Place.fetch

    def fetch(self, name, target):
        with log.open("a") as file:
            file.write(f"{name}\n")
        return plain(self, name, target)

    Place.fetch = fetch
    shards = open_cache(folder, root, 9)
    for number in range(6):
        fetched(shards, number)


def test_processes_of_a_node_fetch_together_what_each_needs(folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fetch_all, args=(folder, tmp_path / "c", tmp_path / "log")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted((tmp_path / "log").read_text().split()) == [f"part-{n:05d}.arrow" for n in range(6)]


def test_somebody_elses_node_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache.node_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(cache.os, "getuid", lambda: 4711)
    shutil.move(folder, tmp_path / "raysegment-4711")
    with pytest.raises(BadInput, match="somebody else"):
        cache.node_folder()

"""Shards of a remote set on this node's disk: fetched whole and once, shared by its processes, the longest unused go first.

    cache/<first 16 digits of the set's id>/part-00000.arrow …    the files, as they are at the source
    cache/<…>/part-00000.arrow.lock                               held while one is fetched, touched when it is used

A file that has its name is complete: it is fetched under another one and renamed. One that is evicted while a process
reads from it stays readable for that process until it lets go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput

_SPARE_BYTES = 256 << 20  # of the disk, left to others
_TEMPORARY, _LOCK = ".fetching", ".lock"


def node_folder() -> Path:
    """Where this user's processes on this node keep what they share: a private folder below the temporary one."""
    folder = Path(tempfile.gettempdir()) / f"raysegment-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BadInput(folder, "a folder of this user", "one of somebody else", "Set TMPDIR to a folder of your own")
    return folder


class Source(Protocol):
    """Where a cache gets its files from: a `Place`, or others that have them."""

    def fetch(self, name: str, target: Path) -> int:
        """Bytes copied from a file to the local path `target`; FileNotFoundError when there is none of that name."""
        ...


class ShardCache:
    """The shards of one set below `folder`, which holds at most `limit_bytes` of all sets and those being fetched."""

    def __init__(self, folder: Path, set_id: str, manifest: Manifest, source: Source, limit_bytes: int):
        self.root, self.folder = folder, folder / set_id[:16]
        self.manifest, self.source, self.limit_bytes = manifest, source, limit_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, shard: int) -> Path:
        """Where a shard is when it is here."""
        return self.folder / self.manifest.shards[shard].file

    def open(self, shard: int) -> int:
        """A file descriptor of a shard, fetched when it is not here; FileNotFoundError when the source has none."""
        path = self.path(shard)
        try:
            handle = _opened(path)
            if handle is None:
                with FileLock(f"{path}{_LOCK}"):
                    handle = _opened(path)
                    return self._fetch(shard, path) if handle is None else handle
            return handle
        finally:
            self.used(shard)

    def used(self, shard: int) -> None:
        """Mark a shard as used now."""
        lock = f"{self.path(shard)}{_LOCK}"
        try:
            os.utime(lock)
        except FileNotFoundError:
            Path(lock).touch()

    def holds(self, shard: int) -> bool:
        return self.path(shard).exists()

    def discard(self, shard: int) -> None:
        """Remove a copy, because it is damaged."""
        self.path(shard).unlink(missing_ok=True)

    def _fetch(self, shard: int, path: Path) -> int:
        """Fetch a shard and open it before it has its name, by which others could evict it."""
        held = self.manifest.shards[shard]
        with FileLock(self.root / "room.lock"):
            make_room(self.root, held.bytes, self.limit_bytes)
        temporary = path.with_name(f"{held.file}{_TEMPORARY}")
        try:
            self.source.fetch(held.file, temporary)
            handle = os.open(temporary, os.O_RDONLY)
            os.replace(temporary, path)
            return handle
        finally:
            temporary.unlink(missing_ok=True)


def _opened(path: Path) -> int | None:
    """A descriptor of a file, None when it is not here; not asked for first: it can be evicted at any moment."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def make_room(root: Path, count: int, limit_bytes: int) -> None:
    """Remove the files longest unused until `count` more bytes fit into the limit and the disk; BadInput when they cannot."""
    files = sorted(_files(root))
    held = sum(size for _, size, _ in files)
    for _, size, path in files:
        if held + count <= limit_bytes and _free(root) >= count + _SPARE_BYTES:
            return
        path.unlink(missing_ok=True)
        held -= size
    if _free(root) < count + _SPARE_BYTES:
        got = f"{_free(root) / 2**20:.0f} MiB free, {_SPARE_BYTES >> 20} of them left to others"
        raise BadInput(root, f"room for {count / 2**20:.0f} MiB", got, "Free some, or set feed.cache to a larger disk")


def _files(root: Path) -> list[tuple[int, int, Path]]:
    """(when last used, bytes, path) of every complete file."""
    found = []
    for path in root.glob("*/*.arrow"):
        with suppress(FileNotFoundError):  # evicted meanwhile by another process
            lock = path.with_name(path.name + _LOCK)
            found.append(((lock if lock.exists() else path).stat().st_mtime_ns, path.stat().st_size, path))
    return found


def _free(root: Path) -> int:
    return shutil.disk_usage(root).free

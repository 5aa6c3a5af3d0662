"""Tiles copied out of shard files into the caller's arrays, each proved by its CRC-32 before its first use on this node.

    file (page cache) → the caller's arrays: one copy, by `preadv`

Nothing is mapped: a failing disk or network file system gives an error that can be answered, not a signal that kills the
process. A tile that has been proved once is not checked again by any process of the node while its file stays the same:
a *ledger* beside the node's other working files says which, one byte per tile.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from raysegment.archive.files import inside
from raysegment.archive.manifest import Manifest, Shard
from raysegment.archive.retry import patiently

_OPEN_FILES = 256
_PROVED = 1


class Damaged(Exception):
    """A tile whose bytes are not, or no longer, those that were staged; the text says how it shows."""


class Files(Protocol):
    """Where the files of a shard set are on this node (a folder, a cache), and how they are opened, by number."""

    def path(self, shard: int) -> Path: ...
    def open(self, shard: int) -> int: ...
    def used(self, shard: int) -> None: ...


@dataclass(frozen=True)
class Folder:
    """Shards that are read where they are."""

    folder: Path
    manifest: Manifest

    def path(self, shard: int) -> Path:
        return inside(self.folder, self.manifest.shards[shard].file)

    def open(self, shard: int) -> int:
        return os.open(self.path(shard), os.O_RDONLY)

    def used(self, shard: int) -> None:
        """Nobody counts."""


class TileReader:
    """Reads tiles of a shard set from its `files`; several threads may share one.

    `ledger` is a folder for what has been proved on this node, None to prove every tile at every reading.
    """

    def __init__(self, manifest: Manifest, files: Files, ledger: Path | None = None):
        self.manifest, self._files, self._ledger = manifest, files, ledger
        self._opened: OrderedDict[int, _ShardFile] = OrderedDict()
        self._lock = Lock()

    def read(self, number: int, fields: NDArray[np.float16], mask: NDArray[np.uint8]) -> None:
        """Tile `number` into `fields (16, h, w)` and `mask (h, w)`, contiguous; `Damaged` when its bytes are not as staged.

        Errors that pass are waited for; BadInput where reading is forbidden.
        """
        shard, place = self.manifest.find(number)
        try:
            patiently(lambda: self._file(shard).read(place, fields, mask), f"{self.manifest.shards[shard].file}, tile {place}")
        except FileNotFoundError as error:
            raise Damaged(f"{error.filename or error}: no such file") from None

    def proved(self, number: int) -> bool:
        """True when the tile has been read and proved on this node, and its file is still the same."""
        shard, place = self.manifest.find(number)
        try:
            return self._file(shard).proved(place)
        except OSError:
            return False

    def _file(self, shard: int) -> _ShardFile:
        with self._lock:
            file = self._opened.get(shard)
            if file is not None and file.linked:
                self._opened.move_to_end(shard)
                self._files.used(shard)
                return file
        handle = self._files.open(shard)  # may fetch it: not under the lock
        file = _ShardFile(handle, self._files.path(shard), self.manifest.shards[shard], self._ledger)
        with self._lock:
            self._opened[shard] = file
            while len(self._opened) > _OPEN_FILES:
                self._opened.popitem(last=False)  # closed when the last thread that reads from it lets go
        return file


class _ShardFile:
    """An open shard file and its page of the ledger."""

    def __init__(self, handle: int, path: Path, shard: Shard, ledger: Path | None):
        self._handle, self._path, self._shard = handle, path, shard
        self._page = _page(ledger, path, os.fstat(self._handle), shard) if ledger else bytearray(shard.tiles)

    def __del__(self) -> None:
        os.close(self._handle)

    @property
    def linked(self) -> bool:
        """False once the file has been removed or replaced (evicted from a cache, fetched anew)."""
        return os.fstat(self._handle).st_nlink > 0

    def proved(self, place: int) -> bool:
        return self._page[place] == _PROVED

    def read(self, place: int, fields: NDArray[np.float16], mask: NDArray[np.uint8]) -> None:
        start, stop = self._shard.offsets[place : place + 2]
        body = start + self._shard.body
        if self.proved(place):
            self._fill(body, [_bytes(fields), _bytes(mask)])
            return
        head = memoryview(bytearray(self._shard.body))
        tail = memoryview(bytearray(stop - body - fields.nbytes - mask.nbytes))
        parts = [head, _bytes(fields), _bytes(mask), tail]
        self._fill(start, parts)
        self._check(place, parts)
        self._page[place] = _PROVED

    def _check(self, place: int, parts: list[memoryview]) -> None:
        crc, expected = 0, self._shard.crc32[place]
        for part in parts:
            crc = isal_zlib.crc32(part, crc)
        if crc != expected:
            raise Damaged(f"{self._path}: tile {place} has CRC-32 {crc:08x}, the manifest says {expected:08x}")

    def _fill(self, start: int, parts: list[memoryview]) -> None:
        """Bytes from `start` on into `parts`, one after the other."""
        rest = [part for part in parts if part.nbytes]
        while rest:
            count = os.preadv(self._handle, rest, start)
            if count == 0:
                size = os.fstat(self._handle).st_size
                raise Damaged(f"{self._path}: {size} bytes, the manifest says {self._shard.bytes}: cut short")
            start += count
            rest = _after(rest, count)


def _after(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `parts` when their first `count` bytes are filled."""
    rest = []
    for part in parts:
        if count < part.nbytes:
            rest.append(part[count:])
        count = max(0, count - part.nbytes)
    return rest


def _bytes(array: NDArray) -> memoryview:
    assert array.flags.c_contiguous
    return memoryview(array.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]


def _page(ledger: Path, path: Path, status: os.stat_result, shard: Shard) -> mmap.mmap:
    """The ledger's page for one file as it is now: `tiles` bytes that all processes of the node share."""
    held = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, shard.sha256)
    name = f"{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}-{path.name}"
    page = ledger / f"{name}.{hashlib.sha256(repr(held).encode()).hexdigest()[:16]}"
    if not page.exists():
        ledger.mkdir(parents=True, exist_ok=True)
        for other in ledger.glob(f"{name}.*"):
            if other != page:  # which another process may have begun just now
                other.unlink(missing_ok=True)
    handle = os.open(page, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(handle, shard.tiles)
        return mmap.mmap(handle, shard.tiles)
    finally:
        os.close(handle)

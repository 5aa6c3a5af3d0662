"""Copies of a set's shard files in a folder of this node: which are whole, taking bytes in, giving them away.

A copy is whole when its SHA-256 is the manifest's. That is found out by reading it once: `.verified` beside the files says,
a line per file, in which state it was then, and a file still in that state is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysegment.archive.files import committed
from raysegment.archive.manifest import Shard
from raysegment.archive.reader import Damaged

_RECORD = ".verified"
_READERS = 4  # threads that prove files: digests are computed outside Python's lock
_TEMPORARY = re.compile(r"\.(\d+)\.tmp$")  # as `committed` names them, with the process that writes


class Copies:
    """The files of `shards` that are in `folder`; shards are named by their number."""

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self.folder, self.shards = folder, shards

    def prepare(self) -> None:
        """Make the folder where it is absent."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].file

    @property
    def free_bytes(self) -> int:
        """What this user may still write to the folder's disk."""
        return shutil.disk_usage(self.folder).free

    def whole(self) -> frozenset[int]:
        """The shards whose file is here with all its bytes as they must be. What dead writers left half-written goes."""
        self._clear()
        known = self._known()
        with ThreadPoolExecutor(_READERS) as pool:
            good = list(pool.map(lambda shard: self._is_whole(shard, known), range(len(self.shards))))
        held = frozenset(shard for shard, is_good in enumerate(good) if is_good)
        self._write_record(held)
        return held

    def take(self, shard: int, data: memoryview) -> None:
        """Write a shard's bytes under its name, on the disk when this returns; `Damaged`, nothing written, if not its own."""
        self.prove(shard, data, "what was received")
        with committed(self.path(shard)) as temporary, temporary.open("wb") as file:
            file.write(data)
        with (self.folder / _RECORD).open("a") as record:  # one short write at the end of a local file: lines do not mix
            record.write(self._line(shard))

    def read(self, shard: int) -> NDArray[np.uint8]:
        """A shard's bytes; `Damaged`, and the copy removed, when they are not its own."""
        data = np.fromfile(self.path(shard), np.uint8)
        try:
            self.prove(shard, data.data, str(self.path(shard)))
        except Damaged:
            self.path(shard).unlink(missing_ok=True)
            raise
        return data

    def prove(self, shard: int, data: memoryview, where: str) -> None:
        """`Damaged`, naming `where` they are from, unless these are a shard's bytes."""
        expected, got = self.shards[shard].sha256, hashlib.sha256(data).hexdigest()
        if got != expected:
            raise Damaged(f"{where}: {len(data)} bytes of SHA-256 {got[:12]}…, the manifest says {expected[:12]}…")

    def remove(self, shards: Iterable[int]) -> int:
        """Delete files; how many there were."""
        paths = [path for shard in shards if (path := self.path(shard)).exists()]
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _is_whole(self, shard: int, known: dict[str, list]) -> bool:
        path, held = self.path(shard), self.shards[shard]
        try:
            if path.stat().st_size != held.bytes:
                return False
            if known.get(held.file) == [held.sha256, *_state(path)]:
                return True
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == held.sha256
        except OSError:  # absent, or on a failing disk: not to be relied on
            return False

    def _known(self) -> dict[str, list]:
        """[SHA-256, *state] of each file when it was last proved."""
        try:
            lines = (self.folder / _RECORD).read_text().splitlines()
        except OSError:
            return {}
        return {entry[0]: entry[1:] for line in lines if (entry := _parsed(line))}

    def _line(self, shard: int) -> str:
        """A shard's line in the record, empty when the cache that shares the folder has evicted it meanwhile."""
        try:
            return json.dumps([self.shards[shard].file, self.shards[shard].sha256, *_state(self.path(shard))]) + "\n"
        except FileNotFoundError:
            return ""

    def _write_record(self, held: Iterable[int]) -> None:
        with committed(self.folder / _RECORD) as temporary:
            temporary.write_text("".join(self._line(shard) for shard in sorted(held)))

    def _clear(self) -> None:
        for path in self.folder.glob(".*.tmp"):
            writer = _TEMPORARY.search(path.name)
            if writer and not _is_running(int(writer[1])):
                path.unlink(missing_ok=True)


def _state(path: Path) -> tuple[int, int, int, int]:
    """What changes when a file is written or replaced (a change time cannot be set back)."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _parsed(line: str) -> list | None:
    """A line of the record; None for one that was cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

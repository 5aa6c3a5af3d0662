"""The newest complete state of a run in a node's memory, where it outlives every process of the run.

    FOLDER/RUN/NODE/
        TOKEN-0.safetensors, TOKEN-0.json       two slots of the one process that keeps states on this node;
        TOKEN-1.safetensors, TOKEN-1.json       TOKEN is its own

FOLDER is in a tmpfs. There is no process that could die: files are the memory. A state goes into the slot of the older
one, and counts from the moment its record appears; until then the newer one is untouched. Whoever reads checks everything,
so a slot that was being written when its writer was killed is passed over.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from isal import isal_zlib
from torch import Tensor

from raysegment.climate.checks import BadInput
from raysegment.elastic import packed
from raysegment.elastic.packed import BLOCK, unpack
from raysegment.elastic.shelves import write_all

OFF = "off"
STALE_DAYS = 7.0  # a run that has kept nothing for so long is taken for dead
_SPARE_BYTES = 256 << 20  # that a node's memory must have beyond the states
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class Kept:
    """A state that was kept and found whole: its tensors by name, and what was said about it."""

    step: int
    node: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Listed:
    """A state that a node says it keeps; its tensors have not been looked at."""

    step: int
    node: str
    facts: dict[str, Any]


def memory_folder(setting: str = "") -> Path | None:
    """The folder that a setting names: "" one below /dev/shm of this user's own, "off" none."""
    if setting == OFF:
        return None
    return Path(setting) if setting else Path(f"/dev/shm/raysegment-{os.getuid()}")


class Keeper:
    """Keeps the states of one run on one node; one process per node has one. `off` says why nothing is kept, if so."""

    def __init__(self, folder: str | Path, run_key: str, node: str, stale_days: float = STALE_DAYS):
        for what, name in (("run", run_key), ("node", node)):
            if not _NAME.fullmatch(name):
                raise BadInput(f"keeper's {what}", "letters, digits, dots, - and _", name, "Give another name.")
        self.folder = Path(folder) / run_key / node
        self._token, self._slot, self._alone = secrets.token_hex(6), 1, False
        self._bytes = [0, 0]  # of each slot
        self.off = _unfit(Path(folder))
        if not self.off:
            forget_stale(folder, stale_days, but=run_key)
            self.off = self._open(Path(folder))

    def keep(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> float:
        """Seconds it took to keep a state (0 when this is off); OSError where it fails, what was kept before still is.

        `facts` must be readable as JSON. The tensors must not change meanwhile.
        """
        started, size = time.perf_counter(), packed.size(tensors)
        if not self.off:
            self.off = self._cramped(size)
        if self.off:
            return 0.0
        slot = 1 - self._slot
        data, record = self._files(slot)
        record.unlink(missing_ok=True)
        try:
            crc = _write(data, tensors, size)
        except OSError:
            data.unlink(missing_ok=True)
            self._bytes[slot] = 0
            raise
        about = {"format": _FORMAT, "step": step, "node": self.folder.name, "time": time.time(), "pid": os.getpid()}
        _commit(record, {**about, "facts": dict(facts), "bytes": size, "crc32": crc})
        self._slot, self._bytes[slot] = slot, size
        self._remove_others()
        return time.perf_counter() - started

    def _files(self, slot: int) -> tuple[Path, Path]:
        return self.folder / f"{self._token}-{slot}.safetensors", self.folder / f"{self._token}-{slot}.json"

    def _open(self, root: Path) -> str:
        """Make the folders; why that is impossible, or nothing."""
        try:
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                _check_private(folder)
        except OSError as error:
            return f"{root}: {error.strerror or error}"
        _remove_all_but_newest(self.folder)
        return ""

    def _cramped(self, size: int) -> str:
        """Why there is no room for two states of `size` bytes, or nothing."""
        missing = sum(max(0, size - have) for have in self._bytes)
        room = room_bytes(self.folder)
        if missing and missing + _SPARE_BYTES > room:
            return f"{self.folder}: two states need {missing / 2**30:.2f} GiB more, {room / 2**30:.2f} GiB are free"
        return ""

    def _remove_others(self) -> None:
        """Delete what earlier processes kept on this node: this one has a newer state now."""
        if not self._alone:
            for path in self.folder.iterdir():
                if not path.name.startswith(self._token):
                    path.unlink(missing_ok=True)
            self._alone = True


def newest(folder: str | Path, run_key: str, accept: Callable[[Listed], bool] = lambda _: True) -> Kept | None:
    """The newest whole state of a run that any node has kept on this machine and `accept` accepts, or None."""
    for record in _records(Path(folder) / run_key):
        listed = _listed(record)
        if accept(listed) and (tensors := _load(record)) is not None:
            return Kept(listed.step, listed.node, tensors, listed.facts)
    return None


def steps(folder: str | Path, run_key: str) -> list[Listed]:
    """What the nodes' records on this machine say is kept of a run, newest first; tensors are not read."""
    return [_listed(record) for record in _records(Path(folder) / run_key)]


def forget(folder: str | Path, run_key: str) -> None:
    """Remove all that is kept of a run on this machine."""
    assert _NAME.fullmatch(run_key), run_key
    shutil.rmtree(Path(folder) / run_key, ignore_errors=True)


def forget_stale(folder: str | Path, days: float, but: str = "") -> list[str]:
    """Remove the runs that have kept nothing for `days`, except the run `but`; their keys."""
    limit, gone = time.time() - days * 86400, []
    for run in sorted(path for path in Path(folder).iterdir() if path.is_dir() and path.name != but):
        with suppress(OSError):  # another process was faster
            if _is_ours(run) and all(path.lstat().st_mtime < limit for path in chain((run,), run.rglob("*"))):
                forget(folder, run.name)
                gone.append(run.name)
    return gone


def room_bytes(folder: Path) -> int:
    """Bytes that may be kept in a folder of a tmpfs: what its size and the machine's memory leave."""
    room = shutil.disk_usage(folder).free
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        room = min(room, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # "max" is no number, and no limit
        group = Path("/sys/fs/cgroup")
        room = min(room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return room


def _unfit(folder: Path) -> str:
    """Why states cannot be kept in a folder, or nothing. The default must be memory; of another the user knows what it is."""
    if folder == memory_folder() and not _is_tmpfs(folder.parent):
        return f"{folder.parent} is no tmpfs: no states are kept in memory; checkpoint.memory names another folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.getuid()):
        return f"{folder} belongs to somebody else: no states are kept in memory"
    return ""


def _is_tmpfs(folder: Path) -> bool:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    kinds = dict(mounts)  # the last mount of a point is the one to be seen
    at = next((str(parent) for parent in (folder, *folder.parents) if str(parent) in kinds), "")
    return kinds.get(at) in ("tmpfs", "ramfs")


def _check_private(folder: Path) -> None:
    if not _is_ours(folder):
        raise PermissionError(1, f"{folder} belongs to somebody else")
    folder.chmod(0o700)


def _is_ours(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _remove_all_but_newest(folder: Path) -> None:
    """Make room: of earlier processes' files only the newest whole state stays. Read once, at the start."""
    stay: set[str] = set()
    for record in _records(folder.parent, folder.name):
        if _load(record) is not None:
            stay = {record["path"].name, _data(record["path"]).name}
            break
    for path in folder.iterdir():
        if path.name not in stay:
            path.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor], size: int) -> int:
    """Write tensors over a slot, whose memory is used again; their CRC-32.

    A write into a file's pages fails with an error where memory is short; through a map it would end the process.
    """
    crc, handle = 0, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        for block in packed.blocks(tensors):
            crc = isal_zlib.crc32(block, crc)  # a tenth of a second per GiB; as the write, without the interpreter
            write_all(handle, block)
        os.ftruncate(handle, size)
    finally:
        os.close(handle)
    return crc


def _commit(path: Path, record: Mapping[str, Any]) -> None:
    """The record appears whole: the CRC-32 of its text in hexadecimal, a line break, the text."""
    text = json.dumps(record).encode()
    temporary = path.with_suffix(".tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        write_all(handle, memoryview(b"%08x\n%s" % (zlib.crc32(text), text)))
    finally:
        os.close(handle)
    os.replace(temporary, path)


def _records(run: Path, node: str = "*") -> list[dict[str, Any]]:
    """The undamaged records of a run's nodes, newest step first, each with its `path`."""
    try:
        if not _is_ours(run):
            return []
        found = [_record(path) for path in run.glob(f"{node}/*.json")]
    except OSError:
        return []
    return sorted((record for record in found if record), key=lambda record: (record["step"], record["time"]), reverse=True)


def _record(path: Path) -> dict[str, Any] | None:
    try:
        crc, _, text = path.read_bytes().partition(b"\n")
        if crc != b"%08x" % zlib.crc32(text):
            return None
        record = json.loads(text)
    except (OSError, ValueError):
        return None
    return {**record, "path": path} if record.get("format") == _FORMAT else None


def _listed(record: Mapping[str, Any]) -> Listed:
    return Listed(record["step"], record["node"], record["facts"])


def _data(record: Path) -> Path:
    return record.with_suffix(".safetensors")


def _load(record: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that a record describes, None where they are not as it says. What is checked is a copy of our own."""
    try:
        with _data(record["path"]).open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != record["bytes"]:
                return None
            content = torch.empty(record["bytes"], dtype=torch.uint8)
            crc, view = 0, content.numpy().data
            while count := file.readinto(view[:BLOCK]):
                crc, view = isal_zlib.crc32(view[:count], crc), view[count:]
        return unpack(content) if crc == record["crc32"] and not view else None
    except (OSError, ValueError):
        return None

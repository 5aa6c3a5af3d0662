"""Writers that are stopped: a disk that fails or a process that ends after so many bytes and operations; and real kills.

Every operation that changes a folder counts: a write as many as its bytes, anything else (creating, renaming, deleting,
syncing) one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from raysegment.archive.places import Place
from raysegment.climate.channels import CLASSES, NAMES
from raysegment.elastic.checkpoints import Facts, write_checkpoint
from raysegment.elastic.keeper import Keeper
from raysegment.networks import NetworkConfig
from tests.helpers import ROOT

CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "ftruncate")


class Died(BaseException):
    """The process is gone: nothing of it runs any more, no cleaning up either."""


class Disk:
    """Stands between `os` and the disk. At `budget` the n-th byte or operation meets `end`; `spent` counts."""

    def __init__(self, budget: float, end: Callable[[], BaseException], writes_only: bool = False):
        self.budget, self.end, self.writes_only, self.spent, self.ended = budget, end, writes_only, 0, False
        self.real = {name: getattr(os, name) for name in (*CHANGES, "open", "write")}
        self.dirty: set[int] = set()  # inodes of files that are not synced
        self.renamed: list[tuple[Path, Path]] = []  # and renames
        self.operations: list[int] = []  # what was spent before each that is no write

    @contextmanager
    def installed(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", self.write)
            patch.setattr(os, "open", self.open)
            for name in CHANGES:
                patch.setattr(os, name, self._counted(name))
            yield self

    def open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            self._pay(1)
        return self.real["open"](path, flags, *args, **options)

    def write(self, handle: int, content: memoryview) -> int:
        left = int(min(len(content), max(0, self.budget - self.spent)))
        self.dirty.add(os.fstat(handle).st_ino)
        if left:
            self.real["write"](handle, content[:left])
            self.spent += left
        if left < len(content):
            self._pay(1, write=True)
        return len(content)

    def _counted(self, name: str) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            self._pay(1)
            if name == "fsync":  # nothing is: the test's disk keeps what it is given
                return self._synced(args[0])
            if name in ("rename", "replace"):
                self.renamed.append((Path(args[0]), Path(args[1])))
            return self.real[name](*args, **options)

        return change

    def _pay(self, cost: int, write: bool = False) -> None:
        if self.ended or (self.spent + cost > self.budget and (write or not self.writes_only)):
            self.ended = not self.writes_only
            raise self.end()
        self.operations.append(self.spent)
        self.spent += cost

    def _synced(self, handle: int) -> None:
        self.dirty.discard(os.fstat(handle).st_ino)
        folder = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self.renamed = [pair for pair in self.renamed if pair[1].parent != folder]

    def lose_power(self, folder: Path) -> None:
        """What was not synced is empty, or has its old name: all that a disk may do."""
        for source, target in reversed(self.renamed):
            if target.exists() and not source.exists():
                target.rename(source)
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.dirty:
                os.truncate(path, 0)


def free() -> Disk:
    """A disk that only counts."""
    return Disk(float("inf"), Died)


def full(budget: int) -> Disk:
    """A disk that is full after so many bytes; deleting and syncing go on."""
    return Disk(budget, lambda: OSError(errno.ENOSPC, "No space left on device"), writes_only=True)


def read_only(number: int) -> Disk:
    """A disk that changes nothing."""
    return Disk(0, lambda: OSError(number, os.strerror(number)))


# what is written


def facts(step: int = 3) -> Facts:
    return Facts(
        step=step,
        cursor=8 * step,
        network=NetworkConfig(name="deeplab", norm="none"),
        channels=NAMES,
        mean=tuple(float(index) / 3 for index in range(16)),
        std=(1e-8,) * 16,
        spacing_deg=(0.234, 0.3125),
        classes=CLASSES,
        provenance={"run": "storms", "manifest_sha256": "ab" * 32, "config": {"learn": {"global_batch": 8}}},
        training={"schedule": {"warmup": 5}},
    )


def tensors(step: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(4, 3, 3, 3, generator=random), "norm.running_mean": torch.full((4,), float(step))}
    state = {"momentum/conv.weight": torch.randn(4, 3, 3, 3, generator=random).bfloat16(), "count": torch.tensor(step)}
    return weights, state


def joined(step: int) -> dict[str, torch.Tensor]:
    weights, state = tensors(step)
    return {**weights, **state}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        some[name].dtype == other.dtype and torch.equal(some[name], other) for name, other in others.items()
    )


# real kills


class Victims:
    """A process that forks writers, which stop at a point until they are killed there."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faulty_disk"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def kill(self, what: str, folder: str, point: int) -> bool:
        """Have a writer started, and killed at `point`; False when it was done before."""
        assert self.process.stdin is not None
        print(json.dumps([what, folder, point]), file=self.process.stdin, flush=True)
        pid = self._answer()
        if pid != "done":
            os.kill(int(pid), signal.SIGKILL)
        status = int(self._answer())
        assert status == (0 if pid == "done" else signal.SIGKILL), f"the writer ended with status {status}"
        return pid != "done"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.process.wait(60)


class _Stop(Disk):
    """Says that the point is reached, and goes no further."""

    def __init__(self, point: float):
        super().__init__(point, self.stop)

    def stop(self) -> BaseException:
        self.real["write"](1, f"{os.getpid()}\n".encode())
        while True:
            signal.pause()


def _write_checkpoint(folder: str, stop: _Stop) -> None:
    with stop.installed():
        write_checkpoint(folder, facts(2), *tensors(2), keep=1)


def _keep(folder: str, stop: _Stop) -> None:
    keeper = Keeper(folder, "run", "node")
    with stop.installed():
        for step in (2, 3):
            keeper.keep(step, joined(step), {"step": step})


def _upload(uri: str, stop: _Stop) -> None:
    """A checkpoint in an object store: blocks sent and files deleted are counted."""
    put, remove, remove_folder = Place.put, Place.remove, Place.remove_folder

    def counted(blocks):
        for block in blocks():
            stop._pay(1)
            yield block
        stop._pay(1)  # all sent, the file not closed

    def paid(work):
        def do(place, name):
            stop._pay(1)
            work(place, name)

        return do

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "put", lambda place, name, blocks: put(place, name, lambda: counted(blocks)))
        patch.setattr(Place, "remove", paid(remove))
        patch.setattr(Place, "remove_folder", paid(remove_folder))
        large = {"large": torch.arange(3 << 20, dtype=torch.float32)}  # 12 MiB: an upload in parts
        write_checkpoint(uri, facts(2), large, tensors(2)[1], keep=1)


def main() -> None:
    works = {"checkpoint": _write_checkpoint, "keeper": _keep, "upload": _upload}
    for line in sys.stdin:
        what, folder, point = json.loads(line)
        pid = os.fork()
        if not pid:
            works[what](folder, _Stop(point))
            os.write(1, b"done\n")
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    main()

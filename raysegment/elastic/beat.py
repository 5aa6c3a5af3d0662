"""A member's heart: a small process beside it that tells the roster of its life, whatever keeps the member's Python busy.

A thread would be late whenever something holds the interpreter's lock for seconds. This process looks at the kernel's view
of its parent instead (/proc/PID/stat) and is silent when that is stopped, traced, a zombie or gone; it dies with its parent.
It is also the roster's hand on the node: told to, it replaces a member that hangs (SIGKILL; Ray Train starts another).

Run as a file, with the standard library alone, so that it is there in milliseconds and needs little memory. Standard input:
one JSON object per line with `address`, `token`, `uid`, `beat_s`, `stopped_s` (a new line when the roster has moved).
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from socket import socket
from typing import Any

if __name__ == "__main__":  # as a file: its folder would be the first to look for modules in, and hide nothing it needs
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from raysegment.elastic.wire import BEAT, connect, pack

_PR_SET_PDEATHSIG = 1


def lives(pid: int) -> bool:
    """Whether a process can run: neither stopped nor traced nor dead. Where there is no /proc, whether it exists."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"T", b"t", b"Z", b"X")
    except FileNotFoundError:
        return not Path("/proc/self").exists() and _exists(pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def die_with_parent() -> None:
    """Ask the kernel (Linux) for SIGKILL when the parent's thread that started this ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Heart:
    """Beats for `parent` until that is dead."""

    def __init__(self, parent: int):
        self.parent = parent
        self.line: socket | None = None
        self.orders: dict[str, Any] = {}
        self.lived = time.monotonic()  # when the parent was last seen running

    def run(self) -> None:
        """Until the parent is gone: beat, listen to the roster and to the parent."""
        while os.getppid() == self.parent:
            sources = [sys.stdin] + ([self.line] if self.line else [])
            for source in select.select(sources, [], [], self.orders.get("beat_s", 1.0))[0]:
                if source is sys.stdin:
                    self._hear_parent()
                else:
                    self._hear_roster()
            self._beat()
            self._give_up()

    def _give_up(self) -> None:
        """End a parent that has been stopped for too long, for another to take its place, also when no roster says so: the
        one that let it go may be dead itself, and the next knows nothing of it."""
        now = time.monotonic()
        self.lived = now if lives(self.parent) else self.lived
        if now - self.lived > self.orders.get("stopped_s", float("inf")):
            os.kill(self.parent, signal.SIGKILL)

    def _hear_parent(self) -> None:
        """The newest of what it says: read from the system, since a line in Python's buffer would not wake `select`."""
        heard = os.read(sys.stdin.fileno(), 65536)
        if not heard:
            sys.exit(0)
        self.orders = json.loads(heard.splitlines()[-1])
        self._close()

    def _hear_roster(self) -> None:
        assert self.line is not None
        try:
            heard = self.line.recv(65536)
        except OSError:
            heard = b""
        if not heard:
            self._close()
        if b'"replace"' in heard:  # the only order there is
            os.kill(self.parent, signal.SIGKILL)

    def _beat(self) -> None:
        if not self.orders or not lives(self.parent):
            return
        try:
            if self.line is None:
                hello = {"uid": self.orders["uid"]}
                self.line = connect(tuple(self.orders["address"]), self.orders["token"], BEAT, hello, self.orders["beat_s"] * 4)
            self.line.sendall(pack({"op": "beat"}))
        except OSError:
            self._close()
            time.sleep(self.orders["beat_s"])  # the roster is away: no hurry

    def _close(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None


if __name__ == "__main__":
    die_with_parent()
    Heart(os.getppid()).run()

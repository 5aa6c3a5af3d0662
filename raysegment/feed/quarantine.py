"""Which tiles of a run are damaged, since which position, and how many of them the run bears.

A tile is left out from the first position on at which it was found damaged, in all later epochs and replays, also where
a copy of it can be read by then: whoever computes a position, and however often, leaves out the same tiles. The list is a
file of JSON lines beside the run's other logs, which all members read; every line is appended in one piece, and one that
a dying writer left unfinished is passed over.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from raysegment.climate.checks import BadInput

FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class Case:
    """A damaged tile: its number, the position at which it was found, the reason in words."""

    tile: int
    position: int
    reason: str


def allowed(max_damaged: float, tiles: int) -> int:
    """How many tiles may be damaged: none for 0, a share of all below 1 (rounded up), a number from 1 on."""
    return math.ceil(max_damaged * tiles) if max_damaged < 1 else int(max_damaged)


class Quarantine:
    """The damaged tiles of a run of `tiles` tiles, in `path` (None: known to this process alone)."""

    def __init__(self, tiles: int, max_damaged: float, path: Path | None = None):
        self.tiles, self.limit, self.path = tiles, allowed(max_damaged, tiles), path
        self._since: dict[int, int] = {}
        self._read = 0  # bytes of the file that are known
        self._lock = Lock()

    @property
    def count(self) -> int:
        """How many tiles are known to be damaged."""
        return len(self._since)

    def excludes(self, tile: int, position: int) -> bool:
        """True when the tile is to be left out at a position."""
        return position >= self._since.get(tile, position + 1)

    def refresh(self) -> None:
        """Take over what other members have found."""
        if self.path is None:
            return
        with self._lock:
            try:
                size = self.path.stat().st_size
            except FileNotFoundError:
                return
            if size > self._read:
                self._take(self.path)
        self._check()

    def add(self, case: Case) -> None:
        """Record a damaged tile, unless it is known already; BadInput when the run bears no more of them."""
        with self._lock:
            if self.excludes(case.tile, case.position):
                return
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _append(self.path, f"\n{json.dumps(asdict(case))}\n")
            self._note(case)
        self._check(case)

    def _take(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._read)
            held = file.read()
        whole = held[: held.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in filter(None, whole.splitlines()):
            with suppress(ValueError):
                self._note(Case(**json.loads(line)))

    def _note(self, case: Case) -> None:
        self._since[case.tile] = min(case.position, self._since.get(case.tile, case.position))

    def _check(self, case: Case | None = None) -> None:
        if self.count <= self.limit:
            return
        got = f"{self.count} of {self.tiles} ({case.reason if case else f'see {self.path}'})"
        remedy = (
            "Restore the files or stage them again (every tile damaged: is the manifest of another run?); "
            "feed.max_damaged sets how many a run bears"
        )
        raise BadInput("shards", f"at most {self.limit} damaged tiles", got, remedy)


def _append(path: Path, text: str) -> None:
    """One write in append mode, on the disk before it returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)

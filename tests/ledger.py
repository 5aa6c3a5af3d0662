"""An independent reader of a run's steps.jsonl: was every tile consumed once? It shares no code with the trainer.

A line is `{"step": s, "cursor": s·G, …}`. Where it has them, `positions` (a count) must be G and `tiles` (a list) names the
tiles consumed at the positions cursor, cursor + 1, …; each epoch of N positions must then hold each of the N tiles once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ledger:
    """What a log adds up to. `repeated` and `missing` count steps, positions and (position's) tiles; `problems` are in words."""

    steps: int = 0
    steps_repeated: int = 0
    steps_missing: int = 0
    positions_repeated: int = 0
    positions_missing: int = 0
    tiles_repeated: int = 0
    tiles_missing: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.problems


def read(path: Path, global_batch: int, steps: int, tiles: int = 0) -> Ledger:
    """The ledger of a log of `steps` steps of `global_batch` positions over `tiles` tiles (0: not known, not checked)."""
    ledger = Ledger()
    lines = list(_lines(path.read_bytes(), ledger))
    ledger.steps = len(lines)
    _check_steps([line["step"] for line in lines], steps, ledger)
    for line in lines:
        _check_line(line, global_batch, ledger)
    _check_positions(lines, global_batch, steps, ledger)
    if tiles and any("tiles" in line for line in lines):
        _check_tiles(lines, steps * global_batch, tiles, ledger)
    return ledger


def _lines(content: bytes, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """The objects that have a step and a cursor; all else is a problem."""
    *whole, rest = content.split(b"\n")
    if rest:
        ledger.problems.append(f"the last line has no end: {rest[:40]!r}")
    for number, text in enumerate(whole):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and all(_whole(line.get(key)) for key in ("step", "cursor")):
            yield line
        else:
            ledger.problems.append(f"line {number} is no object with step and cursor: {text[:40]!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_steps(found: list[int], steps: int, ledger: Ledger) -> None:
    ledger.steps_repeated, ledger.steps_missing = _compare(found, range(steps))
    if found != list(range(steps)):
        first = next((k for k, step in enumerate(found) if step != k), min(len(found), steps))
        got = found[first] if first < len(found) else "nothing"
        ledger.problems.append(f"line {first}: expected step {first if first < steps else 'none'}, got {got}")


def _check_line(line: dict[str, Any], global_batch: int, ledger: Ledger) -> None:
    step = line["step"]
    if line["cursor"] != step * global_batch:
        ledger.problems.append(f"step {step}: expected cursor {step * global_batch}, got {line['cursor']}")
    if line.get("positions", global_batch) != global_batch:
        ledger.problems.append(f"step {step}: expected {global_batch} positions, got {line['positions']}")
    if len(line.get("tiles", range(global_batch))) != global_batch:
        ledger.problems.append(f"step {step}: expected {global_batch} tiles, got {len(line['tiles'])}")


def _check_positions(lines: list[dict[str, Any]], global_batch: int, steps: int, ledger: Ledger) -> None:
    found = [line["cursor"] + k for line in lines for k in range(line.get("positions", global_batch))]
    ledger.positions_repeated, ledger.positions_missing = _compare(found, range(steps * global_batch))
    if ledger.positions_repeated or ledger.positions_missing or len(found) != steps * global_batch:
        counts = f"{ledger.positions_repeated} repeated, {ledger.positions_missing} missing, {len(found)} in all"
        ledger.problems.append(f"expected the positions 0 to {steps * global_batch - 1} once each, got {counts}")


def _check_tiles(lines: list[dict[str, Any]], positions: int, tiles: int, ledger: Ledger) -> None:
    """Each whole epoch has every tile once, the begun one none twice; a position without a tile's name is one missing."""
    epochs: dict[int, list[int]] = {}
    for line in lines:
        for offset, tile in enumerate(line.get("tiles", ())):
            epochs.setdefault((line["cursor"] + offset) // tiles, []).append(tile)
    for epoch in sorted({*range(-(-positions // tiles)), *epochs}):
        due = min(tiles, positions - epoch * tiles)
        repeated, missing = _compare(epochs.get(epoch, []), range(tiles))
        missing = max(0, missing - (tiles - due))  # of an epoch that has only begun, so many tiles are not due
        foreign = len({*epochs.get(epoch, [])} - {*range(tiles)})
        ledger.tiles_repeated += repeated
        ledger.tiles_missing += missing
        if repeated or missing or foreign:
            said = f"{repeated} repeated, {missing} missing, {foreign} unknown"
            ledger.problems.append(f"epoch {epoch}: expected {due} of {tiles} tiles once each, got {said}")


def _compare(found: Iterable[int], expected: range) -> tuple[int, int]:
    """How many of `found` are there again, and how many of `expected` are not there."""
    counts = Counter(found)
    return sum(count - 1 for count in counts.values()), sum(value not in counts for value in expected)

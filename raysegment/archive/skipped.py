"""Files that could not be used: one row each with the reason, and how many of them a run may have."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput

SKIPPED = "skipped.csv"


@dataclass(frozen=True)
class Skipped:
    """A row of `skipped.csv`."""

    file: str
    expected: str
    got: str
    remedy: str

    @staticmethod
    def of(path: str | Path, bad: BadInput) -> Skipped:
        return Skipped(str(path), bad.expected, bad.got, bad.remedy)

    def row(self) -> dict[str, str]:
        return asdict(self)


def allowed(max_skipped: float, files: int) -> int:
    """How many of `files` may be skipped: `max_skipped` below 1 is a share, from 1 on a number."""
    if not 0 <= max_skipped < float("inf"):
        raise BadInput("--max-skipped", "0, a share below 1, or a number of files", max_skipped, "Write for example 0.01 or 5.")
    return int(max_skipped * files + 1e-9) if max_skipped < 1 else int(max_skipped)


def check_budget(skipped: Sequence[Skipped], files: int, budget: int, report: object) -> None:
    """BadInput that carries the first reason as soon as more than `budget` of `files` are bad."""
    if len(skipped) > budget:
        first = skipped[0]
        raise BadInput(
            first.file, first.expected, first.got,
            f"{first.remedy} ({len(skipped)} of {files} files are bad and --max-skipped allows {budget}; all in {report})",
        )  # fmt: skip


def write_skipped(place: Place, skipped: Sequence[Skipped]) -> None:
    """`skipped.csv` with a row per bad file; no file when there is none (an older one is removed)."""
    if not skipped:
        place.remove(SKIPPED)
        return
    with place.committed(SKIPPED) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Skipped)])
        writer.writeheader()
        writer.writerows(item.row() for item in sorted(skipped, key=lambda item: item.file))

"""Which snapshots of an archive go into which mask file: one file per source file, or per day, month or year.

Days are the model calendar's. A mask file says which sources are in it, so a run that was cut off finds what is complete, and
one over more files than the last sees where some are to be added.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysegment.archive.deepcam import open_maps
from raysegment.archive.masks import mask_path
from raysegment.archive.netcdf import NetcdfFile
from raysegment.archive.skipped import Skipped
from raysegment.climate.checks import BadInput

LAYOUTS = ("source", "daily", "monthly", "yearly")
_NAMES: dict[str, Callable[[Any], str]] = {
    "daily": lambda time: f"{time.year:04d}-{time.month:02d}-{time.day:02d}",
    "monthly": lambda time: f"{time.year:04d}-{time.month:02d}",
    "yearly": lambda time: f"{time.year:04d}",
}


@dataclass(frozen=True)
class Group:
    """The snapshots of one mask file `name`: of each source, in order of time, which (places; None: all of them)."""

    name: str
    parts: tuple[tuple[Path, tuple[int, ...] | None], ...]

    def file(self, out: Path) -> Path:
        """Its mask file in the folder `out`."""
        return mask_path(out, f"{self.name}.nc")

    @property
    def sources(self) -> tuple[Path, ...]:
        """Each once, in order of time."""
        return tuple(dict.fromkeys(path for path, _ in self.parts))

    @property
    def source_names(self) -> str:
        """As the mask file states them."""
        return ", ".join(path.name for path in self.sources)

    def is_complete(self, out: Path) -> bool:
        """True when the mask file is there and, where several sources share it, holds the snapshots of all of them."""
        file = self.file(out)
        counts = [len(places) for _, places in self.parts if places is not None]
        if not counts or not file.exists():
            return file.exists()
        with NetcdfFile(file) as held:
            return (held.attribute("source"), held.count) == (self.source_names, sum(counts))


def groups_of(paths: Sequence[Path], layout: str) -> tuple[list[Group], list[Skipped]]:
    """The mask files of an archive, and the files that could not be opened for their times (with a layout by time only).

    BadInput where two source files would give masks of one name, or hold the same time.
    """
    if layout == "source":
        _check_names(paths)
        return [Group(path.stem, ((path, None),)) for path in paths], []
    found: dict[str, dict[tuple[int, ...], tuple[Path, int]]] = defaultdict(dict)
    bad = []
    for path in paths:
        try:
            for place, time in enumerate(_times(path, layout)):
                _note(found[_NAMES[layout](time)], path, place, time)
        except BadInput as problem:
            bad.append(Skipped.of(path, problem))
    return [Group(name, _parts([found[name][time] for time in sorted(found[name])])) for name in sorted(found)], bad


def _times(path: Path, layout: str) -> Sequence[Any]:
    with open_maps(path) as file:
        if None in file.times:
            remedy = "Use --layout source, which needs no times"
            raise BadInput(path, f"known times, for a layout that is {layout}", "a file that does not say when it was", remedy)
        return file.times


def _note(group: dict[tuple[int, ...], tuple[Path, int]], path: Path, place: int, time: Any) -> None:
    key = (time.year, time.month, time.day, time.hour, time.minute, time.second)
    if key in group:
        remedy = "Leave one of them out, or use --layout source"
        raise BadInput(path, "each time in one file only", f"{time.isoformat()} also in {group[key][0]}", remedy)
    group[key] = (path, place)


def _parts(places: Sequence[tuple[Path, int]]) -> tuple[tuple[Path, tuple[int, ...]], ...]:
    """Places in order of time → runs of one file."""
    runs: list[tuple[Path, list[int]]] = []
    for path, place in places:
        if not runs or runs[-1][0] != path:
            runs.append((path, []))
        runs[-1][1].append(place)
    return tuple((path, tuple(indices)) for path, indices in runs)


def _check_names(paths: Sequence[Path]) -> None:
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        raise BadInput(twice[0], "source files of different names (a mask is named after its source)", "two of this name",
                       "Segment their folders one by one, each with its own --out.")  # fmt: skip

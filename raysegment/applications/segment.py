"""Masks for an archive: a streaming Ray Data pipeline over mask files, resumable, that survives bad sources.

One mask file per source file (or day, month, year), written snapshot by snapshot under a temporary name and renamed, so a
mask file that is there is whole and a run that was killed goes on where it stopped. What is in memory grows neither with the
archive nor with its files: one snapshot per process, and what its chunks hold of the next.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cftime
import ray.data
import torch

from raysegment.applications.labellers import Labeller, parse_labeller
from raysegment.applications.mask_layout import LAYOUTS, Group, groups_of
from raysegment.archive.axes import Axes
from raysegment.archive.masks import About, Bounds, MaskWriter
from raysegment.archive.places import Place
from raysegment.archive.skipped import SKIPPED, Skipped, allowed, check_budget, write_skipped
from raysegment.archive.snapshots import list_sources, open_source
from raysegment.climate.checks import BadInput
from raysegment.feed.session import ensure_ray

MARKER = "segment.json"


@dataclass(frozen=True)
class SegmentConfig:
    """Options of `segment`. `max_skipped`: below 1 the share, from 1 on the number of files that may be bad; `layout`: what
    shares a mask file (LAYOUTS); `tile`: rows and columns of the pieces in which a network labels a map."""

    max_skipped: float = 0.01
    probabilities: bool = False
    artmip: bool = False
    processes: int | None = None
    layout: str = "source"
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise BadInput("--layout", f"one of {', '.join(LAYOUTS)}", repr(self.layout), "Choose one of those")
        if self.tile is not None and min(self.tile) < 1:
            raise BadInput("--tile", "rows and columns above 0", self.tile, "Write for example --tile 512x1024")


@dataclass
class SegmentReport:
    """What a run did: mask files written now, found complete, source files skipped with reasons, `snapshots` labelled now and
    the seconds that processes spent on them (reading, labelling, writing)."""

    written: list[Path] = field(default_factory=list)
    complete: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    snapshots: int = 0
    busy_s: float = 0.0

    @property
    def seconds_per_snapshot(self) -> float | None:
        """Of one process; None when nothing had to be labelled."""
        return self.busy_s / self.snapshots if self.snapshots else None


def segment(
    sources: Sequence[str | Path],
    labeller: str | Path,
    out: str | Path,
    config: SegmentConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SegmentReport:
    """Mask files in `out` for every source file; BadInput when more files are bad than `max_skipped` allows."""
    config = config or SegmentConfig()
    paths, chosen, out = list_sources(sources), parse_labeller(labeller, config.tile), Path(out)
    groups, bad = groups_of(paths, config.layout)
    _claim(out, chosen, config)
    report, todo = SegmentReport(skipped=bad), []
    for group in groups:
        if group.is_complete(out):
            report.complete.append(group.file(out))
        else:
            todo.append(group)
    limit, total = allowed(config.max_skipped, len(paths)), len(groups) + len(bad)
    try:
        check_budget(report.skipped, len(paths), limit, out / SKIPPED)
        for row in _label_all(todo, chosen, out, config):
            _note(report, row, todo[row["number"]])
            check_budget(report.skipped, len(paths), limit, out / SKIPPED)
            if progress:
                progress(len(report.written) + len(report.complete) + len(report.skipped), total)
    finally:
        write_skipped(Place.of(out), report.skipped)
    return report


def _label_all(todo: list[Group], labeller: Labeller, out: Path, config: SegmentConfig) -> Iterator[dict]:
    """Rows of outcomes, in whatever order groups are done."""
    if not todo:
        return
    ensure_ray()
    processes = config.processes or max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(todo)))
    rows = ray.data.from_items([{"number": number} for number in range(len(todo))], override_num_blocks=len(todo))
    done = rows.map(
        _Worker,  # pyright: ignore[reportArgumentType]  (Ray takes a class whose instances are called)
        fn_constructor_args=(ray.put(todo), labeller, str(out), config),
        compute=ray.data.ActorPoolStrategy(size=processes),
        num_cpus=1,
    )
    yield from done.iter_rows()


class _Worker:
    """One process of the pool: labels the snapshots of a group, writes its mask file."""

    def __init__(self, groups: ray.ObjectRef, labeller: Labeller, out: str, config: SegmentConfig):
        self.groups, self.labeller, self.out, self.config = ray.get(groups), labeller, Path(out), config
        torch.set_num_threads(1)

    def __call__(self, row: dict) -> dict:
        group, started = self.groups[row["number"]], time.perf_counter()
        try:
            snapshots, skipped = label_group(group, self.labeller, self.out, self.config), Skipped("", "", "", "")
        except BadSource as bad:
            snapshots, skipped = 0, bad.skipped
        busy_s = time.perf_counter() - started
        return {**row, "path": str(group.file(self.out)), "snapshots": snapshots, "busy_s": busy_s, **skipped.row()}


class BadSource(Exception):
    """A source file that cannot be labelled, and why."""

    def __init__(self, skipped: Skipped):
        super().__init__(skipped)
        self.skipped = skipped


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """While inside, bad input is that file's."""
    try:
        yield
    except BadInput as bad:
        raise BadSource(Skipped.of(path, bad)) from None


def label_group(group: Group, labeller: Labeller, out: Path, config: SegmentConfig) -> int:
    """Writes one mask file; the number of snapshots in it. BadSource, and no file, when a source cannot be labelled."""
    axes, times, bounds = _header(group, labeller)
    about = About(labeller.name, source=group.source_names)
    probable = config.probabilities and labeller.gives_probabilities
    with MaskWriter(group.file(out), axes, times, about, probable, config.artmip, bounds) as writer:
        for path, places in group.parts:
            with _blamed(path), open_source(path, needs=labeller.needs) as source:
                source.read_once(masks=False)
                for place in range(source.count) if places is None else places:
                    snapshot = source.read(place)
                    writer.add(*labeller.label(snapshot.fields, snapshot.grid, snapshot.ivt))
    return len(times)


def _header(group: Group, labeller: Labeller) -> tuple[Axes, list, Bounds | None]:
    """Axes, times and time bounds (where all sources have them) of a mask file; BadSource where a source's axes are others."""
    axes: Axes | None = None
    times, bounds = [], []
    for path, places in group.parts:
        with _blamed(path), open_source(path, needs=labeller.needs) as source:
            axes = axes or source.axes
            if not (source.axes.grid.same_as(axes.grid) and source.axes.shape == axes.shape):
                remedy = "Segment archives of several grids one by one, or use --layout source"
                raise BadInput(path, f"the grid of {group.sources[0]}", "another one", remedy)
            chosen = range(source.count) if places is None else places
            times += [source.times[place] for place in chosen]
            _check_calendar(path, times)
            have = source.time_bounds
            bounds += [have[place] for place in chosen] if have is not None else []
    assert axes is not None, group
    return axes, times, bounds if len(bounds) == len(times) else None


def _check_calendar(path: Path, times: Sequence[cftime.datetime | None]) -> None:
    """Raise unless all times that are known are of one calendar: a mask file has one time axis."""
    calendars = dict.fromkeys(time.calendar for time in times if time is not None)
    if len(calendars) > 1:
        first, other = list(calendars)[:2]
        remedy = "Segment archives of several calendars one by one, or use --layout source"
        raise BadInput(path, f"the calendar {first} of the files before it", other, remedy)


def _note(report: SegmentReport, row: dict, group: Group) -> None:
    """What became of a group. Without one of its sources a mask file is not written, so the others are not labelled either."""
    if row["expected"]:
        report.skipped.append(Skipped(row["file"], row["expected"], row["got"], row["remedy"]))
        known, remedy = {skipped.file for skipped in report.skipped}, "Leave that one out, or use --layout source"
        others, why = (str(path) for path in group.sources), (f"every source of {group.name}", f"{row['file']}, which is bad")
        report.skipped += [Skipped(path, *why, remedy) for path in others if path not in known]
        return
    report.written.append(Path(row["path"]))
    report.snapshots += int(row["snapshots"])
    report.busy_s += float(row["busy_s"])


def _claim(out: Path, labeller: Labeller, config: SegmentConfig) -> None:
    """Marks `out` as this labeller's, so that masks of two labellers or layouts never mix under a resumed run.

    What writers that were killed left half-written goes.
    """
    out.mkdir(parents=True, exist_ok=True)
    marker = out / MARKER
    claim = {"labeller": labeller.name, "probabilities": config.probabilities, "artmip": config.artmip, "layout": config.layout}
    if marker.exists() and (held := json.loads(marker.read_text())) != claim:
        raise BadInput(out, f"an empty folder or masks of {claim}", held, "Choose another --out, or delete this one.")
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    temporary = marker.with_name(f".{MARKER}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(claim))
    temporary.replace(marker)

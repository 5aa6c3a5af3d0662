"""Pictures from files: times of sources, alone or in order, each with the masks that were made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.canvas import MIDDLE_DEG
from raysegment.applications.drawable import Drawable
from raysegment.applications.evaluate import mask_files
from raysegment.applications.maps import STANDARD, Scene, check_ending, draw_map, palette_of
from raysegment.applications.projections import AUTO, projection_of
from raysegment.applications.tracks import read_tracks
from raysegment.archive.deepcam import open_maps
from raysegment.archive.masks import MASK_SUFFIX, MaskSource
from raysegment.archive.snapshots import list_sources
from raysegment.archive.times import label
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

INSIDE = "labels inside the file"


@dataclass(frozen=True)
class Still:
    """One time of one source file."""

    source: Path
    index: int
    time: Any


def draw_files(
    source: str | Path,
    masks: Sequence[str | Path],
    out: str | Path,
    field: str = "TMQ",
    index: int = 0,
    tracks: str | Path | None = None,
    with_truth: bool = False,
    colours: str = STANDARD,
    projection: str = AUTO,
) -> Path:
    """Field `field` of time `index` of `source`, a column for each of `masks` (files, or folders that hold its mask).

    `with_truth`, or where there are no masks, the labels inside the file are a column, too.
    """
    check_ending(out)
    palette_of(colours)
    projection_of(projection, MIDDLE_DEG)
    books = [MaskBook(path) for path in masks]
    scene = scene_of(Path(source), index, books, field, with_truth)
    storms = read_tracks(tracks, _time_of(source, index)) if tracks else ()
    return draw_map(out, Scene(**{**vars(scene), "tracks": storms}), colours, projection=projection)


def _time_of(source: str | Path, index: int) -> Any:
    with open_maps(source) as maps:
        return maps.times[index]


def scene_of(
    source: Path,
    index: int,
    books: Sequence[MaskBook],
    field: str,
    with_truth: bool = False,
    limits: tuple[float, float] | None = None,
) -> Scene:
    """Everything that a picture of one time shows."""
    with Drawable(source) as opened:
        count = len(opened.times)
        if not 0 <= index < count:
            raise BadInput(source, f"an index from 0 to {count - 1}", index, "Choose a time of the file with --index.")
        values, name = opened.read(field, index)
        columns = dict(book.read(source, index, opened.times[index], opened.grid, count) for book in books)
        if with_truth or not columns:
            truth = opened.mask(index)
            columns |= {} if truth is None else {INSIDE: truth}
        stamp = time_stamp(opened.times[index], index, opened.time_labels[index])
        return Scene(values, opened.grid, columns, name, source.name, stamp, limits=limits)


def time_stamp(time: Any, index: int, named: str) -> str:
    """A time as a picture shows it; the calendar where it is not the real one."""
    if time is None:
        return label(None, index, named)
    real = time.calendar in ("standard", "gregorian", "proleptic_gregorian")
    return time.strftime("%Y-%m-%d %H:%M") + (" UTC" if real else f" UTC ({time.calendar} calendar)")


class MaskBook:
    """The masks of one labeller, a file or a folder: finds the one of a source's time, by the file's name, else by time."""

    def __init__(self, path: str | Path):
        self.path, self._alone = Path(path), Path(path).is_file()
        if self.path.is_dir() and not any(self.path.rglob(f"*{MASK_SUFFIX}")):
            remedy = "Make some with `raysegment segment`, or name another folder"
            raise BadInput(path, f"mask files (*{MASK_SUFFIX})", "a folder without any", remedy)
        self._files = mask_files(self.path)
        self._names = {file.name.removesuffix(MASK_SUFFIX): file for file in self._files}
        self._times: dict[tuple[int, ...], tuple[Path, int]] | None = None

    def read(self, source: Path, index: int, time: Any, grid: Grid, count: int) -> tuple[str, NDArray[np.uint8]]:
        """Who labelled, and the mask (H, W) of time `index` of a source that has `count` times on `grid`."""
        named = self._files[0] if self._alone else self._names.get(source.stem)
        file, place = (named, index) if named is not None else self._at(source, time)
        with MaskSource(file) as masks:
            masks.check_fits(grid, count if named is not None else len(masks.times))
            return masks.labeller or file.name, masks.read(place)

    def _at(self, source: Path, time: Any) -> tuple[Path, int]:
        """File and place of a time; all files' time axes are read the first time this is asked."""
        if self._times is None:
            self._times = {}
            for file in self._files:
                with MaskSource(file) as masks:
                    self._times |= {_key(one): (file, place) for place, one in enumerate(masks.times) if one is not None}
        found = None if time is None else self._times.get(_key(time))
        if found is None:
            when = "" if time is None else f", or a file that has {time.isoformat()}"
            expected = f"the masks of {source.name}: {source.stem}{MASK_SUFFIX}{when}"
            raise BadInput(self.path, expected, "none", "Label the file with `raysegment segment` first")
        return found


def _key(time: Any) -> tuple[int, ...]:
    """A time to the minute, whatever its calendar."""
    return time.year, time.month, time.day, time.hour, time.minute


def list_stills(sources: Sequence[str | Path], every: int = 1) -> list[Still]:
    """Every `every`-th time of the sources in the order of time; those of unknown time come last, by name."""
    if every < 1:
        raise BadInput("--every", "1 or more", every, "Write for example --every 4")
    stills = []
    for path in list_sources(sources):
        with open_maps(path) as maps:
            stills += [Still(path, index, time) for index, time in enumerate(maps.times)]
    stills.sort(key=lambda still: (still.time is None, _key(still.time) if still.time else (), str(still.source), still.index))
    return stills[::every]

"""How well masks agree with truth: one summed confusion matrix, IoU per class with its interval, and the same by stratum.

Files are paired by name (`X.mask.nc` with `X.nc` or `X.mask.nc`) and their maps by time. A class that neither side has
anywhere has no IoU (null) and does not enter the mean; in MLPerf HPC's score, taken map by map, it counts as 1. Strata are
months, hemispheres, latitude bands of 30 degrees, and the basins of tropical cyclones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.intervals import DEFAULT, Blocks, Bootstrap, Interval
from raysegment.archive.masks import MASK_SUFFIX, MaskSource
from raysegment.archive.snapshots import list_sources
from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.learning.metrics import Scores, confusion, iou, mean_iou

NAMES = ("background", "cyclone", "river")  # of the classes, in results
STRATA = ("month", "hemisphere", "latitude_band", "basin")
_COUNT = len(CLASSES)
Paths = str | Path | Sequence[str | Path]


def evaluate(predicted: Paths, truth: Paths, bootstrap: Bootstrap = DEFAULT) -> dict[str, Any]:
    """Compare masks with truth (files, folders or patterns; truth may be source files with labels inside).

    Returns `iou` {background, cyclone, river, mean}, `iou_95` (their intervals, [low, high] or null), `confusion` (3 × 3 pixel
    counts, truth by prediction), `mlperf_iou`, `snapshots`, `by_month`, `by_hemisphere`, `by_latitude_band` and `by_basin`
    (an `iou`, `iou_95` and `confusion` each), how the intervals were made (`bootstrap`), and the names of files without a
    partner, which do not count.
    """
    pairs, unpaired = pair_files(predicted, truth)
    total, blocks = Scores.none(_COUNT), Blocks()
    for time, unit, grid, guess, true in _maps(pairs):
        here = Scores.of(guess, true, _COUNT)
        total += here
        blocks.add(time, unit, {("", ""): here.confusion.numpy(), **_strata(time, grid, guess, true)})
    intervals = blocks.intervals(bootstrap)
    every = _result(total.confusion.numpy(), intervals.get(("", "")))
    score = {**every, "mlperf_iou": total.mlperf(), "snapshots": total.samples}
    return {**score, **_by_stratum(blocks, intervals), "bootstrap": blocks.about(bootstrap), "unpaired": unpaired}


def _strata(time: Any, grid: Grid, guess: NDArray, true: NDArray) -> dict[tuple[str, str], NDArray[np.int64]]:
    """Pixel counts (3, 3) of one map by (stratum, name), where there are any pixels."""
    zones = {"hemisphere": hemispheres(grid), "latitude_band": latitude_bands(grid), "basin": basins(grid)}
    cut = {(key, name): _counts(guess[at], true[at]) for key, parts in zones.items() for name, at in parts.items()}
    month = ("month", f"{time.month:02d}" if time else "unknown")
    return {month: _counts(guess, true), **{key: counts for key, counts in cut.items() if counts.any()}}


def _by_stratum(blocks: Blocks, intervals: dict[tuple[str, str], Interval]) -> dict[str, Any]:
    sums = blocks.sums()
    return {
        f"by_{key}": {name: _result(sums[kind, name], intervals[kind, name]) for kind, name in sorted(sums) if kind == key}
        for key in STRATA
    }


def _counts(predicted: NDArray, truth: NDArray) -> NDArray[np.int64]:
    """Pixel counts (3, 3), truth by prediction."""
    return confusion(predicted, truth, _COUNT).numpy()


def _result(counts: NDArray, interval: Interval | None) -> dict[str, Any]:
    ranges = [None] * (len(NAMES) + 1) if interval is None else interval
    return {"iou": named_iou(counts), "iou_95": dict(zip((*NAMES, "mean"), ranges, strict=True)), "confusion": counts.tolist()}


def named_iou(counts: NDArray) -> dict[str, float | None]:
    """IoU by class name and their mean, None where a class is nowhere."""
    values = iou(counts)
    named = {name: None if np.isnan(value) else float(value) for name, value in zip(NAMES, values, strict=True)}
    return {**named, "mean": None if np.isnan(values).all() else mean_iou(counts)}


def pair_files(predicted: Paths, truth: Paths) -> tuple[list[tuple[Path, Path]], dict[str, list[str]]]:
    """Files of the same name on both sides, and the names that only one side has; two single files are a pair as they are."""
    ours, theirs = _by_name(predicted), _by_name(truth)
    if len(ours) == len(theirs) == 1 and _is_file(predicted) and _is_file(truth):
        return [(next(iter(ours.values())), next(iter(theirs.values())))], {"predicted": [], "truth": []}
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        expected = "a truth file for each mask (X.nc or X.mask.nc for X.mask.nc)"
        got = f"none in common: {', '.join(sorted(ours)[:3])}… and {', '.join(sorted(theirs)[:3])}…"
        raise BadInput(f"{predicted} and {truth}", expected, got, "Give the archive that the masks were made from")
    alone = {"predicted": sorted(set(ours) - set(theirs)), "truth": sorted(set(theirs) - set(ours))}
    return [(ours[name], theirs[name]) for name in shared], alone


def _is_file(paths: Paths) -> bool:
    """True when one file was named, not a folder that happens to hold one."""
    one = paths if isinstance(paths, str | Path) else paths[0]
    return Path(one).is_file()


def _by_name(paths: Paths) -> dict[str, Path]:
    """Files by their name without endings; in a folder that has mask files, only those count."""
    files: dict[str, Path] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for file in mask_files(path):
            name = file.name.removesuffix(MASK_SUFFIX) if file.name.endswith(MASK_SUFFIX) else file.stem
            if files.setdefault(name, file) != file:
                raise BadInput(path, "one file of each name", f"{files[name]} and {file}", "Name only one of them")
    return files


def mask_files(path: str | Path) -> list[Path]:
    """Mask files that a path names; a folder without any is taken as an archive with labels inside its files."""
    if Path(path).is_dir():
        masks = sorted(file for file in Path(path).rglob(f"*{MASK_SUFFIX}") if not file.name.startswith("."))
        return masks or list_sources([path])
    return list_sources([path])


def _maps(pairs: Iterable[tuple[Path, Path]]) -> Iterator[tuple[Any, str, Grid, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Time (None where unknown), a name of its own, grid, prediction and truth (H, W) of every map."""
    for ours, theirs in pairs:
        with MaskSource(ours) as predicted, MaskSource(theirs) as truth:
            if not predicted.axes.grid.same_as(truth.axes.grid):
                remedy = "Compare masks with the labels of the same files"
                raise BadInput(f"{ours} and {theirs}", f"the grid of the truth, {_spoken(truth)}", _spoken(predicted), remedy)
            predicted.read_once()
            truth.read_once()
            for mine, its in _pair_times(predicted, truth):
                time = predicted.times[mine] or truth.times[its]
                yield time, f"{ours} {mine}", truth.axes.grid, predicted.read(mine), truth.read(its)


def _spoken(masks: MaskSource) -> str:
    grid = masks.axes.grid
    return f"{grid.shape[0]} × {grid.shape[1]} cells from {grid.lat[0]:g}N {grid.lon[0]:g}E"


def _pair_times(predicted: MaskSource, truth: MaskSource) -> list[tuple[int, int]]:
    """Places of the same time in two files; by order where times are not known on both sides."""
    ours, theirs = [_key(time) for time in predicted.times], [_key(time) for time in truth.times]
    if None in ours or None in theirs:
        if len(ours) == len(theirs):
            return [(place, place) for place in range(len(ours))]
        got = f"{len(ours)} and {len(theirs)}"
        expected = "as many maps in both (their times are not known)"
        raise BadInput(f"{predicted.path} and {truth.path}", expected, got, "Check the files")
    places = {time: place for place, time in enumerate(theirs)}
    pairs = [(place, places[time]) for place, time in enumerate(ours) if time in places]
    if not pairs:
        got = f"{predicted.times[0]} … and {truth.times[0]} …"
        raise BadInput(f"{predicted.path} and {truth.path}", "maps of the same times", got, "Check that they belong together")
    return pairs


def _key(time: Any) -> tuple[int, ...] | None:
    """A time to the minute, whatever its calendar."""
    return None if time is None else (time.year, time.month, time.day, time.hour, time.minute)


def hemispheres(grid: Grid) -> dict[str, NDArray[np.bool_]]:
    """Cells (H, W) of either hemisphere; the equator is in neither."""
    lat = np.broadcast_to(grid.lat[:, None], grid.shape)
    return {"north": lat > 0, "south": lat < 0}


def latitude_bands(grid: Grid) -> dict[str, NDArray[np.bool_]]:
    """Cells (H, W) of the six bands of 30 degrees; a row on a border belongs to the band north of it, the pole to the last."""
    lat = np.broadcast_to(grid.lat[:, None], grid.shape)
    names = ("90S-60S", "60S-30S", "30S-0", "0-30N", "30N-60N", "60N-90N")
    band = np.clip(np.floor((lat + 90.0) / 30.0), 0, len(names) - 1)
    return {name: band == place for place, name in enumerate(names)}


def basins(grid: Grid) -> dict[str, NDArray[np.bool_]]:
    """Cells (H, W) of the basins of tropical cyclones (WMO's, by latitude and longitude, to 60 degrees)."""
    lat = np.broadcast_to(grid.lat[:, None], grid.shape)
    lon = np.broadcast_to(grid.lon[None, :], grid.shape)
    north, south = (lat > 0) & (lat <= 60), (lat < 0) & (lat >= -60)
    america = np.interp(lat, [8.0, 20.0], [283.0, 260.0])  # the land bridge between Pacific and Atlantic
    return {
        "north_atlantic": north & (lon >= america),
        "east_pacific": north & (lon >= 180) & (lon < america),
        "west_pacific": north & (lon >= 100) & (lon < 180),
        "north_indian": north & (lon >= 30) & (lon < 100),
        "south_indian": south & (lon >= 20) & (lon < 135),
        "south_pacific": south & (lon >= 135) & (lon < 290),
        "south_atlantic": south & ((lon >= 290) | (lon < 20)),
    }

"""How well masks agree with truth: one summed confusion matrix, IoU per class, and the same by month and region.

Files are paired by name (`X.mask.nc` with `X.nc` or `X.mask.nc`) and their maps by time. A class that neither side has
anywhere has no IoU (null) and does not enter the mean; in MLPerf HPC's score, taken map by map, it counts as 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.archive.masks import MASK_SUFFIX, Masks, read_masks
from raysegment.archive.snapshots import list_sources
from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.learning.metrics import Scores, confusion, iou, mean_iou

NAMES = ("background", "cyclone", "river")  # of the classes, in results
_COUNT = len(CLASSES)
Paths = str | Path | Sequence[str | Path]

TROPICS_DEG, POLAR_DEG = 23.44, 66.56


def evaluate(predicted: Paths, truth: Paths) -> dict[str, Any]:
    """Compare masks with truth (files, folders or patterns; truth may be source files with labels inside).

    Returns `iou` {background, cyclone, river, mean}, `confusion` (3 × 3 pixel counts, truth by prediction), `mlperf_iou`,
    `snapshots`, `by_month`, `by_hemisphere` and `by_region` (an `iou` and `confusion` each), and the names of files
    without a partner, which do not count.
    """
    pairs, unpaired = pair_files(predicted, truth)
    total = Scores.none(_COUNT)
    parts: dict[str, dict[str, NDArray]] = {key: {} for key in ("month", "hemisphere", "region")}
    for month, grid, guess, true in _maps(pairs):
        here = Scores.of(guess, true, _COUNT)
        total += here
        _add(parts["month"], {month: here.confusion.numpy()})
        _add(parts["hemisphere"], {zone: _counts(guess[at], true[at]) for zone, at in hemispheres(grid).items()})
        _add(parts["region"], {zone: _counts(guess[at], true[at]) for zone, at in regions(grid).items()})
    strata = {f"by_{key}": {zone: _result(part[zone]) for zone in sorted(part)} for key, part in parts.items()}
    score = {**_result(total.confusion.numpy()), "mlperf_iou": total.mlperf(), "snapshots": total.samples}
    return {**score, **strata, "unpaired": unpaired}


def _add(sums: dict[str, NDArray], counts: dict[str, NDArray]) -> None:
    """Add confusion matrices by zone, where there are any pixels."""
    for zone, part in counts.items():
        if part.any():
            sums[zone] = sums.get(zone, 0) + part


def _counts(predicted: NDArray, truth: NDArray) -> NDArray[np.int64]:
    """Pixel counts (3, 3), truth by prediction."""
    return confusion(predicted, truth, _COUNT).numpy()


def _result(counts: NDArray) -> dict[str, Any]:
    values = iou(counts)
    named = {name: None if np.isnan(value) else float(value) for name, value in zip(NAMES, values, strict=True)}
    return {"iou": {**named, "mean": None if np.isnan(values).all() else mean_iou(counts)}, "confusion": counts.tolist()}


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


def _maps(pairs: Iterable[tuple[Path, Path]]) -> Iterator[tuple[str, Grid, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Month ("01" … "12" or "unknown"), grid, prediction and truth (H, W) of every map."""
    for ours, theirs in pairs:
        predicted, truth = read_masks(ours), read_masks(theirs)
        if not predicted.grid.same_as(truth.grid):
            remedy = "Compare masks with the labels of the same files"
            raise BadInput(f"{ours} and {theirs}", f"the grid of the truth, {_spoken(truth)}", _spoken(predicted), remedy)
        for mine, its in _pair_times(predicted, truth):
            time = predicted.times[mine] or truth.times[its]
            yield f"{time.month:02d}" if time else "unknown", truth.grid, predicted.masks[mine], truth.masks[its]


def _spoken(masks: Masks) -> str:
    grid = masks.grid
    return f"{grid.shape[0]} × {grid.shape[1]} cells from {grid.lat[0]:g}N {grid.lon[0]:g}E"


def _pair_times(predicted: Masks, truth: Masks) -> list[tuple[int, int]]:
    """Places of the same time in two files; by order where times are not known on both sides."""
    ours, theirs = [_key(time) for time in predicted.times], [_key(time) for time in truth.times]
    if None in ours or None in theirs:
        if len(ours) == len(theirs):
            return [(place, place) for place in range(len(ours))]
        got = f"{len(ours)} and {len(theirs)}"
        expected = "as many maps in both (their times are not known)"
        raise BadInput(f"{predicted.source} and {truth.source}", expected, got, "Check the files")
    places = {time: place for place, time in enumerate(theirs)}
    pairs = [(place, places[time]) for place, time in enumerate(ours) if time in places]
    if not pairs:
        got = f"{predicted.times[0]} … and {truth.times[0]} …"
        raise BadInput(f"{predicted.source} and {truth.source}", "maps of the same times", got, "Check that they belong together")
    return pairs


def _key(time: Any) -> tuple[int, ...] | None:
    """A time to the minute, whatever its calendar."""
    return None if time is None else (time.year, time.month, time.day, time.hour, time.minute)


def hemispheres(grid: Grid) -> dict[str, NDArray[np.bool_]]:
    """Cells (H, W) of either hemisphere; the equator is in neither."""
    lat = np.broadcast_to(grid.lat[:, None], grid.shape)
    return {"north": lat > 0, "south": lat < 0}


def regions(grid: Grid) -> dict[str, NDArray[np.bool_]]:
    """Cells (H, W) of the climate zones and of the basins of tropical cyclones (WMO's, by latitude and longitude)."""
    lat = np.broadcast_to(grid.lat[:, None], grid.shape)
    lon = np.broadcast_to(grid.lon[None, :], grid.shape)
    north, south = (lat > 0) & (lat <= 60), (lat < 0) & (lat >= -60)
    america = np.interp(lat, [8.0, 20.0], [283.0, 260.0])  # the land bridge between Pacific and Atlantic
    return {
        "tropics": np.abs(lat) <= TROPICS_DEG,
        "mid_latitudes": (np.abs(lat) > TROPICS_DEG) & (np.abs(lat) <= POLAR_DEG),
        "polar": np.abs(lat) > POLAR_DEG,
        "north_atlantic": north & (lon >= america),
        "east_pacific": north & (lon >= 180) & (lon < america),
        "west_pacific": north & (lon >= 100) & (lon < 180),
        "north_indian": north & (lon >= 30) & (lon < 100),
        "south_indian": south & (lon >= 20) & (lon < 135),
        "south_pacific": south & (lon >= 135) & (lon < 290),
        "south_atlantic": south & ((lon >= 290) | (lon < 20)),
    }

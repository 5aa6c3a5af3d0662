"""The objects of many masks as one table (Parquet and CSV), one row per object and time, tracks numbered.

Two passes, so that no archive is too long: the first reads one map at a time in the order of time, whatever the files, and
writes rows with the branch of each object; when the last map has been read it is known which branches were one track, and
the second pass writes the table from the rows, group after group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.coast import land_share
from raysegment.applications.evaluate import NAMES, Paths, mask_files
from raysegment.applications.mask_series import MaskSeries, Moment, by_time, list_moments
from raysegment.applications.table_writer import RowFile, Table, write_table
from raysegment.applications.weather_files import WeatherFiles
from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput
from raysegment.climate.events import MapObject, find_objects
from raysegment.climate.grid import Grid
from raysegment.climate.linking import MAX_GAP_H, Linker, Tracks
from raysegment.console import Report

KM3_PER_KG = 1e-12


def write_events(
    masks: Paths,
    out: str | Path,
    fields: Paths | None = None,
    min_area_km2: float = 0.0,
    min_duration_h: float = 0.0,
    report: Report | None = None,
) -> dict[str, Any]:
    """Objects of all masks → `out` with the endings .parquet, .csv and .tracks.csv; returns their paths and counts.

    `fields` (source files or folders, found by name, else by time) give positions and strengths. Tracks shorter than
    `min_duration_h` are left out (the numbers of the others stay the same).
    """
    if not (min_duration_h >= 0 and min_area_km2 >= 0):
        raise BadInput("events", "limits of at least 0", f"{min_duration_h} h, {min_area_km2} km2", "Correct the options")
    base = Path(out)
    base = base.with_suffix("") if base.suffix in (".parquet", ".csv") else base
    moments = list_moments(sorted({file for path in _each(masks) for file in mask_files(path)}))
    linker = Linker()
    with RowFile(base) as rows:
        for branch, row in _rows(moments, fields, linker, min_area_km2, report):
            rows.add(branch, row)
        tracks = linker.tracks()
        table = write_table(rows, base, tracks, _calendar(moments), min_duration_h)
    return {"files": [str(path) for path in table.files], "snapshots": len(moments), **_counts(table, tracks)}


def _each(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _calendar(moments: Sequence[Moment]) -> str:
    return next((moment.time.calendar for moment in moments if moment.time is not None), "standard")


def _rows(
    moments: Sequence[Moment], fields: Paths | None, linker: Linker, min_area_km2: float, report: Report | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(branch, row) of every object, in the order of time; at the same time as in the order of files and of size."""
    steps_h, done = step_hours(moments), 0
    with MaskSeries() as series, WeatherFiles(_each(fields)) if fields else nullcontext() as weather:
        land = _Land()
        for together in by_time(moments):
            found = [(moment, one) for moment in together for one in _objects(moment, series, weather, land, min_area_km2)]
            branches = linker.step([one for _, one in found], together[0].hour)
            for branch, (moment, one) in zip(branches, found, strict=True):
                yield branch, {**_about(moment), **one.event.row(), "precip_km3": _km3(one, steps_h.get(moment.hour))}
            done += len(together)
            if report is not None:
                report(done, len(moments))


def _objects(
    moment: Moment, series: MaskSeries, weather: WeatherFiles | None, land: _Land, min_area_km2: float
) -> list[MapObject]:
    mask, grid = series.read(moment)
    maps = None if weather is None else weather.weather(moment.file, grid, moment.index, moment.time)
    return find_objects(mask, grid, maps, land.on(grid), min_area_km2)


class _Land:
    """The share of land on each grid that comes along."""

    def __init__(self) -> None:
        self._shares: dict[int, NDArray] = {}

    def on(self, grid: Grid) -> NDArray:
        if id(grid) not in self._shares:
            self._shares[id(grid)] = land_share(grid)
        return self._shares[id(grid)]


def _about(moment: Moment) -> dict[str, Any]:
    return {
        "file": moment.file.name,
        "time": "" if moment.time is None else moment.time.isoformat(),
        "hour": np.nan if moment.hour is None else moment.hour,
        "index": moment.index,
    }


def _km3(found: MapObject, step_h: float | None) -> float | None:
    """Water (km³) that falls out of an object until the next time."""
    rate = found.event.precip_kg_s
    return None if rate is None or step_h is None else rate * step_h * 3600.0 * KM3_PER_KG


def step_hours(moments: Sequence[Moment]) -> dict[float | None, float]:
    """Hours from each time to the next one (the last: from the one before), where that is no more than `MAX_GAP_H`."""
    times = sorted({moment.hour for moment in moments if moment.hour is not None})
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return {hour: gap for hour, gap in zip(times, [*gaps, *gaps[-1:]], strict=False) if gap <= MAX_GAP_H}


def _counts(table: Table, tracks: Tracks) -> dict[str, Any]:
    """Objects and tracks that the table holds, by class."""
    objects = {name: table.objects[name] for name in CLASSES[1:]}
    kept = {name: int(np.unique(tracks.number[sorted(table.branches[name])]).size) for name in CLASSES[1:]}
    return {"objects": dict(zip(NAMES[1:], objects.values(), strict=True)), "events": objects, "tracks": kept}

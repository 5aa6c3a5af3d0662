"""Cyclone objects of masks against best tracks: hits, misses, false alarms, and how far the hits lie from the truth.

At each map's time the storms of the table (nearest row within three hours) and the cyclone objects are paired one-to-one, as
many pairs as possible within the maximal distance, then with the least distance in all. A storm of a pair is a hit, one without
a miss, an object without a false alarm. Storms below a minimum wind are neither hits nor misses, and an object that only such a
storm explains is no false alarm.

Times of models say nothing about real storms: masks of a calendar that no real year has, or of unknown times, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysegment.applications.evaluate import Paths, mask_files
from raysegment.applications.mask_series import MaskSeries, Moment, list_moments
from raysegment.applications.tracks import TOLERANCE_S, BestTracks, Storm, read_best_tracks, seconds_of
from raysegment.applications.weather_files import WeatherFiles
from raysegment.climate.channels import CYCLONE
from raysegment.climate.checks import BadInput
from raysegment.climate.events import Event, find_objects
from raysegment.climate.grid import great_circle_km
from raysegment.climate.linking import assign

MAX_DISTANCE_KM = 333.0  # 3 degrees
REAL_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")
_LISTED = 200  # storms and false alarms named in the result; beyond that only counted


@dataclass(frozen=True)
class Verdict:
    """One map: (storm, distance to its object in km, None for a miss), and the objects that are false alarms."""

    storms: list[tuple[Storm, float | None]]
    alarms: list[Event]


@dataclass(frozen=True)
class HitRules:
    """What counts: the greatest distance of a hit, and the least wind (knots) of a storm that must be found."""

    max_distance_km: float = MAX_DISTANCE_KM
    min_wind_kt: float = 0.0

    def __post_init__(self) -> None:
        if not self.max_distance_km > 0 or not self.min_wind_kt >= 0:
            got = f"{self.max_distance_km} km, {self.min_wind_kt} kt"
            raise BadInput("hits", "a distance above 0 and a wind of at least 0", got, "Correct the options")


_DEFAULT = HitRules()


def count_hits(predicted: Paths, tracks: str | Path, fields: Paths | None = None, rules: HitRules = _DEFAULT) -> dict[str, Any]:
    """Cyclones of masks (files, folders or patterns) against the best tracks of a CSV; `fields` give pressure minima.

    Returns `hits`, `misses`, `false_alarms`, `mean_distance_km` (of hits, None without any), `hit_rate`,
    `false_alarm_ratio` (of objects), `maps` compared and `maps_outside` the table's time, `by_status` (hits and misses),
    and up to 200 `storms` and `false_alarm_places` by name and place.
    """
    files = sorted({file for path in _each(predicted) for file in mask_files(path)})
    moments = [_real(moment) for moment in list_moments(files)]
    seconds = [_second(moment) for moment in moments]
    best = read_best_tracks(tracks, seconds[0], seconds[-1])
    known = [best.first_s - TOLERANCE_S <= at <= best.last_s + TOLERANCE_S for at in seconds]
    inside = [one for one, covered in zip(moments, known, strict=True) if covered]
    verdicts = list(_judge(inside, best, fields, rules))
    return {**_summary(verdicts), "maps": len(inside), "maps_outside": len(moments) - len(inside), **_named(inside, verdicts)}


def _each(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _real(moment: Moment) -> Moment:
    """The map, unless its time is none of the real world."""
    calendar = "unknown time" if moment.time is None else f"calendar {moment.time.calendar}"
    if moment.time is None or moment.time.calendar not in REAL_CALENDARS:
        expected = "masks of real times (a standard calendar) to compare with best tracks"
        remedy = "A model's own storms are not those of the same date: leave --tracks out"
        raise BadInput(moment.file, expected, calendar, remedy)
    return moment


def _second(moment: Moment) -> float:
    return seconds_of(moment.time.isoformat())


def _judge(moments: Sequence[Moment], best: BestTracks, fields: Paths | None, rules: HitRules) -> Iterator[Verdict]:
    with MaskSeries() as series, WeatherFiles(_each(fields)) if fields else nullcontext() as weather:
        for moment in moments:
            mask, grid = series.read(moment)
            maps = None if weather is None else weather.weather(moment.file, grid, moment.index, moment.time)
            cyclones = np.where(mask == CYCLONE, mask, 0).astype(np.uint8)
            yield match([found.event for found in find_objects(cyclones, grid, maps)], best.at(_second(moment)), rules)


def match(objects: Sequence[Event], storms: Sequence[Storm], rules: HitRules) -> Verdict:
    """Pair the cyclone objects of one map with the storms of its hour."""
    strong = [one for one in storms if rules.min_wind_kt == 0 or (one.wind_kt or 0.0) >= rules.min_wind_kt]
    weak = [one for one in storms if one not in strong]
    apart_km = distances_km(objects, strong)
    pairs = assign(np.where(apart_km <= rules.max_distance_km, apart_km, np.inf))
    rest = [one for place, one in enumerate(objects) if place not in pairs.values()]
    explained = assign(np.where((near := distances_km(rest, weak)) <= rules.max_distance_km, near, np.inf)).values()
    judged = [(storm, float(apart_km[row, pairs[row]]) if row in pairs else None) for row, storm in enumerate(strong)]
    return Verdict(judged, [one for place, one in enumerate(rest) if place not in explained])


def distances_km(objects: Sequence[Event], storms: Sequence[Storm]) -> np.ndarray:
    """Great-circle distances (storms, objects)."""
    apart = [[float(great_circle_km(s.lat, s.lon, one.lat, one.lon)) for one in objects] for s in storms]
    return np.array(apart).reshape(len(storms), len(objects))


def _summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    judged = [pair for verdict in verdicts for pair in verdict.storms]
    away = [km for _, km in judged if km is not None]
    alarms = sum(len(verdict.alarms) for verdict in verdicts)
    statuses = sorted({storm.status for storm, _ in judged})
    of = {status: [km for storm, km in judged if storm.status == status] for status in statuses}
    return {
        "hits": len(away),
        "misses": len(judged) - len(away),
        "false_alarms": alarms,
        "mean_distance_km": float(np.mean(away)) if away else None,
        "hit_rate": len(away) / len(judged) if judged else None,
        "false_alarm_ratio": alarms / (alarms + len(away)) if alarms + len(away) else None,
        "by_status": {name: {"hits": len(all_) - all_.count(None), "misses": all_.count(None)} for name, all_ in of.items()},
    }


def _named(moments: Sequence[Moment], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The first storms and false alarms, one by one."""
    storms, alarms = list[dict[str, Any]](), list[dict[str, Any]]()
    for moment, verdict in zip(moments, verdicts, strict=True):
        when = moment.time.isoformat()
        for storm, km in verdict.storms:
            storms.append({"time": when, "storm": storm.label, "lat": storm.lat, "lon": storm.lon, "distance_km": km})
        alarms += [{"time": when, "lat": one.lat, "lon": one.lon, "area_km2": one.area_km2} for one in verdict.alarms]
    return {"storms": storms[:_LISTED], "false_alarm_places": alarms[:_LISTED]}

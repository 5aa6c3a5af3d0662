"""Cyclone objects against best tracks: one-to-one, within a distance, of the same hour, never of a model's calendar."""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import permutations
from pathlib import Path

import cftime
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.applications.hits import HitRules, count_hits, distances_km, match
from raysegment.applications.tracks import Storm
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.cli import main
from raysegment.climate.channels import CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.events import Event
from raysegment.climate.grid import Grid
from tests.helpers import real_data

GRID = Grid.global_(91, 180)
NOON = cftime.DatetimeGregorian(2011, 10, 11, 12)
HEAD = "sid,name,iso_time,lat,lon,usa_status,usa_wind\n"


def disc(lat: float, lon: float, kind: int = CYCLONE) -> np.ndarray:
    return np.where(GRID.distance_km(lat, lon) < 500.0, kind, 0).astype(np.uint8)


def write(path: Path, masks: list[np.ndarray], first: cftime.datetime = NOON, step_h: int = 6) -> Path:
    when = [first + timedelta(hours=step_h * step) for step in range(len(masks))]
    write_masks(path, np.stack(masks), Axes.of(GRID), when, "test")
    return path


def at(lat: float, lon: float) -> Event:
    return Event(CYCLONE, lat, lon, 9, 1e5, 400.0, 250.0, lat, lat, lon, lon)


PLACES = st.lists(st.tuples(st.floats(-5, 5), st.floats(177, 183)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(PLACES, PLACES)
def test_pairs_are_the_most_and_then_the_nearest_of_all(objects, storms):
    """Against every way to pair them."""
    events, best = [at(*place) for place in objects], [Storm(str(k), lat, lon % 360) for k, (lat, lon) in enumerate(storms)]
    verdict = match(events, best, HitRules(200.0))
    apart = distances_km(events, best)
    ways = []
    for order in permutations([*range(len(events)), *[-1] * len(best)], len(best)):
        away = [apart[row, column] for row, column in enumerate(order) if column >= 0 and apart[row, column] <= 200.0]
        ways.append((-len(away), sum(away)))
    found = [km for _, km in verdict.storms if km is not None]
    assert (-len(found), sum(found)) == pytest.approx(min(ways, default=(0, 0)))
    assert len(verdict.alarms) == len(events) - len(found)


def test_weak_storms_neither_count_nor_make_false_alarms():
    storms = [Storm("weak", 10.0, 50.0, wind_kt=20.0), Storm("strong", 10.0, 52.0, wind_kt=70.0), Storm("unknown", -10.0, 50.0)]
    verdict = match([at(10.0, 50.5), at(-10.0, 51.0), at(40.0, 0.0)], storms, HitRules(333.0, 34.0))
    assert [storm.name for storm, _ in verdict.storms] == ["strong"]
    assert verdict.storms[0][1] is not None  # the strong one comes first
    assert [event.lat for event in verdict.alarms] == [40.0]


def test_hits_of_several_hours(tmp_path):
    masks = [np.maximum(disc(15.0, 179.0), disc(40.0, 300.0, RIVER)), disc(16.0, 181.0), disc(-15.0, 60.0)]
    path = write(tmp_path / "m" / "a.mask.nc", masks)
    (tmp_path / "t.csv").write_text(
        HEAD + " ,, ,degrees_north,degrees_east,,kts\n"
        "A,ONE,2011-10-11 11:00:00,15.0,178.0,TS,40\n"
        "A,ONE,2011-10-11 13:30:00,15.0,170.0,TS,40\n"  # not the nearest in time
        "A,ONE,2011-10-11 18:00:00,16.0,-179.0,TS,45\n"
        "B,TWO,2011-10-11 18:00:00,-15.0,60.0,HU,70\n"
        "A,ONE,2011-10-12 06:00:00,15.0,178.0,TS,40\n"
        "C,OLD,1999-10-12 06:00:00,15.0,178.0,TS,40\n"
    )
    result = count_hits(tmp_path / "m", tmp_path / "t.csv")
    assert (result["hits"], result["misses"], result["false_alarms"]) == (2, 1, 1)
    assert result["by_status"] == {"HU": {"hits": 0, "misses": 1}, "TS": {"hits": 2, "misses": 0}}
    assert result["mean_distance_km"] == pytest.approx(np.mean([111.2 * np.cos(np.deg2rad(15.0)), 0.0]), abs=15.0)
    assert result["hit_rate"] == pytest.approx(2 / 3)
    assert result["false_alarm_ratio"] == pytest.approx(1 / 3)
    assert [one["time"] for one in result["false_alarm_places"]] == ["2011-10-12T00:00:00"]
    assert result["maps"] == 3
    near = count_hits(path, tmp_path / "t.csv", rules=HitRules(1.0))
    assert (near["hits"], near["misses"]) == (0, 3)
    assert near["mean_distance_km"] is None


def test_maps_outside_the_table_are_not_judged(tmp_path):
    path = write(tmp_path / "a.mask.nc", [disc(15.0, 179.0)] * 3)
    (tmp_path / "t.csv").write_text(HEAD + "A,ONE,2011-10-11 12:00:00,15.0,179.0,TS,40\n")
    result = count_hits(path, tmp_path / "t.csv")
    assert (result["hits"], result["false_alarms"], result["maps"], result["maps_outside"]) == (1, 0, 1, 2)


@pytest.mark.parametrize(
    ("first", "text", "message"),
    [
        (cftime.DatetimeNoLeap(2011, 10, 11), "A,ONE,2011-10-11,15,178,TS,40\n", "real times.*noleap"),
        (None, "A,ONE,2011-10-11,15,178,TS,40\n", "real times.*unknown"),
        (NOON, "A,ONE,2012-10-11,15,178,TS,40\n", "between 2011-10-11T12.*rows from 2012"),
        (NOON, "A,ONE,yesterday,15,178,TS,40\n", "row 1.*yesterday"),
        (NOON, "", "no row"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, first, text, message):
    path = tmp_path / "a.mask.nc"
    write_masks(path, disc(15.0, 179.0)[None], Axes.of(GRID), [first], "test")
    (tmp_path / "t.csv").write_text(HEAD + text)
    with pytest.raises(BadInput, match=message):
        count_hits(path, tmp_path / "t.csv")


def test_bad_limits():
    for rules in ((0.0, 0.0), (100.0, -1.0), (float("nan"), 0.0)):
        with pytest.raises(BadInput, match="above 0"):
            HitRules(*rules)


def test_real_storms_are_hit(tmp_path):
    """Masks drawn around where two of the real storms were."""
    tracks = real_data("ibtracs_2011-10-11T00.csv")
    mask = np.maximum(disc(17.0, 254.0), disc(15.0, 243.0))
    path = write(tmp_path / "a.mask.nc", [mask], cftime.DatetimeGregorian(2011, 10, 11))
    result = count_hits(path, tracks)
    assert (result["hits"], result["misses"], result["false_alarms"]) == (2, 2, 0)
    assert result["mean_distance_km"] < 100.0


def test_the_command_line_says_hits_and_refuses_models(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(HEAD + "A,ONE,2011-10-11 12:00:00,15.0,179.0,TS,40\n")
    real = write(tmp_path / "real" / "a.mask.nc", [disc(15.0, 179.0)])
    model = write(tmp_path / "model" / "a.mask.nc", [disc(15.0, 179.0)], cftime.DatetimeNoLeap(2011, 10, 11, 12))
    assert main(["evaluate", str(real), str(real), "--tracks", str(tmp_path / "t.csv"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["hits"], said["misses"], said["false_alarms"], said["iou"]["cyclone"]) == (1, 0, 0, 1.0)
    assert said["mean_distance_km"] < 100.0
    assert main(["evaluate", str(model), "--tracks", str(tmp_path / "t.csv")]) == 2
    assert "noleap" in capsys.readouterr().err
    assert main(["evaluate", str(real)]) == 2
    assert "--agreement" in capsys.readouterr().err

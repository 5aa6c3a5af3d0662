"""Scores against loops over pixels, pairing of files, distances to best tracks, and the table of events."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import cftime
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.applications.evaluate import basins, evaluate, latitude_bands
from raysegment.applications.intervals import Blocks, Bootstrap
from raysegment.applications.tracks import Storm, read_tracks, storm_distances
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.archive.snapshots import write_climatenet
from raysegment.climate.channels import CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.cyclones import Cyclone
from raysegment.climate.events import Event
from raysegment.climate.grid import Grid
from raysegment.learning.metrics import confusion, mlperf_iou
from raysegment.learning.metrics import iou as class_iou
from tests.helpers import real_data
from tests.weather import quiet

GRID = Grid.global_(19, 36)
START = cftime.DatetimeNoLeap(2001, 1, 31, 21)


def times(count: int, first: cftime.datetime = START) -> list[cftime.datetime]:
    return [first + timedelta(hours=3 * step) for step in range(count)]


def random_masks(seed: int, count: int = 1, classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (count, *GRID.shape)).astype(np.uint8)


def write(path: Path, masks: np.ndarray, when: list | None = None, grid: Grid = GRID) -> Path:
    write_masks(path, masks, Axes.of(grid), when or times(len(masks)), "test")
    return path


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 3))
def test_confusion_and_iou_agree_with_loops(seed, classes):
    guess, true = (random_masks(seed + k, 1, classes)[0, :6, :7] for k in (0, 1))
    counts = confusion(guess, true)
    for t in range(3):
        for p in range(3):
            assert counts[t, p] == sum(a == t and b == p for a, b in zip(true.ravel(), guess.ravel(), strict=True))
    for kind, iou in enumerate(class_iou(counts)):
        ours, theirs = set(np.flatnonzero(guess == kind)), set(np.flatnonzero(true == kind))
        if ours | theirs:
            assert iou == pytest.approx(len(ours & theirs) / len(ours | theirs))
        else:
            assert np.isnan(iou)
    assert mlperf_iou(counts) == pytest.approx(np.mean([1.0 if np.isnan(x) else x for x in class_iou(counts)]))


def test_one_summed_matrix_and_the_mean_of_maps(tmp_path):
    guess, true = random_masks(1, 3), random_masks(2, 3)
    ours, theirs = write(tmp_path / "p" / "a.mask.nc", guess), write(tmp_path / "t" / "a.mask.nc", true)
    result = evaluate(ours, theirs)
    assert result["confusion"] == confusion(guess, true).tolist()
    assert result["iou"]["river"] == pytest.approx(class_iou(confusion(guess, true))[RIVER])
    assert result["iou"]["mean"] == pytest.approx(class_iou(confusion(guess, true)).mean())
    assert result["mlperf_iou"] == pytest.approx(np.mean([mlperf_iou(confusion(g, t)) for g, t in zip(guess, true, strict=True)]))
    assert result["snapshots"] == 3
    assert list(result["by_month"]) == ["01", "02"]
    assert sum(np.sum(part["confusion"]) for part in result["by_month"].values()) == np.sum(result["confusion"])
    bands = sum(np.array(part["confusion"]) for part in result["by_latitude_band"].values())
    assert bands.tolist() == result["confusion"]
    assert list(result["by_basin"]) == sorted(basins(GRID))
    halves = sum(np.array(part["confusion"]).sum() for part in result["by_hemisphere"].values())
    assert halves == 3 * 18 * 36  # the equator is in neither
    json.dumps(result, allow_nan=False)


def test_truth_is_the_first_axis(tmp_path):
    guess, true = np.full((1, *GRID.shape), RIVER, np.uint8), np.full((1, *GRID.shape), CYCLONE, np.uint8)
    result = evaluate(write(tmp_path / "a.mask.nc", guess), write(tmp_path / "b.mask.nc", true))
    assert result["confusion"][CYCLONE][RIVER] == guess.size


def test_a_class_that_is_nowhere_has_no_iou(tmp_path):
    masks = random_masks(3, 1, 2)
    result = evaluate(write(tmp_path / "a.mask.nc", masks), write(tmp_path / "b.mask.nc", masks))
    assert result["iou"] == {"background": 1.0, "cyclone": 1.0, "river": None, "mean": 1.0}
    assert result["mlperf_iou"] == 1.0


def test_folders_pair_by_name_and_maps_by_time(tmp_path):
    guess, true = random_masks(4, 4), random_masks(5, 4)
    write(tmp_path / "p" / "x.mask.nc", guess[2:], times(4)[2:])
    write(tmp_path / "p" / "alone.mask.nc", guess)
    write(tmp_path / "t" / "x.mask.nc", true)
    write(tmp_path / "t" / "other.mask.nc", true)
    result = evaluate(tmp_path / "p", tmp_path / "t")
    assert result["confusion"] == confusion(guess[2:], true[2:]).tolist()
    assert result["unpaired"] == {"predicted": ["alone"], "truth": ["other"]}
    assert evaluate(tmp_path / "p" / "x.mask.nc", [tmp_path / "t" / "x.mask.nc"])["confusion"] == result["confusion"]


def test_truth_may_be_labels_inside_an_archive(tmp_path):
    guess, true = random_masks(6), random_masks(7)
    write_climatenet(tmp_path / "t" / "data-2001-01-31-07-1.nc", quiet(GRID), GRID, true[0], START)
    write(tmp_path / "p" / "data-2001-01-31-07-1.mask.nc", guess, [START])
    assert evaluate(tmp_path / "p", tmp_path / "t")["confusion"] == confusion(guess, true).tolist()


def test_what_does_not_belong_together_is_refused(tmp_path):
    other = Grid.global_(19, 40)
    ours = write(tmp_path / "p" / "a.mask.nc", random_masks(8))
    wide = write(tmp_path / "t" / "a.mask.nc", np.zeros((1, *other.shape), np.uint8), grid=other)
    with pytest.raises(BadInput, match=r"19 × 40.*19 × 36") as error:
        evaluate(ours, wide)
    assert str(ours) in error.value.where
    assert str(wide) in error.value.where
    late = write(tmp_path / "l" / "a.mask.nc", random_masks(8), times(1, START + timedelta(days=9)))
    with pytest.raises(BadInput, match="same times"):
        evaluate(ours, late)
    named = write(tmp_path / "n" / "b.mask.nc", random_masks(8))
    with pytest.raises(BadInput, match="none in common"):
        evaluate(tmp_path / "p", named.parent)
    with pytest.raises(BadInput):
        evaluate(tmp_path / "absent", ours)


def test_regions_hold_what_their_names_say():
    grid = Grid.global_(181, 360)
    zones = basins(grid)
    places = {
        "north_atlantic": (25.0, 285.0), "east_pacific": (17.0, 255.0), "west_pacific": (15.0, 130.0),
        "north_indian": (15.0, 88.0), "south_indian": (-18.0, 70.0), "south_pacific": (-18.0, 175.0),
        "south_atlantic": (-28.0, 315.0),
    }  # fmt: skip
    for name, place in places.items():
        assert [zone for zone in places if zones[zone][grid.nearest(*place)]] == [name]
    assert sum(zones[name].astype(int) for name in places).max() == 1
    bands = latitude_bands(grid)
    assert (sum(band.astype(int) for band in bands.values()) == 1).all()
    assert {name: float(grid.lat[band[:, 0]].min()) for name, band in bands.items()} == {
        "90S-60S": -90.0, "60S-30S": -60.0, "30S-0": -30.0, "0-30N": 0.0, "30N-60N": 30.0, "60N-90N": 60.0,
    }  # fmt: skip


TABLE = "track_id,season,basin,time,lat,lon,status,wind,slp,sshs_cat\n"


def test_best_tracks_in_any_column_order(tmp_path):
    path = tmp_path / "tracks.csv"
    path.write_text(TABLE + "A1,2011,EP,2011-10-11,15.1,-116.5,TS,35.0,1004.0,0\nB2,2011,WP,2011-10-11,8.2,128.8,TD,,1000.0,-1\n")
    first, second = read_tracks(path)
    assert first == Storm("A1", 15.1, 243.5, "2011-10-11", "TS", 35.0)
    assert second.wind_kt is None
    assert second.label == "B2 TD"
    path.write_text("Lon, LAT ,Name,SID\ndegrees_east,degrees_north, , \n-20.0,10.5,JOVA,2011X\n10.0,-4,UNNAMED,2012Y\n")
    assert [(s.name, s.lat, s.lon) for s in read_tracks(path)] == [("JOVA", 10.5, 340.0), ("2012Y", -4.0, 10.0)]


def test_a_whole_track_is_read_at_the_time_of_the_map(tmp_path):
    path = tmp_path / "tracks.csv"
    rows = [f"A1,2011,EP,2011-10-11 {hour:02d}:00:00,{10 + hour},200,TS,35,1004,0" for hour in (0, 6, 12)]
    path.write_text(TABLE + "\n".join(rows) + "\n")
    assert [storm.lat for storm in read_tracks(path, cftime.DatetimeGregorian(2011, 10, 11, 7))] == [16.0]
    with pytest.raises(BadInput, match="no time"):
        read_tracks(path)
    with pytest.raises(BadInput, match="three hours"):
        read_tracks(path, cftime.DatetimeGregorian(2011, 10, 13))


@pytest.mark.parametrize(
    ("text", "message"),
    [("time,lat,wind\n2011-10-11,3,4\n", "columns lat and lon"), (TABLE + "A,2011,EP,,95,20,TS,35,1,0\n", "row 1"),
     (TABLE + "A,2011,EP,,north,20,TS,35,1,0\n", "north"), ("", "CSV")],
)  # fmt: skip
def test_bad_tracks_are_refused(tmp_path, text, message):
    path = tmp_path / "tracks.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_tracks(path)
    with pytest.raises(BadInput):
        read_tracks(tmp_path / "absent.csv")


def cyclone(lat: float, lon: float) -> Cyclone:
    return Cyclone(lat, lon, 98000.0, 30.0, 2e-4, 2.0, 400.0)


def test_distances_are_in_the_order_of_the_file():
    tracks = [Storm("a", 10.0, 179.0), Storm("b", -20.0, 30.0)]
    found = [cyclone(-20.0, 32.9), cyclone(10.0, 181.0), cyclone(30.0, 300.0), cyclone(-55.0, 300.0)]
    result = storm_distances(found, tracks)
    assert result["distances_deg"] == pytest.approx([2.0 * np.cos(np.deg2rad(10.0)), 2.9 * np.cos(np.deg2rad(20.0))], rel=1e-3)
    assert result["others"] == 1  # the one beyond 50S does not count
    assert storm_distances([], tracks) == {"distances_deg": [None, None], "others": 0}
    assert storm_distances(found, []) == {"distances_deg": [], "others": 3}
    river = Event(RIVER, 10.0, 179.0, 9, 1e5, 400.0, 250.0, 0.0, 1.0, 0.0, 1.0)
    assert storm_distances([river], tracks)["distances_deg"] == [None, None]


def test_real_tracks():
    storms = read_tracks(real_data("ibtracs_2011-10-11T00.csv"))
    assert [storm.status for storm in storms] == ["TS", "HU", "LO", "TD"]
    assert storms[1].lon == pytest.approx(253.8)


def bernoulli_blocks(days: int, share: float, seed: int = 1) -> Blocks:
    """Days of ten cells that either side calls river, of which each day has all right with a probability."""
    blocks, random = Blocks(), np.random.default_rng(seed)
    for day in range(days):
        counts = np.zeros((3, 3), np.int64)
        counts[RIVER, RIVER if random.random() < share else 0] = 10
        blocks.add(cftime.DatetimeGregorian(2001, 1, 1) + timedelta(days=day), "", {("", ""): counts})
    return blocks


def test_intervals_are_those_of_the_binomial_distribution():
    """IoU of the river is then the share of right days, whose percentiles are known."""
    blocks = bernoulli_blocks(200, 0.6)
    share = blocks.sums()["", ""][RIVER, RIVER] / 2000
    low, high = blocks.intervals(Bootstrap(4000, 3))["", ""][RIVER]
    half = 1.96 * np.sqrt(share * (1 - share) / 200)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.012)
    assert blocks.intervals(Bootstrap(4000, 3)) == blocks.intervals(Bootstrap(4000, 3))
    assert blocks.intervals(Bootstrap(39, 4)) != blocks.intervals(Bootstrap(39, 3))
    assert blocks.intervals(Bootstrap(0))["", ""] == [None] * 4


def test_blocks_are_days_then_months():
    assert bernoulli_blocks(300, 0.5).about(Bootstrap())["unit"] == "day"
    long = bernoulli_blocks(360, 0.5).about(Bootstrap(7, 2))
    assert long == {"unit": "month", "blocks": 12, "resamples": 7, "seed": 2, "level_percent": 95.0}
    unknown = bernoulli_blocks(360, 0.5)
    unknown.add(None, "a.nc 0", {("", ""): np.eye(3, dtype=np.int64)})
    assert unknown.about(Bootstrap())["blocks"] == 361


def test_maps_of_one_day_are_one_block_and_have_no_interval(tmp_path):
    """Eight maps of one day say no more of other days than one does."""
    day = times(8, cftime.DatetimeNoLeap(2001, 2, 1))
    ours = write(tmp_path / "a.mask.nc", random_masks(1, 8), day)
    theirs = write(tmp_path / "b.mask.nc", random_masks(2, 8), day)
    result = evaluate(ours, theirs, Bootstrap(20))
    assert result["bootstrap"]["blocks"] == 1
    assert result["iou_95"] == dict.fromkeys(("background", "cyclone", "river", "mean"))
    days = [day[0] + timedelta(days=k) for k in range(8)]
    ours = write(tmp_path / "c.mask.nc", random_masks(1, 8), days)
    theirs = write(tmp_path / "d.mask.nc", random_masks(2, 8), days)
    wide = evaluate(ours, theirs, Bootstrap(200))
    low, high = wide["iou_95"]["river"]
    assert low < wide["iou"]["river"] < high
    assert wide["by_basin"]["north_atlantic"]["iou_95"]["cyclone"][0] < wide["by_basin"]["north_atlantic"]["iou"]["cyclone"]


def test_bad_settings_of_the_bootstrap():
    with pytest.raises(BadInput, match="at least 0"):
        Bootstrap(-1)

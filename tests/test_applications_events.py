"""The table of events: its columns, the same whatever the files, in memory a group at a time; cyclone tracks; filters."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import cftime
import netCDF4
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from raysegment.applications import table_writer, weather_files
from raysegment.applications.events_table import write_events
from raysegment.applications.table_writer import COLUMNS, TRACK_COLUMNS
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.archive.snapshots import write_climatenet
from raysegment.cli import main
from raysegment.climate.channels import CYCLONE, INDEX, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from tests.helpers import real_data
from tests.weather import add_vortex, quiet

GRID = Grid.global_(91, 180)
SMALL = Grid.global_(19, 36)
START = cftime.DatetimeNoLeap(2001, 1, 31, 21)
NOTHING = {"tropical_cyclone": 0, "atmospheric_river": 0}


def times(count: int, step_h: float = 3.0) -> list[cftime.datetime]:
    return [START + timedelta(hours=step_h * step) for step in range(count)]


def write(path: Path, masks: np.ndarray, when: list, grid: Grid = GRID) -> Path:
    write_masks(path, masks, Axes.of(grid), when, "test")
    return path


def moving(count: int) -> np.ndarray:
    """A storm that passes the date line and Greenwich fast, two rivers that merge, and a storm of two maps only."""
    masks = np.zeros((count, *GRID.shape), np.uint8)
    for step, mask in enumerate(masks):
        mask[GRID.distance_km(15.0, 350.0 + 3.0 * step) < 500.0] = CYCLONE
        mask[65:68, 60 : 70 + step] = RIVER
        mask[65:68, 78:90] = RIVER
        if step in (1, 2):
            mask[GRID.distance_km(-15.0, 100.0) < 400.0] = CYCLONE
    return masks


def test_table_of_events(tmp_path):
    masks = np.zeros((2, *GRID.shape), np.uint8)
    for step, mask in enumerate(masks):
        mask[GRID.distance_km(16.0, 359.0 + step) < 600.0] = CYCLONE
        mask[GRID.distance_km(45.0, 150.0) < 900.0] = RIVER
    for step in range(2):
        fields = quiet(GRID)
        add_vortex(fields, GRID, 17.0, 359.0 + step)
        write_climatenet(tmp_path / "in" / f"s{step}.nc", fields, GRID, None, times(2)[step])
        write(tmp_path / "out" / f"s{step}.mask.nc", masks[step : step + 1], times(2)[step : step + 1])
    result = write_events(tmp_path / "out", tmp_path / "events", tmp_path / "in")
    assert result["objects"] == {"cyclone": 2, "river": 2}
    assert result["events"] == {"tropical_cyclone": 2, "atmospheric_river": 2}
    assert result["tracks"] == {"tropical_cyclone": 1, "atmospheric_river": 1}
    table = pd.read_parquet(tmp_path / "events.parquet")
    assert list(table.columns) == list(COLUMNS)
    assert list(pd.read_csv(tmp_path / "events.csv").columns) == list(COLUMNS)
    storms = table[table["class"] == "tropical_cyclone"]
    assert storms["lat"].tolist() == pytest.approx([17.0, 17.0], abs=0.6)
    assert (storms["min_psl_pa"] < 98000).all()
    assert storms["land_share"].tolist() == pytest.approx([1.0, 1.0])  # in the Sahara
    assert storms["landfall"].tolist() == [True, True]
    assert storms["track_landfall_time"].tolist() == [START.isoformat()] * 2
    assert storms["track_hours"].tolist() == [0.0, 3.0]
    assert storms["duration_h"].tolist() == [3.0, 3.0]
    assert storms["precip_km3"].to_numpy() == pytest.approx(storms["precip_kg_s"].to_numpy() * 3 * 3600 * 1e-12)
    lines = pd.read_csv(tmp_path / "events.tracks.csv")
    assert tuple(lines.columns) == TRACK_COLUMNS
    assert lines["track_id"].tolist() == [0, 0]
    assert lines["slp"].tolist() == pytest.approx(storms["min_psl_pa"].tolist())
    plain = write_events(tmp_path / "out", tmp_path / "plain.csv", min_area_km2=2e6)
    assert plain["events"] == {"tropical_cyclone": 0, "atmospheric_river": 2}
    assert pd.read_parquet(tmp_path / "plain.parquet")["min_psl_pa"].isna().all()
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".csv", ".parquet"}  # nothing half-written


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_the_table_does_not_depend_on_how_the_archive_is_cut(tmp_path, monkeypatch, cut):
    masks, when = moving(10), times(10)
    write(tmp_path / "whole" / "all.mask.nc", masks, when)
    for start in range(0, 10, cut):  # names that do not sort by time
        write(tmp_path / "cut" / f"{90 - start}.mask.nc", masks[start : start + cut], when[start : start + cut])
    whole = write_events(tmp_path / "whole", tmp_path / "a")
    monkeypatch.setattr(table_writer, "_GROUP", 3)
    parts = write_events(tmp_path / "cut", tmp_path / "b")
    assert {**parts, "files": []} == {**whole, "files": []}
    a, b = (pd.read_parquet(tmp_path / f"{name}.parquet").drop(columns=["file", "index"]) for name in "ab")
    pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.tracks.csv"), pd.read_csv(tmp_path / "b.tracks.csv"))
    assert pq.ParquetFile(tmp_path / "b.parquet").num_row_groups > 5
    assert whole["tracks"] == {"tropical_cyclone": 2, "atmospheric_river": 1}
    lines = pd.read_csv(tmp_path / "a.tracks.csv")
    assert (lines.groupby("track_id")["time"].nunique() == lines.groupby("track_id").size()).all()
    assert lines["track_id"].is_monotonic_increasing


def test_short_tracks_are_left_out_and_the_others_keep_their_numbers(tmp_path):
    path = write(tmp_path / "a.mask.nc", moving(10), times(10))
    write_events(path, tmp_path / "all")
    result = write_events(path, tmp_path / "long", min_duration_h=24.0)
    every, kept = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("all", "long"))
    assert result["tracks"] == {"tropical_cyclone": 1, "atmospheric_river": 1}
    assert result["objects"]["cyclone"] == 10
    pd.testing.assert_frame_equal(every[every["duration_h"] >= 24.0].reset_index(drop=True), kept)
    assert 0 < len(kept) < len(every)


def test_an_empty_sky_gives_an_empty_table(tmp_path):
    path = write(tmp_path / "a.mask.nc", np.zeros((1, *SMALL.shape), np.uint8), times(1), SMALL)
    assert write_events(path, tmp_path / "none")["events"] == NOTHING
    assert list(pd.read_parquet(tmp_path / "none.parquet").columns) == list(COLUMNS)
    assert pd.read_csv(tmp_path / "none.tracks.csv").empty


def test_maps_of_unknown_time_link_to_nothing(tmp_path):
    path = write(tmp_path / "a.mask.nc", moving(3), [None] * 3)
    table = write_events(path, tmp_path / "t")
    assert table["tracks"]["tropical_cyclone"] == table["objects"]["cyclone"] == 5
    assert pd.read_csv(tmp_path / "t.tracks.csv").empty


def test_two_calendars_are_refused(tmp_path):
    empty = np.zeros((1, *SMALL.shape), np.uint8)
    write(tmp_path / "a.mask.nc", empty, times(1), SMALL)
    write(tmp_path / "b.mask.nc", empty, [cftime.DatetimeGregorian(2001, 2, 1)], SMALL)
    with pytest.raises(BadInput, match=r"one calendar.*noleap.*standard"):
        write_events(tmp_path, tmp_path / "t")


def test_fields_must_be_those_of_the_masks(tmp_path):
    write_climatenet(tmp_path / "in" / "b.nc", quiet(SMALL), SMALL, None, cftime.DatetimeNoLeap(1999, 1, 1))
    path = write(tmp_path / "a.mask.nc", np.ones((1, *SMALL.shape), np.uint8), times(1), SMALL)
    with pytest.raises(BadInput, match=r"a\.nc"):
        write_events(path, tmp_path / "table", tmp_path / "in")
    assert not list(tmp_path.glob("*table*"))


def test_fields_are_found_by_time_where_the_masks_have_other_names(tmp_path):
    when = times(6)
    for step, time in enumerate(when):
        fields = quiet(SMALL)
        fields[INDEX["PSL"]] -= 100.0 * step
        write_climatenet(tmp_path / "in" / f"s{step}.nc", fields, SMALL, None, time)
    masks = np.zeros((6, *SMALL.shape), np.uint8)
    masks[:, 9:12, 4:8] = CYCLONE
    path = write(tmp_path / "monthly.mask.nc", masks, when, SMALL)
    write_events(path, tmp_path / "t", tmp_path / "in")
    lowest = pd.read_parquet(tmp_path / "t.parquet")["min_psl_pa"]
    assert lowest.tolist() == pytest.approx([101200.0 - 100.0 * step for step in range(6)])


def test_a_file_with_transport_only_gives_transport(tmp_path):
    masks = np.zeros((1, *SMALL.shape), np.uint8)
    masks[0, 9:12, 4:8] = RIVER
    path = write(tmp_path / "m.mask.nc", masks, times(1), SMALL)
    with netCDF4.Dataset(str(tmp_path / "m.nc"), "w") as data:
        for name, values in (("lat", SMALL.lat), ("lon", SMALL.lon)):
            data.createDimension(name, values.size)
            data.createVariable(name, "f8", (name,))[:] = values
        for name, value in (("UFLXQV", 300.0), ("VFLXQV", -400.0)):
            variable = data.createVariable(name, "f4", ("lat", "lon"))
            variable.units = "kg m-1 s-1"
            variable[:] = value
    write_events(path, tmp_path / "t", tmp_path / "m.nc")
    row = pd.read_parquet(tmp_path / "t.parquet").iloc[0]
    assert (row["mean_ivt_kg_m_s"], row["max_ivt_kg_m_s"]) == pytest.approx((500.0, 500.0))
    assert np.isnan(row["min_psl_pa"])


def test_real_transport():
    with weather_files.WeatherFile(real_data("merra2_iwv_ivt_2017-02-28T00.nc")) as file:
        maps = file.weather(0)
    assert maps.psl_pa is None
    assert maps.ivt_kg_m_s is not None
    assert 500.0 < float(np.nanmax(maps.ivt_kg_m_s)) < 3000.0


def test_the_command_line_says_how_many(tmp_path, capsys):
    write(tmp_path / "m" / "a.mask.nc", moving(2), times(2))
    assert main(["events", str(tmp_path / "m"), "--out", str(tmp_path / "T.parquet"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["objects"] == {"cyclone": 3, "river": 4}
    assert len(pd.read_parquet(tmp_path / "T.parquet")) == 7
    with pytest.raises(SystemExit):
        main(["events", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*COLUMNS, *TRACK_COLUMNS))
    assert main(["events", str(tmp_path / "m"), "--out", str(tmp_path / "T"), "--min-duration-h", "-1"]) == 2


def test_two_maps_of_one_time_are_refused_unless_they_are_of_other_places(tmp_path):
    masks = moving(2)
    write(tmp_path / "a" / "one.mask.nc", masks, times(2))
    write(tmp_path / "a" / "two.mask.nc", masks[1:], times(2)[1:])
    with pytest.raises(BadInput, match=r"2001-02-01T00:00:00 also in .*one\.mask\.nc"):
        write_events(tmp_path / "a", tmp_path / "table")
    write(tmp_path / "b" / "west.mask.nc", masks[:1, :, :90], times(1), Grid(GRID.lat, GRID.lon[:90]))
    write(tmp_path / "b" / "east.mask.nc", masks[:1, :, 90:], times(1), Grid(GRID.lat, GRID.lon[90:]))
    assert write_events(tmp_path / "b", tmp_path / "table")["snapshots"] == 2

"""How often each class occurs, counted against what was put there; the picture of it."""

from __future__ import annotations

import cftime
import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from raysegment.applications.densities import draw_density, mask_density, table_density
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.climate.channels import CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

GRID = Grid.global_(37, 72)


def silent(done: int, total: int) -> None:
    assert 0 <= done <= total


def write_two_files(folder):
    """Three maps of July, one of January: a river in three, a cyclone over the date line's seam in one, one in the south."""
    masks = np.zeros((4, *GRID.shape), np.uint8)
    masks[:3, 20, 5] = RIVER
    masks[0, 25, [0, 71]] = CYCLONE
    masks[3, 10, 30] = CYCLONE
    times = [cftime.DatetimeNoLeap(2001, 7, day) for day in (1, 2, 3)] + [cftime.DatetimeNoLeap(2004, 1, 1)]
    for name, part in (("a", slice(1)), ("b", slice(1, 4))):
        write_masks(folder / f"{name}.mask.nc", masks[part], Axes.of(GRID), times[part], "test")


def test_masks_are_counted_by_cell_month_year_and_hemisphere(tmp_path):
    write_two_files(tmp_path)
    found = mask_density([tmp_path], silent)
    assert found.maps == 4
    assert found.shown(RIVER)[20, 5] == 75.0
    assert found.shown(CYCLONE)[25, 0] == 25.0
    assert found.months(RIVER) == {"north": {1: 0.0, 7: 1.0}, "south": {1: 0.0, 7: 0.0}}
    assert found.months(CYCLONE) == {"north": {1: 0.0, 7: pytest.approx(1 / 3)}, "south": {1: 1.0, 7: 0.0}}
    assert found.years(CYCLONE)["south"] == {"2001-07": 0.0, "2004-01": 1.0}
    other = Grid.global_(19, 36)
    write_masks(tmp_path / "c.mask.nc", np.zeros((1, *other.shape), np.uint8), Axes.of(other), [None], "test")
    with pytest.raises(BadInput, match="grid of"):
        mask_density([tmp_path], silent)


def test_the_picture_has_counts_only_where_they_are_asked_for(tmp_path):
    write_two_files(tmp_path / "m")
    much = draw_density([tmp_path / "m"], tmp_path / "much.png")
    maps = draw_density([tmp_path / "m"], tmp_path / "maps.png", counts=False, colours="colour-blind")
    assert much["maps"] == maps["maps"] == 4
    assert much["tropical_cyclone"]["months"]["south"][1] == 1.0
    assert "tropical_cyclone" not in maps
    tall, flat = (image.imread(result["picture"]) for result in (much, maps))
    assert tall.shape[1] == flat.shape[1] >= 1600
    assert tall.shape[0] > 1.5 * flat.shape[0]


def test_maps_without_times_have_no_seasons(tmp_path):
    mask = np.zeros((1, *GRID.shape), np.uint8)
    write_masks(tmp_path / "m" / "a.mask.nc", mask, Axes.of(GRID), [None], "test")
    with pytest.raises(BadInput, match="times"):
        draw_density([tmp_path / "m"], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    assert draw_density([tmp_path / "m"], tmp_path / "x.png", counts=False)["maps"] == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"mask files.*none"):
        draw_density([tmp_path / "empty"], tmp_path / "y.png")


def a_table() -> pd.DataFrame:
    """Cyclone 0 lives over New Year and crosses Greenwich; river 0 has the same number; one row has no time."""
    rows = [
        ("tropical_cyclone", "2001-01-01T00:00:00", 11.0, 0.5, 0),
        ("tropical_cyclone", "2000-12-31T18:00:00", 11.0, 359.5, 0),
        ("atmospheric_river", "2001-01-01T00:00:00", -90.0, 180.0, 0),
        ("atmospheric_river", None, 90.0, -180.0, 1),
    ]
    return pd.DataFrame(rows, columns=pd.Index(["class", "time", "lat", "lon", "track"]))


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_table_counts_tracks_in_the_month_in_which_they_begin(tmp_path, ending):
    path = tmp_path / f"events.{ending}"
    (a_table().to_parquet if ending == "parquet" else a_table().to_csv)(path, index=False)
    found = table_density(path, silent)
    assert found.shown(CYCLONE).sum() == 2
    assert found.shown(CYCLONE)[20, 0] == found.shown(CYCLONE)[20, 71] == 1
    assert found.shown(RIVER)[0, 36] == found.shown(RIVER)[35, 36] == 1
    assert found.months(CYCLONE) == {"north": {1: 0.0, 12: 1.0}, "south": {1: 0.0, 12: 0.0}}
    assert found.years(RIVER)["south"] == {"2000-12": 0.0, "2001-01": 1.0}


def test_without_tracks_objects_count_and_bad_tables_are_refused(tmp_path):
    path = tmp_path / "events.csv"
    a_table().drop(columns="track").to_csv(path, index=False)
    assert table_density(path, silent).months(CYCLONE)["north"] == {1: 1.0, 12: 1.0}
    a_table().drop(columns=["lat", "time"]).to_csv(path, index=False)
    with pytest.raises(BadInput, match="no time, lat among class"):
        draw_density([path], tmp_path / "x.png")
    a_table().assign(lat=95.0).to_csv(path, index=False)
    with pytest.raises(BadInput, match="lat from -90 to 90"):
        draw_density([path], tmp_path / "x.png")
    a_table().head(0).to_csv(path, index=False)
    with pytest.raises(BadInput, match="no rows"):
        draw_density([path], tmp_path / "x.png")
    with pytest.raises(BadInput, match="one table"):
        draw_density([path, tmp_path], tmp_path / "x.png")
    with pytest.raises(BadInput, match="a table of events"):
        draw_density([tmp_path / "absent.parquet"], tmp_path / "x.png")

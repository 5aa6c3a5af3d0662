"""Agreement between the several label maps of one file."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import netCDF4
import numpy as np
import pytest

from raysegment.applications.agreement import agreement
from raysegment.applications.intervals import Bootstrap
from raysegment.archive.snapshots import write_climatenet
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.learning.metrics import iou
from tests.weather import quiet

GRID = Grid.global_(19, 36)


def labelled(path: Path, masks: np.ndarray) -> Path:
    """A file of ClimateNet's layout with the label maps (labeller, lat, lon) of several people."""
    write_climatenet(path, quiet(GRID), GRID, None)
    with netCDF4.Dataset(str(path), "a") as data:
        data.createDimension("labeller", len(masks))
        data.createVariable("LABELS", "i8", ("labeller", "lat", "lon"))[:] = masks
    return path


def masks(seed: int, people: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (people, *GRID.shape))


def test_every_pair_of_every_file_counts_once(tmp_path):
    first, second = masks(1, 3), masks(2, 2)
    labelled(tmp_path / "data-1996-06-09-01-1.nc", first)
    labelled(tmp_path / "data-1996-06-10-01-1.nc", second)
    labelled(tmp_path / "data-1996-06-11-01-1.nc", masks(3, 1))
    result = agreement(tmp_path, Bootstrap(50))
    assert result["label_maps"] == {1: 1, 2: 1, 3: 1}
    assert result["snapshots"] == 2
    pairs = [*combinations(first, 2), tuple(second)]
    expected = []
    for kind in range(3):
        both = sum(int(((a == kind) & (b == kind)).sum()) for a, b in pairs)
        either = sum(int(((a == kind) | (b == kind)).sum()) for a, b in pairs)
        expected.append(both / either)
    found = result["agreement"]
    assert [found["iou"][name] for name in ("background", "cyclone", "river")] == pytest.approx(expected)
    differing = sum(int((a != b).sum()) for a, b in pairs) / (len(pairs) * GRID.shape[0] * GRID.shape[1])
    assert found["share_differing"] == pytest.approx(differing)
    assert list(found["pairs"]) == ["0-1", "0-2", "1-2"]
    only = np.zeros((3, 3), int)
    np.add.at(only, (first[0].ravel(), first[2].ravel()), 1)
    assert found["pairs"]["0-2"]["iou"]["river"] == pytest.approx(iou(only)[2])
    assert found["iou_95"]["river"][0] <= found["iou"]["river"] <= found["iou_95"]["river"][1]


def test_files_with_one_label_map_have_no_agreement(tmp_path):
    path = labelled(tmp_path / "data-1996-06-11-01-1.nc", masks(3, 1))
    with pytest.raises(BadInput, match="several label maps"):
        agreement(path)

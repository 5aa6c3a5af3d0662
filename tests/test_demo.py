"""The demo: small, to see that every part hands on to the next; whole (slow), to see what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from raysegment.archive.masks import read_masks
from raysegment.cli import main
from tests.helpers import real_data

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]
SMALL = ["snapshots=8", "held_out=2", "height=24", "width=48", "steps=4", "workers=2",
         'train=["learn.micro_batch=2", "network.tiramisu.first=8", "network.tiramisu.growth=4"]']  # fmt: skip


def demo(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> dict:
    real = ["--map", str(real_data("gfs_2011-10-11T00.nc")), "--tracks", str(real_data("ibtracs_2011-10-11T00.csv"))]
    assert main(["demo", "--out", str(out), *real, "--json", *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_every_part_hands_on_to_the_next_and_a_second_run_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo(capsys, tmp_path, *SMALL)
    assert set(result["iou"]) == {"background", "cyclone", "river", "mean"}
    assert set(result["storms"]) == {"rules", "network"}
    for found in result["storms"].values():
        assert len(found["distances_deg"]) == 4
        assert found["others"] >= 0
    assert result["seconds"] > 0
    assert [Path(picture).read_bytes()[:4] for picture in result["pictures"]] == [b"\x89PNG"] * 2
    for where in result["files"].values():
        assert Path(where).exists(), where
    assert read_masks(tmp_path / "map" / "network" / "gfs_2011-10-11T00.mask.nc").masks.shape == (1, 73, 144)
    assert {"class", "lat", "lon"} <= set(pd.read_csv(tmp_path / "events_rules.csv").columns)
    weights = result["train"]["weights_sha256"]
    again = demo(capsys, tmp_path, *SMALL)
    assert (again["train"]["weights_sha256"], again["iou"]) == (weights, result["iou"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_demo_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On synthetic weather it has not seen, and on a real map although it has seen synthetic weather only."""
    result = demo(capsys, tmp_path)
    assert result["iou"]["mean"] >= 0.75
    assert result["iou"]["cyclone"] >= 0.6
    assert result["iou"]["river"] >= 0.6
    for name, others in (("rules", 2), ("network", 5)):
        irwin, jova = result["storms"][name]["distances_deg"][:2]
        assert max(irwin, jova) <= 3.0
        assert result["storms"][name]["others"] <= others

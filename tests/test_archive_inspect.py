"""`inspect` says what any path holds, as JSON, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cftime
import numpy as np
import pytest
import torch

from raysegment.applications.inspect_ import inspect
from raysegment.archive.axes import Axes
from raysegment.archive.manifest import Manifest
from raysegment.archive.masks import write_masks
from raysegment.archive.shards import TileId, write_shard
from raysegment.climate.channels import CLASSES, INDEX, NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import Facts, write_checkpoint
from raysegment.networks import NetworkConfig
from tests import layouts
from tests.helpers import real_data


def look(path: Path, **options: Any) -> dict[str, Any]:
    """What `inspect` says, through JSON as the command line gives it."""
    held = inspect(path, **options)
    assert json.loads(json.dumps(held, allow_nan=False)) == held
    assert held["path"] == str(path)
    assert held["bytes"] > 0
    return held


def test_source(tmp_path):
    held = look(layouts.era5(tmp_path / "era5.nc"))
    assert (held["kind"], held["layout"], held["snapshots"], held["labels"]) == ("source", "cf", 2, None)
    assert held["times"] == {"first": "1996-06-09T00:00:00", "last": "1996-06-09T01:00:00", "calendar": "proleptic_gregorian"}
    assert held["grid"]["in_file"]["lat"] == [90.0, -90.0]
    assert held["grid"]["south_north"] == [-90.0, 90.0]
    assert list(held["channels"]) == list(NAMES)
    assert held["channels"]["T500"]["from"] == "t[level 2]"
    assert held["channels"]["PSL"]["mean"] == pytest.approx(layouts.weather()[INDEX["PSL"]].mean(), rel=1e-5)


def test_source_with_labels_and_source_with_a_bad_field(tmp_path):
    held = look(layouts.deepcam(tmp_path / "data-1996-06-09-01-1.h5"))
    assert held["labels"]["tropical_cyclone"] == pytest.approx(float((layouts.classes() == 1).mean()))
    path = layouts.climatenet(tmp_path / "x.nc", labels="")
    fields = layouts.weather()
    fields[0] = 500.0
    from_file = path.read_bytes().replace(layouts.weather()[0].tobytes(), fields[0].tobytes())
    path.write_bytes(from_file)
    assert "TMQ" in look(path)["problem"]


def test_a_file_that_is_no_source_says_why(tmp_path):
    held = look(real_data("merra2_iwv_ivt_2017-02-28T00.nc"))
    assert held["kind"] == "netcdf"
    assert set(held["variables"]) == {"IWV", "IVT"}
    assert "U850" in held["problem"]
    (tmp_path / "x.nc").write_text("text")
    for path in (tmp_path / "x.nc", tmp_path / "absent.nc"):
        with pytest.raises(BadInput, match=str(path)):
            inspect(path)


def test_masks_and_folders(tmp_path):
    layouts.cam(tmp_path / "h2.nc")
    layouts.climatenet(tmp_path / "data-1996-06-09-01-1.nc")
    (tmp_path / "broken.nc").write_bytes((tmp_path / "h2.nc").read_bytes()[:9999])
    path = tmp_path / "h2.mask.nc"
    write_masks(
        path, layouts.classes()[None], Axes.of(layouts.GRID), [cftime.datetime(2000, 1, 1, calendar="noleap")], "rules:teca"
    )
    held = look(path)
    assert (held["kind"], held["labeller"], held["times"]["calendar"]) == ("masks", "rules:teca", "noleap")
    assert sum(held["labels"]["area"].values()) == pytest.approx(1.0)
    assert held["labels"]["area"]["tropical_cyclone"] > held["labels"]["cells"]["tropical_cyclone"], (
        "cells near the equator are larger"
    )
    folder = look(tmp_path)
    assert (folder["kind"], folder["sources"], folder["masks"], folder["snapshots_in_opened"]) == ("folder", 3, 1, 10)
    assert list(folder["problems"]) == [str(tmp_path / "broken.nc")]


def test_an_empty_folder_holds_nothing(tmp_path):
    with pytest.raises(BadInput, match="archive files"):
        inspect(tmp_path)


def write_shards(folder: Path) -> Manifest:
    fields, mask = layouts.weather()[:, 1:17, :32], layouts.classes()[1:17, :32]
    part = write_shard(folder / "0.arrow", [(fields, mask, TileId("x.nc", 0, "", 1, 0))])
    manifest = Manifest.of([part], (16, 32), layouts.GRID, "expert")
    manifest.save(folder)
    return manifest


def test_shards(tmp_path):
    manifest = write_shards(tmp_path)
    held = look(tmp_path, check=True)
    assert (held["kind"], held["tiles"], held["tile"], held["labels"], held["checked"]) == ("shards", 1, [16, 32], "expert", True)
    assert held["channels"]["PSL"]["std"] == manifest.std[INDEX["PSL"]]
    assert sum(held["class_shares"].values()) == pytest.approx(1.0)
    content = bytearray((tmp_path / "0.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "0.arrow").write_bytes(content)
    assert look(tmp_path)["tiles"] == 1, "not read without check"
    with pytest.raises(BadInput, match="SHA-256"):
        inspect(tmp_path, check=True)


def checkpoint(folder: Path, step: int) -> Path:
    facts = Facts(step, 4 * step, NetworkConfig(), NAMES, (0.0,) * 16, (1.0,) * 16, (10.0, 10.0), CLASSES, {"labels": "expert"})
    return write_checkpoint(folder, facts, {"a": torch.zeros(2, 3), "b": torch.ones(5)}, {"momentum": torch.zeros(11)})


def test_checkpoint(tmp_path):
    path = checkpoint(tmp_path, 7)
    held = look(path)
    assert (held["kind"], held["step"], held["cursor"], held["problem"]) == ("checkpoint", 7, 28, None)
    assert held["tensors"] == {
        "state.safetensors": {"tensors": 1, "values": 11},
        "weights.safetensors": {"tensors": 2, "values": 11},
    }
    assert held["network"]["name"] == "tiramisu"
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "weights.safetensors").write_bytes(content)
    assert "SHA-256" in look(path)["problem"]


def test_run(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\nnetwork: {name: tiramisu}\n")
    (tmp_path / "steps.jsonl").write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "restart"}\n{"event": "restart"}\n')
    checkpoint(tmp_path / "checkpoints", 1)
    held = look(tmp_path)
    assert (held["kind"], held["complete"], held["summary"]) == ("run", False, None)
    assert held["steps"] == {"logged": 2, "first": {"step": 0, "loss": 1.5}, "last": {"step": 1, "loss": 0.5}}, (
        "half a line is left out"
    )
    assert held["events"] == {"restart": 2, "start": 1}
    assert held["config"]["network"]["name"] == "tiramisu"
    assert held["checkpoints"] == [{"name": "step-00000001", "problem": None}]
    (tmp_path / "summary.json").write_text('{"loss_last": 0.5}')
    assert look(tmp_path)["complete"]
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(BadInput, match=r"summary\.json"):
        inspect(tmp_path)


def test_real_forecast_is_described():
    held = look(real_data("gfs_2011-10-11T00.nc"))
    assert held["times"]["first"] == "2011-10-11T00:00:00"
    assert held["channels"]["PS"]["from"] == "PS"
    assert np.isclose(held["grid"]["spacing_deg"][0], 2.5)

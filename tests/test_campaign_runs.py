"""Campaigns: real searches over real runs; wrong keys are refused before anything starts; a repeat computes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from raysegment import config as configuration
from raysegment.applications.campaign import CampaignConfig, Dimension, recent_loss, run_campaign, smooth
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import Run
from raysegment.elastic.settings import TrainConfig
from tests.helpers import ROOT
from tests.small_training import write_shards

SMALL = {
    "steps": 10,
    "network": {"tiramisu": {"first": 8, "growth": 4, "kernel": 3, "blocks": [1, 1]}},
    "learn": {"global_batch": 4, "micro_batch": 2},
    "feed": {"kind": "direct"},
}


def campaign(out: Path, shards: Path, **changes) -> CampaignConfig:
    mapping = {
        "out": str(out),
        "train": {**SMALL, "shards": str(shards)},
        "search": {"learn.optim.lr": [1e-5, 1e-2]},
        "searcher": "grid",
        "scheduler": "fifo",
    }
    return configuration.load(CampaignConfig, {**mapping, **changes})


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.usefixtures("two_cpus")
def test_two_trials_on_two_cpus_and_again(tmp_path, monkeypatch):
    """With paths relative to where it is started: trials run in directories of their own."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "s")
    settings = campaign(Path("c"), Path("s"))
    result = run_campaign(settings)
    assert (result["trials"], result["finished"]) == (2, 2)
    assert result["best"] == {"learn.optim.lr": 1e-2}
    rows = list(csv.DictReader(Path(result["results"]).read_text().splitlines()))
    assert [float(row["learn.optim.lr"]) for row in rows] == [1e-2, 1e-5]
    assert float(rows[0]["loss"]) < float(rows[1]["loss"])
    best = configuration.load(TrainConfig, configuration.read_yaml(result["best_config"]))
    assert best.learn.optim.lr == 1e-2
    assert best.steps == 10
    assert Path(result["pictures"][0]).stat().st_size > 5000
    assert "| 0.01 | finished | 10 |" in Path(result["report"]).read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "trials").glob("*/steps.jsonl")}
    assert run_campaign(settings) == result
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "trials").glob("*/steps.jsonl")} == before
    with pytest.raises(BadInput, match="other values of trials"):
        run_campaign(campaign(Path("c"), Path("s"), trials=9))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_cpus")
def test_poor_trials_are_stopped_early_and_give_their_cpus_back(tmp_path):
    search, shards = {"learn.optim.lr": {"log": [1e-7, 1e-2]}}, write_shards(tmp_path / "s")
    asha = {"searcher": "optuna", "scheduler": "asha", "trials": 6, "reduction": 2}
    settings = campaign(tmp_path / "c", shards, search=search, train={**SMALL, "shards": str(shards), "steps": 400}, **asha)
    result = run_campaign(settings)
    assert result["trials"] == 6
    assert result["finished"] >= 1
    assert result["stopped"] >= 1
    assert result["failed"] == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_cpus")
def test_trials_of_several_cells_one_after_the_other(tmp_path):
    """Tune drives fleets as it drives single cells; the number of cells is no matter of the result."""
    shards = write_shards(tmp_path / "s")
    kept = {**SMALL, "shards": str(shards), "steps": 30, "cpus_per_worker": 1}
    fleets = {**kept, "elastic": {"cells": [2, 2], "workers_per_cell": 1}}
    results = [
        run_campaign(campaign(tmp_path / name, shards, train=train, at_once=1))
        for name, train in (("single", {**kept, "workers": 1}), ("fleets", fleets))
    ]
    assert [(result["trials"], result["finished"]) for result in results] == [(2, 2), (2, 2)]
    for single in (tmp_path / "single" / "trials").glob("*/summary.json"):
        ours = next((tmp_path / "fleets" / "trials").glob(f"{single.parent.name}/summary.json"))
        assert json.loads(ours.read_text())["state_sha256"] == json.loads(single.read_text())["state_sha256"]


def test_wrong_keys_and_bounds_are_refused_before_anything_starts(tmp_path):
    shards = write_shards(tmp_path / "s")
    with pytest.raises(BadInput, match=r"Did you mean `learn\.optim\.lr`"):
        run_campaign(campaign(tmp_path / "c", shards, search={"learn.optim.lrr": [1, 2]}))
    with pytest.raises(BadInput, match="micro_batch"):
        run_campaign(campaign(tmp_path / "c", shards, search={"learn.global_batch": [4, 5]}))
    with pytest.raises(BadInput, match="lower"):
        campaign(tmp_path / "c", shards, search={"learn.optim.lr": {"log": [1, 0.1]}}, searcher="random").dimensions  # noqa: B018
    with pytest.raises(BadInput, match="manifest"):
        run_campaign(campaign(tmp_path / "c", tmp_path))
    for wrong in ({"searcher": "guess"}, {"scheduler": "x"}, {"trials": 0}, {"search": {}}, {"grace": 0.0}):
        with pytest.raises(BadInput, match="expected"):
            campaign(tmp_path / "c", shards, **wrong)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("spec", [{"log": [0, 1]}, {"uniform": [1]}, {"guess": [1, 2]}, 3, {"choice": []}, {"log": ["a", "b"]}])
def test_dimensions_that_mean_nothing_are_refused(spec):
    with pytest.raises(BadInput, match=r"search\.learn\.seed"):
        Dimension.parse("learn.seed", spec)


def test_dimensions_read_numbers_as_yaml_writes_them():
    assert Dimension.parse("a", yaml.safe_load("log: [1e-4, 1e-1]")).values == (1e-4, 1e-1)
    assert Dimension.parse("a", [True, "x", 2]) == Dimension("a", "choice", (True, "x", 2))


def test_a_trial_is_its_values_and_nothing_else(tmp_path):
    settings = campaign(tmp_path / "c", tmp_path / "s")
    one, two = settings.trial({"learn.optim.lr": 1e-3}), settings.trial({"learn.optim.lr": 2e-3})
    assert one == settings.trial({"learn.optim.lr": 1e-3})
    assert one.learn.optim.lr == 1e-3
    assert one.out != two.out


def test_the_score_is_the_loss_of_the_last_tenth(tmp_path):
    run = Run(tmp_path)
    assert recent_loss(run) == float("inf")
    run.steps.write_text("".join(f'{{"step": {k}, "loss": {k}}}\n' for k in range(20)))
    assert recent_loss(run) == 18.5
    with run.steps.open("a") as file:
        file.write('{"step": 20, "loss": null}\n')
    assert recent_loss(run) == float("inf")
    assert smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "tune").glob("*.yaml") if "search:" in p.read_text()), ids=lambda path: path.stem
)
def test_shipped_campaigns_can_be_read(path):
    settings = configuration.load(CampaignConfig, configuration.read_yaml(path), path)
    assert all(settings.trial(point).steps for point in settings.corners())

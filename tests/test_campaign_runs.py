"""Campaigns over real runs: all trials finish on two CPUs, nothing is computed twice, weights pass from trial to trial."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from raysegment import config as configuration
from raysegment.applications.campaign.engine import run_campaign
from raysegment.applications.campaign.journal import Journal
from raysegment.applications.campaign.population import Bridge, segment_run, segments, take_segment
from raysegment.applications.campaign.space import Trials
from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import Facts, read_checkpoint, write_checkpoint
from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.safe import check_same, state_sha256
from raysegment.elastic.settings import TrainConfig, plain
from raysegment.elastic.worker import make_learner
from raysegment.learning.state import capture
from tests.campaigns import SMALL, campaign, campaign_mapping
from tests.helpers import ROOT
from tests.small_training import write_shards

KEYS = ["trials", "finished", "stopped_early", "failed", "resumed", "best", "samples_total", "seconds"]


@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.usefixtures("two_cpus")
def test_two_trials_on_two_cpus_and_again(tmp_path, monkeypatch):
    """With paths relative to where it is started: trials run in directories of their own."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "s")
    settings = campaign(Path("c"), Path("s"))
    result = run_campaign(settings)
    assert list(result)[: len(KEYS)] == KEYS
    assert (result["trials"], result["finished"], result["stopped_early"], result["failed"], result["resumed"]) == (2, 2, 0, 0, 0)
    assert result["best"] == {"config": {"learn.optim.lr": 1e-2}, "iou": None}
    assert result["samples_total"] == 2 * 10 * 4
    rows = list(csv.DictReader(Path(result["results"]).read_text().splitlines()))
    assert [float(row["learn.optim.lr"]) for row in rows] == [1e-2, 1e-5]
    assert float(rows[0]["loss"]) < float(rows[1]["loss"])
    assert read_checkpoint(tmp_path / "c" / rows[0]["checkpoint"]).facts.step == 10
    assert not Path(rows[0]["checkpoint"]).is_absolute()
    assert pq.read_table(result["parquet"]).column("learn.optim.lr").to_pylist() == [1e-2, 1e-5]
    best = configuration.load(TrainConfig, configuration.read_yaml(result["best_config"]))
    assert (best.learn.optim.lr, best.steps) == (1e-2, 10)
    assert all(Path(picture).stat().st_size > 5000 for picture in result["pictures"])
    assert "| 0.01 | finished | 10 |" in Path(result["report"]).read_text()
    assert read_checkpoint(result["checkpoint"]).facts.step == 10
    assert len(list((tmp_path / "c" / "trials").glob("*/summary.json"))) == 2
    assert list((tmp_path / "c" / "tensorboard").glob("search-00*/events*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "trials").glob("*/steps.jsonl")}
    assert run_campaign(settings) == result
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "trials").glob("*/steps.jsonl")} == before
    with pytest.raises(BadInput, match=r"trials .8 there, 9 now"):
        run_campaign(campaign(Path("c"), Path("s"), trials=9))
    with pytest.raises(BadInput, match=r"2 workers of 1 CPU fit\), got 4 workers"):
        run_campaign(campaign(Path("d"), Path("s"), train={**SMALL, "shards": "s", "workers": 4}))


def test_a_segment_begins_with_the_donors_state_and_own_values(tmp_path):
    """What an exploit does, without Ray: the same tensors, a perturbed configuration that training accepts."""
    shards = write_shards(tmp_path / "s")
    space = {"search": {"learn.optim.lr": {"log": [1e-4, 1.0]}}, "searcher": "random", "scheduler": "pbt", "interval": 0.5}
    trials = Trials(campaign(tmp_path / "c", shards, **space), Manifest.load(shards))
    donor = segment_run(trials, "a", take_segment(trials, "a", {"learn.optim.lr": 1e-3}, None))
    checkpoint = file_state(donor, step=5)
    Run(donor.out).steps.write_text("".join(f'{{"step": {k}, "loss": 1.0}}\n' for k in range(7)))
    first = take_segment(trials, "b", {"learn.optim.lr": 0.5}, None)
    bridge = Bridge("a", 1, str(checkpoint))
    half_made = Path(segment_run(trials, "b", replace(first, number=1)).out)
    (half_made / "checkpoints").mkdir(parents=True)
    (half_made / "steps.jsonl").write_text("of a command that was killed")
    new = take_segment(trials, "b", {"learn.optim.lr": 1.2e-3}, bridge)
    assert (first.number, new.number, new.donor, new.step, new.k) == (0, 1, "a", 5, 1)
    assert take_segment(trials, "b", {"learn.optim.lr": 1.2e-3}, bridge) == new
    assert take_segment(trials, "b", {"learn.optim.lr": 1.2e-3}, Bridge("b", 2, "")) == new
    run = segment_run(trials, "b", new)
    taken, given = read_checkpoint(run.checkpoint_place), read_checkpoint(checkpoint)
    assert state_sha256(taken.weights, taken.state) == state_sha256(given.weights, given.state)
    assert all(torch.equal(taken.weights[name], given.weights[name]) for name in given.weights)
    assert (run.learn.optim.lr, donor.learn.optim.lr) == (1.2e-3, 1e-3)
    check_same(taken.facts, run, run.checkpoint_place)
    with pytest.raises(BadInput, match=r"learn\.optim\.lr"):
        check_same(given.facts, run, checkpoint)
    assert [line["step"] for line in read_lines(Run(run.out).steps)[0]] == [0, 1, 2, 3, 4]


def file_state(run: TrainConfig, step: int) -> Any:
    """A checkpoint of a fresh learner, as of `step`."""
    manifest = Manifest.load(run.shards)
    state = capture(make_learner(run, manifest, "cpu"))
    facts = {**state.facts, "step": step}
    provenance = {"config": plain(run), "manifest_sha256": set_id(manifest_bytes(run.shards))}
    about = Facts(
        step=step, cursor=step * 4, network=run.network, channels=run.channel_names, mean=tuple(manifest.mean),
        std=tuple(max(std, 1e-30) for std in manifest.std), spacing_deg=manifest.spacing_deg, classes=manifest.classes,
        provenance=provenance, training=facts,
    )  # fmt: skip
    return write_checkpoint(run.checkpoint_place, about, state.weights, state.tensors)


# ---------------------------------------------------------------- slow: schedulers


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("two_cpus")
def test_poor_trials_are_stopped_early_and_give_their_cpus_back(tmp_path):
    search, shards = {"learn.optim.lr": {"log": [1e-7, 1e-2]}}, write_shards(tmp_path / "s")
    train = {**SMALL, "shards": str(shards), "steps": 200, "validation": {"shards": str(write_shards(tmp_path / "v", 3, 20))}}
    asha = {"searcher": "optuna", "scheduler": "asha", "trials": 6, "reduction": 2, "metric": "mean_iou"}
    settings = campaign(tmp_path / "c", shards, search=search, train=train, confirm_seeds=1, exhaustive=True, **asha)
    result = run_campaign(settings)
    assert result["trials"] == 6 == result["finished"] + result["stopped_early"]
    assert result["stopped_early"] >= 1
    assert 0 < result["exhaustive"]["samples_share"] < 1
    assert 0 < result["best"]["iou"] <= 1
    text = Path(result["report"]).read_text()
    assert "over 2 seeds" in text
    assert "of the exhaustive search's" in text


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_cpus")
def test_a_trial_below_the_median_of_those_before_it_is_stopped(tmp_path):
    """One at a time; the rule needs three others before it judges, so the fourth, which hardly learns, is the first that it can
    stop. A fifth is added by a second command, whose rule knows the four from the journal alone."""
    shards, rates = write_shards(tmp_path / "s"), [1e-2, 5e-3, 2e-3, 1e-7]
    train = {**SMALL, "shards": str(shards), "steps": 60}
    settings = campaign(
        tmp_path / "c", shards, train=train, scheduler="median", at_once=1, grace=0.2, search={"learn.optim.lr": rates}
    )
    result = run_campaign(settings)
    assert (result["trials"], result["finished"], result["stopped_early"]) == (4, 3, 1)
    again = run_campaign(replace(settings, search={"learn.optim.lr": [*rates, 1e-8]}), extend=True)
    assert (again["trials"], again["finished"], again["stopped_early"]) == (5, 3, 2)
    with (tmp_path / "c" / "results.csv").open() as file:
        stopped = [row["learn.optim.lr"] for row in csv.DictReader(file) if row["status"] == "stopped"]
    assert sorted(map(float, stopped)) == [1e-8, 1e-7]


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


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("two_cpus")
def test_a_paused_trial_goes_on_from_its_own_state(tmp_path):
    """HyperBand pauses at a rung until the others of its bracket are there: no step of a promoted trial is done again.

    Its first bracket are two trials that train to the end at once, its second three, one of which does.
    """
    shards = write_shards(tmp_path / "s")
    space = {"searcher": "random", "search": {"learn.optim.lr": {"log": [1e-6, 1e-2]}}, "scheduler": "hyperband"}
    train = {**SMALL, "shards": str(shards), "steps": 60}
    settings = campaign(tmp_path / "c", shards, train=train, trials=5, grace=1 / 3, **space)
    result = run_campaign(settings)
    assert result["trials"] == 5 == result["finished"] + result["stopped_early"]
    assert result["stopped_early"] >= 1
    paused = [folder for folder in (tmp_path / "c" / "trials").iterdir() if len(lives(folder)) > 1]
    assert paused, "no trial was paused"
    for folder in paused:
        steps = [line["step"] for line in read_lines(folder / "steps.jsonl")[0]]
        assert steps == list(range(len(steps)))
        assert all(begun > 0 for begun in lives(folder)[1:])


def lives(folder: Path) -> list[int]:
    """The steps at which a run's generations began, one for each of its lives."""
    return [event["step"] for event in Run(folder).read_events() if event["event"] == "ready"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("two_cpus")
def test_a_population_exchanges_weights(tmp_path):
    """The worse of two takes the other's file in mid-run: its segment begins with those weights and other values.

    Trials are long beside the seconds by which they start one after the other, whatever the machine: all are there together. Of a
    list, a perturbed value might be the one that the trial had.
    """
    shards = write_shards(tmp_path / "s")
    train = {**SMALL, "shards": str(shards), "steps": 300, "cpus_per_worker": 0.5}
    space = {"searcher": "random", "trials": 3, "search": {"learn.optim.lr": {"log": [1e-6, 1e-2]}}, "scheduler": "pbt"}
    settings = campaign(tmp_path / "c", shards, train=train, at_once=3, interval=0.2, quantile=0.34, **space)
    result = run_campaign(settings)
    assert (result["trials"], result["finished"]) == (3, 3)
    assert_exchanged(tmp_path / "c")


def assert_exchanged(out: Path) -> None:
    """Every segment after a trial's first begins with its donor's weights at that step, and has other values."""
    followed = 0
    for folder in (out / "trials").iterdir():
        own = segments(folder)
        for before, segment in itertools.pairwise(own):
            place = folder / f"segment-{segment.number:02d}"
            given = read_checkpoint(segment.checkpoint)
            taken = read_checkpoint(place / f"checkpoints/step-{segment.step:08d}")
            assert state_sha256(given.weights, given.state) == state_sha256(taken.weights, taken.state)
            assert segment.point != before.point
            assert segment.donor != folder.name
            assert lives(place)[0] == segment.step
            followed += 1
    assert followed, "no weights were exchanged"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_cpus")
def test_a_trial_that_diverges_ends_with_its_reason_and_one_whose_worker_dies_goes_on(tmp_path):
    shards = write_shards(tmp_path / "s")
    train = {**SMALL, "shards": str(shards), "steps": 40, "chaos": "kill@step=12,member=0", "checkpoint": {"every_steps": 5}}
    search = {"learn.optim.lr": [1e-3, 1e12], "learn.optim.optimizer": ["sgd"]}
    result = run_campaign(campaign(tmp_path / "c", shards, train=train, search=search))
    assert (result["trials"], result["finished"], result["failed"]) == (2, 1, 1)
    assert "diverged: the loss" in Path(result["report"]).read_text()
    finished = next((tmp_path / "c" / "trials").glob("*/summary.json")).parent
    assert [event for event in Run(finished).read_events() if event["event"] == "fault"], "the worker was not killed"
    assert len(lives(finished)) > 1


# ---------------------------------------------------------------- slow: killed at any time

KILLS = int(os.environ.get("RAYSEGMENT_KILLS", "20"))
RATES = [1e-5, 1e-4, 1e-3, 3e-3, 1e-2]
ASHA = {"scheduler": "asha", "grace": 0.2, "reduction": 2, "at_once": 1, "search": {"learn.optim.lr": RATES}}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(7200)
def test_a_campaign_killed_at_twenty_points_gives_what_an_undisturbed_one_does(tmp_path):
    """SIGKILL of the command whenever random numbers of new lines are in journal and step logs; the same command again."""
    where = Path(os.environ.get("RAYSEGMENT_KILL_DIR", tmp_path))
    shards = where / "s"
    if not shards.exists():
        write_shards(shards)
    chance, kills = random.Random(2018), 0
    command = start(where, shards, "killed")
    while kills < KILLS and command.returncode != 0:
        if wait_for_lines(command, where / "killed", chance.choice((0, 1, 2, 4, 8, 12))):
            command.send_signal(signal.SIGKILL)
            command.wait()
            kills += 1
            print("killed", kills, counts(where / "killed"), flush=True)
        command = start(where, shards, "killed") if command.returncode else command
    finish(command, where, shards, "killed")
    finish(start(where, shards, "whole"), where, shards, "whole")
    ours, theirs = (json.loads((where / f"{name}.json").read_text()) for name in ("killed", "whole"))
    print("kills", kills, {key: (ours[key], theirs[key]) for key in KEYS}, flush=True)
    assert kills == KILLS, "the campaign was over before"
    assert ours["best"] == theirs["best"]
    assert endings(where / "killed") == endings(where / "whole")
    for log in (where / "killed").glob("trials/*/steps.jsonl"):
        steps = [line["step"] for line in read_lines(log)[0]]
        assert steps == list(range(len(steps)))
    assert ours["resumed"] > 0
    assert theirs["resumed"] == 0
    assert not finished_again(where / "killed")
    finished = [status for status, _ in endings(where / "killed")].count("finished")
    assert len(list((where / "killed").glob("trials/*/summary.json"))) == finished


def finish(command: subprocess.Popen[bytes], where: Path, shards: Path, name: str) -> None:
    """Until the command has ended well; a Ray that does not start on a crowded machine is the command's once more."""
    for _ in range(10):
        if command.wait() == 0:
            return
        command = start(where, shards, name)
    raise AssertionError((where / f"{name}.log").read_text()[-3000:])


def start(where: Path, shards: Path, name: str) -> subprocess.Popen[bytes]:
    """The campaign as a command of its own, whose result goes to NAME.json."""
    path = where / f"{name}.yaml"
    train = {**SMALL, "shards": str(shards), "steps": 20}
    path.write_text(yaml.safe_dump(campaign_mapping(where / name, shards, train=train, **ASHA)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (where / f"{name}.json").open("wb") as out, (where / f"{name}.log").open("ab") as log:
        words = [sys.executable, "-m", "raysegment", "tune", str(path), "--json"]
        return subprocess.Popen(words, stdout=out, stderr=log, env=environment)


def lines(out: Path) -> int:
    """Lines in journal and step logs."""
    paths = (out / "journal.jsonl", *out.glob("trials/*/steps.jsonl"))
    return sum(len(path.read_bytes().splitlines()) for path in paths if path.exists())


def wait_for_lines(command: subprocess.Popen[bytes], out: Path, more: int) -> bool:
    """Until the command has added more than so many lines; False when it ended before."""
    known = lines(out)
    while command.poll() is None:
        if lines(out) > known + more:
            return True
        time.sleep(0.02)
    return False


def counts(out: Path) -> dict[str, int]:
    journal = Journal(out / "journal.jsonl")
    records = journal.of("search")
    journal.close()
    return {"sessions": journal.session, "begun": len(records), "ended": sum(bool(r.status) for r in records),
            "resumed": sum(r.resumed for r in records)}  # fmt: skip


def endings(out: Path) -> list[tuple[str, int]]:
    """How each trial ended, after how many readings."""
    return [(record.status, record.told) for record in Journal(out / "journal.jsonl").of("search")]


def finished_again(out: Path) -> list[str]:
    """Trials that were given to Tune after they had ended."""
    ended, again = set(), []
    for line in read_lines(out / "journal.jsonl")[0]:
        if line["event"] == "ended":
            ended.add(line["trial"])
        elif line["event"] == "added" and line["trial"] in ended:
            again.append(line["trial"])
    return again


"""Failure figures from runs' records: a written history whose figures are known, and the record of a real run with a death."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysegment.applications.scaling import recorded
from raysegment.applications.scaling.goodput import Faults
from raysegment.applications.scaling.recorded import History
from raysegment.cli import BAD_INPUT, main
from raysegment.elastic.runs import read_lines
from raysegment.elastic.settings import ElasticConfig
from raysegment.elastic.train import train
from raysegment.feed.stream import FeedConfig
from tests.small_training import config, write_shards
from tests.training_members import TrainingFleet

STEP_S, STALL_S = 2.0, 0.05


def generation(number: int, time: float, members: list[str], joined: list[str], repeated: int = 0) -> dict[str, Any]:
    return {"event": "generation", "generation": number, "time": time, "members": members, "joined": joined, "repeated": repeated}


def lost(time: float, member: str) -> dict[str, Any]:
    return {"event": "lost", "time": time, "member": member, "rank": 0}


def steps(number: int, first: int, begin: float, count: int, world: int) -> list[dict[str, Any]]:
    """`count` steps of a generation, the first certain at `begin`, every second one with a copy of the state."""
    return [{"step": first + i, "generation": number, "time": begin + i * STEP_S, "step_s": STEP_S, "world": world,
             "checkpoint_s": STALL_S * (i % 2)} for i in range(count)]  # fmt: skip


def history(injected: bool = False) -> History:
    """Three members; one is lost after 10 steps (3 s more than a step and a half), back 30 s later (1 s more than a step);
    then all are lost, and come back 40 s (and a step) later. Two cells: "0" and "1"."""
    events: list[dict[str, Any]] = [{"event": "start", "time": 0.0}, generation(1, 1.0, ["0.0-a", "0.1-b", "1.0-c"], [])]
    first = steps(1, 0, 10.0, 10, 3)
    at = first[-1]["time"] + 1.0
    events += [lost(at, "1.0-c"), generation(2, at + 1, ["0.0-a", "0.1-b"], [])]
    second = steps(2, 10, first[-1]["time"] + 1.5 * STEP_S + 3.0, 10, 2)
    events += [generation(3, at + 30.0, ["0.0-a", "0.1-b", "1.0-d"], ["1.0-d"])]
    third = steps(3, 20, second[-1]["time"] + STEP_S + 1.0, 10, 3)
    gone = third[-1]["time"] + 0.5
    new = ["0.0-e", "0.1-f", "1.0-g"]
    events += [*(lost(gone, uid) for uid in ("0.0-a", "0.1-b", "1.0-d")), generation(4, gone + 30.0, new, new, 1)]
    fourth = steps(4, 30, third[-1]["time"] + STEP_S + 40.0, 10, 3)
    if injected:
        events.append({"event": "fault", "time": at, "fault": "kill"})
    return History(events, [*first, *second, *third, *fourth])


def test_the_figures_of_a_written_history_are_found() -> None:
    found = recorded.read([history()])
    assert found.values["detection_s"] == pytest.approx(3.0)
    assert found.values["redone_steps"] == recorded.HALF
    assert found.values["joining_s"] == pytest.approx(1.0)
    assert found.values["all_back_s"] == pytest.approx(40.0)
    assert found.values["checkpoint_s"] == pytest.approx(STALL_S)
    assert found.values["capture_share"] == pytest.approx(STALL_S / 2 / STEP_S)
    hours = (30 * 3 + 10 * 2) * STEP_S / 3600
    assert found.values["per_gpu_hour"] == pytest.approx(3 / (1 / Faults().per_gpu_hour + hours))
    assert "all_share" not in found.values  # of two failures
    assert found.source("all_share") == found.source("wait_s") == "default"
    assert found.source("joining_s") == found.source("back_s") == "run: mean of 1"
    assert found.source("joining_s", ["joining_s"]) == "given"


def test_members_are_back_when_somebody_of_their_cell_is() -> None:
    found = recorded.read([history()])
    assert found.values["back_s"] == pytest.approx(30.0)  # where all are lost there is nobody to wait for them


def test_failures_on_purpose_say_nothing_of_how_often_there_are_any() -> None:
    found = recorded.read([history(injected=True)])
    assert "per_gpu_hour" not in found.values
    assert "detection_s" in found.values


def test_a_command_that_was_started_again_is_no_failure() -> None:
    whole = history()
    gap = next(event["time"] for event in whole.events if event["event"] == "generation" and event["generation"] == 4)
    again = History([*whole.events, {"event": "start", "time": gap - 1.0}], whole.steps)
    assert "all_back_s" not in recorded.read([again]).values


def test_several_runs_are_taken_together_and_a_run_without_failures_leaves_the_defaults() -> None:
    quiet = History([{"event": "start", "time": 0.0}, generation(1, 1.0, ["0.0-a"], [])], steps(1, 0, 10.0, 10, 1))
    alone = recorded.read([quiet])
    assert set(alone.values) == {"per_gpu_hour", "capture_share", "checkpoint_s"}
    assert alone.values["per_gpu_hour"] < Faults().per_gpu_hour
    both = recorded.read([history(), quiet])
    assert both.values["detection_s"] == recorded.read([history()]).values["detection_s"]
    assert both.values["per_gpu_hour"] < recorded.read([history()]).values["per_gpu_hour"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("scale", "plan", "--system", "summit_deeplab", "--gpus", "64", "--epochs", "2", "--run", str(tmp_path))
    assert main([*words]) == BAD_INPUT
    assert "the folder of a training run" in capsys.readouterr().err


def write(found: History, folder: Path) -> None:
    for name, lines in (("events", sorted(found.events, key=lambda event: event["time"])), ("steps", found.steps)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_plan_takes_figures_from_a_run_unless_they_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(history(), tmp_path)
    asked = ("scale", "plan", "--system", "summit_deeplab", "--gpus", "27360", "--epochs", "2", "--json")
    told = []
    for more in ((), ("--run", str(tmp_path)), ("--run", str(tmp_path), "all_back_s=5", "--checkpoint-s", "1.5")):
        assert main([*asked, *more]) == 0
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    usual, run, given = told
    assert usual["figures"]["detection_s"] == {"value": Faults().detection_s, "source": "default"}
    assert run["figures"]["all_back_s"]["source"].startswith("run: mean of")
    assert run["figures"]["all_back_s"]["value"] == pytest.approx(40.0)
    assert run["figures"]["wait_s"]["source"] == "default"
    assert run["checkpoint_s"] == pytest.approx(STALL_S)
    assert run["goodput"] < usual["goodput"]
    assert given["figures"]["all_back_s"] == {"value": 5.0, "source": "given"}
    assert given["checkpoint_s"] == 1.5
    assert given["figures"]["checkpoint_s"]["source"] == "given"


@pytest.mark.slow
def test_the_record_of_members_that_die_and_come(tmp_path: Path) -> None:
    """Real members and their roster, without Ray: one of three is killed, later one joins."""
    shards = write_shards(tmp_path / "shards")
    changes = dict(elastic=ElasticConfig((1, 3), 1, patience_s=1.0), feed=FeedConfig(kind="direct"), steps=40)
    fleet = TrainingFleet(config(shards, tmp_path / "run", **changes))
    try:
        fleet.add(3)
        fleet.wait(lambda: any(len(event["members"]) == 3 for event in fleet.events("generation")))
        fleet.wait(lambda: fleet.steps() >= 4)
        fleet.kill(fleet.living[1])
        fleet.wait(lambda: read_lines(fleet.run.steps)[0][-1]["generation"] == fleet.events("generation")[-1]["generation"] > 1)
        fleet.add(1)
        fleet.wait()
    finally:
        fleet.end()
    found = recorded.read([History(fleet.run.read_events(), read_lines(fleet.run.steps)[0])])
    assert {"detection_s", "redone_steps", "capture_share", "checkpoint_s", "per_gpu_hour"} <= set(found.values)
    assert all(0 <= value < 60 for value in found.values.values())
    assert found.source("per_gpu_hour").startswith("run: 1 failures")  # nobody told the run that it was on purpose


@pytest.mark.slow
@pytest.mark.ray
def test_the_record_of_a_real_run_with_a_death(two_cpus: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One cell of two workers: when one of them dies both end, and Ray Train starts them again."""
    shards = write_shards(tmp_path / "shards")
    summary = train(config(shards, tmp_path / "run", workers=2, chaos="kill@step=6,member=1"))
    assert summary["faults_injected"] == 1
    assert not summary["faults_not_fired"]
    words = ("--system", "summit_deeplab", "--gpus", "1024", "--epochs", "2", "--run", str(tmp_path / "run"), "--json")
    assert main(["scale", "plan", *words]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    told = {name for name, one in figures.items() if one["source"].startswith("run")}
    assert {"all_back_s", "capture_share", "checkpoint_s"} <= told
    assert figures["per_gpu_hour"]["source"] == "default"  # it was killed on purpose
    assert figures["all_back_s"]["value"] > 0

"""`chaos`: strikes are chosen and told rightly (written histories); the slow tests strike real runs."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from raysegment import config as configurations
from raysegment.applications.chaos import ChaosConfig, Kinds, chaos, lines
from raysegment.applications.fake_cluster import FakeNode
from raysegment.applications.strikes import KINDS, Job, Scene, Strike, Striker, mixture, sequence
from raysegment.applications.strikes_account import account, effect, spread
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import Run
from raysegment.elastic.settings import TrainConfig
from tests.helpers import ROOT
from tests.small_training import write_shards

KILL = Strike("kill", 0, 100.05, 9, 3, ("1.0-aa",), (1,), True)


def step(number: int, time: float, generation: int) -> dict[str, Any]:
    return {"step": number, "time": time, "generation": generation}


def formed(time: float, generation: int, joined: list[str], repeated: int = 0) -> dict[str, Any]:
    return {"event": "generation", "time": time, "generation": generation, "joined": joined, "repeated": repeated}


STEPS = [
    *(step(number, 99.0 + number / 10, 3) for number in range(11)),  # the last at 100.0, before the strike
    step(11, 100.1, 3),  # a step that was certain before anybody had noticed is no recovery
    *(step(12 + number, 100.4 + number / 10, 4) for number in range(10)),
    *(step(22 + number, 101.7 + number / 10, 5) for number in range(5)),  # 0.4 s after the one before, 0.3 more than usual
    *(step(27 + number, 103.0 + number / 10, 6) for number in range(5)),
]
EVENTS = [
    formed(99.0, 3, ["1.0-aa"]),
    {"event": "lost", "time": 100.1, "member": "1.0-aa"},
    formed(100.3, 4, [], repeated=2),
    formed(101.6, 5, ["0.0-bb"], repeated=7),
    formed(102.9, 6, ["1.0-cc"]),
]


def test_what_a_strike_did_is_read_from_steps_and_generations() -> None:
    found = effect(KILL, STEPS, EVENTS)
    assert found.recovery_s == pytest.approx(0.35), "the first step of a newer generation"
    assert found.join_s == pytest.approx(2.95), "somebody of cell 1, not of cell 0"
    assert found.lost == 2, "what was repeated before the recovery, not after it"


def test_the_cost_of_joining_is_what_the_step_took_longer_than_usual() -> None:
    found = effect(replace(KILL, cells=(0,)), STEPS, EVENTS)
    assert found.join_s == pytest.approx(1.65)
    assert found.join_cost_s == pytest.approx(0.3)


def test_a_node_joins_after_it_is_back_and_never_where_it_was_not() -> None:
    assert effect(replace(KILL, kind="node", back=102.0), STEPS, EVENTS).join_s == pytest.approx(1.0)
    assert effect(replace(KILL, kind="node"), STEPS, EVENTS).join_s is None


def test_gentle_faults_recover_with_the_next_step_and_nobody_joins() -> None:
    found = effect(replace(KILL, kind="roster"), STEPS, EVENTS)
    assert found.recovery_s == pytest.approx(0.05)
    assert found.join_s is None


def test_what_the_end_of_a_run_hid_is_none() -> None:
    found = effect(replace(KILL, time=104.0, generation=6), STEPS, EVENTS)
    assert (found.recovery_s, found.join_s, found.join_cost_s, found.lost) == (None, None, None, 0)
    assert spread([None]) == {"p50": None, "p95": None, "max": None}


def test_the_account_keeps_kinds_apart() -> None:
    effects = [effect(replace(KILL, kind=kind), STEPS, EVENTS) for kind in ("kill", "kill", "stop")]
    found = account(effects)
    assert found["recovery_s"]["p50"] == pytest.approx(0.35)
    assert found["steps_lost_max"] == 2
    assert {kind: one["faults"] for kind, one in found["kinds"].items()} == {"kill": 2, "stop": 1}


def test_the_same_seed_gives_the_same_order_and_other_seeds_others() -> None:
    counts = {"kill": 30, "node": 10}
    assert sequence(counts, 1) == sequence(counts, 1) != sequence(counts, 2)
    assert sorted(sequence(counts, 1)) == sorted(sequence(counts, 2)) == ["kill"] * 30 + ["node"] * 10
    assert {*islice(mixture(0, 3), 2000)} == {*KINDS}
    assert "driver" not in {*islice(mixture(0, 1), 2000)}


def test_counted_strikes_end_and_mixtures_end_with_their_time() -> None:
    counted = Kinds(ChaosConfig({"kill": 2}), 3, 0.0)
    assert counted.due()
    assert [counted.take(), counted.take()] == ["kill", "kill"]
    assert not counted
    assert not Kinds(ChaosConfig(minutes=1e-6), 3, 0.0), "the time is long over"


@pytest.mark.parametrize(
    "settings", [{}, {"counts": {"kill": 1}, "minutes": 1}, {"counts": {"flood": 1}}, {"counts": {"kill": -1}}, {"minutes": -1}]
)
def test_bad_wishes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ChaosConfig(**settings)


def test_a_folder_with_files_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").touch()
    with pytest.raises(BadInput, match="new or empty"):
        chaos(job(tmp_path), ChaosConfig({"kill": 1}), tmp_path / "out")


def test_the_scene_follows_the_files(tmp_path: Path) -> None:
    run, scene = Run(tmp_path), Scene(Run(tmp_path))
    assert not scene.look().going
    assert scene.living == []
    run.event("roster", pid=7)
    run.event("cell", cell=1, node="n", what="driven", pid=8)
    run.event("generation", generation=4, members=["1.0-aa"], node=["n"], cell=[1], pid=[2**22 + 1])
    run.steps.write_text('{"step": 5, "generation": 4}\n')
    assert scene.look().going
    assert (scene.roster, scene.drivers, scene.step) == (7, {1: 8}, 5)
    assert [member.uid for member in scene.members] == ["1.0-aa"]
    assert scene.living == [], "that process does not exist"
    run.event("broken", generation=4)
    assert not scene.look().going


def test_the_end_of_a_node_is_announced_once(tmp_path: Path) -> None:
    run, announced = Run(tmp_path), []
    node = FakeNode("n", 2**22 + 1, None)
    cluster: Any = SimpleNamespace(nodes=[node], announce_end=announced.append)
    run.event("generation", generation=4, members=["1.0-aa"], node=["n"], cell=[1], pid=[os.getpid()])
    striker = Striker(cluster, cast(Job, SimpleNamespace(run=run)), 0, random.Random(0))
    assert striker.strike("drain").fired
    assert not striker.possible("drain")
    assert not striker.strike("drain").fired
    assert announced == [node]


def job(folder: Path, **changes: Any) -> TrainConfig:
    """The small job of tests/chaos.yaml on still smaller tiles."""
    mapping = configurations.read_yaml(ROOT / "tests" / "chaos.yaml")
    return configurations.load(TrainConfig, mapping | {"shards": str(write_shards(folder / "shards"))} | changes)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_few_strikes_change_nothing(tmp_path: Path) -> None:
    report = chaos(job(tmp_path, steps=300), ChaosConfig({"kill": 1, "node": 1, "stop": 1}, vanilla=False), tmp_path / "out")
    assert report["kept"]
    assert report["faults"] == report["fired"] == 3
    assert report["steps_lost_max"] == 0
    assert report["recovery_s"]["max"] is not None
    assert report["vanilla_recovery_s"] is None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3 * 3600)
def test_the_long_list(tmp_path: Path) -> None:
    counts = {"kill": 100, "node": 20, "stop": 14, "absent": 6, "all": 5, "roster": 5, "driver": 5, "keeper": 5, "job": 5}
    report = chaos(job(tmp_path, steps=3000), ChaosConfig(counts), tmp_path / "out")
    print("\n".join(lines(report)))
    assert report["kept"]
    assert report["faults"] == report["fired"] == sum(counts.values())
    assert report["vanilla_recovery_s"] is not None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(2 * 3600)
def test_an_hour_of_everything(tmp_path: Path) -> None:
    report = chaos(job(tmp_path, steps=6000), ChaosConfig(minutes=60, every_s=2.5, vanilla=False), tmp_path / "out")
    print("\n".join(lines(report)))
    assert report["kept"]
    assert report["fired"] >= 1000

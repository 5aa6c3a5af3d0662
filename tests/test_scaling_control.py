"""The control plane's cost: fits recover known costs, predictions and plans use them, light members meet the real roster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import nnls

from raysegment.applications.scale_control import ControlConfig
from raysegment.applications.scaling import control, machines
from raysegment.applications.scaling.control import COSTS, ControlPlane, Cost
from raysegment.applications.scaling.fit import fit
from raysegment.applications.scaling.goodput import Faults
from raysegment.applications.scaling.plan import plan
from raysegment.applications.scaling.points import Point
from raysegment.applications.scaling.predict import Query, predict
from raysegment.applications.scaling.step import Rates, Where, times
from raysegment.applications.scaling.workloads import WORKLOADS
from raysegment.cli import BAD_INPUT, main
from raysegment.elastic import roster
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.light import Plan, dealt
from raysegment.feed.order import Order

SIZES = [2**power for power in range(1, 10)]
RATES = Rates(0.2, 0.006, 0.15, 0.7, 0.5, 0.02, 0.5, 0.1, 1.0)


def cost(name: str, fixed: float, each: float, square: float = 0.0, noise: float = 0.0, seed: int = 0) -> Cost:
    """Three rounds of each size, with relative noise."""
    draw = np.random.default_rng(seed)
    rounds = [(p, (fixed + each * p + square * p * p) * np.exp(noise * draw.standard_normal())) for p in SIZES for _ in range(3)]
    return control.cost_of(name, rounds)


def plane(**costs: Cost) -> ControlPlane:
    return ControlPlane(costs, 512, 2.0, "in a test")


def test_a_known_cost_is_recovered() -> None:
    found = cost("loss_s", 0.004, 30e-6)
    assert found.terms == pytest.approx([0.004, 30e-6, 0.0], rel=1e-6, abs=1e-12)
    bent = cost("loss_s", 0.004, 30e-6, 1e-7)
    assert bent.terms == pytest.approx([0.004, 30e-6, 1e-7], rel=1e-6)
    assert bent.slope(512)[0] == pytest.approx(30e-6 + 2 * 512 * 1e-7)
    assert bent.squared_share(512)[0] == pytest.approx(1e-7 * 512**2 / bent.at(512)[0])


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = 0.004 + 30e-6 * 512
    inside = 0
    for seed in range(60):
        middle, low, high = cost("loss_s", 0.004, 30e-6, noise=0.2, seed=seed).at(512)
        assert low <= middle <= high
        inside += low <= truth <= high
    assert 47 <= inside <= 60


def test_the_fit_is_that_of_nonnegative_least_squares() -> None:
    draw = np.random.default_rng(2)
    for _ in range(50):
        found = control.cost_of("loss_s", [(p, draw.exponential(1 + p / 50)) for p in SIZES])
        design, seconds = found._design, np.array(found.seconds)
        expected = nnls(design / seconds[:, None], np.ones(len(seconds)))[0]
        assert design @ found.terms == pytest.approx(design @ expected, rel=1e-5)


@pytest.mark.parametrize("bad", [("loss_s", [(2, 1.0)]), ("loss_s", [(2, 1.0), (4, -1.0)]), ("nothing", [(2, 1.0), (4, 2.0)])])
def test_rounds_that_cannot_be_fitted_are_refused(bad: tuple) -> None:
    with pytest.raises(ValueError, match="expected a cost of"):
        control.cost_of(*bad)


def test_a_file_gives_back_what_was_measured(tmp_path: Path) -> None:
    found = plane(**{name: cost(name, 1e-3, 1e-5, noise=0.1, seed=seed) for seed, name in enumerate(COSTS)})
    control.write(found, tmp_path / "control.yaml")
    again = control.read(tmp_path / "control.yaml")
    assert again == found
    assert again.costs["step_cpu_s"].at(4096) == found.costs["step_cpu_s"].at(4096)


def test_a_step_waits_only_for_a_roster_that_cannot_follow() -> None:
    measured = plane(step_cpu_s=cost("step_cpu_s", 0.0, 40e-6), beat_cpu_s=cost("beat_cpu_s", 0.0, 5e-6))
    here = Where(machines.find("summit"), WORKLOADS["deeplab"], 512, 2, "fp16", plane=measured)
    none = times(replace(here, plane=None, control="none"), RATES)
    assert times(here, RATES) == none
    many = replace(here, gpus=27360)  # 1.1 s of a processor for each step, and half of one for heartbeats
    busy_s = sum(times(many, RATES, {"control"}).values())
    idle = 27360 * 5e-6 / Ladder(2.0).beat_s
    assert measured.idle_share(27360) == pytest.approx(idle)
    border_s = times(replace(many, plane=None, control="none"), RATES)["control"]
    assert times(many, RATES)["control"] - border_s == pytest.approx(27360 * 40e-6 / (1 - idle) - busy_s)
    assert measured._load(measured.most(1.0), 1.0) < 0.95 <= measured._load(2 * measured.most(1.0), 1.0)


def test_plans_and_predictions_take_the_measurement_and_warn_beyond_it() -> None:
    model = fit([Point("a", "juwels_booster", gpus, 2, 27.0 * gpus, "deepcam", "fp16") for gpus in (16, 128)])
    measured = plane(loss_s=cost("loss_s", 0.01, 2e-3), grow_s=cost("grow_s", 0.01, 2e-3), join_s=cost("join_s", 0.1, 1e-2))
    asked = Query("a", 2048, plane=measured)
    assert any("costs are extrapolated" in warning for warning in predict(model, asked).warnings)
    assert not any("control plane" in warning for warning in predict(model, replace(asked, gpus=256)).warnings)
    with_it, without = (plan(model, query, 5.0, Faults()) for query in (asked, replace(asked, plane=None)))
    assert with_it.goodput < without.goodput
    faults = Faults()
    more = replace(
        faults, detection_s=faults.detection_s + 2e-3 * 2045, joining_s=faults.joining_s + 2e-3 * 2045,
        all_back_s=faults.all_back_s + 1e-2 * 2045,
    )  # fmt: skip
    assert with_it.goodput == pytest.approx(plan(model, replace(asked, plane=None), 5.0, more).goodput)


def test_what_the_model_takes_from_the_roster_is_so() -> None:
    assert (control.LOOK_S, control.STRAGGLERS_S) == (roster._TICK_S, roster._STRAGGLERS_EVERY_S)


def test_light_members_plan_the_share_that_a_worker_has() -> None:
    """All shares together are every tile of the window once."""
    asked = Plan(tiles=60, per_member=2, window=2)
    size = 5
    order = Order(asked.tiles, asked.per_member * size, 1)
    tiles = [order.tile(p) for rank in range(size) for p in order.line(0, 1, rank, size).positions(0, 2)]
    assert sorted(tiles) == sorted(order.tile(p) for p in range(10))
    assert asked.seconds(0, 3, size) > 0


def test_members_are_dealt_to_processes_evenly() -> None:
    parts = dealt(range(10), 3, 4)
    assert sorted(map(len, parts)) == [3, 3, 4]
    assert parts[1]["00004"]["node"] == "n1"


@pytest.mark.parametrize("members", ["512", "8:2", "1:8", "a:b"])
def test_a_range_that_is_none_is_refused(members: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "control", f"members={members}"]) == BAD_INPUT
    assert "members" in capsys.readouterr().err
    assert ControlConfig(members="2:48").sizes == [2, 4, 8, 16, 32]


@pytest.mark.slow
@pytest.mark.ray
def test_the_real_roster_is_measured_and_a_prediction_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "control.yaml"
    words = ("members=2:16", "rounds=2", "processes=2", "window_s=0.3", "beyond=false")
    assert main(["scale", "control", *words, "--out", str(out), "--pictures", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["largest"] == 16
    assert not found["processes"]["torch"]
    assert set(found["costs"]) == set(COSTS)
    assert all(one["low"] <= one["high"] for one in found["costs"].values())
    assert Path(found["pictures"][0]).stat().st_size > 5000
    asked = ("--system", "summit_deeplab", "--gpus", "1024", "--control", str(out), "--json")
    assert main(["scale", "predict", *asked]) == 0
    warned = json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"]
    assert any("control plane" in warning for warning in warned)

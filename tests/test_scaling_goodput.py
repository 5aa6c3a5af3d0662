"""What failures cost: formulas against discrete events, Young's and Daly's intervals, plans, epochs against batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.applications.scaling import check
from raysegment.applications.scaling.accuracy import Epochs, epochs_curve, measured, speedup_of_doubling
from raysegment.applications.scaling.fit import fit
from raysegment.applications.scaling.goodput import Faults, Job, best_interval_s, daly_interval_s, file_mtbf_s, goodput, simulate
from raysegment.applications.scaling.plan import plan
from raysegment.applications.scaling.points import Point
from raysegment.applications.scaling.predict import Query

FAULTS = Faults()
JOBS = [Job(27360, 6, 0.75, 0.35), Job(27360, 6, 0.75, 0.35, "wait"), Job(1024, 4, 0.08, 5.0, "wait"), Job(8, 8, 1.0, 2.0)]


def _mean(job: Job, faults: Faults, interval_s: float, failures: int = 400) -> tuple[float, float]:
    """Simulated goodput over some runs, and its standard error."""
    work_s = faults.mtbf_s(job.gpus) * failures / 8
    found = [simulate(job, faults, interval_s, work_s, seed) for seed in range(8)]
    return float(np.mean(found)), float(np.std(found) / 8**0.5)


def test_failures_come_as_often_as_llama_3_had_them() -> None:
    assert FAULTS.mtbf_s(16384) / 3600 == pytest.approx(54 * 24 / 419)
    assert FAULTS.mtbf_s(27360) / 3600 == pytest.approx(1.85, abs=0.01)


@pytest.mark.parametrize("job", JOBS[:3], ids=str)
def test_the_formula_is_what_discrete_events_find(job: Job) -> None:
    interval_s = best_interval_s(job, FAULTS)
    simulated, error = _mean(job, FAULTS, interval_s)
    assert goodput(job, FAULTS, interval_s) == pytest.approx(simulated, abs=4 * error + 0.004)


@pytest.mark.parametrize("job", JOBS[:2], ids=str)
def test_no_interval_is_clearly_better_than_youngs(job: Job) -> None:
    often = replace(FAULTS, all_share=0.2)
    best = best_interval_s(job, often)
    young, error = _mean(job, often, best)
    others = [_mean(job, often, best * factor) for factor in (0.25, 0.5, 2, 4)]
    assert all(young > other - 3 * math.hypot(error, wrong) for other, wrong in others)
    assert young > max(others[0][0], others[-1][0])


@given(st.floats(0.01, 100), st.floats(1e3, 1e7))
def test_daly_is_young_where_saving_is_cheap(cost_s: float, mtbf_s: float) -> None:
    young = math.sqrt(2 * cost_s * mtbf_s)
    assert daly_interval_s(cost_s, mtbf_s) == pytest.approx(young, rel=1.5 * math.sqrt(cost_s / mtbf_s) + 1e-9)


def test_without_failures_only_saving_costs() -> None:
    none = replace(FAULTS, per_gpu_hour=0.0, capture_share=0.0)
    job = JOBS[0]
    assert goodput(job, none, 350.0) == pytest.approx(1 / 1.001)
    assert simulate(job, none, 350.0, 1e6) == pytest.approx(1 / 1.001, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30000), st.floats(0.05, 30), st.floats(0.1, 60))
def test_going_on_beats_waiting_and_a_failure_of_everything_needs_a_file(gpus: int, step_s: float, cost_s: float) -> None:
    faults = replace(FAULTS, capture_share=0.0)
    elastic, wait = Job(gpus, 1, step_s, cost_s), Job(gpus, 1, step_s, cost_s, "wait")
    assert goodput(elastic, faults, best_interval_s(elastic, faults)) >= goodput(wait, faults, best_interval_s(wait, faults))
    assert file_mtbf_s(Job(gpus, gpus, step_s, cost_s), faults) == faults.mtbf_s(gpus)


def test_epochs_of_a_known_curve_and_of_the_measured_runs() -> None:
    truth = Epochs(7.0, 900.0, 0.0, 4096)
    found = epochs_curve([(batch, truth.at(batch)) for batch in (128, 256, 1024, 4096)])
    assert (found.least, found.critical) == pytest.approx((7.0, 900.0), rel=1e-4)
    real = epochs_curve(measured())
    assert real.spread < 0.25
    assert 7 < real.at(128) < 11
    assert 19 < real.at(2048) < 27


def test_doubling_pays_while_the_batch_is_small() -> None:
    curve = Epochs(7.0, 1000.0, 0.0, 4096)
    gains = [speedup_of_doubling(curve, gpus, 1, lambda gpus: float(gpus)) for gpus in (16, 1024, 16384)]
    assert gains[0] > 1.9
    assert gains[0] > gains[1] > gains[2] > 1


def test_a_plan_adds_up_and_names_what_limits() -> None:
    model = fit([Point("a", "juwels_booster", g, 2, 27.0 * g, "deepcam", "fp16") for g in (16, 128)])
    found = plan(model, Query("a", 128), 10.0, FAULTS)
    assert found.hours_low < found.hours < found.hours_high
    assert found.hours == pytest.approx(10 * 121266 / found.prediction.samples_per_s / 3600 / found.goodput)
    assert found.gpu_hours == pytest.approx(128 * found.hours)
    assert found.hours_without_faults < found.hours
    shares = [found.lost[name] for name in found.limits]
    assert shares == sorted(shares, reverse=True)
    assert found.staged_bytes == pytest.approx(121266 * 63.7e6)
    assert found.staging_s == pytest.approx(found.staged_bytes / 400e9)  # the file system's; 32 nodes could take 3.2 TB/s
    large = plan(model, Query("a", 2048), None, FAULTS)
    assert large.limits[0] == "large_global_batch"
    assert any("no longer pays" in warning for warning in large.warnings)
    assert not any("no longer pays" in warning for warning in plan(model, Query("a", 32), None, FAULTS).warnings)


def test_a_plan_for_the_machine_of_2018() -> None:
    model = check.paper_model()
    found = plan(model, Query("summit_deeplab", 27360, 2, precision="fp16", lag=1), 25.0, FAULTS)
    assert found.goodput > found.goodput_waiting
    assert found.limits[0] == "straggling"
    assert found.mtbf_hours == pytest.approx(1.85, abs=0.01)

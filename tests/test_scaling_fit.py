"""The fit: recovery of a world whose rates are known, coverage, what stays at priors, bad points, files, real rows left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysegment.applications.scaling import check, points
from raysegment.applications.scaling.fit import fit, parameter_names, read, step_s, write
from raysegment.applications.scaling.machines import find
from raysegment.applications.scaling.points import Point
from raysegment.applications.scaling.predict import Query, predict
from raysegment.climate.checks import BadInput
from tests.helpers import real_data

HEADER = "system,machine,gpus,local_batch,samples_per_s,network,precision\n"
SIZES = ((16, 8), (128, 1), (128, 2), (1024, 1), (1024, 2))


def _world(seed: int, asked: tuple[int, int] = (4096, 1)) -> tuple[list[Point], list[Point]]:
    """Points of three systems whose parameters are drawn from the priors, with 2 % noise; and the truth at `asked`."""
    random = np.random.default_rng(seed)
    systems = {"one": "juwels_booster", "two": "abci", "three": "dgx_a100"}
    blank = [Point(s, m, 1, 1, 1.0, "deepcam", "fp16") for s, m in systems.items()]
    known = {machine: find(machine) for machine in systems.values()}
    names = parameter_names(blank, known)
    z = random.standard_normal((1, len(names)))

    def measured(point: Point, gpus: int, batch: int, noise: float) -> Point:
        here = replace(point, gpus=gpus, local_batch=batch)
        seconds = float(step_s(z, names, here, known[point.machine])[0])
        return replace(here, samples_per_s=gpus * batch / seconds * float(np.exp(noise * random.standard_normal())))

    chosen = [(p, SIZES[i]) for p in blank for i in random.choice(len(SIZES), 3, replace=False)]
    return [measured(p, *size, 0.02) for p, size in chosen], [measured(p, *asked, 0.0) for p in blank]


def test_points_of_a_known_world_predict_what_was_held_back_and_intervals_cover() -> None:
    errors, inside = [], []
    for seed in range(5):
        seen, held = _world(seed)
        model = fit(seen)
        for truth in held:
            found = predict(model, Query(truth.system, truth.gpus, truth.local_batch))
            errors.append(abs(found.samples_per_s / truth.samples_per_s - 1))
            inside.append(found.low <= truth.samples_per_s <= found.high)
    assert np.median(errors) < 0.08
    assert np.mean(inside) >= 0.8


def test_the_answer_does_not_depend_on_the_order_of_points_and_repeats() -> None:
    seen, _ = _world(0)
    query = Query("one", 4096, 1)
    one, two = predict(fit(seen), query), predict(fit(seen[::-1]), query)
    assert one.samples_per_s == pytest.approx(two.samples_per_s, rel=0.02)  # draws differ, the posterior does not
    assert predict(fit(seen), query) == one


def test_shares_sum_to_one_and_efficiency_falls() -> None:
    model = fit(_world(1)[0])
    found = [predict(model, Query("two", gpus, 2)) for gpus in (1, 64, 4096)]
    assert all(sum(one.shares.values()) == pytest.approx(1) for one in found)
    assert found[0].efficiency == pytest.approx(1)
    assert found[0].efficiency > found[1].efficiency > found[2].efficiency


def test_extrapolation_widens_the_interval_and_is_said() -> None:
    model = fit(_world(2)[0])
    near, far = (predict(model, Query("one", gpus, 1)) for gpus in (1024, 65536))
    assert (far.high - far.low) / far.samples_per_s > 1.3 * (near.high - near.low) / near.samples_per_s
    assert any("extrapolation" in warning for warning in far.warnings)
    assert any("juwels_booster has 3744 GPUs" in warning for warning in far.warnings)
    other = predict(model, Query("one", 1024, 1, network="tiramisu", precision="fp32"))
    assert sum("never measured" in warning for warning in other.warnings) == 2


def test_what_few_points_cannot_tell_stays_at_its_prior_and_more_points_move_it() -> None:
    few = fit([Point("new", "nowhere", 8, 2, 30.0, "tiramisu", "fp16")])
    assert {"launch_s", "jitter", "efficiency"} <= set(few.at_prior("new"))
    assert "utilisation_16" not in few.at_prior("new")
    many = fit(
        [Point("new", "nowhere", 8, batch, 8 * batch / (0.3 + 0.1 * batch), "tiramisu", "fp16") for batch in (1, 2, 4, 8, 16)]
    )
    assert set(many.at_prior("new")) < set(few.at_prior("new"))
    assert many.z["fill"] > 1  # three samples of fixed time are far above the prior
    assert any("has no file" in warning for warning in few.warnings)


def test_a_model_read_again_predicts_the_same(tmp_path: Path) -> None:
    model = fit(_world(3)[0])
    write(model, tmp_path / "model.yaml")
    query = Query("three", 2048, 1)
    assert predict(read(tmp_path / "model.yaml"), query) == predict(model, query)
    (tmp_path / "model.yaml").write_text("format: 1\n")
    with pytest.raises(BadInput, match="raysegment scale fit"):
        read(tmp_path / "model.yaml")


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("", "at least one point"),
        ("a,abci,4,2,10,deepcam,fp16\na,abci,4,2,100,deepcam,fp16\n", "agree with each other"),
        ("a,abci,4,2,10,deepcam,fp16\na,abci,8,2,100,deepcam,fp16\n", "agree with each other"),
        ("a,abci,4,2,10,deepcam,fp16\na,summit,8,2,20,deepcam,fp16\n", "one machine for system a"),
        ("a,abci,4,2,-10,deepcam,fp16\n", "point 1"),
        ("a,abci,4,2,nan,deepcam,fp16\n", "point 1"),
        ("a,abci,four,2,10,deepcam,fp16\n", "point 1"),
        ("a,abci,4,2,10,depcam,fp16\n", "Did you mean deepcam"),
        ("a,abci,4,2,10,deepcam,fp8\n", "fp32, fp16, bf16"),
        ("a,abci,4\n", "point 1"),
    ],
)
def test_bad_points_are_refused(tmp_path: Path, rows: str, what: str) -> None:
    (tmp_path / "points.csv").write_text(HEADER + rows)
    with pytest.raises(BadInput, match=what):
        points.read(tmp_path / "points.csv")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("system,gpus\na,4\n")
    with pytest.raises(BadInput, match="machine, local_batch"):
        points.read(tmp_path / "points.csv")


def test_a_point_that_the_others_contradict_is_named() -> None:
    wrong = [Point("a", "abci", 4, 1, 10, "deepcam", "fp16"), Point("a", "abci", 8, 1, 6, "deepcam", "fp16"),
             Point("a", "abci", 16, 1, 40, "deepcam", "fp16")]  # fmt: skip
    assert any("contradicts the other points" in warning for warning in fit(wrong).warnings)


def test_an_unknown_system_suggests_one() -> None:
    model = fit([Point("juwels_v1", "juwels_booster", 128, 1, 1606, "deepcam", "fp16")])
    with pytest.raises(BadInput, match="Did you mean juwels_v1"):
        predict(model, Query("juwels", 256))


def test_the_runs_of_2018_from_what_was_known_below_1024_gpus() -> None:
    model = check.paper_model()
    assert max(point.gpus for point in model.points) <= 1024
    for found, published, allowed in check.paper_runs(model):
        assert abs(found.efficiency - published) <= allowed, found.system
    terms = dict(check.ablation(model, check.RUNS[0][0]))
    full = terms["everything"].efficiency
    assert terms["no straggling"].efficiency > full + 0.03
    assert terms["flat control plane"].efficiency < 0.3
    assert terms["flat ring, nothing overlaps"].efficiency < terms["nothing overlaps"].efficiency < full
    assert terms["lag 0"].efficiency < full


def test_measured_rows_that_are_left_out_are_predicted() -> None:
    left = list(check.leave_largest(points.read(real_data("deepcam_points.csv"))))
    found = check.summary(left)
    assert found["rows"] >= 4
    assert found["median"] <= 0.08
    assert found["worst"] <= 0.20
    assert found["inside"] >= 0.8


def test_a_system_without_points_is_what_others_are_on_its_machine_and_says_so() -> None:
    model = fit([Point("a", "juwels_booster", gpus, 2, 27.0 * gpus, "deepcam", "fp16") for gpus in (16, 128)])
    asked = Query("new", 256, 2, "deepcam", "fp16")
    with pytest.raises(BadInput, match="--machine"):
        predict(model, asked)
    there = predict(model.with_system("new", "juwels_booster"), asked)
    known = predict(model, Query("a", 256, 2, "deepcam", "fp16"))
    assert there.low < known.low < known.high < there.high
    elsewhere = predict(model.with_system("new", "nowhere"), asked)
    assert elsewhere.high / elsewhere.low > there.high / there.low
    assert any("has no points" in warning for warning in there.warnings)
    with pytest.raises(BadInput, match="--local-batch"):
        predict(model.with_system("new", "nowhere"), Query("new", 256))
    with pytest.raises(BadInput, match="juwels_booster"):
        model.with_system("a", "summit")


def test_a_point_without_a_machine_has_that_of_its_systems_name(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("system,machine,gpus,local_batch,samples_per_s,network,precision\nsummit,,8,2,30,deepcam,fp16\nmine,,8,2,30,deepcam,fp16\n")
    assert [(point.system, point.machine) for point in points.read(path)] == [("summit", "summit"), ("mine", "mine")]
    warned = fit(points.read(path)).warnings
    assert len(warned) == 1
    assert "mine has no file" in warned[0]

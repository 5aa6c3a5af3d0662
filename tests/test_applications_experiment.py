"""Experiments: the same seeds for every variant, statistics that can be done by hand, and nothing computed twice."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysegment import config as configuration
from raysegment.applications import experiment
from raysegment.applications.experiment import (
    MEASURES,
    Difference,
    ExperimentConfig,
    Spread,
    differences,
    run_experiment,
    sentence,
)
from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.console import Console
from raysegment.elastic.settings import TrainConfig, identity
from tests.helpers import ROOT
from tests.small_training import write_shards

SHIPPED = sorted(path for path in ROOT.glob("tune/*.yaml") if "variants" in configuration.read_yaml(path))
TINY = {
    "question": "Does a larger step learn more?",
    "archive": {"snapshots": 8, "held_out": 2, "height": 24, "width": 48},
    "base": {
        "config": "small",
        "train": {
            "steps": 3,
            "workers": 1,
            "feed": {"kind": "direct"},
            "network.tiramisu": {"first": 8, "growth": 4, "blocks": [1, 1]},
            "learn": {"global_batch": 4, "micro_batch": 2},
        },
    },
    "variants": {"slow": {"learn.optim.lr": 1e-5}, "fast": {"learn.optim.lr": 1e-2, "channels": ["TMQ", "PSL"]}},
    "seeds": [3, 5],
}


def tiny(out: Path, **changes: Any) -> ExperimentConfig:
    return configuration.load(ExperimentConfig, {**TINY, "out": str(out), **changes})


def rows(first: list[float], second: list[float]) -> list[dict[str, Any]]:
    """Two variants' runs, `measure` alike, seeds out of order."""
    made = [{"variant": name, "seed": seed, **dict.fromkeys(MEASURES, value)}
            for name, values in (("one", first), ("two", second)) for seed, value in enumerate(values)]  # fmt: skip
    return [made[0], *reversed(made[1:])]


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(("changes", "message"), [
    ({"question": " "}, "question: expected"),
    ({"variants": {"one": {}}}, "at least two"),
    ({"variants": {"one": {}, "a/b": {}}}, "names of letters"),
    ({"variants": {"one": {}, "two": {"learn.seed": 3}}}, r"variants\.two\.learn\.seed: expected none"),
    ({"variants": {"one": {}, "two": {"learn": {"seed": 3}}}}, r"variants\.two\.learn\.seed: expected none"),
    ({"base": {"train": {"shards": "s"}}}, r"base\.train\.shards: expected none"),
    ({"seeds": [1]}, "two or more different"),
    ({"seeds": [1, 1]}, "two or more different"),
    ({"archive": {"held_out": 0}}, "at least 1 snapshot"),
    ({"archive": {"snapshot": 9}}, r"Did you mean `archive\.snapshots`"),
    ({"sedes": [1, 2]}, "Did you mean `seeds`"),
])  # fmt: skip
def test_impossible_experiments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tiny(tmp_path, **changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"variants": {"one": {}, "two": {"learn.optim.lrr": 1}}}, r"Did you mean `learn\.optim\.lr`"),
    ({"variants": {"one": {}, "two": {"channels": ["TMQ", "U580"]}}}, "did you mean 'U850'"),
    ({"variants": {"one": {}, "two": {"workers": 2}}}, "the same as one"),
    ({"base": {"config": "smal"}}, "a YAML configuration file"),
])  # fmt: skip
def test_wrong_runs_are_refused_before_anything_starts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run_experiment(tiny(tmp_path / "e", **changes), Console(StringIO()))
    assert not (tmp_path / "e").exists()


def test_a_run_is_the_preset_then_the_base_then_the_variant(tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    run = settings.run("fast", 5)
    assert (run.learn.seed, run.learn.optim.lr, run.channels) == (5, 1e-2, ("TMQ", "PSL"))
    assert (run.learn.global_batch, run.network.tiramisu.kernel, run.learn.optim.larc) == (4, 3, True)
    assert (run.shards, run.out) == (str(tmp_path / "shards"), str(tmp_path / "runs" / "fast" / "seed-5"))
    assert len({settings.run(variant, seed).out for seed, variant in settings.runs}) == 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_differ_in_what_they_say(path: Path, tmp_path: Path) -> None:
    settings = configuration.load(ExperimentConfig, configuration.read_yaml(path), path)
    assert len(settings.seeds) >= 3
    experiment._check(settings)
    manifest, size = Manifest.load(write_shards(tmp_path)), (settings.archive.height, settings.archive.width)
    manifest = replace(manifest, tile=size, class_counts=(manifest.tiles * size[0] * size[1], 0, 0))
    first = identity(settings.run(next(iter(settings.variants)), 0).resolved(manifest))
    for name, keys in settings.variants.items():
        own = identity(settings.run(name, 0).resolved(manifest))
        derived = {"network.channels"} if "channels" in keys else set()
        assert {key for key in own if own[key] != first[key]} <= {*keys, *derived}


# ---------------------------------------------------------------- statistics


def test_spread_and_paired_difference_are_those_of_a_hand_computed_example() -> None:
    """d = 0.10, 0.08, 0.09: mean 0.09, deviation 0.01, error 0.01/√3; t of 2 degrees of freedom at 97.5 % is 4.3027."""
    spread = Spread.of([0.80, 0.82, 0.84])
    assert (spread.mean, spread.std) == pytest.approx((0.82, 0.02))
    found = Difference.of([0.80, 0.82, 0.84], [0.70, 0.74, 0.75])
    assert (found.mean, found.standard_error) == pytest.approx((0.09, 0.01 / math.sqrt(3)))
    assert (found.low, found.high) == pytest.approx((0.09 - 0.024841, 0.09 + 0.024841), abs=1e-6)
    assert found.clear


@pytest.mark.parametrize(("values", "clear"), [
    ([0.70, 0.90, 0.80], False),  # d = 0, 0.1, -0.1
    ([0.60, 0.70, 0.80], True),  # always 0.1 lower
    ([0.70, 0.80, 0.90], False),  # the same
    ([0.71, 0.84, 0.96], False),  # d = 0.01, 0.04, 0.06: 0.037 ± 0.063
    ([math.nan, 0.7, 0.8], False),
])  # fmt: skip
def test_a_difference_is_clear_when_its_interval_leaves_out_zero(values: list[float], clear: bool) -> None:
    assert Difference.of(values, [0.70, 0.80, 0.90]).clear == clear


def test_differences_are_between_runs_of_the_same_seed() -> None:
    found = differences(rows([0.5, 0.6, 0.7], [0.6, 0.7, 0.8]))["two"]["iou_mean"]
    assert (found.mean, found.standard_error) == pytest.approx((0.1, 0.0), abs=1e-12)


def test_the_sentence_says_what_the_numbers_say() -> None:
    lower = sentence("two", "one", rows([0.70, 0.74, 0.75], [0.60, 0.66, 0.66]))
    assert "mean IoU 0.090 lower than `one` (standard error 0.006, lower with 3 of 3 seeds)" in lower
    assert "-0.115 to -0.065, leaves out zero" in lower
    assert "0.88 times as many samples per second" in lower
    unclear = sentence("two", "one", rows([0.70, 0.74, 0.75], [0.75, 0.70, 0.80]))
    assert "higher with 2 of 3 seeds" in unclear
    assert "do not tell the two apart" in unclear


# ---------------------------------------------------------------- the whole


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Verbs that do nothing but remember: scores follow from variant and seed. Returns the runs that were trained."""
    trained: list[TrainConfig] = []

    def train(run: TrainConfig, _: object) -> dict[str, Any]:
        trained.append(run)
        return {"checkpoint": f"{run.out}/checkpoint", "samples_per_s": 10.0, "seconds": 60.0}

    def evaluate(masks: Path, held_out: Path) -> dict[str, Any]:
        score = (0.7 if masks.parent.name == "fast" else 0.5) + int(masks.name.removeprefix("seed-")) / 100
        iou = {"background": 0.9, "cyclone": None, "river": score, "mean": score}
        return {"iou": iou, "mlperf_iou": 0.8 if held_out.name == "heldout" else 0.0}

    for name, verb in (("train", train), ("evaluate", evaluate)):
        monkeypatch.setattr(experiment, name, verb)
    for name in ("segment", "synthesize", "stage", "ensure_ray"):
        monkeypatch.setattr(experiment, name, lambda *_, **__: None)
    monkeypatch.setattr(experiment, "Manifest", SimpleNamespace(load=lambda _: None))
    monkeypatch.setattr(TrainConfig, "resolved", lambda self, _: self)
    return trained


def test_every_variant_meets_every_seed_and_the_results_say_so(tmp_path: Path, stand_ins: list[TrainConfig]) -> None:
    result = run_experiment(tiny(tmp_path), Console(StringIO()))
    assert [run.name for run in stand_ins] == ["slow-3", "fast-3", "slow-5", "fast-5"]
    table = list(csv.DictReader(Path(result["results"]).read_text().splitlines()))
    assert list(table[0]) == ["variant", "seed", *MEASURES]
    assert [(row["variant"], row["seed"]) for row in table] == [("slow", "3"), ("fast", "3"), ("slow", "5"), ("fast", "5")]
    assert [float(row["iou_mean"]) for row in table] == pytest.approx([0.53, 0.73, 0.55, 0.75])
    assert table[0]["iou_cyclone"] == ""
    assert result == json.loads(Path(result["summary"]).read_text())
    assert result["variants"]["fast"]["iou_mean"] == pytest.approx({"mean": 0.74, "std": 0.02 / math.sqrt(2)})
    assert result["differences"]["fast"]["iou_mean"]["mean"] == pytest.approx(0.2)
    assert result["differences"]["fast"]["iou_cyclone"]["mean"] is None
    report = Path(result["report"]).read_text()
    assert "| `fast` | 0.900 ± 0.000 | – | 0.740 ± 0.014 | 0.740 ± 0.014 | 0.800 ± 0.000 | 10.0 ± 0.0 | 60 ± 0 |" in report
    assert "**+0.200 ± 0.000**" in report
    assert result["sentences"][0] in report
    assert configuration.load(ExperimentConfig, configuration.read_yaml(tmp_path / "experiment.yaml")) == tiny(tmp_path)


def test_a_folder_takes_more_seeds_but_no_other_archive(tmp_path: Path, stand_ins: list[TrainConfig]) -> None:
    run_experiment(tiny(tmp_path), Console(StringIO()))
    assert run_experiment(tiny(tmp_path, seeds=[3, 5, 7]), Console(StringIO()))["runs"] == 6
    with pytest.raises(BadInput, match="another folder"):
        run_experiment(tiny(tmp_path, archive={**TINY["archive"], "seed": 1}), Console(StringIO()))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("two_cpus")
def test_two_variants_with_two_seeds_and_again(tmp_path: Path) -> None:
    result = run_experiment(tiny(tmp_path), Console(StringIO()))
    assert result["runs"] == 4
    table = list(csv.DictReader(Path(result["results"]).read_text().splitlines()))
    assert all(0 < float(row["iou_background"]) < 1 and 0 < float(row["mlperf_iou"]) < 1 for row in table)
    assert all(float(row["samples_per_s"]) > 0 for row in table)
    weights = [json.loads(path.read_text())["weights_sha256"] for path in sorted(tmp_path.glob("runs/*/*/summary.json"))]
    assert len(set(weights)) == 4
    lasting = [path for path in tmp_path.glob("*/**/*.*") if path.suffix in (".jsonl", ".nc", ".safetensors")]
    written = {path: path.stat().st_mtime_ns for path in lasting}
    assert len(written) > 30
    assert run_experiment(tiny(tmp_path), Console(StringIO())) == result
    assert {path: path.stat().st_mtime_ns for path in written} == written

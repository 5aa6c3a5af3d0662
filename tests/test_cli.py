"""Every verb through its command line: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysegment.applications import bench_step
from raysegment.archive.masks import read_probabilities
from raysegment.cli import BAD_INPUT, VERBS, main, parse, parser
from raysegment.climate.rules import RULES
from tests.helpers import real_data

MAP, TRACKS = "gfs_2011-10-11T00.nc", "ibtracs_2011-10-11T00.csv"
TINY = ["workers=2", "cpus_per_worker=0.5", "steps=6", "network.tiramisu.first=8", "network.tiramisu.growth=4",
        "network.tiramisu.blocks=[1, 1, 1]", "learn.global_batch=4", "learn.micro_batch=2"]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """The JSON object that is all a verb prints on standard output."""
    assert main([str(word) for word in (*words, "--json")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_has_an_example_that_parses(verb, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb.name, "--help"])
    assert done.value.code == 0
    assert verb.example in capsys.readouterr().out
    words = verb.example.split()
    assert words[:2] == ["raysegment", verb.name]
    assert parser().parse_args(words[1:]).verb is verb


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "/nowhere"],
        ["segment", "/nowhere", "--labeller", "rules:default", "--out", "x"],
        ["stage", "/nowhere", "--out", "x"],
        ["train", "no-such-preset"],
        ["train", "stepz=3"],
        ["train", "small"],
        ["train", "small", "shards=/nowhere"],
        ["synthesize", "x", "snapshots=0"],
        ["evaluate", "/nowhere", "/nowhere"],
        ["events", "/nowhere", "--out", "x"],
        ["map", "/nowhere", "--out", "x.png"],
        ["map", "/nowhere", "--out", "x.gif"],
        ["map", "/nowhere", "--density", "--out", "x.png"],
        ["map", "/nowhere", "--density", "--out", "x.gif"],
        ["map", "a.nc", "b.nc", "--out", "x.png"],
        ["map", ".", "--masks", ".", "--out", "x.png"],
        ["tune", "/nowhere.yaml"],
        ["bench", "rest", "repeats=0"],
        ["bench", "step", "--size", "0x288"],
        ["bench", "step", "--network", "deeplab", "--size", "190x288"],
        ["experiment", "/nowhere.yaml"],
        ["demo", "steps=none", "--out", "x"],
        ["demo", "--map", "/nowhere.nc", "--out", "x"],
    ],
    ids=" ".join,
)
def test_bad_input_is_exit_code_2_with_expected_and_got(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == BAD_INPUT
    message = " ".join(capsys.readouterr().err.split())
    assert f"raysegment {words[0]}:" in message
    assert "expected" in message
    assert "got" in message
    assert not list(tmp_path.iterdir()), "nothing half-written stays behind"


def test_overrides_may_stand_anywhere() -> None:
    words = ["train", "small", "--json", "steps=3", "--out", "runs/x", "workers=1"]
    options = parse(words)
    assert (options.config, options.options, options.out, options.json) == ("small", ["steps=3", "workers=1"], "runs/x", True)
    for strange in (["train", "--stepz", "3"], ["inspect", "a", "b"], ["inspect", "a", "b=c"]):
        with pytest.raises(SystemExit) as done:
            parse(strange)
        assert done.value.code == BAD_INPUT


def test_a_tile_that_is_none_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage", str(tmp_path), "--out", str(tmp_path / "s"), "--tile", "axb"]) == BAD_INPUT
    assert "expected rows x columns" in " ".join(capsys.readouterr().err.split())


def test_unknown_rule_suggests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = real_data(MAP)
    assert main(["segment", str(source), "--labeller", "rules:tempset", "--out", str(tmp_path / "m")]) == BAD_INPUT
    assert "Did you mean tempest" in " ".join(capsys.readouterr().err.split())


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
def test_tutorial_on_a_real_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's tutorial: a real map by rules, staged, trained on, and labelled by what was trained."""
    source = real_data(MAP)
    masks, shards, out = tmp_path / "masks", tmp_path / "shards", tmp_path / "run"
    by_rules = run(capsys, "segment", source, "--labeller", "rules:default", "--out", masks)
    assert (by_rules["written"], by_rules["snapshots"]) == (1, 1)
    staged = run(capsys, "stage", source, "--masks", masks, "--out", shards, "--tile", "40x48")
    assert staged["tiles"] == 6
    assert all(count > 0 for count in staged["class_counts"])
    trained = run(capsys, "train", "small", f"shards={shards}", f"out={out}", *TINY)
    assert {"steps", "samples", "samples_per_s", "loss_first", "loss_last", "checkpoint"} <= set(trained)
    assert (trained["steps"], trained["samples"]) == (6, 24)
    learnt = tmp_path / "learnt"
    assert run(capsys, "segment", source, "--labeller", trained["checkpoint"], "--out", learnt, "--probabilities")["written"] == 1
    score = run(capsys, "evaluate", learnt, masks)
    assert set(score["iou"]) == {"background", "cyclone", "river", "mean"}
    assert sum(map(sum, score["confusion"])) == 73 * 144
    assert score["snapshots"] == 1
    assert 0 <= score["mlperf_iou"] <= 1
    assert run(capsys, "evaluate", masks, masks)["iou"] == {"background": 1.0, "cyclone": 1.0, "river": 1.0, "mean": 1.0}
    events = run(capsys, "events", masks, "--sources", source, "--out", tmp_path / "events")
    assert events["events"]["tropical_cyclone"] >= 2
    assert all(Path(file).exists() for file in events["files"])
    drawn = ["--masks", *masks.glob("*.nc"), "--tracks", real_data(TRACKS), "--out", tmp_path / "map.png"]
    picture = run(capsys, "map", source, *drawn)
    assert Path(picture["picture"]).read_bytes().startswith(b"\x89PNG")
    often = run(capsys, "map", masks, "--out", tmp_path / "often.png")
    assert Path(often["picture"]).read_bytes().startswith(b"\x89PNG")
    probabilities = read_probabilities(next(learnt.glob("*.mask.nc")))
    assert probabilities is not None
    assert probabilities.sum(1) == pytest.approx(1.0, abs=1e-2)
    for path, kind in ((source, "source"), (shards, "shards"), (out, "run"), (trained["checkpoint"], "checkpoint")):
        assert run(capsys, "inspect", path)["kind"] == kind


TINY_STEP = ["--batch", "2", "--repeats", "2", "--seconds", "20", "network.tiramisu.first=8", "network.tiramisu.growth=4",
             "network.tiramisu.kernel=3", "network.tiramisu.blocks=[1, 1]"]  # fmt: skip


@pytest.fixture
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "MATMUL", 512)
    monkeypatch.setattr(bench_step, "CONVOLUTION", (64, 48, 96))


@pytest.mark.usefixtures("small_peaks")
def test_bench_step_measures_beside_the_limits_and_plain_torch(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "bench", "step", "--network", "tiramisu", "--size", "32x64", *TINY_STEP)
    assert (result["height"], result["width"], result["batch"]) == (32, 64, 2)
    assert result["parameters"] > 1000
    assert result["tflop_per_sample"] > 0
    for precision in ("bf16", "fp32"):
        found = result[precision]
        assert found["tflops"] == pytest.approx(found["samples_per_s"] * result["tflop_per_sample"])
        assert found["share_of_peak"] == pytest.approx(found["tflops"] / result[f"peak_{precision}_tflops"])
        assert found["samples_per_s_16"] <= found["samples_per_s"] <= found["samples_per_s_84"]
        assert found["sustained_tflops"] <= found["peak_tflops"]
    assert result["bf16_over_fp32"] == pytest.approx(result["fp32"]["step_s"] / result["bf16"]["step_s"])
    assert result["over_eager"] == pytest.approx(result["eager"]["step_s"] / result["bf16"]["step_s"])


@pytest.mark.usefixtures("small_peaks")
def test_bench_step_prints_the_cost_of_checkpointing_and_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "32x64", "--precision", "fp32", *TINY_STEP]
    result = run(capsys, "bench", "step", *words, "--against", "none", "--checkpointing")
    assert result["bf16"] is None
    assert result["over_eager"] is None
    assert result["over_kept"] == pytest.approx(result["kept"]["step_s"] / result["fp32"]["step_s"])
    rows = {row["operation"]: row for row in run(capsys, "bench", "step", *words, "--profile")["operations"]}
    forward = run(capsys, "bench", "step", *words, "--against", "none")["tflop_per_sample"] * 1e3 / 3
    assert rows["convolution"]["gflop"] >= 2 * forward  # of both samples; backward convolves, too
    assert all(row["ms"] >= 0 and row["gb"] >= 0 for row in rows.values())


def test_bench_rest(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "bench", "rest", "height=32", "width=64", "repeats=1")
    assert result["tiles_per_s"] > 0
    for name in RULES:
        assert result[f"rules_{name}_s"] > 0
        assert result[f"rules_{name}_peak_mb"] > 32 * 64 / 1e6  # at least the mask that comes out

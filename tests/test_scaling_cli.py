"""`raysegment scale` as a user has it: JSON keys, exit codes, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysegment.cli import BAD_INPUT, main

POINTS = """system,machine,gpus,local_batch,samples_per_s,network,precision
here_v1,juwels_booster,16,2,430,deepcam,fp16
here_v1,juwels_booster,128,2,3300,deepcam,fp16
there,nowhere,8,2,100,deepcam,fp16
"""


@pytest.fixture
def model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    (tmp_path / "points.csv").write_text(POINTS)
    out = tmp_path / "model.yaml"
    fitted = run(capsys, "fit", tmp_path / "points.csv", "--out", out)
    assert fitted["points"] == 3
    assert any("nowhere has no file" in warning for warning in fitted["warnings"])
    return out


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["scale", *map(str, words), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_predict_and_plan_have_the_keys_that_were_agreed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", model, "--system", "here_v1", "--gpus", 2048)
    found = run(capsys, "predict", *asked, "--local-batch", 1)
    assert {"samples_per_s", "low", "high", "efficiency", "shares"} <= set(found)
    assert set(found["shares"]) == {"compute", "input", "exchange", "straggling", "control"}
    assert found["low"] < found["samples_per_s"] < found["high"]
    planned = run(capsys, "plan", *asked, "--epochs", 5)
    assert {"hours", "goodput", "checkpoint_interval_s", "limits"} <= set(planned)
    safe = run(capsys, "plan", *asked, "--epochs", 5, "per_gpu_hour=0", "capture_share=0")
    assert safe["hours"] < planned["hours"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("predict", "--system", "here", "--gpus", "8"), "Did you mean here_v1"),
        (("predict", "--system", "here_v1", "--gpus", "0"), "at least one GPU"),
        (("predict", "--system", "here_v1", "--gpus", "8", "--network", "tiramsu"), "Did you mean tiramisu"),
        (("predict", "--system", "here_v1", "--gpus", "8", "--lag", "2"), "0 or 1"),
        (("predict", "--gpus", "8"), "--system"),
        (("plan", "--system", "here_v1", "--gpus", "8", "--epochs", "-1"), "above 0"),
        (("plan", "--system", "here_v1", "--gpus", "8", "per_gpu_hours=1"), "per_gpu_hour"),
        (("fit",), "POINTS.csv"),
        (("fit", "absent.csv"), "readable CSV"),
    ],
)
def test_bad_input_ends_with_code_2_and_a_remedy(
    model: Path, words: tuple, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scale", *words, *(() if words[0] == "fit" else ("--model", str(model)))]) == BAD_INPUT
    assert what in capsys.readouterr().err


def test_check_says_what_the_runs_of_2018_are_predicted_to_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run(capsys, "check", "--pictures", tmp_path)
    assert all(run_of["met"] for run_of in found["paper"].values())
    assert "flat ring, nothing overlaps" in found["ablation"]["summit_deeplab"]
    assert found["pictures"]
    assert all(Path(picture).stat().st_size > 5000 for picture in found["pictures"])

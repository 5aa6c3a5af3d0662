"""A replay finds a clean run equal, by one process whatever the run's world, and everything that was altered different."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from raysegment.applications.replay import Span, replay
from raysegment.cli import main
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import list_checkpoints
from raysegment.elastic.runs import Run
from raysegment.learning.step import LearnConfig
from tests.small_training import config, spoil, write_shards
from tests.training_members import alone


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def by_two(shards, tmp_path_factory) -> Path:
    """Twelve steps by two members, with a checkpoint every three, of which the last three stay."""
    out = tmp_path_factory.mktemp("two")
    alone(config(shards, out), out, members=2)
    return out


@pytest.fixture
def run(by_two, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(by_two, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(path: Path, step: int, **values: object) -> None:
    """Change a step's line in a log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | values if line["step"] == step else line) + "\n" for line in lines))


def test_one_process_finds_what_two_members_did(by_two):
    before = content(by_two)
    result = replay(by_two, Span(7, 12))
    assert result["equal"], result["differences"]
    assert result["worlds"] == [2]
    assert (Path(result["from"]).name, result["from_step"]) == ("step-00000006", 6)
    assert result["compared"] == {"steps": 5, "states": 2}
    assert list(result["states"]) == [9, 12]
    assert result["environment"] == {}
    assert content(by_two) == before, "a replay changes nothing"


def test_from_the_seed_through_states_whose_files_are_gone(by_two):
    result = replay(by_two, Span(0, 5))
    assert result["equal"], result["differences"]
    assert (result["from"], list(result["states"])) == ("the seed", [3])
    assert {path.name for path in list_checkpoints(by_two / "checkpoints")} == {  # pyright: ignore
        "step-00000006", "step-00000009", "step-00000012",
    }  # fmt: skip


def test_a_late_gradient_is_part_of_the_state(shards, tmp_path):
    """With lag 1 each state is taken with a gradient waiting, and steps go on behind one another."""
    asked = config(shards, tmp_path)
    alone(replace(asked, learn=replace(asked.learn, lag=1)), tmp_path)
    result = replay(tmp_path, Span(6, 12))
    assert result["equal"], result["differences"]
    assert list(result["states"]) == [6, 9, 12]


def test_a_byte_of_a_tile(run, shards, tmp_path):
    """The damaged tile is left out, so that the steps from its first turn on are others."""
    private = Path(shutil.copytree(shards, tmp_path / "shards"))
    steps = {line["step"]: line for line in map(json.loads, (run / "steps.jsonl").read_text().splitlines())}
    spoil(private, steps[8]["tiles"][0])
    result = replay(run, Span(6, 12), str(private))
    turns = [step for step in range(6, 12) if steps[8]["tiles"][0] in steps[step]["tiles"]]
    assert not result["equal"]
    assert result["differences"][0]["step"] == turns[0]
    assert {"loss", "samples", "quarantined"} <= {row["what"] for row in result["differences"] if row["step"] == turns[0]}
    assert result["states"][12]["logged"] != result["states"][12]["found"]
    assert replay(run, Span(6, 12))["equal"], "the run's own shards are as they were"


def test_other_shards_are_named(run, tmp_path):
    result = replay(run, Span(9, 10), str(write_shards(tmp_path / "other", first=1)))
    assert [row["what"] for row in result["differences"][:2]] == ["manifest of the shards", "loss"]


def test_a_value_of_the_configuration(run):
    path = run / "config.yaml"
    changed = yaml.safe_load(path.read_text())
    changed["learn"]["optim"]["lr"] = 0.02
    path.write_text(yaml.safe_dump(changed))
    result = replay(run, Span(9, 12))
    whole = [row for row in result["differences"] if row["step"] is None]
    assert "learn.optim.lr (0.01 there, 0.02 now)" in whole[0]["found"]
    assert [row["what"] for row in result["differences"] if row["step"] == 9] == ["state_sha256"] * 0 + ["lr"]
    assert result["states"][12]["logged"] != result["states"][12]["found"]


def test_the_log_itself(run):
    rewrite(run / "steps.jsonl", 10, loss=0.5)
    (row,) = replay(run, Span(9, 12))["differences"]
    assert (row["step"], row["what"], row["logged"]) == (10, "loss", 0.5)
    assert replay(run, Span(11, 12))["equal"]


def test_a_damaged_checkpoint_is_passed_over(run):
    (run / "checkpoints" / "step-00000009" / "weights.safetensors").write_bytes(b"damaged")
    said: list[str] = []
    result = replay(run, Span(10, 11), say=said.append)
    assert (result["equal"], result["from_step"]) == (True, 6)
    assert "step-00000009" in said[0]


def test_what_cannot_be_replayed_is_refused(run, tmp_path):
    with pytest.raises(BadInput, match="at or before step 3.*checkpoints of the steps 6, 9, 12"):
        replay(run, Span(3, 5))
    with pytest.raises(BadInput, match="no line of step 12; there are 12, the last of step 11"):
        replay(run, Span(11, 13))
    with pytest.raises(BadInput, match=r"no config\.yaml"):
        replay(tmp_path / "none", Span(0, 1))
    changed = yaml.safe_load((run / "config.yaml").read_text())
    changed["learn"]["exchange"] = "fast"
    (run / "config.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(BadInput, match="fast, with 2 members"):
        replay(run, Span(9, 10))


@pytest.mark.parametrize("text", ["", "a:b", "5:5", "7:3", "-1:2", "3:", "1:2:3"])
def test_steps_are_two_numbers(text):
    with pytest.raises(BadInput, match="--steps"):
        Span.parse(text)


def test_on_the_command_line(run, capsys):
    assert Span.parse("4") == Span(4, 5)
    assert main(["replay", str(run), "--steps", "9:12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    rewrite(run / "steps.jsonl", 10, grad_norm=1.0)
    assert main(["replay", str(run), "--steps", "9:12", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["what"]) for row in found["differences"]] == [(10, "grad_norm")]
    assert main(["replay", str(run), "--steps", "2:4"]) == 2


def test_every_checkpoint_leaves_its_digest_in_the_log(by_two):
    events = [event for event in Run(by_two).read_events() if event["event"] == "checkpoint"]
    assert [event["step"] for event in events] == [3, 6, 9, 12]
    assert all(len(event["state_sha256"]) == len(event["weights_sha256"]) == 64 for event in events)
    assert LearnConfig().exchange == "exact"

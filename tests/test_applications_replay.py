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
from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.safe import step_of
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


def files(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there: step 12's, and at least one before it (one may supersede another)."""
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]


def test_one_process_finds_what_two_members_did(by_two):
    before, begin = content(by_two), files(by_two)[-2]
    result = replay(by_two, Span(begin + 1, 12))
    assert result["equal"], result["differences"]
    assert result["worlds"] == [2]
    assert (Path(result["from"]).name, result["from_step"]) == (f"step-{begin:08d}", begin)
    assert result["compared"] == {"steps": 11 - begin, "states": 1}
    assert list(result["states"]) == [12]
    assert result["environment"].keys() <= {"git"}, "the same machine; sources may be edited meanwhile"
    assert content(by_two) == before, "a replay changes nothing"


def test_from_the_seed_through_states_whose_files_are_gone(run):
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)  # pyright: ignore
    result = replay(run, Span(0, 12))
    assert result["equal"], result["differences"]
    assert result["from"] == "the seed"
    assert list(result["states"]) == [event["step"] for event in Run(run).read_events() if event["event"] == "checkpoint"]
    assert len(result["states"]) >= 2


def test_a_late_gradient_is_part_of_the_state(shards, tmp_path):
    """With lag 1 each state is taken with a gradient waiting, and steps go on behind one another."""
    asked = config(shards, tmp_path)
    alone(replace(asked, learn=replace(asked.learn, lag=1)), tmp_path)
    begin = files(tmp_path)[-2]
    result = replay(tmp_path, Span(begin, 12))
    assert result["equal"], result["differences"]
    assert list(result["states"]) == [begin, 12]


def test_a_byte_of_a_tile(run, shards, tmp_path):
    """The damaged tile is left out, so that the steps from its first turn on are others."""
    private = Path(shutil.copytree(shards, tmp_path / "shards"))
    steps, begin = {line["step"]: line for line in read_lines(run / "steps.jsonl")[0]}, files(run)[-2]
    tile = steps[begin]["tiles"][-1]
    spoil(private, tile)
    result = replay(run, Span(begin, 12), str(private))
    turns = [step for step in range(begin, 12) if tile in steps[step]["tiles"]]
    assert not result["equal"]
    assert result["differences"][0]["step"] == turns[0]
    assert {"loss", "samples", "quarantined"} <= {row["what"] for row in result["differences"] if row["step"] == turns[0]}
    assert result["states"][12]["logged"] != result["states"][12]["found"]
    assert replay(run, Span(begin, 12))["equal"], "the run's own shards are as they were"


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
    assert [row["what"] for row in result["differences"] if row["step"] == 11] == ["loss", "grad_norm", "lr"]
    assert result["states"][12]["logged"] != result["states"][12]["found"]


def test_the_log_itself(run):
    rewrite(run / "steps.jsonl", 10, loss=0.5)
    (row,) = replay(run, Span(9, 12))["differences"]
    assert (row["step"], row["what"], row["logged"]) == (10, "loss", 0.5)
    assert replay(run, Span(11, 12))["equal"]


def test_a_damaged_checkpoint_is_passed_over(run):
    steps, said = files(run), []
    for step in steps[1:]:
        (run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors").write_bytes(b"damaged")
    result = replay(run, Span(11, 12), say=said.append)
    assert (result["equal"], result["from_step"]) == (True, steps[0])
    assert [text.count(f"step-{step:08d}") for step, text in zip(steps[-2:0:-1], said, strict=True)] == [1] * len(said)
    (run / "checkpoints" / f"step-{steps[0]:08d}" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="a whole checkpoint at or before step 11"):
        replay(run, Span(11, 12))


def test_what_cannot_be_replayed_is_refused(run, tmp_path):
    steps = files(run)
    with pytest.raises(BadInput, match=f"at or before step 1, got checkpoints of the steps {', '.join(map(str, steps))}"):
        replay(run, Span(1, 5))
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
    assert main(["replay", str(run), "--steps", "2:4", "--shards", str(run / "none")]) == 2


def test_every_checkpoint_leaves_its_digest_in_the_log(by_two):
    events = [event for event in Run(by_two).read_events() if event["event"] == "checkpoint"]
    assert {*files(by_two)} <= {event["step"] for event in events}
    assert all(len(event["state_sha256"]) == len(event["weights_sha256"]) == 64 for event in events)

"""Training through Ray Train: a killed worker changes nothing, a finished run is not repeated, another one is refused."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import list_checkpoints, read_checkpoint
from raysegment.elastic.train import train
from raysegment.elastic.worker import state_sha256
from raysegment.feed.stream import FeedConfig
from tests.small_training import config, write_shards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """One worker, nothing happens, tiles read in place."""
    out = tmp_path_factory.mktemp("undisturbed")
    heard = []
    summary = train(config(shards, out, feed=FeedConfig(kind="direct")), lambda *news: heard.append(news))
    return out, summary, heard


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_all_it_should(undisturbed, shards):
    out, summary, heard = undisturbed
    steps = lines(out / "steps.jsonl")
    assert [step["step"] for step in steps] == list(range(12))
    assert [step["cursor"] for step in steps] == list(range(0, 72, 6))
    assert summary["steps"] == 12
    assert summary["samples"] == 72
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["samples_per_s"] > 0
    assert abs(sum(summary["time_shares"].values()) - 1) < 1e-9
    assert summary["flop_s"]["peak"] >= summary["flop_s"]["sustained"] > 0
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert heard[-1][:2] == (12, 12)
    assert "loss" in heard[-1][2]
    assert len(list_checkpoints(out / "checkpoints")) == 3
    checkpoint = read_checkpoint(summary["checkpoint"])
    assert checkpoint.facts.step == 12
    assert checkpoint.facts.cursor == 72
    assert state_sha256(checkpoint.weights, checkpoint.state) == summary["state_sha256"]
    assert len(checkpoint.facts.provenance["class_weights"]) == 3


def test_a_finished_run_is_returned_and_another_refused(undisturbed, shards, tmp_path):
    out, summary, _ = undisturbed
    started = time.monotonic()
    again = train(config(shards, out, workers=2, feed=FeedConfig()))
    assert again["state_sha256"] == summary["state_sha256"]
    assert time.monotonic() - started < 5
    with pytest.raises(BadInput, match="steps \\(12 there, 13 now\\)"):
        train(config(shards, out, steps=13))
    with pytest.raises(BadInput, match="began with"):
        train(config(write_shards(tmp_path / "other", 9), out))


def test_a_killed_worker_changes_nothing(undisturbed, shards, tmp_path):
    """Two workers through Ray Data, one killed before step 7: the same weights as one worker that nothing happened to."""
    summary = train(config(shards, tmp_path / "run", workers=2, chaos="kill@step=7,member=1"))
    events = lines(tmp_path / "run" / "events.jsonl")
    assert [event["fault"] for event in events if event["event"] == "fault"] == ["kill@step=7,member=1"]
    ready = [event for event in events if event["event"] == "ready"]
    assert [event["step"] for event in ready] == [0, 6]
    assert summary["faults_survived"] == 1
    assert summary["state_sha256"] == undisturbed[1]["state_sha256"]
    ours, theirs = lines(tmp_path / "run" / "steps.jsonl"), lines(undisturbed[0] / "steps.jsonl")
    assert [(step["step"], step["loss"]) for step in ours] == [(step["step"], step["loss"]) for step in theirs]


def test_an_interrupted_run_continues(undisturbed, shards, tmp_path):
    """A run folder as a killed driver leaves it: an older checkpoint, a damaged newer one, a line half written."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    (out / "summary.json").unlink()
    kept = list_checkpoints(out / "checkpoints")
    for newer in kept[1:]:
        (newer / "weights.safetensors").write_bytes(b"damaged")
    text = (out / "steps.jsonl").read_text().splitlines(keepends=True)
    (out / "steps.jsonl").write_text("".join(text[:10]) + text[10][:20])
    summary = train(config(shards, out))
    assert summary["resumed_from"] == str(kept[0])
    assert summary["state_sha256"] == undisturbed[1]["state_sha256"]
    assert [step["step"] for step in lines(out / "steps.jsonl")] == list(range(12))


def test_bad_input_in_a_worker_ends_the_run(shards, tmp_path):
    """A shard damaged where only reading tells: no endless restarts, the reason is said, nothing looks complete."""
    private, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, private)
    part = private / "part-00000.arrow"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    with pytest.raises(BadInput, match="Arrow"):
        train(config(private, out, feed=FeedConfig(kind="direct")))
    assert [event["event"] for event in lines(out / "events.jsonl")] == ["start", "group", "ready", "failure", "gave_up"]
    assert not (out / "summary.json").exists()

"""Training through Ray Train: a killed worker changes nothing, a finished run is not repeated, another one is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
from filelock import FileLock
from prometheus_client.parser import text_string_to_metric_families

from raysegment.applications.report import report
from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import list_checkpoints, read_checkpoint
from raysegment.elastic.keeper import forget, memory_folder
from raysegment.elastic.runs import Run
from raysegment.elastic.safe import state_sha256
from raysegment.elastic.settings import ElasticConfig, ValidationConfig
from raysegment.elastic.telemetry import METRICS
from raysegment.elastic.train import train
from raysegment.feed.stream import FeedConfig
from tests.members import wait_for
from tests.small_training import config, spoil, write_shards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """One worker, nothing happens, tiles read in place."""
    out = tmp_path_factory.mktemp("undisturbed")
    heard = []
    validation = ValidationConfig(str(shards), every_steps=6)
    asked = config(shards, out, name="watched", feed=FeedConfig(kind="direct"), validation=validation)
    summary = train(asked, lambda *news: heard.append(news))
    return out, summary, heard


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_all_it_should(undisturbed, shards, tmp_path):
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
    begun = next(event for event in lines(out / "events.jsonl") if event["event"] == "start")
    assert (begun["seed"], begun["manifest_sha256"]) == (3, checkpoint.facts.provenance["manifest_sha256"])
    assert report(out, tmp_path / "page.html")["masks"] == 1, "tiles as the checkpoint labels them"


def test_every_metric_is_exported(undisturbed):
    """Those of the dashboard, as Prometheus would read them from the node's agent, with the values of the run's log.

    Soon after the run: agents forget what nobody says again.
    """
    found = wait_for(lambda: exported({metric.exported_name for metric in METRICS}, 72), "all metrics at the end's cursor")
    last = lines(undisturbed[0] / "steps.jsonl")[-1]
    assert found["ray_raysegment_loss", ""] == pytest.approx(last["loss"])
    assert found["ray_raysegment_time_share", "compute"] > 0
    assert found["ray_raysegment_flops_per_second", "peak"] >= found["ray_raysegment_flops_per_second", "sustained"] > 0
    assert 0 <= found["ray_raysegment_iou", "background"] <= 1
    assert found["ray_raysegment_restarts", ""] == 0


def exported(expected: set[str], cursor: int) -> dict[tuple[str, str], float] | None:
    """Values of the run `watched` by name and tag (class, cause or figure), as soon as all are there and up to date.

    Ray sends what is told to an agent every few seconds: what is read may be a step of some seconds before.
    """
    (node,) = ray.nodes()
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == "watched"]
    tags = ("class", "cause", "figure")
    found = {(each.name, "".join(each.labels.get(tag, "") for tag in tags)): each.value for each in samples}
    complete = expected <= {name for name, _ in found}
    return found if complete and found["ray_raysegment_cursor", ""] == cursor else None


def test_a_finished_run_is_returned_and_another_refused(undisturbed, shards, tmp_path):
    out, summary, _ = undisturbed
    before = (out / "events.jsonl").read_bytes()
    again = train(config(shards, out, workers=2, feed=FeedConfig()))
    assert again["state_sha256"] == summary["state_sha256"]
    assert (out / "events.jsonl").read_bytes() == before, "nothing has been started"
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
    assert ready[0]["step"] == 0
    assert 6 <= ready[-1]["step"] <= 7  # from the node's memory: at most one snapshot back
    assert summary["faults"] >= 1
    assert summary["tiles_repeated"] == summary["tiles_missing"] == 0
    assert summary["state_sha256"] == undisturbed[1]["state_sha256"]
    ours, theirs = lines(tmp_path / "run" / "steps.jsonl"), lines(undisturbed[0] / "steps.jsonl")
    assert [(step["step"], step["loss"]) for step in ours] == [(step["step"], step["loss"]) for step in theirs]


def test_cells_without_room_wait_and_do_not_hold_up_the_end(undisturbed, shards, tmp_path):
    """Up to three cells, two of which have room and must be there, one of them killed: the other waits for it and says so."""
    elastic = ElasticConfig(cells=(2, 3), workers_per_cell=1)
    summary = train(config(shards, tmp_path / "run", cpus_per_worker=1, elastic=elastic, chaos="kill@step=7,member=1"))
    events = lines(tmp_path / "run" / "events.jsonl")
    assert [event["fault"] for event in events if event["event"] == "fault"] == ["kill@step=7,member=1"]
    generations = [sorted(event["cell"]) for event in events if event["event"] == "generation"]
    assert len(generations) >= 2
    assert all(len(set(cells)) == 2 for cells in generations)
    driven = {event["cell"] for event in events if event["event"] == "cell" and event["what"] == "driven"}
    assert driven == {0, 1, 2}, "the third waits for room"
    assert "member" in next(event["why"] for event in events if event["event"] == "waits")
    assert summary["state_sha256"] == undisturbed[1]["state_sha256"]
    assert summary["tiles_repeated"] == summary["tiles_missing"] == 0


def test_an_interrupted_run_continues(undisturbed, shards, tmp_path):
    """A run folder as a killed driver leaves it: an older checkpoint, a damaged newer one, a line half written, Ray's own
    record of its checkpoints cut off."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed[0], out)
    (out / "summary.json").unlink()
    kept = list_checkpoints(out / "checkpoints")
    forget(memory_folder(), Run(out).key)  # the node is another one
    for newer in kept[1:]:
        (newer / "weights.safetensors").write_bytes(b"damaged")
    snapshots = list((out / "ray").rglob("checkpoint_manager_snapshot.json"))
    assert snapshots, "Ray Train has kept none"
    for snapshot in snapshots:
        snapshot.write_bytes(snapshot.read_bytes()[:20])
    text = (out / "steps.jsonl").read_text().splitlines(keepends=True)
    (out / "steps.jsonl").write_text("".join(text[:10]) + text[10][:20])
    summary = train(config(shards, out))
    assert summary["resumed_from"] == str(kept[0])
    assert summary["state_sha256"] == undisturbed[1]["state_sha256"]
    assert [step["step"] for step in lines(out / "steps.jsonl")] == list(range(12))


def test_bad_input_in_a_worker_ends_the_run(shards, tmp_path):
    """A tile damaged, in strict mode: no endless restarts, the reason is said, nothing looks complete."""
    private, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, private)
    spoil(private, 4)
    with pytest.raises(BadInput, match=r"at most 0 damaged tiles, got 1 of 11 .*part-00000\.arrow: tile 4"):
        train(config(private, out, feed=FeedConfig(kind="direct", max_damaged=0)))
    happened = [event["event"] for event in lines(out / "events.jsonl")]
    assert [event for event in happened if event in ("start", "ready", "failure", "gave_up")] == [
        "start", "ready", "failure", "gave_up",
    ]  # fmt: skip
    assert not (out / "summary.json").exists()


def train_without_a_tile(shards: Path, out: Path, **changes) -> dict:
    """The summary of a run on shards whose tile 4 is damaged, after a look at what it says about that."""
    summary = train(config(shards, out, **changes))
    cases = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines() if line]
    assert {case["tile"] for case in cases} == {4}
    order = config(shards, out).order(Manifest.load(shards))
    missed = sum(order.tile(position) == 4 for position in range(12 * 6))
    assert summary["quarantined"] == missed
    assert summary["samples"] == 12 * 6 - missed
    return summary


@pytest.mark.slow
def test_without_a_damaged_tile_any_group_learns_the_same(shards, tmp_path):
    """Two workers, one of them killed, and one alone: the same weights, the same positions left out."""
    shutil.copytree(shards, tmp_path / "shards")
    spoil(tmp_path / "shards", 4)
    one = train_without_a_tile(tmp_path / "shards", tmp_path / "one")
    two = train_without_a_tile(tmp_path / "shards", tmp_path / "two", workers=2, chaos="kill@step=7,member=1")
    assert two["faults_survived"] >= 1
    assert one["state_sha256"] == two["state_sha256"]


@pytest.mark.slow
def test_a_straggler_is_named_ejected_and_replaced(shards, tmp_path):
    """Of two cells one becomes six times slower: its process is replaced, and the bits are those of one cell alone."""
    alone = train(config(shards, tmp_path / "alone", steps=900, cpus_per_worker=1))
    elastic = ElasticConfig(cells=(1, 2), workers_per_cell=1, eject_stragglers=True)
    slow = "slow@step=150,member=0,factor=6"
    summary = train(config(shards, tmp_path / "run", steps=900, cpus_per_worker=1, elastic=elastic, chaos=slow))
    events = lines(tmp_path / "run" / "events.jsonl")
    assert [event["fault"] for event in events if event["event"] == "fault"] == [slow]
    named = next(event for event in events if event["event"] == "straggler")
    assert named["ejected"]
    assert named["factor"] > 3
    assert named["cause"] == "compute"
    after = events[events.index(named) :]
    assert named["member"] in [event["member"] for event in after if event["event"] == "lost"]
    sizes = [len(event["members"]) for event in after if event["event"] == "generation"]
    assert sizes[0] == 1, "the other goes on alone"
    assert summary["state_sha256"] == alone["state_sha256"]


def test_a_second_fleet_on_the_same_folder_is_refused(shards, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "fleet.lock"), pytest.raises(BadInput, match="no other fleet works on"):
        train(config(shards, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fleet.lock"]


def test_more_missing_than_a_run_bears_is_said_at_once(shards, tmp_path):
    private, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, private)
    (private / "part-00000.arrow").unlink()
    with pytest.raises(BadInput, match=r"no such file.*11 of 11 tiles are missing, feed\.max_damaged allows 1"):
        train(config(private, out))
    with pytest.raises(BadInput, match="without credentials"):
        train(replace(config(private, out), shards="s3://key:secret@bucket/shards"))
    assert not out.exists()

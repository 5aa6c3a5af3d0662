"""The run folder's files: each step once, nothing half-written is believed, hopeless runs end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic.chaos import Fault, Plan
from raysegment.elastic.checkpoints import Facts
from raysegment.elastic.runs import CAUSES, Run, StepLog, last_step, read_lines, summarise
from raysegment.elastic.safe import check_same
from raysegment.elastic.settings import TrainConfig, identity, plain
from raysegment.elastic.verdict import Verdict
from raysegment.learning.augment import AugmentConfig
from tests.small_training import config, write_shards


def test_a_step_is_logged_once(tmp_path):
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    for step in range(5):
        log.offer(step, {"loss": float("nan") if step == 2 else 1.0})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    log = StepLog(path)
    assert log.high_water == 4
    for step in range(3, 8):
        log.offer(step, {"loss": 2.0})
    log.close()
    steps, end = read_lines(path)
    assert [step["step"] for step in steps] == list(range(8))
    assert [step["loss"] for step in steps] == [1.0, 1.0, None, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert end == path.stat().st_size
    assert last_step(path) == 7
    log = StepLog(path)
    log.offer(9, {})  # before the one it follows
    assert last_step(path) == 7
    log.offer(8, {})
    assert last_step(path) == 9


@given(st.binary(max_size=80), st.integers(0, 80))
def test_a_reader_takes_whole_lines_only(tmp_path_factory, tail, offset):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n' + tail.replace(b"\n", b""))
    assert read_lines(path) == ([{"step": 0}, {"step": 1}], 24)
    assert last_step(path) == 1


def verdict(*events: str) -> bool:
    """Whether a run to which this has happened is hopeless, with patience for three failures in a row."""
    judge = Verdict(3)
    for event in events:
        if event == "step":
            judge.progress()
        elif event == "lost":
            judge.loss()
        else:
            judge.failure({"error": event, "lasting": event != "passing", "bad_input": ["x"] if event == "input" else None})
    return judge.hopeless


def test_hopeless_runs_end():
    assert verdict("input")  # no second try
    assert verdict("code", "lost", "code")
    assert not verdict("code", "step", "code")
    assert not verdict("passing", "passing")
    assert verdict("passing", "lost", "passing", "lost", "passing")
    assert not verdict(*["lost"] * 11)
    assert verdict(*["lost"] * 12)
    assert not verdict(*["lost"] * 11, "step", "lost")
    judge = Verdict(3)
    judge.failure({"error": "a peer is gone", "lasting": False, "bad_input": None})
    judge.failure({"error": "NameError", "lasting": True, "bad_input": None})
    judge.failure({"error": "a peer is gone", "lasting": False, "bad_input": None})
    assert judge.cause is not None
    assert judge.cause["error"] == "NameError"


def test_the_summary_adds_up():
    causes = dict.fromkeys(CAUSES, 0.1)
    steps = [{"step": k, "loss": 10.0 - k, "samples": 4, "step_s": 1.0 + k, "skipped": False, **causes} for k in range(8)]
    summary = summarise(steps, 1e9)
    assert summary["samples_per_s"] == 32 / 36
    assert (summary["loss_first"], summary["loss_last"]) == (9.5, 3.5)
    assert summary["flop_s"]["peak"] == 4e9
    assert summary["step_s"]["p16"] < summary["step_s"]["median"] < summary["step_s"]["p84"]
    assert summary["time_shares"]["compute"] == pytest.approx(0.8 / 36)
    assert sum(summary["time_shares"].values()) == pytest.approx(1.0)


def test_the_summary_counts_what_was_learnt_from():
    """Steps of 1 s with 4, 0 and 2 tiles of 4; the first line is of a version without quarantine."""
    lines = [{"step": 0, "samples": 4}, {"step": 1, "samples": 0, "quarantined": 4}, {"step": 2, "samples": 2, "quarantined": 2}]
    rest = {"loss": 1.0, "step_s": 1.0, "skipped": False, **dict.fromkeys(CAUSES, 0.1)}
    summary = summarise([{**rest, **line} for line in lines], 1e9)
    assert (summary["samples"], summary["quarantined"], summary["samples_per_s"]) == (6, 6, 2.0)
    assert (summary["flop_s"]["peak"], summary["flop_s"]["p16"]) == (4e9, 2e9)
    nothing = summarise([{**rest, **lines[1], "loss": None}], 1e9)
    assert (nothing["samples_per_s"], nothing["flop_s"]["sustained"]) == (0.0, 0.0)


def test_a_folder_stays_the_runs_until_it_is_gone_or_anothers(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    key = run.key
    assert run.is_still(key)
    with monkeypatch.context() as away:
        away.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        assert run.is_still(key)
    run.folder.rename(tmp_path / "elsewhere")
    assert not run.is_still(key)
    run.folder.mkdir()
    assert run.key != key
    assert not run.is_still(key)


def test_another_configuration_is_refused_by_name(tmp_path):
    run = Run(tmp_path)
    one = config(tmp_path / "shards", tmp_path)
    run.prepare(one)
    run.prepare(config(tmp_path / "elsewhere", tmp_path, workers=3, chaos="kill@step=1"))
    with pytest.raises(BadInput, match=r"learn\.seed \(3 there, 0 now\)"):
        run.prepare(TrainConfig(**{**one.__dict__, "learn": TrainConfig().learn}))
    saving = replace(one, learn=replace(one.learn, checkpointing=True))
    run.prepare(saving)  # changes no bit of the result
    assert identity(plain(one)) == identity(one) == identity(json.loads(json.dumps(plain(one))))


def test_steps_follow_from_epochs_and_the_schedule_from_steps(tmp_path):
    manifest = Manifest.load(write_shards(tmp_path / "s"))
    resolved = config(tmp_path / "s", tmp_path, steps=0, epochs=2).resolved(manifest)
    assert resolved.steps == 4  # 22 tiles, 6 a step
    assert resolved.learn.optim.total_steps == 4
    assert resolved.resolved(manifest) == resolved
    with pytest.raises(BadInput, match="total_steps"):
        TrainConfig(**{**resolved.__dict__, "steps": 5}).resolved(manifest)


def test_a_window_is_whole_shards_and_part_of_what_a_run_is(tmp_path):
    manifest = Manifest.load(write_shards(tmp_path / "s"))  # one shard of eleven tiles
    one = config(tmp_path / "s", tmp_path)
    orders = [replace(one, window_tiles=tiles).order(manifest) for tiles in (0, 5, 30)]
    assert [(order.window, order.block) for order in orders] == [(0, 1), (11, 11), (22, 11)]
    assert orders[0].tile(3) != orders[1].tile(3) or orders[0].tile(4) != orders[1].tile(4)
    assert identity(replace(one, window_tiles=5)) != identity(one)
    with pytest.raises(ValueError, match="window_tiles"):
        replace(one, window_tiles=-1)


@pytest.mark.parametrize("periodic", [True, False])
def test_only_tiles_that_close_the_circle_are_rolled(tmp_path, periodic):
    write_shards(tmp_path / "s")
    manifest = replace(Manifest.load(tmp_path / "s"), periodic=periodic)
    asked = config(tmp_path / "s", tmp_path)
    asked = replace(asked, learn=replace(asked.learn, augment=AugmentConfig(roll=True, mirror=True)))
    assert asked.resolved(manifest).learn.augment == AugmentConfig(roll=periodic, mirror=True)


def test_tiles_must_fit_the_network(tmp_path):
    manifest = Manifest.load(write_shards(tmp_path / "s"))
    with pytest.raises(BadInput, match="divide by the network"):
        TrainConfig(shards=str(tmp_path / "s"), steps=1).resolved(Manifest(**{**manifest.__dict__, "tile": (8, 64)}))


def test_faults_are_read_and_fire_once(tmp_path, monkeypatch):
    plan = Plan.parse("kill@step=12,member=1; kill@step=3")
    assert plan.faults == (Fault("kill", 12, 1), Fault("kill", 3, 0))
    fired, killed = [], []
    monkeypatch.setattr("os.kill", lambda *how: killed.append(how))
    for _ in range(2):
        for step in range(20):
            for member in range(2):
                plan.fire(step, member, tmp_path / "chaos", fired.append)
    assert fired == [Fault("kill", 3, 0), Fault("kill", 12, 1)]
    assert len(killed) == 2
    for bad in ("kill", "kill@step=x", "burn@step=1", "kill@member=1", "kill@step=-1", "kill@step=1,rank=2"):
        with pytest.raises(ValueError, match="faults like"):
            Plan.parse(bad)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"steps": -1}, {"device": "tpu"}, {"epochs": 0}, {"max_fruitless": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        TrainConfig(**bad)


def test_a_checkpoint_of_another_network_batch_or_set_is_refused_by_name(tmp_path):
    shards = write_shards(tmp_path / "shards")
    asked = config(shards, tmp_path / "run")
    before = asked.resolved(Manifest.load(shards))
    said = {"manifest_sha256": set_id(manifest_bytes(shards)), "config": plain(before)}
    moments = (1.0,) * 16
    facts = Facts(6, 36, before.network, NAMES, moments, moments, (1.0, 1.0), ("a", "b", "c"), said)
    check_same(facts, before, "here")
    batch = replace(before, learn=replace(before.learn, global_batch=12))
    with pytest.raises(BadInput, match=r"here: .*learn\.global_batch \(6 there, 12 now\)"):
        check_same(facts, batch, "here")
    wider = replace(before, network=replace(before.network, tiramisu=replace(before.network.tiramisu, growth=8)))
    with pytest.raises(BadInput, match=r"network\.tiramisu\.growth \(4 there, 8 now\)"):
        check_same(facts, wider, "here")
    with pytest.raises(BadInput, match="shards that the run began with"):
        check_same(facts, replace(before, shards=str(write_shards(tmp_path / "other", 9))), "here")

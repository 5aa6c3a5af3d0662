"""Training by members that die and come: the same weights bit for bit, every step once in the log."""

from __future__ import annotations

import json
import shutil

import pytest

from raysegment.archive.manifest import Manifest
from raysegment.elastic.checkpoints import newest_valid, read_checkpoint
from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.settings import CheckpointConfig, ElasticConfig, ValidationConfig
from raysegment.feed.quarantine import FILE
from raysegment.feed.stream import FeedConfig
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import LearnConfig
from tests.ledger import read
from tests.small_training import config, spoil, write_shards
from tests.training_members import TrainingFleet, alone


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def settings(shards, out, **changes):
    """Twelve steps by up to five members, one second patient, no Ray in the feed."""
    common = dict(
        elastic=ElasticConfig((1, 5), 1, patience_s=1.0),
        feed=FeedConfig(kind="direct"),
        checkpoint=CheckpointConfig(every_steps=4),
    )
    return config(shards, out, **{**common, **changes})


def state(fleet):
    """SHA-256 of everything, by the last checkpoint; and what the log says of every step."""
    facts = read_checkpoint(fleet.run.folder).facts
    assert facts.step == fleet.config.steps
    lines = [json.loads(line) for line in fleet.run.steps.read_text().splitlines()]
    return facts.provenance["state_sha256"], [(line["step"], line["tiles"], line["loss"], line["grad_norm"]) for line in lines]


def test_any_number_of_members_gives_the_same_bits(shards, tmp_path):
    states = [state(alone(settings(shards, ""), tmp_path / str(members), members)) for members in (1, 2, 5)]
    assert states[0] == states[1] == states[2]


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """State and log of the same run by one member, by what is changed in the settings."""
    known = {}

    def of(**changes):
        key = repr(changes)
        if key not in known:
            known[key] = state(alone(settings(shards, "", **changes), tmp_path_factory.mktemp("alone")))
        return known[key]

    return of


def disturbed(config, schedule):
    """The ended fleet of a run with `schedule(fleet)` happening to it; all its members have ended well or were killed."""
    fleet = TrainingFleet(config)
    try:
        schedule(fleet)
        fleet.wait()
    finally:
        fleet.end()
    assert set(fleet.exit_codes().values()) <= {0, -9}, fleet.exit_codes()
    return fleet


def members_at(fleet, count):
    """Wait until a generation of so many members is training."""
    fleet.wait(lambda: any(len(event["members"]) == count for event in fleet.events("generation")))


def up_and_down(fleet):
    """4 → 3 → 1 → 2 → 4 members, by kills between and within steps and by members that join."""
    fleet.add(4)
    members_at(fleet, 4)
    fleet.wait(lambda: fleet.steps() >= 3)
    fleet.kill(fleet.living[0])
    members_at(fleet, 3)
    fleet.kill(fleet.living[1])
    fleet.kill(fleet.living[0])
    members_at(fleet, 1)
    fleet.add(1)
    members_at(fleet, 2)
    before = len(fleet.events("generation"))
    fleet.add(2)
    fleet.wait(lambda: any(len(event["members"]) == 4 for event in fleet.events("generation")[before:]))


LONG = dict(steps=60, checkpoint=CheckpointConfig(every_steps=20))
RECIPES = {
    "sgd": LearnConfig(6, 2, "fp32", optim=OptimConfig("sgd", lr=1e-2, larc=True, ema=0.9), seed=3),
    "lag 1, bf16": LearnConfig(6, 2, "bf16", lag=1, optim=OptimConfig("adamw", lr=1e-2, larc=True), seed=3),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_members_that_die_and_come_change_nothing(shards, tmp_path, undisturbed, recipe):
    changes = dict(learn=RECIPES[recipe], **LONG)
    fleet = disturbed(settings(shards, tmp_path, **changes), up_and_down)
    assert state(fleet) == undisturbed(**changes)
    ledger = read(fleet.run.steps, 6, 60, tiles=11)
    assert ledger.clean, ledger.problems
    assert len(fleet.events("lost")) >= 3


OTHERS = [pytest.param(at, marks=pytest.mark.slow) for at in ("step", "commit", "validation")]
PLACES = ["exchange", "checkpoint", "join", *OTHERS]


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_anywhere_changes_nothing(shards, tmp_path, undisturbed, place):
    """The first member (who writes) is killed at that place; another one comes; the fault is seen to have fired."""
    changes = dict(LONG, validation=ValidationConfig(str(shards), every_steps=25))
    chaos = f"kill@step=25,member=0,at={place}".replace("25", "1" if place == "join" else "25")

    def schedule(fleet):
        fleet.add(2)
        members_at(fleet, 2)
        if place == "join":
            fleet.wait(lambda: fleet.steps() >= 1)
            fleet.add(1)
        fleet.wait(lambda: fleet.events("lost"))
        fleet.add(1)

    fleet = disturbed(settings(shards, tmp_path, chaos=chaos, **changes), schedule)
    assert [event["fault"] for event in fleet.events("fault")] == [chaos.replace(",at=step", "")]
    assert state(fleet) == undisturbed(**changes)
    found = {event["step"]: event["iou"] for event in fleet.events("validation")}
    assert sorted(found) == [25, 50]


@pytest.mark.parametrize("recipe", [pytest.param("sgd", marks=pytest.mark.slow), "lag 1, bf16"])
def test_members_meet_again_where_a_state_has_just_been_validated(shards, tmp_path, undisturbed, recipe):
    """Who joins there has not validated it, who stays has: all must do the same, or they take one's sums for another's."""
    held_out = write_shards(tmp_path / "held_out", 3)
    changes = dict(LONG, learn=RECIPES[recipe], validation=ValidationConfig(str(held_out), every_steps=1))
    fleet = disturbed(settings(shards, tmp_path / "run", **changes), up_and_down)
    assert state(fleet) == undisturbed(**changes)
    assert sorted({event["step"] for event in fleet.events("validation")}) == list(range(1, 61))
    assert {20, 40} & {event["step"] for event in fleet.events("checkpoint")}, "files are written in between, too"


def test_a_run_whose_folder_another_run_has_taken_ends_and_leaves_nothing_there(shards, tmp_path):
    fleet = TrainingFleet(settings(shards, tmp_path / "run", steps=5000))
    other = Run(fleet.run.folder)
    try:
        fleet.add(2)
        fleet.wait(lambda: fleet.events("checkpoint"))
        other.folder.rename(tmp_path / "elsewhere")
        other.prepare(fleet.config)
        assert other.key != json.loads((tmp_path / "elsewhere" / "run.json").read_text())["id"]
        fleet.wait()
    finally:
        fleet.end()
    assert newest_valid(fleet.config.checkpoint_place) is None
    assert len(Run(tmp_path / "elsewhere").steps.read_bytes().splitlines()) < 5000


def test_members_go_on_without_a_damaged_tile(shards, tmp_path):
    """Two members, one of whom is killed, and one alone learn the same; what is left out are the tile's positions, all."""
    shutil.copytree(shards, tmp_path / "shards")
    spoil(tmp_path / "shards", 4)
    asked = settings(tmp_path / "shards", tmp_path / "run", chaos="kill@step=7,member=1", **LONG)
    fleet = disturbed(asked, lambda fleet: fleet.add(2))
    assert [event["fault"] for event in fleet.events("fault")] == [asked.chaos]
    assert state(fleet) == state(alone(asked, tmp_path / "alone"))
    cases = [json.loads(line) for line in (fleet.run.folder / FILE).read_text().splitlines() if line]
    assert {case["tile"] for case in cases} == {4}
    order, steps = asked.order(Manifest.load(shards)), read_lines(fleet.run.steps)[0]
    missed = [sum(order.tile(position) == 4 for position in range(6 * step, 6 * step + 6)) for step in range(60)]
    assert [(step["quarantined"], step["samples"]) for step in steps] == [(count, 6 - count) for count in missed]
    assert sum(missed) > 20


def always(members):
    """A schedule that brings a new member for each that dies, until training is over."""

    def schedule(fleet):
        def topped_up():
            missing = members - len(fleet.living)
            if missing and fleet.steps() < fleet.config.steps:
                fleet.add(missing)
            return fleet.steps() == fleet.config.steps

        fleet.wait(topped_up, 3600)

    return schedule


@pytest.mark.parametrize(
    ("steps", "kills"), [(150, 3), pytest.param(3000, 500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_random_kills_leave_every_position_once(shards, tmp_path, undisturbed, steps, kills):
    changes = dict(steps=steps, checkpoint=CheckpointConfig(every_steps=20))
    chaos = "seed=7,every=0.8s,kinds=kill"
    fleet = disturbed(settings(shards, tmp_path, chaos=chaos, **changes), always(4))
    assert len(fleet.events("fault")) >= kills
    assert len(fleet.events("lost")) >= kills
    ledger = read(fleet.run.steps, 6, steps, tiles=11)
    assert ledger.clean, ledger.problems
    assert state(fleet) == undisturbed(**changes)

"""What a campaign decides without running anything: its space, what fits, what is tried next, what it reads and recalls."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.applications.campaign.admission import DRIVER_BYTES, Demand, Node, admit, driver_bytes
from raysegment.applications.campaign.engine import run_campaign
from raysegment.applications.campaign.journal import Journal, Record, find_trial
from raysegment.applications.campaign.live import Screen, watching
from raysegment.applications.campaign.measures import WORST, read, recent_loss
from raysegment.applications.campaign.pictures import short, smooth
from raysegment.applications.campaign.proposals import propose
from raysegment.applications.campaign.results import Confirmed
from raysegment.applications.campaign.schedulers import make_scheduler
from raysegment.applications.campaign.space import Dimension, changes, check_extends, load_campaign
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.console import Console
from raysegment.elastic.settings import plain
from tests.campaigns import SMALL, campaign, campaign_mapping
from tests.helpers import ROOT
from tests.small_training import write_shards

GIB = 2**30
TRIAL = {"trial": "search-000", "phase": "search", "number": 0, "point": {"learn.optim.lr": 1e-5}, "seed": None}

# ---------------------------------------------------------------- the file


def test_wrong_keys_and_bounds_are_refused_before_anything_starts(tmp_path):
    shards = write_shards(tmp_path / "s")
    with pytest.raises(BadInput, match=r"Did you mean `learn\.optim\.lr`"):
        run_campaign(campaign(tmp_path / "c", shards, search={"learn.optim.lrr": [1, 2]}))
    with pytest.raises(BadInput, match="micro_batch"):
        run_campaign(campaign(tmp_path / "c", shards, search={"learn.global_batch": [4, 5, 8]}))
    with pytest.raises(BadInput, match="lower"):
        campaign(tmp_path / "c", shards, search={"learn.optim.lr": {"log": [1, 0.1]}}, searcher="random").dimensions  # noqa: B018
    with pytest.raises(BadInput, match="manifest"):
        run_campaign(campaign(tmp_path / "c", tmp_path))
    often = {**SMALL, "shards": str(shards), "validation": {"shards": str(shards), "every_steps": 7}}
    with pytest.raises(BadInput, match="validation at least as often"):
        run_campaign(campaign(tmp_path / "c", shards, train=often, metric="mean_iou"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("wrong", "message"), [
    ({"searcher": "guess"}, "expected one of random"),
    ({"scheduler": "x"}, "expected one of asha, median, hyperband, pbt, fifo"),
    ({"trials": 0}, "trials >= 1"),
    ({"search": {}}, "at least one key"),
    ({"search": {"learn.optim.lr": {"choice": []}}}, "a list"),
    ({"grace": 0.0}, "grace"),
    ({"tirals": 3}, "Did you mean `trials`"),
    ({"metric": "mean_iuo", "searcher": "random"}, "Did you mean `mean_iou`"),
    ({"metric": "mean_iou"}, "no tiles to validate on"),
    ({"metric": "seconds_to_iou"}, "target"),
    ({"base": "nowhere"}, "a YAML configuration file"),
    ({"scheduler": "pbt", "searcher": "random", "search": {"network.tiramisu.first": [8, 16]}}, "mid-training"),
    ({"scheduler": "pbt", "search": {"learn.optim.optimizer": ["sgd", "adamw"]}}, "mid-training"),
    ({"scheduler": "pbt", "searcher": "optuna", "search": {"learn.optim.lr": {"log": [1e-4, 1]}}}, "proposes by itself"),
    ({"train": {"out": "x"}}, "every trial has its own"),
])  # fmt: skip
def test_impossible_campaigns_are_refused(tmp_path, wrong: dict[str, Any], message: str):
    with pytest.raises(BadInput, match=message):
        run_campaign(campaign(tmp_path / "c", write_shards(tmp_path / "s"), **wrong))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("spec", [{"log": [0, 1]}, {"uniform": [1]}, {"guess": [1, 2]}, 3, {"choice": []}, {"log": ["a", "b"]}])
def test_dimensions_that_mean_nothing_are_refused(spec):
    with pytest.raises(BadInput, match=r"search\.learn\.seed"):
        Dimension.parse("learn.seed", spec)


def test_dimensions_read_numbers_as_yaml_writes_them():
    assert Dimension.parse("a", yaml.safe_load("log: [1e-4, 1e-1]")).values == (1e-4, 1e-1)
    assert Dimension.parse("a", [True, "x", 2]) == Dimension("a", "choice", (True, "x", 2))


def test_a_trial_is_its_values_and_nothing_else(tmp_path):
    ours = campaign(tmp_path / "c", tmp_path / "s")
    one, two = ours.trial({"learn.optim.lr": 1e-3}), ours.trial({"learn.optim.lr": 2e-3})
    assert one == ours.trial({"learn.optim.lr": 1e-3})
    assert one.learn.optim.lr == 1e-3
    assert one.out != two.out


def test_a_scale_is_set_over_the_file_and_the_command_line_over_both(tmp_path):
    path = tmp_path / "c.yaml"
    scales = {
        "laptop": {"trials": 3, "train": {"steps": 7}},
        "cluster": {"trials": 90, "search": {"learn.optim.lr": {"log": [1e-4, 1.0]}}, "searcher": "random"},
    }
    path.write_text(yaml.safe_dump(campaign_mapping(tmp_path, tmp_path, scale="laptop", scales=scales)))
    assert (load_campaign(path).trials, load_campaign(path).train["steps"]) == (3, 7)
    large = load_campaign(path, ["scale=cluster", "trials=80"])
    assert (large.trials, large.train["steps"], large.dimensions[0].kind) == (80, 10, "log")
    with pytest.raises(BadInput, match="one of cluster, laptop"):
        load_campaign(path, ["scale=moon"])


@pytest.mark.parametrize("scale", ["laptop", "cluster"])
@pytest.mark.parametrize(
    "path", sorted(p for p in (ROOT / "tune").glob("*.yaml") if "search:" in p.read_text()), ids=lambda path: path.stem
)
def test_shipped_campaigns_can_be_read(path: Path, scale: str):
    own = ["train.shards=s", "train.validation.shards=v"] if scale == "cluster" else []
    ours = load_campaign(path, [f"scale={scale}", *own])
    assert ours.question
    assert all(ours.trial(point).learn.global_batch for point in ours.corners())


def test_a_changed_space_is_refused_with_the_difference_and_may_be_extended(tmp_path):
    before = plain(campaign(tmp_path / "c", tmp_path))
    wider = campaign(tmp_path / "c", tmp_path, search={"learn.optim.lr": [1e-5, 1e-2, 1e-1]}, trials=9)
    assert changes(before, campaign(tmp_path / "c", tmp_path, at_once=2, confirm_seeds=1)) == []
    assert changes(before, wider) == [
        "search.learn.optim.lr ([1e-05, 0.01] there, [1e-05, 0.01, 0.1] now)", "trials (8 there, 9 now)"
    ]  # fmt: skip
    check_extends(before, wider)
    for other in ({"search": {"learn.optim.lr": [1e-5]}}, {"search": {"learn.lag": [0, 1]}}, {"trials": 3}, {"seed": 5}):
        with pytest.raises(BadInput, match="further values or wider ranges"):
            check_extends(before, campaign(tmp_path / "c", tmp_path, **other))


# ---------------------------------------------------------------- what fits


def test_whole_groups_of_workers_are_admitted():
    two = [Node(2, 0, 16 * GIB)]
    assert admit([Demand(1, 1)], two).at_once == 2
    assert admit([Demand(2, 1)], two).at_once == 1
    assert admit([Demand(1, 1), Demand(2, 1)], two).at_once == 1
    assert admit([Demand(1, 0.5)], two, wanted=3).at_once == 3
    assert admit([Demand(1, 1)], [Node(2, 0, 1.5 * DRIVER_BYTES)]).at_once == 1
    assert admit([Demand(8, 1, 1)], [Node(64, 8, 200 * GIB)] * 250).at_once == 250
    assert Demand(3, 1, together=True).fit([Node(4, 0, GIB)] * 2) == 2
    assert Demand(3, 1).fit([Node(4, 0, GIB)] * 3) == 4


@pytest.mark.parametrize(("demand", "message"), [
    (Demand(4, 1), "2 workers of 1 CPU fit.*train.workers=2 or train.cpus_per_worker=0.5"),
    (Demand(1, 1, 1), "0 GPU.*a larger cluster"),
])  # fmt: skip
def test_what_can_never_be_scheduled_is_refused_with_what_would_fit(demand: Demand, message: str):
    with pytest.raises(BadInput, match=message):
        admit([demand], [Node(2, 0, 16 * GIB)])


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 12))
def test_reserved_memory_bounds_the_drivers(memories: list[int], at_once: int):
    """The least reservation of which at most so many fit, found by trying all."""
    memories = [30 * memory for memory in memories]
    found = driver_bytes(memories, at_once)
    fitting = [b for b in range(1, max(memories) + 1) if sum(memory // b for memory in memories) <= at_once]
    if fitting:
        assert sum(memory // found for memory in memories) == sum(memory // min(fitting) for memory in memories) <= at_once
    if len(set(memories)) == 1 and at_once % len(memories) == 0:
        assert sum(memory // found for memory in memories) == at_once


# ---------------------------------------------------------------- journal, proposals


def test_a_journal_survives_a_line_cut_short(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.write("session")
    journal.write("proposed", **TRIAL)
    journal.write("added", trial="search-000", tune="abc", told=0)
    journal.write("report", trial="search-000", k=3, step=6, value=math.nan, segment=0)
    journal.close()
    with (tmp_path / "j").open("a") as file:
        file.write('{"event": "ended", "tri')
    again = Journal(tmp_path / "j")
    again.write("ended", trial="search-000", status="stopped", reason="why")
    again.write("ended", trial="search-000", status="finished", reason="")  # a trial ends once
    record = again.records["search-000"]
    assert (record.told, record.status, record.reason, record.sessions) == (3, "stopped", "why", [1])
    assert find_trial(tmp_path / "j", "abc")[0]["point"] == TRIAL["point"]
    assert [json.loads(line)["event"] for line in (tmp_path / "j").read_text().splitlines()][-3:] == ["report", "ended", "ended"]


def test_proposals_depend_on_nothing_but_number_and_what_is_known(tmp_path):
    ranges = {"search": {"learn.optim.lr": {"log": [1e-5, 1.0]}, "learn.lag": [0, 1]}, "searcher": "random"}
    ours = campaign(tmp_path, tmp_path, **ranges)
    points = [propose(ours, number, []) for number in range(40)]
    assert points == [propose(ours, number, []) for number in range(40)]
    assert len({point["learn.optim.lr"] for point in points}) == 40
    assert all(dimension.holds(point[dimension.key]) for point in points for dimension in ours.dimensions)
    logs = np.log10([point["learn.optim.lr"] for point in points])
    assert logs.min() < -4 < -1 < logs.max()


def test_a_grid_is_tried_whole_and_an_extended_one_to_its_end(tmp_path):
    def walk(wanted, known):
        while len(known) < wanted.count:
            known = [*known, Record(str(len(known)), "search", len(known), propose(wanted, len(known), known))]
        return known

    ours = campaign(tmp_path, tmp_path, search={"learn.optim.lr": [1e-3, 1e-2, 1e-1], "learn.lag": [0, 1]})
    known = walk(ours, [])
    assert sorted(map(str, ours.grid)) == sorted(str(record.point) for record in known)
    wider = campaign(tmp_path, tmp_path, search={"learn.optim.lr": [1e-4, 1e-3, 1e-2, 1e-1], "learn.lag": [0, 1]})
    assert sorted(map(str, wider.grid)) == sorted(str(record.point) for record in walk(wider, known))


def test_tpe_learns_from_what_is_known_and_forgets_nothing_in_a_restart(tmp_path):
    ours = campaign(tmp_path, tmp_path, search={"learn.optim.lr": {"uniform": [0.001, 1.0]}}, searcher="optuna")
    known: list[Record] = []
    for number in range(30):
        point = propose(ours, number, known)
        assert point == propose(ours, number, list(known))
        record = Record(str(number), "search", number, point, status="finished")
        record.reports.append({"k": 1, "value": (point["learn.optim.lr"] - 0.7) ** 2, "segment": 0})
        known.append(record)
    late = [record.point["learn.optim.lr"] for record in known[20:]]
    assert np.median(np.abs(np.array(late) - 0.7)) < 0.15


def test_what_the_terminal_shows_and_tensorboard_keeps(tmp_path):
    ours = campaign(tmp_path, tmp_path)
    journal, said = Journal(tmp_path / "j"), io.StringIO()
    with watching(ours, journal, Console(said)):
        journal.write("session")
        journal.write("proposed", **TRIAL)
        journal.write("added", trial="search-000", tune="abc", told=0)
        journal.write("report", trial="search-000", k=20, step=10, value=0.25, loss=0.25, iou=None, segment=0)
        journal.write("ended", trial="search-000", status="diverged", reason="the loss is not finite", step=10)
    assert said.getvalue().splitlines() == [
        "  search-000 (lr 1e-05): begins",
        "  search-000 (lr 1e-05): diverged at step 10, loss 0.25: the loss is not finite",
    ]
    assert journal.listeners == []
    assert len(list((tmp_path / "tensorboard" / "search-000").glob("events*"))) == 1
    screen = Screen(ours, journal, Console(io.StringIO()))
    cells = [next(iter(column.cells)) for column in screen.table().columns]
    assert cells == ["search-000", "1e-05", "10", "0.25", "0.25", "", "diverged"]


# ---------------------------------------------------------------- what a log says


def log(losses: list[float | None], tests: dict[int, float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    steps = [{"step": k, "loss": loss, "step_s": 0.5} for k, loss in enumerate(losses)]
    return steps, [{"event": "validation", "step": k, "mean_iou": v, "iou": [v, v, v], "mlperf": v} for k, v in tests.items()]


@given(st.integers(1, 30), st.integers(0, 30))
def test_a_reading_looks_at_nothing_later(step: int, more: int):
    steps, events = log([1.0 / (k + 1) for k in range(step + more)], {5 * k: 0.1 * k for k in range(1, (step + more) // 5 + 1)})
    upto = log([1.0 / (k + 1) for k in range(step)], {5 * k: 0.1 * k for k in range(1, step // 5 + 1)})
    assert str(read("mean_iou", 0, 10, step, steps, events)) == str(read("mean_iou", 0, 10, step, *upto))


def test_metrics_of_a_log():
    steps, events = log([2.0, 1.0, 1.0, 0.5], {2: 0.3, 4: 0.6})
    assert read("loss", 0, 10, 4, steps, events).value == 0.5
    assert read("iou_atmospheric_river", 0, 10, 3, steps, events).value == 0.3
    assert read("seconds_to_iou", 0.5, 10, 4, steps, events).value == 2.0
    assert read("seconds_to_iou", 0.9, 10, 4, steps, events).value == WORST
    assert read("mean_iou", 0, 10, 1, steps, events).value == -WORST


def test_what_is_not_finite_or_grows_ends_with_its_reason():
    assert "not finite after 3 steps" in read("loss", 0, 10, 3, *log([1.0, 2.0, None], {})).ends
    assert "diverged: 30 after 3 steps, 1 at first" in read("loss", 0, 10, 3, *log([1.0, 2.0, 30.0], {})).ends
    assert "diverged" in read("loss", 0, 10, 4, *log([1.5, 2.0**18, 2.0**18, 2.0**18], {})).ends, "already in the second step"
    assert "diverged" in read("loss", 0, 10, 40, *log([1.0] * 20 + [30.0] * 20, {})).ends
    assert read("loss", 0, 10, 40, *log([1.0] * 40, {})).ends == ""
    assert recent_loss([]) == math.inf


def test_labels_and_means():
    assert smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert short([name for name in NAMES if name != "PSL"]) == "all but PSL"
    assert short({"name": "deeplab", "deeplab": {"width": 8, "rates": [2, 4]}}) == "deeplab width 8 rates 2+4"
    assert Confirmed({}, (1.0, 3.0), (0.5, 0.5)).std == pytest.approx(math.sqrt(2))


# ---------------------------------------------------------------- schedulers that were interrupted

@pytest.fixture(scope="module")
def quick_disk():
    """Here nobody pulls the plug: a thousand journal lines need not reach the disk one by one."""
    with mock.patch("raysegment.applications.campaign.journal.os.fsync"):
        yield


SCORES = st.lists(st.lists(st.floats(0, 1), min_size=20, max_size=20), min_size=2, max_size=9)


def drive(ours, journal, scores: list[list[float]], lines: int) -> None:
    """One trial after the other, each until the scheduler ends it, until the journal has so many lines."""
    scheduler = make_scheduler(ours, journal)
    for number, values in enumerate(scores):
        name = f"search-{number:03d}"
        if name not in journal.records:
            journal.write("proposed", **{**TRIAL, "trial": name, "number": number})
        if journal.records[name].status:
            continue
        trial = SimpleTrial(name, journal.session)
        scheduler.on_trial_add(None, trial)
        for k in range(journal.records[name].told + 1, 21):
            if sum(len(record.reports) for record in journal.records.values()) >= lines:
                return
            told = {"k": k, "step": k, "value": values[k - 1], "loss": 1.0, "iou": 0.0, "segment": 0, "ends": "", "point": "{}"}
            if scheduler.on_trial_result(None, trial, {**told, "diverged": False}) == "STOP":
                scheduler.on_trial_complete(None, trial, told)
                break


class SimpleTrial(SimpleNamespace):
    def __init__(self, name: str, session: int):
        super().__init__(trial_id=f"{name}/{session}", config={"trial": name}, status="RUNNING")

    def __hash__(self) -> int:
        return hash(self.trial_id)


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("scheduler", ["asha", "median"])
@settings(max_examples=10)
@given(scores=SCORES, cuts=st.lists(st.integers(0, 60), max_size=3))
def test_interrupted_searches_decide_as_undisturbed_ones(tmp_path_factory, scheduler: str, scores, cuts: list[int]):
    """Killed after any report, and begun again with a scheduler that knows the journal alone."""
    folder = tmp_path_factory.mktemp("j")
    ours = campaign(folder, folder, searcher="random", search={"learn.optim.lr": {"log": [1e-4, 1]}}, scheduler=scheduler)
    whole = Journal(folder / "whole")
    drive(ours, whole, scores, 10**9)
    for lines in [*sorted(cuts), 10**9]:
        cut = Journal(folder / "cut")
        cut.write("session")
        drive(ours, cut, scores, lines)
        cut.close()
    ended = [{r.trial: (r.status, r.told) for r in journal.of("search")} for journal in (whole, Journal(folder / "cut"))]
    assert ended[0] == ended[1]
    assert "finished" in {status for status, _ in ended[0].values()}


class Controller:
    """What HyperBand asks of Tune's: trials are stopped while they are paused."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    def stop_trial(self, trial: Any) -> None:
        self.scheduler.on_trial_remove(self, trial)
        trial.status = "TERMINATED"


def drive_brackets(ours, journal, scores: list[list[float]], lines: int) -> None:
    """One trial at a time, whichever the scheduler chooses, paused and gone on with; each reads from where it was paused."""
    scheduler, last = make_scheduler(ours, journal), ours.reports
    controller, trials, said = Controller(scheduler), [], {}
    for number in range(len(scores)):
        name = f"search-{number:03d}"
        if name not in journal.records:
            journal.write("proposed", **{**TRIAL, "trial": name, "number": number})
        trials.append(SimpleTrial(name, journal.session))
        trials[-1].status, trials[-1].is_saving, trials[-1].number = "PENDING", False, number
        scheduler.on_trial_add(controller, trials[-1])
    while (trial := scheduler.choose_trial_to_run(controller)) is not None:
        trial.status, decision = "RUNNING", "CONTINUE"
        while decision == "CONTINUE":
            if sum(len(record.reports) for record in journal.records.values()) >= lines:
                return
            k = said[trial.number] = said.get(trial.number, 0) + 1
            value = scores[trial.number][k - 1]
            told = {"k": k, "step": k, "value": value, "loss": 1.0, "iou": 0.0, "segment": 0, "ends": "", "point": "{}"}
            decision = scheduler.on_trial_result(controller, trial, {**told, "diverged": False})
            assert k <= last
        trial.status = "PAUSED"
        if decision == "STOP":
            scheduler.on_trial_complete(controller, trial, told)
            trial.status = "TERMINATED"


BRACKETS = st.lists(st.lists(st.floats(0, 1), min_size=9, max_size=9), min_size=2, max_size=17)


@pytest.mark.usefixtures("quick_disk")
@settings(max_examples=10)
@given(scores=BRACKETS, cuts=st.lists(st.integers(0, 60), max_size=2))
def test_interrupted_brackets_end_as_undisturbed_ones(tmp_path_factory, scores, cuts: list[int]):
    """HyperBand, whose trials all read their logs aloud once more after a restart."""
    folder = tmp_path_factory.mktemp("j")
    space = {"searcher": "random", "search": {"learn.optim.lr": {"log": [1e-4, 1]}}, "scheduler": "hyperband", "grace": 1 / 9}
    ours = campaign(folder, folder, **space)
    whole, cut = Journal(folder / "whole"), folder / "cut"
    drive_brackets(ours, whole, scores, 10**9)
    for lines in [*sorted(cuts), 10**9]:
        journal = Journal(cut)
        journal.write("session")
        drive_brackets(ours, journal, scores, lines)
        journal.close()
    ended = [{r.trial: r.status for r in journal.of("search")} for journal in (whole, Journal(cut))]
    assert ended[0] == ended[1]
    assert set(ended[0].values()) <= {"finished", "stopped"}

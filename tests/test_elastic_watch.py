"""Metrics are what the log says; the dashboard is what the metrics are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from raysegment.applications.cluster.dashboards import SELECTOR, DashboardOptions, dashboard, provider, write_dashboards
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import CAUSES as LOGGED
from raysegment.elastic.runs import Run, summarise
from raysegment.elastic.telemetry import BY_NAME, CAUSES, HISTOGRAM, METRICS, QUESTIONS, Metric
from raysegment.elastic.watch import Tally, Watch
from tests.helpers import ROOT

CLASSES = ("background", "tropical_cyclone", "atmospheric_river")
COMMITTED = ROOT / "cluster" / "grafana"


def line(step: int, **changes) -> dict:
    """A step of six tiles in 0.5 s."""
    seconds = {"load_s": 0.05, "compute_s": 0.2, "exchange_s": 0.1, "checkpoint_s": 0.025, "optimizer_s": 0.075}
    facts = {"step": step, "cursor": 6 * step, "loss": 2.0 - step / 100, "grad_norm": 1.5, "lr": 1e-3, "samples": 6,
             "skipped": False, "world": 3, "step_s": 0.5, "time": 1000.0 + step}  # fmt: skip
    return {**facts, **seconds, **changes}


def values(tally: Tally) -> dict:
    """By name, and by name and tag."""
    return {(reading.name, *(value for _, value in reading.tags)): reading.value for reading in tally.readings()}


def tally() -> Tally:
    return Tally(steps=200, batch=6, tiles=60, classes=CLASSES, flops_per_sample=1e12)


def test_steps_add_up():
    told, lines = tally(), [line(step) for step in range(40)]
    lines[5] = line(5, step_s=0.25)
    lines[6] = line(6, step_s=10.0, loss=None, skipped=True)
    lines[7] = line(7, samples=0)
    for each in lines:
        told.step(each)
    found, summary = values(told), summarise(lines, 1e12)
    assert found["loss",] == lines[-1]["loss"]
    assert (found["cursor",], found["epoch",], found["progress",]) == (240, 4.0, 0.2)
    assert (found["samples_total",], found["steps_total",], found["steps_skipped",]) == (234, 40, 1)
    assert found["samples_per_second",] == pytest.approx(12)
    assert found["flops_per_second", "now"] == pytest.approx(12e12)
    assert found["flops_per_second", "sustained"] == pytest.approx(summary["flop_s"]["sustained"])
    assert found["flops_per_second", "peak"] == pytest.approx(summary["flop_s"]["peak"])
    shares = {cause: found["time_share", cause] for cause in (*CAUSES, "other")}
    assert shares == pytest.approx(
        {"data": 0.1, "compute": 0.4, "exchange": 0.2, "snapshot": 0.05, "commit": 0.15, "other": 0.1}
    )
    assert set(CAUSES.values()) == set(LOGGED), "every share that the log has"


def test_a_step_without_a_loss_keeps_no_old_one():
    told = tally()
    told.step(line(0, loss=None, grad_norm=None, samples=0, skipped=True))
    found = values(told)
    assert ("loss",) not in found
    assert found["flops_per_second", "now"] == 0
    assert ("flops_per_second", "peak") not in found


def test_events_are_counted():
    told = tally()
    events = [
        {"event": "start", "time": 10.0},
        {"event": "worker", "member": "0.0-aa", "node": "n1"},
        {"event": "worker", "member": "0.1-bb", "node": "n2"},
        {"event": "worker", "member": "0.1-bb"},  # ready: no other
        {"event": "generation", "repeated": 0},
        {"event": "lost", "rank": 1},
        {"event": "lost", "rank": None},  # was no member yet
        {"event": "node_lost", "node": "n2"},
        {"event": "generation", "repeated": 2},
        {"event": "worker", "member": "0.1-cc", "node": "n1"},
        {"event": "straggler"},
        {"event": "failure"},
        {"event": "save_failed"},
        {"event": "checkpoint_failed"},
        {"event": "validation", "iou": [0.9, None, 0.4], "mean_iou": 0.65},
    ]
    for event in events:
        told.event(event)
    found = values(told)
    counts = {"restarts": 1, "members_lost": 1, "node_losses": 1, "generations": 2, "steps_repeated": 2, "stragglers": 1,
              "failures": 1, "save_failures": 2, "tiles_quarantined": 0, "steps_skipped": 0}  # fmt: skip
    assert {name: found[name,] for name in counts} == counts
    assert (found["iou", "background"], found["iou", "atmospheric_river"], found["mean_iou",]) == (0.9, 0.4, 0.65)
    assert ("iou", "tropical_cyclone") not in found, "what is not there has no value"
    assert found["last_checkpoint_timestamp_seconds",] == 10.0
    told.event({"event": "checkpoint", "time": 12.0})
    assert values(told)["last_checkpoint_timestamp_seconds",] == 12.0
    assert told.nodes == {"n1"}
    told.event({"event": "start", "time": 13.0})
    assert told.nodes == set(), "another command may have another cluster"


class Told:
    """An exporter without Ray."""

    def __init__(self) -> None:
        self.heard: list[dict] = []
        self.observed: list[float] = []

    def tell(self, readings) -> None:
        self.heard.append({reading.name: reading.value for reading in readings})

    def observe(self, name, value) -> None:
        assert BY_NAME[name].kind == HISTOGRAM
        self.observed.append(value)


def test_the_log_is_followed_and_lost_nodes_are_put_down(tmp_path):
    run, dead = Run(tmp_path), set()
    run.event("worker", member="0.0-aa", node="n1")
    write(run, line(0))
    watch = Watch(run, "first", tally(), lambda: dead)
    watch._exporter = told = Told()  # pyright: ignore[reportAttributeAccessIssue]
    assert [found["step"] for found in watch.look()] == [0]
    assert (told.heard[-1]["steps_total"], told.observed) == (1, [])
    assert watch.look() == []
    assert len(told.heard) == 1, "nothing is told where nothing is new"
    write(run, line(1), line(2, step_s=0.7))
    (tmp_path / "quarantine.jsonl").write_text('\n{"tile": 4, "position": 3, "reason": "spoilt"}\n' * 2)
    watch.look()
    assert (told.heard[-1]["steps_total"], told.observed, told.heard[-1]["tiles_quarantined"]) == (3, [0.5, 0.7], 1)
    dead.add("n1")
    for _ in range(60):
        watch.look()
    assert [event["node"] for event in run.read_events() if event["event"] == "node_lost"] == ["n1"]
    assert told.heard[-1]["node_losses"] == 1


def write(run: Run, *lines: dict) -> None:
    with run.steps.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)


def test_the_committed_dashboard_is_the_generated_one(tmp_path):
    for path in write_dashboards(DashboardOptions(), tmp_path):
        remedy = "raysegment cluster dashboards --out cluster/grafana"
        assert (COMMITTED / path.name).read_text() == path.read_text(), f"stale: run `{remedy}`"
    assert {path.name for path in COMMITTED.iterdir()} == {path.name for path in tmp_path.iterdir()}


def test_every_metric_has_its_panel_in_the_row_of_its_question():
    panels = dashboard()["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == list(QUESTIONS)
    rows: dict[str, list[str]] = {}
    for panel in panels:
        if panel["type"] == "row":
            rows[panel["title"]] = []
        else:
            rows[list(rows)[-1]] += re.findall(r"ray_raysegment_(\w+)\{", panel["targets"][0]["expr"])
    assert rows == {
        question: [metric.exported_name.removeprefix("ray_raysegment_") for metric in METRICS if metric.question == question]
        for question in QUESTIONS
    }
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(panel["gridPos"]["y"] + y, panel["gridPos"]["x"] + x)
             for panel in panels for y in range(panel["gridPos"]["h"]) for x in range(panel["gridPos"]["w"])]  # fmt: skip
    assert len(cells) == len(set(cells)), "panels that lie on one another"


@pytest.mark.packages
def test_prometheus_understands_every_query(tmp_path):
    """Its own unit tests of queries: series that grow for ten minutes, and an answer for each panel."""
    if (program := shutil.which("promtool")) is None:
        pytest.skip("`promtool` is not installed (Debian's package prometheus)")
    asked = [{"expr": f"count({metric.promql(SELECTOR.replace('$run', '.*'))})", "eval_time": "10m",
              "exp_samples": [{"labels": "{}", "value": 1 + bool(metric.tags)}]} for metric in METRICS]  # fmt: skip
    series = [{"series": name, "values": "1+1x60"} for metric in METRICS for name in series_of(metric)]
    tests = [{"interval": "10s", "input_series": series, "promql_expr_test": asked}]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"evaluation_interval": "10s", "tests": tests}))
    told = subprocess.run([program, "test", "rules", str(path)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def series_of(metric: Metric) -> list[str]:
    """Two series of a metric with tags, two buckets of a histogram, else one."""
    if metric.kind == HISTOGRAM:
        return [f'{metric.exported_name}{{run="first",le="{le}"}}' for le in ("1", "+Inf")]
    if not metric.tags:
        return [f'{metric.exported_name}{{run="first"}}']
    return [f'{metric.exported_name}{{run="first",{metric.tags[0]}="{value}"}}' for value in ("a", "b")]


def test_beside_rays_own(tmp_path):
    """A folder as a head leaves it: both files are where its grafana.ini has Grafana look."""
    with pytest.raises(BadInput, match=r"no .*/provisioning"):
        write_dashboards(DashboardOptions(str(tmp_path)))
    (tmp_path / "provisioning" / "dashboards").mkdir(parents=True)
    (tmp_path / "provisioning" / "dashboards" / "default.yml").write_text("Ray's")
    written = write_dashboards(DashboardOptions(str(tmp_path)))
    told = yaml.safe_load((tmp_path / "provisioning" / "dashboards" / "raysegment.yml").read_text())
    assert told == provider(tmp_path)
    assert Path(told["providers"][0]["options"]["path"]) == written[0].parent
    assert json.loads(written[0].read_text()) == dashboard()
    assert (tmp_path / "provisioning" / "dashboards" / "default.yml").read_text() == "Ray's"


def test_definitions_are_checked():
    for changes in ({"kind": "meter"}, {"question": "Why?"}, {"boundaries": (1.0,)}, {"query": "1"}, {"name": "loss_total"}):
        with pytest.raises(ValueError, match="metric loss"):
            replace(BY_NAME["loss"], **changes)
    assert len(BY_NAME) == len(METRICS)

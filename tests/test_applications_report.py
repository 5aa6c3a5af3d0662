"""A run's page: one file that needs no other, with all that the run's files say; its log as MLPerf's."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysegment.applications.mllog import PREFIX, mlperf_lines
from raysegment.applications.report import read_history, report
from raysegment.applications.report_figures import curve
from raysegment.archive.axes import Axes
from raysegment.archive.masks import write_masks
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.elastic.runs import CAUSES, Run, StepLog, environment, summarise
from raysegment.elastic.settings import flat, plain
from tests.small_training import config

HOSTILE = "<script>alert('1')</script>&"
WORLDS = [1] * 5 + [3] * 20 + [2] * 15
STEP_S = 0.5


def write_run(folder: Path, complete: bool = True) -> Path:
    """A run of 40 steps: one member, then three, of which one is lost and a file cannot be saved."""
    run = Run(folder)
    settings = config(Path("/nowhere/shards"), folder, steps=40, name=f"run {HOSTILE}")
    run.prepare(settings)
    log = StepLog(run.steps)
    for step, world in enumerate(WORLDS):
        log.offer(step, {
            "loss": None if step == 7 else 2.0 / (1 + step), "samples": 6, "lr": 1e-3, "grad_norm": 1.0, "skipped": False,
            "cursor": 6 * step, "world": world, "generation": 1 + (step >= 5) + (step >= 25), "step_s": STEP_S,
            "time": 1000.0 + STEP_S * step, **dict.fromkeys(CAUSES, 0.1),
        })  # fmt: skip
    log.close()
    with run.events.open("a") as file:
        for event in happened():
            file.write(json.dumps(event) + "\n")
    if complete:
        steps = [json.loads(line) for line in run.steps.read_text().splitlines()]
        run.finish({**summarise(steps, 1e12), **run.account(40, 6), "state_sha256": "5ea1", "weights_sha256": "fee1"})
    return folder


def happened() -> list[dict[str, Any]]:
    return [
        {"time": 999.0, "event": "start", "pid": 1, "steps": 40, "ladder": ["beat"]},
        {"time": 999.5, "event": "ready", "world": 1, "step": 0, "generation": 1, "seconds": 1.0},
        {"time": 999.5, "event": "generation", "generation": 1, "repeated": 0},
        {"time": 1002.4, "event": "generation", "generation": 2, "repeated": 0},
        {"time": 1010.0, "event": "validation", "step": 20, "iou": [0.9, 0.25, None], "mean_iou": 0.575, "mlperf": 0.5},
        {"time": 1012.3, "event": "fault", "fault": "kill@step=25,member=1", "step": 25, "member": 1},
        {"time": 1012.4, "event": "lost", "member": "1.0-ab", "rank": 1, "why": f"connection lost {HOSTILE}"},
        {"time": 1012.5, "event": "generation", "generation": 3, "repeated": 1},
        {"time": 1015.0, "event": "save_failed", "what": "file", "error": "no space"},
        {"time": 1020.0, "event": "checkpoint", "step": 40, "path": "step-00000040", "seconds": 0.1},
    ]


class Page(HTMLParser):
    """Elements, attributes and text of a page; `unclosed` is empty where every element ends."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.unclosed: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.unclosed.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.unclosed.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.unclosed:
            self.cells[-1] += data

    def pictures(self) -> dict[str, tuple[str, bytes]]:
        """Media type and content by title."""
        found = {}
        for tag, attributes in self.elements:
            if tag == "img":
                kind, content = re.fullmatch(r"data:([a-z/+]+);base64,(.+)", str(attributes["src"])).groups()  # pyright: ignore
                found[str(attributes["alt"])] = kind, base64.b64decode(content, validate=True)
        return found

    def table(self) -> dict[str, str]:
        """The cell that follows a cell: in tables of two columns, the value of a key."""
        return dict(pairwise(self.cells))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    folder = write_run(tmp_path_factory.mktemp("run"))
    result = report(folder)
    assert result == {
        "report": str(folder / "report.html"), "bytes": (folder / "report.html").stat().st_size,
        "complete": True, "steps": 40, "masks": 0,
    }  # fmt: skip
    return Page(folder / "report.html")


def test_the_page_needs_nothing_else(page):
    assert page.unclosed == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "a", "base", "form"}
    links = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href", "srcset")]
    assert links
    assert all(str(link).startswith("data:image/") for link in links)
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "content" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for kind, content in page.pictures().values():
        assert kind == "image/svg+xml"
        for element in ElementTree.fromstring(content).iter():
            for name, value in element.attrib.items():
                assert "://" not in value, f"{name}={value}"
        assert b"<!DOCTYPE" not in content


def test_what_the_files_say_is_shown_as_text(page):
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.elements}


def test_every_question_has_its_picture(page):
    pictures = {title.split(",")[0].split(":")[0]: content.decode() for title, (_, content) in page.pictures().items()}
    words = {
        "Loss": ["loss", "learning rate", "gradient norm", "samples/s"],
        "Validation": ["tropical cyclone", "atmospheric river", "IoU"],
        "Seconds of a step by cause": ["load", "compute", "exchange", "optimizer", "checkpoint", "other"],
        "World size over time; lines mark members lost and faults injected":
            ["members", "member lost", "fault injected", "saving failed", "checkpoint", "command started"],
    }  # fmt: skip
    for title, expected in words.items():
        shown = "".join(ElementTree.fromstring(pictures[title]).itertext())
        assert all(word in shown for word in expected), title


def test_figures_configuration_and_provenance_are_those_of_the_run(page):
    table = page.table()
    assert table["generations"] == "3"
    assert (table["faults"], table["faults survived"], table["steps repeated"]) == ("1", "1", "1")
    assert table["compute"] == "20.00"
    expected = dict(flat(plain(config(Path("/nowhere/shards"), Path(table["out"].strip('"')), steps=40, name=f"run {HOSTILE}"))))
    assert {key: json.loads(table[key]) for key in expected} == json.loads(json.dumps(expected))
    known = environment()
    assert table["Python"] == known["python"]
    assert (table["torch"], table["ray"]) == (known["packages"]["torch"], known["packages"]["ray"])
    assert table["git revision"] == known["git"]
    assert (table["seed"], table["state, SHA-256"]) == ("3", "5ea1")
    assert "complete" in page.text
    assert "2 → 0.0" not in page.text, "means of ten steps, not single ones"
    assert f"connection lost {HOSTILE}" in "".join(page.cells)


def test_a_run_under_way_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", complete=False)
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 40, "los')
    out = tmp_path / "elsewhere" / "page.html"
    assert report(folder, out)["complete"] is False
    page = Page(out)
    assert "not complete" in page.text
    assert page.table()["faults survived"] == "1"
    assert not (folder / "report.html").exists()


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = Run(tmp_path / "run")
    run.prepare(config(tmp_path / "shards", run.folder))
    assert report(run.folder)["steps"] == 0
    page = Page(run.folder / "report.html")
    assert page.pictures() == {}
    assert page.table()["steps"] == "12"


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.yaml"):
        report(tmp_path)
    (tmp_path / "config.yaml").write_text("trials: 3\n")
    with pytest.raises(BadInput, match="without `learn`"):
        report(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "events.jsonl").write_text('{"time": 1, "event"\n')
    with pytest.raises(BadInput, match=r"events\.jsonl"):
        report(folder)
    assert not (folder / "report.html").exists()


def test_masks_are_shown_where_there_are_any(tmp_path):
    folder, grid = write_run(tmp_path / "run"), Grid.global_(19, 36)
    masks = np.zeros((1, *grid.shape), np.uint8)
    masks[0, 4:8, 10:20] = 2
    write_masks(folder / "masks" / "a.mask.nc", masks, Axes.of(grid), [None], "runs/first")
    assert report(folder)["masks"] == 1
    pictures = Page(folder / "report.html").pictures()
    (kind, content) = next(held for title, held in pictures.items() if title.startswith("a.mask.nc, runs/first"))
    assert kind == "image/png"
    assert content.startswith(b"\x89PNG")
    with pytest.raises(BadInput, match=r"mask\.nc"):
        report(folder, masks=[tmp_path / "empty"])


numbers = st.one_of(st.none(), st.floats(-1e6, 1e6))


@given(st.lists(numbers, max_size=3000))
def test_a_curve_of_any_length_keeps_its_bounds_and_its_mean(values):
    found = curve(range(len(values)), values)
    known = [value for value in values if value is not None]
    assert len(found.x) == min(1000, len(known))
    if not known:
        return
    assert (found.least.min(), found.most.max()) == (min(known), max(known))
    assert np.all(found.least <= found.mean + 1e-6)
    assert np.all(found.mean <= found.most + 1e-6)
    assert np.all(np.diff(found.x) > 0)
    if len(known) <= 1000:
        np.testing.assert_array_equal(found.mean, known)


def test_the_log_as_mlperfs(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = mlperf_lines(read_history(folder))
    assert all(line.startswith(PREFIX) and PREFIX == ":::MLLOG " for line in lines)
    records = [json.loads(line.removeprefix(PREFIX)) for line in lines]
    fields = {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
    assert all(set(record) == fields and {"file", "lineno"} <= set(record["metadata"]) for record in records)
    times = [record["time_ms"] for record in records]
    assert times == sorted(times)
    of = {key: [record for record in records if record["key"] == key] for key in {record["key"] for record in records}}
    order = [record["key"] for record in records if record["key"] in ("init_start", "init_stop", "run_start", "run_stop")]
    assert order == ["init_start", "init_stop", "run_start", "run_stop"]
    assert of["run_stop"][0]["metadata"]["status"] == "success"
    assert (of["global_batch_size"][0]["value"], of["seed"][0]["value"], of["opt_name"][0]["value"]) == (6, 3, "adamw")
    assert of["git_revision"][0]["value"] == environment()["git"]
    assert of["version_torch"][0]["value"] == environment()["packages"]["torch"]
    assert len(of["train_loss"]) == 40
    assert of["train_loss"][4]["value"] == 0.4
    assert [record["value"] for record in of["eval_accuracy"]] == [0.5]
    begun, ended = of["eval_start"][0], of["eval_stop"][0]
    assert (begun["event_type"], ended["event_type"]) == ("INTERVAL_START", "INTERVAL_END")
    unfinished = mlperf_lines(read_history(write_run(tmp_path / "other", complete=False)))
    assert json.loads(unfinished[-1].removeprefix(PREFIX))["metadata"]["status"] == "aborted"

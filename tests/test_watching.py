"""Watching for real: Prometheus scrapes a cluster while it trains and answers every panel; a browser sees the run's pages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import yaml
from PIL import Image

from raysegment.applications.cluster.dashboards import DashboardOptions, write_dashboards
from raysegment.applications.cluster.jobs import STOPPED
from raysegment.applications.report import report
from raysegment.elastic.settings import ElasticConfig, ValidationConfig, plain
from tests.browser import Chromium
from tests.members import wait_for
from tests.practice import Practice, raised
from tests.small_training import config, write_shards
from tests.test_applications_report import Page, write_run

pytestmark = [pytest.mark.slow, pytest.mark.packages, pytest.mark.timeout(900)]


def needed(program: str) -> str:
    """Its path, or a skip with the reason where it is absent."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"`{program}` is not installed (Debian's package {program})")
    return found


@contextmanager
def prometheus(cluster: Practice, folder: Path, port: int) -> Iterator[str]:
    """While inside, a Prometheus with the configuration that Ray has written, but every second; its address."""
    program, address = needed("prometheus"), f"127.0.0.1:{port}"
    settings = yaml.safe_load((cluster.metrics / "prometheus" / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(settings))
    command = [program, f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: get(f"http://{address}/-/ready"), "Prometheus", 120)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Iterator[tuple[Practice, str]]:
    """A practice cluster, a Prometheus, and a job that trains on them until the tests are over."""
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    validation = ValidationConfig(str(write_shards(folder / "shards")), every_steps=10)
    elastic = ElasticConfig(patience_s=6, cells=[1, 2], workers_per_cell=1)
    more = {"steps": 1_000_000, "validation": validation, "elastic": elastic, "cpus_per_worker": 1}
    asked = config(folder / "shards", folder / "run", name="watched", **more)
    (folder / "train.yaml").write_text(yaml.safe_dump(plain(asked)))
    with raised(RAY_PROMETHEUS_HOST=f"http://127.0.0.1:{port}") as cluster, prometheus(cluster, folder, port) as store:
        words, environment = cluster.command("train", str(folder / "train.yaml"), SUBMISSION_ID="watched")
        follower = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for((folder / "run" / "steps.jsonl").exists, "the first step", 300)
        yield cluster, store
        cluster.client().stop_job("watched")
        assert follower.wait(120) == STOPPED


def free_port() -> int:
    """A port nobody listens on."""
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def get(url: str, headers: dict[str, str] | None = None) -> bytes | None:
    """What is served there; None where nobody does."""
    try:
        with urlopen(Request(url, headers=headers or {}), timeout=30) as answer:
            return answer.read() or b" "
    except (URLError, OSError):
        return None


def ask(store: str, query: str) -> list[dict]:
    """What Prometheus answers."""
    return json.loads(get(f"{store}/api/v1/query?{urlencode({'query': query})}") or "null")["data"]["result"]


def test_every_panels_query_returns_data(training):
    """Each panel of the dashboard that stands beside Ray's own; values are printed with -s."""
    cluster, store = training
    wait_for(lambda: world_size(store) == 2, "both cells", 300)
    written = write_dashboards(DashboardOptions(str(cluster.metrics / "grafana")))
    board = json.loads(written[0].read_text())["panels"]
    question = ""
    for panel in board:
        if panel["type"] == "row":
            question = panel["title"]
            continue
        query = panel["targets"][0]["expr"].replace("$run", ".*")
        result = wait_for(lambda: ask(store, query), f"{panel['title']}: {query}", 180)  # noqa: B023
        assert all(row["metric"]["run"] == "watched" for row in result)
        values = [(" ".join(v for k, v in sorted(row["metric"].items()) if k != "run"), row["value"][1]) for row in result]
        print(f"| {question} | {panel['title']} | {', '.join(f'{tag} {float(value):.6g}'.strip() for tag, value in values)} |")


def world_size(store: str) -> float:
    return float(next(iter(ask(store, 'ray_raysegment_world_size{run="watched"}')), {"value": (0, 0)})["value"][1])


def test_prometheus_finds_every_node_of_the_cluster_by_rays_own_list(training):
    cluster, store = training
    nodes = {node["address"] for node in cluster.state["nodes"]}

    def scraped() -> set[str]:
        return {row["metric"]["instance"] for row in ask(store, 'up{job="ray"} == 1')}

    wait_for(lambda: {instance.rpartition(":")[0] for instance in scraped()} == nodes, f"targets on {nodes}", 60)
    assert scraped() <= {target for group in json.loads(cluster.discovery.read_text()) for target in group["targets"]}


_OF_THE_BROWSER = re.compile(r"https?://[^/]*\.(google|googleapis|gvt1)\.com/")  # whatever page it shows; no name resolves here


def test_a_runs_page_opens_offline(tmp_path):
    """Chromium shows the pictures of the page, whose policy forbids whatever is not in it, and asks the network for nothing."""
    folder = write_run(tmp_path / "run")
    page, log = Path(report(folder)["report"]), tmp_path / "network.json"
    picture = Path(os.environ.get("RAYSEGMENT_PICTURES", tmp_path)) / "report.png"
    chromium = Chromium(needed("chromium"), tmp_path / "profile")
    text = chromium.browse(page.as_uri(), picture, f"--log-net-log={log}", "--window-size=1200,4000")
    assert text.count("<img") == len(Page(page).pictures()) >= 4
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1 << 24)}
    assert {(0x1F, 0x5F, 0xA8), (0xA4, 0x0E, 0x26)} <= colours, "curves, and the mark of a member lost"
    asked = re.findall(r'"url":"(https?://[^"]*)"', log.read_text())
    assert [url for url in asked if not _OF_THE_BROWSER.match(url)] == []


def test_a_browser_sees_the_job_and_ray_train_the_run(training, tmp_path):
    """The job's page names it to whoever has the token, and to nobody else; a picture goes to RAYSEGMENT_PICTURES where that is
    set. The open-source dashboard has no page for what Ray Train tracks: it is asked for what it serves."""
    cluster, _ = training
    picture = Path(os.environ.get("RAYSEGMENT_PICTURES", tmp_path)) / "dashboard-job.png"
    chromium, page = Chromium(needed("chromium"), tmp_path / "profile"), "/#/jobs/watched"
    before, after = chromium.browse_as(cluster.token, cluster.dashboard, page, ("watched", "RUNNING", "Total:"), picture)
    assert "RUNNING" not in before
    assert "train.yaml" in after, "its command"
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = wait_for(lambda: train_runs(cluster), "the run among Ray Train's", 120)
    assert all(run["name"].startswith("watched-cell") for run in runs)


def train_runs(cluster: Practice) -> list[dict]:
    served = get(f"{cluster.dashboard}/api/train/v2/runs/v1", cluster.headers) or b'{"train_runs": []}'
    return [run for run in json.loads(served)["train_runs"] if run["status"] == "RUNNING"]

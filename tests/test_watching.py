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
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image

from raysegment.applications.cluster.dashboards import DashboardOptions, write_dashboards
from raysegment.applications.report import report
from raysegment.elastic.settings import ElasticConfig, ValidationConfig, plain
from tests.head import Head, answers, free_port, head, script
from tests.members import wait_for
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
def prometheus(found: Head, port: int) -> Iterator[str]:
    """While inside, a Prometheus with the configuration that Ray has written, but every second; its address."""
    program, address = needed("prometheus"), f"127.0.0.1:{port}"
    settings = yaml.safe_load((found.metrics / "prometheus" / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    path = found.folder.parent / "prometheus.yml"
    path.write_text(yaml.safe_dump(settings))
    storage = found.folder.parent / "prometheus"
    command = [program, f"--config.file={path}", f"--storage.tsdb.path={storage}", f"--web.listen-address={address}"]
    with (found.folder.parent / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: answers(f"http://{address}/-/ready"), "Prometheus", 120)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Iterator[tuple[Head, str, Path]]:
    """A head, a Prometheus, and a job that trains on them until the tests are over."""
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    shards, out = write_shards(folder / "shards"), folder / "run"
    validation = ValidationConfig(str(shards), every_steps=10)
    asked = config(shards, out, name="watched", steps=1_000_000, validation=validation, elastic=ElasticConfig(patience_s=6))
    (folder / "train.yaml").write_text(yaml.safe_dump(plain(asked)))
    with head(folder / "ray", f"http://127.0.0.1:{port}") as found, prometheus(found, port) as store:
        submit = [script("ray"), "job", "submit", f"--address={found.dashboard}", "--submission-id=watched", "--no-wait", "--"]
        train = [script("python"), "-m", "raysegment", "train", str(folder / "train.yaml")]
        accepted = lambda: subprocess.run([*submit, *train], env=found.environment, capture_output=True).returncode == 0
        wait_for(accepted, "an agent that takes the job", 240)
        wait_for(lambda: (out / "steps.jsonl").exists(), "the first step", 300)
        yield found, store, out
        stop = [script("ray"), "job", "stop", f"--address={found.dashboard}", "watched"]
        subprocess.run(stop, env=found.environment, check=True, capture_output=True)


def ask(store: str, query: str) -> list[dict]:
    """What Prometheus answers."""
    with urlopen(f"{store}/api/v1/query?{urlencode({'query': query})}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def test_every_panels_query_returns_data(training, tmp_path):
    """Each panel of the dashboard that stands beside Ray's own; values are printed with -s."""
    found, store, _ = training
    written = write_dashboards(DashboardOptions(str(found.metrics / "grafana")))
    panels = [panel for panel in json.loads(written[0].read_text())["panels"] if panel["type"] != "row"]
    queries = {panel["title"]: panel["targets"][0]["expr"].replace("$run", ".*") for panel in panels}
    for title, query in queries.items():
        result = wait_for(lambda: ask(store, query), f"{title}: {query}", 180)  # noqa: B023
        assert all(row["metric"]["run"] == "watched" for row in result)
        values = [(" ".join(v for k, v in sorted(row["metric"].items()) if k != "run"), row["value"][1]) for row in result]
        print(f"| {title} | `{query}` | {', '.join(f'{tag} {float(value):.6g}'.strip() for tag, value in values)} |")
    (world,) = ask(store, 'ray_raysegment_world_size{run="watched"}')
    assert float(world["value"][1]) == 1


def test_prometheus_finds_every_node_of_the_cluster_by_rays_own_list(training):
    found, store, _ = training
    targets = {target for group in json.loads(found.discovery.read_text()) for target in group["targets"]}
    up = wait_for(lambda: {row["metric"]["instance"] for row in ask(store, 'up{job="ray"} == 1')}, "targets", 60)
    assert up
    assert up <= targets


_OF_THE_BROWSER = re.compile(r"https?://[^/]*\.(google|googleapis|gvt1)\.com/")  # whatever page it shows; no name resolves here


def test_a_runs_page_opens_offline(tmp_path):
    """Chromium shows the pictures of the page, whose policy forbids whatever is not in it, and asks the network for nothing."""
    folder = write_run(tmp_path / "run")
    page, log = Path(report(folder)["report"]), tmp_path / "network.json"
    picture = Path(os.environ.get("RAYSEGMENT_PICTURES", tmp_path)) / "report.png"
    text = browse(page.as_uri(), picture, tmp_path / "profile", f"--log-net-log={log}", "--window-size=1200,4000")
    assert text.count("<img") == len(Page(page).pictures()) >= 4
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(1 << 24)}
    assert {(0x1F, 0x5F, 0xA8), (0xA4, 0x0E, 0x26)} <= colours, "curves, and the mark of a member lost"
    asked = re.findall(r'"url":"(https?://[^"]*)"', log.read_text())
    assert [url for url in asked if not _OF_THE_BROWSER.match(url)] == []


def test_a_browser_sees_the_job_and_ray_train_the_run(training, tmp_path):
    """The job's page names it; a picture goes to RAYSEGMENT_PICTURES where that is set. The open-source dashboard has no page
    for what Ray Train tracks: it is asked for what it serves."""
    found, _, _ = training
    pictures = Path(os.environ.get("RAYSEGMENT_PICTURES", tmp_path))
    text = browse(f"{found.dashboard}/#/jobs/watched", pictures / "dashboard-job.png", tmp_path / "profile")
    assert "watched" in text, text[:2000]
    assert "RUNNING" in text, text[:2000]
    runs = wait_for(lambda: train_runs(found), "the run among Ray Train's", 120)
    assert [run["name"].startswith("watched-cell0") for run in runs] == [True]


def train_runs(found: Head) -> list[dict]:
    try:
        with urlopen(f"{found.dashboard}/api/train/v2/runs/v1", timeout=30) as answer:
            return [run for run in json.load(answer)["train_runs"] if run["status"] == "RUNNING"]
    except URLError:
        return []


def browse(url: str, picture: Path, profile: Path, *more: str) -> str:
    """A page as headless Chromium shows it: a picture of it, and its text."""
    words = [needed("chromium"), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1400,1000",
             "--virtual-time-budget=20000", *more]  # fmt: skip
    subprocess.run([*words, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=240)
    shown = subprocess.run([*words, "--dump-dom", url], check=True, capture_output=True, timeout=240)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return shown.stdout.decode()

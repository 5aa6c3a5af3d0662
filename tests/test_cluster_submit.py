"""Training as a job of a Ray cluster: submitted, stopped with `ray job stop`, submitted again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from raysegment.elastic.train import train
from raysegment.feed.session import worker_environment
from tests.helpers import ROOT
from tests.small_training import config, write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 1200


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of a local Ray's dashboard, which takes jobs; their `python` is the one that runs this."""
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        options = {"runtime_env": {"env_vars": worker_environment()}, "log_to_driver": False}
        context: Any = ray.init(address="local", num_cpus=2, include_dashboard=True, **options)
        yield f"http://{context.dashboard_url}"
        ray.shutdown()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(happened: Callable[[], bool], patience_s: float = 120.0, said: Path | None = None) -> None:
    end = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < end, said.read_text() if said else "it did not happen"
        time.sleep(0.05)


def submit(dashboard: str, said: Path, *words: str) -> JobSubmissionClient:
    """`cluster/submit.sh`, as far as the cluster's answer; the client that can ask for the job. What it says is in `said`."""
    name = said.stem
    client = JobSubmissionClient(dashboard)
    environment = {**os.environ, "RAY_ADDRESS": dashboard, "SUBMISSION_ID": name}
    command = ["bash", str(ROOT / "cluster" / "submit.sh"), *words]
    with said.open("w") as file:
        subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    until(lambda: any(job.submission_id == name for job in client.list_jobs()), said=said)
    return client


def test_a_job_that_is_stopped_ends_with_its_state_on_record_and_goes_on_when_submitted_again(dashboard, tmp_path):
    shards = write_shards(tmp_path / "shards")
    expected = train(config(shards, tmp_path / "undisturbed", steps=STEPS, cpus_per_worker=1))["state_sha256"]
    out = tmp_path / "job"
    words = [
        "train",
        str(tmp_path / "undisturbed" / "config.yaml"),
        f"out={out}",
        "elastic.cells=[1,2]",
        "elastic.workers_per_cell=1",
    ]

    first = submit(dashboard, tmp_path / "first.log", *words)
    until(lambda: len(lines(out / "steps.jsonl")) > 30, said=tmp_path / "first.log")
    first.stop_job("first")
    until(lambda: first.get_job_status("first") == JobStatus.STOPPED)
    committed = len(lines(out / "steps.jsonl"))
    assert 30 < committed < STEPS
    assert f"stopped (SIGTERM) after {committed} of {STEPS} steps" in first.get_job_logs("first")
    begun = len(lines(out / "events.jsonl"))

    second = submit(dashboard, tmp_path / "second.log", *words)
    until(lambda: second.get_job_status("second").is_terminal(), 300)
    assert second.get_job_status("second") == JobStatus.SUCCEEDED, second.get_job_logs("second")
    ready = [event for event in lines(out / "events.jsonl")[begun:] if event["event"] == "ready"]
    assert ready[0]["step"] == committed, "nothing that was committed is computed again"
    steps = lines(out / "steps.jsonl")
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert expected in (out / "summary.json").read_text()

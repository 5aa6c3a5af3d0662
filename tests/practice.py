"""A practice cluster for tests: raised, used as its user does, ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from tests.helpers import ROOT


@dataclass(frozen=True)
class Practice:
    """A practice cluster that is up; `environment` is what its user has exported."""

    folder: Path
    environment: dict[str, str]

    def local(self, *words: str) -> tuple[int, str, str]:
        return run(["bash", str(ROOT / "cluster" / "local.sh"), *words], self.environment)

    def command(self, *words: str, **more: str) -> tuple[list[str], dict[str, str]]:
        return ["bash", str(ROOT / "cluster" / "submit.sh"), *words], {**self.environment, **more}

    def submit(self, *words: str, **more: str) -> tuple[int, str]:
        """`cluster/submit.sh`, to its end: the status, and what it said."""
        status, out, err = run(*self.command(*words, **more))
        return status, out + err

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.dashboard, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        """What a request must have to be answered."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    @property
    def dashboard(self) -> str:
        return self.environment["RAY_ADDRESS"]

    @property
    def address(self) -> str:
        return self.state["nodes"][0]["address"] + f":{self.state['nodes'][0]['port']}"

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / "cluster.json").read_text())

    @property
    def discovery(self) -> Path:
        """Ray's list of what a Prometheus is to scrape."""
        return self.folder / "h" / "prom_metrics_service_discovery.json"

    @property
    def metrics(self) -> Path:
        """What the head has written for Prometheus and Grafana."""
        return self.folder / "h" / "session_latest" / "metrics"


def run(words: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout, done.stderr


@contextmanager
def raised(*words: str, **more: str) -> Iterator[Practice]:
    """While inside, a practice cluster of two nodes; `words` for `up`, `more` of its environment."""
    folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))  # sockets have short paths
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYSEGMENT_"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**kept, **more, "PATH": programs, "RAYSEGMENT_CLUSTER": str(folder / "c"), "HOME": str(folder)}
    practice = Practice(folder / "c", environment)
    try:
        status, out, said = practice.local("up", "2", "cpus=2", *words)
        assert status == 0, said
        exported = dict(line.removeprefix("export ").split("=", 1) for line in out.splitlines())
        yield Practice(folder / "c", {**environment, **exported})
    finally:
        practice.local("down")
        shutil.rmtree(folder)

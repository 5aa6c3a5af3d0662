"""A head of a Ray cluster in processes of its own, on loopback, for tests that look at it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from urllib.error import URLError
from urllib.request import urlopen

from tests.helpers import ROOT
from tests.members import wait_for

_PORTS = ("--port", "--dashboard-port", "--metrics-export-port", "--ray-client-server-port")


@dataclass(frozen=True)
class Head:
    """Where it is: `folder` its temporary one, `gcs` and `dashboard` addresses, `environment` for whoever speaks to it."""

    folder: Path
    gcs: str
    dashboard: str
    environment: dict[str, str]

    @property
    def metrics(self) -> Path:
        """What it has written for Prometheus and Grafana."""
        return self.folder / "session_latest" / "metrics"

    @property
    def discovery(self) -> Path:
        """Ray's list of what is to be scraped."""
        return self.folder / "prom_metrics_service_discovery.json"


def free_port() -> int:
    """A port nobody listens on, below those that Ray gives to workers."""
    for port in range(7100 + os.getpid() % 1000, 9900):
        with socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


@contextmanager
def head(folder: Path, prometheus: str, cpus: int = 2) -> Iterator[Head]:
    """While inside, a head with a dashboard that knows of the Prometheus at `prometheus`; no token: loopback alone."""
    first = free_port()
    ports = [first + number for number in range(len(_PORTS))]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled", "RAY_PROMETHEUS_HOST": prometheus, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1", "RAY_raylet_start_wait_time_s": "240", "PYTHONPATH": str(ROOT),
        "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip
    words = [f"{option}={port}" for option, port in zip(_PORTS, ports, strict=True)]
    command = [
        script("ray"), "start", "--head", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", *words,
        f"--num-cpus={cpus}", f"--temp-dir={folder}", "--disable-usage-stats", "--block",
    ]  # fmt: skip
    with (folder.parent / "head.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    made = Head(folder, f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", environment)
    try:
        wait_for(lambda: process.poll() is not None or (answers(made.dashboard) and made.discovery.exists()), "the head", 240)
        assert process.poll() is None, (folder.parent / "head.log").read_text()
        yield made
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    """Whether somebody serves this page."""
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


def script(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).parent / name)

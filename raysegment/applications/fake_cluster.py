"""A Ray cluster of several nodes on one machine, whose nodes can be ended as by a power cut: for tests and for chaos.

    with fake_cluster(nodes=3) as cluster:      # Ray is connected to it
        cluster.kill_node(cluster.nodes[0])
        cluster.wait_dead(cluster.nodes[0])
        cluster.add_node()

The head has no CPUs, so nothing of a job runs there but what asks for none (Ray Train's controllers do). The dashboard
stays on: without it Ray Train never returns the placement groups of runs that end early.

A node is dead for Ray when it has failed `health_check_failure_threshold` checks, one per `health_check_period_ms`; only a
raylet that hangs also takes the timeout each time. Measured from SIGKILL or SIGSTOP of the raylet until `ray.nodes()` says
so, two shared cores, Ray 2.60:

    period, timeout, failures      killed              hung
    500 ms, 2 s, 3 (`HEALTH`)      1.3 to 1.4 s        7.4 s
    1 s, 1 s, 3                    2.4 to 2.8 s        5.4 s
    3 s, 10 s, 5 (Ray's own)       12.8 to 14.8 s      more than 60 s
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raysegment.elastic import chaos
from raysegment.feed.session import quiet_data, worker_environment

HEALTH: dict[str, int] = {  # soon, but not so soon that a busy machine's nodes are taken for dead
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
_STORE_BYTES = 100 * 2**20
_LOOK_EVERY_S = 0.02


@dataclass(eq=False)
class FakeNode:
    """A node: its Ray `id` (hex) and the process of its raylet."""

    id: str
    raylet: int
    handle: Any = field(repr=False)  # Ray's own object for it


class FakeCluster:
    """The nodes below a head; `add_node` in the main thread only, where alone Python lets Ray set its signal handlers."""

    def __init__(self, cluster: Cluster, cpus: int, store_bytes: int = _STORE_BYTES):
        self._cluster, self._cpus, self._store_bytes = cluster, cpus, store_bytes
        self.nodes: list[FakeNode] = []

    def start(self, nodes: int, dashboard: bool, system: dict[str, int]) -> None:
        """Head and nodes, and this process connected to them."""
        # A port of its own: asked for a dashboard, Ray insists on the usual port, which another cluster may have.
        settings = {"include_dashboard": dashboard, "dashboard_port": _free_port(), "_system_config": system or None}
        self._cluster.add_node(num_cpus=0, object_store_memory=self._store_bytes, **settings)
        for _ in range(nodes):
            self.add_node()
        ray.init(address=self.address, log_to_driver=False, logging_level=logging.WARNING)

    @property
    def address(self) -> str:
        """What `ray.init` and RAY_ADDRESS take."""
        return str(self._cluster.address)

    def add_node(self, cpus: int | None = None, name: str | None = None) -> FakeNode:
        """Another node, as soon as Ray knows it."""
        assert threading.current_thread() is threading.main_thread(), "nodes can be added in the main thread only"
        cpus = self._cpus if cpus is None else cpus
        handle = self._cluster.add_node(num_cpus=cpus, node_name=name, object_store_memory=self._store_bytes)
        node = FakeNode(handle.node_id, handle.all_processes["raylet"][0].process.pid, handle)
        self.nodes.append(node)
        return node

    def kill_node(self, node: FakeNode) -> None:
        """End a node's processes at once. Ray hears of it by and by: see `wait_dead`."""
        chaos.kill_node(node.raylet)
        self._forget(node)

    def announce_end(self, node: FakeNode, deadline_s: int = 60) -> None:
        """Have Ray tell everybody that a node will end, as an autoscaler does before a pre-emption; it lives on until killed."""
        words = ["drain-node", "--address", self.address, "--node-id", node.id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message", "announced", "--deadline-remaining-seconds", str(deadline_s)]
        done = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def bury(self) -> list[FakeNode]:
        """The nodes that have ended by other hands than `kill_node` (a worker's own, say) since this was last asked."""
        gone = [node for node in self.nodes if node.handle.all_processes["raylet"][0].process.poll() is not None]
        for node in gone:
            self._forget(node)
        return gone

    def living(self) -> set[str]:
        """The ids of the nodes that Ray takes for alive, the head's among them."""
        return {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}

    def wait_dead(self, node: FakeNode, timeout_s: float = 60.0) -> float:
        """The seconds it took until Ray had seen that a node is gone."""
        return wait_for(lambda: node.id not in self.living(), timeout_s, f"node {node.id} to be seen dead")

    def wait_alive(self, nodes: int, timeout_s: float = 60.0) -> float:
        """The seconds it took until Ray took so many nodes below the head for alive."""
        return wait_for(lambda: len(self.living()) == nodes + 1, timeout_s, f"{nodes} nodes alive")

    def close(self) -> None:
        """End all processes of all nodes, also stopped ones, the head's last; no others."""
        head = self._cluster.head_node
        roots = [node.raylet for node in self.nodes] + ([head.all_processes["raylet"][0].process.pid] if head else [])
        below = [pid for root in roots for pid in chaos.descendants(root)]
        for node in list(self.nodes):
            self._forget(node)
        self._cluster.shutdown()
        for pid in below:
            chaos.end(pid)

    def _forget(self, node: FakeNode) -> None:
        """Collect what is left of a node, however it ended."""
        self.nodes.remove(node)
        self._cluster.remove_node(node.handle, allow_graceful=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Seconds until `condition` was true; TimeoutError when it does not become so."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"expected {what} within {timeout_s:g} s")
        time.sleep(_LOOK_EVERY_S)
    return time.monotonic() - started


@contextmanager
def fake_cluster(
    nodes: int = 2,
    cpus: int = 1,
    dashboard: bool = True,
    health: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[FakeCluster]:
    """A head and `nodes` nodes of `cpus` CPUs, Ray connected to them; ended, as is the connection, on leaving.

    `health`: how the head looks after its nodes (`HEALTH`; empty for Ray's own figures). `environment`: what all processes
    of the cluster see besides this one's variables (unless given, the package's own `worker_environment`).
    """
    assert not ray.is_initialized(), "this process is connected to another Ray"
    quiet_data()
    before = dict(os.environ)
    os.environ.update(worker_environment() if environment is None else environment)
    system = dict(HEALTH if health is None else health)
    started = FakeCluster(Cluster(), cpus)
    try:
        started.start(nodes, dashboard, system)
        yield started
    finally:
        ray.shutdown()
        started.close()
        os.environ.clear()
        os.environ.update(before)

"""The nodes of the Ray cluster that a job runs in: awaited when it begins, drained when one is to go."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_node_ip_address

from raysegment.climate.checks import BadInput
from raysegment.feed.session import ray_address

Nodes = Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class WaitOptions:
    """Of `nodes` nodes `min` are enough, once `grace_s` seconds have brought no more; after `wait_s` it is over."""

    nodes: int = 1
    min: int = 1
    wait_s: float = 1800.0
    grace_s: float = 120.0
    poll_s: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.nodes:
            raise ValueError(f"nodes, min: expected 1 <= min <= nodes, got min={self.min}, nodes={self.nodes}")
        if self.wait_s <= 0 or self.grace_s < 0 or self.poll_s <= 0:
            raise ValueError("wait_s, poll_s: expected more than 0; grace_s: expected 0 or more")


@dataclass(frozen=True)
class DrainOptions:
    """The node at `address` ("": this host's) is to go in `deadline_s` seconds; `linger_s` is what its members need to leave."""

    address: str = ""
    deadline_s: int = 120
    linger_s: float = 20.0

    def __post_init__(self) -> None:
        if self.deadline_s < 1 or not 0 <= self.linger_s <= self.deadline_s:
            raise ValueError(f"expected deadline_s >= 1 and 0 <= linger_s <= deadline_s, got {self}")


def wait_for_nodes(
    options: WaitOptions,
    nodes: Nodes | None = None,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Wait until the cluster has its nodes: how many there are, of how many, after which time, and (`kept`) whether enough.

    Over as soon as all are there, or `min` are and none has come for `grace_s`, or `wait_s` have passed.
    """
    look = nodes or living
    began = came = clock()
    count, problem = 0, ""
    while True:
        try:
            now = len(look())
        except (ConnectionError, RuntimeError, ValueError) as error:  # the head is not up yet
            now, problem = 0, f": {error}"
        if now != count:
            count, came = now, clock()
            say(f"{count} of {options.nodes} nodes")
        waited = clock() - began
        settled = count >= options.min and clock() - came >= options.grace_s
        if count >= options.nodes or settled or waited >= options.wait_s:
            break
        sleep(options.poll_s)
    if count < options.min:
        say(f"expected {options.min} nodes within {options.wait_s:g} s, got {count}{problem}")
    return {"nodes": count, "of": options.nodes, "seconds": waited, "kept": count >= options.min}


def drain(options: DrainOptions, nodes: Nodes | None = None, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Tell Ray that a node will end: nothing new is placed there, and the members on it hand over and leave."""
    address = options.address or get_node_ip_address()
    found = [node["NodeID"] for node in (nodes or living)() if node["NodeManagerAddress"] == address]
    if not found:
        raise BadInput("address", "the address of a living node", address, "See `ray list nodes`.")
    for node in found:
        announce_end(node, options.deadline_s)
    sleep(options.linger_s)
    return {"address": address, "drained": found, "deadline_s": options.deadline_s}


def announce_end(node: str, deadline_s: int) -> None:
    """`ray drain-node`: the same request that an autoscaler makes before a pre-emption."""
    words = ["drain-node", "--address", _address(), "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "the node is to go", "--deadline-remaining-seconds", str(deadline_s)]
    done = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ray drain-node {node}: {done.stderr.strip()}")


def living() -> list[dict[str, Any]]:
    """The nodes of the cluster at RAY_ADDRESS that Ray takes for alive."""
    if not ray.is_initialized():
        ray.init(address=_address(), log_to_driver=False, logging_level=logging.ERROR)
    return [node for node in ray.nodes() if node["Alive"]]


def _address() -> str:
    address = ray_address()
    if not address:
        raise BadInput("RAY_ADDRESS", "the cluster's address", "nothing", "Set RAY_ADDRESS=HEAD:PORT.")
    return address

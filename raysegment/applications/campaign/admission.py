"""How many trials fit beside each other, whole groups of workers each, so that a trial that has begun can always finish.

A trial's driver reserves memory and no CPU: drivers that took CPUs would wait for ever for those of their own workers. Its
workers' CPUs are asked for by Ray Train, all at once. The one thing that bounds drivers for every scheduler, also those that
pause trials, is what they reserve: so much memory that exactly `at_once` of them fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysegment.climate.checks import BadInput

DRIVER_BYTES = 600 * 2**20  # a TrainController takes about 380 MB and its placement-group cleaner 200


@dataclass(frozen=True)
class Node:
    """What a node has for all: CPUs, GPUs, bytes."""

    cpus: float
    gpus: float
    memory: float

    @staticmethod
    def of(resources: Mapping[str, float]) -> Node:
        """From Ray's table."""
        return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0))


@dataclass(frozen=True)
class Demand:
    """What a trial's workers need: `cells` groups of `workers` with `cpus` and `gpus` each; `together`: a group on one node."""

    workers: int
    cpus: float
    gpus: float = 0.0
    cells: int = 1
    together: bool = False

    def fit(self, nodes: Iterable[Node]) -> int:
        """How many such trials there is room for at the same time."""
        slots = [self._slots(node) for node in nodes]
        groups = sum(slot // self.workers for slot in slots) if self.together else sum(slots) // self.workers
        return groups // self.cells

    def _slots(self, node: Node) -> int:
        by_cpu = int(node.cpus / self.cpus + 1e-9)
        return min(by_cpu, int(node.gpus / self.gpus + 1e-9)) if self.gpus else by_cpu

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        cells = f"{self.cells} cells of " if self.cells > 1 else ""
        return f"{cells}{self.workers} workers of {self.cpus:g} CPU{gpus}"


@dataclass(frozen=True)
class Admission:
    """`at_once` trials run beside each other, each driver of which reserves `driver_bytes`."""

    at_once: int
    driver_bytes: int


def admit(demands: Sequence[Demand], nodes: Sequence[Node], wanted: int = 0) -> Admission:
    """Room for the largest of the trials, at most `wanted` times (0: as often as it fits); BadInput where one never fits."""
    for demand in demands:
        if demand.fit(nodes) < 1:
            raise _too_large(demand, nodes)
    fits = min(demand.fit(nodes) for demand in demands)
    drivers = sum(int(node.memory // DRIVER_BYTES) for node in nodes)
    if drivers < 1:
        have = max((node.memory for node in nodes), default=0) / 2**20
        expected = f"{DRIVER_BYTES >> 20} MiB on a node for a trial's driver"
        raise BadInput("memory", expected, f"{have:.0f} MiB", "Give Ray more memory, or free some.")
    at_once = min(fits, drivers, wanted or fits)
    return Admission(at_once, driver_bytes([node.memory for node in nodes], at_once))


def driver_bytes(memories: Sequence[float], at_once: int) -> int:
    """The least reservation of which at most `at_once` fit: m/k of some node; exactly as many wherever nodes are equal.

    Among reservations b with Σ ⌊mᵢ/b⌋ ≤ at_once, the least. With more nodes than `at_once` there may be none, and one driver
    a node is what is left: some then wait for workers' room, which Ray gives to whole groups alone.
    """
    candidates = {int(memory // k) for memory in memories for k in range(1, at_once + 1) if memory // k >= 1}
    few_enough = [b for b in candidates if sum(int(memory // b) for memory in memories) <= at_once]
    return min(few_enough, default=max(candidates))


def _too_large(demand: Demand, nodes: Sequence[Node]) -> BadInput:
    """What would fit, said."""
    fewer = (replace(demand, workers=k, cells=1) for k in range(demand.workers - 1, 0, -1))
    most = next((each.workers for each in fewer if each.fit(nodes)), 0)
    total = Node(*(sum(getattr(node, kind) for node in nodes) for kind in ("cpus", "gpus", "memory")))
    share = int(100 * total.cpus / (demand.workers * demand.cells)) / 100
    fits = f"{most} workers of {demand.cpus:g} CPU fit" if most else "not one such worker fits"
    smaller = f"train.workers={most}" if most else ""
    less = f"train.cpus_per_worker={share:g}" if 0 < share < demand.cpus and (not demand.gpus or total.gpus) else ""
    remedy = " or ".join(word for word in (smaller, less) if word) or "a larger cluster"
    expected = f"trials that fit into {total.cpus:g} CPU and {total.gpus:g} GPU on {len(nodes)} node(s) ({fits})"
    return BadInput("train.workers", expected, demand, f"Use {remedy}.")


def demands(runs: Iterable[Any], gpu: Any) -> list[Demand]:
    """What the runs (TrainConfig) need, each different demand once; `gpu(run)` says whether its workers take a GPU."""
    found = {}
    for run in runs:
        several = run.elastic.cells[1] > 1
        demand = Demand(run.workers_per_cell, run.cpus_per_worker, 1.0 if gpu(run) else 0.0, run.elastic.cells[0], several)
        found[demand] = None
    return list(found)

"""The nodes of the Ray cluster by names that outlive it, and Ray's way to do something on one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Node:
    """A living node: `name` (`ray start --node-name`, by default its IP address), Ray's `id`, bytes of its object store."""

    name: str
    id: str
    store_bytes: int

    @property
    def only(self) -> NodeAffinitySchedulingStrategy:
        """For what shall run on this node or nowhere."""
        return NodeAffinitySchedulingStrategy(self.id, soft=False)


def living_nodes() -> tuple[Node, ...]:
    """The nodes that have CPUs (all, where none has any), by name: a head without any trains nothing and needs no shards.

    Nodes of the same name, as those that a test starts on one machine, get the beginning of their id behind it.
    """
    living = [node for node in ray.nodes() if node["Alive"]]
    working = [node for node in living if node["Resources"].get("CPU", 0) > 0] or living
    count = Counter(node["NodeName"] for node in working)
    return tuple(sorted((_node(node, count[node["NodeName"]] > 1) for node in working), key=lambda node: node.name))


def _node(held: dict, ambiguous: bool) -> Node:
    name, identity = held["NodeName"], held["NodeID"]
    return Node(f"{name}-{identity[:8]}" if ambiguous else name, identity, int(held["Resources"]["object_store_memory"]))

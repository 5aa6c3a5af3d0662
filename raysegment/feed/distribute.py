"""A shard set onto the disks of the nodes: read once in total from the shared file system, passed on from node to node.

    shared file system → one node's disk and object store → the other nodes' object stores → their disks

The nodes' folders have the layout of a training run's cache, so that training finds the shards there:

    DIR/shards/<first 16 digits of the set's id>/part-00000.arrow …
    DIR/shards/<…>/placement.json     last: which nodes hold which shards, for those that lack one
    DIR/shards/<…>/manifest.json      last, where a node holds all shards: the folder is a complete set

Every copy is proved by its SHA-256 before it gets its name, at the reader as at the receivers. Running again resumes: what
any node has whole is not read from the shared file system again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from raysegment.feed.depots import NODE, Depots, Goods, Settlement, Survey, open_depots
from raysegment.feed.nodes import Node, living_nodes
from raysegment.feed.placement import Holder, Placement, Transfer, bytes_to_write, plan, wanted
from raysegment.feed.session import ensure_ray
from raysegment.feed.traffic import Progress, Traffic, mib, room

SPARE_BYTES = 256 << 20  # of every disk, left to others
_PASSES = 3  # the first, and more after a copy has turned out damaged or a node has gone


@dataclass(frozen=True)
class Distribution:
    """What came of it. `source_bytes` are the set's; `bytes_read` came from the shared file system (its manifest not
    counted), `read_ratio` times the set; `passed_bytes` went from one node to another, every receiver counted; `reused`
    copies were there before, `removed` ones were no longer assigned; `folders` are the nodes'."""

    nodes: int
    shards: int
    replicas: int
    round: int
    source_bytes: int
    bytes_read: int
    read_ratio: float
    passed_bytes: int
    written_bytes: int
    reused: int
    removed: int
    seconds: float
    folders: dict[str, str]

    @property
    def complete_set(self) -> str | None:
        """The folder that is a complete shard set on every node, if there is one."""
        folders = set(self.folders.values())
        return folders.pop() if self.replicas == self.nodes and len(folders) == 1 else None


@dataclass(frozen=True)
class Assignment:
    """How shards are dealt to nodes: `replicas` copies of each, None for one on every node; `seed` and `round` draw them."""

    replicas: int | None = None
    round: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.replicas is not None and self.replicas < 1) or self.round < 0:
            raise BadInput("--replicas, --round", "at least 1 replica, round 0 or later", self, "Change them")


def distribute(
    shards: str | Path | Place, to: str | Path, assignment: Assignment | None = None, progress: Progress | None = None
) -> Distribution:
    """Copy a shard set (a folder or URI that the nodes reach) into the folder `to` of every node, each its share.

    `{node}` in `to` stands for the node's name. After another round shards have moved between nodes, and those no longer
    assigned are removed. BadInput when a disk is too small (nothing is written then), when the source is damaged, or when
    a node is lost on the way (the others have their shares then).
    """
    started, goods, assignment = time.monotonic(), Goods.of(shards), assignment or Assignment()
    ensure_ray()
    nodes = living_nodes()
    replicas = _replicas(assignment, nodes)
    _check_stores(nodes, goods)
    goal = wanted(goods.names, [node.name for node in nodes], replicas, assignment.seed, assignment.round)
    with open_depots(nodes, goods, str(to)) as depots:
        traffic = Traffic(depots, goods.sizes, progress or (lambda done, total, note: None))
        reused = _bring_about(goal, depots, goods, traffic)
        removed = _settle(goal, depots, goods, assignment, traffic)
    _raise_for(depots, traffic)
    size = sum(goods.sizes)
    return Distribution(
        len(nodes), len(goods.sizes), replicas, assignment.round, size, traffic.bytes_read, traffic.bytes_read / size,
        traffic.passed_bytes, traffic.written_bytes, reused, removed, time.monotonic() - started, depots.folders,
    )  # fmt: skip


def _replicas(assignment: Assignment, nodes: Sequence[Node]) -> int:
    """Copies of each shard; BadInput when there are fewer nodes."""
    replicas = len(nodes) if assignment.replicas is None else assignment.replicas
    if replicas > len(nodes):
        raise BadInput("--replicas", f"at most one for each of the {len(nodes)} nodes with CPUs", replicas, "Name fewer")
    return replicas


def _check_stores(nodes: Sequence[Node], goods: Goods) -> None:
    """BadInput when a shard is too large to pass through some node's object store."""
    least, largest = min(nodes, key=room), max(goods.manifest.shards, key=lambda shard: shard.bytes)
    if largest.bytes > room(least):
        expected = f"shards of at most {mib(room(least))}, a quarter of the object store of node {least.name}"
        remedy = "Start Ray with a larger --object-store-memory, or stage smaller shards"
        raise BadInput(f"{goods.place}/{largest.file}", expected, mib(largest.bytes), remedy)


def _bring_about(goal: Sequence[Sequence[str]], depots: Depots, goods: Goods, traffic: Traffic) -> int:
    """Transfer all that can be; how many copies were there before. What failed is planned anew among the nodes left."""
    reused = None
    for _ in range(_PASSES):
        surveys = _survey(depots)
        share = [[name for name in names if name in surveys] for names in goal]
        if reused is None:
            reused = sum(shard in surveys[name].held for shard, names in enumerate(share) for name in names)
        transfers = plan(share, {name: survey.held for name, survey in surveys.items()}, goods.sizes)
        _preflight(transfers, goods.sizes, surveys, depots.folders)
        traffic.carry_out(transfers)
        if not traffic.failed:
            break
    return reused or 0


def _survey(depots: Depots) -> dict[str, Survey]:
    """What every node has; BadInput when two of them see the same folder."""
    surveys: dict[str, Survey] = depots.ask("survey")
    for name, survey in surveys.items():
        if survey.claimed_by != name:
            got = f"one that {name} shares with {survey.claimed_by}"
            remedy = f"Name a folder on the nodes' own disks, or, for several nodes of one machine, DIR/{NODE}"
            raise BadInput(depots.folders[name], "a folder of one node", got, remedy)
    return surveys


def _preflight(
    transfers: Sequence[Transfer], sizes: Sequence[int], surveys: Mapping[str, Survey], folders: Mapping[str, str]
) -> None:
    """BadInput for the first node whose disk cannot take its part."""
    for name, count in bytes_to_write(transfers, sizes).items():
        if count + SPARE_BYTES > surveys[name].free_bytes:
            got = f"{mib(surveys[name].free_bytes)} free, {mib(SPARE_BYTES)} of them left to others"
            remedy = "Free some, name a larger disk with --to, or fewer --replicas"
            raise BadInput(f"node {name}: {folders[name]}", f"room for {mib(count)}", got, remedy)


def _settle(goal: Sequence[Sequence[str]], depots: Depots, goods: Goods, assignment: Assignment, traffic: Traffic) -> int:
    """Make official what the nodes have; only when nothing failed is anything removed: how many files."""
    held: dict[str, set[int]] = {name: set() for name in depots.actors}
    for shard, names in enumerate(goal):
        for name in names:
            if name in held and (shard, name) not in traffic.failed:
                held[name].add(shard)
    complete, text = not (traffic.failed or depots.lost), _placement(held, depots, goods, assignment).text()
    settlements = {name: _settlement(text, shards, goods, complete) for name, shards in held.items()}
    return sum(depots.ask("settle", settlements).values())


def _settlement(placement: str, held: AbstractSet[int], goods: Goods, complete: bool) -> Settlement:
    lacking = tuple(shard for shard in range(len(goods.sizes)) if shard not in held)
    return Settlement(placement, None if lacking else goods.text, lacking if complete else ())


def _placement(held: Mapping[str, AbstractSet[int]], depots: Depots, goods: Goods, assignment: Assignment) -> Placement:
    nodes = tuple(Holder(name, depots.nodes[name].id, depots.folders[name]) for name in held)
    places: dict[str, list[int]] = {file: [] for file in goods.names}
    for place, shards in enumerate(held.values()):
        for shard in shards:
            places[goods.names[shard]].append(place)
    shards = {file: tuple(found) for file, found in places.items()}
    return Placement(goods.id, assignment.round, assignment.seed, nodes, shards)


def _raise_for(depots: Depots, traffic: Traffic) -> None:
    """BadInput when not everything is where it should be."""
    remedy = "Run the same command again: what is there stays"
    if depots.lost:
        lost = "; ".join(f"{name} was lost: {reason}" for name, reason in depots.lost.items())
        raise BadInput("nodes", "nodes that stay to the end", f"{lost} (the others have their shares)", remedy)
    for (shard, name), reason in traffic.failed.items():
        got = f"{len(traffic.failed)} copies that failed, the first of them shard {shard}: {reason}"
        raise BadInput(f"node {name}: {depots.folders[name]}", "every shard of the node's share", got, remedy)

"""Which nodes hold which shards, and what must be read and passed on to bring that about: arithmetic, no byte is touched.

Shards are assigned by rendezvous hashing (Thaler and Ravishankar 1998): every node draws a number for every shard, and the
highest draw holds it. A node that leaves or joins moves its own shards and no others; another round is another draw.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

PLACEMENT = "placement.json"
FORMAT = "raysegment placement 1"


@dataclass(frozen=True)
class Holder:
    """A node with shards of the set: its name, Ray's id of it, the folder of its disk in which they are."""

    name: str
    id: str
    folder: str


@dataclass(frozen=True)
class Placement:
    """What `placement.json` beside a node's shards says: which of the `nodes` hold which shards of the whole set, by file
    name and the nodes' places in the list; `set` is the set's id, `round` and `seed` drew it."""

    set: str
    round: int
    seed: int
    nodes: tuple[Holder, ...]
    shards: Mapping[str, tuple[int, ...]]
    format: str = FORMAT

    def __post_init__(self) -> None:
        places = {place for places in self.shards.values() for place in places}
        if self.format != FORMAT or not places <= set(range(len(self.nodes))):
            raise ValueError(f"expected {FORMAT!r} with places below {len(self.nodes)}, got {self.format!r}, {sorted(places)}")

    def holders(self, file: str) -> list[Holder]:
        """The nodes that hold a shard."""
        return [self.nodes[place] for place in self.shards.get(file, ())]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def parse(text: str) -> Placement:
        """What `text` made; ValueError or TypeError for anything else."""
        held = json.loads(text)
        nodes = tuple(Holder(**node) for node in held.pop("nodes"))
        shards = {file: tuple(places) for file, places in held.pop("shards").items()}
        return Placement(nodes=nodes, shards=shards, **held)


@dataclass(frozen=True)
class Transfer:
    """Shard `shard` goes from `sender` to the `receivers`, all on different nodes; with `read` the sender does not hold it
    yet, reads it from the shared file system and keeps it."""

    shard: int
    sender: str
    receivers: tuple[str, ...]
    read: bool

    def __post_init__(self) -> None:
        nodes = (self.sender, *self.receivers)
        if len(set(nodes)) < len(nodes) or not (self.receivers or self.read):
            raise ValueError(f"transfer of shard {self.shard}: expected different nodes and something to do, got {nodes}")

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.sender, *self.receivers)

    @property
    def writers(self) -> tuple[str, ...]:
        """Nodes that hold the shard afterwards and did not before."""
        return self.nodes if self.read else self.receivers


def wanted(
    shards: Sequence[str], nodes: Sequence[str], replicas: int, seed: int = 0, round_: int = 0
) -> tuple[tuple[str, ...], ...]:
    """For every shard (by name) the `replicas` nodes that shall hold it, the highest draw first.

    Without regard to the order of `nodes`. A node's number of shards is binomial around shards · replicas / nodes, so its
    standard deviation is at most the root of that. In another round a shard moves with probability 1 − 1/nodes per copy.
    """
    if not 1 <= replicas <= len(nodes) or len(set(nodes)) < len(nodes):
        raise ValueError(f"expected different nodes and 1 to {len(nodes)} replicas, got {replicas} on {list(nodes)}")
    names = sorted(nodes)
    keys = _keys(names, "node")
    return tuple(
        tuple(names[node] for node in _best(_mix(keys + shard), replicas))
        for shard in _keys(shards, f"shard {seed} {round_}")
    )  # fmt: skip


def plan(wanted: Sequence[Sequence[str]], held: Mapping[str, AbstractSet[int]], sizes: Sequence[int]) -> tuple[Transfer, ...]:
    """What is left to do when node n holds the shards `held[n]` (numbers): at most one transfer per shard, by number.

    A shard that any node holds, wanted there or not, comes from a node; one that nobody holds is read once. Among those
    that could, the node sends or reads that has the fewest bytes to send or read so far. `sizes` are the shards' bytes.
    """
    holders = _holders(held, len(wanted))
    busy: Counter[str] = Counter()
    transfers = []
    for shard, nodes in enumerate(wanted):
        lacking = [node for node in nodes if shard not in held[node]]
        if not lacking:
            continue
        sender = min(holders[shard] or lacking, key=lambda node: busy[node])
        busy[sender] += sizes[shard]
        receivers = tuple(node for node in lacking if node != sender)
        transfers.append(Transfer(shard, sender, receivers, read=not holders[shard]))
    return tuple(transfers)


def bytes_to_write(transfers: Sequence[Transfer], sizes: Sequence[int]) -> dict[str, int]:
    """Bytes that each node's disk is going to take."""
    totals: Counter[str] = Counter()
    for transfer in transfers:
        for node in transfer.writers:
            totals[node] += sizes[transfer.shard]
    return dict(totals)


def _holders(held: Mapping[str, AbstractSet[int]], shards: int) -> list[list[str]]:
    """For every shard the nodes that hold it, by name."""
    holders: list[list[str]] = [[] for _ in range(shards)]
    for node in sorted(held):
        for shard in held[node]:
            holders[shard].append(node)
    return holders


def _best(draws: NDArray[np.uint64], count: int) -> NDArray[np.intp]:
    """Places of the `count` highest draws, the highest first, of equal ones the first."""
    return np.argsort(~draws, kind="stable")[:count]


def _keys(names: Sequence[str], salt: str) -> NDArray[np.uint64]:
    """64 bits for every name."""
    digests = (hashlib.blake2b(f"{salt}/{name}".encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Draws from keys: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 16), every bit depending on all."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))

"""A shard that this node's cache lacks, from a node that holds it, through Ray's object store, before the source is asked.

Which nodes hold it says `placement.json`, that `distribute` leaves beside the shards. A node that has gone, a copy that was
evicted or is damaged, an answer that does not come in time: the next holder is asked, and after the last the source is.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from raysegment.archive.cache import ShardCache
from raysegment.archive.copies import Copies
from raysegment.archive.manifest import Shard
from raysegment.archive.reader import Damaged
from raysegment.feed.nodes import Node, living_nodes
from raysegment.feed.placement import PLACEMENT, Holder, Placement

_PATIENCE_S = 60.0  # for one copy: long beside a shard's way through a network, short beside a training run


def bring(cache: ShardCache, shards: Sequence[int]) -> int:
    """Have shards in the cache that other nodes hold; bytes that came from them. What nobody gives is still missing then."""
    missing = [shard for shard in shards if not cache.holds(shard)]
    placement = _placement(cache.folder) if missing else None
    if placement is None:
        return 0
    peers = _Peers(placement, cache)
    through_peers = ShardCache(cache.root, cache.folder.name, cache.manifest, peers, cache.limit_bytes)
    for shard in missing:
        try:
            os.close(through_peers.open(shard))
        except OSError:
            continue  # the source is still there
    return peers.brought_bytes


class _Peers:
    """The other living nodes as a source of shards."""

    def __init__(self, placement: Placement, cache: ShardCache):
        self._placement, self._here = placement, ray.get_runtime_context().get_node_id()
        self._numbers = {shard.file: number for number, shard in enumerate(cache.manifest.shards)}
        self._copies = Copies(cache.folder, cache.manifest.shards)
        nodes = living_nodes()
        self._living = {**{node.name: node for node in nodes}, **{node.id: node for node in nodes}}
        self.brought_bytes = 0

    def fetch(self, name: str, target: Path) -> int:
        """Bytes written to `target`: a shard as the first holder gives it that can; FileNotFoundError when none can."""
        shard = self._numbers[name]
        for holder, node in self._holders(name):
            try:
                data: Any = ray.get(_lend(node, holder.folder, self._copies.shards[shard]), timeout=_PATIENCE_S)
                self._copies.prove(shard, data.data, f"{name} from {holder.name}")
            except (RayError, Damaged):
                continue
            target.write_bytes(data)
            self.brought_bytes += data.nbytes
            return data.nbytes
        raise FileNotFoundError(2, "No living node gives it", name)

    def _holders(self, name: str) -> list[tuple[Holder, Node]]:
        """Living holders other than this node; each asker begins with another one, so that not all ask the same."""
        known = [
            (holder, self._living.get(holder.id) or self._living.get(holder.name)) for holder in self._placement.holders(name)
        ]
        found = [(holder, node) for holder, node in known if node is not None and node.id != self._here]
        first = zlib.crc32(f"{self._here}{name}".encode()) % max(1, len(found))
        return found[first:] + found[:first]


def _placement(folder: Path) -> Placement | None:
    """Where the set's shards are; None when nobody says."""
    try:
        return Placement.parse((folder / PLACEMENT).read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _lend(node: Node, folder: str, shard: Shard) -> Any:
    """A reference to a shard's bytes, to be read on `node`."""
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": node.only}
    return _Read.options(**options).remote(folder, shard)


def _read(folder: str, shard: Shard) -> NDArray[np.uint8]:
    return Copies(Path(folder), [shard]).read(0)


_Read: Any = ray.remote(_read)

"""Any tile, by its number, on this node: in place where the shards are on a disk it reaches, through its cache otherwise.

    in place    shard file (page cache) → the worker's buffer
    cached      object store or slow disk → the node's cache (a whole shard, once) → the worker's buffer

Whoever asks first fetches; Ray Data asks ahead of the workers (`ahead`). A tile is proved by its CRC-32 once per node. A
damaged copy in the cache is fetched anew once: only what is damaged at its source is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysegment.archive.cache import ShardCache, node_folder
from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.archive.places import Place
from raysegment.archive.reader import Damaged, Folder, TileReader


@dataclass(frozen=True)
class Source:
    """Where tiles come from: `shards` (a folder or URI), `cache` (a folder of this node, "" for its default) of at most
    `cache_gib`; on a disk, shards are read in place unless a cache is named."""

    shards: str
    cache: str = ""
    cache_gib: float = 64.0

    @property
    def in_place(self) -> bool:
        return not self.cache and Place.of(self.shards).local is not None

    @property
    def folder(self) -> Path:
        """What the node's processes share."""
        return Path(self.cache) if self.cache else node_folder()


class TileStore:
    """The tiles of one source as this node sees them; several threads may share one."""

    def __init__(self, source: Source):
        self.source, self.place = source, Place.of(source.shards)
        held = manifest_bytes(self.place)
        self.manifest, self.set_id = Manifest.parse(held, self.place), set_id(held)
        self.cache = None if source.in_place else self._cache()
        self.files = self._folder() if self.cache is None else self.cache
        self._reader = TileReader(self.manifest, self.files, source.folder / "proved" / self.set_id[:16])

    def _cache(self) -> ShardCache:
        folder, limit = self.source.folder / "shards", int(self.source.cache_gib * 2**30)
        return ShardCache(folder, self.set_id, self.manifest, self.place, limit)

    def _folder(self) -> Folder:
        assert self.place.local is not None
        return Folder(self.place.local, self.manifest)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile's fields and mask."""
        height, width = self.manifest.tile
        return height * width * (2 * len(self.manifest.channels) + 1)

    def empty(self, tiles: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """Arrays for the fields (n, 16, h, w) and masks (n, h, w) of n tiles."""
        height, width = self.manifest.tile
        fields = np.empty((tiles, len(self.manifest.channels), height, width), np.float16)
        return fields, np.empty((tiles, height, width), np.uint8)

    def read(self, number: int, fields: NDArray[np.float16], mask: NDArray[np.uint8]) -> None:
        """Tile `number` into `fields (16, h, w)` and `mask (h, w)`; `Damaged` when it is so at its source."""
        try:
            self._reader.read(number, fields, mask)
        except Damaged:
            if self.cache is None:
                raise
            shard, _ = self.manifest.find(number)
            self.cache.discard(shard)  # it may have been evicted already: what is wrong with a copy says nothing of the source
            self._reader.read(number, fields, mask)

    def here(self, number: int) -> bool:
        """True when a tile is on this node and proved; fetches nothing."""
        shard, _ = self.manifest.find(number)
        return (self.cache is None or self.cache.holds(shard)) and self._reader.proved(number)

    def prepare(self, numbers: list[int]) -> int:
        """Have tiles here and proved, for whoever reads them next; how many of them are so (the others are damaged)."""
        fields, mask = self.empty(1)
        good = 0
        for number in numbers:
            try:
                if not self._reader.proved(number):
                    self.read(number, fields[0], mask[0])
                good += 1
            except Damaged:
                continue  # the worker that needs the tile will meet the damage and record it
        return good


@lru_cache(maxsize=4)
def open_store(source: Source) -> TileStore:
    """The store of a source, one per process."""
    return TileStore(source)

"""Consecutive micro-batches of a worker's line of work as Ray Data's unit of reading.

Read tasks import this module, so it stays light (no torch): a process that reads should be there at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.extensions import ArrowTensorArray

from raysegment.archive.shards import MANIFEST, ShardSet, open_shards
from raysegment.feed.gather import gather
from raysegment.feed.order import Line


class Chunks(Datasource):
    """Ray Data's view of a line of work: one read task per chunk."""

    def __init__(self, folder: str, line: Line, chunk: int, start: int, stop: int):
        self._folder, self._line, self._chunk, self._range = folder, line, chunk, range(start, stop)

    def get_name(self) -> str:
        return "Tiles"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        each = tile_bytes(self._folder)
        return [self._task(number, each) for number in self._range]

    def _task(self, number: int, each: int) -> ReadTask:
        first, stop = number * self._chunk, min((number + 1) * self._chunk, self._line.count)
        rows = (stop - first) * self._line.order.micro_batch
        about = BlockMetadata(num_rows=rows, size_bytes=rows * each, input_files=None, exec_stats=None)
        return ReadTask(_reader(self._folder, self._line, first, stop), about)


def _reader(folder: str, line: Line, first: int, stop: int) -> Callable[[], list[pa.Table]]:
    """What a read task does: gather the micro-batches [first, stop) of a line into one block."""

    def read() -> list[pa.Table]:
        positions = line.positions(first, stop)
        fields, mask = gather(_mapped(folder), line.order, positions)
        columns = {"fields": ArrowTensorArray.from_numpy(fields), "mask": ArrowTensorArray.from_numpy(mask)}
        return [pa.table({"positions": pa.array(positions, pa.int64()), **columns})]

    return read


def _mapped(folder: str) -> ShardSet:
    """The shards in a folder, mapped once per process for as long as the manifest stays the same."""
    return _mapped_as_of(folder, (Path(folder) / MANIFEST).stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _mapped_as_of(folder: str, _changed_ns: int) -> ShardSet:
    return open_shards(folder)


def tile_bytes(folder: str) -> int:
    """Bytes of a tile's fields and mask."""
    manifest = _mapped(folder).manifest
    return math.prod(manifest.tile) * (2 * len(manifest.channels) + 1)

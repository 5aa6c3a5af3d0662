"""Ray Data ahead of a worker: tasks that have the tiles of its coming steps on this node, and proved, before it asks.

What travels is the numbers of tiles; bytes go from the source into the node's cache or page cache, and no further. A plan
covers a window of the worker's line of work after the other, at most two beyond what the worker has taken. Tiles that are
here already need no task, so that from the second epoch on a set that fits the node costs nothing. If a task fails, the
worker reads for itself: nothing waits for this.

Each worker plans its own share, a few microseconds a tile; nobody plans for others, however many workers there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from threading import Condition, Thread
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from raysegment.feed.order import Line
from raysegment.feed.peers import bring
from raysegment.feed.session import quiet_data
from raysegment.feed.store import Source, TileStore, open_store

_log = logging.getLogger(__name__)


class Ahead:
    """Prepares the tiles of a line of work, from micro-batch `start` on, in a thread of its own until it is stopped.

    `window` micro-batches are planned at a time, in tasks of about `per_task` tiles, `tasks` of them at once.
    """

    def __init__(self, store: TileStore, line: Line, window: int, per_task: int, tasks: int):
        self._store, self._line, self._window, self._per_task, self._tasks = store, line, window, per_task, tasks
        self._taken, self._stopped, self._change = 0, False, Condition()
        self.prepared = 0  # tiles that tasks have made ready
        self.bytes_from_peers = 0  # that did not come from the source
        Thread(target=self._run, name="ahead", daemon=True).start()

    def advance(self, taken: int) -> None:
        """Tell how many micro-batches of the line the worker has taken."""
        with self._change:
            self._taken = taken
            self._change.notify()

    def stop(self) -> None:
        """Plan no more; does not wait."""
        with self._change:
            self._stopped = True
            self._change.notify()

    def _run(self) -> None:
        try:
            for start in range(0, self._line.count, self._window):
                if not self._wait_for(start):
                    return
                self._prepare(missing(self._store, self._line, max(start, self._taken), start + self._window))
        except Exception as error:  # whatever ails Ray, training goes on without it
            _log.warning("raysegment: tiles are no longer prepared ahead: %s: %s", type(error).__name__, error)

    def _wait_for(self, start: int) -> bool:
        """Until the worker is within a window of `start`; False when there is nothing more to do."""
        with self._change:
            self._change.wait_for(lambda: self._stopped or self._taken >= start - self._window)
            return not self._stopped

    def _prepare(self, numbers: list[int]) -> None:
        if not numbers:
            return
        for good, from_peers in _execute(self._store.source, tasks_of(self._store, numbers, self._per_task), self._tasks):
            self.prepared += good
            self.bytes_from_peers += from_peers
            if self._stopped:
                return


def missing(store: TileStore, line: Line, start: int, stop: int) -> list[int]:
    """Tiles of the micro-batches [start, stop) that are not yet here and proved, in the order of need."""
    numbers = dict.fromkeys(line.order.tile(position) for position in line.positions(start, stop))
    return [number for number in numbers if not store.here(number)]


def tasks_of(store: TileStore, numbers: list[int], per_task: int) -> list[list[int]]:
    """Tiles as the work of tasks, in the order of need: those of a shard together where shards are fetched whole."""
    if store.cache is None:
        return [numbers[start : start + per_task] for start in range(0, len(numbers), per_task)]
    shards: dict[int, list[int]] = {}
    for number in numbers:
        shards.setdefault(store.manifest.find(number)[0], []).append(number)
    return list(shards.values())


def _execute(source: Source, work: list[list[int]], tasks: int) -> Iterator[tuple[int, int]]:
    """One Ray Data execution on this node: for each piece of work, how many tiles are ready after it, bytes from peers."""
    quiet_data()
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # a scheduling strategy given here is ignored
    # Tasks take no CPU in Ray's books: however many of them trainers hold, tasks never wait for those who wait for them.
    data = ray.data.read_datasource(
        _Tiles(source, work), override_num_blocks=len(work), concurrency=min(tasks, len(work)), num_cpus=0,
        label_selector=here,
    )  # fmt: skip
    data.context.execution_options.preserve_order = True
    data.context.execution_options.verbose_progress = False
    for batch in data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        yield from zip(batch["good"].tolist(), batch["from_peers"].tolist(), strict=True)


class _Tiles(Datasource):
    """Ray Data's view of the work: one read task per piece."""

    def __init__(self, source: Source, work: list[list[int]]):
        self._source, self._work = source, work

    def get_name(self) -> str:
        return "Tiles"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        about = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
        return [ReadTask(_reader(self._source, numbers), about) for numbers in self._work]


def _reader(source: Source, numbers: list[int]) -> Callable[[], list[pa.Table]]:
    """What a task does: have `numbers` here, and say how many are."""
    return lambda: [pa.table(_have_here(open_store(source), numbers))]


def _have_here(store: TileStore, numbers: list[int]) -> dict[str, list[int]]:
    """Tiles made ready, whole shards from other nodes where those have them; one row of what came of it."""
    shards = sorted({store.manifest.find(number)[0] for number in numbers})
    from_peers = bring(store.cache, shards) if store.cache is not None else 0
    return {"good": [store.prepare(numbers)], "from_peers": [from_peers]}

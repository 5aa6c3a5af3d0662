"""Steps read in place, when they are asked for: no thread, no Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator

from raysegment.feed.batches import StepInput
from raysegment.feed.gather import Buffers, gather
from raysegment.feed.order import Order
from raysegment.feed.quarantine import Quarantine
from raysegment.feed.store import TileStore


def direct_steps(
    store: TileStore, order: Order, first_step: int, last_step: int, rank: int, world_size: int, quarantine: Quarantine
) -> Iterator[StepInput]:
    """`rank`'s share of every step in [first_step, last_step), read when it is asked for."""
    buffers = Buffers()
    for step in range(first_step, last_step):
        started = time.perf_counter()
        batches = [gather(store, order, p, quarantine, buffers) for p in order.micro_batches(step, rank, world_size)]
        yield StepInput(step, batches, time.perf_counter() - started)


class DirectStream:
    """What `stream.Stream` is, without threads: `rank`'s share of steps up to `last_step`, under one plan after the other."""

    def __init__(self, store: TileStore, order: Order, last_step: int, quarantine: Quarantine):
        self._store, self._order, self._last, self._quarantine = store, order, last_step, quarantine
        self._steps: Iterator[StepInput] = iter(())

    def replan(self, step: int, rank: int, world_size: int) -> None:
        """From now on the share of `rank` in a group of `world_size`, beginning with `step`."""
        self._steps = direct_steps(self._store, self._order, step, self._last, rank, world_size, self._quarantine)

    def __iter__(self) -> Iterator[StepInput]:
        return self

    def __next__(self) -> StepInput:
        return next(self._steps)

    def close(self) -> None:
        """Nothing to end."""

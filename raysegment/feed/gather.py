"""The tiles of some positions as one micro-batch, in memory that is used again."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raysegment.archive.reader import Damaged
from raysegment.feed.batches import MicroBatch
from raysegment.feed.order import Order
from raysegment.feed.quarantine import Case, Quarantine
from raysegment.feed.store import TileStore


class Buffers:
    """Arrays that come back when the last tensor over them is gone, so that memory is faulted in once.

    What `take` returns may be handed to torch; slices of the array itself must not outlive it.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[tuple[int, ...], str], deque[NDArray]] = defaultdict(deque)

    def take(self, shape: tuple[int, ...], dtype: type) -> NDArray:
        """An array of any content."""
        free = self._free[shape, np.dtype(dtype).str]
        try:
            whole = free.pop()
        except IndexError:
            whole = np.empty(shape, dtype)
        lent = whole[...]
        weakref.finalize(lent, free.append, whole).atexit = False
        return lent


def gather(store: TileStore, order: Order, positions: Sequence[int], quarantine: Quarantine, buffers: Buffers) -> MicroBatch:
    """The tiles at `positions`; a damaged one is recorded, its row zero and not usable."""
    height, width = store.manifest.tile
    fields = buffers.take((len(positions), len(store.manifest.channels), height, width), np.float16)
    mask = buffers.take((len(positions), height, width), np.uint8)
    quarantine.refresh()
    usable = [_read(store, order, p, quarantine, fields[row], mask[row]) for row, p in enumerate(positions)]
    for row in (row for row, good in enumerate(usable) if not good):
        fields[row], mask[row] = 0, 0
    which = None if all(usable) else torch.tensor(usable)
    return MicroBatch(torch.tensor(positions, dtype=torch.int64), torch.from_numpy(fields), torch.from_numpy(mask), which)


def _read(store: TileStore, order: Order, position: int, quarantine: Quarantine, fields: NDArray, mask: NDArray) -> bool:
    """One tile into its rows; False when it is left out."""
    number = order.tile(position)
    if quarantine.excludes(number, position):
        return False
    try:
        store.read(number, fields, mask)
    except Damaged as error:
        quarantine.add(Case(number, position, str(error)))
        return False
    return True

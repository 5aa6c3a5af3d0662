"""Tiles by position, copied out of the mapped shards; needs neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raysegment.archive.shards import ShardSet
from raysegment.feed.order import Order


def gather(shards: ShardSet, order: Order, positions: Sequence[int]) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Fields (n, 16, h, w) and masks (n, h, w) of the tiles at `positions`, copied out of the mapped files."""
    height, width = shards.manifest.tile
    fields = np.empty((len(positions), len(shards.manifest.channels), height, width), np.float16)
    mask = np.empty((len(positions), height, width), np.uint8)
    for place, position in enumerate(positions):
        tile = shards.tile(order.tile(position))
        fields[place], mask[place] = tile.fields, tile.mask
    return fields, mask

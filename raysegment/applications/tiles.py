"""A map computed in pieces that overlap, so that no map is too large for the memory, and no border of a piece shows.

A piece is a core and a margin around it, round the circle where the map closes it. Neighbours fade into each other about
the border of their cores; farther out than half of the fade a piece does not count:

    weight   0 … 0 ╱ 1 … 1 ╲ 0 … 0        the slopes of two neighbours are over the same cells and sum to one
               margin │ core │ margin

The margin is what the network sees and half of the fade besides, so that pieces give the same as the whole map, whatever
their size. A network that takes a mean over the whole map cannot be given pieces of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

FADE = 32  # cells over which neighbours fade into each other, or half a margin where that is less


@dataclass(frozen=True)
class Tiling:
    """Cores of at most `rows` × `columns` cells with a `margin` on each side, all of them multiples of `multiple`."""

    rows: int
    columns: int
    margin: int
    multiple: int

    def __post_init__(self) -> None:
        for value in (self.rows, self.columns, self.margin):
            assert value > 0 == value % self.multiple, self

    @staticmethod
    def of(tile: tuple[int, int], reach: int, multiple: int) -> Tiling:
        """Cores of about `tile` cells for a network that sees `reach` cells far and strides over `multiple`."""
        rows, columns, margin = (-(-size // multiple) * multiple for size in (*tile, reach + FADE // 2))
        return Tiling(rows, columns, margin, multiple)


@dataclass(frozen=True, eq=False)
class Side:
    """A piece along one axis: the cells it covers, their weights, both (n,)."""

    cells: NDArray[np.intp]
    weights: NDArray[np.float32]


def sides(size: int, core: int, margin: int, closed: bool) -> Iterator[Side]:
    """The pieces along an axis of `size` cells that closes a circle or does not; one where a piece would cover all.

    The weights of all at a cell sum to one, but where a last core is shorter than the fade.
    """
    if size <= core + 2 * margin:
        yield Side(np.arange(size), np.ones(size, np.float32))
        return
    fade = min(FADE, margin / 2)
    for start in range(0, size, core):
        stop = min(start + core, size)
        low, high = start - margin, stop + margin
        cells = np.arange(low if closed else max(low, 0), high if closed else min(high, size))
        rise = np.clip((cells + 0.5 - start) / fade + 0.5, 0.0, 1.0)
        fall = np.clip((stop - cells - 0.5) / fade + 0.5, 0.0, 1.0)
        rise, fall = (rise if closed or start else np.ones_like(rise)), (fall if closed or stop < size else np.ones_like(fall))
        yield Side(cells % size, (rise * fall).astype(np.float32))


def blended(
    fields: torch.Tensor, tiling: Tiling, closed: bool, infer: Callable[[torch.Tensor], torch.Tensor]
) -> NDArray[np.float32]:
    """`infer (1, C, h, w) → (classes, h, w)` over the pieces of `fields (1, C, H, W)`, blended: (classes, H, W).

    H and W are multiples of the tiling's; `closed` when columns go on around the circle.
    """
    height, width = fields.shape[-2:]
    total, weight = np.zeros((0, 0, 0), np.float32), np.zeros((height, width), np.float32)
    for row in sides(height, tiling.rows, tiling.margin, False):
        for column in sides(width, tiling.columns, tiling.margin, closed):
            piece = infer(fields[:, :, row.cells][..., column.cells]).numpy()
            if not total.size:
                total = np.zeros((piece.shape[0], height, width), np.float32)
            share = row.weights[:, None] * column.weights
            at = np.ix_(row.cells, column.cells)
            np.add.at(weight, at, share)
            for plane, values in zip(total, piece, strict=True):
                np.add.at(plane, at, share * values)
    return total / weight

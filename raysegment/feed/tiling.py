"""Where tiles are cut from a map: they cover it, all of one size, as few as possible.

Rows: one tile below the other from the south; the last is aligned to the northern edge and overlaps the one before it
where the height does not divide. Columns: on a map that closes the circle tiles follow each other eastward from the
first column and the last one wraps around Greenwich; on a regional map the last is aligned to the eastern edge.

With a halo of N cells neighbours overlap by 2 N: every cell lies in the interior of a tile, at least N cells from its
edges, except where the tile's edge is the map's own (the poles; the sides of a region). A tile as wide as a circle that
closes has no edges in the east and west, one as high as the map none in the north and south.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tiling:
    """Tiles of `tile` (rows, columns) on a map of `shape` (H, W), each with a rim of `halo` cells that others have, too."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    periodic: bool
    halo: int = 0

    def __post_init__(self) -> None:
        if not all(0 < part <= whole for part, whole in zip(self.tile, self.shape, strict=True)):
            whole, part = ("x".join(map(str, size)) for size in (self.shape, self.tile))
            raise ValueError(f"tile: expected at most {whole} cells of the map, got {part}")
        cut = [part for part, whole in zip(self.tile, self.shape, strict=True) if part < whole]
        if self.halo < 0 or any(part <= 2 * self.halo for part in cut):
            most = (min(cut, default=1) - 1) // 2
            raise ValueError(f"halo: expected 0 to {most} cells for tiles of {self.tile[0]}x{self.tile[1]}, got {self.halo}")

    @staticmethod
    def of(shape: tuple[int, int], tile: tuple[int, int] | None, periodic: bool, halo: int = 0) -> Tiling:
        """`tile` None takes the whole map."""
        return Tiling(shape, shape if tile is None else tile, periodic, halo)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top-left (southern, western) cell of each tile."""
        rows = _starts(self.shape[0], self.tile[0], self.halo, wraps=False)
        columns = _starts(self.shape[1], self.tile[1], self.halo, wraps=self.periodic)
        return [(row, column) for row in rows for column in columns]

    def cut(self, field: NDArray, row: int, column: int) -> NDArray:
        """The tile (…, h, w) of `field (…, H, W)` whose first cell is (row, column), around Greenwich where it is periodic."""
        height, width = self.tile
        columns = np.arange(column, column + width) % self.shape[1]
        rows = field[..., row : row + height, :]
        return rows[..., columns] if columns[-1] < column else rows[..., column : column + width]


def _starts(size: int, part: int, halo: int, wraps: bool) -> list[int]:
    """First cells of tiles of length `part` along an axis of `size` cells: a stride apart, the last aligned to the end."""
    if part == size:
        return [0]
    stride = part - 2 * halo
    if wraps:
        return list(range(0, size, stride))
    return [min(index * stride, size - part) for index in range(1 + math.ceil((size - part) / stride))]

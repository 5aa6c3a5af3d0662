"""Where tiles are cut from a map: they cover it, all of one size, as few as possible.

Rows: one tile below the other from the south; the last is aligned to the northern edge and overlaps the one before it
where the height does not divide. Columns: on a map that closes the circle tiles follow each other eastward from the
first column and the last one wraps around Greenwich; on a regional map the last is aligned to the eastern edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tiling:
    """Tiles of `tile` (rows, columns) on a map of `shape` (H, W); `tile` None takes the whole map."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    periodic: bool

    def __post_init__(self) -> None:
        if not all(0 < part <= whole for part, whole in zip(self.tile, self.shape, strict=True)):
            whole, part = ("x".join(map(str, size)) for size in (self.shape, self.tile))
            raise ValueError(f"tile: expected at most {whole} cells of the map, got {part}")

    @staticmethod
    def of(shape: tuple[int, int], tile: tuple[int, int] | None, periodic: bool) -> Tiling:
        return Tiling(shape, shape if tile is None else tile, periodic)

    @property
    def corners(self) -> list[tuple[int, int]]:
        """Top-left (southern, western) cell of each tile."""
        rows = _starts(self.shape[0], self.tile[0], wraps=False)
        columns = _starts(self.shape[1], self.tile[1], wraps=self.periodic)
        return [(row, column) for row in rows for column in columns]

    def cut(self, field: NDArray, row: int, column: int) -> NDArray:
        """The tile (…, h, w) of `field (…, H, W)` whose first cell is (row, column), around Greenwich where it is periodic."""
        height, width = self.tile
        columns = np.arange(column, column + width) % self.shape[1]
        rows = field[..., row : row + height, :]
        return rows[..., columns] if columns[-1] < column else rows[..., column : column + width]


def _starts(size: int, part: int, wraps: bool) -> list[int]:
    starts = [index * part for index in range(math.ceil(size / part))]
    return starts if wraps else [min(start, size - part) for start in starts]

"""One region with several lows in it is several storms: pressure minima by their prominence.

The prominence of a minimum is how far pressure must rise before a path from it meets a deeper one; 200 Pa is the
closed-contour depth by which TempestExtremes tells a cyclone (Zarzycki & Ullrich 2017).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.grid import Grid, great_circle_km

PROMINENCE_PA = 200.0
APART_KM = 500.0  # centres nearer than this are one storm's


def prominent_lows(psl_pa: NDArray, rows: NDArray, cols: NDArray, width: int, prominence_pa: float = PROMINENCE_PA) -> list[int]:
    """Places in (rows, cols) of the minima of `psl_pa (H, W)` within the cells, at least `prominence_pa` prominent.

    `width` is the number of columns of a map that closes the circle (neighbours over the seam), 0 for one that does not.
    Cells are taken from the lowest up; where two basins meet, the shallower one's minimum ends with the prominence it has
    (0-dimensional persistence; Edelsbrunner & Harer 2010, VII.1). The deepest minimum always counts.
    """
    values = psl_pa[rows, cols]
    place = {(int(r), int(c)): k for k, (r, c) in enumerate(zip(rows, cols, strict=True))}
    parent = np.full(values.size, -1)
    kept = []
    for k in np.argsort(values, kind="stable"):
        parent[k] = k
        for neighbour in _neighbours(int(rows[k]), int(cols[k]), width):
            other = place.get(neighbour, -1)
            if other < 0 or parent[other] < 0:
                continue
            a, b = _root(parent, int(k)), _root(parent, other)
            if a == b:
                continue
            low, high = (a, b) if values[a] <= values[b] else (b, a)
            if values[k] - values[high] >= prominence_pa:
                kept.append(int(high))
            parent[high] = low
    roots = {_root(parent, k) for k in range(values.size)}
    return sorted([*kept, *roots], key=lambda k: float(values[k]))


def split_cells(
    psl_pa: NDArray, grid: Grid, rows: NDArray, cols: NDArray, prominence_pa: float = PROMINENCE_PA, apart_km: float = APART_KM
) -> list[NDArray[np.intp]]:
    """Groups of places in (rows, cols), one per storm: each cell goes with the nearest prominent low."""
    centres: list[tuple[float, float]] = []
    for k in prominent_lows(psl_pa, rows, cols, grid.shape[1] if grid.periodic else 0, prominence_pa):
        lat, lon = float(grid.lat[rows[k]]), float(grid.lon[cols[k]])
        if all(great_circle_km(lat, lon, *centre) >= apart_km for centre in centres):
            centres.append((lat, lon))
    away = np.stack([great_circle_km(grid.lat[rows], grid.lon[cols], *centre) for centre in centres])
    return [np.flatnonzero(away.argmin(0) == k) for k in range(len(centres))]


def _neighbours(row: int, col: int, width: int):
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            if dr or dc:
                yield row + dr, (col + dc) % width if width else col + dc


def _root(parent: NDArray, k: int) -> int:
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = int(parent[k])
    return k

"""Connected regions and neighbourhoods of a map on the sphere: seams closed, sizes in kilometres.

A *window* is the rectangle of cells around a point with each cell's distance; a *region* is a connected set of cells,
joined across the first and last column where the grid closes the circle, never over a pole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csgraph, csr_matrix

from raysegment.climate.grid import KM_PER_DEGREE, Grid, great_circle_km

FOUR = ndimage.generate_binary_structure(2, 1)
EIGHT = ndimage.generate_binary_structure(2, 2)

_AXIS_CELL_KM = 80.0  # regions are coarsened to about this cell before their axis is sought: finer costs time, not truth
_HOP_KM = 250.0  # the axis is measured in hops of this length, so that the staircase of a cell path is not counted


@dataclass(frozen=True, eq=False)
class Window:
    """Cells around a point: `rows (h,)`, `cols (w,)` of the grid (unwrapped in order) and `distance_km (h, w)`."""

    rows: NDArray[np.intp]
    cols: NDArray[np.intp]
    distance_km: NDArray[np.float64]

    @property
    def index(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Indexes a map (H, W), giving (h, w)."""
        return self.rows[:, None], self.cols[None, :]

    def cell(self, row: int, col: int) -> tuple[int, int]:
        """Where a cell of the map lies inside the window."""
        return int(np.flatnonzero(self.rows == row)[0]), int(np.flatnonzero(self.cols == col)[0])


def spacing_km(grid: Grid) -> float:
    """The coarser of the two spacings at the equator: what "one cell" means to a search distance."""
    return max(grid.dlat, grid.dlon) * KM_PER_DEGREE


def window(grid: Grid, lat: float, lon: float, radius_km: float) -> Window:
    """The cells within `radius_km` of a point and at least one cell beyond, as a rectangle of rows and columns.

    The half-width in longitude of a spherical cap is asin(sin r / cos φ); a cap that holds a pole takes every column.
    """
    row, col = grid.nearest(lat, lon)
    reach = radius_km / KM_PER_DEGREE
    half_rows = int(np.ceil(reach / grid.dlat)) + 1
    rows = np.arange(max(0, row - half_rows), min(grid.lat.size, row + half_rows + 1))
    sine = np.sin(np.deg2rad(min(reach, 90.0))) / max(np.cos(np.deg2rad(lat)), 1e-9)
    half = int(np.ceil(np.rad2deg(np.arcsin(sine)) / grid.dlon)) + 1 if sine < 1.0 else grid.lon.size
    cols = _columns(grid, col, half)
    distance = great_circle_km(grid.lat[rows][:, None], grid.lon[cols][None, :], lat, lon)
    return Window(rows, cols, distance)


def _columns(grid: Grid, col: int, half: int) -> NDArray[np.intp]:
    """Columns col − half … col + half: wrapped where the grid closes the circle, cut at its edges elsewhere."""
    width = grid.lon.size
    if not grid.periodic:
        return np.arange(max(0, col - half), min(width, col + half + 1))
    if 2 * half + 1 >= width:
        return (np.arange(width) + col - width // 2) % width
    return np.arange(col - half, col + half + 1) % width


def label_regions(mask: NDArray[np.bool_], periodic: bool, structure: NDArray[np.bool_] = EIGHT) -> tuple[NDArray[np.int32], int]:
    """Connected regions of a mask (H, W): labels 1…n (H, W) and n, joined across the seam where `periodic`."""
    labels = np.zeros(mask.shape, np.int32)
    count = int(ndimage.label(mask, structure, output=labels))  # type: ignore[arg-type]  # a count when `output` is given
    if not periodic or count < 2:
        return labels, count
    first, last = labels[:, 0], labels[:, -1]
    pairs = [np.stack([first, last])]
    if structure[0, 0]:
        pairs += [np.stack([first[1:], last[:-1]]), np.stack([first[:-1], last[1:]])]
    joined = np.concatenate(pairs, axis=1)
    joined = joined[:, (joined > 0).all(axis=0)]
    links = csr_matrix((np.ones(joined.shape[1], np.int8), (joined[0], joined[1])), shape=(count + 1, count + 1))
    number, names = csgraph.connected_components(links, directed=False)
    return names.astype(np.int32)[labels], int(number) - 1  # label 0 is alone and first, so it keeps the name 0


def region_areas_km2(labels: NDArray[np.int32], count: int, grid: Grid) -> NDArray[np.float64]:
    """Area of each region (n,): the sum of its cells' areas."""
    rows = np.repeat(np.arange(labels.shape[0]), labels.shape[1])
    inside = np.flatnonzero(labels.ravel())
    return np.bincount(labels.ravel()[inside], grid.area_km2[rows[inside], 0], count + 1)[1:].astype(np.float64)


@dataclass(frozen=True, eq=False)
class Region:
    """One region cut out of a map: `rows (h,)`, `cols (w,)` (unwrapped in order) and its cells `inside (h, w)`."""

    rows: NDArray[np.intp]
    cols: NDArray[np.intp]
    inside: NDArray[np.bool_]

    @property
    def cells(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and columns of the map, one pair per cell."""
        y, x = np.nonzero(self.inside)
        return self.rows[y], self.cols[x]


def cut_regions(labels: NDArray[np.int32], chosen: Sequence[int] | NDArray[np.intp]) -> list[Region]:
    """The chosen regions (label numbers) by themselves; one that crosses the seam is cut at its widest gap instead."""
    boxes, regions = ndimage.find_objects(labels), []
    for number in chosen:
        box = boxes[number - 1]
        assert box is not None, f"label {number} has no cell"
        inside = labels[box] == number
        rows, cols = np.arange(box[0].start, box[0].stop), np.arange(box[1].start, box[1].stop)
        if cols.size == labels.shape[1]:
            order = _unwrap(inside.any(axis=0))
            cols, inside = cols[order], inside[:, order]
        regions.append(Region(rows, cols, inside))
    return regions


def _unwrap(occupied: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Columns in use, in an order that starts after the widest run of empty ones (all of them if there is none)."""
    width = occupied.size
    used = np.flatnonzero(occupied)
    gaps = np.diff(np.append(used, used[0] + width))
    if gaps.max() == 1:
        return np.arange(width)
    widest = int(gaps.argmax())
    start = int(used[(widest + 1) % used.size])
    return (start + np.arange(width - int(gaps[widest]) + 1)) % width


def axis_km(region: Region, grid: Grid) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Length (km) of a region along its medial axis, and the axis itself (latitudes, longitudes in degrees).

    The axis runs between the two cells that are farthest apart within the region (found by two sweeps of Dijkstra's
    algorithm) along the path that minimises ∫ ds / w², where w is the distance to the region's border: it keeps to the
    middle and follows bends. One cell is added, half at either end.
    """
    lat, lon, inside = _coarsen(region, grid)
    nodes = np.flatnonzero(inside)
    where = np.stack(np.unravel_index(nodes, inside.shape))
    lats, lons = lat[where[0]], lon[where[1]]
    closes = grid.periodic and inside.shape[1] * np.median(np.diff(lon) % 360.0) > 359.0 if lon.size > 1 else False
    a, b, km = _edges(inside, lats, lons, closes)
    width = _border_km(inside, lat, lon)[where[0], where[1]]
    graph = csr_matrix((km, (a, b)), shape=(nodes.size, nodes.size))
    end = _farthest(graph, int(great_circle_km(lats, lons, lats[nodes.size // 2], lons[nodes.size // 2]).argmax()))
    start = _farthest(graph, end)
    middle = csr_matrix((km / (0.5 * (width[a] + width[b])) ** 2, (a, b)), shape=graph.shape)
    _, before = csgraph.dijkstra(middle, directed=False, indices=end, return_predecessors=True)
    path = [start]
    while path[-1] != end and before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    cell = float(np.sqrt(np.median(grid.area_km2[region.cells[0], 0])))
    return _hops_km(lats[path], lons[path]) + cell, lats[path], lons[path]


def _farthest(graph: csr_matrix, node: int) -> int:
    """The node with the longest shortest path from one node, among those that can be reached."""
    reach = csgraph.dijkstra(graph, directed=False, indices=node)
    return int(np.where(np.isfinite(reach), reach, -1.0).argmax())


def _coarsen(region: Region, grid: Grid) -> tuple[NDArray, NDArray, NDArray]:
    """Latitudes, longitudes and cells of a region in blocks of about `_AXIS_CELL_KM`; a block with any cell counts."""
    shrink = np.cos(np.deg2rad(float(np.mean(grid.lat[region.rows]))))
    height, width = region.inside.shape
    down = _block(grid.dlat * KM_PER_DEGREE, height)
    across = _block(grid.dlon * KM_PER_DEGREE * shrink, width)
    padded: NDArray[np.bool_] = np.zeros((-(-height // down) * down, -(-width // across) * across), bool)
    padded[:height, :width] = region.inside
    inside = np.any(padded.reshape(-(-height // down), down, -1, across), axis=(1, 3))
    lat = grid.lat[region.rows[0]] + (np.arange(inside.shape[0]) * down + (down - 1) / 2) * grid.dlat
    lon = grid.lon[region.cols[0]] + (np.arange(inside.shape[1]) * across + (across - 1) / 2) * grid.dlon
    return np.clip(lat, -90.0, 90.0), lon, inside


def _block(cell_km: float, cells: int) -> int:
    """Cells per block along one axis: about `_AXIS_CELL_KM`, at least two blocks where there are two cells."""
    return max(1, min(int(_AXIS_CELL_KM / cell_km), cells // 2))


def _edges(inside: NDArray, lats: NDArray, lons: NDArray, closes: bool) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs of 8-neighbours within a region (by node number) and the distance between them in km."""
    number = np.full((inside.shape[0], inside.shape[1] + 1), -1)
    number[:, :-1][inside] = np.arange(lats.size)
    if closes:
        number[:, -1] = number[:, 0]
    pairs = []
    for low, high in (
        (number[:, :-1], number[:, 1:]),
        (number[:-1], number[1:]),
        (number[:-1, :-1], number[1:, 1:]),
        (number[1:, :-1], number[:-1, 1:]),
    ):
        both = (low >= 0) & (high >= 0)
        pairs.append(np.stack([low[both], high[both]]))
    a, b = np.concatenate(pairs, axis=1)
    if closes:  # the repeated column's own links were counted twice
        a, b = np.unique(np.sort(np.stack([a, b]), axis=0), axis=1)
    return a, b, np.maximum(great_circle_km(lats[a], lons[a], lats[b], lons[b]), 1e-6)


def _border_km(inside: NDArray, lat: NDArray, lon: NDArray) -> NDArray[np.float64]:
    """Distance of each cell to the border of its region, km (metric of the region's mean latitude)."""
    dlat = (lat[1] - lat[0] if lat.size > 1 else 1.0) * KM_PER_DEGREE
    dlon = (lon[1] - lon[0] if lon.size > 1 else 1.0) * KM_PER_DEGREE * max(0.05, np.cos(np.deg2rad(lat.mean())))
    return np.asarray(ndimage.distance_transform_edt(np.pad(inside, 1), sampling=(dlat, dlon)))[1:-1, 1:-1]


def _hops_km(lats: NDArray, lons: NDArray) -> float:
    """Length of a path of neighbouring cells, measured in great-circle hops of about `_HOP_KM`."""
    if lats.size < 2:
        return 0.0
    along = np.append(0.0, np.cumsum(great_circle_km(lats[:-1], lons[:-1], lats[1:], lons[1:])))
    hops = max(1, round(along[-1] / _HOP_KM))
    stops = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], hops + 1)).clip(0, lats.size - 1))
    return float(great_circle_km(lats[stops[:-1]], lons[stops[:-1]], lats[stops[1:]], lons[stops[1:]]).sum())


def component_of(mask: NDArray[np.bool_], row: int, col: int, structure: NDArray[np.bool_] = FOUR) -> NDArray[np.bool_]:
    """The connected part of a window's mask (h, w) that holds one cell; empty when the cell itself is not in it."""
    labels, _ = label_regions(mask, False, structure)
    return (labels == labels[row, col]) & (labels[row, col] > 0)

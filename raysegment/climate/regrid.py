"""Maps from one regular grid to another: bilinear where the target is finer, area-weighted means where it is coarser.

Each axis is handled by itself with a sparse matrix of weights, so a map may be refined one way and coarsened the other.
Longitude is periodic where the source closes the circle. A constant map stays that constant, and a coarsened map keeps
its area integral; class probabilities therefore still sum to one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from raysegment.climate.grid import EARTH_RADIUS_KM, Grid


def regrid(fields: NDArray, grid: Grid, target_grid: Grid) -> NDArray:
    """`fields (…, H, W)` on `grid` → `(…, H', W')` on `target_grid`, dtype kept (float32 at least)."""
    assert fields.shape[-2:] == grid.shape, f"{fields.shape} is not on a grid of {grid.shape}"
    dtype = np.result_type(fields.dtype, np.float32)
    if grid.same_as(target_grid):
        return fields.astype(dtype)
    rows, cols = latitude_weights(grid, target_grid), longitude_weights(grid, target_grid)
    flat = np.asarray(fields, dtype).reshape(-1, *grid.shape)
    moved = np.stack([rows.astype(dtype) @ (cols.astype(dtype) @ one.T).T for one in flat])
    return moved.reshape(*fields.shape[:-2], *target_grid.shape)


def to_spacing(grid: Grid, dlat: float, dlon: float) -> Grid:
    """The grid of the given spacing (degrees) that covers what `grid` covers; the same grid if it has that spacing.

    A row on a pole stays one. Where `grid` closes the circle the columns do too, at the nearest whole number of them.
    """
    assert dlat > 0 < dlon, (dlat, dlon)
    south, north = grid.lat[0], grid.lat[-1]
    height = max(2, round((north - south) / dlat) + 1)
    lat = np.linspace(south, north, height)
    if grid.periodic:
        width = max(2, round(360.0 / dlon))
        return Grid(lat, grid.lon[0] + np.arange(width) * (360.0 / width))
    width = max(2, round((grid.lon[-1] - grid.lon[0]) / dlon) + 1)
    return Grid(lat, np.linspace(grid.lon[0], grid.lon[-1], width))


def latitude_weights(grid: Grid, target: Grid) -> csr_matrix:
    """Weights (H', H) of latitude rows; coarsening weighs by sin φ₂ − sin φ₁, the area of a band."""
    if target.dlat <= grid.dlat * (1 + 1e-6):
        return _linear((target.lat - grid.lat[0]) / grid.dlat, grid.lat.size, wraps=False)
    edges = _sine_edges(grid)
    return _overlap(_sine_edges(target), edges, grid.lat.size)


def longitude_weights(grid: Grid, target: Grid) -> csr_matrix:
    """Weights (W', W) of longitude columns, periodic where the source is."""
    offset = (target.lon - grid.lon[0]) % 360.0 if grid.periodic else target.lon - grid.lon[0]
    if target.dlon <= grid.dlon * (1 + 1e-6):
        return _linear(offset / grid.dlon, grid.lon.size, wraps=grid.periodic)
    width = grid.lon.size
    edges = (np.arange(width + 1) - 0.5) * grid.dlon
    if not grid.periodic:
        half = target.dlon / 2
        return _overlap(np.stack([offset - half, offset + half]), edges, width)
    turns = np.concatenate([edges[:-1] - 360.0, edges[:-1], edges + 360.0])
    bounds = np.stack([offset - target.dlon / 2, offset + target.dlon / 2])
    thrice = _overlap(bounds, turns, 3 * width)
    fold = csr_matrix((np.ones(3 * width), (np.arange(3 * width), np.arange(3 * width) % width)), shape=(3 * width, width))
    return csr_matrix(thrice @ fold)


def _linear(place: NDArray, size: int, wraps: bool) -> csr_matrix:
    """Linear interpolation at fractional indices `place (n,)`; beyond the ends the nearest value."""
    if not wraps:
        place = np.clip(place, 0.0, size - 1.0)
    low = np.floor(place).astype(int)
    share = place - low
    columns = np.concatenate([low, low + 1]) % size if wraps else np.clip(np.concatenate([low, low + 1]), 0, size - 1)
    rows = np.tile(np.arange(place.size), 2)
    return csr_matrix((np.concatenate([1.0 - share, share]), (rows, columns)), shape=(place.size, size))


def _sine_edges(grid: Grid) -> NDArray:
    """Sines of the edges of the rows (H + 1,), ending at the poles."""
    edges = np.append(grid.lat - grid.dlat / 2, grid.lat[-1] + grid.dlat / 2)
    return np.sin(np.deg2rad(np.clip(edges, -90.0, 90.0)))


def _overlap(bounds: NDArray, edges: NDArray, size: int) -> csr_matrix:
    """Share of each source cell in each target cell; `bounds` are edges (n + 1,) or lower and upper ones (2, n)."""
    lower, upper = (bounds[:-1], bounds[1:]) if bounds.ndim == 1 else bounds
    lower, upper = np.clip(lower, edges[0], edges[-1]), np.clip(upper, edges[0], edges[-1])
    shared = np.minimum(upper[:, None], edges[None, 1:]) - np.maximum(lower[:, None], edges[None, :-1])
    shared = np.maximum(shared, 0.0)
    total = shared.sum(axis=1, keepdims=True)
    alone = np.flatnonzero(total[:, 0] <= 0.0)  # a target cell beyond the source's edge takes the nearest source cell
    shared[alone, np.clip(np.searchsorted(edges, lower[alone]) - 1, 0, size - 1)] = 1.0
    return csr_matrix(shared / np.where(total > 0.0, total, 1.0))


def sample(field: NDArray, grid: Grid, lat: NDArray, lon: NDArray) -> NDArray:
    """Bilinear values of a map (H, W) at points in degrees (any shape); periodic in longitude, clamped at the ends."""
    height, width = grid.shape
    y = np.clip((np.asarray(lat) - grid.lat[0]) / grid.dlat, 0.0, height - 1.0)
    x = (np.asarray(lon) - grid.lon[0]) / grid.dlon
    x = x % (360.0 / grid.dlon) if grid.periodic else np.clip(x, 0.0, width - 1.0)
    row, col = np.minimum(y.astype(int), height - 2), np.floor(x).astype(int)
    right = (col + 1) % width if grid.periodic else np.minimum(col + 1, width - 1)
    col = col % width
    dy, dx = y - row, x - np.floor(x)
    below = field[row, col] * (1 - dx) + field[row, right] * dx
    above = field[row + 1, col] * (1 - dx) + field[row + 1, right] * dx
    return below * (1 - dy) + above * dy


def destination(lat: NDArray, lon: NDArray, bearing_deg: NDArray, distance_km: NDArray) -> tuple[NDArray, NDArray]:
    """Points reached from (lat, lon) along great circles; degrees, arrays broadcast (bearing clockwise from north)."""
    from_lat, angle = np.deg2rad(lat), np.asarray(distance_km) / EARTH_RADIUS_KM
    bearing = np.deg2rad(bearing_deg)
    sine = np.sin(from_lat) * np.cos(angle) + np.cos(from_lat) * np.sin(angle) * np.cos(bearing)
    east = np.arctan2(np.sin(bearing) * np.sin(angle) * np.cos(from_lat), np.cos(angle) - np.sin(from_lat) * sine)
    return np.rad2deg(np.arcsin(np.clip(sine, -1.0, 1.0))), (np.asarray(lon) + np.rad2deg(east)) % 360.0

"""Tiles cover the map, and each is what indexing cell by cell would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.feed.tiling import Tiling


@st.composite
def tilings(draw, halos: bool = False) -> Tiling:
    shape = draw(st.tuples(st.integers(2, 40), st.integers(2, 40)))
    tile = tuple(draw(st.integers(1, size)) for size in shape)
    cut = [part for part, whole in zip(tile, shape, strict=True) if part < whole]
    halo = draw(st.integers(0, (min(cut) - 1) // 2)) if halos and cut else 0
    return Tiling(shape, tile, draw(st.booleans()), halo)


@given(tilings())
@settings(deadline=None)
def test_tiles_cover_the_map_with_as_few_as_possible(tiling):
    (height, width), (h, w) = tiling.shape, tiling.tile
    cells = np.arange(height * width).reshape(1, height, width)
    cut = [tiling.cut(cells, row, column) for row, column in tiling.corners]
    assert all(tile.shape == (1, h, w) for tile in cut)
    assert set(np.concatenate([tile.ravel() for tile in cut])) == set(range(height * width))
    assert len(cut) == -(-height // h) * -(-width // w)


def interior(start: int, part: int, size: int, halo: int, wraps: bool) -> set[int]:
    """Cells of a tile along one axis that are at least `halo` from its ends, where those are not the map's own."""
    if part == size:
        return set(range(size))
    first = start + (halo if start > 0 or wraps else 0)
    last = start + part - (halo if start + part < size or wraps else 0)
    return {cell % size for cell in range(first, last)}


@given(tilings(halos=True))
@settings(deadline=None)
def test_every_cell_is_in_the_interior_of_a_tile(tiling):
    (height, width), (h, w) = tiling.shape, tiling.tile
    rows = {row for row, _ in tiling.corners}
    columns = {column for _, column in tiling.corners}
    inner_rows = [interior(row, h, height, tiling.halo, wraps=False) for row in rows]
    inner_columns = [interior(column, w, width, tiling.halo, wraps=tiling.periodic) for column in columns]
    assert set().union(*inner_rows) == set(range(height))
    assert set().union(*inner_columns) == set(range(width))
    assert set(tiling.corners) == {(row, column) for row in rows for column in columns}


@pytest.mark.parametrize("dropped", range(4))
def test_no_tile_with_a_halo_is_idle(dropped):
    """Without any one of the columns of tiles some cell has no interior around it."""
    tiling = Tiling.of((96, 144), (48, 48), True, halo=6)
    columns = sorted({column for _, column in tiling.corners})
    assert columns == [0, 36, 72, 108]
    rest = [interior(column, 48, 144, 6, wraps=True) for column in columns if column != columns[dropped]]
    assert set().union(*rest) != set(range(144))


@given(tilings(halos=True))
@settings(deadline=None)
def test_a_tile_is_its_cells_around_greenwich_only_where_the_map_closes(tiling):
    (height, width), (h, w) = tiling.shape, tiling.tile
    field = np.random.default_rng(0).normal(size=(2, height, width))
    for row, column in tiling.corners:
        expected = [[field[:, row + i, (column + j) % width] for j in range(w)] for i in range(h)]
        np.testing.assert_array_equal(tiling.cut(field, row, column), np.array(expected).transpose(2, 0, 1))
        assert row + h <= height
        assert tiling.periodic or column + w <= width


def test_the_whole_map_is_the_default():
    assert Tiling.of((73, 144), None, True).corners == [(0, 0)]
    assert Tiling.of((73, 144), (48, 48), True).corners == [(r, c) for r in (0, 25) for c in (0, 48, 96)]
    assert Tiling.of((10, 10), (10, 4), True).corners == [(0, 0), (0, 4), (0, 8)]
    assert Tiling.of((10, 10), (10, 4), False).corners == [(0, 0), (0, 4), (0, 6)]
    assert Tiling.of((10, 10), (10, 4), False, halo=1).corners == [(0, 0), (0, 2), (0, 4), (0, 6)]
    assert Tiling.of((10, 10), (10, 4), True, halo=1).corners == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8)]
    assert Tiling.of((10, 10), None, True, halo=7).corners == [(0, 0)], "a whole map has no neighbours"


def test_a_tile_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="at most 10x20"):
        Tiling.of((10, 20), (11, 20), True)


@pytest.mark.parametrize("halo", [-1, 4, 5])
def test_a_halo_that_leaves_nothing_is_refused(halo):
    with pytest.raises(ValueError, match="0 to 3 cells for tiles of 8x20"):
        Tiling.of((10, 20), (8, 20), True, halo)

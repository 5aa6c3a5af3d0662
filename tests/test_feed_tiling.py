"""Tiles cover the map, and each is what indexing cell by cell would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.feed.tiling import Tiling


@st.composite
def tilings(draw) -> Tiling:
    shape = draw(st.tuples(st.integers(2, 40), st.integers(2, 40)))
    tile = tuple(draw(st.integers(1, size)) for size in shape)
    return Tiling(shape, tile, draw(st.booleans()))


@given(tilings())
@settings(deadline=None)
def test_tiles_cover_the_map_with_as_few_as_possible(tiling):
    (height, width), (h, w) = tiling.shape, tiling.tile
    cells = np.arange(height * width).reshape(1, height, width)
    cut = [tiling.cut(cells, row, column) for row, column in tiling.corners]
    assert all(tile.shape == (1, h, w) for tile in cut)
    assert set(np.concatenate([tile.ravel() for tile in cut])) == set(range(height * width))
    assert len(cut) == -(-height // h) * -(-width // w)


@given(tilings())
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


def test_a_tile_larger_than_the_map_is_refused():
    with pytest.raises(ValueError, match="at most 10x20"):
        Tiling.of((10, 20), (11, 20), True)

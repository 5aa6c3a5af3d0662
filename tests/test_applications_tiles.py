"""Maps in pieces: weights that sum to one, and the same result as in one piece of whatever does not see too far."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysegment.applications.tiles import Tiling, blended, sides
from raysegment.networks import NetworkConfig, TiramisuConfig, build


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 20), st.booleans())
def test_every_cell_is_covered_and_the_core_by_its_own_piece(size, core, margin, closed):
    total = np.zeros(size)
    for side in sides(size, core, margin, closed):
        assert side.cells.min() >= 0
        assert side.cells.max() < size
        np.add.at(total, side.cells, side.weights)
    assert (total > 0.2).all()
    if core >= margin:
        assert total.min() > 0.45
        assert total.max() < 1.55


@given(st.integers(2, 5), st.booleans())
def test_whole_cores_sum_to_one(pieces, closed):
    total = np.zeros(pieces * 32)
    for side in sides(pieces * 32, 32, 16, closed):
        np.add.at(total, side.cells, side.weights)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("tiling", [Tiling(16, 16, 16, 4), Tiling(32, 48, 20, 4), Tiling(64, 20, 16, 4)])
def test_pieces_are_put_back_where_they_were(tiling, closed):
    fields = torch.randn(1, 3, 64, 96)
    result = blended(fields, tiling, closed, lambda piece: piece[0])
    np.testing.assert_allclose(result, fields[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("closed", [True, False])
def test_a_network_makes_of_pieces_what_it_makes_of_the_whole(closed):
    """Its view is shorter than three quarters of the margin; columns are turned so that the seam is inside a piece, too."""
    torch.manual_seed(0)
    network = build(NetworkConfig(tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1), dropout=0.0))).eval()
    fields = torch.randn(1, 16, 96, 160)
    with torch.inference_mode():
        whole = network(fields)[0].numpy()
        for rows, columns in ((32, 64), (48, 40)):
            tiling = Tiling(rows, columns, 64, int(network.multiple))  # pyright: ignore[reportArgumentType]
            pieces = blended(fields, tiling, True, lambda piece: network(piece)[0])
            inside = slice(None) if closed else slice(48, -48)  # the network itself goes on around the circle
            np.testing.assert_allclose(pieces[..., inside], whole[..., inside], rtol=1e-4, atol=1e-4)
            if not closed:
                open_pieces = blended(fields, tiling, False, lambda piece: network(piece)[0])
                np.testing.assert_allclose(open_pieces[..., inside], whole[..., inside], rtol=1e-4, atol=1e-4)

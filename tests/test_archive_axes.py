"""The way from a file's axes to the canonical grid and back loses and invents nothing."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysegment.archive.axes import Axes
from raysegment.climate.grid import Grid


@st.composite
def grids(draw) -> Grid:
    """Global or regional, anywhere, regions across Greenwich and the date line included."""
    height, width = draw(st.integers(2, 12)), draw(st.integers(3, 24))
    if draw(st.booleans()):
        return Grid(
            np.linspace(-90, 90, height), draw(st.sampled_from([0.0, 0.5])) * 360 / width + np.arange(width) * (360 / width)
        )
    step = draw(st.sampled_from([0.25, 1.0, 2.5]))
    south, west = draw(st.integers(-60, 30)), draw(st.integers(0, 359))
    return Grid(south + step * np.arange(height), west + step * np.arange(width))


@st.composite
def axes_of(draw) -> tuple[Grid, Axes, np.ndarray, np.ndarray]:
    """A grid, the axes of a file on it (flipped, rotated, from −180, as float32), and its rows and columns in that file."""
    grid = draw(grids())
    rows = np.arange(grid.shape[0])[:: draw(st.sampled_from([1, -1]))]
    shift = draw(st.integers(0, grid.shape[1] - 1)) if grid.periodic else 0
    columns = np.roll(np.arange(grid.shape[1]), shift)
    lon = grid.lon[columns]
    turned = draw(st.sampled_from([lon, (lon + 180.0) % 360.0 - 180.0, lon - 360.0, (lon % 360.0)]))
    kind = draw(st.sampled_from([np.float64, np.float32]))
    return grid, Axes(grid.lat[rows].astype(kind), turned.astype(kind)), rows, columns


@given(axes_of())
def test_any_axes_become_the_grid_and_back(case):
    grid, axes, rows, columns = case
    assert axes.grid.shape == grid.shape
    np.testing.assert_allclose(axes.grid.lat, grid.lat, atol=1e-4)
    np.testing.assert_allclose((axes.grid.lon - grid.lon + 180.0) % 360.0, 180.0, atol=1e-4)
    assert 0.0 <= axes.grid.lon[0] < 360.0
    truth = np.arange(2 * grid.lat.size * grid.lon.size, dtype=np.float32).reshape(2, *grid.shape)
    in_file = truth[:, rows][:, :, columns]
    np.testing.assert_array_equal(axes.to_canonical(in_file), truth)
    np.testing.assert_array_equal(axes.from_canonical(truth), in_file)


def test_cyclic_point_is_taken_once_and_given_back():
    axes = Axes(np.linspace(90, -90, 5), np.arange(0.0, 361.0, 30.0))
    assert axes.grid.shape == (5, 12)
    assert axes.grid.periodic
    array = np.arange(60.0).reshape(5, 12)
    in_file = axes.from_canonical(array)
    np.testing.assert_array_equal(in_file[:, 0], in_file[:, -1])
    np.testing.assert_array_equal(axes.to_canonical(in_file), array)


def test_greenwich_as_a_tiny_negative_number():
    lon = np.arange(-180.0, 180.0, 10.0)
    lon[18] = -1.8e-13
    assert Axes(np.linspace(-90, 90, 19), lon).grid.same_as(Grid.global_(19, 36))


@pytest.mark.parametrize(
    ("lat", "lon"),
    [
        (np.array([-90.0, -80.0, -60.0]), np.arange(36) * 10.0),  # irregular
        (np.linspace(-90, 90, 19), np.array([0.0, 10.0, 30.0])),
        (np.linspace(-100, 90, 20), np.arange(36) * 10.0),  # beyond a pole
        (np.array([0.0, np.nan, 2.0]), np.arange(36) * 10.0),
        (np.array([0.0]), np.arange(36) * 10.0),
        (np.zeros((3, 4)), np.arange(36) * 10.0),  # curvilinear
        (np.array([0.0, 0.0, 1.0]), np.arange(36) * 10.0),  # twice
    ],
)
def test_irregular_axes_are_refused(lat, lon):
    with pytest.raises(ValueError, match="expected"):
        Axes(lat, lon)


def test_axes_travel():
    axes = Axes(np.linspace(90, -90, 5), np.arange(-180.0, 180.0, 30.0))
    twin = pickle.loads(pickle.dumps(axes))
    assert twin.grid.same_as(axes.grid)
    np.testing.assert_array_equal(twin.lon, axes.lon)

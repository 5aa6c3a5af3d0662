"""Objects linked in time: by overlap first, by distance where nothing overlaps; merging, splitting, gaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csgraph, csr_matrix

from raysegment.climate.channels import CYCLONE, RIVER
from raysegment.climate.events import Event, MapObject, find_objects
from raysegment.climate.grid import Grid
from raysegment.climate.linking import MAX_GAP_H, MAX_SPEED_KM_H, MIN_OVERLAP, Forest, Linker, overlaps

GRID = Grid.global_(91, 180)


def storm(lat: float, lon: float, kind: int = CYCLONE, grid: Grid = GRID) -> MapObject:
    """An object of one cell."""
    row, col = grid.nearest(lat, lon)
    area = float(grid.area_km2[row, 0])
    event = Event(kind, lat, lon, 1, area, 400.0, 250.0, lat, lat, lon, lon)
    return MapObject(event, np.array([row * grid.shape[1] + col]), grid)


def boxes(*edges: tuple[int, int, int, int], kind: int = RIVER) -> list[MapObject]:
    """Objects of a map with rectangles of cells (first row, last row, first column, last column), larger ones first."""
    mask = np.zeros(GRID.shape, np.uint8)
    for south, north, west, east in edges:
        mask[south:north, np.arange(west, east) % GRID.shape[1]] = kind
    return find_objects(mask, GRID)


def link(events: list, times: list, **limits) -> list[list[int]]:
    """Branches, time after time."""
    linker = Linker(**limits)
    return [linker.step(found, hour) for found, hour in zip(events, times, strict=True)]


def link_tracks(events: list, times: list, **limits) -> list[list[int]]:
    """Tracks, time after time."""
    linker = Linker(**limits)
    branches = [linker.step(found, hour) for found, hour in zip(events, times, strict=True)]
    return [linker.tracks().number[row].tolist() for row in branches]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_forest_agrees_with_connected_components(count, pairs):
    pairs = [(a % count, b % count) for a, b in pairs]
    forest = Forest()
    assert [forest.add() for _ in range(count)] == list(range(count))
    for a, b in pairs:
        forest.join(a, b)
    graph = csr_matrix((np.ones(len(pairs)), tuple(np.array(pairs, int).reshape(-1, 2).T)), shape=(count, count))
    _, names = csgraph.connected_components(graph, directed=False)
    assert forest.roots().tolist() == [int(np.flatnonzero(names == name)[0]) for name in names]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_overlaps_agree_with_sets_of_cells(seed):
    random = np.random.default_rng(seed)
    one, other = (find_objects(random.integers(0, 3, (10, 20)).astype(np.uint8) * (random.random((10, 20)) < 0.4), small)
                  for small in [Grid.global_(10, 20)] * 2)  # fmt: skip
    other = [MapObject(found.event, found.cells, one[0].grid) for found in other] if one else []
    shares = overlaps(one, other)
    for row, ours in enumerate(one):
        for column, its in enumerate(other):
            both = np.array(sorted(set(ours.cells) & set(its.cells)), int)
            km2 = float(ours.grid.area_km2[both // 20, 0].sum()) if ours.event.kind == its.event.kind else 0.0
            assert shares[row, column] == pytest.approx(km2 / min(ours.event.area_km2, its.event.area_km2))


def test_rivers_that_merge_or_split_are_one_track_of_several_branches():
    two = boxes((60, 64, 100, 120), (60, 64, 122, 132))
    one = boxes((60, 64, 100, 132))
    assert link([two, one, two], [0.0, 3.0, 6.0]) == [[0, 1], [0], [0, 2]]
    assert link_tracks([two, one, two], [0.0, 3.0, 6.0]) == [[0, 0], [0], [0, 0]]
    apart = [*two, *boxes((20, 24, 10, 30))]
    assert link_tracks([apart, one], [0.0, 3.0]) == [[0, 0, 1], [0]]


def test_two_that_brush_past_each_other_stay_two():
    """Even where one grows over half of where the other was: both have gone on."""
    before = boxes((60, 64, 100, 140), (65, 70, 118, 140))
    after = boxes((60, 67, 100, 140), (68, 72, 118, 140))
    assert overlaps(after, before)[0].min() > MIN_OVERLAP
    assert link_tracks([before, after], [0.0, 3.0]) == [[0, 1], [0, 1]]
    over = boxes((60, 64, 110, 118))  # overlaps the first by half, nothing else
    assert overlaps(over, before).max() > MIN_OVERLAP
    assert link_tracks([before, over], [0.0, 3.0])[1] == [0]


def test_overlap_goes_before_distance():
    """The large object's centre moves far, and a small one turns up where the centre was."""
    before = boxes((60, 63, 170, 190))  # over the date line and on
    after = [*boxes((60, 63, 183, 230)), *boxes((66, 68, 179, 181))]
    assert link_tracks([before, after], [0.0, 1.0]) == [[0], [0, 1]]


def test_what_is_known_of_tracks():
    land = np.zeros(GRID.shape)
    land[:, 110:] = 1.0
    mask = np.zeros((3, *GRID.shape), np.uint8)
    for step in range(3):
        mask[step, 60:64, 100 + 4 * step : 106 + 4 * step] = RIVER
    linker = Linker()
    for step in range(3):
        linker.step(find_objects(mask[step], GRID, None, land), 6.0 * step)
    linker.step(boxes((10, 12, 10, 12)), 18.0)
    tracks = linker.tracks()
    assert tracks.number.tolist() == [0, 1]
    assert tracks.duration_h.tolist() == [12.0, 0.0]
    assert tracks.landfall_h[0] == 12.0  # columns 108 to 113 at the last time
    assert np.isnan(tracks.landfall_h[1])
    assert GRID.lon[110] <= tracks.landfall_lon[0] <= GRID.lon[113]


def test_only_living_branches_are_held():
    linker = Linker()
    for step in range(200):
        linker.step([storm(10.0, (7.0 * step) % 360.0)], 30.0 * step)
        assert len(linker._ends) == 1
    assert linker.tracks().number.tolist() == list(range(200))
    assert MAX_GAP_H < 30.0


def test_times_must_ascend():
    linker = Linker()
    linker.step([], 6.0)
    with pytest.raises(AssertionError, match="ascend"):
        linker.step([], 6.0)


def test_two_storms_over_the_date_line_keep_their_tracks():
    days = [[storm(15.0, 179.0), storm(-15.0, 1.0)], [storm(-15.5, 359.0), storm(16.0, 181.0)], [storm(17.0, 183.0)]]
    times = [0.0, 6.0, 12.0]
    assert link(days, times) == [[0, 1], [1, 0], [0]]


def test_nothing_outruns_the_speed_limit():
    hours = [0.0, 6.0]
    step_deg = MAX_SPEED_KM_H[CYCLONE] * 6.0 / 111.2
    slow, fast = ([[storm(0.0, 50.0)], [storm(step_deg * share, 50.0)]] for share in (0.95, 1.05))
    assert link(slow, hours) == [[0], [0]]
    assert link(fast, hours) == [[0], [1]]
    assert link(fast, hours, max_speed_km_h={CYCLONE: 200.0, RIVER: 1.0}) == [[0], [0]]
    rivers = [[storm(found.event.lat, found.event.lon, RIVER) for found in row] for row in fast]
    assert link(rivers, hours) == [[0], [0]]  # a river's centroid may move faster


def test_a_short_gap_is_bridged_and_a_long_one_is_not():
    row = [[storm(10.0, 50.0)], [], [storm(10.5, 50.5)]]
    assert link(row, [0.0, 6.0, 12.0]) == [[0], [], [0]]
    assert link(row, [0.0, 6.0, 12.0], max_gap_h=6.0) == [[0], [], [1]]


def test_classes_and_unknown_times_do_not_link():
    assert link([[storm(10.0, 50.0)], [storm(10.0, 50.0, RIVER)]], [0.0, 6.0]) == [[0], [1]]
    assert link([[storm(10.0, 50.0)], [storm(10.0, 50.0)]], [None, None]) == [[0], [1]]


def test_the_nearest_pairing_is_taken():
    before = [storm(10.0, 50.0), storm(10.0, 52.0)]
    after = [storm(12.0, 51.5), storm(12.0, 54.0)]
    assert link([before, after], [0.0, 6.0]) == [[0, 1], [0, 1]]

"""Objects of successive times joined into tracks as they stream by: by overlap, where nothing overlaps by distance.

Glossary. A *branch* is a line of objects, at most one per time; a *track* is the branches that were ever one object: where
two merge or one splits, their branches are joined by union–find afterwards, so a branch's track is known at the end only.

The rule, at each time and for each class, between its objects and the last objects of the branches that live:

1. A pair *touches* when the cells they share make up at least `MIN_OVERLAP` of the smaller one's area. Of the touching pairs
   the one-to-one pairing with the largest sum of those shares continues branches.
2. What is left over and touches has split off or been merged: a new object starts a branch and an old one ends, and either
   is joined with the branch it shares most with.
3. What touches nothing (fast small storms, long time steps) is paired one-to-one with the least distance, as a share of what
   could be travelled (`MAX_SPEED_KM_H`), where that is at most 1.

Only the last objects of living branches are held, and 48 bytes per branch that ever was.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from raysegment.climate.channels import CYCLONE, RIVER
from raysegment.climate.events import MapObject
from raysegment.climate.grid import great_circle_km

# The farthest an object's centre moves (km/h): TECA's 1600 km a day for cyclones; a river's centroid also moves as it
# grows and breaks, and is given twice that.
MAX_SPEED_KM_H = {CYCLONE: 1600.0 / 24.0, RIVER: 3200.0 / 24.0}
MAX_GAP_H = 24.0  # a track survives this long without an object (TempestExtremes StitchNodes --maxgap 24h)
MIN_OVERLAP = 0.25  # of the smaller object: less is two objects that brush past each other
_IMPOSSIBLE = 1e6  # an impossible pair is never worth two possible ones


class Forest:
    """Union–find over the numbers 0, 1, …, 8 bytes each; a set goes by its smallest number."""

    def __init__(self) -> None:
        self._parent = array("q")

    def __len__(self) -> int:
        return len(self._parent)

    def add(self) -> int:
        """The next number, in a set of its own."""
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def root(self, number: int) -> int:
        """The smallest number of a number's set."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def roots(self) -> NDArray[np.int64]:
        """The smallest number of every number's set (n,)."""
        return np.array([self.root(number) for number in range(len(self))], np.int64)


@dataclass(frozen=True, eq=False)
class _End:
    """The last object of a branch, and when it was."""

    found: MapObject
    hour: float
    branch: int


@dataclass(frozen=True, eq=False)
class Tracks:
    """What is known of tracks at the end, by branch (n,): number of its track (0, 1, … in order of first appearance),
    hours of the track's first and last object and of its first landfall with the place (NaN where there is none)."""

    number: NDArray[np.int64]
    start_h: NDArray[np.float64]
    end_h: NDArray[np.float64]
    landfall_h: NDArray[np.float64]
    landfall_lat: NDArray[np.float64]
    landfall_lon: NDArray[np.float64]

    @property
    def duration_h(self) -> NDArray[np.float64]:
        """Hours from first to last object; 0 where times are not known."""
        return np.nan_to_num(self.end_h - self.start_h, nan=0.0)


class Linker:
    """Give `step` the objects of one time after the other; `tracks` says at the end which branches were one."""

    def __init__(self, max_speed_km_h: Mapping[int, float] = MAX_SPEED_KM_H, max_gap_h: float = MAX_GAP_H) -> None:
        self._speeds, self._max_gap_h = max_speed_km_h, max_gap_h
        self._forest, self._ends = Forest(), list[_End]()
        self._hour = -np.inf
        self._start, self._end, self._landfall = array("d"), array("d"), (array("d"), array("d"), array("d"))

    def step(self, objects: Sequence[MapObject], hour: float | None) -> list[int]:
        """Branch of each object of one time (hours, later than the time before; None where unknown: links to nothing)."""
        if hour is None:
            return [self._note(self._open(), found, np.nan) for found in objects]
        assert hour > self._hour, f"times must ascend, got {self._hour} before {hour}"
        self._hour = hour
        ends = [end for end in self._ends if hour - end.hour <= self._max_gap_h]
        shared = overlaps(objects, [end.found for end in ends])
        pairs = _continue(objects, ends, shared, hour, self._speeds)
        branches = [ends[pairs[k]].branch if k in pairs else self._open() for k in range(len(objects))]
        over = self._join_leftovers(branches, ends, shared, pairs)
        self._ends = [end for column, end in enumerate(ends) if column not in over]
        self._ends += [_End(found, hour, branch) for found, branch in zip(objects, branches, strict=True)]
        return [self._note(branch, found, hour) for branch, found in zip(branches, objects, strict=True)]

    def tracks(self) -> Tracks:
        """Which branches were one track, and when and where those were; after the last step."""
        roots = self._forest.roots()
        start, end = np.array(self._start), np.array(self._end)
        np.fmin.at(start, roots, np.array(self._start))
        np.fmax.at(end, roots, np.array(self._end))
        when = np.array(self._landfall[0])
        first = np.arange(roots.size)
        for branch in np.flatnonzero(np.isfinite(when)):
            root = roots[branch]
            if not when[first[root]] <= when[branch]:
                first[root] = branch
        landfall = [np.array(values)[first[roots]] for values in self._landfall]
        number = np.unique(roots, return_inverse=True)[1].astype(np.int64)
        return Tracks(number, start[roots], end[roots], *landfall)

    def _open(self) -> int:
        """A new branch."""
        for values in (self._start, self._end, *self._landfall):
            values.append(np.nan)
        return self._forest.add()

    def _note(self, branch: int, found: MapObject, hour: float) -> int:
        """Write an object into its branch's account."""
        if np.isnan(self._start[branch]):
            self._start[branch] = hour
        self._end[branch] = hour
        if found.land_place is not None and np.isnan(self._landfall[1][branch]):
            for values, value in zip(self._landfall, (hour, *found.land_place), strict=True):
                values[branch] = value
        return branch

    def _join_leftovers(self, branches: list[int], ends: list[_End], shared: NDArray, pairs: dict[int, int]) -> set[int]:
        """Join what has split or merged with what it shares most with; the ends (columns) that are over."""
        for place in range(len(branches)):
            if place not in pairs and _touches(shared[place]):
                self._forest.join(branches[place], ends[int(shared[place].argmax())].branch)
        continued = set(pairs.values())
        merged = {column for column in range(len(ends)) if column not in continued and _touches(shared[:, column])}
        for column in merged:
            self._forest.join(ends[column].branch, branches[int(shared[:, column].argmax())])
        return continued | merged


def overlaps(objects: Sequence[MapObject], others: Sequence[MapObject]) -> NDArray[np.float64]:
    """Shared area as a share of the smaller object's (len(objects), len(others)); 0 between classes and between grids.

    Objects of one grid hold the same `Grid` object; those of `objects` are painted onto a map that the others look up.
    """
    shared = np.zeros((len(objects), len(others)))
    for grid in {id(found.grid): found.grid for found in objects}.values():
        painted = np.full(grid.shape[0] * grid.shape[1], -1, np.int32)
        for place, found in enumerate(objects):
            if found.grid is grid:
                painted[found.cells] = place
        for column, other in enumerate(others):
            if other.grid is grid:
                hit = painted[other.cells]
                weights = grid.area_km2[other.cells // grid.shape[1], 0]
                area = np.bincount(hit + 1, weights, len(objects) + 1)[1:]
                shared[:, column] += area / [min(one.event.area_km2, other.event.area_km2) for one in objects]
    same = np.array([[one.event.kind == other.event.kind for other in others] for one in objects], bool)
    return np.where(same.reshape(shared.shape), shared, 0.0)


def _touches(shares: NDArray) -> bool:
    return bool(shares.size and shares.max() >= MIN_OVERLAP)


def _continue(
    objects: Sequence[MapObject], ends: Sequence[_End], shared: NDArray, hour: float, speeds: Mapping[int, float]
) -> dict[int, int]:
    """Which object (by place) continues which end (by column): by overlap, and by distance among what touches nothing."""
    pairs = assign(np.where(shared >= MIN_OVERLAP, 1.0 - shared, np.inf))
    rows = [place for place in range(len(objects)) if not _touches(shared[place])]
    columns = [column for column in range(len(ends)) if not _touches(shared[:, column])]
    travelled = _travelled([objects[place] for place in rows], [ends[column] for column in columns], hour, speeds)
    far = assign(np.where(travelled <= 1.0, travelled, np.inf))
    return pairs | {rows[place]: columns[column] for place, column in far.items()}


def assign(cost: NDArray) -> dict[int, int]:
    """The one-to-one pairing (row → column) of least total cost among the pairs of finite cost, as many as possible."""
    if not cost.size:
        return {}
    possible = np.isfinite(cost)
    rows, columns = linear_sum_assignment(np.where(possible, cost, _IMPOSSIBLE))
    return {int(row): int(column) for row, column in zip(rows, columns, strict=True) if possible[row, column]}


def _travelled(
    objects: Sequence[MapObject], ends: Sequence[_End], hour: float, speeds: Mapping[int, float]
) -> NDArray[np.float64]:
    """Distance of every pair as a share of what could be travelled; infinite between classes."""
    if not objects or not ends:
        return np.empty((len(objects), len(ends)))
    kind, lat, lon = np.array([(one.event.kind, one.event.lat, one.event.lon) for one in objects]).T[:, :, None]
    last = [end.found.event for end in ends]
    own_kind, own_lat, own_lon = np.array([(event.kind, event.lat, event.lon) for event in last]).T[:, None, :]
    reach_km = np.array([speeds[event.kind] * (hour - end.hour) for event, end in zip(last, ends, strict=True)])
    return np.where(kind == own_kind, great_circle_km(lat, lon, own_lat, own_lon) / np.maximum(reach_km, 1e-9), np.inf)

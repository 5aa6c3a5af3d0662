"""Maps of a file asked for time after time, each stored byte read once, whatever shape its chunks have.

A chunk may span several times and several levels; reading map by map would fetch and decompress it for each of them.
Here the maps that share chunks are read together at the first of them that is asked for, and kept until the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from math import prod
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from raysegment.archive.stored import Stored

Place = tuple[str, tuple[int, ...]]  # a variable, and the index along each dimension that is not time, latitude or longitude


class Chunkwise:
    """The maps at `places` of `count` times, to be asked for in ascending order of time, each once.

    What must be kept is kept in at most `memory_bytes`; beyond that in unlinked temporary files, the largest blocks first.
    Besides, the library holds one chunk unpacked. Maps elsewhere than at `places` are read as they are asked for.
    """

    def __init__(
        self,
        variables: Mapping[str, Stored],
        dims: tuple[str | None, str, str],
        count: int,
        places: Iterable[Place] = (),
        memory_bytes: int = 0,
    ):
        self._variables, self._dims, self._count = variables, dims, count
        self._columns = {place: column for column in self._group(set(places)) for place in column.places}
        self._budget(memory_bytes)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the file has for the maps at all places and times."""
        return sum(column.stored_bytes for column in set(self._columns.values()))

    def plane(self, place: Place, time: int) -> NDArray:
        """One map as stored, in the order of the variable's dimensions."""
        column = self._columns.get(place) or self._column(place[0], [place])
        return column.plane(place, time)

    def _group(self, places: set[Place]) -> list[_Column]:
        """Places whose maps lie in the same chunks go together."""

        def chunk(place: Place) -> Place:
            variable = self._variables[place[0]]
            lengths = _rest(variable, self._dims, variable.chunks or (1,) * len(variable.shape))
            return place[0], tuple(index // length for index, length in zip(place[1], lengths, strict=True))

        return [self._column(key[0], list(group)) for key, group in groupby(sorted(places, key=chunk), chunk)]

    def _column(self, name: str, places: list[Place]) -> _Column:
        return _Column(self._variables[name], self._dims, self._count, places)

    def _budget(self, memory_bytes: int) -> None:
        columns = sorted(set(self._columns.values()), key=lambda column: column.kept_bytes)
        held = 0
        for column in columns:
            held += column.kept_bytes
            column.on_disk = held > memory_bytes and column.kept_bytes > 0


class _Column:
    """Maps of one variable that share chunks: blocks of `step` times, one at a time."""

    def __init__(self, variable: Stored, dims: tuple[str | None, str, str], count: int, places: list[Place]):
        self._variable, self._dims, self._count, self.places = variable, dims, count, places
        self.on_disk = False
        chunks = dict(zip(variable.dimensions, variable.chunks or (1,) * len(variable.shape), strict=True))
        self.step = int(chunks[dims[0]]) if dims[0] in chunks else count  # a variable without time is the same at all times
        self._low = [min(indices) for indices in zip(*(place[1] for place in places), strict=True)]
        self._high = [max(indices) for indices in zip(*(place[1] for place in places), strict=True)]
        self._start, self._block, self._asked = 0, None, set()

    @property
    def kept_bytes(self) -> int:
        """How large a block is, 0 when it is one map, which is handed out as soon as it is read."""
        if self.step * len(self.places) == 1:
            return 0
        return prod(part.stop - part.start for part in self._box(0, self.step)) * np.dtype(self._variable.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        return self._variable.stored_bytes(self._box(0, self._count))

    def plane(self, place: Place, time: int) -> NDArray:
        start = time // self.step * self.step
        if self._block is None or start != self._start:
            self._start, self._block, self._asked = start, self._read(start), set()
        indices = zip(self._rest_names, place[1], self._low, strict=True)
        index: dict[str | None, int] = {name: at - low for name, at, low in indices}
        index[self._dims[0]] = time - start
        plane = self._block[tuple(index.get(name, slice(None)) for name in self._variable.dimensions)]
        self._asked.add((place, time))
        if len(self._asked) == len(self.places) * min(self.step, self._count - start):
            self._block = None
        return plane

    def _read(self, start: int) -> NDArray:
        box = self._box(start, start + self.step)
        shape = tuple(part.stop - part.start for part in box)
        make = _on_disk if self.on_disk else np.empty
        return self._variable.read(box, make(shape, self._variable.dtype))

    def _box(self, start: int, stop: int) -> tuple[slice, ...]:
        """The part of the variable from time `start` to `stop` that holds all places."""
        ends = zip(self._rest_names, self._low, self._high, strict=True)
        parts: dict[str | None, slice] = {name: slice(low, high + 1) for name, low, high in ends}
        parts[self._dims[0]] = slice(start, stop)
        sizes = zip(self._variable.dimensions, self._variable.shape, strict=True)
        return tuple(slice(part.start, min(part.stop, size)) for part, size in ((parts.get(d, slice(0, n)), n) for d, n in sizes))

    @property
    def _rest_names(self) -> tuple[str, ...]:
        return _rest(self._variable, self._dims, self._variable.dimensions)


def _rest(variable: Stored, dims: tuple[str | None, str, str], of_each: tuple) -> tuple:
    """Of something per dimension, what belongs to those other than time, latitude and longitude."""
    return tuple(value for name, value in zip(variable.dimensions, of_each, strict=True) if name not in dims)


def _on_disk(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    """An array in a temporary file that is gone when the array is."""
    with TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)

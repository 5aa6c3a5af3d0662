"""A netCDF file as its variables on named dimensions: netCDF-4 through HDF5, netCDF-3 by the places its header states.

The netCDF library reads 4 MiB merely to recognise a file and keeps up to 64 MiB of chunks for each variable; without it a
netCDF-4 file costs its metadata and the chunks that are asked for, a netCDF-3 file its header and the values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from io import FileIO
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from raysegment.archive.classic import Layout
from raysegment.archive.files import classic_header, container, damaged
from raysegment.archive.inflate import inflate
from raysegment.archive.packing import Packing

BROKEN = (OSError, RuntimeError, KeyError, UnicodeDecodeError)  # what the libraries raise where a file is damaged
_HIDDEN = "This is a netCDF dimension but not a netCDF variable"  # how netCDF-4 marks a dimension without values
_RENAMED = "_nc4_non_coord_"  # put before the name of a variable that is named like a dimension and is none
_CHUNK_CACHE = 1 << 20  # bytes per variable: what is read is read by whole chunks
_SIEVE = 4096  # bytes read at once of a variable without chunks; the library's 64 KiB reach into maps that nobody asked for


class Stored(Protocol):
    """A variable: its type (`str` for texts), the names and lengths of its dimensions, its chunks (None: in one piece)."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Any: ...

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def chunks(self) -> tuple[int, ...] | None: ...

    @cached_property
    def attributes(self) -> Mapping[str, Any]: ...

    @cached_property
    def packing(self) -> Packing: ...

    def read(self, where: tuple = (), into: NDArray | None = None) -> NDArray:
        """The numbers at `where` as stored, in one request: a slice or a number per dimension.

        With a contiguous array `into` to receive them, slices only, none open.
        """
        ...

    def stored_bytes(self, box: tuple[slice, ...]) -> int:
        """Bytes that the file has for the chunks with a value in `box` (a slice per dimension), or for the box itself."""
        ...


class Dataset(Protocol):
    """An open file: `variables` by name, `sizes` of the dimensions, global `attributes`."""

    @property
    def variables(self) -> Mapping[str, Stored]: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def attributes(self) -> Mapping[str, Any]: ...

    def close(self) -> None: ...


def open_dataset(path: Path, file: h5py.File | None = None) -> Dataset:
    """The file at `path`, or the HDF5 file opened already; BadInput when it is neither netCDF nor HDF5, or damaged."""
    try:
        if file is None and container(path) == "classic":
            return ClassicDataset(path)
        return Hdf5Dataset(file or open_hdf5(path))
    except BROKEN as error:
        raise damaged(path, error) from None


def open_hdf5(path: Path) -> h5py.File:
    """An HDF5 file to read from; BadInput when it is damaged."""
    try:
        return h5py.File(h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, _access()))
    except BROKEN as error:
        raise damaged(path, error) from None


def _access() -> h5py.h5p.PropFAID:
    """As h5py opens files, but for the sizes of the buffers."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_sieve_buf_size(_SIEVE)
    elements, slots, _, preemption = access.get_cache()
    access.set_cache(elements, slots, _CHUNK_CACHE, preemption)
    return access


def text(holder: Stored | Dataset, name: str) -> str:
    """An attribute as words, empty when absent."""
    return str(holder.attributes.get(name, "")).strip()


def numeric(variable: Stored) -> bool:
    return variable.dtype is not str and np.dtype(variable.dtype).kind in "iuf"


# netCDF-3 ---------------------------------------------------------------------------------------------------------


class ClassicDataset:
    """A netCDF-3 file (also the 64-bit kinds)."""

    def __init__(self, path: Path):
        header = classic_header(path)
        self._file = FileIO(path)
        self.variables: Mapping[str, Stored] = {layout.name: ClassicVariable(layout, self._file) for layout in header.variables}
        self.sizes, self.attributes = header.sizes, header.attributes

    def close(self) -> None:
        self._file.close()


class ClassicVariable:
    """A variable of a netCDF-3 file: each of its maps lies in one piece."""

    chunks: tuple[int, ...] | None = None

    def __init__(self, layout: Layout, file: FileIO):
        self._layout, self._file, self.name = layout, file, layout.name
        self.dtype, self.dimensions, self.shape = layout.dtype.newbyteorder("="), layout.dimensions, layout.shape

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        return self._layout.attributes

    @cached_property
    def packing(self) -> Packing:
        return Packing.of(self.dtype, self.attributes, prefilled=True)  # the header does not say that it was not

    def read(self, where: tuple = (), into: NDArray | None = None) -> NDArray:
        if into is not None:
            return self._fetch(where, into)
        rest = (slice(None),) * (len(self.shape) - len(where))
        parts = [_covering(part, size) for part, size in zip((*where, *rest), self.shape, strict=True)]
        box, inside = tuple(part[0] for part in parts), tuple(part[1] for part in parts)
        return np.asarray(self._fetch(box, np.empty([part.stop - part.start for part in box], self.dtype))[inside])

    def stored_bytes(self, box: tuple[slice, ...]) -> int:
        return prod(part.stop - part.start for part in box) * self.dtype.itemsize

    def _fetch(self, box: tuple[slice, ...], into: NDArray) -> NDArray:
        """The values in the box, each piece that lies together in the file fetched at once."""
        outer, piece = self._pieces(into.shape)
        if into.size:
            rest = into.reshape(-1).view(np.uint8).data
            first = self._layout.begin + self._steps(tuple(part.start for part in box[outer:]), outer)
            for indices in product(*(range(part.start, part.stop) for part in box[:outer])):
                self._fill(rest[:piece], first + self._steps(indices, 0))
                rest = rest[piece:]
        return into if self._layout.dtype.isnative else into.byteswap(inplace=True)

    def _pieces(self, lengths: tuple[int, ...]) -> tuple[int, int]:
        """How many leading dimensions of a box must be gone through one by one, and the bytes that lie together below them."""
        outer, piece = len(lengths), self.dtype.itemsize
        while outer and (self._layout.strides[outer - 1] == piece or lengths[outer - 1] == 1):
            outer -= 1
            piece *= lengths[outer]
        return outer, piece

    def _steps(self, indices: tuple[int, ...], dimension: int) -> int:
        """Bytes between the first value and the one at `indices`, which begin with this dimension's."""
        return sum(index * stride for index, stride in zip(indices, self._layout.strides[dimension:], strict=False))

    def _fill(self, target: memoryview, begin: int) -> None:
        self._file.seek(begin)
        while target:
            got = self._file.readinto(target)
            if not got:
                raise OSError("the file ends before its values do")
            target = target[got:]


def _covering(part: slice | int, size: int) -> tuple[slice, slice | int]:
    """The indices without gaps that hold those asked for, and where the latter are among them."""
    asked = range(size)[part]
    if isinstance(asked, int):
        return slice(asked, asked + 1), 0
    if not asked:
        return slice(0, 0), slice(None)
    low, high = sorted((asked[0], asked[-1]))
    return slice(low, high + 1), slice(None, None, asked.step)


# netCDF-4 ---------------------------------------------------------------------------------------------------------


class Hdf5Dataset:
    """The root group of an HDF5 file by netCDF-4's conventions; dimensions without a name are told apart by their length."""

    def __init__(self, file: h5py.File):
        self._file = file
        try:
            held = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
            self._unnamed: list[tuple[str, int]] = []
            scales = {name: item for name, item in held.items() if "CLASS" in item.attrs}  # the others only lie on dimensions
            numbers = {name: scale.attrs.get("_Netcdf4Dimid") for name, scale in scales.items()}
            self._by_number = {int(number): name for name, number in numbers.items() if number is not None}
            every = [Hdf5Variable(name.removeprefix(_RENAMED), item, self._dimensions(name, item)) for name, item in held.items()]
            self.variables: Mapping[str, Stored] = {variable.name: variable for variable in every if not variable.hidden}
            self.sizes = self._sizes(every)
            self.attributes = _attributes(file)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _sizes(self, every: list[Hdf5Variable]) -> dict[str, int]:
        """An unlimited dimension is as long as the longest variable on it."""
        sizes: dict[str, int] = {}
        for variable in every:
            for name, size in zip(variable.dimensions, variable.shape, strict=True):
                sizes[name] = max(size, sizes.get(name, 0))
        return sizes

    def _dimensions(self, name: str, item: h5py.Dataset) -> tuple[str, ...]:
        """Names of a variable's dimensions: by number; the scales attached to it; a scale's own name; else by length.

        The numbers come first, as in the netCDF library: they are beside the variable, the list of scales is elsewhere.
        """
        numbers = [int(number) for number in np.atleast_1d(item.attrs.get("_Netcdf4Coordinates", []))]
        if item.ndim == len(numbers) > 1 and all(number in self._by_number for number in numbers):
            return tuple(self._by_number[number] for number in numbers)
        scales = [self._file[refs[0]].name if len(refs) else None for refs in np.atleast_1d(item.attrs.get("DIMENSION_LIST", []))]
        if scales and all(scales):
            return tuple(str(scale).rsplit("/", 1)[-1] for scale in scales)
        if item.attrs.get("CLASS") == b"DIMENSION_SCALE" and item.ndim == 1:
            return (name,)
        return self._by_length(item.shape)

    def _by_length(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Dimensions of plain HDF5, which has none: equal lengths are one dimension, unless one variable has both."""
        names: list[str] = []
        for size in shape:
            name = next((name for name, length in self._unnamed if length == size and name not in names), None)
            if name is None:
                name = f"phony_dim_{len(self._unnamed)}"
                self._unnamed.append((name, size))
            names.append(name)
        return tuple(names)


class Hdf5Variable:
    """A variable of a netCDF-4 file."""

    def __init__(self, name: str, item: h5py.Dataset, dimensions: tuple[str, ...]):
        self._item, self.name, self.dimensions = item, name, dimensions
        self.shape, self.chunks = item.shape, item.chunks
        texts = h5py.check_string_dtype(item.dtype) is not None and item.dtype != np.dtype("S1")
        self.dtype = str if texts else item.dtype

    @property
    def hidden(self) -> bool:
        """True for a dimension that has no values."""
        return _plain(self._item.attrs.get("NAME", "")).startswith(_HIDDEN) if "CLASS" in self._item.attrs else False

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        return _attributes(self._item)

    @cached_property
    def packing(self) -> Packing:
        status = self._item.id.get_create_plist().fill_value_defined()
        return Packing.of(np.dtype(self.dtype), self.attributes, status == h5py.h5d.FILL_VALUE_USER_DEFINED)

    def read(self, where: tuple = (), into: NDArray | None = None) -> NDArray:
        if into is None:
            return np.asarray(self._item[where])
        if self.chunks is None or not inflate(self._item, where, into):
            self._item.read_direct(into, where)
        return into

    def stored_bytes(self, box: tuple[slice, ...]) -> int:
        if self.chunks is None:
            return prod(part.stop - part.start for part in box) * self._item.dtype.itemsize
        if all(part == slice(0, size) for part, size in zip(box, self.shape, strict=True)):
            return self._item.id.get_storage_size()
        sizes: list[int] = []
        self._item.id.chunk_iter(lambda chunk: sizes.append(chunk.size) if self._touches(chunk.chunk_offset, box) else None)
        return sum(sizes)

    def _touches(self, offset: tuple[int, ...], box: tuple[slice, ...]) -> bool:
        assert self.chunks is not None
        return all(part.start < o + n and o < part.stop for part, o, n in zip(box, offset, self.chunks, strict=True))


_OF_HDF5 = ("CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates", "_NCProperties")


def _attributes(item: h5py.Dataset | h5py.File) -> dict[str, Any]:
    """Attributes as netCDF shows them: texts as str, single numbers as scalars."""
    return {name: _plain(item.attrs[name]) for name in item.attrs if name not in _OF_HDF5}


def _plain(value: Any) -> Any:
    if isinstance(value, h5py.Empty):
        return ""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(())[()]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

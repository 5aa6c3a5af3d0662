"""The header of a netCDF-3 file: what it holds, where each value lies, how long the file must be.

With it the values are read without the netCDF library, which reads 4 MiB merely to recognise a file and reads zeros where
one was cut short. Grammar of the "NetCDF File Format Specifications" (Unidata), versions CDF-1, CDF-2 and CDF-5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_TYPES = {1: "i1", 2: "S1", 3: ">i2", 4: ">i4", 5: ">f4", 6: ">f8", 7: "u1", 8: ">u2", 9: ">u4", 10: ">i8", 11: ">u8"}
_STREAMING = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # number of records not stated
_DIMENSIONS, _VARIABLES, _ATTRIBUTES = 10, 11, 12  # tags before the three kinds of lists
_BUFFER = 4096  # bytes read at a time: some file systems suggest MiB


@dataclass(frozen=True)
class Header:
    """Lengths of the dimensions, global attributes and variables, in the file's order; where the last value ends."""

    sizes: Mapping[str, int]
    attributes: Mapping[str, Any]
    variables: tuple[Layout, ...]
    end: int


@dataclass(frozen=True)
class Layout:
    """A variable and where its values lie: the first at `begin`, neighbours along each dimension `strides` bytes apart.

    `dtype` is as stored, big-endian; attributes are as the netCDF library shows them, texts as str, single numbers as scalars.
    """

    name: str
    dtype: np.dtype
    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]
    begin: int
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """Where its last value ends, 0 when it has none."""
        if not prod(self.shape):
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.begin + last + self.dtype.itemsize


def read_header(path: Path) -> Header:
    """The header of a netCDF-3 file; EOFError or ValueError when it is cut or damaged."""
    with path.open("rb", buffering=_BUFFER) as file:
        return _Parser(file).header()


def expected_bytes(path: Path) -> int:
    """Where the last value of the last variable ends; EOFError or ValueError when the header itself is cut or damaged."""
    return read_header(path).end


@dataclass(frozen=True)
class _Entry:
    """A variable as the header has it, its dimensions by number."""

    name: str
    dtype: np.dtype
    dimensions: tuple[int, ...]
    attributes: Mapping[str, Any]
    begin: int


class _Parser:
    """Reads a header once, front to back."""

    def __init__(self, file: BinaryIO):
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        version = self._bytes(4)[3]
        self._count, self._offset = (8 if version == 5 else 4), (4 if version == 1 else 8)
        self._records = self._number(self._count)
        self._dimensions = [(self._name(), self._number(self._count)) for _ in range(self._list(_DIMENSIONS))]
        self._global = self._attributes()
        self._entries = [self._entry() for _ in range(self._list(_VARIABLES))]

    def header(self) -> Header:
        stride, ends_at = self._record_stride(), self._file.tell()
        records = self._known_records(stride)
        variables = tuple(self._layout(entry, records, stride) for entry in self._entries)
        if any(variable.end and variable.begin < ends_at for variable in variables):
            raise ValueError("a variable begins inside the header")
        sizes = {name: length or records for name, length in self._dimensions}
        return Header(sizes, self._global, variables, max([ends_at, *(variable.end for variable in variables)]))

    # what follows from the entries ----------------------------------------------------------------------------------

    def _is_record(self, entry: _Entry) -> bool:
        return bool(entry.dimensions) and self._dimensions[entry.dimensions[0]][1] == 0

    def _fixed(self, entry: _Entry) -> tuple[int, ...]:
        """Lengths of the dimensions along which the values of one record lie side by side."""
        return tuple(self._dimensions[number][1] for number in entry.dimensions[1 if self._is_record(entry) else 0 :])

    def _record_stride(self) -> int:
        """Bytes from one record to the next: each variable padded to four bytes, unless there is only one."""
        sizes = [prod(self._fixed(entry)) * entry.dtype.itemsize for entry in self._entries if self._is_record(entry)]
        return sizes[0] if len(sizes) == 1 else sum(-(-size // 4) * 4 for size in sizes)

    def _known_records(self, stride: int) -> int:
        """How many records there are; as many as the file has room for where the header does not say."""
        if self._records not in _STREAMING:
            return self._records
        begins = [entry.begin for entry in self._entries if self._is_record(entry)]
        return max(0, self._size - min(begins)) // stride if begins and stride else 0

    def _layout(self, entry: _Entry, records: int, record_stride: int) -> Layout:
        shape, fixed, width = (records,) * self._is_record(entry), self._fixed(entry), entry.dtype.itemsize
        inner = tuple(width * prod(fixed[number + 1 :]) for number in range(len(fixed)))
        names = tuple(self._dimensions[number][0] for number in entry.dimensions)
        strides = (record_stride,) * self._is_record(entry) + inner
        return Layout(entry.name, entry.dtype, names, shape + fixed, entry.attributes, entry.begin, strides)

    # the grammar ----------------------------------------------------------------------------------------------------

    def _bytes(self, count: int) -> bytes:
        got = self._file.read(count) if count <= self._size else b""
        if len(got) != count:
            raise EOFError("the header is cut short")
        return got

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "big")

    def _list(self, tag: int) -> int:
        """How many elements the list that begins here has; an absent one has the tag 0."""
        found, count = self._number(4), self._number(self._count)
        if found != tag and (found or count):
            raise ValueError(f"tag {found} where a list {tag} begins in the header")
        return count

    def _name(self) -> str:
        return self._padded(self._number(self._count)).decode()

    def _padded(self, count: int) -> bytes:
        """`count` bytes, past the padding to a multiple of four."""
        return self._bytes(-(-count // 4) * 4)[:count]

    def _type(self) -> np.dtype:
        kind = self._number(4)
        if kind not in _TYPES:
            raise ValueError(f"unknown type {kind} in the header")
        return np.dtype(_TYPES[kind])

    def _attributes(self) -> dict[str, Any]:
        return {(name := self._name()): self._value(name) for _ in range(self._list(_ATTRIBUTES))}

    def _value(self, name: str) -> Any:
        dtype = self._type()
        data = self._padded(dtype.itemsize * self._number(self._count))
        if dtype.kind == "S":
            return data if name == "_FillValue" else data.decode("utf-8", "replace").replace("\x00", "")
        values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
        return values[0] if values.size == 1 else values

    def _entry(self) -> _Entry:
        name = self._name()
        numbers = tuple(self._number(self._count) for _ in range(self._number(self._count)))
        attributes, dtype = self._attributes(), self._type()
        self._number(self._count)  # vsize: may overflow, so it is worked out anew
        if any(number >= len(self._dimensions) for number in numbers):
            raise ValueError("a variable has an unknown dimension in the header")
        if any(self._dimensions[number][1] == 0 for number in numbers[1:]):
            raise ValueError("a variable has its records along another dimension than the first in the header")
        return _Entry(name, dtype, numbers, attributes, self._number(self._offset))

"""How long a netCDF-3 file must be, from its header: the netCDF library reads zeros where a file was cut short.

Header grammar of the "NetCDF File Format Specifications" (Unidata), versions CDF-1, CDF-2 and CDF-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 6: 8, 7: 1, 8: 2, 9: 4, 10: 8, 11: 8}
_STREAMING = (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)  # number of records not stated


def expected_bytes(path: Path) -> int:
    """Where the last value of the last variable ends; EOFError or ValueError when the header itself is cut or damaged."""
    with path.open("rb") as file:
        return _Header(file).end()


@dataclass(frozen=True)
class _Variable:
    begin: int
    bytes: int  # of one record where it has records, else of all
    record: bool

    @property
    def padded(self) -> int:
        return -(-self.bytes // 4) * 4


class _Header:
    """Reads a header once, front to back."""

    def __init__(self, file: BinaryIO):
        self._file = file
        version = self._bytes(4)[3]
        self._count, self._offset = (8 if version == 5 else 4), (4 if version == 1 else 8)
        self._records = self._number(self._count)
        self._lengths = [self._dimension() for _ in range(self._list())]
        self._attributes()
        self._variables = [self._variable() for _ in range(self._list())]

    def end(self) -> int:
        records = 0 if self._records in _STREAMING else self._records
        with_records = [variable for variable in self._variables if variable.record]
        stride = sum(v.padded for v in with_records) if len(with_records) > 1 else sum(v.bytes for v in with_records)
        last = [v.begin + (records - 1) * stride + v.bytes for v in with_records if records]
        return max(last + [v.begin + v.bytes for v in self._variables if not v.record] + [self._file.tell()])

    def _bytes(self, count: int) -> bytes:
        got = self._file.read(count)
        if len(got) != count:
            raise EOFError("the header is cut short")
        return got

    def _number(self, size: int) -> int:
        return int.from_bytes(self._bytes(size), "big")

    def _list(self) -> int:
        self._number(4)  # tag
        return self._number(self._count)

    def _name(self) -> None:
        self._padded(self._number(self._count))

    def _padded(self, count: int) -> None:
        """Pass over `count` bytes and the padding to a multiple of four."""
        if count:
            self._file.seek(-(-count // 4) * 4 - 1, 1)
            self._bytes(1)

    def _dimension(self) -> int:
        self._name()
        return self._number(self._count)

    def _attributes(self) -> None:
        for _ in range(self._list()):
            self._name()
            size = self._size_of_type()
            self._padded(size * self._number(self._count))

    def _size_of_type(self) -> int:
        kind = self._number(4)
        if kind not in _BYTES_OF_TYPE:
            raise ValueError(f"unknown type {kind} in the header")
        return _BYTES_OF_TYPE[kind]

    def _variable(self) -> _Variable:
        self._name()
        dimensions = [self._number(self._count) for _ in range(self._number(self._count))]
        self._attributes()
        size = self._size_of_type()
        self._number(self._count)  # vsize: may overflow, so it is worked out anew
        begin = self._number(self._offset)
        if any(number >= len(self._lengths) for number in dimensions):
            raise ValueError("a variable has an unknown dimension in the header")
        record = bool(dimensions) and self._lengths[dimensions[0]] == 0
        lengths = [self._lengths[number] for number in dimensions[1 if record else 0 :]]
        return _Variable(begin, size * prod(lengths), record)

"""Deflated chunks of HDF5 unpacked by ISA-L, twice as fast as the HDF5 library does it with zlib.

The filters of netCDF-4's own compression only: deflate, with or without shuffle. For all else the library is asked.
"""

from __future__ import annotations

from itertools import product
from math import prod

import h5py
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_OURS = ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])
_ZLIB_WINDOW_BITS = 15
# also what a chunk is answered with that was never written
_FAILURES: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, isal_zlib.error)  # type: ignore[assignment]


def inflate(item: h5py.Dataset, box: tuple[slice, ...], into: NDArray) -> bool:
    """True when the values in `box` have been read `into` a contiguous array of its shape, each chunk fetched once.

    False where the filters are others, a chunk is absent or damaged: the library knows what to make of it.
    """
    filters = _filters(item)
    if filters not in _OURS or item.dtype.hasobject:
        return False
    shuffled = filters == _OURS[1] and item.dtype.itemsize > 1
    try:
        for offset in _offsets(item, box):
            mask, packed = item.id.read_direct_chunk(offset)
            if mask:
                return False  # a filter was left out for this chunk
            _place(_unpacked(item, packed), shuffled, offset, box, item, into)
    except _FAILURES:
        return False
    return True


def _filters(item: h5py.Dataset) -> list[int]:
    created = item.id.get_create_plist()
    return [created.get_filter(number)[0] for number in range(created.get_nfilters())]


def _offsets(item: h5py.Dataset, box: tuple[slice, ...]) -> product[tuple[int, ...]]:
    """Where the chunks begin that have a value in the box."""
    lengths = zip(box, _lengths(item), strict=True)
    return product(*(range(part.start // length * length, part.stop, length) for part, length in lengths))


def _lengths(item: h5py.Dataset) -> tuple[int, ...]:
    assert item.chunks is not None
    return item.chunks


def _unpacked(item: h5py.Dataset, packed: bytes) -> NDArray[np.uint8]:
    size = prod(_lengths(item)) * item.dtype.itemsize
    values = np.frombuffer(isal_zlib.decompress(packed, _ZLIB_WINDOW_BITS, size), np.uint8)
    if values.size != size:
        raise ValueError(f"{values.size} bytes in a chunk of {size}")
    return values


def _place(
    values: NDArray[np.uint8], shuffled: bool, offset: tuple[int, ...], box: tuple[slice, ...], item: h5py.Dataset, into: NDArray
) -> None:
    """Copy what a chunk has of the box to its place, its bytes put back in order."""
    inner = [slice(max(b.start - o, 0), min(b.stop - o, n)) for b, o, n in zip(box, offset, _lengths(item), strict=True)]
    outer = [slice(o + i.start - b.start, o + i.stop - b.start) for b, o, i in zip(box, offset, inner, strict=True)]
    target = into[tuple(outer)]
    if target.shape == item.chunks and target.flags.c_contiguous:
        _unshuffle(values, shuffled, target)
        return
    chunk = np.empty(_lengths(item), item.dtype)
    _unshuffle(values, shuffled, chunk)
    target[...] = chunk[tuple(inner)]


def _unshuffle(values: NDArray[np.uint8], shuffled: bool, target: NDArray) -> None:
    """Shuffled are all first bytes of the values, then all second ones, and so on."""
    width = target.dtype.itemsize
    out = target.reshape(-1).view(np.uint8).reshape(-1, width)
    if not shuffled:
        out[...] = values.reshape(-1, width)
        return
    for number, plane in enumerate(values.reshape(width, -1)):
        out[:, number] = plane

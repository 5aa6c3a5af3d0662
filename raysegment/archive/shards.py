"""Shards: training tiles in Arrow files.

A shard is an Arrow IPC file with one record batch per tile; any Arrow reader reads it. The manifest says where each
batch lies and what its CRC-32 is, so that a tile can be fetched by its place from a disk or an object store, and be proved
before a byte of it is interpreted. Fields are float16 of (x − reference) / scale (`quantise`): one pass over the source
suffices; the true moments, counted from the float32 fields in the same pass, are there for the device to normalise with.

    bytes of a batch:  metadata (`body` bytes) · fields 2·16·h·w · mask h·w · padding, id, source, time, …
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from isal import isal_zlib
from numpy.typing import NDArray

from raysegment.archive.files import fsync, inside
from raysegment.archive.manifest import MANIFEST, STAGE_AGAIN, Manifest, Part, Shard
from raysegment.archive.moments import Moments
from raysegment.archive.places import Place
from raysegment.archive.quantise import quantise
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput

_BLOCK = 1 << 20
_UNSYNCED = 32 << 20  # bytes after which the disk is waited for: at the end of a shard there is little left to wait for


@dataclass(frozen=True)
class TileId:
    """Where a tile comes from: snapshot `index` of `source` (file name), its top-left cell on the canonical grid."""

    source: str
    index: int
    time: str
    row: int
    column: int

    @property
    def id(self) -> str:
        return f"{self.source}#{self.index}@{self.row},{self.column}"


@dataclass(frozen=True, eq=False)
class Tile:
    """`fields (16, h, w)` float16 as staged (`quantise`), `mask (h, w)` uint8; views of the mapped file when read."""

    fields: NDArray[np.float16]
    mask: NDArray[np.uint8]
    origin: TileId
    checksum: int

    @property
    def intact(self) -> bool:
        """True when the bytes are those that were written."""
        return checksum(self.fields, self.mask) == self.checksum


def checksum(tile_fields: NDArray, mask: NDArray) -> int:
    """CRC-32 of the fields' bytes followed by the mask's."""
    return isal_zlib.crc32(np.ascontiguousarray(mask).data, isal_zlib.crc32(np.ascontiguousarray(tile_fields).data))


def schema(height: int, width: int) -> pa.Schema:
    """The columns of a shard with tiles of `height` × `width` cells."""
    return pa.schema([
        pa.field("fields", pa.fixed_shape_tensor(pa.float16(), (len(NAMES), height, width))),
        pa.field("mask", pa.fixed_shape_tensor(pa.uint8(), (height, width))),
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("time", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("column", pa.int32()),
        pa.field("checksum", pa.uint32()),
    ])  # fmt: skip


class ShardWriter:
    """Writes one shard, tile by tile; a context manager. The file appears under its name when all is written:

    with ShardWriter(Place.of(folder), "part-00000.arrow", height, width) as writer:
        writer.add(fields, mask, origin)
    part = writer.part

    A thread writes each tile, and reads it once more for its digests, while the caller prepares the next one.
    """

    def __init__(self, place: Place, name: str, height: int, width: int):
        self.place, self.name, self._schema, self._shape = place, name, schema(height, width), (height, width)
        self._moments: list[Moments] = []
        self._snapshots: set[tuple[str, int]] = set()

    def __enter__(self) -> ShardWriter:
        self._commit = self.place.committed(self.name)
        self._temporary = self._commit.__enter__()
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._file = pa.ipc.new_file(self._sink, self._schema)
        self._written, self._synced = _Written(self._temporary), 0
        self._thread, self._last = ThreadPoolExecutor(1, "shard"), Future[None]()
        self._last.set_result(None)
        return self

    def add(self, tile_fields: NDArray[np.float32], mask: NDArray[np.uint8], origin: TileId) -> None:
        """One tile: `tile_fields (16, h, w)` in SI units, checked for float16; `mask (h, w)`."""
        packed, mask = quantise(tile_fields, origin.source), np.array(mask, np.uint8, order="C")
        self.put(packed, mask, Moments.of_tile(tile_fields, mask), origin)

    def put(self, packed: NDArray[np.float16], mask: NDArray[np.uint8], moments: Moments, origin: TileId) -> None:
        """One tile as it is staged: `packed (16, h, w)`, `mask (h, w)`, contiguous; the caller leaves them as they are."""
        assert packed.shape == (len(NAMES), *self._shape), (packed.shape, self._shape)
        assert mask.shape == self._shape, (mask.shape, self._shape)
        self._moments.append(moments)
        self._snapshots.add((origin.source, origin.index))
        self._last.result()  # one tile at a time; what went wrong with it is raised here
        self._last = self._thread.submit(self._write, packed, mask, origin)

    def _write(self, packed: NDArray[np.float16], mask: NDArray[np.uint8], origin: TileId) -> None:
        values = [packed, mask, [origin.id], [origin.source], [origin.index], [origin.time], [origin.row], [origin.column],
                  [checksum(packed, mask)]]  # fmt: skip
        columns = [_column(value, field.type) for value, field in zip(values, self._schema, strict=True)]
        self._file.write_batch(pa.record_batch(columns, schema=self._schema))
        end = self._sink.tell()
        self._written.advance(end)
        if end - self._synced > _UNSYNCED:
            fsync(self._temporary)
            self._synced = end

    def __exit__(self, *error: Any) -> None:
        try:
            self._close()
            if error[0] is None:
                self.part = Part(self._written.shard(self.name), frozenset(self._snapshots), Moments.merge(self._moments))
        except BaseException:
            error = sys.exc_info()
            raise
        finally:
            self._written.close()
            self._commit.__exit__(*error)

    def _close(self) -> None:
        self._thread.shutdown()
        try:
            self._last.result()
        finally:
            self._file.close()
            self._sink.close()


class _Written:
    """Digests of a shard file that grows: each byte is read once, when the record batch that it is in has been written."""

    def __init__(self, path: Path):
        self._file, self._digest = path.open("rb"), hashlib.sha256()
        self._offsets: list[int] = []
        self._crcs: list[int] = []
        self._bodies: set[int] = set()

    def close(self) -> None:
        self._file.close()

    def advance(self, end: int) -> None:
        """A record batch has been written, which ends at byte `end`."""
        if not self._offsets:
            magic_and_schema = self._file.read(16)
            self._digest.update(magic_and_schema)
            self._offsets.append(16 + struct.unpack("<i", magic_and_schema[12:])[0])
            _digest(self._file, self._offsets[0] - 16, self._digest)
        crc, body = _digest_batch(self._file, end - self._offsets[-1], self._digest)
        self._offsets.append(end)
        self._crcs.append(crc)
        self._bodies.add(body)

    def shard(self, name: str) -> Shard:
        """What the manifest says of the file, which is complete now."""
        size = os.fstat(self._file.fileno()).st_size
        _digest(self._file, size - self._offsets[-1], self._digest)
        (body,) = self._bodies  # one schema, one size of metadata
        return Shard(name, len(self._crcs), self._digest.hexdigest(), size, body, tuple(self._offsets), tuple(self._crcs))


def _digest_batch(file: BinaryIO, count: int, digest: Any) -> tuple[int, int]:
    """CRC-32 of the record batch that follows in the file, and where its body begins."""
    head = file.read(8)
    digest.update(head)
    return _digest(file, count - 8, digest, isal_zlib.crc32(head)), 8 + struct.unpack("<i", head[4:])[0]


def _digest(file: BinaryIO, count: int, digest: Any, crc: int = 0) -> int:
    """Put the next `count` bytes of a file into a digest; their CRC-32, continued from `crc`."""
    while count:
        block = file.read(min(count, _BLOCK))
        assert block, "the file ends early"
        digest.update(block)
        crc, count = isal_zlib.crc32(block, crc), count - len(block)
    return crc


def write_shard(path: str | Path, tiles: Iterable[tuple[NDArray[np.float32], NDArray[np.uint8], TileId]]) -> Part:
    """One shard of `tiles` (fields (16, h, w) in SI units, mask (h, w), origin), all of one size."""
    rest = iter(tiles)
    first = next(rest, None)
    assert first is not None, "a shard has at least one tile"
    with ShardWriter(Place.of(Path(path).parent), Path(path).name, *first[1].shape) as writer:
        writer.add(*first)
        for tile in rest:
            writer.add(*tile)
    return writer.part


def _column(values: NDArray | list, kind: pa.DataType) -> pa.Array:
    """One value (a tensor as an array) as a column of length 1."""
    if isinstance(values, list):
        return pa.array(values, kind)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.size)
    return pa.ExtensionArray.from_storage(kind, storage)


class ShardSet:
    """A complete shard set, read in place; tiles are numbered through the shards in the manifest's order.

    On a disk its files are mapped into memory and tiles are views of them; from an object store a tile is fetched when
    it is asked for. It travels between processes as its place: the other side opens the files anew.
    """

    def __init__(self, where: str | Path | Place):
        self.place = Place.of(where)
        self.manifest = Manifest.load(self.place)
        self._mapped: dict[int, pa.Buffer] = {}

    def __reduce__(self):
        return ShardSet, (self.place,)

    def __len__(self) -> int:
        return self.manifest.tiles

    def __iter__(self) -> Iterator[Tile]:
        return (self.tile(number) for number in range(len(self)))

    def tile(self, number: int) -> Tile:
        """Tile `number`, its arrays not writable; not proved (see `Tile.intact`), but BadInput when it cannot be read."""
        if not 0 <= number < len(self):
            raise IndexError(f"tile {number} of {len(self)} in {self.place}")
        shard, place = self.manifest.find(number)
        expected = schema(*self.manifest.tile)
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._bytes(shard, place)), expected)
        except (pa.ArrowInvalid, OSError) as error:
            file = self.place.shown(self.manifest.shards[shard].file)
            raise BadInput(file, f"tile {place} as {MANIFEST} has it", error, STAGE_AGAIN) from None
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        height, width = self.manifest.tile
        return Tile(
            fields=_view(columns["fields"], np.float16, (len(NAMES), height, width)),
            mask=_view(columns["mask"], np.uint8, (height, width)),
            origin=TileId(**{name: columns[name][0].as_py() for name in _ORIGIN}),
            checksum=columns["checksum"][0].as_py(),
        )

    def lost(self) -> dict[BadInput, int]:
        """For each file that is absent or of another size than the manifest says: how, and how many tiles that concerns."""
        found = {}
        for shard in self.manifest.shards:
            size = self.place.size(shard.file)
            if size != shard.bytes:
                got = "no such file" if size is None else f"{size} bytes"
                bad = BadInput(self.place.shown(shard.file), f"{shard.bytes} bytes", got, STAGE_AGAIN)
                found[bad] = sum(stop > (size or 0) for stop in shard.offsets[1:])
        return found

    def verify(self) -> None:
        """Read every byte; BadInput that names the damaged file, and the tile where the damage is in one."""
        _refuse(self.lost())
        for number, shard in enumerate(self.manifest.shards):
            if hashlib.sha256(self.place.read(shard.file)).hexdigest() != shard.sha256:
                got = f"other bytes ({self._damage(number)})"
                raise BadInput(self.place.shown(shard.file), f"SHA-256 {shard.sha256[:12]}…", got, STAGE_AGAIN)

    def _damage(self, shard: int) -> str:
        """Which tiles of a damaged shard fail their checksum, in words."""
        held = self.manifest.shards[shard]
        bad = [k for k in range(held.tiles) if isal_zlib.crc32(self._bytes(shard, k)) != held.crc32[k]]
        return f"in tile {', '.join(str(self.manifest.first[shard] + k) for k in bad)}" if bad else "outside the tiles"

    def _bytes(self, shard: int, place: int) -> pa.Buffer:
        """The record batch of a tile, as it is in the file; shorter where that ends early."""
        held = self.manifest.shards[shard]
        start, stop = held.offsets[place : place + 2]
        if self.place.local is None:
            return pa.py_buffer(self.place.read_range(held.file, start, stop))
        if shard not in self._mapped:
            self._mapped[shard] = pa.memory_map(str(inside(self.place.local, held.file))).read_buffer()
        mapped = self._mapped[shard]
        return mapped.slice(min(start, mapped.size), max(0, min(stop, mapped.size) - start))


_ORIGIN = tuple(field.name for field in fields(TileId))


def _view(column: pa.Array, dtype: type, shape: tuple[int, ...]) -> NDArray:
    """The one tensor of a column, without a copy."""
    storage = column.storage
    values = np.frombuffer(storage.values.buffers()[1], dtype)
    return values[storage.offset * storage.type.list_size :][: storage.type.list_size].reshape(shape)


def open_shards(where: str | Path | Place) -> ShardSet:
    """The shard set in a folder or below a URI, complete and of the sizes its manifest says; BadInput otherwise."""
    shards = ShardSet(where)
    _refuse(shards.lost())
    return shards


def _refuse(lost: dict[BadInput, int]) -> None:
    for bad in lost:
        raise bad

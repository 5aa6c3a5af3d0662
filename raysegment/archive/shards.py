"""Shards: training tiles in Arrow files that are mapped into memory, and the manifest that makes a set of them official.

A shard is an Arrow IPC file with one record batch per tile, so that any tile is read at its place without a copy. Fields
are float16 of (x − reference) / scale with the published constants of each channel: one pass over the source suffices;
the true moments, counted from the float32 fields in the same pass, are in the manifest for the device to normalise with.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysegment.archive.files import committed
from raysegment.archive.moments import Moments
from raysegment.climate.channels import CHANNELS, CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

MANIFEST = "manifest.json"
FORMAT = "raysegment shards 1"
REFERENCE = np.array([channel.reference for channel in CHANNELS], np.float32)
SCALE = np.array([channel.scale for channel in CHANNELS], np.float32)
_STAGE_AGAIN = "Stage the sources again into this folder"


def quantise(values: NDArray[np.float32], where: object = "fields") -> NDArray[np.float16]:
    """Fields (…, 16, h, w) in SI units → float16 of (x − reference) / scale; BadInput for what is not finite there."""
    out = np.empty(values.shape, np.float16)
    bad = []
    with np.errstate(over="ignore", invalid="ignore"):
        for number, name in enumerate(NAMES):  # one channel at a time stays in the cache
            out[..., number, :, :] = (values[..., number, :, :] - REFERENCE[number]) / SCALE[number]
            if not np.isfinite(out[..., number, :, :]).all():
                bad.append(name)
    if bad:
        got = f"{', '.join(bad)} beyond it"
        raise BadInput(where, "finite fields within the range of float16", got, "Check the units and fill values")
    return out


def dequantise(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Staged fields (…, 16, h, w) → SI units, to float16's 11 bits."""
    return values.astype(np.float32) * SCALE[:, None, None] + REFERENCE[:, None, None]


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
    return zlib.crc32(np.ascontiguousarray(mask).data, zlib.crc32(np.ascontiguousarray(tile_fields).data))


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


@dataclass(frozen=True)
class Part:
    """A finished shard file: its entry in the manifest, and what its tiles add to the totals."""

    file: str
    tiles: int
    sha256: str
    bytes: int
    snapshots: frozenset[tuple[str, int]]
    moments: Moments

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says about this shard."""
        return {"file": self.file, "tiles": self.tiles, "sha256": self.sha256, "bytes": self.bytes}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, nothing rounded."""
        return {**self.entry, "snapshots": sorted(self.snapshots), "moments": self.moments.to_dict()}

    @staticmethod
    def from_dict(held: Mapping[str, Any]) -> Part:
        """What `to_dict` made."""
        snapshots = frozenset((str(source), int(index)) for source, index in held["snapshots"])
        moments = Moments.from_dict(held["moments"])
        return Part(held["file"], held["tiles"], held["sha256"], held["bytes"], snapshots, moments)


class ShardWriter:
    """Writes one shard, tile by tile; a context manager. The file appears under its name when all is written:

    with ShardWriter(path, height, width) as writer:
        writer.add(fields, mask, origin)
    part = writer.part
    """

    def __init__(self, path: str | Path, height: int, width: int):
        self.path, self._schema, self._shape = Path(path), schema(height, width), (height, width)
        self._moments: list[Moments] = []
        self._snapshots: set[tuple[str, int]] = set()

    def __enter__(self) -> ShardWriter:
        self._commit = committed(self.path)
        self._temporary = self._commit.__enter__()
        self._file = pa.ipc.new_file(str(self._temporary), self._schema)
        return self

    def add(self, tile_fields: NDArray[np.float32], mask: NDArray[np.uint8], origin: TileId) -> None:
        """One tile: `tile_fields (16, h, w)` in SI units, checked for float16; `mask (h, w)`."""
        assert tile_fields.shape == (len(NAMES), *self._shape), (tile_fields.shape, self._shape)
        assert mask.shape == self._shape, (mask.shape, self._shape)
        packed, mask = quantise(tile_fields, origin.source), np.ascontiguousarray(mask, np.uint8)
        self._moments.append(Moments.of_tile(tile_fields, mask))
        self._snapshots.add((origin.source, origin.index))
        values = [packed, mask, [origin.id], [origin.source], [origin.index], [origin.time], [origin.row], [origin.column],
                  [checksum(packed, mask)]]  # fmt: skip
        columns = [_column(value, field.type) for value, field in zip(values, self._schema, strict=True)]
        self._file.write_batch(pa.record_batch(columns, schema=self._schema))

    def __exit__(self, *error) -> None:
        self._file.close()
        if error[0] is None:
            self.part = self._finish()
        self._commit.__exit__(*error)

    def _finish(self) -> Part:
        size, digest = self._temporary.stat().st_size, _sha256(self._temporary)
        moments = Moments.merge(self._moments)
        return Part(self.path.name, len(self._moments), digest, size, frozenset(self._snapshots), moments)


def write_shard(path: str | Path, tiles: Iterable[tuple[NDArray[np.float32], NDArray[np.uint8], TileId]]) -> Part:
    """One shard of `tiles` (fields (16, h, w) in SI units, mask (h, w), origin), all of one size."""
    rest = iter(tiles)
    first = next(rest, None)
    assert first is not None, "a shard has at least one tile"
    with ShardWriter(path, *first[1].shape) as writer:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a shard set holds; as `manifest.json` written last, it makes the set complete.

    `reference` and `scale` undo the staging; `mean`, `std`, `minimum`, `maximum` (16) are of the fields in SI units, over
    all pixels alike; `class_counts (3)` are pixels; `tile` is (height, width), `spacing_deg` (dlat, dlon), `periodic` says
    whether a tile's columns close the circle; `snapshots` counts those with a tile here; `labels` says who made the masks.
    """

    tile: tuple[int, int]
    spacing_deg: tuple[float, float]
    periodic: bool
    tiles: int
    snapshots: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    class_counts: tuple[int, ...]
    shards: tuple[Mapping[str, Any], ...]
    sources: tuple[str, ...]
    labels: str
    channels: tuple[str, ...] = NAMES
    units: tuple[str, ...] = tuple(channel.unit for channel in CHANNELS)
    reference: tuple[float, ...] = tuple(channel.reference for channel in CHANNELS)
    scale: tuple[float, ...] = tuple(channel.scale for channel in CHANNELS)
    classes: tuple[str, ...] = CLASSES
    format: str = FORMAT

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        if self.format != FORMAT:
            raise ValueError(f"format: expected {FORMAT!r}, got {self.format!r}")
        if self.channels != NAMES or self.classes != CLASSES:
            raise ValueError(f"channels and classes: expected {NAMES} and {CLASSES}, got {self.channels} and {self.classes}")
        for name in ("mean", "std", "minimum", "maximum", "reference", "scale"):
            if len(getattr(self, name)) != len(NAMES):
                raise ValueError(f"{name}: expected {len(NAMES)} numbers, got {len(getattr(self, name))}")
        if sum(self.class_counts) != self.tiles * self.tile[0] * self.tile[1]:
            raise ValueError(f"class_counts: expected {self.tiles} tiles of {self.tile} pixels, got {self.class_counts}")
        if sum(int(shard["tiles"]) for shard in self.shards) != self.tiles:
            raise ValueError(f"shards: expected {self.tiles} tiles in all, got {[shard['tiles'] for shard in self.shards]}")

    @staticmethod
    def of(parts: Iterable[Part], tile: tuple[int, int], grid: Grid, labels: str) -> Manifest:
        """The manifest of finished shards: the same, byte for byte, in whatever order the parts come."""
        parts = sorted(parts, key=lambda part: part.file)
        total = Moments.merge(part.moments for part in parts)
        snapshots = frozenset().union(*(part.snapshots for part in parts))
        return Manifest(
            tile=(int(tile[0]), int(tile[1])),
            spacing_deg=(grid.dlat, grid.dlon),
            periodic=grid.periodic and tile[1] == grid.shape[1],
            tiles=sum(part.tiles for part in parts),
            snapshots=len(snapshots),
            mean=total.mean,
            std=total.std,
            minimum=total.minimum,
            maximum=total.maximum,
            class_counts=total.class_counts,
            shards=tuple(part.entry for part in parts),
            sources=tuple(sorted({source for source, _ in snapshots})),
            labels=labels,
        )

    @staticmethod
    def load(folder: str | Path) -> Manifest:
        """The manifest of the set in `folder`; BadInput when the set is not complete or the manifest not readable."""
        path = Path(folder) / MANIFEST
        if not path.exists():
            got = "no manifest: the set is not complete" if Path(folder).is_dir() else "no such folder"
            raise BadInput(folder, f"a shard set with {MANIFEST}", got, _STAGE_AGAIN)
        try:
            return Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(path, "a shard manifest", error, _STAGE_AGAIN) from None

    def save(self, folder: str | Path) -> Path:
        """Write `manifest.json`, whole or not at all; to be called when every shard is in its place."""
        path = Path(folder) / MANIFEST
        with committed(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


class ShardSet:
    """A complete shard set, read in place; tiles are numbered through the shards in the manifest's order.

    It travels between processes as its folder: the other side maps the files anew.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self._first = [0]  # number of each shard's first tile
        for shard in self.manifest.shards:
            self._first.append(self._first[-1] + shard["tiles"])
            self._check_size(shard)
        self._open: dict[int, pa.RecordBatchFileReader] = {}

    def __reduce__(self):
        return ShardSet, (self.folder,)

    def __len__(self) -> int:
        return self.manifest.tiles

    def __iter__(self) -> Iterator[Tile]:
        return (self.tile(number) for number in range(len(self)))

    def tile(self, number: int) -> Tile:
        """Tile `number`, its arrays views of the mapped file (not writable)."""
        if not 0 <= number < len(self):
            raise IndexError(f"tile {number} of {len(self)} in {self.folder}")
        shard = bisect_right(self._first, number) - 1
        batch = self._reader(shard).get_batch(number - self._first[shard])
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        height, width = self.manifest.tile
        return Tile(
            fields=_view(columns["fields"], np.float16, (len(NAMES), height, width)),
            mask=_view(columns["mask"], np.uint8, (height, width)),
            origin=TileId(**{name: columns[name][0].as_py() for name in _ORIGIN}),
            checksum=columns["checksum"][0].as_py(),
        )

    def verify(self) -> None:
        """Read every byte; BadInput that names the damaged file, and the tile where the damage is in one."""
        for shard, entry in enumerate(self.manifest.shards):
            if _sha256(self.folder / entry["file"]) != entry["sha256"]:
                got = f"other bytes ({self._damage(shard)})"
                raise BadInput(self.folder / entry["file"], f"SHA-256 {entry['sha256'][:12]}…", got, _STAGE_AGAIN)

    def _damage(self, shard: int) -> str:
        """Which tiles of a damaged shard fail their own checksum, in words."""
        numbers = range(self._first[shard], self._first[shard + 1])
        try:
            bad = [str(number) for number in numbers if not self.tile(number).intact]
        except (pa.ArrowInvalid, OSError, ValueError, BadInput) as error:
            return f"unreadable: {error}"
        return f"in tile {', '.join(bad)}" if bad else "outside the tiles"

    def _reader(self, shard: int) -> pa.RecordBatchFileReader:
        if shard not in self._open:
            path = self.folder / self.manifest.shards[shard]["file"]
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
            except (pa.ArrowInvalid, OSError) as error:
                raise BadInput(path, "an Arrow file", error, _STAGE_AGAIN) from None
            self._check_reader(path, reader, self.manifest.shards[shard]["tiles"])
            self._open[shard] = reader
        return self._open[shard]

    def _check_reader(self, path: Path, reader: pa.RecordBatchFileReader, tiles: int) -> None:
        expected = schema(*self.manifest.tile)
        if reader.schema != expected or reader.num_record_batches != tiles:
            got = f"{reader.num_record_batches} batches of {reader.schema.names}"
            raise BadInput(path, f"{tiles} tiles of {expected.names}, {self.manifest.tile}", got, _STAGE_AGAIN)

    def _check_size(self, shard: Mapping[str, Any]) -> None:
        path = self.folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            raise BadInput(path, f"{shard['bytes']} bytes", "no such file" if size is None else f"{size} bytes", _STAGE_AGAIN)

    @cached_property
    def paths(self) -> list[Path]:
        """The shard files in order."""
        return [self.folder / shard["file"] for shard in self.manifest.shards]


_ORIGIN = tuple(field.name for field in fields(TileId))


def _view(column: pa.Array, dtype: type, shape: tuple[int, ...]) -> NDArray:
    """The one tensor of a column, without a copy."""
    storage = column.storage
    values = np.frombuffer(storage.values.buffers()[1], dtype)
    return values[storage.offset * storage.type.list_size :][: storage.type.list_size].reshape(shape)


def open_shards(folder: str | Path) -> ShardSet:
    """The shard set in `folder`, complete and of the sizes its manifest says; BadInput otherwise."""
    return ShardSet(folder)

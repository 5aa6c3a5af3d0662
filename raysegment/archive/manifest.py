"""The manifest that makes a set of shards official: what they hold, where each tile lies, and what its bytes must be."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from raysegment.archive.moments import Moments
from raysegment.archive.places import Place
from raysegment.climate.channels import CHANNELS, CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

MANIFEST = "manifest.json"
FORMAT = "raysegment shards 2"
STAGE_AGAIN = "Stage the sources again into this folder"


@dataclass(frozen=True)
class Shard:
    """A shard file as the manifest describes it.

    Tile k of it is the record batch in bytes [offsets[k], offsets[k + 1]) with CRC-32 crc32[k]; its fields begin `body`
    bytes into that, its mask follows them.
    """

    file: str
    tiles: int
    sha256: str
    bytes: int
    body: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(self.offsets))
        object.__setattr__(self, "crc32", tuple(self.crc32))
        if len(self.offsets) != self.tiles + 1 or len(self.crc32) != self.tiles or self.offsets[-1] > self.bytes:
            got = f"{len(self.offsets)} offsets up to {self.offsets[-1:]}, {len(self.crc32)} checksums"
            raise ValueError(f"{self.file}: expected places and checksums of {self.tiles} tiles in {self.bytes} bytes, got {got}")
        if Path(self.file).name != self.file or self.file.startswith("."):
            raise ValueError(f"file: expected a plain name, got {self.file!r}")


@dataclass(frozen=True)
class Part:
    """A finished shard file, and what its tiles add to the totals."""

    shard: Shard
    snapshots: frozenset[tuple[str, int]]
    moments: Moments

    @property
    def file(self) -> str:
        return self.shard.file

    @property
    def tiles(self) -> int:
        return self.shard.tiles

    @property
    def bytes(self) -> int:
        return self.shard.bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, nothing rounded."""
        return {"shard": asdict(self.shard), "snapshots": sorted(self.snapshots), "moments": self.moments.to_dict()}

    @staticmethod
    def from_dict(held: Mapping[str, Any]) -> Part:
        """What `to_dict` made."""
        snapshots = frozenset((str(source), int(index)) for source, index in held["snapshots"])
        return Part(Shard(**held["shard"]), snapshots, Moments.from_dict(held["moments"]))


@dataclass(frozen=True)
class Manifest:
    """What a shard set holds; as `manifest.json` written last, it makes the set complete.

    `reference` and `scale` undo the staging; `mean`, `std`, `minimum`, `maximum` (16) are of the fields in SI units, over
    all pixels alike; `class_counts (3)` are pixels; `tile` is (height, width), `spacing_deg` (dlat, dlon), `periodic` says
    whether a tile's columns close the circle; `halo` is the rim of cells that tiles share with their neighbours;
    `snapshots` counts those with a tile here; `labels` says who made the masks.
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
    shards: tuple[Shard, ...]
    sources: tuple[str, ...]
    labels: str
    halo: int = 0
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
        if self.format == FORMAT:
            shards = tuple(shard if isinstance(shard, Shard) else Shard(**shard) for shard in self.shards)
            object.__setattr__(self, "shards", shards)
        if self.format != FORMAT:
            raise ValueError(f"format: expected {FORMAT!r}, got {self.format!r}")
        if self.channels != NAMES or self.classes != CLASSES:
            raise ValueError(f"channels and classes: expected {NAMES} and {CLASSES}, got {self.channels} and {self.classes}")
        for name in ("mean", "std", "minimum", "maximum", "reference", "scale"):
            if len(getattr(self, name)) != len(NAMES):
                raise ValueError(f"{name}: expected {len(NAMES)} numbers, got {len(getattr(self, name))}")
        if sum(self.class_counts) != self.tiles * self.tile[0] * self.tile[1]:
            raise ValueError(f"class_counts: expected {self.tiles} tiles of {self.tile} pixels, got {self.class_counts}")
        if sum(shard.tiles for shard in self.shards) != self.tiles:
            raise ValueError(f"shards: expected {self.tiles} tiles in all, got {[shard.tiles for shard in self.shards]}")

    @staticmethod
    def of(parts: Iterable[Part], tile: tuple[int, int], grid: Grid, labels: str, halo: int = 0) -> Manifest:
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
            shards=tuple(part.shard for part in parts),
            sources=tuple(sorted({source for source, _ in snapshots})),
            labels=labels,
            halo=halo,
        )

    @staticmethod
    def load(where: str | Path | Place) -> Manifest:
        """The manifest of the set in a folder or below a URI; BadInput when the set is not complete or it is not readable."""
        return Manifest.parse(manifest_bytes(where), where)

    @staticmethod
    def parse(held: bytes, where: str | Path | Place) -> Manifest:
        """A manifest from its bytes; BadInput, naming `where`, when they are none."""
        try:
            return Manifest(**json.loads(held))
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(Place.of(where).shown(MANIFEST), "a shard manifest", error, STAGE_AGAIN) from None

    def text(self) -> str:
        """As `manifest.json` holds it: a line per key, and one per shard."""
        held = asdict(self)
        shards = ",\n  ".join(json.dumps(shard) for shard in held.pop("shards"))
        rest = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in held.items())
        return f'{{\n{rest},\n "shards": [\n  {shards}\n ]\n}}\n'

    def save(self, where: str | Path | Place) -> None:
        """Write `manifest.json`, whole or not at all; to be called when every shard is in its place."""
        with Place.of(where).committed(MANIFEST) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    @cached_property
    def first(self) -> tuple[int, ...]:
        """Number of each shard's first tile, and at the end the number of tiles."""
        return tuple(accumulate((shard.tiles for shard in self.shards), initial=0))

    def find(self, number: int) -> tuple[int, int]:
        """(shard, place in it) of tile `number`."""
        assert 0 <= number < self.tiles, (number, self.tiles)
        shard = bisect_right(self.first, number) - 1
        return shard, number - self.first[shard]


def manifest_bytes(where: str | Path | Place) -> bytes:
    """What `manifest.json` holds; BadInput when there is none."""
    place = Place.of(where)
    try:
        return place.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        absent = place.local is not None and not place.local.is_dir()
        got = "no such folder" if absent else "no manifest: the set is not complete"
        raise BadInput(place, f"a shard set with {MANIFEST}", got, STAGE_AGAIN) from None


def set_id(manifest: bytes) -> str:
    """Identity of a shard set, 64 hexadecimal digits: its manifest holds the digests of all its files."""
    return hashlib.sha256(manifest).hexdigest()

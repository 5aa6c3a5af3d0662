"""One part of a shard set: a few source files become one shard and a record of what it adds to the totals.

A part whose record agrees with its sources and settings is complete and is not made again. Source and mask files are
read once, time after time; the source's own chunks decide what is read together (`archive.chunkwise`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.archive.manifest import Part
from raysegment.archive.masks import MaskSource
from raysegment.archive.meter import ReadMeter
from raysegment.archive.moments import Moments
from raysegment.archive.places import Place
from raysegment.archive.shards import ShardWriter, TileId
from raysegment.archive.skipped import Skipped
from raysegment.archive.snapshots import Snapshot, Source, open_source
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.feed.pack import pack
from raysegment.feed.tiling import Tiling

PARTS = "parts"
INSIDE = "labels inside the source files"
_VERSION = 2  # of the records: raise it when a part's content changes


@dataclass(frozen=True)
class Item:
    """One source file: its path, the name it has in the shards, its mask file."""

    path: str
    name: str
    mask: str | None


@dataclass(frozen=True)
class Job:
    """One part to make: its files and everything a task must know; `key` identifies sources and settings."""

    number: int
    items: tuple[Item, ...]
    lat: tuple[float, ...]
    lon: tuple[float, ...]
    tile: tuple[int, int] | None
    halo: int
    memory_mib: float
    out: str
    consensus: str | None = None

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"

    @property
    def place(self) -> Place:
        return Place.of(self.out)

    @property
    def shard(self) -> str:
        return f"{self.name}.arrow"

    @property
    def record(self) -> str:
        return f"{PARTS}/{self.name}.json"

    @property
    def grid(self) -> Grid:
        return Grid(np.array(self.lat), np.array(self.lon))

    @property
    def tiling(self) -> Tiling:
        grid = self.grid
        return Tiling.of(grid.shape, self.tile, grid.periodic, self.halo)

    @property
    def key(self) -> str:
        """SHA-256 over the settings and over name, size and time of change of every file that is read."""
        files = [_fingerprint(file) for item in self.items for file in (item.path, item.mask) if file]
        content = [_VERSION, [item.name for item in self.items], files, self.lat, self.lon, self.tile, self.halo]
        content += [] if self.consensus is None else [self.consensus]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """What `to_json` made."""
        held = json.loads(text)
        items, tile = tuple(Item(**item) for item in held["items"]), held["tile"]
        return Job(**{**held, "items": items, "tile": tile and tuple(tile)})


@dataclass(frozen=True)
class Result:
    """A part that is done: its shard (None when every file was bad), who labelled it, what was left out.

    `source_bytes` are those the files have for what is needed, `bytes_read` those read for it; both 0 for a part that
    was there already, for nothing was read.
    """

    part: Part | None
    labels: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    files: int
    source_bytes: int = 0
    bytes_read: int = 0
    reused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, nothing rounded."""
        rows = [row.row() for row in self.skipped]
        return {**vars(self), "part": self.part and self.part.to_dict(), "labels": list(self.labels), "skipped": rows}

    @staticmethod
    def from_dict(held: Mapping[str, Any]) -> Result:
        """What `to_dict` made."""
        part = None if held["part"] is None else Part.from_dict(held["part"])
        skipped = tuple(Skipped(**row) for row in held["skipped"])
        return Result(**{**held, "part": part, "labels": tuple(held["labels"]), "skipped": skipped})


class _BadFile(Exception):
    """A source file that cannot be used, found while its part was being written."""

    def __init__(self, item: Item, reason: BadInput):
        self.item, self.reason = item, reason
        super().__init__(str(reason))


def make_part(job: Job) -> Result:
    """Make one part, leaving out its bad files: the shard first, then the record that makes it complete."""
    key = job.key  # taken before reading: a file that changes meanwhile makes the part stale
    job.place.remove(job.record)  # a shard that is being replaced has no record
    result = _write_part(job)
    with job.place.committed(job.record) as temporary:
        temporary.write_text(json.dumps({"key": key, **result.to_dict()}, indent=1))
    return result


def made_before(job: Job) -> Result | None:
    """The result of a part made before, if it is of the same sources and settings, left nothing out and is still there."""
    try:
        record = json.loads(job.place.read(job.record))
        if record.pop("key") != job.key:
            return None
        result = Result.from_dict({**record, "source_bytes": 0, "bytes_read": 0, "reused": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if result.skipped or result.part is None or job.place.size(job.shard) != result.part.bytes:
        return None
    return result


def _fingerprint(path: str) -> tuple[str, int, int] | tuple[str]:
    try:
        status = os.stat(path)
    except OSError:
        return (path,)
    return path, status.st_size, status.st_mtime_ns


def _write_part(job: Job) -> Result:
    """The shard of all files of a part that can be used; one that turns out bad half-way starts the shard anew without it."""
    reading, skipped, items = _Reading(job), list[Skipped](), list(job.items)
    while items:
        reading.labels.clear()
        reading.source_bytes = 0
        try:
            with ShardWriter(job.place, job.shard, *job.tiling.tile) as writer:
                for item in items:
                    _add_file(writer, item, reading)
            return reading.result(writer.part, skipped)
        except _BadFile as error:
            skipped.append(Skipped.of(error.item.path, error.reason))
            items.remove(error.item)
    job.place.remove(job.shard)
    return reading.result(None, skipped)


def _add_file(writer: ShardWriter, item: Item, reading: _Reading) -> None:
    """All tiles of one source file."""
    tiling = reading.job.tiling
    try:
        for snapshot, mask in reading.snapshots(item):
            for row, column in tiling.corners:
                fields = tiling.cut(snapshot.fields, row, column)
                own = np.array(tiling.cut(mask, row, column), order="C")
                origin = TileId(item.name, snapshot.index, snapshot.time_label, row, column)
                writer.put(pack(fields), own, Moments.of_tile(fields, own), origin)
    except BadInput as error:
        raise _BadFile(item, error) from None


class _Reading:
    """The files of a job as they are read: how many bytes, whose labels."""

    def __init__(self, job: Job):
        self.job, self.meter = job, ReadMeter()
        self.labels: set[str] = set()
        self.source_bytes = 0
        self._fields = np.empty((len(NAMES), *job.grid.shape), np.float32)

    def result(self, part: Part | None, skipped: list[Skipped]) -> Result:
        read = self.meter.bytes_read if self.meter.exact else self.source_bytes
        return Result(part, tuple(sorted(self.labels)), tuple(skipped), len(self.job.items), self.source_bytes, read)

    def snapshots(self, item: Item) -> Iterator[tuple[Snapshot, NDArray[np.uint8]]]:
        """Each snapshot of a source file with its mask; its fields are overwritten by the next."""
        return self.meter.counted(self._snapshots(item))

    def _snapshots(self, item: Item) -> Iterator[tuple[Snapshot, NDArray[np.uint8]]]:
        with ExitStack() as files:
            rule = self.job.consensus
            source = files.enter_context(open_source(item.path, label_map=rule or 0))
            _check_grid(item, source, self.job.grid)
            masks = _masks_of(item, source, rule)
            if masks is not None:
                files.enter_context(masks)
                _check_masks(item, masks, source)
                self.source_bytes += masks.read_once(self.job.memory_mib / 16)
            self.source_bytes += source.read_once(self.job.memory_mib, masks is None)
            labeller = INSIDE if masks is None else masks.labeller
            self.labels.add(labeller if rule is None else f"{labeller} ({rule} of each file's labellers)")
            for snapshot in source.snapshots(into=self._fields):
                mask = snapshot.mask if masks is None else masks.read(snapshot.index)
                assert mask is not None
                yield snapshot, mask


def _check_grid(item: Item, source: Source, grid: Grid) -> None:
    own = source.axes.grid
    if not own.same_as(grid):
        got = f"{own.shape[0]} x {own.shape[1]} from {own.lat[0]:g}N {own.lon[0]:g}E"
        expected = f"the first file's grid, {grid.shape[0]} x {grid.shape[1]} from {grid.lat[0]:g}N {grid.lon[0]:g}E"
        raise BadInput(item.path, expected, got, "Stage files of different grids into folders of their own.")


def _masks_of(item: Item, source: Source, consensus: str | None) -> MaskSource | None:
    """The masks of a source file, None when they are inside it; BadInput when there are none."""
    if item.mask is None:
        if not source.has_mask:
            raise BadInput(item.path, "labels inside", "none", "Label it with `raysegment segment` and give --masks DIR.")
        return None
    if not Path(item.mask).exists():
        raise BadInput(item.mask, f"the masks of {item.name}", "no such file", "Label it with `raysegment segment` first.")
    return MaskSource(item.mask, consensus or 0)


def _check_masks(item: Item, masks: MaskSource, source: Source) -> None:
    """Raise unless there is one mask for each snapshot, on its grid and of its time."""
    masks.check_fits(source.axes.grid, source.count)
    for index, (ours, theirs) in enumerate(zip(source.times, masks.times, strict=True)):
        if ours is not None and theirs is not None and ours.timetuple()[:6] != theirs.timetuple()[:6]:
            expected, got = f"the times of {item.name}, {ours.isoformat()} at {index}", theirs.isoformat()
            raise BadInput(masks.path, expected, got, "Use the masks made for this file.")

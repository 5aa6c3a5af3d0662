"""An archive and its masks become shards: one parallel pass of Ray Data, resumable, the manifest written last.

Source files are grouped into parts; a part is one task, one shard file and one small record (`parts/part-….json`) with
what its tiles add to the totals. A part whose record agrees with its sources is complete and is not made again. HDF5
has one lock for a whole process, so each task reads alone in its process. The totals are exact sums, merged at the end:
the manifest's bytes depend neither on the number of processes nor on the order in which they finish.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from raysegment.archive.files import committed
from raysegment.archive.masks import Masks, mask_path, read_masks
from raysegment.archive.moments import Moments
from raysegment.archive.shards import MANIFEST, Manifest, Part, ShardWriter, TileId
from raysegment.archive.skipped import Skipped, allowed, check_budget, write_skipped
from raysegment.archive.snapshots import Source, list_sources, open_source
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.feed.session import ensure_ray
from raysegment.feed.tiling import Tiling

PARTS, SKIPPED = "parts", "skipped.csv"
INSIDE = "labels inside the source files"
_TILE_BYTES = 2 * len(NAMES) + 1  # per cell: float16 fields and one byte of mask
_VERSION = 1  # of the records: raise it when a part's content changes


@dataclass(frozen=True)
class StageConfig:
    """How an archive is cut: `tile` (rows, columns) or None for whole maps; `shard_mib` is a shard's size to aim for.

    `files_per_part` bounds how many source files one task reads.
    """

    tile: tuple[int, int] | None = None
    shard_mib: float = 64.0
    files_per_part: int = 8

    def __post_init__(self) -> None:
        if self.tile is not None and (len(self.tile) != 2 or min(self.tile) < 1):
            raise ValueError(f"tile: expected two sizes like 256x256, got {self.tile}")
        if self.shard_mib <= 0 or self.files_per_part < 1:
            raise ValueError(f"expected a positive shard_mib and files_per_part, got {self.shard_mib} and {self.files_per_part}")

    @staticmethod
    def parse_tile(text: str, option: str = "--tile") -> tuple[int, int]:
        """`"256x384"` → (256, 384) rows by columns; `"256"` is a square."""
        rows, cross, columns = text.lower().replace(",", "x").partition("x")
        columns = columns if cross else rows
        if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
            raise BadInput(option, "rows x columns, like 256x384", repr(text), f"Write {option} 256x384.")
        return int(rows), int(columns)


@dataclass(frozen=True)
class StageReport:
    """What a staging pass made: counts, seconds, and the files left out with their reasons."""

    out: Path
    tiles: int
    snapshots: int
    shards: int
    sources: int
    source_bytes: int
    seconds: float
    parts_reused: int
    class_counts: tuple[int, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Item:
    """One source file: its path, the name it has in the shards, its mask file."""

    path: str
    name: str
    mask: str | None


@dataclass(frozen=True)
class _Job:
    """One part to make: its files and everything a task must know; `key` identifies sources and settings."""

    number: int
    items: tuple[_Item, ...]
    lat: tuple[float, ...]
    lon: tuple[float, ...]
    tile: tuple[int, int] | None
    out: str

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"

    @property
    def shard(self) -> Path:
        return Path(self.out) / f"{self.name}.arrow"

    @property
    def record(self) -> Path:
        return Path(self.out) / PARTS / f"{self.name}.json"

    @property
    def grid(self) -> Grid:
        return Grid(np.array(self.lat), np.array(self.lon))

    @property
    def key(self) -> str:
        """SHA-256 over the settings and over name, size and time of change of every file that is read."""
        files = [_fingerprint(file) for item in self.items for file in (item.path, item.mask) if file]
        content = [_VERSION, [item.name for item in self.items], files, self.lat, self.lon, self.tile]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class _Result:
    """A part that is done: its shard (None when every file was bad), who labelled it, what was left out."""

    part: Part | None
    labels: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    files: int
    reused: bool = False


class _BadFile(Exception):
    """A source file that cannot be used, found while its part was being written."""

    def __init__(self, item: _Item, reason: BadInput):
        self.item, self.reason = item, reason
        super().__init__(str(reason))


def stage(
    sources: Sequence[str | Path],
    masks_dir: str | Path | None,
    out: str | Path,
    config: StageConfig | None = None,
    max_skipped: float = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StageReport:
    """Shards of all `sources` (files, folders, globs) in the folder `out`, labelled from `masks_dir` or from inside the files.

    Files that cannot be used are listed in `skipped.csv`; more than `max_skipped` of them (a count, or a share where it is
    less than 1) is an error and no manifest appears. `progress(done, total)` counts source files.
    """
    started, config, out = time.monotonic(), config or StageConfig(), Path(out)
    paths = list_sources(sources)
    items = _items(paths, masks_dir)
    _clear(out)
    grid, snapshots = _first_grid(items, allowed(max_skipped, len(items)), out)
    jobs = _jobs(items, grid, config, snapshots, out)
    results = _make(jobs, allowed(max_skipped, len(items)), out, progress or (lambda done, total: None))
    manifest = _finish(results, grid, config, out)
    return StageReport(
        out, manifest.tiles, manifest.snapshots, len(manifest.shards), len(items),
        sum(path.stat().st_size for path in paths if path.exists()), time.monotonic() - started,
        sum(result.reused for result in results), manifest.class_counts, _skipped(results),
    )  # fmt: skip


def _clear(out: Path) -> None:
    """What is being made anew is not complete: no manifest. What writers that died left half-written goes, too."""
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    for path in (out / MANIFEST, *out.glob(".*.tmp"), *(out / PARTS).glob(".*.tmp")):
        with suppress(FileNotFoundError):
            path.unlink()


def _items(paths: list[Path], masks_dir: str | Path | None) -> list[_Item]:
    """Every source with its name below the folder that all have in common, and its mask file."""
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    names = [path.absolute().relative_to(common).as_posix() for path in paths]
    masks = [None if masks_dir is None else str(mask_path(masks_dir, path)) for path in paths]
    if masks_dir is not None and len(set(masks)) < len(masks):
        names = [path.stem for path in paths]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(masks_dir, "one source file per mask file", f"several named {twice}", "Stage their folders separately.")
    return [_Item(str(path), name, mask) for path, name, mask in zip(paths, names, masks, strict=True)]


def _first_grid(items: list[_Item], budget: int, out: Path) -> tuple[Grid, int]:
    """Grid and number of snapshots of the first file that can be opened; BadInput when too many before it cannot."""
    bad: list[Skipped] = []
    for item in items:
        try:
            with open_source(item.path) as source:
                return source.axes.grid, source.count
        except BadInput as error:
            bad.append(Skipped.of(item.path, error))
        if len(bad) > budget:
            break
    write_skipped(out / SKIPPED, bad)
    check_budget(bad, len(items), min(budget, len(items) - 1), out / SKIPPED)
    raise AssertionError("a list of sources is not empty")


def _jobs(items: list[_Item], grid: Grid, config: StageConfig, snapshots: int, out: Path) -> list[_Job]:
    """Files in parts of about `shard_mib`, judged by the first file; the machine's size has no say in it."""
    try:
        Tiling.of(grid.shape, config.tile, grid.periodic)
    except ValueError as error:
        raise BadInput("tile", "a tile no larger than the map", error, "Choose a smaller tile.") from None
    file_mib = snapshots * grid.lat.size * grid.lon.size * _TILE_BYTES / 2**20
    size = max(1, min(config.files_per_part, round(config.shard_mib / file_mib)))
    lat, lon = tuple(grid.lat.tolist()), tuple(grid.lon.tolist())
    groups = [tuple(items[start : start + size]) for start in range(0, len(items), size)]
    return [_Job(number, group, lat, lon, config.tile, str(out)) for number, group in enumerate(groups)]


def _make(jobs: list[_Job], budget: int, out: Path, progress: Callable[[int, int], None]) -> list[_Result]:
    """All parts, those found complete and those made now; stops with BadInput when too many files cannot be used."""
    known = [_read_record(job) for job in jobs]
    missing = [job for job, result in zip(jobs, known, strict=True) if result is None]
    results = [result for result in known if result is not None]
    done, total = sum(result.files for result in results), sum(len(job.items) for job in jobs)
    progress(done, total)
    for result in _run(missing):
        results.append(result)
        done += result.files
        progress(done, total)
        if len(_skipped(results)) > budget:
            break
    write_skipped(out / SKIPPED, _skipped(results))
    check_budget(_skipped(results), total, budget, out / SKIPPED)
    return results


def _run(jobs: list[_Job]) -> Iterator[_Result]:
    """Each job in a Ray Data task of its own, results as they come."""
    if not jobs:
        return
    ensure_ray()
    rows = [{"job": json.dumps(asdict(job))} for job in jobs]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(_make_part, batch_size=1, num_cpus=1)
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
        for text in batch["result"]:
            yield _result_from(json.loads(text))


def _make_part(batch: Any) -> Any:
    """In a task: make one part, leaving out its bad files, and say what came of it."""
    text = json.loads(str(batch["job"][0]))
    job = _Job(**{**text, "items": tuple(_Item(**item) for item in text["items"]), "tile": text["tile"] and tuple(text["tile"])})
    key = job.key  # taken before reading: a file that changes meanwhile makes the part stale
    result = _write_part(job)
    record = _result_text(result)
    with committed(job.record) as temporary:
        temporary.write_text(json.dumps({"key": key, **record}, indent=1))
    return {"result": np.array([json.dumps(record)], dtype=object)}


def _write_part(job: _Job) -> _Result:
    """The shard of all files of a part that can be used; one that turns out bad half-way starts the shard anew without it."""
    skipped: list[Skipped] = []
    items = list(job.items)
    while items:
        labels: set[str] = set()
        try:
            with ShardWriter(job.shard, *Tiling.of(job.grid.shape, job.tile, job.grid.periodic).tile) as writer:
                for item in items:
                    _add_file(writer, item, job, labels)
            return _Result(writer.part, tuple(sorted(labels)), tuple(skipped), len(job.items))
        except _BadFile as error:
            skipped.append(Skipped.of(error.item.path, error.reason))
            items.remove(error.item)
    with suppress(FileNotFoundError):
        job.shard.unlink()
    return _Result(None, (), tuple(skipped), len(job.items))


def _add_file(writer: ShardWriter, item: _Item, job: _Job, labels: set[str]) -> None:
    """All tiles of one source file."""
    try:
        with open_source(item.path) as source:
            masks = _masks_of(item, source, job.grid)
            labels.add(INSIDE if masks is None else masks.labeller)
            for index in range(source.count):
                _add_snapshot(writer, source, index, masks, item.name, job)
    except BadInput as error:
        raise _BadFile(item, error) from None


def _add_snapshot(writer: ShardWriter, source: Source, index: int, masks: Masks | None, name: str, job: _Job) -> None:
    snapshot = source.read(index)
    mask = snapshot.mask if masks is None else masks.masks[index]
    assert mask is not None
    tiling = Tiling.of(snapshot.grid.shape, job.tile, snapshot.grid.periodic)
    for row, column in tiling.corners:
        origin = TileId(name, index, snapshot.time_label, row, column)
        writer.add(tiling.cut(snapshot.fields, row, column), tiling.cut(mask, row, column), origin)


def _masks_of(item: _Item, source: Source, grid: Grid) -> Masks | None:
    """The masks of a source file, None when they are inside it; BadInput when there are none or they do not fit."""
    own = source.axes.grid
    if not own.same_as(grid):
        got = f"{own.shape[0]} x {own.shape[1]} from {own.lat[0]:g}N {own.lon[0]:g}E"
        expected = f"the first file's grid, {grid.shape[0]} x {grid.shape[1]} from {grid.lat[0]:g}N {grid.lon[0]:g}E"
        raise BadInput(item.path, expected, got, "Stage files of different grids into folders of their own.")
    if item.mask is None:
        if not source.has_mask:
            raise BadInput(item.path, "labels inside", "none", "Label it with `raysegment segment` and give --masks DIR.")
        return None
    if not Path(item.mask).exists():
        raise BadInput(item.mask, f"the masks of {item.name}", "no such file", "Label it with `raysegment segment` first.")
    masks = read_masks(item.mask)
    masks.check_fits(own, source.count)
    _check_times(item, masks, source)
    return masks


def _check_times(item: _Item, masks: Masks, source: Source) -> None:
    for index, (ours, theirs) in enumerate(zip(source.times, masks.times, strict=True)):
        if ours is not None and theirs is not None and ours.timetuple()[:6] != theirs.timetuple()[:6]:
            expected, got = f"the times of {item.name}, {ours.isoformat()} at {index}", theirs.isoformat()
            raise BadInput(item.mask, expected, got, "Use the masks made for this file.")


def _finish(results: list[_Result], grid: Grid, config: StageConfig, out: Path) -> Manifest:
    """The manifest, after everything that is no part of it has gone."""
    parts = [result.part for result in results if result.part is not None]
    if not parts:
        raise BadInput(out, "at least one source file that can be used", "none", f"See {out / SKIPPED}.")
    wanted = {Path(part.file).stem for part in parts}
    for stale in (*out.glob("part-*.arrow"), *(out / PARTS).glob("part-*.json")):
        if stale.stem not in wanted:
            stale.unlink()
    labels = "; ".join(sorted({label for result in results for label in result.labels}))
    manifest = Manifest.of(parts, Tiling.of(grid.shape, config.tile, grid.periodic).tile, grid, labels)
    manifest.save(out)
    return manifest


def _skipped(results: list[_Result]) -> tuple[Skipped, ...]:
    return tuple(sorted((row for result in results for row in result.skipped), key=lambda row: row.file))


def _fingerprint(path: str) -> tuple[str, int, int] | tuple[str]:
    try:
        status = os.stat(path)
    except OSError:
        return (path,)
    return path, status.st_size, status.st_mtime_ns


def _read_record(job: _Job) -> _Result | None:
    """The result of a part made before, if it is of the same sources and settings, left nothing out and is still there."""
    try:
        record = json.loads(job.record.read_text())
        if record.pop("key") != job.key:
            return None
        result = _result_from(record, reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if result.skipped or result.part is None or not job.shard.exists() or job.shard.stat().st_size != result.part.bytes:
        return None
    return result


def _result_text(result: _Result) -> dict[str, Any]:
    """A result as JSON, fractions exact."""
    part = None
    if result.part is not None:
        moments = result.part.moments
        sums = {name: [str(x) for x in getattr(moments, name)] for name in ("total", "squares")}
        part = {**result.part.entry, "snapshots": sorted(result.part.snapshots), "moments": {**asdict(moments), **sums}}
    return {"part": part, "labels": result.labels, "skipped": [row.row() for row in result.skipped], "files": result.files}


def _result_from(record: dict[str, Any], reused: bool = False) -> _Result:
    part = record["part"]
    if part is not None:
        exact = {name: tuple(Fraction(x) for x in part["moments"][name]) for name in ("total", "squares")}
        rest = {name: tuple(part["moments"][name]) for name in ("minimum", "maximum", "class_counts")}
        moments = Moments(pixels=part["moments"]["pixels"], **exact, **rest)
        part = Part(**{**part, "snapshots": frozenset((name, index) for name, index in part["snapshots"]), "moments": moments})
    skipped = tuple(Skipped(**row) for row in record["skipped"])
    return _Result(part, tuple(record["labels"]), skipped, record["files"], reused)

"""An archive and its masks become shards: one parallel pass of Ray Data, resumable, the manifest written last.

Source files are grouped into parts; a part is one task, one shard file and one small record (`parts/part-….json`) with
what its tiles add to the totals. A part whose record agrees with its sources is complete and is not made again. HDF5
has one lock for a whole process, so each task reads alone in its process. The totals are exact sums, merged at the end:
the manifest's bytes depend neither on the number of processes nor on the order in which they finish.

Each byte of the source's variables is read once: `bytes_read` is counted by the operating system, `source_bytes` are
those that the files have for the variables and labels needed. What is read besides is metadata: of an HDF5 file some 20 to
100 kB (about 3 kB of it the index of each chunked variable), of its mask file 20 kB, of a classic netCDF file its header of
a few kB; and the first file's once more, for its grid. That is much beside a file of a few hundred kB, below 1 % of 16 maps
of 768 x 1152 cells.

Memory of a task, with n cells in a map: 64 n bytes of fields, 3 x 33 n of tiles packed and being written, one chunk of a
variable unpacked, and where chunks span several times or levels up to `memory_mib` of maps that are wanted later, and of
masks from files a sixteenth of that besides (those beyond lie in temporary files, in the folder that TMPDIR names). It does
not grow with the number of times or files.

Statistics are of the tiles: a cell that several tiles have (a halo, the last row of tiles) counts in each of them, as it
does in training.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from raysegment.archive.manifest import MANIFEST, Manifest
from raysegment.archive.masks import mask_path
from raysegment.archive.meter import ReadMeter
from raysegment.archive.places import Place
from raysegment.archive.skipped import SKIPPED, Skipped, allowed, check_budget, write_skipped
from raysegment.archive.snapshots import list_sources, open_source
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.consensus import CONSENSUS
from raysegment.climate.grid import Grid
from raysegment.feed.part import INSIDE as INSIDE
from raysegment.feed.part import PARTS, Item, Job, Result, made_before, make_part
from raysegment.feed.session import ensure_ray
from raysegment.feed.tiling import Tiling

_PART = re.compile(r"part-\d+\.(arrow|json)")
_TILE_BYTES = 2 * len(NAMES) + 1  # per cell: float16 fields and one byte of mask


@dataclass(frozen=True)
class StageConfig:
    """How an archive is cut: `tile` (rows, columns) or None for whole maps, `halo` cells of it shared with neighbours.

    `shard_mib` is a shard's size to aim for; `files_per_part` bounds how many source files one task reads; `memory_mib`
    bounds what one task keeps in memory of maps that it had to read together with others. `consensus` is the rule by which
    the label maps of several people become one (`climate.consensus`); without it the first map of a file counts.
    """

    tile: tuple[int, int] | None = None
    shard_mib: float = 64.0
    files_per_part: int = 8
    halo: int = 0
    memory_mib: float = 1024.0
    consensus: str | None = None

    def __post_init__(self) -> None:
        if self.tile is not None and (len(self.tile) != 2 or min(self.tile) < 1):
            raise ValueError(f"tile: expected two sizes like 256x256, got {self.tile}")
        if self.shard_mib <= 0 or self.files_per_part < 1:
            raise ValueError(f"expected a positive shard_mib and files_per_part, got {self.shard_mib} and {self.files_per_part}")
        if self.halo < 0 or self.memory_mib < 0:
            raise ValueError(f"expected halo and memory_mib of 0 or more, got {self.halo} and {self.memory_mib}")
        if self.consensus is not None and self.consensus not in CONSENSUS:
            raise BadInput("--consensus", ", ".join(CONSENSUS), self.consensus, "Choose one of those")

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
    """What a staging pass made: counts, seconds, and the files left out with their reasons.

    `source_bytes` are those that the files have for what is needed, `bytes_read` those that were read (elsewhere than on
    Linux nobody counts, and they are the same); parts that were there already add to neither.
    """

    out: str
    tiles: int
    snapshots: int
    shards: int
    sources: int
    source_bytes: int
    bytes_read: int
    read_ratio: float
    seconds: float
    parts_reused: int
    labels: str
    class_counts: tuple[int, ...]
    skipped: tuple[Skipped, ...]


def stage(
    sources: Sequence[str | Path],
    masks_dir: str | Path | None,
    out: str | Path,
    config: StageConfig | None = None,
    max_skipped: float = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StageReport:
    """Shards of all `sources` (files, folders, globs) in the folder or below the URI `out`, labelled from `masks_dir` or
    from inside the files.

    Files that cannot be used are listed in `skipped.csv`; more than `max_skipped` of them (a count, or a share where it is
    less than 1) is an error and no manifest appears. `progress(done, total)` counts source files.
    """
    started, config, place = time.monotonic(), config or StageConfig(), Place.of(out)
    items = _items(list_sources(sources), masks_dir)
    _clear(place)
    meter = ReadMeter()
    with meter.counting():
        grid, snapshots = _first_grid(items, allowed(max_skipped, len(items)), place)
    jobs = _jobs(items, grid, config, snapshots, place)
    results = _make(jobs, allowed(max_skipped, len(items)), place, progress or (lambda done, total: None))
    manifest = _finish(results, grid, config, place)
    needed, read = (sum(counts) for counts in zip(*((r.source_bytes, r.bytes_read) for r in results), strict=True))
    return StageReport(
        str(place), manifest.tiles, manifest.snapshots, len(manifest.shards), len(items), needed, read + meter.bytes_read,
        (read + meter.bytes_read) / needed if needed else 0.0, time.monotonic() - started,
        sum(result.reused for result in results), manifest.labels, manifest.class_counts, _skipped(results),
    )  # fmt: skip


def _clear(place: Place) -> None:
    """What is being made anew is not complete: no manifest. What writers that died left half-written goes, too."""
    place.remove(MANIFEST)
    if place.local is not None:
        for left in (*place.local.glob(".*.tmp"), *(place.local / PARTS).glob(".*.tmp")):
            left.unlink(missing_ok=True)


def _items(paths: list[Path], masks_dir: str | Path | None) -> list[Item]:
    """Every source with its name below the folder that all have in common, and its mask file."""
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    names = [path.absolute().relative_to(common).as_posix() for path in paths]
    masks = [None if masks_dir is None else str(mask_path(masks_dir, path)) for path in paths]
    if masks_dir is not None and len(set(masks)) < len(masks):
        names = [path.stem for path in paths]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(masks_dir, "one source file per mask file", f"several named {twice}", "Stage their folders separately.")
    return [Item(str(path), name, mask) for path, name, mask in zip(paths, names, masks, strict=True)]


def _first_grid(items: list[Item], budget: int, place: Place) -> tuple[Grid, int]:
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
    write_skipped(place, bad)
    check_budget(bad, len(items), min(budget, len(items) - 1), place.shown(SKIPPED))
    raise AssertionError("a list of sources is not empty")


def _jobs(items: list[Item], grid: Grid, config: StageConfig, snapshots: int, place: Place) -> list[Job]:
    """Files in parts of about `shard_mib`, judged by the first file; the machine's size has no say in it."""
    try:
        Tiling.of(grid.shape, config.tile, grid.periodic, config.halo)
    except ValueError as error:
        expected = "a tile no larger than the map, more than two halos wide"
        raise BadInput("tile", expected, error, "Choose a smaller tile or halo.") from None
    file_mib = snapshots * grid.lat.size * grid.lon.size * _TILE_BYTES / 2**20
    size = max(1, min(config.files_per_part, round(config.shard_mib / file_mib)))
    lat, lon = tuple(grid.lat.tolist()), tuple(grid.lon.tolist())
    groups = [tuple(items[start : start + size]) for start in range(0, len(items), size)]
    made = config.tile, config.halo, config.memory_mib, place.text, config.consensus
    return [Job(number, group, lat, lon, *made) for number, group in enumerate(groups)]


def _make(jobs: list[Job], budget: int, place: Place, progress: Callable[[int, int], None]) -> list[Result]:
    """All parts, those found complete and those made now; stops with BadInput when too many files cannot be used."""
    known = [made_before(job) for job in jobs]
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
    write_skipped(place, _skipped(results))
    check_budget(_skipped(results), total, budget, place.shown(SKIPPED))
    return results


def _run(jobs: list[Job]) -> Iterator[Result]:
    """Each job in a Ray Data task of its own, results as they come."""
    if not jobs:
        return
    ensure_ray()
    rows = [{"job": job.to_json()} for job in jobs]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(_make_part, batch_size=1, num_cpus=1)
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
        for text in batch["result"]:
            yield Result.from_dict(json.loads(text))


def _make_part(batch: Any) -> Any:
    """In a task: make one part and say what came of it."""
    result = make_part(Job.from_json(str(batch["job"][0])))
    return {"result": np.array([json.dumps(result.to_dict())], dtype=object)}


def _finish(results: list[Result], grid: Grid, config: StageConfig, place: Place) -> Manifest:
    """The manifest, after everything that is no part of it has gone."""
    parts = [result.part for result in results if result.part is not None]
    if not parts:
        raise BadInput(place, "at least one source file that can be used", "none", f"See {place.shown(SKIPPED)}.")
    wanted = {Path(part.file).stem for part in parts}
    names = [*place.names(), *(f"{PARTS}/{name}" for name in place.names(PARTS))]
    for name in names:
        if _PART.fullmatch(Path(name).name) and Path(name).stem not in wanted:
            place.remove(name)
    labels = "; ".join(sorted({label for result in results for label in result.labels}))
    tiling = Tiling.of(grid.shape, config.tile, grid.periodic, config.halo)
    manifest = Manifest.of(parts, tiling.tile, grid, labels, config.halo)
    manifest.save(place)
    return manifest


def _skipped(results: list[Result]) -> tuple[Skipped, ...]:
    return tuple(sorted((row for result in results for row in result.skipped), key=lambda row: row.file))

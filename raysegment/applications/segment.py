"""Masks for an archive: a streaming Ray Data pipeline over source files, resumable, that survives bad files.

One mask file per source file, written under a temporary name and renamed, so a mask file that is there is whole and a
run that was killed goes on where it stopped. What is in memory does not grow with the archive: one file per process.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray.data
import torch

from raysegment.applications.labellers import Labeller, parse_labeller
from raysegment.archive.masks import mask_path, write_masks
from raysegment.archive.places import Place
from raysegment.archive.skipped import SKIPPED, Skipped, allowed, check_budget, write_skipped
from raysegment.archive.snapshots import list_sources, open_source
from raysegment.climate.checks import BadInput
from raysegment.feed.session import ensure_ray

MARKER = "segment.json"


@dataclass(frozen=True)
class SegmentConfig:
    """Options of `segment`. `max_skipped`: below 1 the share, from 1 on the number of files that may be bad."""

    max_skipped: float = 0.01
    probabilities: bool = False
    artmip: bool = False
    processes: int | None = None


@dataclass
class SegmentReport:
    """What a run did: files written now, found complete, skipped with reasons."""

    written: list[Path] = field(default_factory=list)
    complete: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    snapshots: int = 0


def segment(
    sources: Sequence[str | Path],
    labeller: str | Path,
    out: str | Path,
    config: SegmentConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SegmentReport:
    """Mask files in `out` for every source file; BadInput when more files are bad than `max_skipped` allows."""
    config = config or SegmentConfig()
    paths, chosen, out = list_sources(sources), parse_labeller(labeller), Path(out)
    _check_names(paths)
    _claim(out, chosen, config)
    report = SegmentReport(complete=[p for p in paths if mask_path(out, p).exists()])
    todo = [p for p in paths if not mask_path(out, p).exists()]
    try:
        for row in _label_all(todo, chosen, out, config):
            _note(report, row)
            check_budget(report.skipped, len(paths), allowed(config.max_skipped, len(paths)), out / SKIPPED)
            if progress:
                progress(len(report.written) + len(report.complete) + len(report.skipped), len(paths))
    finally:
        write_skipped(Place.of(out), report.skipped)
    return report


def _label_all(todo: list[Path], labeller: Labeller, out: Path, config: SegmentConfig):
    """Rows of outcomes, in whatever order files are done."""
    if not todo:
        return
    ensure_ray()
    processes = config.processes or max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(todo)))
    rows = ray.data.from_items([{"path": str(p)} for p in todo], override_num_blocks=len(todo))
    done = rows.map(
        _Worker,  # pyright: ignore[reportArgumentType]  (Ray takes a class whose instances are called)
        fn_constructor_args=(labeller, str(out), config),
        compute=ray.data.ActorPoolStrategy(size=processes),
        num_cpus=1,
    )
    yield from done.iter_rows()


class _Worker:
    """One process of the pool: opens a file, labels its snapshots, writes its mask."""

    def __init__(self, labeller: Labeller, out: str, config: SegmentConfig):
        self.labeller, self.out, self.config = labeller, Path(out), config
        torch.set_num_threads(1)

    def __call__(self, row: dict) -> dict:
        path = Path(row["path"])
        try:
            snapshots = label_file(path, self.labeller, self.out, self.config)
        except BadInput as bad:
            return {"path": str(path), "snapshots": 0, **Skipped.of(path, bad).row()}
        return {"path": str(path), "snapshots": snapshots, **Skipped(str(path), "", "", "").row()}


def label_file(path: Path, labeller: Labeller, out: Path, config: SegmentConfig) -> int:
    """Writes the mask file of one source; the number of snapshots in it."""
    masks, probabilities = [], []
    with open_source(path) as source:
        source.read_once(masks=False)
        for snapshot in source.snapshots():
            mask, probability = labeller.label(snapshot.fields, snapshot.grid)
            masks.append(mask)
            if config.probabilities and probability is not None:
                probabilities.append(probability)
        axes, times = source.axes, source.times
    write_masks(
        mask_path(out, path), np.stack(masks), axes, times, labeller.name, source=f"{path.name}",
        probabilities=np.stack(probabilities) if probabilities else None, artmip=config.artmip,
    )  # fmt: skip
    return len(masks)


def _note(report: SegmentReport, row: dict) -> None:
    if row["expected"]:
        report.skipped.append(Skipped(row["file"], row["expected"], row["got"], row["remedy"]))
        return
    report.written.append(Path(row["path"]))
    report.snapshots += int(row["snapshots"])


def _check_names(paths: Sequence[Path]) -> None:
    twice = [stem for stem, count in Counter(p.stem for p in paths).items() if count > 1]
    if twice:
        raise BadInput(twice[0], "source files of different names (a mask is named after its source)", "two of this name",
                       "Segment their folders one by one, each with its own --out.")  # fmt: skip


def _claim(out: Path, labeller: Labeller, config: SegmentConfig) -> None:
    """Marks `out` as this labeller's, so that masks of two labellers never mix under a resumed run."""
    out.mkdir(parents=True, exist_ok=True)
    marker = out / MARKER
    claim = {"labeller": labeller.name, "probabilities": config.probabilities, "artmip": config.artmip}
    if marker.exists() and (held := json.loads(marker.read_text())) != claim:
        raise BadInput(out, f"an empty folder or masks of {claim}", held, "Choose another --out, or delete this one.")
    temporary = marker.with_name(f".{MARKER}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(claim))
    temporary.replace(marker)

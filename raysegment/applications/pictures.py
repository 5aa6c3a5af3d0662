"""Pictures from files: one time of a source with the masks that were made of it; how often each class occurs in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raysegment.applications.maps import class_frequency, draw_frequency, draw_map, field_of
from raysegment.applications.tracks import read_tracks
from raysegment.archive.masks import read_masks
from raysegment.archive.snapshots import open_source
from raysegment.climate.checks import BadInput


def draw_files(
    source: str | Path,
    masks: Sequence[str | Path],
    out: str | Path,
    field: str = "TMQ",
    index: int = 0,
    tracks: str | Path | None = None,
    with_truth: bool = False,
) -> Path:
    """Field `field` of time `index` of `source`, a column per mask file (and, `with_truth`, for the labels inside)."""
    with open_source(source) as opened:
        if not 0 <= index < opened.count:
            raise BadInput(source, f"an index from 0 to {opened.count - 1}", index, "Choose a time of the file with --index.")
        snapshot = opened.read(index)
    columns = {}
    for path in masks:
        read = read_masks(path)
        read.check_fits(snapshot.grid, opened.count)
        columns[read.labeller or Path(path).name] = read.masks[index]
    if snapshot.mask is not None and (with_truth or not columns):
        columns["labels inside the file"] = snapshot.mask
    if not columns:
        raise BadInput(source, "masks to draw", "none", "Give --masks FILE…, made by `raysegment segment`.")
    values, label = field_of(snapshot.fields, field)
    storms = read_tracks(tracks, snapshot.time) if tracks else ()
    title = f"{Path(source).name}  {snapshot.time.strftime('%Y-%m-%d %H:%M') if snapshot.time else snapshot.time_label}"
    return draw_map(out, values, snapshot.grid, columns, label, title, storms)


def draw_occurrence(masks: str | Path, out: str | Path) -> Path:
    """How often each class occurs over all maps of a folder of masks, cyclones and rivers side by side."""
    frequency, grid, snapshots = class_frequency(masks)
    return draw_frequency(out, frequency, grid, f"{Path(masks).name}: {snapshots} maps", snapshots)

"""What a path holds: a source file, masks, a shard set, a checkpoint, a run, or a folder of such files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raysegment.archive.axes import Axes
from raysegment.archive.manifest import MANIFEST, Manifest
from raysegment.archive.masks import ARTMIP_SUFFIX, MASK_SUFFIX, Masks, read_masks
from raysegment.archive.netcdf import NetcdfFile
from raysegment.archive.places import Place
from raysegment.archive.shards import open_shards
from raysegment.archive.snapshots import Source, list_sources, open_source
from raysegment.climate.channels import CHANNELS, CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import FACTS, damage, list_checkpoints

_RUN_FILES = ("summary.json", "steps.jsonl", "config.yaml")
_OPENED = 32  # files of a folder that are opened; the rest are counted


def inspect(path: str | Path, check: bool = False) -> dict[str, Any]:
    """What `path` holds, as JSON can hold it; `kind` says which of source, masks, netcdf, shards, checkpoint, run, folder.

    `check` also reads every byte of a shard set. A shard set or a checkpoint may be the URI of one in an object store.
    BadInput when the path is absent, nothing of the kinds, or damaged.
    """
    place = Place.of(path)
    if place.local is None:
        if place.size(FACTS) is not None:
            return {"path": str(place), **_checkpoint(place)}
        held = _shards(place, check)
        return {"path": str(place), "bytes": sum(shard.bytes for shard in Manifest.load(place).shards), **held}
    path = Path(path)
    if not path.exists():
        raise BadInput(path, "a file or a folder", "no such path", "Check the name")
    held = _describer(path, check)(path)
    return {"path": str(path), "bytes": _size(path), **held}


def _describer(path: Path, check: bool) -> Callable[[Path], dict[str, Any]]:
    if path.is_file():
        return _masks if path.name.endswith((MASK_SUFFIX, ARTMIP_SUFFIX)) else _file
    if (path / MANIFEST).exists():
        return lambda folder: _shards(folder, check)
    if (path / FACTS).exists():
        return _checkpoint
    return _run if any((path / name).exists() for name in _RUN_FILES) else _folder


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


# files ------------------------------------------------------------------------------------------------------------


def _file(path: Path) -> dict[str, Any]:
    """A source with all channels; else whatever maps a netCDF file has, and why it is no source."""
    try:
        source = open_source(path)
    except BadInput as error:
        return _other(path, error)
    with source:
        return _source(source)


def _source(source: Source) -> dict[str, Any]:
    held = {
        "kind": "source",
        "layout": source.layout,
        "grid": _grid(source.axes),
        "snapshots": source.count,
        "times": _times(source.time_labels, source.times),
        "labels": _shares(source.read_mask(0)) if source.has_mask else None,
    }
    try:
        fields = source.read(0).fields
    except BadInput as error:
        return {**held, "problem": str(error)}
    origin = source.describe()
    columns = zip(CHANNELS, fields, strict=True)
    return {**held, "channels": {c.name: {"unit": c.unit, "from": origin[c.name], **_range(field)} for c, field in columns}}


def _other(path: Path, problem: BadInput) -> dict[str, Any]:
    """Masks or other maps in a netCDF file that is no source; `problem` again when it is no such file."""
    try:
        with NetcdfFile(path) as file:
            maps = {name: variable for name, variable in file.variables().items() if variable.usable}
            held = {"grid": _grid(file.axes), "snapshots": file.count, "times": _times(file.time_labels, file.times)}
    except BadInput:
        raise problem from None
    try:
        return _masks(path)
    except BadInput:
        found = {name: {"unit": variable.unit, "levels_hpa": variable.levels_hpa} for name, variable in maps.items()}
        return {"kind": "netcdf", **held, "variables": found, "problem": str(problem)}


def _masks(path: Path) -> dict[str, Any]:
    masks = read_masks(path)
    return {
        "kind": "masks",
        "labeller": masks.labeller,
        "grid": _grid(masks.axes),
        "snapshots": len(masks.times),
        "times": _times(masks.time_labels, masks.times),
        "labels": _area(masks),
    }


def _grid(axes: Axes) -> dict[str, Any]:
    grid = axes.grid
    return {
        "rows": grid.shape[0],
        "columns": grid.shape[1],
        "spacing_deg": [round(grid.dlat, 6), round(grid.dlon, 6)],
        "south_north": [float(grid.lat[0]), float(grid.lat[-1])],
        "west_east": [float(grid.lon[0]), float(grid.lon[-1])],
        "periodic": grid.periodic,
        "in_file": {"lat": [float(axes.lat[0]), float(axes.lat[-1])], "lon": [float(axes.lon[0]), float(axes.lon[-1])]},
    }


def _times(labels: tuple[str, ...], times: tuple) -> dict[str, Any]:
    known = next((time for time in times if time is not None), None)
    return {"first": labels[0], "last": labels[-1], "calendar": None if known is None else known.calendar}


def _range(field: np.ndarray) -> dict[str, float]:
    return {"minimum": float(field.min()), "mean": float(field.mean(dtype=np.float64)), "maximum": float(field.max())}


def _shares(mask: np.ndarray) -> dict[str, float]:
    """Share of the cells per class."""
    counts = np.bincount(mask.ravel(), minlength=len(CLASSES))
    return {name: float(count / mask.size) for name, count in zip(CLASSES, counts, strict=True)}


def _area(masks: Masks) -> dict[str, Any]:
    """Share of the cells and of the area per class."""
    weights = np.broadcast_to(masks.grid.area_km2, masks.masks.shape)
    shares = [float(np.average(masks.masks == number, weights=weights)) for number in range(len(CLASSES))]
    return {"cells": _shares(masks.masks), "area": dict(zip(CLASSES, shares, strict=True))}


# folders ----------------------------------------------------------------------------------------------------------


def _shards(path: Path | Place, check: bool) -> dict[str, Any]:
    shards = open_shards(path)
    if check:
        shards.verify()
    held = shards.manifest
    moments = zip(held.units, held.mean, held.std, held.minimum, held.maximum, strict=True)
    names = ("unit", "mean", "std", "minimum", "maximum")
    return {
        "kind": "shards",
        "tiles": held.tiles,
        "tile": list(held.tile),
        "halo": held.halo,
        "snapshots": held.snapshots,
        "shards": len(held.shards),
        "sources": len(held.sources),
        "spacing_deg": list(held.spacing_deg),
        "periodic": held.periodic,
        "labels": held.labels,
        "class_shares": {name: count / sum(held.class_counts) for name, count in zip(CLASSES, held.class_counts, strict=True)},
        "channels": {name: dict(zip(names, values, strict=True)) for name, values in zip(NAMES, moments, strict=True)},
        "checked": check,
    }


def _checkpoint(path: Path | Place) -> dict[str, Any]:
    """The checkpoint's own account, the sizes of its tensors, and whether it is whole."""
    place = Place.of(path)
    facts = _parsed(place.shown(FACTS), place.read(FACTS))
    tensors = {name: _tensors(place, name) for name in place.names() if name.endswith(".safetensors")}
    return {"kind": "checkpoint", **{k: v for k, v in facts.items() if k != "files"}, "tensors": tensors, "problem": damage(path)}


def _tensors(place: Place, name: str) -> dict[str, int]:
    """Number of tensors and of values in a safetensors file, from its header (8 bytes of length, then JSON)."""
    length = int.from_bytes(place.read_range(name, 0, 8), "little")
    try:
        header = json.loads(place.read_range(name, 8, min(8 + length, place.size(name) or 0)))
        shapes = [entry["shape"] for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(place.shown(name), "a safetensors file", error, "Use another checkpoint: this one is damaged") from None
    return {"tensors": len(shapes), "values": sum(math.prod(shape) for shape in shapes)}


def _run(path: Path) -> dict[str, Any]:
    """Configuration, first and last step, events by kind, summary, checkpoints; what is absent is None (a run under way)."""
    steps, events = _lines(path / "steps.jsonl"), _lines(path / "events.jsonl")
    names = [str(event.get("event", event.get("kind", "other"))) for event in events]
    checkpoints = list_checkpoints(path / "checkpoints")
    return {
        "kind": "run",
        "complete": (path / "summary.json").exists(),
        "config": _yaml(path / "config.yaml"),
        "steps": {"logged": len(steps), "first": steps[0], "last": steps[-1]} if steps else None,
        "events": {name: names.count(name) for name in sorted(set(names))},
        "summary": _json(path / "summary.json") if (path / "summary.json").exists() else None,
        "checkpoints": [{"name": checkpoint.name, "problem": damage(checkpoint)} for checkpoint in checkpoints],
    }


def _folder(path: Path) -> dict[str, Any]:
    """An archive: how many files of which kind; the first ones opened, what is wrong with any of them said."""
    masks = sorted(file for file in path.rglob(f"*{MASK_SUFFIX}") if not file.name.startswith("."))
    try:
        sources = list_sources([path])
    except BadInput:
        if not masks:
            raise
        sources = []
    opened = [_brief(file) for file in [*sources[:_OPENED], *masks[:_OPENED]]]
    good = [held for held in opened if held.get("kind") != "unusable"]
    return {
        "kind": "folder",
        "sources": len(sources),
        "masks": len(masks),
        "opened": len(opened),
        "snapshots_in_opened": sum(held["snapshots"] for held in good),
        "first": good[0] if good else None,
        "problems": {held["path"]: held["problem"] for held in opened if held.get("problem")},
    }


def _brief(path: Path) -> dict[str, Any]:
    """A file without the statistics of its fields: header, times, grid."""
    try:
        if path.name.endswith(MASK_SUFFIX):
            return {"path": str(path), **_masks(path)}
        with open_source(path) as source:
            times = _times(source.time_labels, source.times)
            about = {"layout": source.layout, "grid": _grid(source.axes), "labelled": source.has_mask}
            return {"path": str(path), "kind": "source", "snapshots": source.count, "times": times, **about}
    except BadInput as error:
        return {"path": str(path), "kind": "unusable", "problem": str(error)}


def _json(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path, path.read_bytes())
    except OSError as error:
        raise BadInput(path, "a JSON file", error, "The file is damaged; restore it or make it again") from None


def _parsed(where: object, content: bytes) -> dict[str, Any]:
    try:
        held = json.loads(content)
    except ValueError as error:
        raise BadInput(where, "a JSON file", error, "The file is damaged; restore it or make it again") from None
    return held if isinstance(held, dict) else {"content": held}


def _yaml(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(path, "a YAML file", error, "The file is damaged; restore it or make it again") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and line.strip()]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise BadInput(path, "one JSON object per line", error, "The file is damaged; restore it") from None

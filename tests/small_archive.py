"""A small archive of plausible numbers (no weather), quick to write and different in every cell."""

from __future__ import annotations

from pathlib import Path

import cftime
import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.archive.manifest import Manifest
from raysegment.archive.shards import TileId, write_shard
from raysegment.archive.snapshots import write_climatenet
from raysegment.climate.channels import CHANNELS
from raysegment.climate.grid import Grid


def fields_and_mask(seed: int, height: int = 16, width: int = 32) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Fields (16, H, W) around each channel's reference; mask (H, W): a class that can be told from the fields."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(len(CHANNELS), height, width))
    noise[0] += np.cumsum(np.ones(height))[:, None] / height  # no two rows alike
    mask = np.zeros((height, width), np.uint8)
    row, column = int(random.integers(0, height - 4)), int(random.integers(0, width - 4))
    mask[row : row + 4, column : column + 4] = 1
    mask[(row + 8) % height, :] = 2
    noise[7][mask == 1] -= 6.0
    noise[0][mask == 2] += 6.0
    fields = np.stack([channel.reference + 0.3 * channel.scale * noise[k] for k, channel in enumerate(CHANNELS)])
    low = np.array([channel.minimum for channel in CHANNELS])[:, None, None]
    high = np.array([channel.maximum for channel in CHANNELS])[:, None, None]
    return np.clip(fields, 0.999 * low + 0.001 * high, 0.001 * low + 0.999 * high).astype(np.float32), mask


def write_archive(folder: Path, files: int, height: int = 16, width: int = 32, labels: bool = True) -> list[Path]:
    """`files` ClimateNet files of one snapshot each, a day apart."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(files):
        fields, mask = fields_and_mask(number, height, width)
        time = cftime.DatetimeNoLeap(2000, 1 + number // 28, 1 + number % 28)
        paths.append(folder / f"data-2000-{1 + number // 28:02d}-{1 + number % 28:02d}-00-1.nc")
        write_climatenet(paths[-1], fields, Grid.global_(height, width), mask if labels else None, time)
    return paths


def write_with_labellers(path: Path, maps: NDArray, seed: int = 0) -> Path:
    """A ClimateNet file whose LABELS hold the maps `(labellers, H, W)` of several people."""
    height, width = maps.shape[1:]
    time = cftime.DatetimeNoLeap(2000, 1, 1 + seed)
    write_climatenet(path, fields_and_mask(seed, height, width)[0], Grid.global_(height, width), None, time)
    with netCDF4.Dataset(path, "a") as data:
        data.createDimension("labeller", len(maps))
        data.createVariable("LABELS", "i8", ("labeller", "lat", "lon"))[:] = maps
    return path


def write_shards_of_one(folder: Path, tiles: int) -> Path:
    """A shard set of `tiles` shards, one tile each."""
    rows = [(*fields_and_mask(tile), TileId(f"{tile}.nc", 0, "", 0, 0)) for tile in range(tiles)]
    parts = [write_shard(folder / f"part-{number:05d}.arrow", [row]) for number, row in enumerate(rows)]
    Manifest.of(parts, (16, 32), Grid.global_(16, 32), "test").save(folder)
    return folder

"""Plain memory maps of two .npy files, each tile copied into a fresh tensor: the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raysegment.archive.shards import open_shards


def write(source: Path, folder: Path) -> None:
    shards = open_shards(source)
    first = shards.tile(0)
    fields = np.lib.format.open_memmap(folder / "fields.npy", "w+", first.fields.dtype, (len(shards), *first.fields.shape))
    mask = np.lib.format.open_memmap(folder / "mask.npy", "w+", first.mask.dtype, (len(shards), *first.mask.shape))
    for number, tile in enumerate(shards):
        fields[number], mask[number] = tile.fields, tile.mask


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    fields, mask = (np.load(folder / name, mmap_mode="r") for name in ("fields.npy", "mask.npy"))
    share = range(rank, len(mask), world)
    return lambda: ((torch.from_numpy(np.array(fields[i])), torch.from_numpy(np.array(mask[i]))) for i in share)

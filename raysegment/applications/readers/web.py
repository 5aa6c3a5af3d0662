"""WebDataset: tar files of .npy members, decoded by the library in the consumer's own process."""

# The library lists its names in no way that the checker reads.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset  # pyright: ignore[reportMissingImports]
from torch import Tensor

from raysegment.archive.shards import open_shards

SHARDS = 8
PROCESSES = 0  # in the consumer's own process: with workers every tile is copied once more, through shared memory


def write(source: Path, folder: Path) -> None:
    shards = open_shards(source)
    for shard in range(min(SHARDS, len(shards))):
        with webdataset.TarWriter(str(folder / f"part-{shard:02d}.tar")) as writer:
            for number in range(shard, len(shards), SHARDS):
                tile = shards.tile(number)
                writer.write({"__key__": f"{number:05d}", "fields.npy": tile.fields, "mask.npy": tile.mask})


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    paths = [str(path) for path in sorted(folder.glob("*.tar"))[rank::world]]
    samples = webdataset.WebDataset(paths, shardshuffle=False, nodesplitter=None).decode().to_tuple("fields.npy", "mask.npy")
    samples = samples.map(_tensors)
    workers = min(PROCESSES, len(paths))
    loader = webdataset.WebLoader(samples, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: iter(loader)


def _tensors(arrays: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)

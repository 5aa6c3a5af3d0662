"""litData: chunks written by `optimize`, read from a local folder by `StreamingDataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from raysegment.applications.readers.group import join
from raysegment.archive.shards import open_shards

PROCESSES = 0  # in the consumer's own process: with workers every tile is copied once more, through shared memory
CHUNK_TILES = 2


def write(source: Path, folder: Path) -> None:
    numbers = list(range(len(open_shards(source))))
    litdata.optimize(partial(_sample, source), numbers, str(folder), chunk_size=CHUNK_TILES, num_workers=1, verbose=False)


def _sample(source: Path, number: int) -> dict[str, Any]:
    tile = open_shards(source).tile(number)
    return {"fields": tile.fields, "mask": tile.mask}


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    join(folder, rank, world)
    samples = litdata.StreamingDataset(str(folder), shuffle=False, drop_last=False)
    keep = PROCESSES > 0
    loader = litdata.StreamingDataLoader(samples, batch_size=1, num_workers=PROCESSES, persistent_workers=keep)
    return lambda: ((torch.as_tensor(batch["fields"]), torch.as_tensor(batch["mask"])) for batch in loader)

"""Ray Data's own `read_parquet` of tensor columns, batches of one tile by `iter_torch_batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data.extensions import ArrowTensorArray
from torch import Tensor

from raysegment.archive.shards import open_shards
from raysegment.feed.session import ensure_ray

FILES = 8
AHEAD = 2


def write(source: Path, folder: Path) -> None:
    shards = open_shards(source)
    for part in range(min(FILES, len(shards))):
        tiles = [shards.tile(number) for number in range(part, len(shards), FILES)]
        columns = {
            "fields": ArrowTensorArray.from_numpy(np.stack([tile.fields for tile in tiles])),
            "mask": ArrowTensorArray.from_numpy(np.stack([tile.mask for tile in tiles])),
        }
        pq.write_table(
            pa.table(columns), folder / f"part-{part:02d}.parquet", row_group_size=1, compression="none", use_dictionary=False
        )


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    ensure_ray()
    tiles = ray.data.read_parquet([str(path) for path in sorted(folder.glob("*.parquet"))[rank::world]])
    batches = lambda: tiles.iter_torch_batches(batch_size=1, prefetch_batches=AHEAD)
    return lambda: ((batch["fields"], batch["mask"]) for batch in batches())

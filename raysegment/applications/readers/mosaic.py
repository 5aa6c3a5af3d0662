"""MosaicML Streaming: MDS files read from a local folder by `StreamingDataset`.

The library wants another numpy, another torch and torchvision, so it is in no extra of ours; it works beside ours with
`pip install --no-deps mosaicml-streaming` and what it imports: Brotli, python-snappy, cramjam, xxhash<4, zstd<2, catalogue,
transformers<5, tokenizers<0.23, huggingface-hub<1 and a torchvision built for the installed torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import streaming  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from raysegment.applications.readers.group import join
from raysegment.archive.shards import open_shards

PROCESSES = 0  # in the consumer's own process: with workers every tile is copied once more, through shared memory


def write(source: Path, folder: Path) -> None:
    shards = open_shards(source)
    sizes = [",".join(map(str, array.shape)) for array in (shards.tile(0).fields, shards.tile(0).mask)]
    columns = {"fields": f"ndarray:float16:{sizes[0]}", "mask": f"ndarray:uint8:{sizes[1]}"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for tile in shards:
            writer.write({"fields": tile.fields, "mask": tile.mask})


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    join(folder, rank, world)
    samples = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=False, batch_size=1, num_canonical_nodes=1)
    loader = DataLoader(samples, batch_size=None, num_workers=PROCESSES, persistent_workers=PROCESSES > 0)
    return lambda: ((torch.as_tensor(sample["fields"]), torch.as_tensor(sample["mask"])) for sample in loader)

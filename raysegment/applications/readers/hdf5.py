"""HDF5, a file per sample, read by four DataLoader processes: MLPerf DeepCAM's way.

DeepCAM's own files hold float32 with the channels last; these hold the same float16 tiles as every other format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raysegment.archive.shards import open_shards

PROCESSES = 4


class Samples(Dataset):
    """A sample per file, opened when it is asked for, as DeepCAM's `CamDataset` does."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with h5py.File(self._paths[index], "r") as file:
            return torch.from_numpy(_whole(file, "climate/data")), torch.from_numpy(_whole(file, "climate/labels_0"))


def _whole(file: h5py.File, name: str) -> np.ndarray:
    dataset = file[name]
    assert isinstance(dataset, h5py.Dataset)
    return dataset[...]


def write(source: Path, folder: Path) -> None:
    for number, tile in enumerate(open_shards(source)):
        with h5py.File(folder / f"data-{number:05d}.h5", "w") as file:
            file["climate/data"] = tile.fields
            file["climate/labels_0"] = tile.mask


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    samples = Samples(sorted(folder.glob("*.h5"))[rank::world])
    loader = DataLoader(samples, batch_size=None, num_workers=PROCESSES, persistent_workers=True)
    return lambda: iter(loader)

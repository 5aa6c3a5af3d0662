"""The plain memory maps again, copied into one tensor that is used for every tile: what copying alone costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raysegment.applications.readers import mmap

write = mmap.write


def passes(folder: Path, rank: int, world: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    arrays = [np.load(folder / name, mmap_mode="r") for name in ("fields.npy", "mask.npy")]
    buffers = [np.empty_like(array[0]) for array in arrays]
    fields, mask = (torch.from_numpy(buffer) for buffer in buffers)

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(rank, len(arrays[0]), world):
            for buffer, array in zip(buffers, arrays, strict=True):
                buffer[...] = array[number]
            yield fields, mask

    return one_pass

"""Steps read in place, when they are asked for: the shortest way, and the oracle of every other one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raysegment.archive.shards import ShardSet
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.feed.gather import gather
from raysegment.feed.order import Order

# Micro-batches may be views of shared, read-only memory; MicroBatch says so, torch need not say it again.
warnings.filterwarnings("ignore", message="The given NumPy array is not writ")


def micro_batch(positions: Sequence[int], fields: NDArray[np.float16], mask: NDArray[np.uint8]) -> MicroBatch:
    """Arrays as tensors, without a copy."""
    return MicroBatch(torch.tensor(positions, dtype=torch.int64), torch.from_numpy(fields), torch.from_numpy(mask))


def direct_steps(
    shards: ShardSet, order: Order, first_step: int, last_step: int, rank: int = 0, world_size: int = 1
) -> Iterator[StepInput]:
    """`rank`'s share of every step in [first_step, last_step), read when it is asked for."""
    assert order.tiles == len(shards), (order.tiles, len(shards))
    for step in range(first_step, last_step):
        started = time.perf_counter()
        batches = [micro_batch(p, *gather(shards, order, p)) for p in order.micro_batches(step, rank, world_size)]
        yield StepInput(step, batches, time.perf_counter() - started)

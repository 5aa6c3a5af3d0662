"""What reaches a training step: micro-batches of tiles that carry their positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """The tiles of m consecutive positions.

    positions (m,) int64; fields (m, 16, h, w) float16 of (x − reference) / scale; mask (m, h, w) uint8.
    usable (m,) bool, None where all are: False marks a position whose tile is damaged. Its rows of fields and mask hold
    zeros in the place of data; no other tile takes its turn, so that all other positions keep theirs.
    The tensors may lie in memory shared with other processes: never write into them.
    """

    positions: Tensor
    fields: Tensor
    mask: Tensor
    usable: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.positions) == len(self.fields) == len(self.mask), (self.positions.shape, self.fields.shape)
        if self.usable is not None:
            assert self.usable.shape == self.positions.shape, (self.usable.shape, self.positions.shape)
            assert self.usable.dtype == torch.bool, self.usable.dtype

    @property
    def used(self) -> int:
        """How many of the tiles are usable."""
        return len(self.positions) if self.usable is None else int(self.usable.sum())

    def only_usable(self) -> MicroBatch:
        """The usable tiles with their positions, as copies; itself where all are."""
        if self.usable is None or self.used == len(self.positions):
            return self
        return MicroBatch(self.positions[self.usable], self.fields[self.usable], self.mask[self.usable])


@dataclass(frozen=True)
class StepInput:
    """One worker's share of one step, and the seconds it waited for it."""

    step: int
    micro_batches: list[MicroBatch]
    load_s: float = 0.0

    @property
    def samples(self) -> int:
        """How many positions the share has, with a usable tile or without."""
        return sum(len(batch.positions) for batch in self.micro_batches)

"""What reaches a training step: micro-batches of tiles that carry their positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """The tiles of m consecutive positions.

    positions (m,) int64; fields (m, 16, h, w) float16 of (x − reference) / scale; mask (m, h, w) uint8.
    The tensors may lie in memory shared with other processes: never write into them.
    """

    positions: Tensor
    fields: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        assert len(self.positions) == len(self.fields) == len(self.mask), (self.positions.shape, self.fields.shape)


@dataclass(frozen=True)
class StepInput:
    """One worker's share of one step, and the seconds it waited for it."""

    step: int
    micro_batches: list[MicroBatch]
    load_s: float = 0.0

    @property
    def samples(self) -> int:
        return sum(len(batch.positions) for batch in self.micro_batches)

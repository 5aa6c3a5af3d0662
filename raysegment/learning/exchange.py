"""The one conversation of a step: what every member computed becomes what all members know.

First a short message (`Head`, one all-reduced int64 vector): the positions consumed, the loss, whether anybody met a
number that is not finite, and how large the largest values are. Then, unless the step is to be skipped, the long one:
gradients and batch-norm statistics, each a sum over the micro-batches of the whole step.

`exact`: each micro-batch's contribution x is rounded to the integer x·2^k, and integers are summed. Integer sums know
neither order nor grouping, so the result is the same bits whoever computed what, in a world of any size. k follows from
the largest exponent e in the world: with V micro-batches and 32-bit integers, 2^k = 2^(30 − ⌈log2 V⌉ − e), which cannot
overflow; values below 2^-30·V of the largest are lost. `exact64` has 32 bits more, and twice the traffic.
`fast`: floating-point sums as they come; one all-reduce of what each member has already added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

MODES = ("exact", "exact64", "fast")
_LOSS_BITS = 24  # the loss travels as an integer multiple of 2^-24
_EXPONENTS = 320  # float32 has exponents from −148 to 128; slot = exponent + 160
_ZERO = 160
_SUMS = 5  # positions, samples, loss, not finite, signals


class OutOfOrder(RuntimeError):
    """The members of a step did not consume exactly the positions of that step."""


class World(Protocol):
    """Whoever computes this step together; `all_reduce` sums a tensor over them, in place."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, tensor: Tensor) -> None: ...


@dataclass(frozen=True)
class Solo:
    """A world of one."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> None:
        """Nothing to add."""


@dataclass(frozen=True)
class Distributed:
    """The members of a torch.distributed process group (the default one unless given)."""

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)


@dataclass(frozen=True)
class Head:
    """What all members know of a step after the short message; equal everywhere."""

    samples: int
    position_sum: int  # Σ (position − cursor)
    loss: float  # mean over the samples of the world
    finite: bool
    signals: int  # Σ of what the members wished to say
    exponents: tuple[int, ...]  # of the largest magnitude in each vector; −160 where all are zero

    def check_order(self, global_batch: int) -> None:
        """Raise unless the positions cursor … cursor + G − 1 were consumed: Σ (position − cursor) = G(G − 1)/2."""
        expected = global_batch * (global_batch - 1) // 2
        if (self.samples, self.position_sum) != (global_batch, expected):
            raise OutOfOrder(
                f"expected {global_batch} samples with positions summing to {expected} from the cursor, "
                f"got {self.samples} summing to {self.position_sum}"
            )


@dataclass
class Tally:
    """What one member has to say in the short message, counted as its micro-batches finish."""

    position_sum: int = 0
    samples: int = 0
    loss_sum: int = 0  # per sample, in units of 2^-24
    unusable: int = 0
    signal: int = 0

    def count(self, offsets: Sequence[int], loss: float) -> None:
        """A micro-batch: positions relative to the cursor, and its mean loss."""
        self.position_sum += sum(offsets)
        self.samples += len(offsets)
        if math.isfinite(loss):
            self.loss_sum += round(loss * len(offsets) * 2**_LOSS_BITS)
        else:
            self.unusable += 1


def exponent(values: Tensor) -> int | None:
    """e with 2^(e−1) ≤ max |x| < 2^e, −160 when all are zero, None when one is not finite."""
    largest = float(torch.linalg.vector_norm(values, math.inf)) if values.numel() else 0.0
    if not math.isfinite(largest):
        return None
    return math.frexp(largest)[1] if largest else -_ZERO


class Exchange:
    """The conversation of one step over a world, in one of the modes; keeps no state between steps.

    A member calls `add` for each of its micro-batches with one vector per kind (gradients, statistics), and `finish`
    once. Every member of the world must finish, also one without a micro-batch.
    """

    def __init__(self, world: World, mode: str, micro_batches: int, like: Sequence[Tensor], signal: int = 0):
        assert mode in MODES, mode
        self.world, self.mode, self.micro_batches = world, mode, micro_batches
        self.like, self.tally = list(like), Tally(signal=signal)
        self._rows: list[list[Tensor]] = []
        self._tops = [-_ZERO] * len(self.like)

    def add(self, vectors: Sequence[Tensor], offsets: Sequence[int], loss: float) -> None:
        """Keep copies of one micro-batch's contributions (or, in mode fast, add them up)."""
        self.tally.count(offsets, loss)
        tops = [exponent(vector) for vector in vectors]
        if any(top is None for top in tops):
            self.tally.unusable += 1
            return
        self._tops = [max(a, b) for a, b in zip(self._tops, tops, strict=True)]  # type: ignore[type-var]
        if self.mode == "fast" and self._rows:
            for kept, vector in zip(self._rows[0], vectors, strict=True):
                kept += vector
        else:
            self._rows.append([vector.clone() for vector in vectors])

    def head(self) -> Head:
        """The short message: one all-reduce."""
        mine = torch.zeros(_SUMS + _EXPONENTS * len(self.like), dtype=torch.int64)
        tally = self.tally
        mine[:_SUMS] = torch.tensor([tally.position_sum, tally.samples, tally.loss_sum, tally.unusable, tally.signal])
        marks = mine[_SUMS:].view(len(self.like), _EXPONENTS)
        for row, top in zip(marks, self._tops, strict=True):
            row[top + _ZERO] = 1
        everyone = mine.to(self.like[0].device)
        self.world.all_reduce(everyone)
        position_sum, samples, loss_sum, unusable, signals = everyone[:_SUMS].tolist()
        marks = everyone[_SUMS:].view(len(self.like), _EXPONENTS)
        tops = tuple(int(row.nonzero().max()) - _ZERO for row in marks)
        loss = loss_sum / 2**_LOSS_BITS / max(samples, 1)
        return Head(samples, position_sum, loss if not unusable else math.nan, not unusable, signals, tops)

    def body(self, head: Head) -> list[Tensor]:
        """The long message: the sum of each kind of vector over all micro-batches of the step, float32; one all-reduce."""
        assert head.finite, "a step with numbers that are not finite is skipped, not summed"
        return self._fast() if self.mode == "fast" else self._exact(head.exponents)

    def _fast(self) -> list[Tensor]:
        rows = self._rows[0] if self._rows else [torch.zeros_like(vector) for vector in self.like]
        if self.world.size == 1:
            return rows
        buffer = torch.cat(rows)
        self.world.all_reduce(buffer)
        return list(buffer.split([vector.numel() for vector in self.like]))

    def _exact(self, exponents: Sequence[int]) -> list[Tensor]:
        wide = self.mode == "exact64"
        integer, real = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
        bits = (62 if wide else 30) - (self.micro_batches - 1).bit_length()
        sizes = [vector.numel() for vector in self.like]
        total = torch.zeros(sum(sizes), dtype=integer, device=self.like[0].device)
        shifts = [_shift(bits - top, real) for top in exponents]
        parts = total.split(sizes)
        for row in self._rows:
            for part, vector, shift in zip(parts, row, shifts, strict=True):
                part += vector.to(real).mul_(2.0**shift).round_().to(integer)
        self.world.all_reduce(total)
        return [part.to(real).mul_(2.0**-shift).to(torch.float32) for part, shift in zip(parts, shifts, strict=True)]


def _shift(k: int, real: torch.dtype) -> int:
    """k, or the nearest at which 2^k and 2^-k are both normal numbers of the type (nothing that small matters)."""
    return max(-120, min(120, k)) if real == torch.float32 else max(-1000, min(1000, k))

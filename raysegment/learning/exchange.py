"""The one conversation of a step: what every member computed becomes what all members know.

First a short message (`Head`, one all-reduced int64 vector): the positions consumed and the tiles among them that were
usable, the loss, whether anybody met a number that is not finite, and how large the largest values are. Then, unless the
step is to be skipped, the long one: gradients and batch-norm statistics, each a sum over the micro-batches of the whole
step, in which a micro-batch of m positions with u usable tiles weighs u/m. (The sum divided by Σ u/m is then the mean over
usable tiles.) The weight enters before anything else is done with a contribution: it is part of x and e below, and belongs
to the micro-batch, not to whoever computed it.

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
_SUMS = 6  # sum of positions, positions, usable tiles, loss, not finite, signals


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

    positions: int
    position_sum: int  # Σ (position − cursor)
    used: int  # positions whose tile was usable
    loss: float  # mean over the usable tiles of the world; not a number without any
    finite: bool
    signals: int  # Σ of what the members wished to say
    exponents: tuple[int, ...]  # of the largest magnitude in each vector; −160 where all are zero

    @property
    def summable(self) -> bool:
        """Whether there is something to learn from; if not, the step is skipped and there is no long message."""
        return self.finite and self.used > 0

    def check_order(self, global_batch: int) -> None:
        """Raise unless the positions cursor … cursor + G − 1 were consumed: Σ (position − cursor) = G(G − 1)/2.

        A position whose tile is damaged is consumed like any other.
        """
        expected = global_batch * (global_batch - 1) // 2
        if (self.positions, self.position_sum) != (global_batch, expected):
            raise OutOfOrder(
                f"expected {global_batch} samples with positions summing to {expected} from the cursor, "
                f"got {self.positions} summing to {self.position_sum}"
            )


@dataclass
class Tally:
    """What one member has to say in the short message, counted as its micro-batches finish."""

    position_sum: int = 0
    positions: int = 0
    used: int = 0
    loss_sum: int = 0  # per usable tile, in units of 2^-24
    not_finite: int = 0
    signal: int = 0

    def count(self, offsets: Sequence[int], used: int, loss: float) -> None:
        """A micro-batch: positions relative to the cursor, how many tiles were usable, and the mean loss of these."""
        self.position_sum += sum(offsets)
        self.positions += len(offsets)
        self.used += used
        if math.isfinite(loss):
            self.loss_sum += round(loss * used * 2**_LOSS_BITS)
        else:
            self.not_finite += 1

    def sums(self) -> list[int]:
        """What is added up over the members."""
        return [self.position_sum, self.positions, self.used, self.loss_sum, self.not_finite, self.signal]


def exponent(values: Tensor) -> int | None:
    """e with 2^(e−1) ≤ max |x| < 2^e, −160 when all are zero, None when one is not finite."""
    largest = float(torch.linalg.vector_norm(values, math.inf)) if values.numel() else 0.0
    if not math.isfinite(largest):
        return None
    return math.frexp(largest)[1] if largest else -_ZERO


class Exchange:
    """The conversation of one step over a world, in one of the modes; keeps no state between steps.

    A member calls `add` for each of its micro-batches with one vector per kind (gradients, statistics), or `pass_over`
    for one without a usable tile; then `head` and, if that is summable, `body`. So must every member of the world, also one
    without a micro-batch.
    """

    def __init__(self, world: World, mode: str, micro_batches: int, like: Sequence[Tensor], signal: int = 0):
        assert mode in MODES, mode
        self.world, self.mode, self.micro_batches = world, mode, micro_batches
        self.like, self.tally = list(like), Tally(signal=signal)
        self._rows: list[list[Tensor]] = []
        self._tops = [-_ZERO] * len(self.like)

    def add(self, vectors: Sequence[Tensor], offsets: Sequence[int], loss: float, used: int | None = None) -> None:
        """Keep copies of one micro-batch's contributions (or, in mode fast, add them up).

        Vectors and loss are means over its usable tiles: `used` of its positions, all unless given.
        """
        used = len(offsets) if used is None else used
        self.tally.count(offsets, used, loss)
        if used < len(offsets):
            vectors = [vector * (used / len(offsets)) for vector in vectors]
        tops = [exponent(vector) for vector in vectors]
        if any(top is None for top in tops):
            self.tally.not_finite += 1
            return
        self._tops = [max(a, b) for a, b in zip(self._tops, tops, strict=True)]  # type: ignore[type-var]
        if self.mode == "fast" and self._rows:
            for kept, vector in zip(self._rows[0], vectors, strict=True):
                kept += vector
        else:
            self._rows.append([vector.clone() for vector in vectors])

    def pass_over(self, offsets: Sequence[int]) -> None:
        """Count the positions of a micro-batch without a usable tile: it is consumed, and contributes nothing."""
        self.tally.count(offsets, 0, 0.0)

    def head(self) -> Head:
        """The short message: one all-reduce."""
        mine = torch.zeros(_SUMS + _EXPONENTS * len(self.like), dtype=torch.int64)
        mine[:_SUMS] = torch.tensor(self.tally.sums())
        marks = mine[_SUMS:].view(len(self.like), _EXPONENTS)
        for row, top in zip(marks, self._tops, strict=True):
            row[top + _ZERO] = 1
        everyone = mine.to(self.like[0].device)
        self.world.all_reduce(everyone)
        position_sum, positions, used, loss_sum, not_finite, signals = everyone[:_SUMS].tolist()
        marks = everyone[_SUMS:].view(len(self.like), _EXPONENTS)
        tops = tuple(int(row.nonzero().max()) - _ZERO for row in marks)
        loss = loss_sum / 2**_LOSS_BITS / used if used and not not_finite else math.nan
        return Head(positions, position_sum, used, loss, not not_finite, signals, tops)

    def body(self, head: Head) -> list[Tensor]:
        """The long message: Σ u/m · vector over all micro-batches of the step, of each kind, float32; one all-reduce."""
        assert head.summable, "a step with numbers that are not finite, or with none at all, is skipped, not summed"
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

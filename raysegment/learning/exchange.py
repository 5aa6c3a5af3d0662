"""The one conversation of a step: what every member computed becomes what all members know.

Each micro-batch contributes two vectors, gradients and batch-norm statistics; a step needs their sums over all micro-batches
of the world, in which one of m positions with u usable tiles weighs u/m. (The sum divided by Σ u/m is then the mean over
usable tiles.) The weight enters before anything else is done with a contribution, and belongs to the micro-batch, not to
whoever computed it. The vectors travel in buckets (`buckets.py`), each of which may leave while backward still computes the
next. A short message (`Head`) carries the positions consumed, the tiles among them that were usable, and the loss.

`exact`: each contribution x is rounded to the integer x·2^k, and integers are summed. Integer sums know neither order nor
grouping, so the result is the same bits whoever computed what, in a world of any size. k follows from the largest |x| in
the world, agreed by a maximum over the members before anything is rounded, for each segment of a bucket: with 2^(e−1) ≤ max
|x| < 2^e and V micro-batches, 32-bit integers have k = 30 − ⌈log2 V⌉ − e, which cannot overflow; values below 2^-30·V of
the largest are lost. `exact64` has 32 bits more, and twice the traffic.
`fast`: floating-point sums as they come, of what each member has already added up; gradients as bfloat16 if so wished.

The collectives of a step, the same on every member whatever its share, also where it has none (B buckets):

    exact, leaving in turn     MAX 0, MAX 1, MAX 2, SUM 0, MAX 3, SUM 1, …, MAX B−1, SUM B−3, HEAD, SUM B−2, SUM B−1
    exact, leaving together    MAX of all, HEAD, SUM 0 … SUM B−1
    fast                       SUM 0 … SUM B−1, HEAD

In turn, a maximum is under way for as long as backward takes over two more buckets. Numbers that are not finite show in the
maxima (fast: in the sums) and in the head, everywhere alike; the collectives go on, and the step is then skipped.

Nothing is computed on the host and nothing fetched from the device before `finish`, and there once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from raysegment.learning.buckets import GRADIENTS, Bucket, Segment, apart

MODES = ("exact", "exact64", "fast")
WIRES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LOSS_BITS = 24  # the loss travels as an integer multiple of 2^-24
_MOST_LOSS = 2.0**18  # told of a larger one: the sum over fewer than 2^21 tiles stays within 63 bits
_NOT_FINITE = 0x7F800000  # float32 infinity as an integer; not-a-numbers are above it
_CHUNK = 1 << 17  # values that are rounded at a time on CPUs: they stay in cache from one operation to the next
_BEHIND = 2  # buckets that are asked about before the first of them is rounded: waiting for less would make members wait
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class OutOfOrder(RuntimeError):
    """The members of a step did not consume exactly the positions of that step."""


class Interrupted(RuntimeError):
    """The group changed while a collective was under way: what it was to bring will not come."""


class Work(Protocol):
    """A collective under way; `wait` returns when the tensor holds the result (on GPUs: for what is computed next)."""

    def wait(self) -> object: ...


class World(Protocol):
    """Whoever computes this step together. Reductions are in place, over all members, "sum" or "max".

    All three calls raise `Interrupted` if the group changes. The tensor is then nobody's: it may be partly reduced, and an
    aborted collective may still write into it, so whoever goes on takes new ones.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None: ...
    def start_all_reduce(self, tensor: Tensor, op: str = "sum") -> Work: ...


@dataclass(frozen=True)
class Done:
    """Work that is done."""

    def wait(self) -> None:
        """At once."""


@dataclass(frozen=True)
class Solo:
    """A world of one."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None:
        """Nothing to add."""

    def start_all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        return Done()


@dataclass(frozen=True)
class Distributed:
    """The members of a torch.distributed process group (the default one unless given), which never changes."""

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None:
        dist.all_reduce(tensor, _OPERATIONS[op], self.group)

    def start_all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        work = dist.all_reduce(tensor, _OPERATIONS[op], self.group, async_op=True)
        return work if work is not None else Done()


@dataclass(frozen=True)
class Head:
    """What all members know of a step after the exchange; equal everywhere."""

    positions: int
    position_sum: int  # Σ (position − cursor)
    used: int  # positions whose tile was usable
    loss: float  # mean over the usable tiles of the world, each told as 2^18 at most; not a number without any
    finite: bool
    signals: int  # Σ of what the members wished to say, 64 bits

    @property
    def summable(self) -> bool:
        """Whether there is something to learn from; if not, the step is skipped."""
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


class Tally:
    """What one member has to say in the short message, counted as its micro-batches finish."""

    def __init__(self, signal: int = 0):
        self.position_sum = self.positions = self.used = 0
        self.signal = signal
        self.losses: list[tuple[Tensor, int]] = []  # as they are on the device, with the tiles they are means of

    def count(self, offsets: Sequence[int], used: int, loss: Tensor | None) -> None:
        """A micro-batch: positions relative to the cursor, how many tiles were usable, and the mean loss of these."""
        self.position_sum += sum(offsets)
        self.positions += len(offsets)
        self.used += used
        if loss is not None:
            self.losses.append((loss.detach(), used))

    def message(self, device: torch.device) -> Tensor:
        """What is added up over the members: five counts and Σ loss · tiles in units of 2^-24, (6,) int64.

        A finite loss counts as `_MOST_LOSS` at most; beyond 63 bits it would become any number, 0 for one.
        """
        counts = torch.tensor([self.position_sum, self.positions, self.used, self.signal, 0, 0], dtype=torch.int64)
        message = counts.to(device)
        for loss, used in self.losses:
            fine = torch.isfinite(loss)
            message[4] += ~fine
            told = loss.double().clamp(-_MOST_LOSS, _MOST_LOSS) * (used * 2**_LOSS_BITS)
            message[5] += torch.where(fine, told, 0.0).round_().to(torch.int64)
        return message


@dataclass(frozen=True)
class Terms:
    """What the members agree on beforehand. `micro_batches` of the whole step, of `micro_batch` positions each."""

    mode: str
    micro_batches: int
    micro_batch: int
    wire: str = "fp32"  # type of gradients in mode fast

    def __post_init__(self) -> None:
        assert self.mode in MODES, self.mode
        assert self.wire in WIRES, self.wire
        assert self.wire == "fp32" or self.mode == "fast", self

    @property
    def exact(self) -> bool:
        return self.mode != "fast"


@dataclass(frozen=True)
class Scale:
    """2^k and 2^-k for each segment, as tensors on the device, and the integer type that sums of x·2^k fit in."""

    up: Tensor
    down: Tensor
    integer: torch.dtype

    @staticmethod
    def of(tops: Tensor, terms: Terms) -> Scale:
        """From the bits (int32) of the largest magnitudes; built from bits again, since not every device's pow is exact.

        k is kept where 2^k and 2^-k/Σ u/m are normal numbers: nothing below 2^-70 matters.
        """
        e, spare = (tops >> 23) - 126, (terms.micro_batches - 1).bit_length()
        if terms.mode == "exact64":
            k = (62 - spare - e).to(torch.int64)
            up, down = (((sign * k + 1023) << 52).view(torch.float64) for sign in (1, -1))
            return Scale(up, down, torch.int64)
        k = (30 - spare - e).clamp(-120, 100)
        up, down = (((sign * k + 127) << 23).view(torch.float32) for sign in (1, -1))
        return Scale(up, down, torch.int32)


class Exchange:
    """The conversation of one step over a world; all its messages are its own tensors, so a lost one leaves nothing behind.

    A member calls `add` for each of its micro-batches, or `pass_over` for one without a usable tile. With `follow` in
    place of `add`, before the backward of its last micro-batch, and `ready` as parameters get their gradients, buckets leave
    as they are ready. `start` lets everything else go at once without waiting for anything, `advance` goes as far as that
    takes no more than the agreement on scales, and `finish` takes what is left, and waits. A member may leave out `follow`,
    but all members call `start`, or none does.
    """

    def __init__(self, world: World, terms: Terms, cut: Sequence[Bucket], device: torch.device, signal: int = 0):
        self.world, self.terms, self.device, self.tally = world, terms, device, Tally(signal)
        self.cut = apart(cut) if terms.wire != "fp32" else tuple(cut)
        self.seconds = 0.0  # that the host has spent here so far
        self._rows: list[list[Tensor]] = []
        self._factors: tuple[float, float] | None = None  # of the last row, which is weighed bucket by bucket
        self._missing = [len(bucket.parameters) for bucket in self.cut]
        self._bucket_of = {index: b for b, bucket in enumerate(self.cut) for index in bucket.parameters}
        counts = [len(bucket.segments) for bucket in self.cut]
        self._tops = torch.zeros(sum(counts), dtype=torch.int32, device=device)
        self._top_of = list(self._tops.split(counts))
        self._buffers: list[Tensor] = []
        self._scales: list[Scale] = []
        self._agreements: dict[int, Work] = {}
        self._works: list[Work] = []
        self._head: Tensor | None = None
        self._offered = 0

    # ------------------------------------------------------------ contributions

    def add(
        self, vectors: Sequence[Tensor], offsets: Sequence[int], loss: Tensor, used: int | None = None, scale: float = 1.0
    ) -> None:
        """Keep copies of one micro-batch's gradients (times `scale`) and statistics, or, in mode fast, add them up.

        Vectors and loss are means over its usable tiles: `used` of its positions, all unless given.
        """
        with self._clock():
            used = len(offsets) if used is None else used
            self.tally.count(offsets, used, loss)
            row = [vector.clone() for vector in vectors]
            _weigh(row[0], scale, used / len(offsets))
            _weigh(row[1], 1.0, used / len(offsets))
            if self.terms.exact or not self._rows:
                self._rows.append(row)
            else:
                for kept, vector in zip(self._rows[0], row, strict=True):
                    kept += vector

    def follow(self, vectors: Sequence[Tensor], offsets: Sequence[int], loss: Tensor, used: int, scale: float = 1.0) -> None:
        """The same for the last micro-batch, whose backward is still to come, without copying the gradients.

        They are used up bucket by bucket: the caller leaves their vector alone until `finish`.
        """
        with self._clock():
            self.tally.count(offsets, used, loss)
            statistics = vectors[1].clone()  # complete since forward, and put back when the step is computed
            _weigh(statistics, 1.0, used / len(offsets))
            self._rows.append([vectors[0], statistics])
            self._factors = scale, used / len(offsets)

    def pass_over(self, offsets: Sequence[int]) -> None:
        """Count the positions of a micro-batch without a usable tile: it is consumed, and contributes nothing."""
        self.tally.count(offsets, 0, None)

    # ------------------------------------------------------------ messages

    def ready(self, parameter: int) -> None:
        """The gradient of a parameter is there; buckets leave in their order, so that all members send the same."""
        self._missing[self._bucket_of[parameter]] -= 1
        while self._offered < len(self.cut) and not self._missing[self._offered]:
            with self._clock():
                self._offer()

    def start(self) -> None:
        """Let everything go that needs no answer, and wait for nothing."""
        with self._clock():
            assert not self._offered, "buckets have left one by one"
            for b in range(len(self.cut)):
                self._look(b)
            if self.terms.exact:
                self._agreements[0] = self.world.start_all_reduce(self._tops, "max")
            else:
                self._sum(len(self.cut))
            self._offered = len(self.cut)
            self._start_head()

    def advance(self) -> None:
        """After `start`: round what was agreed on and let the sums go; rows are not needed any more."""
        with self._clock():
            self._sum(len(self.cut))
            self._rows.clear()

    def finish(self, into: Tensor) -> tuple[Head, Tensor]:
        """What all know, and the mean statistics (S,); the mean gradient is written to `into` (P,). Both float32.

        Means are over the usable tiles of the world; they are not numbers of any use where the head is not summable.
        """
        with self._clock():
            while self._offered < len(self.cut):
                self._offer()
            if self._head is None:
                self._start_head()
            self._sum(len(self.cut))
            for work in self._works:
                work.wait()
            head = self._read_head()
            statistics = self._read(into, head)
            self._rows.clear()
            self._buffers.clear()
            return head, statistics

    def _offer(self) -> None:
        """The next bucket: ask for its scale, and round and send an earlier one, whose scale has come meanwhile."""
        b = self._offered
        self._look(b)
        if self.terms.exact:
            self._agreements[b] = self.world.start_all_reduce(self._top_of[b], "max")
        self._offered += 1
        self._sum(b + 1 - _BEHIND if self.terms.exact else b + 1)

    def _look(self, b: int) -> None:
        """Weigh the last row's part of a bucket; note the largest magnitudes of all rows, as bits (which sort alike)."""
        for position, segment in enumerate(self.cut[b].segments):
            if self._factors and segment.vector == GRADIENTS:
                _weigh(_part(self._rows[-1], segment), *self._factors)
            if self.terms.exact and self._rows:
                ends = torch.stack([end for row in self._rows for end in torch.aminmax(_part(row, segment))])
                self._top_of[b][position] = ends.abs().max().view(torch.int32) & 0x7FFFFFFF

    def _sum(self, until: int) -> None:
        """Start the sums of the buckets before `until` that have not left."""
        while (b := len(self._buffers)) < until:
            if b in self._agreements:
                self._agreements.pop(b).wait()
            self._buffers.append(self._packed(b))
            self._works.append(self.world.start_all_reduce(self._buffers[b]))

    def _start_head(self) -> None:
        self._head = self.tally.message(self.device)
        self._works.append(self.world.start_all_reduce(self._head))

    # ------------------------------------------------------------ packing

    def _packed(self, b: int) -> Tensor:
        """What this member has to say in a bucket: its rows rounded and added, or just added."""
        bucket = self.cut[b]
        if self.terms.exact:
            scale = Scale.of(self._top_of[b], self.terms)
            self._scales.append(scale)
            buffer = torch.empty(sum(bucket.sizes), dtype=scale.integer, device=self.device)
            for part, segment, up in zip(buffer.split(bucket.sizes), bucket.segments, scale.up, strict=True):
                _round_into(part, [_part(row, segment) for row in self._rows], up)
            return buffer
        wire = WIRES[self.terms.wire] if bucket.segments[0].vector == GRADIENTS else torch.float32
        buffer = torch.empty(sum(bucket.sizes), dtype=wire, device=self.device)
        for part, segment in zip(buffer.split(bucket.sizes), bucket.segments, strict=True):
            _add_into(part, [_part(row, segment) for row in self._rows])
        return buffer

    def _read_head(self) -> Head:
        """The numbers of all messages, fetched from the device at once."""
        assert self._head is not None
        if not self.terms.exact:
            for b, bucket in enumerate(self.cut):
                for position, part in enumerate(self._buffers[b].split(bucket.sizes)):
                    largest = torch.stack(torch.aminmax(part)).float().abs().max()
                    self._top_of[b][position] = largest.view(torch.int32) & 0x7FFFFFFF
        top = self._tops.max().to(torch.int64)[None]
        position_sum, positions, used, signals, not_finite, loss_sum, most = torch.cat([self._head, top]).tolist()
        loss = loss_sum / 2**_LOSS_BITS / used if used and not not_finite else float("nan")
        return Head(positions, position_sum, used, loss, not not_finite and most < _NOT_FINITE, signals)

    def _read(self, gradient: Tensor, head: Head) -> Tensor:
        """Means out of the sums; Σ u/m over the micro-batches is their number where no tile is damaged."""
        share = self.terms.micro_batch / head.used if head.used else 0.0
        sizes = [s.size for bucket in self.cut for s in bucket.segments if s.vector != GRADIENTS]
        into = [gradient, torch.empty(sum(sizes), device=self.device)]
        for b, bucket in enumerate(self.cut):
            for position, (part, segment) in enumerate(zip(self._buffers[b].split(bucket.sizes), bucket.segments, strict=True)):
                factor = self._scales[b].down[position] * share if self.terms.exact else share
                _scale_into(_part(into, segment), part, factor)
        return into[1]

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


def _part(row: Sequence[Tensor], segment: Segment) -> Tensor:
    return row[segment.vector][segment.start : segment.stop]


def _weigh(vector: Tensor, scale: float, share: float) -> None:
    """Undo a loss scale, then weigh by the share of usable tiles; in place."""
    for factor in (scale, share):
        if factor != 1.0:
            vector *= factor


def _round_into(total: Tensor, rows: Sequence[Tensor], up: Tensor) -> None:
    """total ← Σ round(row · 2^k), integers."""
    if not rows:
        total.zero_()
    for chunk in _chunks(total):
        for number, row in enumerate(rows):
            values = row[chunk].to(up.dtype) * up
            if number:
                total[chunk] += values.round_().to(total.dtype)
            else:
                total[chunk].copy_(values.round_())


def _add_into(total: Tensor, rows: Sequence[Tensor]) -> None:
    """total ← Σ rows, of which mode fast has two at most; rounded once, to the type of the wire."""
    if not rows:
        total.zero_()
    elif len(rows) == 1:
        total.copy_(rows[0])
    else:
        total.copy_(rows[0] + rows[1])


def _scale_into(values: Tensor, total: Tensor, factor: Tensor | float) -> None:
    """values ← total · factor, float32."""
    if total.dtype == torch.bfloat16:
        values.copy_(total).mul_(factor)
        return
    for chunk in _chunks(total):
        torch.mul(total[chunk], factor, out=values[chunk])


def _chunks(vector: Tensor) -> list[slice]:
    """Pieces that stay in a CPU's cache; all at once on devices that would rather have long ones."""
    step = _CHUNK if vector.device.type == "cpu" else max(1, len(vector))
    return [slice(start, start + step) for start in range(0, len(vector), step)]

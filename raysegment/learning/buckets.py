"""How the long message of a step is cut into buckets, in the order in which backward finishes them.

A bucket is what one collective carries: some whole parameters, next to each other in the flat vector, a few MiB together.
Backward finishes a network from its end, so the buckets run from the last weights to the first; biases, norms and the
batch-norm statistics, all of them short, are the last bucket. The cut follows from the network alone: every member has the
same one, also a member that has nothing to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUCKET_BYTES = 4 << 20  # of float32: enough to fill a wire, few enough to leave while backward still computes
GRADIENTS, STATISTICS = 0, 1  # the two vectors that a step exchanges


@dataclass(frozen=True)
class Segment:
    """Values [start, stop) of one of the two vectors; they are rounded with one scale."""

    vector: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Bucket:
    """What one collective carries, and the parameters that must have their gradient before it can leave."""

    segments: tuple[Segment, ...]
    parameters: frozenset[int] = frozenset()

    @property
    def sizes(self) -> list[int]:
        return [segment.size for segment in self.segments]


def buckets(sizes: Sequence[int], weights: int, statistics: int, most_bytes: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Buckets of gradients of parameters with so many values each, the first `weights` of them weights, and statistics.

    Only a parameter that is larger by itself makes a bucket larger than `most_bytes`. Everything is one bucket if it fits.
    """
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    rest = _bucket(range(weights, len(sizes)), ends, statistics)
    if 4 * (ends[-1] + statistics) <= most_bytes:
        return (_bucket(range(weights), ends, 0, rest),)
    groups: list[list[int]] = []
    for index in reversed(range(weights)):
        if groups and 4 * (ends[groups[-1][0] + 1] - ends[index]) <= most_bytes:
            groups[-1].append(index)
        else:
            groups.append([index])
    found = [_bucket(range(group[-1], group[0] + 1), ends, 0) for group in groups]
    return (*found, rest) if rest.segments else tuple(found)


def apart(cut: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The same with the statistics in a bucket of their own, for wires on which gradients have another type."""
    found = [Bucket(tuple(s for s in one.segments if s.vector == GRADIENTS), one.parameters) for one in cut]
    alone = tuple(s for one in cut for s in one.segments if s.vector == STATISTICS)
    return tuple(one for one in [*found, Bucket(alone)] if one.segments)


def _bucket(parameters: range, ends: Sequence[int], statistics: int, more: Bucket | None = None) -> Bucket:
    found = [Segment(GRADIENTS, ends[parameters.start], ends[parameters.stop])] if parameters else []
    found += [Segment(STATISTICS, 0, statistics)] if statistics else []
    segments, own = (more.segments, more.parameters) if more else ((), frozenset())
    return Bucket((*found, *segments), own | {*parameters})

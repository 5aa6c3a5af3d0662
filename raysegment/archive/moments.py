"""Counts, means and deviations that come out the same, bit for bit, in whatever order the parts are put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import CHANNELS, CLASSES, NAMES

_BLOCK = 1 << 17  # cells summed up at once: in float64 they stay in a core's cache


def _sums(field: NDArray[np.float32], reference: float) -> tuple[float, float]:
    """Sum of d = x − reference and of d² over a field (h, w), in float64: block after block of whole rows."""
    height, width = field.shape
    rows = max(1, _BLOCK // width)
    apart = np.empty((min(rows, height), width))
    total = squares = 0.0
    for row in range(0, height, rows):
        block = apart[: min(rows, height - row)]
        np.subtract(field[row : row + rows], reference, out=block, dtype=np.float64)
        total += float(block.sum())
        squares += float(np.square(block, out=block).sum())
    return total, squares


@dataclass(frozen=True)
class Moments:
    """Sums over pixels, per channel, of d = x − reference and of d², exact; smallest and largest x; pixels per class.

    The sums of one tile are float64 numbers; adding them up as fractions rounds nothing, so `merge` is associative and
    commutative, and `mean` and `std` round once, at the end.
    """

    pixels: int
    total: tuple[Fraction, ...]
    squares: tuple[Fraction, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    class_counts: tuple[int, ...]

    @staticmethod
    def none() -> Moments:
        """Of no tile at all: the neutral element of `merge`."""
        zero, high = (Fraction(0),) * len(NAMES), (math.inf,) * len(NAMES)
        return Moments(0, zero, zero, high, tuple(-x for x in high), (0,) * len(CLASSES))

    @staticmethod
    def of_tile(fields: NDArray[np.float32], mask: NDArray[np.uint8]) -> Moments:
        """Of `fields (16, h, w)` in SI units and `mask (h, w)`."""
        sums = [_sums(field, channel.reference) for field, channel in zip(fields, CHANNELS, strict=True)]
        total, squares = zip(*sums, strict=True)
        low, high = zip(*((field.min(), field.max()) for field in fields), strict=True)
        counts = np.bincount(mask.ravel(), minlength=len(CLASSES))
        assert counts.size == len(CLASSES), counts
        assert np.isfinite(squares).all(), squares
        return Moments(
            mask.size,
            tuple(Fraction(x) for x in total),
            tuple(Fraction(x) for x in squares),
            tuple(float(x) for x in low),
            tuple(float(x) for x in high),
            tuple(int(x) for x in counts),
        )

    @staticmethod
    def merge(parts: Iterable[Moments]) -> Moments:
        """The moments of all parts together, whatever their order."""
        every = [Moments.none(), *parts]
        return Moments(
            sum(part.pixels for part in every),
            tuple(sum(values, Fraction(0)) for values in zip(*(part.total for part in every), strict=True)),
            tuple(sum(values, Fraction(0)) for values in zip(*(part.squares for part in every), strict=True)),
            tuple(min(values) for values in zip(*(part.minimum for part in every), strict=True)),
            tuple(max(values) for values in zip(*(part.maximum for part in every), strict=True)),
            tuple(sum(values) for values in zip(*(part.class_counts for part in every), strict=True)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: fractions as text, floats as they are (JSON keeps every bit of a float64)."""
        return {**asdict(self), "total": [str(x) for x in self.total], "squares": [str(x) for x in self.squares]}

    @staticmethod
    def from_dict(held: Mapping[str, Any]) -> Moments:
        """What `to_dict` made."""
        total, squares = (tuple(Fraction(x) for x in held[name]) for name in ("total", "squares"))
        low, high = (tuple(float(x) for x in held[name]) for name in ("minimum", "maximum"))
        return Moments(held["pixels"], total, squares, low, high, tuple(held["class_counts"]))

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean per channel, SI units."""
        assert self.pixels, "moments of nothing"
        pairs = zip(CHANNELS, self.total, strict=True)
        return tuple(float(Fraction(channel.reference) + total / self.pixels) for channel, total in pairs)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel (of the population), SI units."""
        pairs = zip(self.total, self.squares, strict=True)
        return tuple(math.sqrt(max(0.0, float(q / self.pixels - (s / self.pixels) ** 2))) for s, q in pairs)

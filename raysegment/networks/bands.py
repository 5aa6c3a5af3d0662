"""How a map is cut into bands: some rows of one sample, or all rows of some samples, small enough to stay in cache.

Everything that happens to a map on its way into a convolution (norm, ReLU, dropout, joining, the halo) happens to a band
while it is in cache, so that main memory sees each map once. Pure arithmetic: the same sizes give the same bands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BAND_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Band:
    """Samples [first, last), rows [top, bottom)."""

    first: int
    last: int
    top: int
    bottom: int

    @property
    def samples(self) -> slice:
        return slice(self.first, self.last)

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)


def bands(
    batch: int, height: int, row_bytes: int, reach: int = 0, whole: bool = False, limit: int = BAND_BYTES
) -> Iterator[Band]:
    """Bands that cover `batch` samples of `height` rows of `row_bytes` each, at most about `limit` bytes a band.

    A band of fewer than four times `reach` rows would spend its time on the rows beside it; `whole` keeps rows together.
    """
    if height * row_bytes <= limit or whole:
        several = max(1, limit // max(1, height * row_bytes))
        for first in range(0, batch, several):
            yield Band(first, min(first + several, batch), 0, height)
        return
    rows = min(height, max(1, 4 * reach, limit // row_bytes))
    count = -(-height // rows)
    for sample in range(batch):
        for part in range(count):
            yield Band(sample, sample + 1, part * height // count, (part + 1) * height // count)

"""How many bytes are really read from files, as the operating system counts them for one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

T = TypeVar("T")
_COUNTS = Path("/proc/thread-self/io")


class ReadMeter:
    """Adds up `bytes_read`; `exact` is False where the system does not count (elsewhere than on Linux), and it stays 0.

    Counted are bytes that reading asks the system for (`rchar`), whether from a disk or from the page cache; the count
    itself costs some hundred bytes each time.
    """

    def __init__(self) -> None:
        self.bytes_read = 0

    @property
    def exact(self) -> bool:
        return _COUNTS.exists()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What this thread reads inside is added."""
        before = _bytes_so_far()
        try:
            yield
        finally:
            self.bytes_read += _bytes_so_far() - before

    def counted(self, values: Iterator[T]) -> Iterator[T]:
        """The same `values`, counting what this thread reads while each is made."""
        end = object()
        while True:
            with self.counting():
                value = next(values, end)
            if value is end:
                return
            yield cast(T, value)


def _bytes_so_far() -> int:
    """Bytes this thread has read since it began, 0 where nobody counts."""
    if not _COUNTS.exists():
        return 0
    return int(_COUNTS.read_text().split(maxsplit=2)[1])

"""What a process of its own runs to show what a reader delivers; imports little, for it is started often."""

from __future__ import annotations

import os
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

from numpy.typing import NDArray

from raysegment.applications.readers.apart import load


def deliver(connection: Connection, name: str, folder: Path, rank: int, world: int, environment: dict[str, str]) -> None:
    """Send the checksums of the tiles of two passes."""
    os.environ.update(environment)
    passes = load(name).passes(folder, rank, world)
    for _ in range(2):
        connection.send((True, [crc for fields, mask in passes() for crc in checksums(fields.numpy(), mask.numpy())]))


def checksums(fields: NDArray, mask: NDArray) -> list[int]:
    """CRC-32 of each tile in a batch of them, or of the one."""
    if mask.ndim == 2:
        fields, mask = fields[None], mask[None]
    assert (fields.dtype, fields.shape[1:], mask.dtype, mask.shape[1:]) == ("float16", (16, 16, 32), "uint8", (16, 32))
    return [zlib.crc32(m.tobytes(), zlib.crc32(f.tobytes())) for f, m in zip(fields, mask, strict=True)]


def fail(connection: Connection) -> None:
    raise ValueError("chunks are\nof another version")


def vanish(connection: Connection) -> None:
    os._exit(3)


def sleep(connection: Connection) -> None:
    time.sleep(30)

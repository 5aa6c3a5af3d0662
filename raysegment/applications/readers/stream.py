"""Our own stream: one pass is one epoch, opened anew (threads, plan and all), as a training run opens it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from raysegment.archive.shards import open_shards
from raysegment.feed.order import Order
from raysegment.feed.session import ensure_ray
from raysegment.feed.stream import FeedConfig, open_stream


def write(source: Path, folder: Path) -> None:
    (folder / "shards").symlink_to(source, target_is_directory=True)


def passes(
    folder: Path, rank: int, world: int, config: FeedConfig | None = None
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    ensure_ray()
    tiles = len(open_shards(folder / "shards"))
    order = Order(tiles, global_batch=world, micro_batch=1)

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        for step in open_stream(folder / "shards", order, 0, tiles // world, rank, world, config):
            for batch in step.micro_batches:
                yield batch.fields, batch.mask

    return one_pass

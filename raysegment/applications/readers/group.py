"""Consumers that know of each other as torch's ranks do; some libraries split samples by nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from torch import distributed


def join(folder: Path, rank: int, world: int) -> None:
    """Make this process `rank` of `world` (of the one node), by torch's environment and a gloo group; alone it is none."""
    if world == 1:
        return
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in words.items()})
    meeting = (folder.parent / f"{folder.name}-meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)

"""How far people (or rules) who labelled the same maps agree: IoU per class between every two label maps of one file.

ClimateNet's files hold one label map per person; which of them is whose is not known from file to file, so every pair of
every map counts alike, once. IoU is the same whichever of the two is called the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from raysegment.applications.evaluate import NAMES, Paths, mask_files, named_iou
from raysegment.applications.intervals import DEFAULT, Blocks, Bootstrap
from raysegment.archive.deepcam import open_maps
from raysegment.archive.masks import MaskSource
from raysegment.climate.checks import BadInput
from raysegment.learning.metrics import confusion


def agreement(paths: Paths, bootstrap: Bootstrap = DEFAULT) -> dict[str, Any]:
    """Pairwise agreement in files with several label maps (files, folders or patterns).

    Returns `iou` {background, cyclone, river, mean} of all pairs together, `iou_95`, `share_differing` (cells on which a pair
    differs), `pairs` ("0-1": first and second label map of a file, with `iou`), `label_maps` {how many: files},
    `snapshots`, `bootstrap`. BadInput where no file has two label maps.
    """
    files = sorted({file for path in _each(paths) for file in mask_files(path)})
    blocks, held, maps = Blocks(), dict[int, int](), 0
    for file in files:
        count = _label_maps(file)
        held[count] = held.get(count, 0) + 1
        maps += _add(blocks, file, count) if count > 1 else 0
    if not maps:
        got = f"one each in {len(files)} file(s)"
        raise BadInput(files[0].parent, "files with several label maps", got, "Compare two folders: evaluate PREDICTED TRUTH")
    return {"agreement": _result(blocks, bootstrap), "label_maps": dict(sorted(held.items())), "snapshots": maps}


def _each(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _label_maps(file: Path) -> int:
    """How many label maps a file holds for each time."""
    with open_maps(file) as maps:
        return maps.label_maps()


def _add(blocks: Blocks, file: Path, count: int) -> int:
    """Put in every pair of every map of a file; how many maps those are."""
    sources = [MaskSource(file, number) for number in range(count)]
    try:
        times = sources[0].times
        for index, time in enumerate(times):
            masks = [source.read(index) for source in sources]
            found = {(f"{a}-{b}"): confusion(masks[b], masks[a]).numpy() for a, b in combinations(range(count), 2)}
            every = np.sum(list(found.values()), axis=0)
            blocks.add(time, f"{file} {index}", {("", ""): every, **{("pair", name): part for name, part in found.items()}})
        return len(times)
    finally:
        for source in sources:
            source.__exit__()


def _result(blocks: Blocks, bootstrap: Bootstrap) -> dict[str, Any]:
    sums, intervals = blocks.sums(), blocks.intervals(bootstrap)
    total = sums["", ""]
    return {
        "iou": named_iou(total),
        "iou_95": dict(zip((*NAMES, "mean"), intervals["", ""], strict=True)),
        "share_differing": float(1.0 - np.trace(total) / total.sum()),
        "pairs": {name: {"iou": named_iou(counts)} for (kind, name), counts in sorted(sums.items()) if kind == "pair"},
        "bootstrap": blocks.about(bootstrap),
    }

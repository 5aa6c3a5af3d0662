"""IoU on tiles that are not trained on, each member computing its share; counts are integers, so any group gets the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raysegment.archive.reader import Damaged
from raysegment.feed.batches import MicroBatch
from raysegment.feed.store import TileStore
from raysegment.learning.metrics import Scores
from raysegment.learning.step import Learner


@torch.no_grad()
def validate(learner: Learner, store: TileStore, reduce: Callable[[Tensor], None], check: Callable[[], None]) -> Scores:
    """The scores of all tiles of a set with the network as it is; damaged tiles are left out.

    `reduce` sums a tensor over the members in place; `check` is called before each tile and may raise.
    """
    classes = len(store.manifest.classes)
    scores = Scores.none(classes, learner.device)
    learner.network.eval()
    try:
        for number in range(learner.world.rank, store.manifest.tiles, learner.world.size):
            check()
            scores += _score(learner, store, number, classes)
    finally:
        learner.network.train()
    counts = scores.tensor()
    reduce(counts)
    return Scores.from_tensor(counts)


def _score(learner: Learner, store: TileStore, number: int, classes: int) -> Scores:
    fields, mask = store.empty(1)
    try:
        store.read(number, fields[0], mask[0])
    except Damaged:
        return Scores.none(classes, learner.device)
    tile = MicroBatch(torch.zeros(1, dtype=torch.int64), torch.from_numpy(fields), torch.from_numpy(mask))
    inputs = learner.normaliser.tiles(tile.fields.to(learner.device))  # (1, C, H, W)
    with learner.autocast():
        logits = learner.network(inputs)  # (1, K, H, W)
    return Scores.of(logits.argmax(1), tile.mask.to(learner.device), classes)

"""One mask from the masks of several people who labelled the same map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import BACKGROUND, CLASSES, CYCLONE, RIVER

CONSENSUS = ("majority", "any", "all")


def merge_labels(labels: NDArray[np.uint8], rule: str) -> NDArray[np.uint8]:
    """Mask (H, W) from `labels (L, H, W)` of L people; of a single one it is theirs, whatever the rule.

    `majority`: the class that most of them gave a cell; of classes with as many votes each, background goes before
    cyclone, cyclone before river (an event needs more votes than its absence). `any`: cyclone where anybody saw one, else
    river where anybody saw one. `all`: the class that all of them gave, background where they differ.
    """
    assert labels.ndim == 3, labels.shape
    if rule == "majority":
        votes = np.stack([(labels == kind).sum(axis=0) for kind in range(len(CLASSES))])
        return votes.argmax(axis=0).astype(np.uint8)  # the first of the largest
    if rule == "any":
        river = np.where((labels == RIVER).any(axis=0), RIVER, BACKGROUND)
        return np.where((labels == CYCLONE).any(axis=0), CYCLONE, river).astype(np.uint8)
    assert rule == "all", rule
    return np.where((labels == labels[0]).all(axis=0), labels[0], BACKGROUND).astype(np.uint8)

"""The maps of several labellers become one: each rule against its own words, cell by cell."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raysegment.archive.masks import read_masks
from raysegment.archive.snapshots import open_source
from raysegment.climate.channels import BACKGROUND, CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.consensus import CONSENSUS, merge_labels
from tests.small_archive import write_with_labellers

LABELS = st.integers(1, 6).flatmap(lambda people: arrays(np.uint8, (people, 3, 4), elements=st.integers(0, 2)))


def by_words(votes: list[int], rule: str) -> int:
    """What the rule says of one cell."""
    if rule == "all":
        return votes[0] if len(set(votes)) == 1 else BACKGROUND
    if rule == "any":
        return CYCLONE if CYCLONE in votes else RIVER if RIVER in votes else BACKGROUND
    most = max(Counter(votes).values())
    return next(kind for kind in (BACKGROUND, CYCLONE, RIVER) if votes.count(kind) == most)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, rule=st.sampled_from(CONSENSUS), seed=st.integers(0, 99))
def test_every_cell_is_what_the_rule_says_whoever_comes_first(labels, rule, seed):
    merged = merge_labels(labels, rule)
    for cell in np.ndindex(merged.shape):
        assert merged[cell] == by_words([int(vote) for vote in labels[:, *cell]], rule)
    np.testing.assert_array_equal(merged, merge_labels(labels[np.random.default_rng(seed).permutation(len(labels))], rule))
    np.testing.assert_array_equal(merge_labels(labels[:1], rule), labels[0])


@settings(max_examples=30, deadline=None)
@given(labels=LABELS)
def test_what_all_saw_most_saw_and_what_most_saw_somebody_saw(labels):
    events = {rule: merge_labels(labels, rule) > 0 for rule in CONSENSUS}
    assert not (events["all"] & ~events["majority"]).any()
    assert not (events["majority"] & ~events["any"]).any()


def test_a_file_of_three_labellers(tmp_path):
    maps = np.zeros((3, 8, 16), np.uint8)
    maps[:2, 1, 1], maps[0, 2, 2], maps[:, 3, 3] = CYCLONE, RIVER, RIVER
    path = write_with_labellers(tmp_path / "data-2000-01-01-00-1.nc", maps)
    seen = {"majority": (CYCLONE, 0, RIVER), "any": (CYCLONE, RIVER, RIVER), "all": (0, 0, RIVER)}
    for rule, classes in seen.items():
        mask = read_masks(path, rule).masks[0]
        assert (mask[1, 1], mask[2, 2], mask[3, 3]) == classes
        with open_source(path, label_map=rule) as source:
            np.testing.assert_array_equal(source.read(0).mask, mask)
    for wrong in ("most", 3):
        with pytest.raises(BadInput, match="label map below 3, or majority, any, all"):
            read_masks(path, wrong)
    maps[1, 0, 0] = 7
    with pytest.raises(BadInput, match="labels 0 background"):
        read_masks(write_with_labellers(tmp_path / "data-2000-01-02-00-1.nc", maps, 1), "majority")

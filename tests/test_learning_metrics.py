"""Metrics against loops over pixels and against torchmetrics; sums of counts are the same bits in any grouping."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.segmentation import mean_iou as torchmetrics_mean_iou

from raysegment.learning.metrics import Scores, confusion, iou, mean_iou, mlperf_iou


def masks(samples: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and truth (B, 12, 15) uint8 that often agree; each class is absent from both in some of the samples."""
    generator = torch.Generator().manual_seed(seed)
    truth, pred = (torch.randint(0, 3, (samples, 12, 15), generator=generator, dtype=torch.uint8) for _ in range(2))
    pred = torch.where(torch.rand(pred.shape, generator=generator) < 0.6, truth, pred)
    for sample in range(samples):
        absent, instead = sample % 4, (sample + 1) % 3  # 3: none is absent
        for mask in (pred[sample], truth[sample]):
            mask[mask == absent] = instead
    return pred, truth


def total(pred: torch.Tensor, truth: torch.Tensor) -> Scores:
    return sum((Scores.of(*pair) for pair in zip(pred, truth, strict=True)), Scores.none())


def test_iou_equals_torchmetrics():
    generator = torch.Generator().manual_seed(3)
    pred, truth = (torch.randint(0, 3, (4, 20, 30), generator=generator) for _ in range(2))
    pred = torch.where(torch.rand(pred.shape, generator=generator) < 0.6, truth, pred)
    counts = confusion(pred.to(torch.uint8), truth.to(torch.uint8))
    assert torch.equal(counts, torchmetrics.ConfusionMatrix(task="multiclass", num_classes=3)(pred, truth))
    expected = torchmetrics.JaccardIndex(task="multiclass", num_classes=3, average="none")(pred, truth)
    np.testing.assert_allclose(iou(counts), expected.numpy(), rtol=1e-6)
    assert mean_iou(counts) == pytest.approx(float(torchmetrics.JaccardIndex(task="multiclass", num_classes=3)(pred, truth)))
    assert torch.equal(confusion(pred.numpy(), truth.numpy()), counts)


def test_absent_classes():
    truth = np.array([[0, 0, 2, 2]])
    pred = np.array([[0, 0, 0, 2]])
    counts = confusion(pred, truth)
    assert iou(counts)[[0, 2]] == pytest.approx([2 / 3, 1 / 2])
    assert np.isnan(iou(counts)[1])
    assert mean_iou(counts) == pytest.approx(7 / 12)
    assert mlperf_iou(counts) == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert mlperf_iou(confusion(np.array([1]), np.array([0]))) == pytest.approx(1 / 3)


def test_confusion_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="one shape"):
        confusion(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="class numbers"):
        confusion(np.array([3]), np.array([0]))


def test_scores_equal_torchmetrics():
    pred, truth = masks(23)
    scores = total(pred, truth)
    assert torch.equal(scores.confusion, torchmetrics.ConfusionMatrix(task="multiclass", num_classes=3)(pred, truth))
    per_class = torchmetrics.JaccardIndex(task="multiclass", num_classes=3, average="none")(pred, truth)
    np.testing.assert_allclose(scores.iou(), per_class.numpy(), rtol=1e-6)
    macro = torchmetrics.JaccardIndex(task="multiclass", num_classes=3)(pred, truth)
    assert scores.mean_iou() == pytest.approx(float(macro), rel=1e-6)
    by_sample = [multiclass_jaccard_index(p, t, 3, "none", zero_division=1.0) for p, t in zip(pred, truth, strict=True)]
    assert scores.mlperf() == pytest.approx(float(torch.stack(by_sample).mean()), rel=1e-6)
    absent_is_minus_one = torchmetrics_mean_iou(pred.long(), truth.long(), 3, per_class=True, input_format="index")
    assert (absent_is_minus_one == -1).any()
    assert scores.mlperf() == pytest.approx(float(absent_is_minus_one.where(absent_is_minus_one != -1, 1.0).mean()), rel=1e-6)
    assert scores.mlperf() > scores.mean_iou()  # the rule is lenient
    assert scores.samples == 23


def test_scores_equal_a_loop_over_pixels():
    """MLPerf HPC's rule in fractions: mean over classes of a sample (empty union: 1), then mean over samples."""
    pred, truth = masks(5)
    exact = Fraction(0)
    for p, t in zip(pred.tolist(), truth.tolist(), strict=True):
        pixels = [(a, b) for row, other in zip(p, t, strict=True) for a, b in zip(row, other, strict=True)]
        for k in range(3):
            union = sum(k in pair for pair in pixels)
            exact += Fraction(sum(pair == (k, k) for pair in pixels), union) if union else 1
    assert abs(Fraction(total(pred, truth).mlperf()) - exact / 15) <= Fraction(1, 2**32)


@given(order=st.permutations(range(8)), cuts=st.lists(st.integers(0, 8), min_size=2, max_size=2).map(sorted))
@settings(max_examples=25, deadline=None)
def test_scores_are_the_same_bits_in_any_grouping(order, cuts):
    """Three ranks with any share of the samples in any order, also none, and one sum over them."""
    pred, truth = masks(8)
    shares = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
    ranks = [total(pred[share], truth[share]) for share in shares]
    expected = total(pred, truth)
    assert torch.equal((ranks[0] + (ranks[1] + ranks[2])).tensor(), expected.tensor())
    reduced = torch.stack([rank.tensor() for rank in ranks]).sum(0)  # what an all-reduce does
    assert reduced.dtype == torch.int64
    got = Scores.from_tensor(reduced)
    assert (got.mlperf(), got.mean_iou(), got.samples) == (expected.mlperf(), expected.mean_iou(), 8)
    assert (got.iou() == expected.iou()).all()
    assert torch.equal(got.tensor(), expected.tensor())


def test_scores_of_nothing_and_of_other_class_counts():
    nothing = Scores.none()
    assert nothing.samples == 0
    assert math.isnan(nothing.mlperf())
    assert math.isnan(nothing.mean_iou())
    assert np.isnan(nothing.iou()).all()
    five = Scores.of(np.array([[0, 4]]), np.array([[0, 3]]), classes=5)
    assert five.mlperf() == pytest.approx(3 / 5)  # 0 is right; 3 and 4 are wrong; 1 and 2 are absent
    assert torch.equal(Scores.from_tensor(five.tensor()).confusion, five.confusion)

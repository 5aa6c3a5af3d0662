"""How good a mask is: counts that can be summed over anything, and ratios taken only at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_SAMPLE_BITS = 32  # a sample's score in [0, 1] travels as an integer multiple of 2^-32; 2^31 samples fit into int64


def _flat(mask: Tensor | ArrayLike) -> Tensor:
    tensor = mask if isinstance(mask, Tensor) else torch.from_numpy(np.ascontiguousarray(mask))
    return tensor.reshape(-1).long()


def confusion(pred: Tensor | ArrayLike, truth: Tensor | ArrayLike, classes: int = 3) -> Tensor:
    """Pixels (K, K) int64 by truth (row) and prediction (column); masks of any equal shape."""
    shapes = [tuple(np.shape(mask)) for mask in (pred, truth)]  # type: ignore[arg-type]
    if shapes[0] != shapes[1]:
        raise ValueError(f"confusion: expected masks of one shape, got {shapes[0]} and {shapes[1]}")
    pred, truth = _flat(pred), _flat(truth)
    if len(truth) and (min(pred.min(), truth.min()) < 0 or max(pred.max(), truth.max()) >= classes):
        raise ValueError(f"confusion: expected class numbers from 0 to {classes - 1}, got {pred.unique()} and {truth.unique()}")
    return torch.bincount(truth * classes + pred, minlength=classes**2).reshape(classes, classes)


def iou(counts: Tensor | ArrayLike) -> NDArray[np.float64]:
    """Intersection over union (K,) from a confusion matrix (K, K); not a number where a class is in neither mask."""
    matrix = np.asarray(counts, np.float64)
    both = np.diagonal(matrix)
    union = matrix.sum(0) + matrix.sum(1) - both
    return np.divide(both, union, out=np.full(len(matrix), np.nan), where=union > 0)


def mean_iou(counts: Tensor | ArrayLike) -> float:
    """Mean of `iou` over the classes that occur."""
    return float(np.nanmean(iou(counts)))


def mlperf_iou(counts: Tensor | ArrayLike) -> float:
    """Mean IoU of one sample from its confusion matrix by the rule of MLPerf HPC DeepCAM: an absent class counts as 1.

    MLPerf's score is the mean of this over samples; it is far more lenient than the IoU of the summed matrix.
    """
    return float(np.nan_to_num(iou(counts), nan=1.0).mean())


@dataclass(frozen=True, eq=False)
class Scores:
    """What is known of how well masks agree, as counts: `a + b` is of both, the same bits in any order and grouping.

    `confusion` (K, K) int64, pixels by truth (row) and prediction (column); `sample_sum`, Σ of the samples' `mlperf_iou`
    in units of 2^-32, each sample rounded once by itself; `samples`, how many there were.
    """

    confusion: Tensor
    sample_sum: int = 0
    samples: int = 0

    @classmethod
    def none(cls, classes: int = 3, device: torch.device | str = "cpu") -> Scores:
        """Of no sample: what to add to, and what a rank without samples contributes."""
        return cls(torch.zeros(classes, classes, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, pred: Tensor | ArrayLike, truth: Tensor | ArrayLike, classes: int = 3) -> Scores:
        """Of one sample, whatever the (equal) shape of its masks; a batch is the sum of its samples' scores."""
        counts = confusion(pred, truth, classes)
        return cls(counts, round(mlperf_iou(counts.cpu()) * 2**_SAMPLE_BITS), 1)

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.confusion + other.confusion, self.sample_sum + other.sample_sum, self.samples + other.samples)

    def tensor(self) -> Tensor:
        """All counts in one vector (K² + 2,) int64, on the device of `confusion`: the sum over ranks is that of all."""
        rest = self.confusion.new_tensor([self.sample_sum, self.samples])
        return torch.cat((self.confusion.flatten(), rest))

    @classmethod
    def from_tensor(cls, counts: Tensor) -> Scores:
        """The inverse of `tensor`."""
        classes = math.isqrt(len(counts) - 2)
        assert len(counts) == classes**2 + 2, len(counts)
        sample_sum, samples = counts[-2:].tolist()
        return cls(counts[:-2].reshape(classes, classes).clone(), sample_sum, samples)

    def iou(self) -> NDArray[np.float64]:
        """Intersection over union (K,) of all pixels; not a number where a class is nowhere."""
        return iou(self.confusion.cpu())

    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur; not a number where there is no pixel."""
        return mean_iou(self.confusion.cpu()) if self.confusion.any() else math.nan

    def mlperf(self) -> float:
        """MLPerf HPC DeepCAM's score: `mlperf_iou` of each sample, then the mean over samples; not a number without any."""
        return self.sample_sum / 2**_SAMPLE_BITS / self.samples if self.samples else math.nan

"""How good a mask is: counts that can be summed over anything, and ratios taken only at the end."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


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

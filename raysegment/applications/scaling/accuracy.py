"""How many epochs a global batch needs to the target quality, and when a larger one no longer pays."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import curve_fit

MEASURED = Path(__file__).parents[2] / "configs" / "scaling" / "epochs.csv"
PAYS = 1.25  # twice the GPUs must make training so many times as fast, or it is not worth them


@dataclass(frozen=True)
class Epochs:
    """E(B) = least · (1 + B / critical): twice the least at the critical batch (McCandlish et al. 2018, eq. 2.11).

    `spread` is the relative standard deviation of measured epochs about the curve, `largest` the largest measured batch.
    """

    least: float
    critical: float
    spread: float
    largest: int

    def at(self, batch: float) -> float:
        return self.least * (1 + batch / self.critical)


def measured(path: Path = MEASURED) -> list[tuple[int, float]]:
    """(global batch, epochs) of measured runs."""
    with path.open(newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [(int(row["global_batch"]), float(row["epochs"])) for row in rows]


def epochs_curve(runs: Sequence[tuple[int, float]]) -> Epochs:
    """The curve through measured runs, by least squares of logarithms."""
    batches, epochs = np.array(runs, float).T

    def logarithm(batch: np.ndarray, least: float, critical: float) -> np.ndarray:
        return least + np.log1p(batch / np.exp(critical))

    (least, critical), _ = curve_fit(logarithm, batches, np.log(epochs), p0=(math.log(epochs.min()), math.log(batches.max())))
    spread = float(np.std(np.log(epochs) - logarithm(batches, least, critical)))
    return Epochs(math.exp(least), math.exp(critical), spread, int(batches.max()))


def speedup_of_doubling(curve: Epochs, gpus: int, local_batch: int, rate: Callable[[int], float]) -> float:
    """How many times sooner the target is reached with 2 · gpus, each with the same local batch; `rate(gpus)` in samples/s."""
    batch = gpus * local_batch
    return rate(2 * gpus) / rate(gpus) * curve.at(batch) / curve.at(2 * batch)

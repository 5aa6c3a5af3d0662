"""The loss per pixel: cross-entropy weighted by how rare a class is, with focal and soft-Jaccard terms as choices.

Everything is float32, whatever the network computed in. All losses are means over the pixels of a micro-batch's usable
tiles, so the mean over the micro-batches of a step, each weighing its number of them, does not depend on who computed which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raysegment.networks.blocks import choose

# exponent of the class share: inverse square root (Kurth et al. 2018 after 2018-04-07), MLPerf HPC DeepCAM's −1/8, …
RULES = {"inverse_sqrt": -0.5, "inverse_eighth": -0.125, "inverse": -1.0, "none": 0.0}


@dataclass(frozen=True)
class LossConfig:
    """`weights` names the rule for class weights; `focal_gamma` 0 is plain cross-entropy; `jaccard` is that term's share."""

    weights: str = "inverse_sqrt"
    focal_gamma: float = 0.0
    jaccard: float = 0.0

    def __post_init__(self) -> None:
        choose("loss.weights", self.weights, tuple(RULES))
        if self.focal_gamma < 0 or self.jaccard < 0:
            raise ValueError(f"loss: expected focal_gamma and jaccard of at least 0, got {self.focal_gamma} and {self.jaccard}")


def class_weights(counts: Sequence[int], rule: str = "inverse_sqrt") -> tuple[float, ...]:
    """Weights (K,) ∝ share^exponent with Σ share·weight = 1, so that the weighted mean over pixels keeps its size.

    A class that never occurs is taken to occur once.
    """
    choose("loss.weights", rule, tuple(RULES))
    if min(counts) < 0 or sum(counts) <= 0:
        raise ValueError(f"class counts: expected counts of at least 0 with a positive sum, got {tuple(counts)}")
    total = sum(max(count, 1) for count in counts)
    shares = [max(count, 1) / total for count in counts]
    raw = [share ** RULES[rule] for share in shares]
    mean = sum(share * weight for share, weight in zip(shares, raw, strict=True))
    return tuple(weight / mean for weight in raw)


def weighted_cross_entropy(logits: Tensor, mask: Tensor, weights: Tensor, focal_gamma: float = 0.0) -> Tensor:
    """Σ w(y) (1 − p(y))^γ (−log p(y)) / pixels, a scalar.

    logits (B, K, H, W) any float type; mask (B, H, W) integers; weights (K,) float32. The divisor is the number of pixels
    and not the sum of their weights: it is the same for every micro-batch of B tiles. γ: Lin et al. 2017, eq. 4.
    """
    scores = logits.float()
    truth = mask.long()
    if not focal_gamma:
        return F.cross_entropy(scores, truth, weights, reduction="sum") / truth.numel()
    log_p = F.log_softmax(scores, dim=1).gather(1, truth[:, None])[:, 0]  # (B, H, W)
    return -(weights[truth] * (-torch.expm1(log_p)).pow(focal_gamma) * log_p).sum() / truth.numel()


def soft_jaccard(logits: Tensor, mask: Tensor) -> Tensor:
    """1 − mean over classes of (Σ p·t + 1) / (Σ p + Σ t − Σ p·t + 1), a scalar in [0, 1); sums run over the micro-batch.

    One pixel is added above and below, so that a class absent from truth and prediction costs nothing.
    """
    p = logits.float().softmax(1)
    t = F.one_hot(mask.long(), p.shape[1]).permute(0, 3, 1, 2).to(p.dtype)  # (B, K, H, W)
    both = (p * t).sum((0, 2, 3))
    union = p.sum((0, 2, 3)) + t.sum((0, 2, 3)) - both
    return 1.0 - ((both + 1.0) / (union + 1.0)).mean()


def loss(logits: Tensor, mask: Tensor, weights: Tensor, config: LossConfig) -> Tensor:
    """The configured loss of a micro-batch, a float32 scalar."""
    total = weighted_cross_entropy(logits, mask, weights, config.focal_gamma)
    return total + config.jaccard * soft_jaccard(logits, mask) if config.jaccard else total

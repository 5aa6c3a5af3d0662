"""Fields to logits: the two networks of the 2018 paper, at any width and depth."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from raysegment.networks.blocks import NORMS, POLES, choose
from raysegment.networks.deeplab import DeepLab, DeepLabConfig
from raysegment.networks.tiramisu import Tiramisu, TiramisuConfig

NETWORKS = ("tiramisu", "deeplab")

__all__ = ["NETWORKS", "DeepLab", "DeepLabConfig", "NetworkConfig", "Tiramisu", "TiramisuConfig", "build"]


@dataclass(frozen=True)
class NetworkConfig:
    """Which network, and how large: `name`, channels in, classes out, and the options of either network.

    `norm`: "batch" trains best; "none" and "half" (×0.5) are what the 2018 code ran. `norm_momentum` is the share of
    the newest step in the running statistics. `pole`: what the convolutions see beyond the poles.
    """

    name: str = "tiramisu"
    channels: int = 16
    classes: int = 3
    norm: str = "batch"
    norm_momentum: float = 0.1
    pole: str = "zeros"
    tiramisu: TiramisuConfig = field(default_factory=TiramisuConfig)
    deeplab: DeepLabConfig = field(default_factory=DeepLabConfig)

    def __post_init__(self) -> None:
        choose("network.name", self.name, NETWORKS)
        choose("network.norm", self.norm, NORMS)
        choose("network.pole", self.pole, POLES)
        if self.channels < 1 or self.classes < 2:
            raise ValueError(
                f"network: expected at least 1 channel and 2 classes, got {self.channels} channels and {self.classes} classes"
            )
        if not 0.0 < self.norm_momentum <= 1.0:
            raise ValueError(f"network.norm_momentum: expected a share in (0, 1], got {self.norm_momentum}")

    @property
    def multiple(self) -> int:
        """What height and width of a map must divide by."""
        return DeepLab.multiple if self.name == "deeplab" else 2 ** (len(self.tiramisu.blocks) - 1)


def build(config: NetworkConfig) -> nn.Module:
    """The network, freshly initialised from torch's current seed; `.multiple` is what height and width must divide by."""
    if config.name == "tiramisu":
        return Tiramisu(config.channels, config.classes, config.tiramisu, config.norm, config.norm_momentum, config.pole)
    return DeepLab(config.channels, config.classes, config.deeplab, config.norm, config.norm_momentum, config.pole)

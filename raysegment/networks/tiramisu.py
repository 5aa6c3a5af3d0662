"""Tiramisu, the paper's variant: dense blocks on the way down and up, few channels, everything at full resolution.

Layer order and strides as in ClimDeepLearn (`tiramisu_model.py`, Kurth et al. 2018): convolution → norm → ReLU →
dropout, strided 1×1 convolutions down, transposed convolutions up, and only the new maps of a block go up. At
16×768×1152 the default is 4.188 TFLOP per training sample and 7.5 M parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raysegment.networks.blocks import Conv, Unit, Up, check_size, drop, join


@dataclass(frozen=True)
class TiramisuConfig:
    """Size of a Tiramisu: `first` filters, `growth` new maps per layer, layers per block (the last is the bottom)."""

    first: int = 64
    growth: int = 32
    kernel: int = 5
    blocks: tuple[int, ...] = (2, 2, 2, 4, 5)
    dropout: float = 0.2
    dropout_on_logits: bool = False  # the 2018 code dropped logits, too

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for name, least in (("first", 1), ("growth", 1), ("kernel", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"tiramisu.{name}: expected at least {least}, got {getattr(self, name)}")
        if self.kernel % 2 == 0:
            raise ValueError(f"tiramisu.kernel: expected an odd number, got {self.kernel}; an even kernel shifts the map")
        if len(self.blocks) < 2 or min(self.blocks) < 1:
            raise ValueError(f"tiramisu.blocks: expected two or more counts of at least 1, got {self.blocks}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"tiramisu.dropout: expected a probability in [0, 1), got {self.dropout}")


class DenseBlock(nn.Module):
    """Layers that each read everything before them: (B, C, H, W) → (B, C + n·growth, H, W), or only the n·growth new maps."""

    def __init__(self, inputs: int, layers: int, keep: bool, config: TiramisuConfig, kind: str, momentum: float, pole: str):
        super().__init__()
        self.keep, self.reach = keep, config.kernel // 2
        self.layers = nn.ModuleList(
            Unit(
                Conv(inputs + i * config.growth, config.growth, config.kernel, bias=kind != "batch", pole=pole),
                kind, momentum, config.dropout,
            )
            for i in range(layers)
        )  # fmt: skip
        self.outputs = inputs * keep + layers * config.growth

    def forward(self, pieces: list[Tensor]) -> Tensor:
        width = pieces[0].shape[3]
        running = join(pieces, width, self.reach)  # (B, C, H, W + 2·reach): the halo is kept through the block
        new: list[Tensor] = []
        for layer in self.layers:
            assert isinstance(layer, Unit)
            if new:
                running = join([running, new[-1]], width, self.reach)  # (B, C + i·growth, H, W + 2·reach)
            assert isinstance(layer.conv, Conv)
            new.append(layer.finish(layer.conv.wrapped(running)))  # (B, growth, H, W)
        return join([running, new[-1]] if self.keep else new, width)  # (B, outputs, H, W)


class Tiramisu(nn.Module):
    """`fields (B, C, H, W)` → `logits (B, K, H, W)`; H and W divide by `multiple`."""

    def __init__(self, channels: int, classes: int, config: TiramisuConfig, kind: str, momentum: float, pole: str):
        super().__init__()
        self.multiple = 2 ** (len(config.blocks) - 1)
        self.logit_dropout = config.dropout if config.dropout_on_logits else 0.0
        bias, drop = kind != "batch", config.dropout

        def unit(conv: Conv) -> Unit:
            return Unit(conv, kind, momentum, drop)

        def block(inputs: int, layers: int, keep: bool) -> DenseBlock:
            return DenseBlock(inputs, layers, keep, config, kind, momentum, pole)

        self.enter = unit(Conv(channels, config.first, config.kernel, bias=bias, pole=pole))
        self.down, self.shrink, skips, width = nn.ModuleList(), nn.ModuleList(), [], config.first
        for layers in config.blocks[:-1]:
            self.down.append(block(width, layers, keep=True))
            width += layers * config.growth
            skips.append(width)
            self.shrink.append(unit(Conv(width, width, 1, stride=2, bias=bias)))
        self.bottom = block(width, config.blocks[-1], keep=False)
        self.grow, self.up, width = nn.ModuleList(), nn.ModuleList(), self.bottom.outputs
        for level in reversed(range(len(skips))):
            self.grow.append(Up(width, width, bias=True))
            ascent = block(width + skips[level], config.blocks[level], keep=level == 0)
            self.up.append(ascent)
            width = ascent.outputs
        self.leave = Conv(width, classes, 1, bias=True)

    def forward(self, fields: Tensor) -> Tensor:
        check_size(fields, self.multiple)
        maps = self.enter(fields.contiguous(memory_format=torch.channels_last))  # (B, first, H, W)
        skips: list[Tensor] = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(block([maps]))  # (B, C + n·growth, H/2ⁱ, W/2ⁱ)
            maps = shrink(skips[-1])  # (B, C + n·growth, H/2ⁱ⁺¹, W/2ⁱ⁺¹)
        maps = self.bottom([maps])  # (B, n·growth, H/multiple, W/multiple)
        for grow, block in zip(self.grow, self.up, strict=True):
            maps = grow(maps)  # (B, n·growth, H/2ⁱ, W/2ⁱ)
            maps = block([maps, skips.pop()])  # (B, n·growth, H/2ⁱ, W/2ⁱ); at the top the full tensor
        logits = self.leave(maps)  # (B, K, H, W)
        return drop(logits, self.logit_dropout, self.training)

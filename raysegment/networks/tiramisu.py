"""Tiramisu, the paper's variant: dense blocks on the way down and up, few channels, everything at full resolution.

Layer order and strides as in ClimDeepLearn (`tiramisu_model.py`, Kurth et al. 2018): convolution → norm → ReLU →
dropout, strided 1×1 convolutions down, transposed convolutions up, and only the new maps of a block go up. At
16×768×1152 the default is 4.188 TFLOP per training sample and 7.5 M parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from raysegment.networks.blocks import Conv, Map, Unit, Up, anchor, check_size, drop, enter, plain, recomputed, turn


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
    """Layers that each read everything before them: maps of ΣC channels → their n·growth new ones, as n maps."""

    def __init__(self, inputs: int, layers: int, config: TiramisuConfig, kind: str, momentum: float, pole: str):
        super().__init__()
        self.layers = nn.ModuleList(
            Unit(
                Conv(inputs + i * config.growth, config.growth, config.kernel, bias=kind != "batch", pole=pole),
                kind, momentum, config.dropout,
            )
            for i in range(layers)
        )  # fmt: skip

    def forward(self, pieces: list[Map]) -> list[Map]:
        new: list[Map] = []
        for layer in self.layers:
            new.append(layer(*pieces, *new))  # (B, ΣC + i·growth, H, W) → (B, growth, H, W)
        return new


class Tiramisu(nn.Module):
    """`fields (B, C, H, W)` → `logits (B, K, H, W)`; H and W divide by `multiple`.

    What is farther than `reach` cells away, along either axis, has no part in a logit.
    """

    def __init__(self, channels: int, classes: int, config: TiramisuConfig, kind: str, momentum: float, pole: str):
        super().__init__()
        self.multiple = 2 ** (len(config.blocks) - 1)
        self.reach = _reach(config)
        self.engine, self.checkpointing, self.pole = "auto", False, pole
        self.logit_dropout = config.dropout if config.dropout_on_logits else 0.0
        bias, drop = kind != "batch", config.dropout

        def unit(conv: Conv) -> Unit:
            return Unit(conv, kind, momentum, drop)

        def block(inputs: int, layers: int) -> DenseBlock:
            return DenseBlock(inputs, layers, config, kind, momentum, pole)

        self.enter = unit(Conv(channels, config.first, config.kernel, bias=bias, pole=pole))
        self.down, self.shrink, skips, width = nn.ModuleList(), nn.ModuleList(), [], config.first
        for layers in config.blocks[:-1]:
            self.down.append(block(width, layers))
            width += layers * config.growth
            skips.append(width)
            self.shrink.append(unit(Conv(width, width, 1, stride=2, bias=bias)))
        self.bottom = block(width, config.blocks[-1])
        self.grow, self.up, inputs, width = nn.ModuleList(), nn.ModuleList(), 0, config.blocks[-1] * config.growth
        for level in reversed(range(len(skips))):
            self.grow.append(Up(width, width, bias=True))
            inputs, layers = width + skips[level], config.blocks[level]
            self.up.append(block(inputs, layers))
            width = layers * config.growth
        self.leave = Conv(inputs + width, classes, 1, bias=True)

    def forward(self, fields: Tensor, columns: Tensor | None = None) -> Tensor:
        """`columns (B,)`: where the strides start, if not where `anchor` says (a piece starts where its map does)."""
        check_size(fields.shape[2], fields.shape[3], self.multiple)
        columns = anchor(fields, self.multiple) if columns is None else columns
        entered = enter(turn(fields, columns), self.engine, self.pole)  # (B, C, H, W)
        maps = [self.enter(entered)]  # (B, first, H, W)
        skips: list[list[Map]] = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            skips.append([*maps, *recomputed(block, self.checkpointing, block, maps)])  # (B, C + n·growth, H/2ⁱ, W/2ⁱ)
            maps = [shrink(*skips[-1])]  # (B, C + n·growth, H/2ⁱ⁺¹, W/2ⁱ⁺¹)
        new = recomputed(self.bottom, self.checkpointing, self.bottom, maps)  # (B, n·growth, H/multiple, W/multiple)
        for grow, block in zip(self.grow, self.up, strict=True):
            wide = plain(grow(*new), entered)  # (B, n·growth, H/2ⁱ, W/2ⁱ)
            maps = [wide, *skips.pop()]  # (B, n·growth + skip, H/2ⁱ, W/2ⁱ)
            new = recomputed(block, self.checkpointing, block, maps)  # (B, n·growth, H/2ⁱ, W/2ⁱ)
        logits = self.leave(*maps, *new)  # (B, n·growth + skip + n·growth, H, W) → (B, K, H, W)
        return turn(drop(logits, self.logit_dropout, self.training), -columns)


def _reach(config: TiramisuConfig) -> int:
    """Half of what a logit sees, in cells of the map: each of n k×k layers at stride s adds s·(k − 1)/2, on the way down and up,
    each transposed convolution a cell of the coarser map."""
    half, bottom = config.kernel // 2, len(config.blocks) - 1
    layers = sum(2 * count * half * 2**level for level, count in enumerate(config.blocks[:-1]))
    return half + layers + config.blocks[-1] * half * 2**bottom + sum(2 ** (level + 1) for level in range(bottom))

"""DeepLabv3+, the paper's variant: ResNet-50 v2 at output stride 8, wide pyramid pooling, a decoder at full resolution.

As in ClimDeepLearn (`deeplab_model.py`, decoder "deconv1x", Kurth et al. 2018): strides in the last unit of a block, the
raw output of block 4, dilations 12, 24, 36. At 16×768×1152 the default is 13.02 TFLOP per training sample (the paper's
14.41 counts TensorFlow's padding of dilated convolutions) and 43.7 M parameters. The image pooling has an affine and no
norm, whose statistics over one pixel per sample would be noise (MLPerf HPC v1.0 does the same).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysegment.networks.blocks import (
    Conv,
    Map,
    Unit,
    Up,
    anchor,
    check_size,
    enter,
    extend,
    norm,
    plain,
    recomputed,
    rectify,
    tensor,
    turn,
)


@dataclass(frozen=True)
class DeepLabConfig:
    """Size of a DeepLabv3+: all widths follow `width` (64 in ResNet-50); `blocks` are residual units per stage."""

    width: int = 64
    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    rates: tuple[int, ...] = (12, 24, 36)
    linear_tail: bool = False  # 2018: no norm and no activation from the transposed convolutions on

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "rates", tuple(self.rates))
        if self.width < 4 or self.width % 4:
            raise ValueError(f"deeplab.width: expected a multiple of 4, got {self.width}")
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"deeplab.blocks: expected four counts of at least 1, got {self.blocks}")
        if not self.rates or min(self.rates) < 1:
            raise ValueError(f"deeplab.rates: expected one or more dilations of at least 1, got {self.rates}")


@dataclass(frozen=True)
class _Kind:
    """What every layer is told alike."""

    norm: str
    momentum: float
    pole: str

    def unit(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> Unit:
        conv = Conv(inputs, outputs, kernel, stride=stride, dilation=dilation, bias=self.norm != "batch", pole=self.pole)
        return Unit(conv, self.norm, self.momentum)

    def linear(self, inputs: int, outputs: int, kernel: int) -> Conv:
        return Conv(inputs, outputs, kernel, bias=True, pole=self.pole)


class Bottleneck(nn.Module):
    """ResNet v2 unit: norm and ReLU first; (B, C, H, W) → (B, 4·base, H/stride, W/stride)."""

    def __init__(self, inputs: int, base: int, stride: int, dilation: int, kind: _Kind):
        super().__init__()
        self.stride = stride
        self.before = norm(kind.norm, inputs, kind.momentum)
        self.reduce = kind.unit(inputs, base, 1)
        self.spread = kind.unit(base, base, 3, stride, dilation)
        self.expand = kind.linear(base, 4 * base, 1)
        self.shortcut = None if inputs == 4 * base else kind.linear(inputs, 4 * base, 1)
        assert self.shortcut is None or stride == 1, "slim changes channels in the first unit and size in the last"

    def forward(self, maps: Map) -> tuple[Map, Map]:
        """The unit's output, and its first 1×1's (which the decoder takes as low-level features)."""
        active = rectify(maps, self.before)
        low = self.reduce(active)  # (B, base, H, W)
        same = tensor(maps)[..., :: self.stride, :: self.stride] if self.shortcut is None else self.shortcut(active)
        return plain(same + self.expand(self.spread(low)), maps), low  # (B, 4·base, H/stride, W/stride)


class Encoder(nn.Module):
    """ResNet-50 v2, output stride 8: (B, C, H, W) → (B, 32·width, H/8, W/8) and low-level (B, width, H/4, W/4)."""

    def __init__(self, channels: int, config: DeepLabConfig, kind: _Kind):
        super().__init__()
        self.root = Conv(channels, config.width, 7, stride=2, bias=True, pole=kind.pole)
        self.stages, inputs = nn.ModuleList(), config.width
        for stage, (units, dilation) in enumerate(zip(config.blocks, (1, 1, 2, 4), strict=True)):
            base = config.width * 2**stage
            for unit in range(units):
                last = stage == 0 and unit == units - 1
                self.stages.append(Bottleneck(inputs, base, 2 if last and unit else 1, dilation, kind))
                inputs = 4 * base
        self.low_unit, self.outputs = config.blocks[0] - 1, inputs
        self.lone = config.blocks[0] == 1  # a first stage of one unit cannot both widen and shrink: it shrinks after

    def forward(self, fields: Map) -> tuple[Map, Map]:
        root = self.root(fields)  # (B, width, H/2, W/2)
        maps = low = plain(F.max_pool2d(extend(root, 1), 3, 2, (1, 0)), fields)  # (B, width, H/4, W/4)
        for index, unit in enumerate(self.stages):
            maps, reduced = unit(maps)  # (B, 4·base, H/8, W/8) from the first stage's last unit on
            if index == self.low_unit:
                low = reduced  # (B, width, H/4, W/4)
                maps = plain(tensor(maps)[..., ::2, ::2], fields) if self.lone else maps  # (B, 4·width, H/8, W/8)
        return maps, low


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: (B, C, h, w) → (B, depth, h, w)."""

    def __init__(self, inputs: int, depth: int, rates: tuple[int, ...], kind: _Kind):
        super().__init__()
        self.near = kind.unit(inputs, depth, 1)
        self.far = nn.ModuleList(kind.unit(inputs, depth, 3, dilation=rate) for rate in rates)
        self.image = kind.linear(inputs, depth, 1)
        self.merge = kind.unit((2 + len(rates)) * depth, depth, 1)

    def forward(self, maps: Map) -> Map:
        whole = tensor(maps)
        wide = torch.promote_types(whole.dtype, torch.float32)  # a sum over the whole map
        mean = plain(whole.mean((2, 3), keepdim=True, dtype=wide), maps)  # (B, C, 1, 1)
        image = F.relu(self.image(mean)).to(whole.dtype).expand(-1, -1, *whole.shape[2:])  # (B, depth, h, w)
        views = [self.near(maps), *(far(maps) for far in self.far), plain(image, maps)]
        return self.merge(*views)  # (B, (2 + rates)·depth, h, w) → (B, depth, h, w)


class Decoder(nn.Module):
    """Back to full resolution, with the input itself joined in: → logits (B, K, H, W)."""

    def __init__(self, channels: int, classes: int, config: DeepLabConfig, kind: _Kind):
        super().__init__()
        wide, detail = 4 * config.width, 3 * config.width // 4

        def conv(inputs: int, outputs: int) -> Unit:
            if config.linear_tail:
                return Unit(kind.linear(inputs, outputs, 3), "none", 1.0, relu=False)
            return kind.unit(inputs, outputs, 3)

        def up() -> Unit:
            tconv = Up(wide, wide, bias=config.linear_tail or kind.norm != "batch")
            return Unit(tconv, "none", 1.0, relu=False) if config.linear_tail else Unit(tconv, kind.norm, kind.momentum)

        self.low = kind.unit(config.width, detail, 1)
        self.to_quarter = up()
        self.quarter = nn.ModuleList([kind.unit(wide + detail, wide, 3), kind.unit(wide, wide, 3)])
        self.to_half, self.to_full = up(), up()
        self.input = nn.Sequential(conv(channels, config.width), conv(config.width, 2 * config.width))
        self.full = nn.ModuleList([conv(wide + 2 * config.width, wide), conv(wide, wide)])
        self.leave = kind.linear(wide, classes, 1)

    def rise(self, maps: Map, low: Map, fields: Map) -> Map:
        """Up to full resolution and through the first convolution there: (B, 4·width, H, W)."""
        maps = self.to_quarter(maps)  # (B, 4·width, H/4, W/4)
        maps = self.quarter[0](maps, self.low(low))  # (B, 4·width + detail, H/4, W/4) → (B, 4·width, H/4, W/4)
        maps = self.quarter[1](maps)  # (B, 4·width, H/4, W/4)
        maps = self.to_half(maps)  # (B, 4·width, H/2, W/2)
        maps = self.to_full(maps)  # (B, 4·width, H, W)
        return self.full[0](maps, self.input(fields))  # (B, 6·width, H, W) → (B, 4·width, H, W)

    def finish(self, maps: Map) -> Tensor:
        """The last convolutions: logits (B, K, H, W)."""
        return self.leave(self.full[1](maps))  # (B, 4·width, H, W) → (B, K, H, W)


class DeepLab(nn.Module):
    """`fields (B, C, H, W)` → `logits (B, K, H, W)`; H and W divide by 8. Every logit sees the whole map, through its mean."""

    multiple = 8
    reach = None

    def __init__(self, channels: int, classes: int, config: DeepLabConfig, norm: str, momentum: float, pole: str):
        super().__init__()
        self.engine, self.checkpointing, self.pole = "auto", False, pole
        kind = _Kind(norm, momentum, pole)
        self.encoder = Encoder(channels, config, kind)
        self.pyramid = Pyramid(self.encoder.outputs, 4 * config.width, config.rates, kind)
        self.decoder = Decoder(channels, classes, config, kind)

    def forward(self, fields: Tensor, columns: Tensor | None = None) -> Tensor:
        """`columns (B,)`: where the strides start, if not where `anchor` says."""
        check_size(fields.shape[2], fields.shape[3], self.multiple)
        columns = anchor(fields, self.multiple) if columns is None else columns
        entered = enter(turn(fields, columns), self.engine, self.pole)  # (B, C, H, W)
        again = self.checkpointing
        maps, low = recomputed(self.encoder, again, self.encoder, entered)  # (B, 32·width, H/8, W/8), (B, width, H/4, W/4)
        maps = recomputed(self.pyramid, again, self.pyramid, maps)  # (B, 4·width, H/8, W/8)
        maps = recomputed(self.decoder, again, self.decoder.rise, maps, low, entered)  # (B, 4·width, H, W)
        logits = self.decoder.finish(maps)  # (B, K, H, W)
        return turn(logits, -columns)

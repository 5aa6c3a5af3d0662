"""What both networks are made of: convolutions for which longitude is a circle and the poles are ends.

A map (…, H, W) is extended in longitude by its own far side before every convolution (`join`), and in latitude by zeros
(or by its own first and last row, `pole="replicate"`), so nothing ever flows across a pole. Tensors are kept in
channels_last memory, where oneDNN and cuDNN are fast; the copies are written by hand because autograd's own backward of
`cat` and `pad` is slower than the convolution itself in that layout on CPUs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POLES = ("zeros", "replicate")
NORMS = ("batch", "none", "half")


def choose(what: str, name: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that names the choices, and the likeliest one, unless `name` is one of them."""
    if name not in choices:
        close = difflib.get_close_matches(str(name), choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of these."
        raise ValueError(f"{what}: expected one of {', '.join(choices)}, got {name!r}; {hint}")


def check_size(fields: Tensor, multiple: int) -> None:
    """Raise a ValueError naming the sizes that do, unless height and width divide by the network's multiple."""
    height, width = fields.shape[-2:]
    if height % multiple or width % multiple or not height or not width:
        near = [f"{side} or {side + multiple}" for side in (max(s // multiple, 1) * multiple for s in (height, width))]
        raise ValueError(
            f"fields: expected height and width divisible by {multiple}, got {height} × {width}; "
            f"nearest that do: height {near[0]}, width {near[1]}"
        )


def _empty(like: Tensor, channels: int, width: int) -> Tensor:
    batch, _, height, _ = like.shape
    return torch.empty((batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class _Join(torch.autograd.Function):
    """`join` with a backward that reads every gradient once."""

    @staticmethod
    def forward(ctx, width: int, reach: int, *pieces: Tensor) -> Tensor:
        ctx.width, ctx.reach, ctx.shapes = width, reach, [piece.shape for piece in pieces]
        joined, start = _empty(pieces[0], sum(p.shape[1] for p in pieces), width + 2 * reach), 0
        for piece in pieces:
            part = joined[:, start : start + piece.shape[1]]
            start += piece.shape[1]
            halo = (piece.shape[3] - width) // 2
            if halo >= reach:
                part.copy_(piece[..., halo - reach : halo + width + reach])
            else:
                core = piece[..., halo : halo + width]
                part[..., reach : reach + width].copy_(core)
                part[..., :reach].copy_(core[..., width - reach :])
                part[..., reach + width :].copy_(core[..., :reach])
        return joined

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,), width, reach, start = grads, ctx.width, ctx.reach, 0
        parts: list[Tensor | None] = []
        for shape in ctx.shapes:
            part = grad[:, start : start + shape[1]]
            start += shape[1]
            halo = (shape[3] - width) // 2
            if halo == reach:
                parts.append(part.contiguous(memory_format=torch.channels_last))
            elif halo > reach:
                whole = _empty(part, shape[1], shape[3]).zero_()
                whole[..., halo - reach : halo + width + reach].copy_(part)
                parts.append(whole)
            else:
                assert halo == 0, "a halo is widened only from none"
                core = part[..., reach : reach + width].contiguous(memory_format=torch.channels_last)
                core[..., width - reach :] += part[..., :reach]
                core[..., :reach] += part[..., reach + width :]
                parts.append(core)
        return None, None, *parts


def join(pieces: Sequence[Tensor], width: int, reach: int = 0) -> Tensor:
    """Concatenated channels (B, ΣC, H, width + 2·reach), extended circularly in longitude by `reach` columns on each side.

    Each piece is (B, C, H, width + 2·halo) with a halo of its own (0, or one already of the right kind); wider halos are cut.
    """
    if reach > width:  # more than one turn (large dilation on a small map): by index, any number of turns
        columns = torch.arange(-reach, width + reach, device=pieces[0].device) % width
        return torch.cat([p.index_select(3, columns + (p.shape[3] - width) // 2) for p in pieces], dim=1)
    if len(pieces) == 1 and pieces[0].shape[3] == width + 2 * reach:
        return pieces[0]
    return _Join.apply(width, reach, *pieces)  # type: ignore[no-any-return]


class Conv(nn.Conv2d):
    """k×k convolution (B, C, H, W) → (B, C', H/stride, W/stride), circular in longitude.

    `wrapped(…)` takes a map that already has its halo of `reach` columns. He-uniform initialisation as in the 2018 code.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, bias: bool = False,
                 pole: str = "zeros"):
        assert kernel % 2 == 1, "odd kernels only: the map must not shift"
        self.reach, self.pole = dilation * (kernel // 2), pole
        padding = self.reach if pole == "zeros" else 0
        super().__init__(inputs, outputs, kernel, stride, (padding, 0), dilation, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.wrapped(join([input], input.shape[3], self.reach))

    def wrapped(self, fields: Tensor) -> Tensor:
        if self.pole == "replicate" and self.reach:
            fields = F.pad(fields, (0, 0, self.reach, self.reach), mode="replicate")
        return super().forward(fields)


class Up(nn.ConvTranspose2d):
    """3×3 transposed convolution (B, C, H, W) → (B, C', 2H, 2W), circular in longitude.

    With one more column of the circle on either side, output column 2W + 3 of the plain transposed convolution is
    longitude 0 again, so padding 3 (and one extra column at the end) cuts exactly the turn out of it.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        super().__init__(inputs, outputs, 3, 2, padding=(1, 3), output_padding=(1, 1), bias=bias)

    def reset_parameters(self) -> None:
        # each output pixel sees 9/4 taps on average: fan_in = inputs · 9/4
        bound = (6.0 / (self.in_channels * 9 / 4)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(join([input], input.shape[3], 1), output_size)


def drop(fields: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout. On CPUs one random byte decides about a value (probability in steps of 1/256), 8 × as fast as torch's."""
    if not training or not probability:
        return fields
    if fields.device.type != "cpu":
        return F.dropout(fields, probability)
    batch, channels, height, width = fields.shape
    words = torch.empty(-(-fields.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    bytes_ = words.view(torch.uint8)[: fields.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2)
    lost = max(1, min(255, round(256 * probability)))
    return fields * (bytes_ >= lost).to(fields.dtype).mul_(256 / (256 - lost))


class Half(nn.Module):
    """x/2 in place of batch norm: what the 2018 code did to keep float16 in range."""

    def forward(self, fields: Tensor) -> Tensor:
        return fields * 0.5


def norm(kind: str, channels: int, momentum: float) -> nn.Module:
    """The normalisation called `kind`: "batch" (trains best), "none" or "half" (both 2018)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels, momentum=momentum)
    return Half() if kind == "half" else nn.Identity()


class Unit(nn.Module):
    """convolution → norm → ReLU → dropout, the order of the 2018 code. Takes and gives (B, C, H, W)."""

    def __init__(self, conv: Conv | Up, kind: str, momentum: float, dropout: float = 0.0, relu: bool = True):
        super().__init__()
        self.conv, self.norm = conv, norm(kind, conv.out_channels, momentum)
        self.relu, self.dropout = relu, dropout

    def finish(self, fields: Tensor) -> Tensor:
        """Norm, ReLU and dropout of a convolution's result."""
        fields = self.norm(fields)
        if self.relu:
            fields = F.relu(fields, inplace=not isinstance(self.norm, nn.Identity))
        return drop(fields, self.dropout, self.training)

    def forward(self, fields: Tensor) -> Tensor:
        return self.finish(self.conv(fields))

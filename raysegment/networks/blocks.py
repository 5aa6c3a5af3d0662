"""What both networks are made of: convolutions for which longitude is a circle and the poles are ends.

A map (…, H, W) is extended in longitude by its own far side before every convolution, and in latitude by zeros (or by its
own first and last row, `pole="replicate"`), so nothing ever flows across a pole.

Every module takes and gives maps in one of two forms, whichever the network was entered with (`enter`): plain tensors, for
torch as it is, on any device; or deferred maps (`deferred`), which a CPU computes band by band in cache. Both give the
same numbers up to rounding, and draw the same dropout.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysegment.networks.convolutions import convolution, doubling
from raysegment.networks.deferred import Deferred, Moments, activate, moments
from raysegment.networks.kernels import Geometry

POLES = ("zeros", "replicate")
NORMS = ("batch", "none", "half")
ENGINES = ("auto", "plain", "deferred")

Map = Tensor | Deferred


def choose(what: str, name: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that names the choices, and the likeliest one, unless `name` is one of them."""
    if name not in choices:
        close = difflib.get_close_matches(str(name), choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of these."
        raise ValueError(f"{what}: expected one of {', '.join(choices)}, got {name!r}; {hint}")


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise a ValueError naming the sizes that do, unless height and width divide by the network's multiple."""
    if height % multiple or width % multiple or not height or not width:
        near = [f"{side} or {side + multiple}" for side in (max(s // multiple, 1) * multiple for s in (height, width))]
        raise ValueError(
            f"fields: expected height and width divisible by {multiple}, got {height} × {width}; "
            f"nearest that do: height {near[0]}, width {near[1]}"
        )


def enter(fields: Tensor, engine: str, pole: str) -> Map:
    """Fields (B, C, H, W) in the form in which the network computes, in the type that autocast asks for.

    "auto" is deferred on CPUs, plain elsewhere, for other poles than zeros, and where torch traces or only counts.
    """
    fields = fields.contiguous(memory_format=torch.channels_last)
    able = fields.device.type == "cpu" and pole == "zeros" and not torch.compiler.is_compiling()
    if engine == "plain" or not able:
        return fields
    short = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else fields.dtype
    return Deferred(fields.to(short))


def anchor(fields: Tensor, multiple: int) -> Tensor:
    """Columns (B,) in [0, multiple) by which each map is turned before a network that samples every `multiple`-th column.

    Strides see a map rotated by one column as another map. Which columns they sample is therefore decided by the map
    itself, those of the largest Σ|x| (adaptive polyphase sampling, Chaman and Dokmanić 2021): a map rotated by any number
    of columns gives the rotated logits.
    """
    size = fields.detach().abs().sum((1, 2), dtype=torch.float64)  # (B, W)
    return size.view(len(fields), -1, multiple).sum(1).argmax(1)


def turn(maps: Tensor, columns: Tensor) -> Tensor:
    """Maps (B, C, H, W) rotated westward by `columns` (B,) of their own."""
    if maps.device.type == "cpu" and not torch.compiler.is_compiling():
        turned = [one.roll(-shift, 3) if shift else one for one, shift in zip(maps.split(1), columns.tolist(), strict=True)]
        return torch.cat(turned) if len(turned) > 1 else turned[0]
    index = (torch.arange(maps.shape[3], device=maps.device) + columns[:, None]) % maps.shape[3]  # (B, W); no word to the host
    return maps.gather(3, index[:, None, None, :].expand_as(maps))


def recomputed(module: nn.Module, wanted: bool, function: Callable[..., Any], *maps: Any) -> Any:
    """function(*maps), of which nothing is kept for backward if `wanted`: it is computed again there.

    The second time, `module`'s running statistics stay as they are and dropout draws the same.
    """
    if not wanted or not torch.is_grad_enabled():
        return function(*maps)
    contexts = lambda: (nullcontext(), _statistics_kept(module))
    return checkpoint(function, *maps, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, (momentum, count) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count


def tensor(maps: Map) -> Tensor:
    """The activated map as an ordinary tensor."""
    return maps.tensor() if isinstance(maps, Deferred) else maps


def plain(maps: Tensor, like: Map) -> Map:
    """An ordinary tensor in the form of `like`."""
    return Deferred(maps.to(like.raw.dtype)) if isinstance(like, Deferred) else maps


class Conv(nn.Conv2d):
    """k×k convolution of joined maps (B, ΣC, H, W) → (B, C', H/stride, W/stride), circular in longitude.

    He-uniform initialisation as in the 2018 code.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, dilation: int = 1, bias: bool = False,
                 pole: str = "zeros"):
        assert kernel % 2 == 1, "odd kernels only: the map must not shift"
        self.how, self.pole = Geometry(kernel, stride, dilation), pole
        super().__init__(inputs, outputs, kernel, stride, 0, dilation, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, *pieces: Map) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.with_moments(pieces, False)[0]

    def with_moments(self, pieces: Sequence[Map], wanted: bool) -> tuple[Tensor, Moments | None]:
        """The convolution, and the moments of its result where they are wanted and come for nothing."""
        if isinstance(pieces[0], Deferred):
            return convolution(pieces, self.weight, self.bias, self.how, wanted)  # type: ignore[arg-type]
        joined, reach = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0], self.how.reach  # type: ignore[arg-type]
        if reach:
            joined = extend(joined, reach)
            mode = {"zeros": "constant", "replicate": "replicate"}[self.pole]
            joined = F.pad(joined, (0, 0, reach, reach), mode=mode)
        return super().forward(joined), None


def extend(maps: Tensor, reach: int) -> Tensor:
    """A map with `reach` more columns on either side, around the circle (any number of turns): (B, C, H, W + 2·reach)."""
    if reach <= maps.shape[3]:
        return F.pad(maps, (reach, reach, 0, 0), mode="circular")
    width, turns = maps.shape[3], -(-reach // maps.shape[3])
    return torch.cat([maps] * (2 * turns + 1), 3)[..., turns * width - reach : (turns + 1) * width + reach]


class Up(nn.ConvTranspose2d):
    """3×3 transposed convolution (B, C, H, W) → (B, C', 2H, 2W), circular in longitude."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        super().__init__(inputs, outputs, 3, 2, padding=(1, 0), output_padding=(1, 0), bias=bias)

    def reset_parameters(self) -> None:
        # each output pixel sees 9/4 taps on average: fan_in = inputs · 9/4
        bound = (6.0 / (self.in_channels * 9 / 4)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, *pieces: Map) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.with_moments(pieces, False)[0]

    def with_moments(self, pieces: Sequence[Map], wanted: bool) -> tuple[Tensor, Moments | None]:
        """The transposed convolution, and the moments of its result where they are wanted and come for nothing."""
        if isinstance(pieces[0], Deferred):
            return doubling(pieces, self.weight, self.bias, wanted)  # type: ignore[arg-type]
        joined = torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]  # type: ignore[arg-type]
        wide = F.conv_transpose2d(joined, self.weight, None, 2, (1, 0), (1, 0))  # (B, C', 2H, 2W + 1): column −1 comes first
        turned = torch.cat((wide[..., 1:-1], wide[..., -1:] + wide[..., :1]), 3)  # column −1 is column 2W − 1
        return (turned if self.bias is None else turned + self.bias[:, None, None].to(turned.dtype)), None


def keep_mask(like: Tensor, probability: float) -> Tensor:
    """0 or 1/(1 − p) per value, in the shape and type of `like`.

    On CPUs one random byte decides about a value (probability in steps of 1/256), 8 × as fast as torch's dropout.
    """
    if like.device.type != "cpu":
        return F.dropout(torch.ones_like(like), probability)
    batch, channels, height, width = like.shape
    words = torch.empty(-(-like.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    bytes_ = words.view(torch.uint8)[: like.numel()].view(batch, height, width, channels).permute(0, 3, 1, 2)
    lost = max(1, min(255, round(256 * probability)))
    return (bytes_ >= lost).to(like.dtype).mul_(256 / (256 - lost))


def drop(fields: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout of an ordinary tensor."""
    return fields * keep_mask(fields, probability) if training and probability else fields


class Half(nn.Module):
    """x/2 in place of batch norm: what the 2018 code did to keep float16 in range."""

    factor = 0.5

    def forward(self, fields: Tensor) -> Tensor:
        return fields * self.factor


def norm(kind: str, channels: int, momentum: float) -> nn.Module:
    """The normalisation called `kind`: "batch" (trains best), "none" or "half" (both 2018)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels, momentum=momentum)
    return Half() if kind == "half" else nn.Identity()


def rectify(maps: Map, layer: nn.Module) -> Map:
    """Norm and ReLU of a map that has been computed elsewhere."""
    if not isinstance(maps, Deferred):
        return F.relu(layer(maps))
    raw = maps.raw
    return activate(raw, layer, True, None, moments(raw) if _by_batch(layer) else None)


def _by_batch(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm2d) and layer.training


class Unit(nn.Module):
    """convolution → norm → ReLU → dropout, the order of the 2018 code. Takes maps to join, gives (B, C', H', W')."""

    def __init__(self, conv: Conv | Up, kind: str, momentum: float, dropout: float = 0.0, relu: bool = True):
        super().__init__()
        self.conv, self.norm = conv, norm(kind, conv.out_channels, momentum)
        self.relu, self.dropout = relu, dropout

    def forward(self, *pieces: Map) -> Map:
        raw, found = self.conv.with_moments(pieces, _by_batch(self.norm))
        dropping = self.training and self.dropout > 0
        if isinstance(pieces[0], Deferred):
            kept = keep_mask(raw, self.dropout) if dropping else None
            return activate(raw, self.norm, self.relu, kept, found)
        fields = self.norm(raw)
        fields = F.relu(fields) if self.relu else fields
        return drop(fields, self.dropout, dropping)

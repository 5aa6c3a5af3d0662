"""Convolutions that read deferred maps and give raw ones, band by band, with gradients that do the same.

The gradient of what a convolution read is a convolution again, with the kernel turned around; the gradient of the weights
is summed over bands in float32, from maps that are activated a second time instead of having been kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raysegment.networks.bands import Band, bands
from raysegment.networks.deferred import (
    CHANNELS_LAST,
    Deferred,
    Moments,
    Recipe,
    Tally,
    channel_sums,
    gather,
    new_map,
    outside_autocast,
)
from raysegment.networks.kernels import Geometry, convolve, weight_gradient, wide


def _apply(function: type[torch.autograd.Function], call: _Call, pieces: Sequence[Deferred], weight: Tensor, bias: Tensor | None):
    return function.apply(call, weight, bias, *(p.raw for p in pieces), *(p.kept for p in pieces))


def _save(ctx: Any, call: _Call, weight: Tensor, bias: Tensor | None, maps: Sequence[Tensor | None]) -> list[Deferred]:
    """Keep what backward needs; the pieces that maps (raws, then masks) and the call's recipes make."""
    ctx.call, ctx.bias = call, bias is not None
    ctx.save_for_backward(weight, *maps)
    return _pieces(call, maps)


def _pieces(call: _Call, maps: Sequence[Tensor | None]) -> list[Deferred]:
    count = len(call.recipes)
    return [Deferred(*parts) for parts in zip(maps[:count], call.recipes, maps[count:], strict=True)]  # type: ignore[arg-type]


class _Convolution(torch.autograd.Function):
    @outside_autocast
    def forward(ctx: Any, call: _Call, weight: Tensor, bias: Tensor | None, *maps: Tensor | None) -> Tensor:
        return call.forward(_save(ctx, call, weight, bias, maps), weight, bias)

    @outside_autocast
    def backward(ctx: Any, grad: Tensor):
        weight, *maps = ctx.saved_tensors
        pieces, (_, need_weight, need_bias, *need) = _pieces(ctx.call, maps), ctx.needs_input_grad
        grad = grad.contiguous(memory_format=CHANNELS_LAST)
        into = [new_map(p.raw, tuple(p.raw.shape)) if asked else None for p, asked in zip(pieces, need, strict=False)]  # type: ignore[arg-type]
        weights = ctx.call.backward(pieces, grad, weight, into, need_weight)
        bias = channel_sums(grad) if ctx.bias and need_bias else None
        return None, weights, bias, *into, *(None for _ in pieces)


@dataclass(frozen=True, eq=False)
class _Call:
    """One convolution of one step: how its pieces are activated, its geometry, and whether the result's moments are wanted."""

    recipes: tuple[Recipe, ...]
    how: Geometry
    tally: Tally | None

    @cached_property
    def stepped(self) -> int:
        """A 1×1 kernel reads only the cells that it will use."""
        return self.how.stride if self.how.size == 1 else 1

    def _bands(self, first: Tensor, channels: int, dtype: torch.dtype) -> tuple[list[Band], int]:
        """Bands of the input's rows, and how many rows of zeros the convolution itself adds at the poles."""
        batch, _, height, width = first.shape
        how, step = self.how, self.stepped
        whole = (how.stride > 1 and how.size > 1) or 4 * how.reach >= height
        row_bytes = channels * (width // step + 2 * how.reach) * torch.finfo(dtype).bits // 8
        cut = [
            Band(b.first, b.last, b.top * step, b.bottom * step)
            for b in bands(batch, height // step, row_bytes, how.reach, whole)
        ]  # fmt: skip
        return cut, how.reach if all(b.bottom - b.top == height for b in cut) else 0

    def forward(self, pieces: Sequence[Deferred], weight: Tensor, bias: Tensor | None) -> Tensor:
        first, how = pieces[0].raw, self.how
        dtype, short = wide(first.dtype), _rounded(weight, first.dtype)
        offset = bias.to(dtype) if bias is not None else None
        batch, _, height, width = first.shape
        result = new_map(first, (batch, len(weight), height // how.stride, width // how.stride))
        cut, rows = self._bands(first, weight.shape[1], dtype)
        for band in cut:
            seen = gather(pieces, band, how.reach - rows, (how.reach, how.reach), dtype, self.stepped)
            part = result[band.samples, :, band.top // how.stride : -(-band.bottom // how.stride)]
            part.copy_(convolve(seen, short, offset, self._effective, rows))
            if self.tally is not None:
                self.tally.add(part)
        return result

    @property
    def _effective(self) -> Geometry:
        return Geometry(1) if self.how.size == 1 else self.how

    def backward(
        self, pieces: Sequence[Deferred], grad: Tensor, weight: Tensor, into: list[Tensor | None], need_weight: bool
    ) -> Tensor | None:
        how, dtype, short = self._effective, wide(grad.dtype), _rounded(weight, grad.dtype)
        total = torch.zeros_like(weight) if need_weight else None
        channels = weight.shape[1] + (weight.shape[0] if any(g is not None for g in into) else 0)
        cut, rows = self._bands(pieces[0].raw, channels, dtype)
        back = _Back(short, into, [p.raw.shape[1] for p in pieces], how, self.stepped)
        for band in cut:
            out = Band(band.first, band.last, band.top // self.how.stride, -(-band.bottom // self.how.stride))
            if total is not None:
                seen = gather(pieces, band, how.reach - rows, (how.reach, how.reach), dtype, self.stepped)
                slope = grad[out.samples, :, out.rows].to(dtype).contiguous(memory_format=CHANNELS_LAST)
                total += weight_gradient(seen, slope, short, how, rows)
            back.write(grad, band, out, rows, dtype)
        return total


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights as they are multiplied with maps of `dtype`: rounded to it, in the type that this CPU multiplies."""
    return weight.detach().to(dtype).to(wide(dtype)).contiguous(memory_format=CHANNELS_LAST)


class _Back:
    """The gradient of what a convolution read, band by band, into the pieces that want it."""

    def __init__(self, weight: Tensor, into: list[Tensor | None], channels: list[int], how: Geometry, step: int):
        self.how, self.step = how, step
        starts = [sum(channels[:i]) for i in range(len(channels))]
        self.wanted = [(g, s, c) for g, s, c in zip(into, starts, channels, strict=True) if g is not None]
        if not self.wanted:
            return
        if step > 1:
            for piece, _, _ in self.wanted:
                piece.zero_()
        self.part = torch.cat([weight[:, s : s + c] for _, s, c in self.wanted], 1)  # (C', ΣC wanted, k, k)
        self.turned = self.part.flip(2, 3).transpose(0, 1).contiguous(memory_format=CHANNELS_LAST)

    def write(self, grad: Tensor, band: Band, out: Band, rows: int, dtype: torch.dtype) -> None:
        if not self.wanted:
            return
        how = self.how
        if how.stride > 1:
            found = self._strided(grad, band, out, rows, dtype)
        else:  # the gradient of a convolution is a convolution with the kernel turned around
            seen = gather([Deferred(grad)], out, how.reach - rows, (how.reach, how.reach), dtype)
            found = convolve(seen, self.turned, None, how, rows)
        start = 0
        for piece, _, count in self.wanted:
            piece[band.samples, :, band.top : band.bottom : self.step, :: self.step].copy_(found[:, start : start + count])
            start += count

    def _strided(self, grad: Tensor, band: Band, out: Band, rows: int, dtype: torch.dtype) -> Tensor:
        """Larger kernels with a stride: whole maps, the halo's gradient added to the columns it was copied from."""
        how, width = self.how, self.wanted[0][0].shape[3]
        size = (band.last - band.first, self.part.shape[1], band.bottom - band.top, width + 2 * how.reach)
        slope = grad[out.samples, :, out.rows].to(dtype)
        found = torch.ops.aten.convolution_backward(
            slope, new_map(grad, size, dtype), self.part, None, [how.stride] * 2, [rows, 0], [how.dilation] * 2, False, [0, 0], 1,
            [True, False, False],
        )[0]  # fmt: skip
        core = found[..., how.reach : how.reach + width].clone(memory_format=CHANNELS_LAST)
        for column in (*range(how.reach), *range(how.reach + width, width + 2 * how.reach)):
            core[..., (column - how.reach) % width] += found[..., column]
        return core


def convolution(
    pieces: Sequence[Deferred], weight: Tensor, bias: Tensor | None, how: Geometry, tally: bool = False
) -> tuple[Tensor, Moments | None]:
    """k×k convolution of joined maps (B, C', H/stride, W/stride), circular in longitude, zeros beyond the poles.

    With it come its moments, if a `tally` is wanted.
    """
    call = _Call(tuple(piece.recipe for piece in pieces), how, Tally() if tally else None)
    result = _apply(_Convolution, call, pieces, weight, bias)
    return result, call.tally.moments() if call.tally is not None else None


class _Doubling(torch.autograd.Function):
    @outside_autocast
    def forward(ctx: Any, call: _Call, weight: Tensor, bias: Tensor | None, *maps: Tensor | None) -> Tensor:
        pieces = _save(ctx, call, weight, bias, maps)
        raw, dtype = pieces[0].raw, wide(pieces[0].raw.dtype)
        short, offset = _rounded(weight, raw.dtype), bias.to(dtype) if bias is not None else None
        kernels = [[short[:, :, y][..., x].transpose(0, 1).contiguous(memory_format=CHANNELS_LAST) for x in _SEEN] for y in _SEEN]
        batch, _, height, width = raw.shape
        result = new_map(raw, (batch, weight.shape[1], 2 * height, 2 * width))
        for band in _doubling_bands(raw, weight, dtype):
            seen = gather(pieces, band, 1, (0, 1), dtype)[:, :, 1:]  # one more row in the north, one more column in the east
            rows = band.bottom - band.top
            for y in range(2):
                for x in range(2):
                    near = seen[:, :, : rows + y, : width + x].contiguous(memory_format=CHANNELS_LAST)
                    part = torch.conv2d(near, kernels[y][x], offset)
                    result[band.samples, :, 2 * band.top + y : 2 * band.bottom : 2, x::2].copy_(part)
            if call.tally is not None:
                call.tally.add(result[band.samples, :, 2 * band.top : 2 * band.bottom])
        return result

    @outside_autocast
    def backward(ctx: Any, grad: Tensor):
        weight, *maps = ctx.saved_tensors
        pieces, (_, need_weight, need_bias, *need) = _pieces(ctx.call, maps), ctx.needs_input_grad
        grad, dtype, short = grad.contiguous(memory_format=CHANNELS_LAST), wide(grad.dtype), _rounded(weight, grad.dtype)
        into = [new_map(piece.raw, tuple(piece.raw.shape)) for piece in pieces]  # type: ignore[arg-type]
        total = torch.zeros_like(weight) if need_weight else None
        for band in _doubling_bands(pieces[0].raw, weight, dtype):
            doubled = Band(band.first, band.last, 2 * band.top, 2 * band.bottom)
            slope = gather([Deferred(grad)], doubled, 1, (1, 0), dtype)[:, :, :-1]  # (n, C', 2h + 1, 2W + 1): output 2y + k − 1
            if any(need):
                found = torch.conv2d(slope, short, None, 2).split([piece.raw.shape[1] for piece in pieces], 1)
                for piece, part in zip(into, found, strict=True):
                    piece[band.samples, :, band.rows].copy_(part)
            if total is not None:  # the convolution that leads back has the slope as its fields and the fields as its slope
                total += weight_gradient(slope, gather(pieces, band, 0, (0, 0), dtype), short, Geometry(3, 2), 0)
        bias = channel_sums(grad) if ctx.bias and need_bias else None
        return None, total, bias, *(g if asked else None for g, asked in zip(into, need, strict=False)), *(None for _ in into)


_SEEN = ([1], [2, 0])  # taps of even and of odd output cells; an odd cell 2y + 1 sees cell y by tap 2 and cell y + 1 by tap 0


def _doubling_bands(raw: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Band]:
    batch, _, height, width = raw.shape
    channels = weight.shape[0] + 4 * weight.shape[1]
    return list(bands(batch, height, channels * (width + 1) * torch.finfo(dtype).bits // 8, 1))


def doubling(
    pieces: Sequence[Deferred], weight: Tensor, bias: Tensor | None, tally: bool = False
) -> tuple[Tensor, Moments | None]:
    """3×3 transposed convolution of joined maps (B, C', 2H, 2W), circular in longitude: output 2y + k − 1 sees y by tap k."""
    call = _Call(tuple(piece.recipe for piece in pieces), Geometry(3, 2), Tally() if tally else None)
    result = _apply(_Doubling, call, pieces, weight, bias)
    return result, call.tally.moments() if call.tally is not None else None

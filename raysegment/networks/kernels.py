"""Arithmetic on one band of a map on a CPU: which type to multiply in, and the convolution with its two gradients.

A CPU that does not multiply bfloat16 (or float16) itself is up to 400 times slower in it than in float32, so there the
operands are widened: rounded to the short type, multiplied and added in float32, the result rounded again. That is what
the hardware of other CPUs does, bit for bit up to the order of the sums.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_WIDE_HALO = 1.25  # a haloed row this much longer than the row wastes too much of a product over whole rows
_FEW_OUTPUTS = 192  # products with fewer rows than this leave the matrix library slow: take all taps of a row at once


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply `dtype`."""
    if dtype == torch.bfloat16:
        if platform.machine() in ("x86_64", "AMD64"):  # where oneDNN also claims it for AVX-512 without bfloat16
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()) and torch.cpu._is_amx_fp16_supported()
    return True


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to multiply in where maps are stored in `dtype`."""
    return dtype if multiplies(dtype) else torch.float32


@cache
def products(dtype: torch.dtype) -> bool:
    """Whether weight gradients are matrix products, tap by tap: oneDNN's own on channels_last maps reach 15 % of the
    peak of a CPU without AVX-512, products of the same numbers 80 %. Depends on the CPU alone, never on a measurement."""
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


@dataclass(frozen=True)
class Geometry:
    """A square odd kernel: its size, stride and dilation."""

    size: int
    stride: int = 1
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Cells that the kernel sees on each side of its centre."""
        return self.dilation * (self.size // 2)


def convolve(fields: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry, rows: int) -> Tensor:
    """(n, C, h + 2·reach − 2·rows, W + 2·reach) → (n, C', h/stride, W/stride); `rows` of zeros are added at either pole."""
    return torch.conv2d(fields, weight, bias, how.stride, (rows, 0), how.dilation)


def weight_gradient(fields: Tensor, grad: Tensor, like: Tensor, how: Geometry, rows: int) -> Tensor:
    """Σ over pixels of grad × field per tap, in the shape of `like` (C', C, k, k); arguments as `convolve` takes and gives."""
    if how.stride == 2 and not rows and products(fields.dtype):
        return sum(_taps_of_phases(x, dy, how) for x, dy in zip(fields.split(1), grad.split(1), strict=True)).permute(2, 3, 0, 1)  # type: ignore[union-attr]
    if not products(fields.dtype) or how.stride > 1:
        mask, stride, dilation = [False, True, False], [how.stride] * 2, [how.dilation] * 2
        padding = [rows, 0]
        return torch.ops.aten.convolution_backward(
            grad, fields, like, None, stride, padding, dilation, False, [0, 0], 1, mask
        )[1]  # fmt: skip
    if how.size == 1:
        return (_matrix(grad).t() @ _matrix(fields))[:, :, None, None]
    wide_halo = fields.shape[3] > _WIDE_HALO * grad.shape[3]
    few = how.size * grad.shape[1] <= _FEW_OUTPUTS and how.dilation == 1
    taps = _taps_one_by_one if wide_halo else _taps_of_a_row if few else _taps
    return sum(taps(x, dy, how, rows) for x, dy in zip(fields.split(1), grad.split(1), strict=True)).permute(2, 3, 0, 1)  # type: ignore[union-attr]


def _matrix(maps: Tensor) -> Tensor:
    """(n, C, h, w) in channels_last memory as pixels × channels."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _rows(how: Geometry, tap: int, height: int, rows: int) -> tuple[int, int, int]:
    """(first, end) of the output rows whose `tap` falls into the fields, and the row of the fields that the first sees."""
    first = max(0, rows - tap * how.dilation)
    end = min(height, height + rows - (tap - how.size // 2) * how.dilation - how.reach) if rows else height
    return first, end, first + tap * how.dilation - rows


def _taps(fields: Tensor, grad: Tensor, how: Geometry, rows: int) -> Tensor:
    """(k, k, C', C) of one sample: rows of the output are padded to the length of the fields' rows, so that a tap is an
    offset in one long list of pixels, and its gradient one product."""
    _, outputs, height, width = grad.shape
    long = fields.shape[3]
    padded = grad.new_zeros(height, long, outputs)
    padded[:, :width] = grad[0].permute(1, 2, 0)
    pixels, seen = padded.view(-1, outputs), _matrix(fields)
    result = grad.new_zeros(how.size, how.size, outputs, fields.shape[1])
    for y in range(how.size):
        first, end, row = _rows(how, y, height, rows)
        if first >= end:
            continue
        count = (end - first - 1) * long + width
        left = pixels[first * long : first * long + count].t()
        for x in range(how.size):
            start = row * long + x * how.dilation
            torch.mm(left, seen[start : start + count], out=result[y, x])
    return result


def _taps_one_by_one(fields: Tensor, grad: Tensor, how: Geometry, rows: int) -> Tensor:
    """As `_taps` where the halo is long: what a tap sees is copied together."""
    _, outputs, height, width = grad.shape
    result = grad.new_zeros(how.size, how.size, outputs, fields.shape[1])
    pixels = _matrix(grad)
    for y in range(how.size):
        first, end, row = _rows(how, y, height, rows)
        for x in range(how.size if first < end else 0):
            seen = fields[:, :, row : row + end - first, x * how.dilation : x * how.dilation + width]
            left = pixels[first * width : end * width].t()
            torch.mm(left, _matrix(seen.contiguous(memory_format=torch.channels_last)), out=result[y, x])
    return result


def _taps_of_a_row(fields: Tensor, grad: Tensor, how: Geometry, rows: int) -> Tensor:
    """As `_taps` for few outputs: the k shifted copies of the output stand side by side, one product per row of taps."""
    _, outputs, height, width = grad.shape
    long, size = fields.shape[3], how.size
    shifted = grad.new_zeros(height, long, size, outputs)
    for x in range(size):
        shifted[:, x : x + width, x] = grad[0].permute(1, 2, 0)
    pixels, seen = shifted.view(-1, size * outputs), _matrix(fields)
    result = grad.new_zeros(size, size * outputs, fields.shape[1])
    for y in range(size):
        first, end, row = _rows(how, y, height, rows)
        if first < end:
            torch.mm(pixels[first * long : end * long].t(), seen[row * long : (row + end - first) * long], out=result[y])
    return result.view(size, size, outputs, fields.shape[1])


def _taps_of_phases(fields: Tensor, grad: Tensor, how: Geometry) -> Tensor:
    """As `_taps` with stride 2: every second row and column are maps of their own, of which a tap is an offset."""
    _, outputs, height, width = grad.shape
    result = grad.new_zeros(how.size, how.size, outputs, fields.shape[1])
    for odd_x in range(2):
        columns = fields[..., odd_x::2]
        long = columns.shape[3]
        padded = grad.new_zeros(height, long, outputs)
        padded[:, :width] = grad[0].permute(1, 2, 0)
        count = (height - 1) * long + width
        left = padded.view(-1, outputs)[:count].t()
        for odd_y in range(2):
            seen = _matrix(columns[:, :, odd_y::2].contiguous(memory_format=torch.channels_last))
            for y in range(odd_y, how.size, 2):
                for x in range(odd_x, how.size, 2):
                    start = (y // 2) * long + x // 2
                    torch.mm(left, seen[start : start + count], out=result[y, x])
    return result

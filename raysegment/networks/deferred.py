"""Maps that are activated by whoever reads them: convolutions on CPUs that see main memory once.

A convolution's result is kept as it is (`raw`), beside the norm, ReLU and dropout that belong to it. The next
convolution reads it band by band, activates the band in cache, joins it with others, closes the circle of longitude, and
multiplies. Nothing normalised, activated, padded or concatenated is ever written to memory, nor kept for backward.

To autograd such a map is the *activated* one: gradients that arrive at `raw` are those of the activated map, and
`activate`'s backward turns them into those of the convolution's result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raysegment.networks.bands import Band, bands

CHANNELS_LAST = torch.channels_last
_BN = torch.ops.aten.native_batch_norm
_BN_BACKWARD = torch.ops.aten.native_batch_norm_backward
_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True, eq=False)
class Affine:
    """γ (x − mean) / √(var + eps) + β per channel; all (C,), float32 (float64 for float64 maps)."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    def __call__(self, maps: Tensor) -> Tensor:
        return _BN(maps, self.gamma, self.beta, self.mean, self.var, False, 0.0, self.eps)[0]


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a reader does to a map first: the norm as an affine map, then ReLU."""

    affine: Affine | None = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Deferred:
    """raw (B, C, H, W) and what a reader makes of it: the recipe, then times `kept` (0 or 1/(1 − p))."""

    raw: Tensor
    recipe: Recipe = Recipe()
    kept: Tensor | None = None

    def read(self, samples: slice, rows: slice, step: int = 1) -> Tensor:
        """The activated map there (every `step`-th row and column); a view of `raw` where nothing is to be done."""
        part = self._normalised(samples, rows, step)
        if self.recipe.relu:
            part = part.clamp_min(0) if self.recipe.affine is None else part.clamp_min_(0)
        return part if self.kept is None else part * self.kept[samples, :, rows.start : rows.stop : step, ::step]

    def read_into(self, out: Tensor, samples: slice, rows: slice, step: int = 1) -> None:
        """The same, written into `out` in one pass less where types allow it."""
        if self.recipe.relu and self.kept is None and out.dtype == self.raw.dtype:
            torch.clamp_min(self._normalised(samples, rows, step), 0, out=out)
        else:
            out.copy_(self.read(samples, rows, step))

    def _normalised(self, samples: slice, rows: slice, step: int) -> Tensor:
        part = self.raw[samples, :, rows.start : rows.stop : step, ::step]
        return part if self.recipe.affine is None else self.recipe.affine(part.contiguous(memory_format=CHANNELS_LAST))

    def tensor(self) -> Tensor:
        """The activated map as an ordinary tensor."""
        if self.recipe.affine is None and not self.recipe.relu and self.kept is None:
            return self.raw
        return _Written.apply(self.recipe, self.kept, self.raw)  # type: ignore[no-any-return]


def outside_autocast(method: Callable) -> Callable:
    """Types are chosen here; autocast must not choose again."""

    @functools.wraps(method)
    def run(*args):
        with torch.autocast("cpu", enabled=False):
            return method(*args)

    return staticmethod(run)  # type: ignore[return-value]


def new_map(like: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def _whole(maps: Tensor) -> list[Band]:
    """Bands over a map for work that is done value by value."""
    batch, channels, height, width = maps.shape
    return list(bands(batch, height, channels * width * maps.element_size()))


def gather(pieces: Sequence[Deferred], band: Band, rows: int, halo: tuple[int, int], dtype: torch.dtype, step: int = 1) -> Tensor:
    """Activated pieces side by side (n, ΣC, bottom − top + 2·rows, west + W + east) in `dtype`.

    `rows` more are read on either side, zeros beyond the poles; `halo` = (west, east) more columns, around the circle.
    """
    height, width = pieces[0].raw.shape[2:]
    west, east = halo
    top, bottom = max(0, band.top - rows), min(height, band.bottom + rows)
    inside = slice(top, bottom)
    if len(pieces) == 1 and not west and not east and not rows:
        return pieces[0].read(band.samples, inside, step).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    seen, columns = -(-(bottom - top) // step), -(-width // step)
    above, below = top - (band.top - rows), band.bottom + rows - bottom
    shape = (band.last - band.first, sum(piece.raw.shape[1] for piece in pieces), above + seen + below, west + columns + east)
    joined = new_map(pieces[0].raw, shape, dtype)
    joined[:, :, :above].zero_()
    joined[:, :, above + seen :].zero_()
    core, start = joined[:, :, above : above + seen], 0
    for piece in pieces:
        piece.read_into(core[:, start : start + piece.raw.shape[1], :, west : west + columns], band.samples, inside, step)
        start += piece.raw.shape[1]
    _close(core, west, columns, east)
    return joined


def _close(joined: Tensor, west: int, width: int, east: int) -> None:
    """Fill the halo columns around the circle; any number of turns."""
    if max(west, east) <= width:
        joined[..., :west].copy_(joined[..., width : width + west])
        joined[..., west + width :].copy_(joined[..., west : west + east])
        return
    for column in (*range(west), *range(west + width, west + width + east)):
        joined[..., column].copy_(joined[..., west + (column - west) % width])


@dataclass(frozen=True)
class Moments:
    """Mean and (biased) variance per channel, and how many values they are of."""

    mean: Tensor
    var: Tensor
    count: int


class Tally:
    """Moments of a map, band by band, merged at the end: mean = Σ n m / N, var = Σ n (v + (m − mean)²) / N (Chan 1979)."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor, Tensor]] = []

    def add(self, maps: Tensor) -> None:
        zeros = torch.zeros(maps.shape[1], dtype=torch.float64 if maps.dtype == torch.float64 else torch.float32)
        mean, var = torch.ops.aten.batch_norm_update_stats(maps, zeros, zeros.clone(), 0.0)
        self.parts.append((maps.numel() // maps.shape[1], mean, var))

    def moments(self) -> Moments:
        counts, means, variances = zip(*self.parts, strict=True)
        if len(counts) == 1:
            return Moments(means[0], variances[0], counts[0])
        share = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
        mean_of = torch.stack(means).double()
        mean = (share * mean_of).sum(0)
        var = (share * (torch.stack(variances).double() + (mean_of - mean) ** 2)).sum(0)
        return Moments(mean.to(means[0].dtype), var.to(means[0].dtype), sum(counts))


def moments(maps: Tensor) -> Moments:
    """Of a map as it is."""
    tally, maps = Tally(), maps.detach()
    for band in _whole(maps):
        tally.add(maps[band.samples, :, band.rows])
    return tally.moments()


# ---------------------------------------------------------------- norm, ReLU, dropout


class _Activated(torch.autograd.Function):
    """The same numbers, from now on understood as the activated map."""

    @outside_autocast
    def forward(
        ctx: Any, recipe: Recipe, count: int, kept: Tensor | None, gamma: Tensor | None, beta: Tensor | None, raw: Tensor
    ) -> Tensor:
        ctx.recipe, ctx.count = recipe, count
        ctx.save_for_backward(raw, kept)
        return raw.detach()

    @outside_autocast
    def backward(ctx: Any, grad: Tensor):
        raw, kept = ctx.saved_tensors
        affine, need = ctx.recipe.affine, ctx.needs_input_grad
        result, per_gamma, per_beta = _deactivate(Deferred(raw, ctx.recipe, kept), grad.contiguous(memory_format=CHANNELS_LAST))
        if affine is not None:
            _renormalise(result, raw, affine, per_gamma, per_beta, ctx.count)
        return None, None, None, per_gamma if need[3] else None, per_beta if need[4] else None, result


def _deactivate(act: Deferred, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the normalised map, and its sums Σ g·x̂ and Σ g per channel (empty without a norm)."""
    raw, affine = act.raw, act.recipe.affine
    result = new_map(raw, tuple(raw.shape))  # type: ignore[arg-type]
    sums: list[Tensor] = []
    for band in _whole(raw):
        part, before, found = (maps[band.samples, :, band.rows] for maps in (grad, raw, result))
        if act.kept is not None:
            part = part * act.kept[band.samples, :, band.rows]
        if act.recipe.relu:
            _THRESHOLD_BACKWARD(part, before if affine is None else affine(before), 0, grad_input=found)
        else:
            found.copy_(part)
        if affine is not None:
            sums.append(torch.stack(_sums(found, before, affine)))
    total = torch.stack(sums).double().sum(0).to(sums[0].dtype) if sums else torch.empty(2, 0)
    return result, total[0], total[1]


def _sums(grad: Tensor, maps: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    mask = [False, True, True]
    found = _BN_BACKWARD(grad, maps, affine.gamma, affine.mean, affine.var, None, None, False, affine.eps, mask)
    return found[1], found[2]


def _renormalise(grad: Tensor, raw: Tensor, affine: Affine, per_gamma: Tensor, per_beta: Tensor, count: int) -> None:
    """Gradient of the normalised map → that of the map, in place: γ/σ (g − (Σg + x̂ Σg·x̂)/N); N = 0: moments are constants."""
    inverse = (affine.var + affine.eps).rsqrt()
    slope, zero, one = affine.gamma * inverse, torch.zeros_like(inverse), torch.ones_like(inverse)
    scale = Affine(slope, zero, zero, one, 0.0)
    shift = Affine(-slope * inverse * per_gamma / count, -slope * per_beta / count, affine.mean, one, 0.0) if count else None
    for band in _whole(raw):
        part = grad[band.samples, :, band.rows]
        if shift is None:
            part.copy_(scale(part))
        else:
            torch.add(scale(part), shift(raw[band.samples, :, band.rows]), out=part)


def channel_sums(maps: Tensor) -> Tensor:
    """Σ over samples and pixels (C,) in float32 (float64 for float64 maps)."""
    one = scaling(maps, 1.0)
    sums = [_sums(part, part, one)[1] for part in (maps[b.samples, :, b.rows] for b in _whole(maps))]
    return torch.stack(sums).double().sum(0).to(one.gamma.dtype)


class _Written(torch.autograd.Function):
    """The activated map, written out; gradients of activated maps pass as they are."""

    @outside_autocast
    def forward(ctx: Any, recipe: Recipe, kept: Tensor | None, raw: Tensor) -> Tensor:
        result, act = new_map(raw, tuple(raw.shape)), Deferred(raw, recipe, kept)  # type: ignore[arg-type]
        for band in _whole(raw):
            act.read_into(result[band.samples, :, band.rows], band.samples, band.rows)
        return result

    @outside_autocast
    def backward(ctx: Any, grad: Tensor):
        return None, None, grad


def activate(raw: Tensor, norm: nn.Module, relu: bool, kept: Tensor | None, found: Moments | None) -> Deferred:
    """A convolution's result as a map that its readers normalise, rectify and thin out.

    `norm` is a BatchNorm2d (with `found`, the map's moments, in training), a module with a `factor`, or one that does nothing.
    """
    gamma = beta = affine = None
    if isinstance(norm, nn.BatchNorm2d):
        affine, gamma, beta = _batch_norm(norm, found), norm.weight, norm.bias
    elif hasattr(norm, "factor"):
        affine = scaling(raw, float(norm.factor))  # pyright: ignore[reportArgumentType]
    recipe = Recipe(affine, relu)
    if affine is None and not relu and kept is None:
        return Deferred(raw)
    raw_ = _Activated.apply(recipe, found.count if found is not None else 0, kept, gamma, beta, raw)
    return Deferred(raw_, recipe, kept)  # type: ignore[arg-type]


def scaling(maps: Tensor, factor: float) -> Affine:
    """The affine map x · factor."""
    dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32
    return Affine(*(torch.full((maps.shape[1],), value, dtype=dtype) for value in (factor, 0.0, 0.0, 1.0)), eps=0.0)


@torch.no_grad()
def _batch_norm(norm: nn.BatchNorm2d, found: Moments | None) -> Affine:
    """The norm as an affine map; in training by the map's own moments, which enter the running ones."""
    if found is None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return Affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    if norm.running_mean is not None and norm.running_var is not None:
        share = norm.momentum if norm.momentum is not None else 0.1
        norm.running_mean.lerp_(found.mean, share)
        norm.running_var.lerp_(found.var * (found.count / max(found.count - 1, 1)), share)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
    return Affine(norm.weight, norm.bias, found.mean, found.var, norm.eps)

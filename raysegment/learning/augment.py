"""Variations of a tile that could have happened on Earth, drawn from (seed, position) alone.

Whoever computes a position, whenever, sees the same variation: one counter-based generator (Philox) per position, from
which the same numbers are drawn in the same order whatever is switched on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysegment.climate.channels import NAMES

NORTHWARD = ("V850", "VBOT")  # winds that change sign when south and north are exchanged


@dataclass(frozen=True)
class AugmentConfig:
    """All zero or False: the tile as it is. Amplitudes are in units of a channel's deviation.

    roll: any number of columns eastward (tiles that close the circle). mirror: half of the tiles with south and north
    exchanged. gain, offset: each channel times 1 ± gain, plus ± offset (uniform). drop: probability that a channel
    becomes its mean (never all of them). noise: deviation of white noise. smooth: probability of one pass of the 3×3
    binomial filter over all channels (archives differ in sharpness).
    """

    roll: bool = False
    mirror: bool = False
    gain: float = 0.0
    offset: float = 0.0
    drop: float = 0.0
    noise: float = 0.0
    smooth: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gain", "offset", "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"augment.{name}: expected an amplitude of at least 0, got {getattr(self, name)}")
        for name in ("drop", "smooth"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}: expected a probability in [0, 1], got {getattr(self, name)}")
        if not self.gain < 1:
            raise ValueError(f"augment.gain: expected less than 1, or a channel may change sign, got {self.gain}")

    @property
    def identity(self) -> bool:
        return self == AugmentConfig()


@dataclass(frozen=True)
class Draw:
    """What happens to one tile: columns to roll, mirror and smooth or not, factor and summand (C,) of each channel."""

    columns: int
    mirror: bool
    smooth: bool
    gain: np.ndarray
    offset: np.ndarray
    noise_key: int


def draw(seed: int, position: int, width: int, channels: int, config: AugmentConfig) -> Draw:
    """The variation of the tile at `position`; a pure function of its arguments."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, position]))
    single, (gain, offset, lost) = generator.random(4), generator.random((3, channels))
    kept = lost >= config.drop
    if not kept.any():
        kept[lost.argmax()] = True
    return Draw(
        columns=int(single[0] * width) if config.roll else 0,
        mirror=bool(config.mirror and single[1] < 0.5),
        smooth=bool(single[2] < config.smooth),
        gain=np.where(kept, 1 + config.gain * (2 * gain - 1), 0.0),
        offset=np.where(kept, config.offset * (2 * offset - 1), 0.0),
        noise_key=int(single[3] * 2**52),
    )


def augment(
    fields: Tensor,
    mask: Tensor,
    positions: Sequence[int] | Tensor,
    seed: int,
    config: AugmentConfig,
    zero: Tensor | None = None,
    channels: Sequence[str] = NAMES,
) -> tuple[Tensor, Tensor]:
    """Varied fields (m, C, H, W) float32 and mask (m, H, W); the arguments are left as they are.

    `fields` are normalised (mean 0, deviation 1); `zero` (C,) is what 0 m/s has become in them, about which the
    northward winds are reflected (default 0).
    """
    if config.identity:
        return fields, mask
    size, width = fields.shape[1], fields.shape[3]
    draws = [draw(seed, int(position), width, size, config) for position in positions]
    moved, moved_mask = torch.empty_like(fields), torch.empty_like(mask)
    for index, one in enumerate(draws):
        _place(moved[index], fields[index], one)
        _place(moved_mask[index], mask[index], one)
        if one.smooth:
            moved[index] = binomial(moved[index])
    _affine(moved, draws, zero, channels)
    if config.noise:
        for index, one in enumerate(draws):
            generator = torch.Generator(fields.device).manual_seed(one.noise_key)
            moved[index] += config.noise * torch.randn(fields.shape[1:], generator=generator, device=fields.device)
    return moved, moved_mask


def _place(into: Tensor, tile: Tensor, one: Draw) -> None:
    """Copy a tile (…, H, W), mirrored and rolled, without a copy in between."""
    tile = tile.flip(-2) if one.mirror else tile
    into[..., one.columns :] = tile[..., : tile.shape[-1] - one.columns]
    into[..., : one.columns] = tile[..., tile.shape[-1] - one.columns :]


def _affine(fields: Tensor, draws: Sequence[Draw], zero: Tensor | None, channels: Sequence[str]) -> None:
    """Gain, offset and loss of channels, and the sign of northward winds in mirrored tiles, in one pass and in place."""
    gain = np.stack([one.gain for one in draws])
    offset = np.stack([one.offset for one in draws])
    north = [index for index, name in enumerate(channels) if name in NORTHWARD]
    zeros = np.zeros(len(channels)) if zero is None else zero.double().cpu().numpy()
    for row, one in enumerate(draws):
        if one.mirror:  # gain · (2·zero − x) + offset
            offset[row, north] += 2 * zeros[north] * gain[row, north]
            gain[row, north] *= -1
    if (gain != 1).any() or offset.any():
        columns = torch.from_numpy(np.stack([gain, offset])[..., None, None]).to(fields.device, fields.dtype)
        torch.addcmul(columns[1], fields, columns[0], out=fields)


def binomial(fields: Tensor) -> Tensor:
    """Fields (…, H, W) after the filter (1 2 1)ᵀ(1 2 1)/16, circular in longitude, edge rows repeated."""
    east = 0.5 * fields + 0.25 * (fields.roll(1, -1) + fields.roll(-1, -1))
    south = torch.cat((east[..., :1, :], east[..., :-1, :]), -2)
    north = torch.cat((east[..., 1:, :], east[..., -1:, :]), -2)
    return 0.5 * east + 0.25 * (south + north)

"""From the float16 of the shards to what the network reads: mean 0 and deviation 1, in float32, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysegment.climate.channels import BY_NAME, INDEX, NAMES


@dataclass(frozen=True)
class Normaliser:
    """Moments `mean`, `std` (C,) in SI units of the channels `names`, and the `reference`, `scale` (C,) of the float16 tiles.

    `names` may be some of the 16 channels; tiles always hold all of them, in the order of `channels.NAMES`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reference: tuple[float, ...]
    scale: tuple[float, ...]
    names: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        for name in ("mean", "std", "reference", "scale"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != len(self.names) or not np.isfinite(values).all():
                raise ValueError(f"{name}: expected {len(self.names)} finite numbers, one per channel, got {values}")
        if min(*self.std, *self.scale) <= 0:
            raise ValueError(f"std and scale: expected positive numbers, got {self.std} and {self.scale}")

    @staticmethod
    def of(mean: Sequence[float], std: Sequence[float], names: Sequence[str] = NAMES) -> Normaliser:
        """From the moments (16,) of a manifest and the published staging constants, for the channels `names`."""
        chosen = [INDEX[name] for name in names]
        reference, scale = ([getattr(BY_NAME[name], key) for name in names] for key in ("reference", "scale"))
        return Normaliser(
            tuple(mean[i] for i in chosen), tuple(std[i] for i in chosen), tuple(reference), tuple(scale), tuple(names)
        )

    def _column(self, values: np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)[:, None, None]

    def zero(self, device: torch.device | str = "cpu") -> Tensor:
        """What 0 in SI units has become (C,): −mean/std."""
        return self._column(-np.array(self.mean) / np.array(self.std), torch.device(device))[:, 0, 0]

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(gain, offset), each (C, 1, 1): scale/std and (reference − mean)/std."""
        std = np.array(self.std)
        return (
            self._column(np.array(self.scale) / std, device),
            self._column((np.array(self.reference) - np.array(self.mean)) / std, device),
        )

    def tiles(self, tiles: Tensor) -> Tensor:
        """float16 tiles (m, 16, H, W) → normalised float32 (m, C, H, W) in channels_last memory: t·gain + offset."""
        if self.names != NAMES:
            tiles = tiles[:, [INDEX[name] for name in self.names]]  # (m, C, H, W)
        gain, offset = self.constants(tiles.device)
        fields = tiles.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return torch.addcmul(offset, fields, gain, out=fields)

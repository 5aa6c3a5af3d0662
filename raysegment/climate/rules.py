"""A heuristic labeller: a cyclone rule, a river rule and a mask shape under one name, from fields to a mask.

`rules:NAME`, where NAME is a cyclone preset, a river preset, `CYCLONE+RIVER`, `default` or `paper2018`. A name that both
kinds have (`tempest`) means both.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import CYCLONE, NAMES, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.cyclones import CYCLONE_PRESETS, SHAPES, Cyclone, cyclone_mask, detect_cyclones
from raysegment.climate.grid import KM_PER_DEGREE, Grid
from raysegment.climate.regions import window
from raysegment.climate.rivers import RIVER_PRESETS, detect_rivers

PREFIX = "rules:"
# The defaults did best on real maps: the thickness of the whole layer tells storms from other lows without a threshold
# that depends on the grid, and the Laplacian of IVT outlines rivers without taking the humid tropics with them.
NAMED: dict[str, tuple[str | None, str | None, str]] = {
    "default": ("tempest", "tempest", "wind"),
    "paper2018": ("teca", "paper2018", "paper2018"),
}
BLANK_DEG = 8.0  # no river within this distance of a cyclone's centre (TempestExtremes NodeFileFilter --bydist 8, Ullrich 2021)
RULES: tuple[str, ...] = tuple(dict.fromkeys([*NAMED, *CYCLONE_PRESETS, *RIVER_PRESETS]))


@dataclass(frozen=True)
class Rules:
    """Names of a cyclone preset, a river preset (either may be None: that class is not labelled) and a mask shape."""

    cyclones: str | None
    rivers: str | None
    shape: str = "wind"

    def __post_init__(self) -> None:
        assert self.cyclones is None or self.cyclones in CYCLONE_PRESETS, self.cyclones
        assert self.rivers is None or self.rivers in RIVER_PRESETS, self.rivers
        assert self.shape in SHAPES, self.shape
        assert self.cyclones or self.rivers, self

    @property
    def name(self) -> str:
        """What goes into a mask file as its labeller, with the sources of the thresholds left to `sources`."""
        return PREFIX + "+".join(name for name in (self.cyclones, self.rivers) if name)

    @property
    def sources(self) -> str:
        """Where the thresholds come from, one sentence per preset."""
        presets = [CYCLONE_PRESETS[self.cyclones]] if self.cyclones else []
        rivers = [RIVER_PRESETS[self.rivers]] if self.rivers else []
        return "; ".join(f"{preset.name}: {preset.source}" for preset in (*presets, *rivers))

    def detect(self, fields: NDArray, grid: Grid) -> list[Cyclone]:
        """The cyclones of `fields (16, H, W)`; none when the rules have no cyclone preset."""
        return detect_cyclones(fields, grid, CYCLONE_PRESETS[self.cyclones]) if self.cyclones else []

    def label(self, fields: NDArray, grid: Grid) -> NDArray[np.uint8]:
        """Mask (H, W) of `fields (16, H, W)`: 0 background, 1 cyclone, 2 river; cyclones win."""
        assert fields.shape == (len(NAMES), *grid.shape), fields.shape
        storms = self.detect(fields, grid)
        mask = np.zeros(grid.shape, np.uint8)
        if self.rivers:
            blank = near_cyclones(grid, storms)
            mask[detect_rivers(fields, grid, RIVER_PRESETS[self.rivers], blank)] = RIVER
        mask[cyclone_mask(fields, grid, storms, self.shape)] = CYCLONE
        return mask


def near_cyclones(grid: Grid, storms: list[Cyclone]) -> NDArray[np.bool_]:
    """Cells (H, W) within BLANK_DEG of a cyclone's centre."""
    near = np.zeros(grid.shape, bool)
    for storm in storms:
        around = window(grid, storm.lat, storm.lon, BLANK_DEG * KM_PER_DEGREE)
        near[around.index] |= around.distance_km <= BLANK_DEG * KM_PER_DEGREE
    return near


def parse_rules(text: str) -> Rules:
    """Rules by name, with or without the prefix "rules:"; unknown names raise BadInput with a suggestion."""
    name = text.removeprefix(PREFIX)
    if name in NAMED:
        return Rules(*NAMED[name])
    if name in RULES:
        return Rules(name if name in CYCLONE_PRESETS else None, name if name in RIVER_PRESETS else None)
    cyclones, plus, rivers = name.partition("+")
    if not plus:
        raise _unknown(text, "a name of rules", name, RULES)
    if cyclones not in CYCLONE_PRESETS:
        raise _unknown(text, "a cyclone preset before the +", cyclones, tuple(CYCLONE_PRESETS))
    if rivers not in RIVER_PRESETS:
        raise _unknown(text, "a river preset after the +", rivers, tuple(RIVER_PRESETS))
    return Rules(cyclones, rivers)


def _unknown(where: str, what: str, got: str, known: tuple[str, ...]) -> BadInput:
    close = get_close_matches(got, known, n=1, cutoff=0.5)
    remedy = f"Did you mean {close[0]}?" if close else "Use one of those, or CYCLONE+RIVER, for example rules:teca+ivt."
    return BadInput(where, f"{what} ({', '.join(known)})", repr(got), remedy)

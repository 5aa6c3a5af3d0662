"""A heuristic labeller: a cyclone rule, a river rule and a mask shape under one name, from fields to a mask.

`rules:NAME`, where NAME is a cyclone preset, a river preset, `CYCLONES+RIVERS` (either may be `none`), or one of NAMED. A name
that both kinds have (`tempest`) means both. `@SHAPE` after it chooses what is marked around a cyclone: `rules:tempest@paper2018`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import CYCLONE, INDEX, NAMES, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.cyclones import CYCLONE_PRESETS, SHAPE_NEEDS, SHAPES, Cyclone, cyclone_mask, detect_cyclones
from raysegment.climate.grid import KM_PER_DEGREE, Grid
from raysegment.climate.regions import window
from raysegment.climate.rivers import RIVER_PRESETS, detect_rivers

PREFIX = "rules:"
# The defaults did best on real maps: the thickness of the whole layer tells storms from other lows without a threshold
# that depends on the grid, and the Laplacian of IVT outlines rivers without taking the humid tropics with them.
NAMED: dict[str, tuple[str | None, str | None, str]] = {
    "default": ("tempest", "tempest", "wind"),
    "paper2018": ("teca", "paper2018", "paper2018"),
    "paper2018_labels_1": ("teca_super_relaxed", "paper2018_21", "paper2018"),  # the second set of labels in the 2018 files
}
_NONE, _AT, _PLAIN_SHAPE = "none", "@", "wind"
BLANK_DEG = 8.0  # no river within this distance of a cyclone's centre (TempestExtremes NodeFileFilter --bydist 8, Ullrich 2021)
RULES: tuple[str, ...] = tuple(dict.fromkeys([*NAMED, *CYCLONE_PRESETS, *RIVER_PRESETS]))


@dataclass(frozen=True)
class Rules:
    """Names of a cyclone preset, a river preset (either may be None: that class is not labelled) and a mask shape."""

    cyclones: str | None
    rivers: str | None
    shape: str = _PLAIN_SHAPE

    def __post_init__(self) -> None:
        assert self.cyclones is None or self.cyclones in CYCLONE_PRESETS, self.cyclones
        assert self.rivers is None or self.rivers in RIVER_PRESETS, self.rivers
        assert self.shape in SHAPES, self.shape
        assert self.cyclones or self.rivers, self

    @property
    def name(self) -> str:
        """What goes into a mask file as its labeller, and can be parsed again; where thresholds come from is in `sources`."""
        alone = self.cyclones or self.rivers
        several = alone in NAMED or (alone in CYCLONE_PRESETS and alone in RIVER_PRESETS)  # that name alone means more
        full = several or (self.cyclones and self.rivers)
        name = f"{self.cyclones or _NONE}+{self.rivers or _NONE}" if full else alone
        return f"{PREFIX}{name}" + (f"{_AT}{self.shape}" if self.shape != _PLAIN_SHAPE else "")

    @property
    def sources(self) -> str:
        """Where the thresholds come from, one sentence per preset."""
        presets = [CYCLONE_PRESETS[self.cyclones]] if self.cyclones else []
        rivers = [RIVER_PRESETS[self.rivers]] if self.rivers else []
        return "; ".join(f"{preset.name}: {preset.source}" for preset in (*presets, *rivers))

    @property
    def needs(self) -> frozenset[str]:
        """Names of the channels that the rules read when no IVT is given."""
        return self._cyclone_needs | (RIVER_PRESETS[self.rivers].needs if self.rivers else frozenset())

    @property
    def can_use_ivt(self) -> bool:
        """True when a map of IVT alone is enough: a river preset that reads nothing else, and no cyclone preset."""
        return self.cyclones is None and self.rivers is not None and RIVER_PRESETS[self.rivers].can_use_ivt

    def missing(self, available: Collection[str], has_ivt: bool = False) -> tuple[str, ...]:
        """The channels that are needed and not available, in the order of the 16; none when the rules can work."""
        needs = self._cyclone_needs if self._takes(has_ivt) else self.needs
        return tuple(name for name in NAMES if name in needs and name not in available)

    def reads(self, has_ivt: bool) -> frozenset[str]:
        """Names of the channels that have a part in the mask, and "IVT" where it takes the place of its stand-in.

        A rule about direction reads the wind even then, where there is one.
        """
        if not self._takes(has_ivt):
            return self.needs
        assert self.rivers is not None
        directed = np.isfinite(RIVER_PRESETS[self.rivers].max_turn_deg)
        return frozenset({"IVT"}) | (self.needs if directed else self._cyclone_needs)

    def _takes(self, has_ivt: bool) -> bool:
        return has_ivt and self.rivers is not None and RIVER_PRESETS[self.rivers].can_use_ivt

    @property
    def _cyclone_needs(self) -> frozenset[str]:
        return CYCLONE_PRESETS[self.cyclones].needs | SHAPE_NEEDS[self.shape] if self.cyclones else frozenset()

    def detect(self, fields: NDArray, grid: Grid) -> list[Cyclone]:
        """The cyclones of `fields (16, H, W)`; none when the rules have no cyclone preset."""
        return detect_cyclones(fields, grid, CYCLONE_PRESETS[self.cyclones]) if self.cyclones else []

    def label(self, fields: NDArray, grid: Grid, ivt: NDArray | None = None) -> NDArray[np.uint8]:
        """Mask (H, W) of `fields (16, H, W)`: 0 background, 1 cyclone, 2 river; cyclones win.

        Planes that are not needed may be NaN. `ivt (H, W)`, kg m⁻¹ s⁻¹, takes the place of the stand-in from TMQ and the
        wind at 850 hPa; its missing cells belong to no river. A needed field without one value raises BadInput.
        """
        assert fields.shape == (len(NAMES), *grid.shape), fields.shape
        assert ivt is None or ivt.shape == grid.shape, ivt.shape
        self._check(fields, ivt)
        storms = self.detect(fields, grid)
        mask = np.zeros(grid.shape, np.uint8)
        if self.rivers:
            known = None if ivt is None else np.nan_to_num(ivt, nan=0.0)
            mask[detect_rivers(fields, grid, RIVER_PRESETS[self.rivers], near_cyclones(grid, storms), known)] = RIVER
        mask[cyclone_mask(fields, grid, storms, self.shape)] = CYCLONE
        return mask

    def _check(self, fields: NDArray, ivt: NDArray | None) -> None:
        """BadInput when a needed field has no value at all."""
        has_ivt = ivt is not None and bool(np.isfinite(ivt).any())
        empty = [name for name in sorted(self.needs) if not np.isfinite(fields[INDEX[name]]).any()]
        missing = self.missing(set(NAMES) - set(empty), has_ivt)
        if not missing:
            return
        available = {name for name in NAMES if np.isfinite(fields[INDEX[name]]).any()}
        raise BadInput(self.name, f"values of {', '.join(missing)}", "no value (all missing)", remedy_for(available, has_ivt))


def presets_for(available: Collection[str], has_ivt: bool = False) -> tuple[str, ...]:
    """Names of the rules that work where these channels (and IVT, or not) are available, in the order of RULES."""
    return tuple(name for name in RULES if not parse_rules(name).missing(available, has_ivt))


def remedy_for(available: Collection[str], has_ivt: bool = False) -> str:
    """What to do where a channel is missing: the rules that would work with what is there."""
    names = presets_for(available, has_ivt)
    return f"With what is there these would work: {', '.join(PREFIX + n for n in names)}." if names else "No rules would work."


def near_cyclones(grid: Grid, storms: list[Cyclone]) -> NDArray[np.bool_]:
    """Cells (H, W) within BLANK_DEG of a cyclone's centre."""
    near = np.zeros(grid.shape, bool)
    for storm in storms:
        around = window(grid, storm.lat, storm.lon, BLANK_DEG * KM_PER_DEGREE)
        near[around.index] |= around.distance_km <= BLANK_DEG * KM_PER_DEGREE
    return near


def parse_rules(text: str) -> Rules:
    """Rules by name, with or without the prefix "rules:"; unknown names raise BadInput with a suggestion."""
    name, at, shape = text.removeprefix(PREFIX).partition(_AT)
    if at and shape not in SHAPES:
        raise _unknown(text, f"a mask shape after the {_AT}", shape, tuple(SHAPES))
    rules = _parse_presets(text, name)
    if at and rules.cyclones is None:
        raise BadInput(text, f"cyclones, to be given the shape {shape}", "rivers only", f"Leave out {_AT}{shape}.")
    return replace(rules, shape=shape) if at else rules


def _parse_presets(text: str, name: str) -> Rules:
    if name in NAMED:
        return Rules(*NAMED[name])
    if name in RULES:
        return Rules(name if name in CYCLONE_PRESETS else None, name if name in RIVER_PRESETS else None)
    cyclones, plus, rivers = name.partition("+")
    if not plus or cyclones == rivers == _NONE:
        raise _unknown(text, "a name of rules", name, RULES)
    if cyclones not in (_NONE, *CYCLONE_PRESETS):
        raise _unknown(text, "a cyclone preset before the +", cyclones, tuple(CYCLONE_PRESETS))
    if rivers not in (_NONE, *RIVER_PRESETS):
        raise _unknown(text, "a river preset after the +", rivers, tuple(RIVER_PRESETS))
    return Rules(None if cyclones == _NONE else cyclones, None if rivers == _NONE else rivers)


def _unknown(where: str, what: str, got: str, known: tuple[str, ...]) -> BadInput:
    close = get_close_matches(got, known, n=1, cutoff=0.5)
    remedy = f"Did you mean {close[0]}?" if close else "Use one of those, or CYCLONE+RIVER, for example rules:teca+ivt."
    return BadInput(where, f"{what} ({', '.join(known)})", repr(got), remedy)

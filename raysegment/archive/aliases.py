"""Which variable of a file is which of the 16 channels: a plan made from names, dimensions and units alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysegment.archive.units import conversion
from raysegment.climate.channels import BY_NAME, CHANNELS, Alias, Channel
from raysegment.climate.checks import BadInput

_LEVEL_HPA = 0.5  # a level counts as found within this
_WATER = {"TMQ", "PRECT"}
_GEOPOTENTIAL = {"Z1000", "Z200", "PHIS_M"}
_PAIRS = (("UBOT", "VBOT"), ("U850", "V850"))  # both components of a wind come from one level
_DEWPOINT_NAMES = (Alias("d2m", "ERA5", "K"), Alias("2d", "ERA5", "K"))
DEWPOINT = Channel("D2M", "K", "dew point at 2 m", 130.0, 330.0, 278.0, 20.0, _DEWPOINT_NAMES)


@dataclass(frozen=True)
class Variable:
    """What a file says about a variable: `usable` when it is a map (time and size-1 dimensions aside) on the file's
    latitude and longitude; `levels_hpa` when it has a pressure axis besides."""

    name: str
    unit: str = ""
    usable: bool = True
    levels_hpa: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Recipe:
    """A channel is `factor · x + offset` of `variable`, on its `level` (index) when it has a pressure axis."""

    variable: str
    factor: float = 1.0
    offset: float = 0.0
    level: int | None = None
    group: str = "CAM"


@dataclass(frozen=True)
class Plan:
    """Recipes by channel name; `humidity` is the dew point's where QREFHT must be derived; `zbot` when ZBOT must be."""

    recipes: Mapping[str, Recipe]
    dewpoint: Recipe | None = None
    zbot: bool = False

    @property
    def names(self) -> list[str]:
        """Archives whose names were used."""
        return sorted({recipe.group for recipe in self.recipes.values()})


def plan(path: Path, variables: Mapping[str, Variable]) -> Plan:
    """The plan for a file that holds `variables`; BadInput that names every missing channel, or the wrong unit."""
    recipes = {channel.name: recipe for channel in CHANNELS if (recipe := find(path, channel, variables))}
    for first, second in _PAIRS:
        recipes |= _pair(path, BY_NAME[first], BY_NAME[second], variables)
    dewpoint = None if "QREFHT" in recipes else find(path, DEWPOINT, variables)
    derived = {"ZBOT"} | ({"QREFHT"} if dewpoint is not None else set())
    missing = [channel for channel in CHANNELS if channel.name not in recipes and channel.name not in derived]
    if missing:
        raise BadInput(path, "all 16 channels", _missing(missing, variables), _remedy(missing))
    return Plan(recipes, dewpoint, "ZBOT" not in recipes)


def find(path: Path, channel: Channel, variables: Mapping[str, Variable]) -> Recipe | None:
    """The first name of `channel` that the file has, as a recipe; None when it has none of them."""
    return next((recipe for alias in _names(channel) if (recipe := _recipe(path, channel, alias, variables))), None)


def _names(channel: Channel) -> Sequence[Alias]:
    return (Alias(channel.name, "CAM", channel.unit), *channel.aliases)


def _recipe(path: Path, channel: Channel, alias: Alias, variables: Mapping[str, Variable]) -> Recipe | None:
    variable = variables.get(alias.name)
    if variable is None or not variable.usable or (alias.level_hpa is None) != (variable.levels_hpa is None):
        return None
    level = None
    if variable.levels_hpa is not None:
        level = next((i for i, hpa in enumerate(variable.levels_hpa) if abs(hpa - (alias.level_hpa or 0)) <= _LEVEL_HPA), None)
        if level is None:
            return None
    return Recipe(alias.name, *_factor(path, channel, alias, variable), level, alias.group)


def _factor(path: Path, channel: Channel, alias: Alias, variable: Variable) -> tuple[float, float]:
    """Factor and offset from the declared unit, from the archive's usual one when none is declared."""
    if not variable.unit:
        return alias.factor, alias.offset
    bridges = {"water": channel.name in _WATER, "geopotential": channel.name in _GEOPOTENTIAL}
    usual = conversion(variable.unit, alias.unit, **bridges)
    if usual is not None:
        return usual[0] * alias.factor, usual[1] * alias.factor + alias.offset
    direct = conversion(variable.unit, channel.unit, **bridges)
    if direct is None:
        expected = f"{channel.long_name} ({channel.name}) in {alias.unit}"
        remedy = f"Convert variable {alias.name} or correct its units attribute"
        raise BadInput(path, expected, f"variable {alias.name} in {variable.unit!r}", remedy)
    return direct


def _pair(path: Path, first: Channel, second: Channel, variables: Mapping[str, Variable]) -> dict[str, Recipe]:
    """Recipes for both components from the first archive name that has both; none when no name has."""
    for one, other in zip(_names(first), _names(second), strict=True):
        u, v = _recipe(path, first, one, variables), _recipe(path, second, other, variables)
        if u is not None and v is not None:
            return {first.name: u, second.name: v}
    return {}


def _missing(missing: Sequence[Channel], variables: Mapping[str, Variable]) -> str:
    """What is absent, and what is there instead, in words."""
    text = "none for " + ", ".join(channel.name for channel in missing)
    names = [alias.name for channel in missing for alias in channel.aliases if alias.name in variables]
    levels = {name: variables[name].levels_hpa for name in names}
    given = [f"{name} at {', '.join(f'{hpa:g}' for hpa in hpas)} hPa" for name, hpas in levels.items() if hpas is not None]
    maps = [name for name, variable in variables.items() if variable.usable and name not in levels]
    shown = given + sorted(maps)[:24] + (["…"] if len(maps) > 24 else [])
    return f"{text} (the file has {', '.join(shown) or 'no variable on its latitude and longitude'})"


def _remedy(missing: Sequence[Channel]) -> str:
    names = "; ".join(f"{channel.name}: {_spoken(channel)}" for channel in missing[:3])
    more = "; …" if len(missing) > 3 else ""
    return f"Merge the files that hold them (same times, same grid) into one, under any of these names: {names}{more}"


def _spoken(channel: Channel) -> str:
    return ", ".join(f"{alias.name} at {alias.level_hpa:g} hPa" if alias.level_hpa else alias.name for alias in _names(channel))



"""Which variable of a file is which of the 16 channels: a plan made from names, dimensions and units alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysegment.archive.units import conversion
from raysegment.climate.channels import BY_NAME, CHANNELS, NAMES, Alias, Channel
from raysegment.climate.checks import BadInput

_LEVEL_HPA = 0.5  # a level counts as found within this
_WATER = {"TMQ", "PRECT"}
_GEOPOTENTIAL = {"Z1000", "Z200", "PHIS_M"}
_PAIRS = (("UBOT", "VBOT"), ("U850", "V850"))  # both components of a wind come from one level
_DEWPOINT_NAMES = (Alias("d2m", "ERA5", "K"), Alias("2d", "ERA5", "K"))
DEWPOINT = Channel("D2M", "K", "dew point at 2 m", 130.0, 330.0, 278.0, 20.0, _DEWPOINT_NAMES)
IVT = "IVT"  # how the vapour transport is asked for, beside the names of channels
# What else is read for a channel: the below-ground rule, and how to tell whether the file's maker applied it (see `ground`)
_BESIDE = {"U850": ("UBOT", "PS"), "V850": ("VBOT", "U850", "UBOT", "PS"),
           "Z1000": ("ZBOT", "PS", "PSL", "TREFHT", "U850", "UBOT")}  # fmt: skip
_AS_WRITTEN = "kg kg-1 m-1 s-1"  # what files made from MERRA-2 say


def _transport(name: str, long_name: str, minimum: float, *names: str) -> Channel:
    """Vapour transport, no channel of the 16, under other archives' names (MERRA-2, ERA5, CMIP6)."""
    return Channel(name, "kg m-1 s-1", long_name, minimum, 1e4, 0.0, 1.0, tuple(Alias(a, "", _AS_WRITTEN) for a in names))


TRANSPORT = _transport("transport", "vertically integrated vapour transport", 0.0, "IVT", "ivt")
TRANSPORT_PARTS = (
    _transport("transport_east", "eastward vapour transport", -1e4, "UFLXQV", "viwve", "p71.162", "intuaw", "uIVT"),
    _transport("transport_north", "northward vapour transport", -1e4, "VFLXQV", "viwvn", "p72.162", "intvaw", "vIVT"),
)


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
    """Recipes by channel name; `dewpoint` where QREFHT must be derived; `zbot` when ZBOT must be; `transport` of the file's
    own IVT: of its magnitude, of both components, or none."""

    recipes: Mapping[str, Recipe]
    dewpoint: Recipe | None = None
    zbot: bool = False
    transport: tuple[Recipe, ...] = ()

    @property
    def channels(self) -> frozenset[str]:
        """Names of the channels that the file gives."""
        derived = {"ZBOT": self.zbot, "QREFHT": self.dewpoint is not None}
        return frozenset(self.recipes) | {name for name, possible in derived.items() if possible}

    def only(self, wanted: Collection[str]) -> Plan:
        """The part of the plan that gives the wanted channels (and IVT), with what is read beside them."""
        names = set(wanted).union(*(_BESIDE.get(name, ()) for name in wanted))
        zbot, dewpoint = self.zbot and "ZBOT" in names, self.dewpoint if "QREFHT" in names else None
        names |= ({"TREFHT"} if zbot else set()) | ({"PS"} if dewpoint is not None else set())
        recipes = {name: recipe for name, recipe in self.recipes.items() if name in names}
        return Plan(recipes, dewpoint, zbot, self.transport if IVT in names else ())

    @property
    def names(self) -> list[str]:
        """Archives whose names were used."""
        return sorted({recipe.group for recipe in self.recipes.values()})


def plan(path: Path, variables: Mapping[str, Variable]) -> Plan:
    """The plan for a file that holds `variables`, as far as it goes; BadInput that names a wrong unit."""
    recipes = {channel.name: recipe for channel in CHANNELS if (recipe := find(path, channel, variables))}
    for first, second in _PAIRS:
        recipes |= _pair(path, BY_NAME[first], BY_NAME[second], variables)
    dewpoint = None if "QREFHT" in recipes or "PS" not in recipes else find(path, DEWPOINT, variables)
    zbot = "ZBOT" not in recipes and "TREFHT" in recipes
    return Plan(recipes, dewpoint, zbot, find_transport(path, variables))


def demand(path: Path, how: Plan, variables: Mapping[str, Variable], needed: Collection[str] = NAMES) -> None:
    """Raise BadInput that names every channel that is needed and that the file does not give."""
    missing = [channel for channel in CHANNELS if channel.name in needed and channel.name not in how.channels]
    if missing:
        expected = "all 16 channels" if len(needed) == len(NAMES) else f"channels {', '.join(sorted(needed))}"
        raise BadInput(path, expected, _missing(missing, variables), _remedy(missing))


def find_transport(path: Path, variables: Mapping[str, Variable]) -> tuple[Recipe, ...]:
    """Recipes of a file's own vapour transport: of its magnitude, else of both components (of one archive), else none.

    What has one of the names and the unit of something else is none: nobody asked for it.
    """
    try:
        whole = find(path, TRANSPORT, variables)
        return (whole,) if whole is not None else tuple(_pair(path, *TRANSPORT_PARTS, variables).values())
    except BadInput:
        return ()


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



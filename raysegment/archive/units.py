"""What a unit string means, and the factor between two of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from raysegment.climate.channels import GRAVITY_M_S2

WATER_KG_M3 = 1000.0

_ALONE = {  # factor to SI, exponents of m, kg, s, K
    "m": (1.0, (1, 0, 0, 0)), "km": (1e3, (1, 0, 0, 0)), "cm": (1e-2, (1, 0, 0, 0)), "mm": (1e-3, (1, 0, 0, 0)),
    "kg": (1.0, (0, 1, 0, 0)), "g": (1e-3, (0, 1, 0, 0)),
    "s": (1.0, (0, 0, 1, 0)), "min": (60.0, (0, 0, 1, 0)), "h": (3600.0, (0, 0, 1, 0)), "day": (86400.0, (0, 0, 1, 0)),
    "K": (1.0, (0, 0, 0, 1)), "degC": (1.0, (0, 0, 0, 1)), "degF": (5.0 / 9.0, (0, 0, 0, 1)),
    "Pa": (1.0, (-1, 1, -2, 0)), "hPa": (1e2, (-1, 1, -2, 0)), "kPa": (1e3, (-1, 1, -2, 0)),
    "J": (1.0, (2, 1, -2, 0)), "N": (1.0, (1, 1, -2, 0)), "knot": (1852.0 / 3600.0, (1, 0, -1, 0)),
    "1": (1.0, (0, 0, 0, 0)), "%": (1e-2, (0, 0, 0, 0)),
}  # fmt: skip
_OFFSET = {"degC": 273.15, "degF": 273.15 - 32.0 * 5.0 / 9.0}
_SPELLINGS = {
    "meter": "m", "meters": "m", "metre": "m", "metres": "m", "gpm": "m", "mH2O": "m", "millimeter": "mm", "millimeters": "mm",
    "sec": "s", "second": "s", "seconds": "s", "minute": "min", "minutes": "min",
    "hr": "h", "hrs": "h", "hour": "h", "hours": "h", "d": "day", "days": "day",
    "pa": "Pa", "Pascal": "Pa", "Pascals": "Pa", "pascal": "Pa", "pascals": "Pa", "hpa": "hPa", "mb": "hPa", "mbar": "hPa",
    "mbars": "hPa", "millibar": "hPa", "millibars": "hPa", "hectopascal": "hPa", "hectopascals": "hPa",
    "k": "K", "kelvin": "K", "Kelvin": "K", "degK": "K", "deg_K": "K", "C": "degC", "°C": "degC", "deg_C": "degC",
    "celsius": "degC", "Celsius": "degC", "degrees_C": "degC",
    "degree_C": "degC", "degree_Celsius": "degC", "degrees_Celsius": "degC", "F": "degF",
    "deg_F": "degF", "kt": "knot", "kts": "knot", "knots": "knot", "kn": "knot", "percent": "%", "dimensionless": "1",
}  # fmt: skip
_PHRASES = (
    (r"\(0 ?- ?1\)", "1"),
    (r"geopotential met(?:re|er)s?", "m"),
    (r"m(?:et(?:re|er)s?)? of water(?: equivalent)?", "m"),
)
_FACTOR = re.compile(r"([A-Za-z°_%]+?|1)(?:(?:\^|\*\*)?([+-]?\d+))?$")


@dataclass(frozen=True)
class Unit:
    """A unit as `SI = factor · x + offset`, with the exponents of m, kg, s and K."""

    factor: float
    offset: float
    exponents: tuple[int, ...]


def parse(text: str) -> Unit | None:
    """The unit that `text` spells in any of the usual ways ("kg/m2", "kg m-2", "kg m**-2"), None when it is no known unit."""
    for phrase, plain in _PHRASES:
        text = re.sub(phrase, plain, text)
    words = re.sub(r"\s*/\s*", " /", re.sub(r"\s*(\*\*|\^)\s*", r"\1", text)).replace("·", " ").strip()
    factor, exponents, names = 1.0, [0, 0, 0, 0], []
    for word in re.split(r"[\s.]+|(?<!\*)\*(?!\*)", words):
        match = _FACTOR.match(word.lstrip("/"))
        if match is None:
            return None
        name = _SPELLINGS.get(match[1], match[1])
        if name not in _ALONE:
            return None
        power = int(match[2] or 1) * (-1 if word.startswith("/") else 1)
        factor *= _ALONE[name][0] ** power
        exponents = [have + power * more for have, more in zip(exponents, _ALONE[name][1], strict=True)]
        names.append(name)
    return Unit(factor, _OFFSET.get(names[0], 0.0) if len(names) == 1 else 0.0, tuple(exponents))


def conversion(declared: str, wanted: str, water: bool = False, geopotential: bool = False) -> tuple[float, float] | None:
    """`factor, offset` with `wanted = factor · declared + offset`; None when the two measure different things.

    `water`: 1 kg m⁻² of water is 1 mm, so that rates and columns of it may be given either way. `geopotential`: m² s⁻²
    and geopotential metres stand for each other by standard gravity.
    """
    have, want = parse(declared), parse(wanted)
    assert want is not None, wanted
    if have is None:
        return None
    ratio = _bridge(have, want, water, geopotential)
    return None if ratio is None else (have.factor * ratio / want.factor, (have.offset - want.offset) / want.factor)


def _bridge(have: Unit, want: Unit, water: bool, geopotential: bool) -> float | None:
    """SI of `want` per SI of `have`, None where they cannot be bridged."""
    apart = tuple(a - b for a, b in zip(have.exponents, want.exponents, strict=True))
    bridges: dict[tuple[int, ...], float] = {(0, 0, 0, 0): 1.0}
    if water:
        bridges |= {(3, -1, 0, 0): WATER_KG_M3, (-3, 1, 0, 0): 1.0 / WATER_KG_M3}
    if geopotential:
        bridges |= {(1, 0, -2, 0): 1.0 / GRAVITY_M_S2, (-1, 0, 2, 0): GRAVITY_M_S2}
    return bridges.get(apart)

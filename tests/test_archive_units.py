"""Units are compared by what they mean, and channels found by name, level and unit."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysegment.archive.aliases import Recipe, Variable, demand, plan
from raysegment.archive.units import conversion, parse
from raysegment.climate.channels import GRAVITY_M_S2, NAMES
from raysegment.climate.checks import BadInput

PATH = Path("some.nc")


@pytest.mark.parametrize(
    ("declared", "wanted", "factor", "offset"),
    [
        ("kg/m2", "kg m-2", 1, 0), ("kg m**-2", "kg m-2", 1, 0), ("kg m^-2", "kg m-2", 1, 0), ("kg.m-2", "kg m-2", 1, 0),
        ("kg / m^2", "kg m-2", 1, 0), ("m/s", "m s-1", 1, 0), ("m s**-1", "m s-1", 1, 0), ("meters/second", "m s-1", 1, 0),
        ("knots", "m s-1", 0.514444, 0), ("km/h", "m s-1", 1 / 3.6, 0), ("hPa", "Pa", 100, 0), ("millibars", "Pa", 100, 0),
        ("kPa", "Pa", 1000, 0), ("degC", "K", 1, 273.15), ("Celsius", "K", 1, 273.15), ("degF", "K", 5 / 9, 255.3722),
        ("kg/kg", "kg kg-1", 1, 0), ("g/kg", "kg kg-1", 1e-3, 0), ("1", "kg kg-1", 1, 0),
        ("gpm", "m", 1, 0), ("km", "m", 1000, 0),
        ("mm/day", "m s-1", 1e-3 / 86400, 0), ("mm h-1", "m s-1", 1e-3 / 3600, 0), ("J kg-1", "m2 s-2", 1, 0),
        ("m of water equivalent", "m", 1, 0), ("m+2 s-2", "m2 s-2", 1, 0),
    ],
)  # fmt: skip
def test_conversion(declared, wanted, factor, offset):
    assert conversion(declared, wanted) == pytest.approx((factor, offset), rel=1e-5)


def test_conversion_by_quantity():
    assert conversion("mm", "kg m-2", water=True) == pytest.approx((1.0, 0.0))
    assert conversion("kg m-2 s-1", "m s-1", water=True) == pytest.approx((1e-3, 0.0))
    assert conversion("m2 s-2", "m", geopotential=True) == pytest.approx((1 / GRAVITY_M_S2, 0.0))
    assert conversion("m", "m2 s-2", geopotential=True) == pytest.approx((GRAVITY_M_S2, 0.0))
    assert conversion("mm", "kg m-2") is None, "only water's millimetres are kilograms per square metre"
    assert conversion("kg m-2 s-1", "m s-1") is None, "a mass flux is no wind"
    assert conversion("K", "Pa") is None
    assert conversion("furlong", "m") is None
    assert parse("m s -1") is None


def variables(**units: str) -> dict[str, Variable]:
    """A file with all channels under CAM's names, some replaced or given a unit."""
    return {name: Variable(name) for name in NAMES} | {name: Variable(name, unit) for name, unit in units.items()}


@pytest.mark.parametrize(
    ("name", "unit", "factor"),
    [
        ("TMQ", "mm", 1.0), ("PRECT", "mm/day", 1e-3 / 86400), ("PRECT", "kg m-2 s-1", 1e-3), ("PSL", "hPa", 100.0),
        ("Z1000", "m2 s-2", 1 / GRAVITY_M_S2), ("Z200", "gpm", 1.0), ("U850", "", 1.0),
    ],
)  # fmt: skip
def test_declared_unit_decides(name, unit, factor):
    recipe = plan(PATH, variables(**{name: unit})).recipes[name]
    assert (recipe.variable, recipe.group) == (name, "CAM")
    assert recipe.factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("name", "unit"), [("PSL", "K"), ("TMQ", "m/s"), ("U850", "kg m-2 s-1"), ("T500", "parsec"), ("Z200", "Pa")]
)
def test_another_quantity_is_refused(name, unit):
    with pytest.raises(BadInput) as caught:
        plan(PATH, variables(**{name: unit}))
    assert name in caught.value.expected
    assert unit in caught.value.got
    assert caught.value.where == str(PATH)


def without(*names: str) -> dict[str, Variable]:
    return {name: variable for name, variable in variables().items() if name not in names}


def test_undeclared_unit_is_the_archive_s_own():
    levels = (1000.0, 850.0, 500.0, 200.0)
    have = without("Z1000", "PRECT", "TMQ") | {"z": Variable("z", "", True, levels), "tp": Variable("tp"), "prw": Variable("prw")}
    recipes = plan(PATH, have).recipes
    assert recipes["Z1000"] == Recipe("z", pytest.approx(1 / GRAVITY_M_S2), 0.0, 0, "ERA5")
    assert recipes["PRECT"].factor == pytest.approx(1 / 3600)
    assert recipes["TMQ"].factor == 1.0
    assert plan(PATH, have | {"z": Variable("z", "m", True, levels)}).recipes["Z1000"].factor == pytest.approx(1.0), (
        "heights stay"
    )
    assert plan(PATH, have | {"tp": Variable("tp", "mm")}).recipes["PRECT"].factor == pytest.approx(1e-3 / 3600)


def test_names_are_told_apart_by_case_and_levels():
    surface = without("TS", "PS") | {"ts": Variable("ts", "K"), "ps": Variable("ps", "Pa"), "T": Variable("T", "K", False)}
    recipes = plan(PATH, surface).recipes
    assert (recipes["TS"].variable, recipes["PS"].variable) == ("ts", "ps")
    flat = without("T500") | {"t": Variable("t", "K")}
    with pytest.raises(BadInput, match="none for T500"):
        demand(PATH, plan(PATH, flat), flat)
    deep = without("T500") | {"t": Variable("t", "K", True, (850.0, 500.0))}
    assert plan(PATH, deep).recipes["T500"].level == 1
    elsewhere = without("T500") | {"t": Variable("t", "K", True, (850.0, 700.0))}
    with pytest.raises(BadInput, match=r"none for T500 \(the file has t at 850, 700 hPa"):
        demand(PATH, plan(PATH, elsewhere), elsewhere)
    demand(PATH, plan(PATH, elsewhere), elsewhere, {"TMQ", "T200"})


def test_both_components_of_a_wind_come_from_one_level():
    names = ("u100", "u10", "v10")
    recipes = plan(PATH, without("UBOT", "VBOT") | {name: Variable(name, "m s-1") for name in names}).recipes
    assert (recipes["UBOT"].variable, recipes["VBOT"].variable) == ("u10", "v10")
    both = plan(PATH, without("UBOT", "VBOT") | {name: Variable(name, "m s-1") for name in (*names, "v100")}).recipes
    assert (both["UBOT"].variable, both["VBOT"].variable) == ("u100", "v100")


def test_what_is_derived_is_not_missed_and_what_is_missing_is_named():
    derived = plan(PATH, without("ZBOT", "QREFHT") | {"d2m": Variable("d2m", "K")})
    assert derived.zbot
    assert derived.dewpoint is not None
    with pytest.raises(BadInput) as caught:
        demand(PATH, plan(PATH, without("ZBOT", "QREFHT", "T200")), without("ZBOT", "QREFHT", "T200"))
    assert "none for QREFHT, T200" in caught.value.got
    assert "huss" in caught.value.remedy


@pytest.mark.parametrize(
    ("names", "unit", "count"),
    [
        (("IVT",), "kg m-1 s-1", 1),
        (("IVT",), "kg kg**-1 m**-1 s**-1", 1),
        (("IVT",), "kg/m/s", 1),
        (("IVT",), "", 1),
        (("viwve", "viwvn"), "kg m**-1 s**-1", 2),
        (("UFLXQV", "viwvn"), "kg m-1 s-1", 0),
        (("IVT",), "K", 0),
    ],
)
def test_a_files_own_vapour_transport_is_known_by_name_and_unit(names, unit, count):
    assert len(plan(PATH, {name: Variable(name, unit) for name in names}).transport) == count

"""Rules by name: what each name means, and what they say together."""

from __future__ import annotations

import numpy as np
import pytest

from raysegment.archive.snapshots import open_source
from raysegment.climate.channels import CYCLONE, INDEX, NAMES, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.cyclones import CYCLONE_PRESETS, SHAPES
from raysegment.climate.events import find_events
from raysegment.climate.grid import KM_PER_DEGREE, Grid, great_circle_km
from raysegment.climate.rivers import RIVER_PRESETS, ivt_stand_in
from raysegment.climate.rules import BLANK_DEG, RULES, Rules, parse_rules, presets_for
from tests.helpers import real_data
from tests.weather import add_stream, add_vortex, quiet

GRID = Grid.global_(181, 360)


def weather() -> np.ndarray:
    fields = quiet(GRID)
    add_vortex(fields, GRID, 17.0, 179.5)
    add_stream(fields, GRID, 42.0, 0.5, slope_deg=60.0)
    return fields


@pytest.mark.parametrize("cyclones", [None, *CYCLONE_PRESETS])
@pytest.mark.parametrize("rivers", [None, *RIVER_PRESETS])
def test_the_name_of_rules_names_those_rules(cyclones, rivers):
    for shape in SHAPES if cyclones else ("wind",):
        if cyclones or rivers:
            assert parse_rules(Rules(cyclones, rivers, shape).name) == Rules(cyclones, rivers, shape)


@pytest.mark.parametrize("name", RULES)
def test_every_name_labels(name):
    rules = parse_rules(f"rules:{name}")
    mask = rules.label(weather(), GRID)
    assert mask.dtype == np.uint8
    assert mask.shape == GRID.shape
    assert (mask[GRID.nearest(17.0, 179.5)] == CYCLONE) == (rules.cyclones is not None)
    assert (mask == CYCLONE).any() == (rules.cyclones is not None)
    assert (mask[GRID.nearest(42.0, 0.5)] == RIVER) == (rules.rivers is not None)


def test_what_names_mean():
    assert parse_rules("rules:teca+ivt") == parse_rules("teca+ivt") == Rules("teca", "ivt")
    assert parse_rules("rules:teca") == Rules("teca", None)
    assert parse_rules("rules:ivt") == Rules(None, "ivt")
    assert parse_rules("rules:tempest") == Rules("tempest", "tempest")
    assert parse_rules("rules:paper2018") == Rules("teca", "paper2018", "paper2018")
    second = Rules("teca_super_relaxed", "paper2018_21", "paper2018")
    assert parse_rules("rules:paper2018_labels_1") == parse_rules("teca_super_relaxed+paper2018_21@paper2018") == second
    assert parse_rules("rules:tempest+none@paper2018") == Rules("tempest", None, "paper2018")
    assert parse_rules("rules:teca+paper2018").name != parse_rules("rules:paper2018").name, "their masks differ"
    assert parse_rules("rules:teca_relaxed+guan_waliser").name == "rules:teca_relaxed+guan_waliser"
    default = parse_rules("rules:default")
    assert default.cyclones in CYCLONE_PRESETS
    assert default.rivers in RIVER_PRESETS
    assert "Ullrich" in default.sources


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("rules:tecca", "teca"),
        ("rules:teca+itv", "ivt"),
        ("rules:tempst+ivt", "tempest"),
        ("rules:paper", "paper2018"),
        ("rules:teca@wnd", "wind"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(text, suggestion):
    with pytest.raises(BadInput, match=f"Did you mean {suggestion}") as error:
        parse_rules(text)
    assert error.value.where == text


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(BadInput, match="teca, teca_relaxed"):
        parse_rules("rules:xyzzy+ivt")
    with pytest.raises(BadInput, match="a name of rules"):
        parse_rules("rules:none+none")
    with pytest.raises(BadInput, match="rivers only"):
        parse_rules("rules:ivt@paper2018")


def test_cyclones_win_and_rivers_keep_away_from_them():
    fields = quiet(GRID)
    add_vortex(fields, GRID, 30.0, 180.0)
    add_stream(fields, GRID, 36.0, 186.0)
    alone = parse_rules("rules:ivt").label(fields, GRID)
    near = GRID.distance_km(30.0, 180.0) < (BLANK_DEG - 0.5) * KM_PER_DEGREE
    assert (alone[near] == RIVER).any()
    both = parse_rules("rules:tempest+ivt").label(fields, GRID)
    assert not (both[near] == RIVER).any()
    assert both[GRID.nearest(30.0, 180.0)] == CYCLONE


def test_shape_matters():
    fields = weather()
    masks = [Rules("teca", None, shape).label(fields, GRID) for shape in ("wind", "paper2018")]
    assert not np.array_equal(*masks)


@pytest.mark.parametrize("name", ["default", "teca+ivt", "teca_relaxed+guan_waliser", "paper2018"])
def test_jova_and_irwin_are_objects_of_the_mask(name):
    with open_source(real_data("gfs_2011-10-11T00.nc")) as source:
        snapshot = source.read(0)
    mask = parse_rules(name).label(snapshot.fields, snapshot.grid)
    cyclones = [event for event in find_events(mask, snapshot.grid, snapshot.fields) if event.kind == CYCLONE]
    for place in ((17.5, 255.0), (17.5, 242.5)):
        assert min(great_circle_km(e.lat, e.lon, *place) for e in cyclones) < 3.0 * KM_PER_DEGREE
    assert sum(abs(e.lat) < 50 for e in cyclones) <= 4
    assert all(e.cells >= 3 for e in cyclones)


def partial(names: frozenset[str]) -> np.ndarray:
    fields = weather()
    fields[[INDEX[name] for name in NAMES if name not in names]] = np.nan
    return fields


@pytest.mark.parametrize("name", RULES)
def test_nothing_but_what_is_needed_is_read(name):
    rules = parse_rules(name)
    assert np.array_equal(rules.label(partial(rules.needs), GRID), rules.label(weather(), GRID))


@pytest.mark.parametrize("name", RULES)
def test_every_channel_that_is_needed_is_missed(name):
    rules = parse_rules(name)
    for absent in rules.needs:
        with pytest.raises(BadInput, match=f"values of .*{absent}"):
            rules.label(partial(rules.needs - {absent}), GRID)
        assert name not in presets_for(rules.needs - {absent})
    assert name in presets_for(rules.needs)
    with pytest.raises(BadInput, match="No rules would work"):
        rules.label(partial(frozenset()), GRID)


def test_ivt_takes_the_place_of_what_it_is_made_of():
    ivt = ivt_stand_in(weather())
    empty = partial(frozenset())
    for name in ("ivt", "guan_waliser"):
        rules = parse_rules(name)
        assert rules.can_use_ivt
        assert rules.label(empty, GRID, ivt)[GRID.nearest(42.0, 0.5)] == RIVER
        assert not rules.label(weather(), GRID, np.zeros(GRID.shape)).any()
    assert not any(parse_rules(name).can_use_ivt for name in ("default", "paper2018_21", "teca"))
    assert set(presets_for(set(), has_ivt=True)) == {"ivt", "guan_waliser"}
    assert presets_for(set()) == ()
    both = parse_rules("tempest")
    assert both.missing(both.needs - {"TMQ"}) == ("TMQ",)
    assert np.array_equal(both.label(partial(both.needs - {"TMQ"}), GRID, ivt), both.label(weather(), GRID))
    ivt[GRID.nearest(-40.0, 200.0)] = np.nan
    assert not parse_rules("ivt").label(empty, GRID, ivt)[GRID.nearest(-40.0, 200.0)]
    with pytest.raises(BadInput, match=r"all missing.*rules:paper2018_21"):
        parse_rules("ivt").label(partial(frozenset({"TMQ"})), GRID, np.full(GRID.shape, np.nan))

"""The ledger finds what is wrong with a log, each thing by its own name, and nothing in a good one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import ledger

G, STEPS, TILES = 6, 9, 11  # 54 positions: four epochs and ten positions of the fifth

Line = dict[str, Any]


def good(with_tiles: bool = True) -> list[Line]:
    """The lines of a run to which nothing happened."""
    chance = random.Random(3)
    order = [tile for _ in range(5) for tile in chance.sample(range(TILES), TILES)]
    lines = [{"step": step, "loss": 0.5, "cursor": step * G, "positions": G} for step in range(STEPS)]
    return [{**line, "tiles": order[line["cursor"] :][:G]} for line in lines] if with_tiles else lines


def read(path: Path, lines: list[Line], tail: str = "") -> ledger.Ledger:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return ledger.read(path, G, STEPS, TILES)


@pytest.mark.parametrize("with_tiles", [True, False])
def test_a_good_log_is_clean(tmp_path, with_tiles):
    result = read(tmp_path / "steps.jsonl", good(with_tiles))
    assert result == ledger.Ledger(steps=STEPS)
    assert result.clean
    plain = [{key: line[key] for key in ("step", "cursor")} for line in good(False)]
    assert read(tmp_path / "steps.jsonl", plain).clean


def twice(lines: list[Line]) -> None:
    lines.insert(4, lines[3])


def without(lines: list[Line]) -> None:
    del lines[4]


def swapped(lines: list[Line]) -> None:
    lines[3], lines[4] = lines[4], lines[3]


def too_many(lines: list[Line]) -> None:
    lines.append({**lines[-1], "step": STEPS, "cursor": STEPS * G})


def late_cursor(lines: list[Line]) -> None:
    lines[4]["cursor"] += 1


def short(lines: list[Line]) -> None:
    lines[4]["positions"] -= 1
    lines[4]["tiles"].pop()


def wrong_tile(lines: list[Line]) -> None:
    """Within an epoch, one tile in the place of another."""
    lines[0]["tiles"][0] = lines[0]["tiles"][1]


def unknown_tile(lines: list[Line]) -> None:
    lines[0]["tiles"][0] = TILES


def late_tile(lines: list[Line]) -> None:
    """In the epoch that has only begun, a tile again."""
    lines[-1]["tiles"][-1] = lines[-1]["tiles"][-2]


def nameless(lines: list[Line]) -> None:
    del lines[0]["tiles"]


@pytest.mark.parametrize(
    ("spoil", "counts", "said"),
    [
        (twice, {"steps_repeated": 1, "positions_repeated": G, "tiles_repeated": G}, "line 4: expected step 4, got 3"),
        (without, {"steps_missing": 1, "positions_missing": G, "tiles_missing": G}, "line 4: expected step 4, got 5"),
        (swapped, {}, "line 3: expected step 3, got 4"),
        (too_many, {}, "line 9: expected step none, got 9"),
        (late_cursor, {"positions_repeated": 1, "positions_missing": 1}, "step 4: expected cursor 24, got 25"),
        (short, {"positions_missing": 1, "tiles_missing": 1}, "step 4: expected 6 positions, got 5"),
        (wrong_tile, {"tiles_repeated": 1, "tiles_missing": 1}, "epoch 0: expected 11 of 11 tiles once each"),
        (unknown_tile, {"tiles_missing": 1}, "0 repeated, 1 missing, 1 unknown"),
        (late_tile, {"tiles_repeated": 1, "tiles_missing": 1}, "epoch 4: expected 10 of 11 tiles once each"),
        (nameless, {"tiles_missing": G}, "epoch 0: .* 0 repeated, 6 missing"),
    ],
)
def test_what_is_wrong_is_counted_and_said(tmp_path, spoil: Callable[[list[Line]], None], counts: dict[str, int], said: str):
    lines = good()
    spoil(lines)
    result = read(tmp_path / "steps.jsonl", lines)
    assert not result.clean
    names = [name for name in vars(result) if name.endswith(("repeated", "missing"))]
    for name in names:
        if spoil not in (too_many, late_cursor) or name in counts:  # these two also shift what follows
            assert getattr(result, name) == counts.get(name, 0), name
    problems = "\n".join(result.problems)
    assert re.search(said, problems), problems


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ('{"step": 9, "cur', "the last line has no end"),
        ('{"step": 9, "cur\n', "line 9 is no object"),
        ("[9]\n", "line 9 is no object"),
        ("\n", "line 9 is no object"),
        ('{"step": 9}\n', "line 9 is no object"),
        ('{"step": -1, "cursor": 0}\n', "line 9 is no object"),
        ('{"step": 1.0, "cursor": 6}\n', "line 9 is no object"),
    ],
)
def test_a_line_that_is_not_whole_is_a_problem(tmp_path, tail, said):
    result = read(tmp_path / "steps.jsonl", good(), tail)
    assert len(result.problems) == 1
    assert result.problems[0].startswith(said)


def test_a_log_that_ends_early_is_missing_the_rest(tmp_path):
    result = read(tmp_path / "steps.jsonl", good()[:5])
    assert (result.steps_missing, result.positions_missing, result.tiles_missing) == (4, 24, 24)
    assert "line 5: expected step 5, got nothing" in result.problems

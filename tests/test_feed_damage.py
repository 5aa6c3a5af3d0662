"""Damage is found before a tile is used, left out the same way by everybody, and borne within the budget only."""

from __future__ import annotations

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.archive import reader
from raysegment.archive.manifest import MANIFEST, Manifest
from raysegment.archive.reader import Damaged, Folder, TileReader
from raysegment.archive.retry import patiently
from raysegment.archive.shards import TileId, open_shards, write_shard
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.feed.order import Order
from raysegment.feed.quarantine import Case, Quarantine, allowed
from raysegment.feed.store import Source, TileStore
from raysegment.feed.stream import FeedConfig, open_stream
from tests.small_archive import fields_and_mask

TILES = 12


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Twelve tiles in three shards."""
    return write_set(tmp_path_factory.mktemp("intact"), 0)


def write_set(folder: Path, seed: int) -> Path:
    parts = []
    for number in range(3):
        rows = [(*fields_and_mask(seed + tile), TileId(f"{tile}.nc", 0, "", 0, 0)) for tile in range(4 * number, 4 * number + 4)]
        parts.append(write_shard(folder / f"part-{number:05d}.arrow", rows))
    Manifest.of(parts, (16, 32), Grid.global_(16, 32), "test").save(folder)
    return folder


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "shards"))


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ (1 << bit)]))


def tile_reader(folder: Path, ledger: Path | None = None) -> TileReader:
    manifest = Manifest.load(folder)
    return TileReader(manifest, Folder(folder, manifest), ledger)


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.full((16, 16, 32), 7, np.float16), np.full((16, 32), 7, np.uint8)


def damaged_tiles(folder: Path) -> list[int]:
    found, read = [], tile_reader(folder)
    for number in range(TILES):
        try:
            read.read(number, *arrays())
        except Damaged:
            found.append(number)
    return found


def test_tiles_are_read_as_they_are(intact, tmp_path):
    read, shards = tile_reader(intact, tmp_path / "ledger"), open_shards(intact)
    for number in [*range(TILES), *range(TILES)]:
        fields, mask = arrays()
        read.read(number, fields, mask)
        np.testing.assert_array_equal(fields, shards.tile(number).fields)
        np.testing.assert_array_equal(mask, shards.tile(number).mask)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_of_a_tile_is_found(intact, tmp_path_factory, data):
    """Also where it hits a tile's metadata, its name or its padding: then in that tile, and in no other."""
    manifest = Manifest.load(intact)
    number = data.draw(st.integers(0, TILES - 1))
    shard, place = manifest.find(number)
    start, stop = manifest.shards[shard].offsets[place : place + 2]
    copy = Path(shutil.copytree(intact, tmp_path_factory.mktemp("flip") / "s"))
    flip(copy / manifest.shards[shard].file, data.draw(st.integers(start, stop - 1)), data.draw(st.integers(0, 7)))
    assert damaged_tiles(copy) == [number]


def test_a_tile_is_proved_once_per_node_and_again_when_its_file_changes(folder, tmp_path, monkeypatch):
    checked = []
    plain = reader._ShardFile._check

    def check(self, place, parts):
        checked.append(place)
        plain(self, place, parts)

    monkeypatch.setattr(reader._ShardFile, "_check", check)
    ledger = tmp_path / "ledger"
    first, second = tile_reader(folder, ledger), tile_reader(folder, ledger)
    for read in (first, first, second):
        read.read(5, *arrays())
    assert checked == [1]
    assert second.proved(5)
    assert not second.proved(6)
    flip(folder / "part-00001.arrow", Manifest.load(folder).shards[1].offsets[1] + 5000)
    with pytest.raises(Damaged, match=r"part-00001\.arrow: tile 1 has CRC-32"):
        tile_reader(folder, ledger).read(5, *arrays())
    assert len(list(ledger.glob("*part-00001.arrow.*"))) == 1


def test_a_shard_cut_short_loses_what_was_cut(folder):
    offsets = Manifest.load(folder).shards[2].offsets
    os.truncate(folder / "part-00002.arrow", offsets[2] + 100)
    assert damaged_tiles(folder) == [10, 11]
    with pytest.raises(Damaged, match="cut short"):
        tile_reader(folder).read(10, *arrays())
    (folder / "part-00000.arrow").unlink()
    assert damaged_tiles(folder) == [0, 1, 2, 3, 10, 11]
    with pytest.raises(Damaged, match="no such file"):
        tile_reader(folder).read(0, *arrays())


def steps(folder: Path, quarantine: Quarantine, first: int = 0, last: int = 8, rank: int = 0, world: int = 1):
    return list(open_stream(folder, Order(TILES, 6, 2, seed=1), first, last, rank, world, FeedConfig(), quarantine))


def marked(found) -> set[int]:
    """Positions that were left out."""
    batches = [batch for step in found for batch in step.micro_batches if batch.usable is not None]
    return {int(p) for batch in batches for p, good in zip(batch.positions, batch.usable, strict=True) if not good}


def places(tile: int, first: int, last: int) -> set[int]:
    order = Order(TILES, 6, 2, seed=1)
    return {position for position in range(first * 6, last * 6) if order.tile(position) == tile}


def test_the_epoch_goes_on_without_the_tile(folder, tmp_path, intact):
    flip(folder / "part-00001.arrow", Manifest.load(folder).shards[1].offsets[3] + 3000)
    quarantine = Quarantine(TILES, 1, tmp_path / "q.jsonl")
    found = steps(folder, quarantine)
    assert marked(found) == places(7, 0, 8)
    whole = steps(intact, Quarantine(TILES, 0))
    for step, want in zip(found, whole, strict=True):
        for batch, other in zip(step.micro_batches, want.micro_batches, strict=True):
            assert torch.equal(batch.positions, other.positions)
            good = torch.ones(2, dtype=torch.bool) if batch.usable is None else batch.usable
            assert torch.equal(batch.fields[good], other.fields[good])
            assert not batch.fields[~good].any()
            assert not batch.mask[~good].any()
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines() if line]
    assert {line["tile"] for line in lines} == {7}
    assert "CRC-32" in lines[0]["reason"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_replay_leaves_out_the_same_tiles_even_when_they_have_healed(folder, intact, tmp_path, world):
    flip(folder / "part-00001.arrow", Manifest.load(folder).shards[1].offsets[3] + 3000)
    path = tmp_path / "q.jsonl"
    first = marked(steps(folder, Quarantine(TILES, 1, path), 2, 8))
    again = [marked(steps(intact, Quarantine(TILES, 1, path), 2, 12, rank, world)) for rank in range(world)]
    assert set().union(*again) == first | places(7, 8, 12)


def test_a_tile_is_left_out_from_where_it_was_found_on():
    quarantine = Quarantine(100, 5)
    quarantine.add(Case(3, 50, "flipped"))
    quarantine.add(Case(3, 40, "flipped"))
    quarantine.add(Case(3, 60, "flipped"))
    assert [quarantine.excludes(3, position) for position in (39, 40, 61)] == [False, True, True]
    assert not quarantine.excludes(4, 61)
    assert quarantine.count == 1


def test_members_hear_of_each_others_finds_and_pass_over_torn_lines(tmp_path):
    path = tmp_path / "run" / "q.jsonl"
    one, other = Quarantine(100, 5, path), Quarantine(100, 5, path)
    one.add(Case(3, 40, "flipped"))
    with path.open("a") as file:
        file.write('{"tile": 9, "posi')  # its writer died
    one.add(Case(8, 41, "gone"))
    other.refresh()
    assert [other.excludes(tile, 100) for tile in (3, 8, 9)] == [True, True, False]


def test_budgets():
    assert [allowed(x, 1000) for x in (0, 0.0001, 0.001, 0.0011, 1, 7)] == [0, 1, 1, 2, 1, 7]


def test_strict_mode_stops_and_so_does_more_than_the_budget(folder):
    flip(folder / "part-00001.arrow", Manifest.load(folder).shards[1].offsets[3] + 3000)
    with pytest.raises(BadInput, match=r"at most 0 damaged tiles, got 1 of 12 .*CRC-32.*max_damaged"):
        steps(folder, Quarantine(TILES, 0))
    (folder / "part-00002.arrow").unlink()
    with pytest.raises(BadInput, match="at most 4 damaged tiles, got 5 of 12"):
        steps(folder, Quarantine(TILES, 4))
    assert len(marked(steps(folder, Quarantine(TILES, 5)))) == 4 * 5


def test_a_manifest_of_another_run_is_found_out(folder, tmp_path):
    """Every tile differs: more than any sensible budget, and the message asks the right question."""
    other = write_set(tmp_path / "other", seed=100)
    shutil.copy(other / MANIFEST, folder / MANIFEST)
    with pytest.raises(BadInput, match="is the manifest of another run"):
        steps(folder, Quarantine(TILES, 0.5))


def test_errors_that_pass_are_waited_for_and_forbidden_files_are_not_skipped(folder, monkeypatch):
    fired, plain, slept = [], os.preadv, []
    monkeypatch.setattr(reader, "patiently", partial(patiently, sleep=slept.append))

    def failing(code: int, times: int):
        def preadv(*arguments):
            if len(fired) < times:
                fired.append(code)
                raise OSError(code, os.strerror(code))
            return plain(*arguments)

        return preadv

    for code in (errno.EIO, errno.ESTALE):
        fired.clear()
        monkeypatch.setattr(os, "preadv", failing(code, 3))
        assert not marked(steps(folder, Quarantine(TILES, 0), 0, 1))
        assert fired == [code] * 3
        assert len(slept) == 3
        slept.clear()
    monkeypatch.setattr(os, "preadv", failing(errno.EACCES, 10**6))
    quarantine = Quarantine(TILES, 12)
    with pytest.raises(BadInput, match="rights"):
        steps(folder, quarantine, 0, 1)
    fired.clear()
    monkeypatch.setattr(os, "preadv", failing(errno.EIO, 10**6))
    with pytest.raises(OSError, match="Input/output"):
        steps(folder, quarantine, 0, 1)
    assert quarantine.count == 0, "an error of the storage is not a damaged tile"


def test_a_damaged_copy_in_the_cache_is_fetched_anew(folder, tmp_path, intact):
    store = TileStore(Source(str(folder), str(tmp_path / "cache")))
    assert store.prepare(list(range(TILES))) == TILES
    copy = store.files.path(1)
    flip(copy, store.manifest.shards[1].offsets[0] + 2000)
    again = TileStore(Source(str(folder), str(tmp_path / "cache")))
    fields, mask = arrays()
    again.read(4, fields, mask)
    np.testing.assert_array_equal(fields, open_shards(intact).tile(4).fields)
    flip(folder / "part-00001.arrow", store.manifest.shards[1].offsets[1] + 2000)
    copy.unlink()
    with pytest.raises(Damaged, match="tile 1 has CRC-32"):
        again.read(5, *arrays())


def test_a_damaged_copy_that_is_evicted_meanwhile_says_nothing_of_its_source(folder, tmp_path, intact, monkeypatch):
    store = TileStore(Source(str(folder), str(tmp_path / "cache")))
    assert store.prepare(list(range(TILES))) == TILES
    copy, plain, evicted = store.files.path(1), TileReader.read, []
    flip(copy, store.manifest.shards[1].offsets[0] + 2000)

    def evicting(self, *arguments):
        try:
            plain(self, *arguments)
        except Damaged:
            copy.unlink()
            evicted.append(copy)
            raise

    monkeypatch.setattr(TileReader, "read", evicting)
    fields, mask = arrays()
    TileStore(Source(str(folder), str(tmp_path / "cache"))).read(4, fields, mask)
    assert evicted == [copy]
    np.testing.assert_array_equal(fields, open_shards(intact).tile(4).fields)

"""Shards are read in place, prove their own bytes, and their manifest does not depend on who finished first."""

from __future__ import annotations

import json
import pickle
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.archive.manifest import MANIFEST, Manifest, Part
from raysegment.archive.moments import Moments
from raysegment.archive.places import Place
from raysegment.archive.quantise import REFERENCE, SCALE, dequantise, quantise
from raysegment.archive.shards import ShardWriter, TileId, open_shards, write_shard
from raysegment.climate.channels import CHANNELS, CLASSES, INDEX, NAMES
from raysegment.climate.checks import BadInput
from tests import layouts

HEIGHT, WIDTH = 8, 12


def tile(number: int) -> tuple[np.ndarray, np.ndarray, TileId]:
    """Tile `number` of an archive of eight steps with six tiles each."""
    step, place = divmod(number, 6)
    row, column = 1 + HEIGHT * (place // 3), WIDTH * (place % 3)
    window = (slice(row, row + HEIGHT), slice(column, column + WIDTH))
    origin = TileId(f"{1996 + step // 2}.nc", step % 2, f"1996-06-01T{3 * step:02d}:00:00", row, column)
    return layouts.weather(step)[:, *window], layouts.classes(step)[window], origin


def write_set(folder: Path, shards: int = 3, each: int = 5) -> Manifest:
    parts = [write_shard(folder / f"{n:05d}.arrow", (tile(n * each + k) for k in range(each))) for n in range(shards)]
    manifest = Manifest.of(parts, (HEIGHT, WIDTH), layouts.GRID, "rules:test")
    manifest.save(folder)
    return manifest


def test_tiles_come_back(tmp_path):
    manifest = write_set(tmp_path)
    shards = open_shards(tmp_path)
    assert len(shards) == manifest.tiles == 15
    for number, got in enumerate(shards):
        fields, mask, origin = tile(number)
        np.testing.assert_array_equal(got.fields, quantise(fields))
        np.testing.assert_array_equal(got.mask, mask)
        assert got.origin == origin
        assert got.origin.id == f"{origin.source}#{origin.index}@{origin.row},{origin.column}"
        assert got.intact
    shards.verify()
    for beyond in (15, -1):
        with pytest.raises(IndexError):
            shards.tile(beyond)


def test_reads_are_views_of_the_mapped_file(tmp_path):
    write_set(tmp_path)
    before = pa.total_allocated_bytes()
    shards = open_shards(tmp_path)
    tiles = [shards.tile(number) for number in range(15)]
    assert pa.total_allocated_bytes() - before < tiles[0].fields.nbytes, "the tiles themselves are not copied"
    for array in (tiles[7].fields, tiles[7].mask):
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_tile_outlives_its_set(tmp_path):
    write_set(tmp_path)
    got = open_shards(tmp_path).tile(4)
    np.testing.assert_array_equal(got.fields, quantise(tile(4)[0]))


def test_any_arrow_reader_reads_them(tmp_path):
    write_set(tmp_path)
    table = pa.ipc.open_file(tmp_path / "00001.arrow").read_all()
    assert table.column_names == ["fields", "mask", "id", "source", "index", "time", "row", "column", "checksum"]
    assert table["fields"].type == pa.fixed_shape_tensor(pa.float16(), (16, HEIGHT, WIDTH))
    first = table["fields"].chunk(2).to_numpy_ndarray()[0]
    np.testing.assert_array_equal(first, quantise(tile(7)[0]))


def test_quantised_fields_keep_eleven_bits():
    fields = layouts.weather()
    staged = quantise(fields)
    assert staged.dtype == np.float16
    apart = np.abs(dequantise(staged) - fields) / SCALE[:, None, None]
    assert apart.max() < 2.0**-11 * np.abs(staged).max()
    np.testing.assert_array_equal(quantise(fields[None])[0], staged)
    np.testing.assert_array_equal(REFERENCE, np.float32([channel.reference for channel in CHANNELS]))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0])
def test_quantise_refuses_what_float16_cannot_hold(value):
    fields = layouts.weather()
    fields[INDEX["PRECT"], 2, 3] = value  # 1 m/s of rain is 1e7 scales
    with pytest.raises(BadInput) as caught:
        quantise(fields, "x.nc")
    assert caught.value.where == "x.nc"
    assert caught.value.got == "PRECT beyond it"


def test_every_plausible_value_fits_float16():
    for bound in ("minimum", "maximum"):
        fields = np.array([getattr(channel, bound) for channel in CHANNELS], np.float32)[:, None, None]
        assert np.isfinite(quantise(np.broadcast_to(fields, (16, 2, 2)))).all()


def test_moments_are_those_of_all_pixels(tmp_path):
    manifest = write_set(tmp_path)
    fields = np.stack([tile(number)[0] for number in range(15)]).astype(np.float64)
    masks = np.stack([tile(number)[1] for number in range(15)])
    np.testing.assert_allclose(manifest.mean, fields.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, fields.std((0, 2, 3)), rtol=1e-9)
    np.testing.assert_array_equal(manifest.minimum, fields.min((0, 2, 3)))
    np.testing.assert_array_equal(manifest.maximum, fields.max((0, 2, 3)))
    assert list(manifest.class_counts) == [int((masks == number).sum()) for number in range(len(CLASSES))]
    assert (manifest.snapshots, manifest.sources) == (3, ("1996.nc", "1997.nc"))
    assert (manifest.spacing_deg, manifest.tile, manifest.periodic) == ((10.0, 10.0), (8, 12), False)
    assert manifest.labels == "rules:test"


@given(st.permutations(range(12)), st.lists(st.integers(0, 11), max_size=5))
@settings(max_examples=30, deadline=None)
def test_moments_do_not_depend_on_order_or_grouping(order, cuts):
    """Any permutation merged in any grouping gives equal sums, hence equal means and deviations to the last bit."""
    every = [Moments.of_tile(*tile(number)[:2]) for number in range(12)]
    edges = sorted({0, *cuts, 12})
    groups = [Moments.merge(every[i] for i in order[a:b]) for a, b in pairwise(edges)]
    merged, plain = Moments.merge(groups), Moments.merge(every)
    assert merged == plain
    assert (merged.mean, merged.std) == (plain.mean, plain.std)


def test_manifest_is_the_same_bytes_whoever_finished_first(tmp_path):
    parts = [write_shard(tmp_path / f"{n}.arrow", (tile(3 * n + k) for k in range(3))) for n in range(4)]
    texts = set()
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        through_json = [Part.from_dict(json.loads(json.dumps(parts[n].to_dict()))) for n in order]
        assert [parts[n] for n in order] == through_json
        texts.add(Manifest.of(through_json, (HEIGHT, WIDTH), layouts.GRID, "x").text())
    assert len(texts) == 1


def test_manifest_round_trip(tmp_path):
    manifest = write_set(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    held = json.loads((tmp_path / MANIFEST).read_text())
    assert held["channels"] == list(NAMES)
    assert held["units"][INDEX["PSL"]] == "Pa"
    assert set(held["shards"][0]) == {"file", "tiles", "sha256", "bytes", "body", "offsets", "crc32"}


def test_full_rows_of_a_global_grid_are_periodic(tmp_path):
    def full(grid_rows: slice) -> Manifest:
        fields, mask = layouts.weather()[:, grid_rows], layouts.classes()[grid_rows]
        part = write_shard(tmp_path / "x.arrow", [(fields, mask, TileId("x.nc", 0, "", grid_rows.start, 0))])
        return Manifest.of([part], mask.shape, layouts.GRID, "x")

    assert full(slice(0, 8)).periodic


def test_a_set_without_manifest_is_not_complete(tmp_path):
    write_set(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(BadInput, match="not complete"):
        open_shards(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        open_shards(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("mean"), "mean"),
        (lambda held: held["channels"].reverse(), "channels"),
        (lambda held: held["class_counts"].__setitem__(0, 7), "class_counts"),
        (lambda held: held["shards"].pop(), "shards"),
        (lambda held: held["std"].pop(), "std: expected 16"),
        (lambda held: held.update(format="raysegment shards 99"), "format"),
        (lambda held: held.update(colour="blue"), "colour"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path, change, message):
    write_set(tmp_path)
    held = json.loads((tmp_path / MANIFEST).read_text())
    change(held)
    (tmp_path / MANIFEST).write_text(json.dumps(held))
    with pytest.raises(BadInput, match=message):
        open_shards(tmp_path)


def test_a_manifest_cut_short_is_refused(tmp_path):
    write_set(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BadInput, match="a shard manifest"):
        open_shards(tmp_path)


@pytest.mark.parametrize("number", [0, 4, 7])
@pytest.mark.parametrize("column", ["fields", "mask"])
def test_a_flipped_bit_is_found_and_the_tile_named(tmp_path, number, column):
    write_set(tmp_path)
    shards = open_shards(tmp_path)
    path = tmp_path / shards.manifest.shards[number // 5].file
    fields, mask = shards.tile(number).fields.tobytes(), shards.tile(number).mask.tobytes()
    content = bytearray(path.read_bytes())
    place = content.index(fields)
    place = place + len(fields) // 3 if column == "fields" else content.index(mask, place + len(fields)) + len(mask) // 3
    content[place] ^= 4
    path.write_bytes(content)
    damaged = open_shards(tmp_path)
    assert not damaged.tile(number).intact
    with pytest.raises(BadInput) as caught:
        damaged.verify()
    assert caught.value.where == str(path)
    assert f"in tile {number}" in caught.value.got


@pytest.mark.parametrize("place", [0, 9, -1, -40])
def test_a_flipped_bit_outside_the_tiles_is_found(tmp_path, place):
    write_set(tmp_path)
    path = tmp_path / "00002.arrow"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"00002\.arrow"):
        open_shards(tmp_path).verify()


def test_missing_and_shortened_shards_are_found_at_opening(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(BadInput, match=f"{len(content)} bytes"):
        open_shards(tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match="no such file"):
        open_shards(tmp_path)


def test_a_shard_of_another_set_is_refused(tmp_path):
    write_set(tmp_path)
    write_shard(tmp_path / "00001.arrow", (tile(k) for k in range(4)))
    held = json.loads((tmp_path / MANIFEST).read_text())
    held["shards"][1]["bytes"] = (tmp_path / "00001.arrow").stat().st_size
    (tmp_path / MANIFEST).write_text(json.dumps(held))
    with pytest.raises(BadInput, match="places and checksums of 5 tiles"):
        open_shards(tmp_path)


def test_a_place_that_holds_no_tile_is_refused(tmp_path):
    write_set(tmp_path)
    held = json.loads((tmp_path / MANIFEST).read_text())
    held["shards"][1]["offsets"][2] += 8
    (tmp_path / MANIFEST).write_text(json.dumps(held))
    shards = open_shards(tmp_path)
    with pytest.raises(BadInput, match=r"tile 2 as manifest\.json has it"):
        shards.tile(7)


def test_a_failed_writer_leaves_nothing(tmp_path):
    def write_then_fail() -> None:
        with ShardWriter(Place.of(tmp_path), "x.arrow", HEIGHT, WIDTH) as writer:
            writer.add(*tile(0))
            fields, mask, origin = tile(1)
            writer.add(np.where(fields > 300.0, np.inf, fields), mask, origin)

    with pytest.raises(BadInput, match="float16"):
        write_then_fail()
    assert not list(tmp_path.iterdir())


def test_sets_travel_between_processes(tmp_path):
    write_set(tmp_path)
    shards = open_shards(tmp_path)
    shards.tile(0)
    twin = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(twin.tile(9).fields, shards.tile(9).fields)


def test_the_manifest_says_where_each_tile_lies(tmp_path):
    """Without Arrow: the bytes at a tile's place have the CRC-32 that zlib finds, and hold its fields and mask."""
    manifest = write_set(tmp_path)
    for number in range(15):
        shard, place = manifest.find(number)
        held = manifest.shards[shard]
        batch = (tmp_path / held.file).read_bytes()[held.offsets[place] : held.offsets[place + 1]]
        assert zlib.crc32(batch) == held.crc32[place]
        fields, mask, _ = tile(number)
        assert batch[held.body :].startswith(quantise(fields).tobytes() + mask.tobytes())
    assert [manifest.find(number) for number in (0, 4, 5, 14)] == [(0, 0), (0, 4), (1, 0), (2, 4)]


def test_same_tiles_same_bytes(tmp_path):
    first, second = (write_shard(tmp_path / folder / "x.arrow", (tile(k) for k in range(4))) for folder in ("a", "b"))
    assert first == second

"""What comes from elsewhere is data: nothing in it is run, and no name in it leads out of its folder.

The marker file of a planted pickle appears when somebody unpickles it; `test_the_bomb_is_live` shows that it would.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import socket
import threading
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray  # and Ray's Arrow types are registered

from raysegment import config
from raysegment.applications.campaign.space import CampaignConfig
from raysegment.applications.densities import table_density
from raysegment.applications.labellers import parse_labeller
from raysegment.applications.report import read_history
from raysegment.archive.manifest import MANIFEST, Manifest
from raysegment.archive.places import Place
from raysegment.archive.reader import Folder, TileReader
from raysegment.archive.shards import ShardSet
from raysegment.archive.snapshots import open_source
from raysegment.climate.checks import BadInput
from raysegment.elastic import checkpoints, keeper
from raysegment.elastic.checkpoints import STATE, WEIGHTS, read_checkpoint, write_checkpoint
from raysegment.elastic.roster import Roster
from raysegment.elastic.settings import TrainConfig
from raysegment.elastic.wire import MEMBER, Refused, connect
from tests import small_training
from tests.faulty_disk import facts, tensors
from tests.small_training import write_shards

Record = dict[str, Any]


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path):
    """The file that must not appear."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "a pickle from elsewhere was run"


@pytest.fixture
def bomb(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker))


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


# ---------------------------------------------------------------- checkpoints


def forge(step: Path, change: Callable[[Record], None]) -> None:
    """Change a checkpoint's record, digest and all, as somebody would who knows the format."""
    path = step / checkpoints.FACTS
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps({**record, "sha256": checkpoints._digest(record)}))


def name_content(file: str, content: bytes) -> Callable[[Record], None]:
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return lambda record: record["files"].update({file: entry})


def checkpoint(folder: Path) -> Path:
    return Path(str(write_checkpoint(folder / "checkpoints", facts(3), *tensors(3))))


@pytest.mark.parametrize("forged", [False, True], ids=["in place of it", "with a digest that fits"])
@pytest.mark.parametrize("file", [WEIGHTS, STATE, checkpoints.FACTS])
def test_a_pickle_in_a_checkpoint(tmp_path, bomb, file, forged):
    step = checkpoint(tmp_path)
    (step / file).write_bytes(bomb)
    if forged and file != checkpoints.FACTS:
        forge(step, name_content(file, bomb))
    with pytest.raises(BadInput, match=r"checkpoint\.json|safetensors"):
        read_checkpoint(step)
    if file != STATE:
        with pytest.raises(BadInput):
            parse_labeller(step)


# ---------------------------------------------------------------- shards


def shard_set(folder: Path, change: Callable[[Record], None] = lambda _: None) -> Path:
    """A shard set whose manifest somebody has changed."""
    shards = write_shards(folder / "shards", tiles=3)
    manifest = json.loads((shards / MANIFEST).read_text())
    change(manifest)
    (shards / MANIFEST).write_text(json.dumps(manifest))
    return shards


def read_tile(shards: Path) -> None:
    manifest = Manifest.load(shards)
    fields, mask = np.empty((16, *manifest.tile), np.float16), np.empty(manifest.tile, np.uint8)
    TileReader(manifest, Folder(shards, manifest)).read(0, fields, mask)


def test_a_pickle_in_place_of_a_shard(tmp_path, bomb):
    def forge_shard(manifest: Record) -> None:
        (shard,) = manifest["shards"]
        filled = (bomb * shard["bytes"])[: shard["bytes"]]
        (tmp_path / "shards" / shard["file"]).write_bytes(filled)
        crcs = [zlib.crc32(filled[start:stop]) for start, stop in pairwise(shard["offsets"])]
        shard.update(sha256=hashlib.sha256(filled).hexdigest(), crc32=crcs)

    shards = shard_set(tmp_path, forge_shard)
    with pytest.raises(BadInput, match="part-00000"):
        ShardSet(shards).tile(0)
    read_tile(shards)  # numbers where the manifest says, whatever they mean


def test_a_pickle_in_place_of_a_manifest(tmp_path, bomb):
    shards = write_shards(tmp_path / "shards", tiles=3)
    (shards / MANIFEST).write_bytes(bomb)
    with pytest.raises(BadInput, match="a shard manifest"):
        ShardSet(shards)


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path.touch", "!!python/name:os.system"]
)
@pytest.mark.parametrize("into", [TrainConfig, CampaignConfig])
def test_python_in_a_configuration(tmp_path, marker, tag, into):
    path = tmp_path / "run.yaml"
    path.write_text(f"shards: {tag} [{marker}]\n")
    with pytest.raises(BadInput, match=r"run\.yaml"):
        config.load(into, config.read_yaml(path), path)
    with pytest.raises((BadInput, config.yaml.YAMLError)):
        config.load(into, config.apply_overrides({}, [f"shards={tag} [{marker}]"]))


def test_a_pickle_in_place_of_a_configuration(tmp_path, bomb):
    path = tmp_path / "run.yaml"
    path.write_bytes(bomb)
    with pytest.raises(BadInput, match=r"run\.yaml"):
        config.read_yaml(path)


# ---------------------------------------------------------------- archives and tables


@pytest.mark.parametrize("name", ["day.nc", "day.h5", "day.npy"])
def test_a_pickle_in_place_of_an_archive_file(tmp_path, bomb, name):
    (tmp_path / name).write_bytes(bomb)
    with pytest.raises(BadInput, match=name):
        open_source(tmp_path / name)


def test_pickles_inside_an_archive_file(tmp_path, bomb):
    with h5py.File(tmp_path / "day.h5", "w") as file:
        file.create_dataset("climate/data", data=np.void(bomb))
        file.attrs["history"] = np.void(bomb)
    with pytest.raises(BadInput, match=r"day\.h5"):
        open_source(tmp_path / "day.h5")


def test_an_array_of_objects_is_not_read(tmp_path, marker):
    np.save(tmp_path / "day.npy", np.array([Bomb(marker)], object), allow_pickle=True)
    with pytest.raises(BadInput, match=r"day\.npy"):
        open_source(tmp_path / "day.npy")


def test_pickles_in_a_table(tmp_path, marker):
    """Ray registers an Arrow type that unpickles what is in it, wherever Arrow is used in the same process."""
    rows = {"class": ["tropical_cyclone"], "time": ["2020-01-01"], "lat": [1.0]}
    bombs = ArrowPythonObjectArray.from_objects([Bomb(marker)])
    columns = [*(pa.array(column) for column in rows.values()), bombs]
    pq.write_table(pa.table(columns, names=[*rows, "lon"]), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"t\.parquet.*extension"):
        table_density(tmp_path / "t.parquet", lambda *_: None)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("file", ["steps.jsonl", "events.jsonl", "config.yaml", "summary.json"])
def test_a_pickle_in_a_run(tmp_path, bomb, file):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("learn: {}\nshards: a\n")
    (run / "steps.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (run / file).write_bytes(bomb.replace(b"\n", b" ") + b"\n")
    with pytest.raises(BadInput, match=file.replace(".", r"\.")):
        read_history(run)


def test_a_pickle_in_a_keepers_folder(tmp_path, bomb):
    node = tmp_path / "run" / "node"
    node.mkdir(parents=True)
    about = {"format": keeper._FORMAT, "step": 9, "node": "node", "time": 0.0, "pid": 1, "facts": {}}
    text = json.dumps({**about, "bytes": len(bomb), "crc32": zlib.crc32(bomb)}).encode()
    (node / "a-0.json").write_bytes(b"%08x\n%s" % (zlib.crc32(text), text))
    (node / "a-0.safetensors").write_bytes(bomb)
    (node / "b-0.json").write_bytes(b"%08x\n%s" % (zlib.crc32(bomb), bomb))
    assert [listed.step for listed in keeper.steps(tmp_path, "run")] == [9], "the forged record is looked at"
    assert keeper.newest(tmp_path, "run") is None


# ---------------------------------------------------------------- the wire


def test_a_pickle_to_the_roster(tmp_path, bomb):
    async def greet() -> bytes:
        roster = Roster(small_training.config(tmp_path / "shards", tmp_path), "127.0.0.1", False)
        address = await roster.start()
        reader, writer = await asyncio.open_connection(address.host, address.port)
        await reader.readline()
        writer.write(bomb + b"\n")
        return await reader.read()

    assert asyncio.run(greet()) == b"", "the line is closed without an answer"


def test_a_pickle_from_somebody_who_poses_as_the_roster(bomb):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pose() -> None:
            line, _ = server.accept()
            with line:
                line.sendall(bomb.replace(b"\n", b" ") + b"\n")

        threading.Thread(target=pose, daemon=True).start()
        with pytest.raises(Refused, match="does not speak as a roster"):
            connect(server.getsockname(), "token", MEMBER, {}, 10.0)


# ---------------------------------------------------------------- paths


OUTSIDE = ["../secret.arrow", "/etc/hostname", "a/../../secret.arrow", ".hidden", "sub/part.arrow"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_folder_only(tmp_path, name):
    shards = shard_set(tmp_path, lambda manifest: manifest["shards"][0].update(file=name))
    with pytest.raises(BadInput, match="plain name"):
        ShardSet(shards)


def test_a_shard_that_is_a_link_out_of_the_set_is_refused(tmp_path):
    shards = shard_set(tmp_path)
    (shards / "part-00000.arrow").rename(tmp_path / "secret.arrow")
    (shards / "part-00000.arrow").symlink_to(tmp_path / "secret.arrow")
    for read in (lambda: ShardSet(shards).tile(0), lambda: read_tile(shards), lambda: ShardSet(shards).verify()):
        with pytest.raises(BadInput, match="one outside"):
            read()


def test_the_set_itself_may_be_a_link(tmp_path):
    (tmp_path / "here").symlink_to(shard_set(tmp_path))
    assert ShardSet(tmp_path / "here").tile(0).intact
    read_tile(tmp_path / "here")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/weights", 7])
def test_a_checkpoint_names_files_of_its_folder_only(tmp_path, name):
    step = checkpoint(tmp_path)
    forge(step, lambda record: record["files"][WEIGHTS].update(name=name))
    with pytest.raises(checkpoints.Damaged, match="own folder"):
        read_checkpoint(step)


def test_a_file_of_a_checkpoint_that_is_a_link_out_of_it_is_refused(tmp_path):
    step = checkpoint(tmp_path)
    (step / WEIGHTS).rename(tmp_path / "secret")
    (step / WEIGHTS).symlink_to(tmp_path / "secret")
    with pytest.raises(checkpoints.Damaged, match="own folder"):
        read_checkpoint(step)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "link"])
def test_a_place_gives_nothing_from_outside(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    for place in (Place.of(folder), Place.of(folder.as_uri())):
        with pytest.raises(BadInput):
            place.read(name)
        with pytest.raises(BadInput):
            place.put(name, lambda: [b"overwritten"])
    assert (tmp_path / "secret").read_text() == "secret"

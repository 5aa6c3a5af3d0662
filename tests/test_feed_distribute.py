"""Three nodes with disks of their own: the source is read once, the rest goes from node to node, and only what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.cluster_utils import Cluster

from raysegment.archive.manifest import MANIFEST, Manifest
from raysegment.archive.reader import Damaged
from raysegment.archive.shards import TileId, open_shards, write_shard
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.feed import distribute as module
from raysegment.feed.ahead import Ahead
from raysegment.feed.depots import Depot, Goods, Settlement, Survey
from raysegment.feed.distribute import Assignment, Distribution, distribute
from raysegment.feed.nodes import Node, living_nodes
from raysegment.feed.order import Order
from raysegment.feed.placement import PLACEMENT, Transfer
from raysegment.feed.session import worker_environment
from raysegment.feed.store import Source as FileSource
from raysegment.feed.store import TileStore
from tests.small_archive import fields_and_mask

pytestmark = pytest.mark.ray

NODES = ("a", "b", "c")
SHARDS = 12


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    ray.shutdown()
    before = dict(os.environ)
    os.environ.update(worker_environment())
    started = Cluster()
    try:
        for name in NODES:
            started.add_node(node_name=name, num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        ray.init(address=started.address, log_to_driver=False)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    """Twelve shards of eight tiles, about 150 KiB each: large enough for the object store."""
    folder = tmp_path_factory.mktemp("staged")
    parts = []
    for number in range(SHARDS):
        tiles = range(8 * number, 8 * number + 8)
        rows = [(*fields_and_mask(tile), TileId(f"{tile}.nc", 0, "", 0, 0)) for tile in tiles]
        parts.append(write_shard(folder / f"part-{number:05d}.arrow", rows))
    Manifest.of(parts, (16, 32), Grid.global_(16, 32), "test").save(folder)
    return folder


@pytest.fixture
def world(cluster, staged, tmp_path):
    """A source of the test's own, and where the nodes' folders are."""
    source = tmp_path / "shared" / "shards"
    shutil.copytree(staged, source)
    goods, to = Goods.of(source), f"{tmp_path}/disk-{{node}}"
    return SimpleNamespace(
        source=source, to=to, folders={name: goods.folder(to, name) for name in NODES}, bytes=sum(goods.sizes),
        forget=lambda: [path.unlink() for path in source.glob("*.arrow")],
    )  # fmt: skip


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.arrow")}


def checked(result: Distribution, world) -> Distribution:
    """A result whose parts agree with each other and with what is on the disks."""
    assert (result.nodes, result.shards, result.source_bytes) == (3, SHARDS, world.bytes)
    assert result.read_ratio == result.bytes_read / world.bytes
    assert result.written_bytes == result.bytes_read + result.passed_bytes
    assert result.folders == {name: str(folder) for name, folder in world.folders.items()}
    placement = json.loads((world.folders["a"] / PLACEMENT).read_text())
    assert [node["name"] for node in placement["nodes"]] == list(NODES)
    for number, (name, folder) in enumerate(world.folders.items()):
        assert files(folder) == {file for file, places in placement["shards"].items() if number in places}, name
        assert json.loads((folder / PLACEMENT).read_text()) == placement
        assert not list(folder.glob("*.tmp")), name
    assert sum(len(places) for places in placement["shards"].values()) == SHARDS * result.replicas
    return result


def test_every_node_gets_all_and_the_source_is_read_once(world):
    heard = []
    result = checked(distribute(world.source, world.to, progress=lambda *news: heard.append(news)), world)
    assert (result.bytes_read, result.passed_bytes) == (world.bytes, 2 * world.bytes)
    assert (result.reused, result.removed, result.replicas) == (0, 0, 3)
    for folder in world.folders.values():
        assert (folder / MANIFEST).read_bytes() == (world.source / MANIFEST).read_bytes()
        open_shards(folder).verify()
    assert heard[-1][:2] == (3 * SHARDS, 3 * SHARDS)
    assert [done for done, *_ in heard] == sorted(done for done, *_ in heard)

    assert json.loads(json.dumps(asdict(result)))["read_ratio"] == 1
    again = checked(distribute(world.source, world.to), world)
    assert (again.bytes_read, again.passed_bytes, again.written_bytes, again.reused) == (0, 0, 0, 3 * SHARDS)


def test_what_was_interrupted_is_repaired_from_the_other_nodes(world):
    distribute(world.source, world.to)
    world.forget()
    a, b, c = world.folders.values()
    intact = {path: path.stat().st_mtime_ns for folder in world.folders.values() for path in folder.glob("*.arrow")}
    (a / "part-00000.arrow").unlink()
    (a / "part-00001.arrow").unlink()
    (b / "part-00001.arrow").unlink()
    os.truncate(b / "part-00002.arrow", 1000)
    flip_a_bit(c / "part-00003.arrow")
    (c / f".part-00004.arrow.{2**22 + 1}.tmp").write_bytes(b"left by a process that died")
    spoilt = {
        a / "part-00000.arrow",
        a / "part-00001.arrow",
        b / "part-00001.arrow",
        b / "part-00002.arrow",
        c / "part-00003.arrow",
    }
    result = checked(distribute(world.source, world.to), world)
    sizes = {path.name: path.stat().st_size for path in a.glob("*.arrow")}
    assert (result.bytes_read, result.passed_bytes) == (0, sum(sizes[path.name] for path in spoilt))
    assert result.reused == 3 * SHARDS - len(spoilt)
    for path, when in intact.items():
        assert (path.stat().st_mtime_ns == when) == (path not in spoilt), path
    for folder in world.folders.values():
        open_shards(folder).verify()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_copy_that_turns_out_damaged_when_it_is_sent_is_replaced(world):
    """The record says it is whole: its disk has lost a bit without a trace in the file's state."""
    distribute(world.source, world.to)
    world.forget()
    a, b, c = world.folders.values()
    (c / "part-00000.arrow").unlink()
    flip_a_bit(a / "part-00000.arrow")
    lines = [json.loads(line) for line in (a / ".verified").read_text().splitlines()]
    status = (a / "part-00000.arrow").stat()
    state = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    lines = [[*line[:2], *state] if line[0] == "part-00000.arrow" else line for line in lines]
    (a / ".verified").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = checked(distribute(world.source, world.to), world)
    assert (result.bytes_read, result.passed_bytes) == (0, 2 * status.st_size)
    for folder in (a, b, c):
        open_shards(folder).verify()


def test_shares_are_dealt_anew_without_the_source(world):
    first = checked(distribute(world.source, world.to, Assignment(replicas=1)), world)
    assert (first.bytes_read, first.passed_bytes, first.removed) == (world.bytes, 0, 0)
    before = {name: files(folder) for name, folder in world.folders.items()}
    assert not any((folder / MANIFEST).exists() for folder in world.folders.values()), "no folder is a complete set"
    world.forget()
    second = checked(distribute(world.source, world.to, Assignment(replicas=1, round=1)), world)
    after = {name: files(folder) for name, folder in world.folders.items()}
    moved = [world.folders[name] / file for name in NODES for file in after[name] - before[name]]
    assert len(moved) == second.removed > 0
    assert (second.bytes_read, second.passed_bytes) == (0, sum(path.stat().st_size for path in moved))
    bring_shards_to_a_run(world)


def bring_shards_to_a_run(world):
    """A worker on node `a` whose disk has a share: its tasks have the rest from the other nodes. The source is gone."""
    assert ray.get_runtime_context().get_node_id() == next(n["NodeID"] for n in ray.nodes() if n["NodeName"] == "a")
    store = TileStore(FileSource(str(world.source), cache=world.to.replace("{node}", "a")))
    order = Order(tiles=8 * SHARDS, global_batch=8, micro_batch=4, seed=1)
    lacking = [number for number in range(SHARDS) if not store.cache.holds(number)]
    (world.folders["b"] / store.manifest.shards[lacking[0]].file).unlink(missing_ok=True)  # evicted since
    (world.folders["c"] / store.manifest.shards[lacking[0]].file).unlink(missing_ok=True)
    ahead = Ahead(store, order.line(0, SHARDS, 0, 1), window=2 * SHARDS, per_task=8, tasks=2)
    deadline = time.monotonic() + 60
    while not all(store.cache.holds(number) for number in lacking[1:]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while ahead.prepared < 8 * (SHARDS - 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ahead.bytes_from_peers == sum(store.manifest.shards[number].bytes for number in lacking[1:])
    assert not store.cache.holds(lacking[0]), "nobody has it, nor has the source"


def test_a_full_disk_is_told_before_anything_is_written(world, monkeypatch):
    honest = module._survey
    survey = Survey(frozenset(), world.bytes + module.SPARE_BYTES - 1, "b")
    monkeypatch.setattr(module, "_survey", lambda depots: {**honest(depots), "b": survey})
    with pytest.raises(BadInput, match=r"node b: .*disk-b.*room for 1\.\d MiB, got 257\.\d MiB free, 256\.0 MiB of them"):
        distribute(world.source, world.to)
    assert not any(files(folder) for folder in world.folders.values())


def test_a_disk_that_just_suffices():
    transfers = [Transfer(0, "a", ("b",), read=True), Transfer(1, "b", ("a",), read=False)]
    free = {"a": module.SPARE_BYTES + 30, "b": module.SPARE_BYTES + 10}
    surveys = {name: Survey(frozenset(), count, name) for name, count in free.items()}
    module._preflight(transfers, [10, 20], surveys, {"a": "/a", "b": "/b"})
    with pytest.raises(BadInput, match="node b: /b"):
        module._preflight(transfers, [11, 19], surveys, {"a": "/a", "b": "/b"})


def test_a_damaged_source_is_named_and_goes_nowhere(world):
    flip_a_bit(world.source / "part-00005.arrow")
    with pytest.raises(BadInput, match=r"part-00005\.arrow: expected a shard as its manifest has it") as caught:
        distribute(world.source, world.to)
    assert type(caught.value) is BadInput
    assert not any("part-00005.arrow" in files(folder) for folder in world.folders.values())


def test_what_cannot_be_asked_for(world, tmp_path):
    with pytest.raises(BadInput, match=r"--replicas: expected at most one for each of the 3 nodes"):
        distribute(world.source, world.to, Assignment(replicas=4))
    with pytest.raises(BadInput, match="at least 1 replica"):
        Assignment(replicas=0)
    with pytest.raises(BadInput, match=r"a folder of one node, got one that . shares with .*DIR/\{node\}"):
        distribute(world.source, tmp_path / "same")
    (tmp_path / "disk-b").write_text("a file in the way")
    with pytest.raises(BadInput, match=r"node b: .*a folder on the node's own disk"):
        distribute(world.source, world.to)


def test_shards_too_large_for_an_object_store_are_refused_at_once(world):
    small = [Node("a", "", 4 * world.bytes), Node("b", "", world.bytes // 4)]
    with pytest.raises(BadInput, match=r"a quarter of the object store of node b.*--object-store-memory"):
        module._check_stores(small, Goods.of(world.source))


@pytest.mark.slow
def test_a_node_that_dies_is_told_and_the_others_get_theirs(world, cluster):
    """The fourth node goes when the first copies are there; the next run finds nothing to do for the three."""
    fourth = cluster.add_node(node_name="d", num_cpus=1, object_store_memory=80 << 20)
    gone = []

    def progress(done, total, note):
        if done >= 5 and not gone:
            gone.append(done)
            cluster.remove_node(fourth, allow_graceful=False)

    with pytest.raises(BadInput, match=r"d was lost: .*the others have their shares.*Run the same command again"):
        distribute(world.source, world.to, progress=progress)
    assert gone, "the node was removed"
    for folder in world.folders.values():
        open_shards(folder).verify()
    deadline = time.monotonic() + 60
    while len(living_nodes()) > 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again = checked(distribute(world.source, world.to), world)
    assert (again.bytes_read, again.written_bytes) == (0, 0)


# ---------------------------------------------------------------- a node's part, without Ray


@pytest.fixture
def depot(staged, tmp_path) -> Depot:
    source = shutil.copytree(staged, tmp_path / "source")
    made = Depot("a", tmp_path / "disk", Goods.of(source))
    made.claim()
    return made


def test_a_depot_says_which_shard_its_node_does_not_see(depot, tmp_path):
    (tmp_path / "source" / "part-00003.arrow").unlink()
    with pytest.raises(BadInput, match=r"part-00003\.arrow: expected a file that every node reaches, got .* asked from a"):
        depot.read(3, False)


def test_what_was_proved_is_not_read_again_until_it_changes(depot, tmp_path, monkeypatch):
    read = []
    plain = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(Path(file.name).name) or plain(file, kind))
    for shard in (0, 1, 2):
        depot.read(shard, False)
    assert depot.survey().held == {0, 1, 2}
    assert read == []
    with (tmp_path / "disk" / ".verified").open("a") as record:
        record.write('["part-00001.ar')  # cut short
    os.utime(tmp_path / "disk" / "part-00002.arrow")
    assert depot.survey().held == {0, 1, 2}
    flip_a_bit(tmp_path / "disk" / "part-00001.arrow")
    assert depot.survey().held == {0, 2}
    assert read == ["part-00002.arrow", "part-00001.arrow"]


def test_a_folder_is_no_complete_set_before_it_loses_a_shard(depot, tmp_path):
    depot.read(0, False)
    depot.settle(Settlement("{}", b"manifest", ()))
    assert (tmp_path / "disk" / MANIFEST).read_bytes() == b"manifest"
    assert depot.settle(Settlement("{}", None, (0, 1))) == 1
    assert sorted(path.name for path in (tmp_path / "disk").iterdir() if path.name[0] != ".") == [PLACEMENT]


def test_strangers_bytes_are_not_kept(depot, tmp_path):
    _, data = depot.read(0, True)
    with pytest.raises(Damaged, match="what was received"):
        depot.receive(1, data)
    assert files(tmp_path / "disk") == {"part-00000.arrow"}

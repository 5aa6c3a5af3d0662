"""Checkpoints: what was written comes back bit for bit, and nothing damaged is ever taken for a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save

from raysegment.applications.inspect_ import inspect
from raysegment.applications.labellers import NetworkLabeller, parse_labeller
from raysegment.archive.places import Place
from raysegment.climate.channels import CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic import checkpoints, packed
from raysegment.elastic.checkpoints import (
    FACTS,
    STATE,
    WEIGHTS,
    Draft,
    Facts,
    discard,
    draft,
    list_checkpoints,
    newest_valid,
    prune,
    publish,
    read_checkpoint,
    read_newest,
    remove_orphans,
    write_checkpoint,
)
from raysegment.networks import NetworkConfig
from tests.faulty_disk import Died, Disk, Victims, facts, free, full, read_only, same, tensors
from tests.s3 import Server, below


def write(folder, step: int = 3, keep: int = 3):
    return write_checkpoint(folder, facts(step), *tensors(step), keep=keep)


@pytest.fixture(params=["disk", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder for checkpoints, on a disk and in an object store."""
    if request.param == "disk":
        return Place.of(tmp_path / "checkpoints")
    return Place.of(below(request.getfixturevalue("object_store"), f"{tmp_path.name}/checkpoints"))


def step_of(place: Place | Path) -> int:
    """The step of the newest whole checkpoint (0: none), whose contents are those of that step."""
    read = read_newest(place)
    if read is None:
        return 0
    assert read.facts == facts(read.facts.step)
    weights, state = tensors(read.facts.step)
    assert same(read.weights, weights)
    assert same(read.state, state)
    return read.facts.step


# the format


@given(st.lists(st.sampled_from([*packed._NAMES]), max_size=5), st.integers(0, 3), st.randoms())
def test_packed_tensors_are_what_safetensors_writes_and_reads(dtypes, rank, chance):
    made = {}
    for index, dtype in enumerate(dtypes):
        shape = [chance.randint(0, 4) for _ in range(rank)]
        made[f"t{index}"] = torch.randint(0, 2, shape).to(dtype)
    content = b"".join(packed.blocks(made))
    assert len(content) == packed.size(made)
    assert same(load(content), made)
    for own in (content, save(made)):
        assert same(packed.unpack(torch.frombuffer(bytearray(own), dtype=torch.uint8)), made)


def test_blocks_are_views_and_short(monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 100)
    made = {"a": torch.arange(200.0), "b": torch.arange(12.0).reshape(3, 4).t()}
    blocks = list(packed.blocks(made))
    assert max(len(block) for block in blocks[1:]) <= 100
    made["a"][0] = 7.0  # after the blocks were made
    assert same(load(b"".join(blocks)), made)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 8, b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b'\x10\0\0\0\0\0\0\0{"a":{"dtype":1}}']
)
def test_what_is_no_file_of_tensors_is_refused(content):
    with pytest.raises(ValueError, match="no file of tensors"):
        packed.unpack(torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8))


# writing and reading


def test_what_was_written_comes_back(place):
    path = write(place)
    assert (path.name, newest_valid(place), list_checkpoints(place)) == ("step-00000003", path, [path])
    checkpoint = read_checkpoint(path)
    weights, state = tensors()
    assert checkpoint.facts == facts()
    assert same(checkpoint.weights, weights)
    assert same(checkpoint.state, state)
    assert remove_orphans(place) == []
    assert step_of(place) == 3


def test_weights_need_neither_this_package_nor_the_training_state(tmp_path):
    path = write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003"]
    assert torch.equal(load_file(path / WEIGHTS)["conv.weight"], tensors()[0]["conv.weight"])
    assert json.loads((path / FACTS).read_text())["network"]["name"] == "deeplab"
    (path / STATE).unlink()
    assert read_checkpoint(path, training=False).state == {}
    with pytest.raises(BadInput, match="state"):
        read_checkpoint(path)


def test_checkpoints_of_the_first_version_are_read(tmp_path):
    path, (weights, state) = write(tmp_path), tensors()
    record = json.loads((path / FACTS).read_text())
    contents = {WEIGHTS: save(weights), STATE: save(state)}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    files = {
        name: {"bytes": len(content), "sha256": checkpoints.hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    record = {key: value for key, value in record.items() if key != "sha256"} | {"files": files}
    (path / FACTS).write_text(json.dumps({**record, "sha256": checkpoints._digest(record)}))
    assert step_of(tmp_path) == 3


def test_only_the_newest_are_kept(place):
    for step in range(1, 7):
        write(place, step, keep=2)
    assert [path.name for path in list_checkpoints(place)] == ["step-00000005", "step-00000006"]
    assert sorted({name.partition("/")[0] for name in place.walk()}) == ["step-00000005", "step-00000006"]


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(place):
    write(place, 1)
    newer = Place.of(write(place, 2))
    newer.remove(next(name for name in newer.names() if name.startswith("state")))
    assert prune(place, 1) == []
    assert step_of(place) == 1
    write(place, 3, keep=1)
    assert [path.name for path in list_checkpoints(place)] == ["step-00000003"]


def test_older_checkpoints_are_not_read(place, monkeypatch):
    for step in (1, 2, 3):
        write(place, step)
    seen = []
    whole = checkpoints._blocks
    monkeypatch.setattr(checkpoints, "_blocks", lambda at, name, size: seen.append(at.name) or whole(at, name, size))
    assert newest_valid(place).name == "step-00000003"
    assert seen == ["step-00000003"] * 2
    seen.clear()
    assert newest_valid(place, data=False).name == "step-00000003"
    prune(place, 2)
    assert seen == []


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path, object_store):
    for run in (tmp_path, below(object_store, f"{tmp_path.name}/run")):
        place = Place.of(run)
        write(place.below("checkpoints"), 1)
        newest = write(place.below("checkpoints"), 2)
        assert read_checkpoint(run).path == newest
        assert read_checkpoint(place.below("checkpoints")).path == newest
        assert checkpoints.find_checkpoint(run) == newest
        with pytest.raises(BadInput, match="run folder"):
            read_checkpoint(place.below("elsewhere"))


def test_a_checkpoint_in_an_object_store_is_inspected_and_labels(tmp_path, object_store):
    uri = below(object_store, f"{tmp_path.name}/checkpoints")
    write(uri, 2)
    held = inspect(below(uri, "step-00000002"))
    assert (held["kind"], held["step"], held["problem"]) == ("checkpoint", 2, None)
    assert sorted(counts["values"] for counts in held["tensors"].values()) == [109, 112]
    labeller = parse_labeller(uri)
    assert isinstance(labeller, NetworkLabeller)
    assert labeller.checkpoint == read_checkpoint(uri).path


def test_facts_must_fit_together():
    with pytest.raises(ValueError, match="as many names"):
        Facts(0, 0, NetworkConfig(channels=3), NAMES, (0.0,) * 16, (1.0,) * 16, (1.0, 1.0), CLASSES)


# drafts


def test_a_draft_is_no_checkpoint_until_it_is_published(place):
    made = draft(place, facts(2), *tensors(2), tag="gen1-a")
    assert list_checkpoints(place) == []
    assert step_of(place) == 0
    again = Draft(**json.loads(json.dumps(asdict(made))))
    assert again == made
    path = publish(place, again)
    assert publish(place, made) == path
    assert step_of(place) == 2
    assert remove_orphans(place) == []
    discard(place, made)
    assert step_of(place) == 2


def test_two_writers_of_one_step_give_one_checkpoint(place):
    drafts = [draft(place, facts(2), *tensors(2), tag=tag) for tag in ("a", "b")]
    paths = [publish(place, made) for made in [*drafts, *drafts]]
    assert len(set(paths)) == 1
    assert len(list_checkpoints(place)) == 1
    assert step_of(place) == 2
    assert remove_orphans(place) == []
    assert len(place.walk()) == 3


def test_a_draft_that_is_gone_or_damaged_is_not_published(place):
    write(place, 1)
    gone = draft(place, facts(2), *tensors(2), tag="a")
    discard(place, gone)
    with pytest.raises(BadInput):
        publish(place, gone)
    damaged = draft(place, facts(2), *tensors(2), tag="b")
    for index in range(3):
        names = [name for name in place.walk() if damaged.tag in name]
        before = place.read(names[index])
        for content in (before[:-1], before[:-1] + bytes([before[-1] ^ 1]), b""):
            place.put(names[index], lambda content=content: iter([content]))
            with pytest.raises(BadInput):
                publish(place, damaged)
        place.put(names[index], lambda before=before: iter([before]))
    assert step_of(place) == 1
    publish(place, damaged)
    assert step_of(place) == 2


def test_a_damaged_checkpoint_of_the_step_is_replaced(place):
    old = Place.of(write(place, 2))
    old.put(old.names()[-1], lambda: iter([b"damaged"]))
    assert step_of(place) == 0
    publish(place, draft(place, facts(2), *tensors(2), tag="a"))
    assert step_of(place) == 2
    remove_orphans(place)
    assert len(place.walk()) == 3


def test_orphans_are_those_of_writers_that_are_gone(place):
    write(place, 1)
    ours, theirs = (draft(place, facts(2), *tensors(2), tag=tag) for tag in ("gen2-a", "gen1-b"))
    assert remove_orphans(place, keep_tags=("gen2-a",)) == [f"step-00000002/{theirs.tag}"]
    publish(place, ours)
    assert step_of(place) == 2
    assert remove_orphans(place) == []
    draft(place, facts(3), *tensors(3), tag="c")
    assert len(remove_orphans(place)) == 1
    assert sorted({name.partition("/")[0] for name in place.walk()}) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("tag", ["", "../a", "a/b", "a.b"])
def test_a_tag_is_a_plain_name(tag, tmp_path):
    with pytest.raises(ValueError, match="tag"):
        draft(tmp_path, facts(), *tensors(), tag=tag)
    assert list(tmp_path.iterdir()) == []


# damage


@pytest.mark.parametrize("name", [WEIGHTS, STATE, FACTS])
def test_a_missing_or_truncated_file_is_damage(tmp_path, name):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    content = (newer / name).read_bytes()
    for size in [*range(0, len(content), max(1, len(content) // 50)), len(content) - 1]:
        (newer / name).write_bytes(content[:size])
        assert checkpoints.damage(newer) is not None, size
        assert name == FACTS or checkpoints.damage(newer, data=False) is not None, size
    assert newest_valid(tmp_path) == older
    (newer / name).unlink()
    assert newest_valid(tmp_path) == older
    (older / name).unlink()
    assert newest_valid(tmp_path) is None


def test_a_flipped_bit_is_damage_or_changes_nothing(tmp_path):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    contents = {path: path.read_bytes() for path in sorted(newer.iterdir())}
    chance, detected = random.Random(5), 0
    for _ in range(200):
        path = chance.choice(list(contents))
        content = bytearray(contents[path])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        if checkpoints.damage(newer) is None:  # 1e-08 and 1E-08 are the same number
            assert path.name == FACTS
            assert step_of(tmp_path) == 2
        else:
            detected += 1
            assert newest_valid(tmp_path) == older
            assert step_of(tmp_path) == 1
        path.write_bytes(contents[path])
    assert detected >= 198
    assert step_of(tmp_path) == 2


# writers that die, disks that are full


def trial(tmp_path: Path, disk: Disk) -> Path:
    """A folder with the checkpoint of step 1, where somebody writes that of step 2 to a disk and may die of it."""
    folder = tmp_path / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "before", folder)
    with disk.installed():
        try:
            write_checkpoint(folder, facts(2), *tensors(2), keep=1)
        except Died:
            assert disk.ended
    return folder


def check_aftermath(folder: Path, thorough: bool = True) -> int:
    """The step that is left after a writer died; where `thorough`, everything is then cleaned up and written again."""
    left = step_of(folder)
    assert left in (1, 2)
    if not thorough:
        return left
    with free().installed():
        remove_orphans(folder)
        assert all(name.startswith("step-") for name in os.listdir(folder))
        assert step_of(folder) == left
        write(folder, 2, keep=1)
    assert step_of(folder) == 2
    assert os.listdir(folder) == ["step-00000002"]
    return left


def die_everywhere(tmp_path: Path, count: float) -> list[int]:
    """What is left after a writer, or the whole machine, died at each operation and at `count` bytes."""
    write(tmp_path / "before", 1)
    whole = free()
    trial(tmp_path, whole)
    count = min(count, whole.spent)
    points = {round(index * whole.spent / count) for index in range(int(count))} | {*whole.operations}
    left = []
    for index, point in enumerate(sorted(points)):
        disk = Disk(point, Died)
        folder = trial(tmp_path, disk)
        assert disk.ended
        if index % 2:
            disk.lose_power(folder)
        left.append(check_aftermath(folder, thorough=index % 20 == 0))
    return left


def test_a_writer_that_dies_at_any_operation_or_of_1000_bytes_leaves_a_whole_checkpoint(tmp_path):
    left = die_everywhere(tmp_path, 1000)
    assert len(left) >= 1000
    assert left == sorted(left), "once it is there, it stays"
    assert {*left} == {1, 2}


@pytest.mark.slow
def test_a_writer_that_dies_at_any_byte_leaves_a_whole_checkpoint(tmp_path):
    left = die_everywhere(tmp_path, float("inf"))
    assert left == sorted(left)
    assert {*left} == {1, 2}


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path):
    write(tmp_path / "before", 1)
    whole = free()
    trial(tmp_path, whole)
    failed = 0
    for point in range(0, whole.spent, max(1, whole.spent // 100)):
        disk = full(point)
        try:
            folder = trial(tmp_path, disk)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - most points fail, the last ones do not
            failed += 1
            folder = tmp_path / "trial"
            assert os.listdir(folder) == ["step-00000001"], "the little that was written takes no room"
        check_aftermath(folder)
    assert failed > 80


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_an_error(tmp_path, number):
    write(tmp_path, 1)
    with read_only(number).installed(), pytest.raises(OSError, match=os.strerror(number)):
        draft(tmp_path, facts(2), *tensors(2), tag="a")
    made = draft(tmp_path, facts(2), *tensors(2), tag="a")
    with read_only(number).installed(), pytest.raises(OSError, match=os.strerror(number)):
        publish(tmp_path, made)
    assert step_of(tmp_path) == 1
    publish(tmp_path, made)
    assert step_of(tmp_path) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file", 1)
    assert list_checkpoints(tmp_path / "file") == []


@pytest.fixture(scope="module")
def victims(s3_server: Server) -> Iterator[Victims]:
    made = Victims()
    yield made
    made.close()


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path, victims):
    write(tmp_path / "before", 1)
    whole = free()
    trial(tmp_path, whole)
    points = [0, 1, 2, *(round(index * whole.spent / 13) for index in range(1, 13)), *range(whole.spent - 6, whole.spent)]
    for point in points:
        shutil.rmtree(tmp_path / "trial")
        shutil.copytree(tmp_path / "before", tmp_path / "trial")
        assert victims.kill("checkpoint", str(tmp_path / "trial"), point)
        check_aftermath(tmp_path / "trial")


# object stores


def test_a_killed_upload_leaves_a_whole_checkpoint(tmp_path, victims, object_store):
    seen, point = [], 0
    while True:
        place = Place.of(below(object_store, f"{tmp_path.name}/{point}"))
        write(place, 1)
        if not victims.kill("upload", place.text, point):
            break
        newest = read_newest(place)
        assert newest is not None
        seen.append(newest.facts.step)
        remove_orphans(place)
        assert newest_valid(place) == newest.path
        kept = {name.partition("/")[0] for name in place.walk()}
        assert kept == {path.name for path in list_checkpoints(place)}
        point += 1
    assert seen == sorted(seen)
    assert {*seen} == {1, 2}
    assert point > 10


def test_a_store_that_refuses_is_an_error_and_changes_nothing(tmp_path, s3_server):
    place = Place.of(below(s3_server.uri, f"{tmp_path.name}/refused"))
    write(place, 1)
    with s3_server.faults.answering("PUT", "403 Forbidden", "AccessDenied", 1000) as faults:
        with pytest.raises(BadInput, match="may be read and written"):
            draft(place, facts(2), *tensors(2), tag="a")
        assert faults.fired
    assert step_of(place) == 1
    made = draft(place, facts(2), *tensors(2), tag="a")
    with (
        s3_server.faults.answering("PUT", "403 Forbidden", "AccessDenied", 1000),
        pytest.raises(BadInput, match="may be read and written"),
    ):
        publish(place, made)
    assert step_of(place) == 1
    publish(place, made)
    assert step_of(place) == 2


def test_a_checkpoint_that_may_not_be_read_is_not_a_damaged_one(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write(tmp_path, 2)

    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        for read in (read_newest, newest_valid):
            with pytest.raises(BadInput, match="may be read and written"):
                read(tmp_path)
    assert step_of(tmp_path) == 2


def test_a_store_that_does_not_answer_is_not_a_damaged_checkpoint(tmp_path, s3_server):
    place = Place.of(below(s3_server.uri, f"{tmp_path.name}/silent"))
    write(place, 1)
    write(place, 2)
    there = list_checkpoints(place)
    for read in (list_checkpoints, read_newest, lambda _: checkpoints.damage(there[-1])):
        with (
            s3_server.faults.answering("GET", "403 Forbidden", "AccessDenied", 10**6),
            pytest.raises(BadInput, match="may be read and written"),
        ):
            read(place)
    assert step_of(place) == 2

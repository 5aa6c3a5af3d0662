"""States in a node's memory: the newest whole one survives whatever happens to the process that keeps them."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysegment.climate.checks import BadInput
from raysegment.elastic import keeper as module
from raysegment.elastic.intervals import Mtbf, checkpoint_every_s, snapshot_every
from raysegment.elastic.keeper import Keeper, forget, forget_stale, memory_folder, newest, steps
from tests.faulty_disk import Died, Disk, Victims, free, full, joined, read_only, same


def keep(keeper: Keeper, step: int) -> float:
    return keeper.keep(step, joined(step), {"step": step, "generation": 1})


def step_of(folder: Path) -> int:
    """The newest step that is kept whole, with the contents of that step; 0 for none."""
    kept = newest(folder, "run")
    if kept is None:
        return 0
    assert kept.facts == {"step": kept.step, "generation": 1} or kept.facts == {"step": kept.step}
    assert same(kept.tensors, joined(kept.step))
    return kept.step


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def test_what_was_kept_comes_back(folder):
    keeper = Keeper(folder, "run", "node")
    assert keeper.off == ""
    assert newest(folder, "run") is None
    made = {**joined(4), "turned": torch.arange(12.0).reshape(3, 4).t()}
    assert keeper.keep(4, made, {"loss_scale": 2.0}) > 0
    kept = newest(folder, "run")
    assert kept is not None
    assert (kept.step, kept.node, kept.facts) == (4, "node", {"loss_scale": 2.0})
    assert same(kept.tensors, made)
    assert newest(folder, "other") is None


def test_the_newest_of_all_nodes_is_found_without_reading(folder, monkeypatch):
    keepers = [Keeper(folder, "run", node) for node in ("a", "b")]
    for step in range(1, 6):
        keep(keepers[step % 2], step)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_load", lambda _: pytest.fail("tensors were read"))
        listed = [(one.step, one.node) for one in steps(folder, "run")]
    assert listed == [(5, "b"), (4, "a"), (3, "b"), (2, "a")]
    assert step_of(folder) == 5
    kept = newest(folder, "run", accept=lambda one: one.step < 5)
    assert kept is not None
    assert kept.step == 4


def test_the_memory_of_the_older_state_is_used_again(folder):
    keeper = Keeper(folder, "run", "node")
    for step in (1, 2):
        keep(keeper, step)
    inodes = {path.stat().st_ino for path in keeper.folder.glob("*.safetensors")}
    for step in range(3, 8):
        keep(keeper, step)
        assert {path.stat().st_ino for path in keeper.folder.glob("*.safetensors")} == inodes
        assert [one.step for one in steps(folder, "run")] == [step, step - 1]
    keeper.keep(8, {"small": torch.ones(2)}, {})  # another shape is no harm
    kept = newest(folder, "run")
    assert kept is not None
    assert torch.equal(kept.tensors["small"], torch.ones(2))


def test_a_process_that_comes_after_keeps_the_newest_until_it_has_one(folder):
    first = Keeper(folder, "run", "node")
    for step in (1, 2):
        keep(first, step)
    second = Keeper(folder, "run", "node")
    assert [one.step for one in steps(folder, "run")] == [2]
    keep(second, 1)  # it took up the run from an older checkpoint
    assert [one.step for one in steps(folder, "run")] == [1]
    keep(second, 2)
    assert len(list(second.folder.iterdir())) == 4


def test_only_this_user_may_look(folder):
    keeper = Keeper(folder, "run", "node")
    keep(keeper, 1)
    for path in (folder, folder / "run", keeper.folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in keeper.folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_users_folder_is_not_used(folder, monkeypatch):
    keep(Keeper(folder, "run", "node"), 1)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    root_is_fine = folder.stat().st_uid == 0
    keeper = Keeper(folder, "run", "node")
    assert "belongs to somebody else" in keeper.off
    assert newest(folder, "run") is None
    assert (folder / "run").exists() or not root_is_fine


@pytest.mark.parametrize("name", ["", "../run", "a/b", ".hidden"])
def test_names_are_plain(name, folder):
    for run, node in ((name, "node"), ("run", name)):
        with pytest.raises(BadInput, match="keeper"):
            Keeper(folder, run, node)


def test_without_a_tmpfs_nothing_is_kept_and_it_says_so(tmp_path, monkeypatch):
    default = tmp_path / "raysegment"
    monkeypatch.setattr(module, "memory_folder", lambda: default)
    monkeypatch.setattr(module, "_is_tmpfs", lambda _: False)
    keeper = Keeper(default, "run", "node")
    assert "no tmpfs" in keeper.off
    assert keep(keeper, 1) == 0
    assert not default.exists()


def test_a_tmpfs_is_told_from_a_disk(tmp_path):
    assert module._is_tmpfs(Path("/dev/shm/x")) or not Path("/dev/shm").is_dir()
    assert not module._is_tmpfs(Path("/proc"))
    assert memory_folder("off") is None
    assert memory_folder(str(tmp_path)) == tmp_path
    assert str(memory_folder()).startswith("/dev/shm/raysegment-")


def test_without_room_nothing_is_kept_and_it_says_so(folder, monkeypatch):
    keeper = Keeper(folder, "run", "node")
    monkeypatch.setattr(module, "room_bytes", lambda _: module._SPARE_BYTES + 1500)
    assert keep(keeper, 1) == 0  # two states of about 1000 bytes
    assert "GiB" in keeper.off
    assert steps(folder, "run") == []


def test_a_run_that_has_ended_is_forgotten_and_so_are_dead_ones(folder):
    for run in ("run", "dead", "alive"):
        keep(Keeper(folder, run, "node"), 1)
    for path in (folder / "dead", *(folder / "dead").rglob("*")):
        os.utime(path, (0, time.time() - 8 * 86400))
    assert forget_stale(folder, 9) == []
    Keeper(folder, "run", "other")
    assert sorted(path.name for path in folder.iterdir()) == ["alive", "run"]
    forget(folder, "run")
    assert [path.name for path in folder.iterdir()] == ["alive"]
    forget(folder, "run")


# damage


def prepared(tmp_path: Path) -> tuple[Path, Keeper]:
    """States of steps 1 and 2."""
    folder = tmp_path / "memory"
    keeper = Keeper(folder, "run", "node")
    for step in (1, 2):
        keep(keeper, step)
    return folder, keeper


def test_a_flipped_bit_is_seen_and_the_older_state_used(tmp_path):
    folder, keeper = prepared(tmp_path)
    files = [path for path in keeper.folder.iterdir() if path.name.startswith(f"{keeper._token}-1")]
    assert len(files) == 2
    chance = random.Random(7)
    for _ in range(200):
        path = chance.choice(files)
        before = path.read_bytes()
        content = bytearray(before)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert step_of(folder) == 1
        path.write_bytes(before)
    assert step_of(folder) == 2


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_truncated_or_missing_file_is_passed_over(tmp_path, kind):
    folder, keeper = prepared(tmp_path)
    path = keeper.folder / f"{keeper._token}-1.{kind}"
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        assert step_of(folder) == 1
    path.write_bytes(content + b"\0")
    assert step_of(folder) == 1
    path.unlink()
    assert step_of(folder) == 1


def test_a_state_of_another_version_is_passed_over(tmp_path):
    folder, keeper = prepared(tmp_path)
    path = keeper.folder / f"{keeper._token}-1.json"
    record = json.loads(path.read_bytes().partition(b"\n")[2])
    module._commit(path, {**record, "format": 99})
    assert step_of(folder) == 1


def test_a_keeper_that_dies_at_any_byte_leaves_a_whole_state(tmp_path):
    def work(disk: Disk) -> Path:
        shutil.rmtree(tmp_path / "memory", ignore_errors=True)
        folder, keeper = prepared(tmp_path)
        with disk.installed():
            try:
                keep(keeper, 3)
            except Died:
                assert disk.ended
        return folder

    whole, left = free(), []
    work(whole)
    assert whole.spent >= 1000
    for point in range(whole.spent - 9):  # a time in the record may have fewer digits than it had before
        disk = Disk(point, Died)
        folder = work(disk)
        assert disk.ended
        left.append(step_of(folder))
        if point % 20 == 0:  # the next process
            keeper = Keeper(folder, "run", "node")
            assert step_of(folder) == left[-1]
            keep(keeper, 4)
            assert step_of(folder) == 4
            assert len(list(keeper.folder.iterdir())) == 2
    assert {*left} == {2}, "it counts with the last operation, not before"
    folder = work(whole)
    assert step_of(folder) == 3


def test_memory_that_is_full_is_an_error_and_the_older_state_stays(tmp_path):
    folder, keeper = prepared(tmp_path)
    for point in range(0, 1000, 90):
        with full(point).installed(), pytest.raises(OSError, match="No space") as caught:
            keep(keeper, 3)
        assert caught.value.errno == errno.ENOSPC
        assert step_of(folder) == 2
    with read_only(errno.EROFS).installed(), pytest.raises(OSError, match="Read-only"):
        keep(keeper, 3)
    assert step_of(folder) == 2
    assert keep(keeper, 3) > 0
    assert step_of(folder) == 3


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    made = Victims()
    yield made
    made.close()


def test_a_killed_keeper_leaves_a_whole_state(tmp_path, victims):
    folder, seen, point = tmp_path / "memory", [], 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        keep(Keeper(folder, "run", "node"), 1)
        if not victims.kill("keeper", str(folder), point):
            break
        seen.append(step_of(folder))
        point += 131
    assert seen == sorted(seen)
    assert {*seen} == {1, 2}
    assert step_of(folder) == 3
    assert len(seen) > 15


# how often


@given(st.floats(0, 100), st.floats(1e-3, 1e3), st.floats(1e-3, 1), st.integers(0, 10**6))
def test_a_snapshot_costs_at_most_its_share(cost, step, share, before):
    every = snapshot_every(cost, step, share, before)
    assert every >= 1
    assert cost <= share * every * step * (1 + 1e-9)
    assert every == 1 or every - 1 < 2.0 * cost / (share * step)
    assert snapshot_every(cost, step, share, every) == every


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.lists(st.floats(0.95, 1.05), min_size=50, max_size=50))
def test_times_that_vary_a_little_do_not_change_the_interval(cost, step, noise):
    every, changes = 0, -1
    for factor in noise:
        now = snapshot_every(cost * factor, step, before=every)
        every, changes = now, changes + (now != every)
    assert changes <= 2


@given(st.floats(1e-3, 1e3), st.floats(1, 1e7))
def test_checkpoints_come_at_the_optimum(cost, mtbf):
    loss = lambda every: cost / every + every / (2 * mtbf)  # Young's model: writing, and half an interval again per failure
    best = checkpoint_every_s(cost, mtbf, 1e-9, 1e12)
    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 1.1, 2))
    assert checkpoint_every_s(cost, mtbf, 40, 50) == min(50, max(40, best))


@given(st.integers(0, 100), st.floats(0, 1e7))
def test_failures_seen_shorten_the_time_between_them(failures, elapsed):
    made = Mtbf(prior_s=3600.0).after(elapsed, failures)
    assert made.seconds == pytest.approx((3600 + elapsed) / (1 + failures))
    assert made.after(10.0, 1).seconds < made.after(10.0).seconds
    assert Mtbf().seconds == 86400


SENSELESS = [
    lambda: snapshot_every(-1, 1),
    lambda: snapshot_every(1, 0),
    lambda: snapshot_every(1, 1, 2),
    lambda: checkpoint_every_s(1, 0),
    lambda: checkpoint_every_s(1, 1, 2, 1),
    lambda: Mtbf(-1),
]


@pytest.mark.parametrize("bad", SENSELESS)
def test_what_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        bad()

"""Staging killed with SIGKILL at any point and run again ends with the same bytes, and does no finished part twice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from raysegment.feed.part import PARTS
from tests.small_archive import write_archive

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the processes of a run")


def made(out: Path) -> dict[str, str]:
    """SHA-256 of everything that a finished run leaves, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir()) if path.is_file()}


def finished_parts(out: Path) -> dict[str, int]:
    """Time of change of each shard whose record is there."""
    records = (out / PARTS).glob("part-*.json")
    return {f"{path.stem}.arrow": (out / f"{path.stem}.arrow").stat().st_mtime_ns for path in records}


AT_EVERY_STEP = """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from raysegment.archive.shards import ShardWriter
    from raysegment.feed import stage as module
    from raysegment.feed.part import PARTS, make_part

    archive, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    module._run = lambda jobs: map(make_part, jobs)  # in this process: what matters here is the order of its steps
    left, write_text = None, Path.write_text

    def step(work):
        def counted(*args, **options):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **options)
        return counted

    for holder, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (Path, "write_text"),
                         (ShardWriter, "_write")):
        setattr(holder, name, step(getattr(holder, name)))

    def run(out, steps):
        '''The exit status of a run that dies at its step number `steps`, its report as JSON beside `out`.'''
        global left
        child = os.fork()
        if child == 0:
            left, status = steps, 1
            try:
                report = module.stage([archive], None, out, module.StageConfig(files_per_part=1))
                write_text(out.with_suffix(".json"), json.dumps([report.parts_reused, steps - left]))
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1]

    assert run(folder / "whole", 10**9) == 0
    steps = json.loads((folder / "whole.json").read_text())[1]
    for number in range(1, steps + 1):
        out = folder / f"killed-{number:03d}"
        assert run(out, number) == signal.SIGKILL, number
        records = {path.stem for path in (out / PARTS).glob("part-*.json")}
        before = {name: (out / f"{name}.arrow").stat().st_mtime_ns for name in records}
        assert not (out / "manifest.json").exists() or number >= steps - 1, number  # the last: what follows its renaming
        assert run(out, 10**9) == 0
        assert json.loads(out.with_suffix(".json").read_text())[0] == len(records), number
        assert before == {name: (out / f"{name}.arrow").stat().st_mtime_ns for name in records}, number
    print(steps)
"""


def test_killed_at_every_step_that_changes_a_file(tmp_path):
    """Each rename, fsync, removal and written tile of a run is a place to die at."""
    write_archive(tmp_path / "archive", 3)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(AT_EVERY_STEP), str(tmp_path / "archive"), str(tmp_path / "out")]
    steps = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    assert steps > 20
    whole = made(tmp_path / "out" / "whole")
    for number in range(1, steps + 1):
        assert made(tmp_path / "out" / f"killed-{number:03d}") == whole, number


# the whole command, Ray and all -------------------------------------------------------------------------------------


def command(archive: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "raysegment", "stage", str(archive), "--out", str(out), "--json"]


def descendants(pid: int) -> set[int]:
    """A process and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def kill_all(run: subprocess.Popen) -> None:
    """Stop the run's processes one after the other, so that none starts another, then end them at once."""
    stopped: set[int] = set()
    while fresh := descendants(run.pid) - stopped:
        for pid in fresh:
            send(pid, signal.SIGSTOP)
        stopped |= fresh
    for pid in stopped:
        send(pid, signal.SIGKILL)
    run.wait()


def send(pid: int, what: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, what)


def run_to_the_end(archive: Path, out: Path) -> dict:
    done = subprocess.run(command(archive, out), check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_and_kill(archive: Path, out: Path, parts: int, after_s: float) -> bool:
    """Kill a run `after_s` after it has made so many parts; False when it was over before."""
    run = subprocess.Popen(command(archive, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((out / PARTS).glob("part-*.json"))) < parts:
        if run.poll() is not None:
            return False
        time.sleep(0.001)  # polls a condition
    try:
        run.wait(after_s)
    except subprocess.TimeoutExpired:
        kill_all(run)
        return True
    return False


def trials(tmp_path: Path, count: int) -> tuple[int, int]:
    """How many of `count` runs were killed, in the midst of 20 parts, and how many parts they had made by then in all."""
    archive, clock = tmp_path / "archive", random.Random(0)
    write_archive(archive, 160, 96, 144)
    run_to_the_end(archive, tmp_path / "whole")
    wanted, killed, found = made(tmp_path / "whole"), 0, 0
    for number in range(count):
        out = tmp_path / f"killed-{number}"
        killed += run_and_kill(archive, out, round(18 * number / max(1, count - 1)), clock.uniform(0, 0.15))
        before = finished_parts(out)
        found += len(before)
        report = run_to_the_end(archive, out)
        assert made(out) == wanted, number
        assert report["parts_reused"] >= len(before), number
        assert {name: (out / name).stat().st_mtime_ns for name in before} == before, number
        assert report["tiles"] == 160
    return killed, found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_many_times(tmp_path):
    killed, found = trials(tmp_path, 20)
    print(f"{killed} of 20 runs killed, {found} parts made by then")
    assert killed >= 15
    assert found >= 100

"""Members without Ray: a roster in a process of its own, members that add up numbers or train, all of them killable.

Processes come from a server that has imported torch already, so that each is there in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raysegment.elastic.ladder import Ladder
from raysegment.elastic.membership import Member, Over
from raysegment.elastic.roster import Address, Roster
from raysegment.elastic.settings import TrainConfig
from raysegment.learning.exchange import Interrupted

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.members", "tests.training_members"])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """What `condition` returns once that is true; fails after so long."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)
    return found


class RosterProcess:
    """A roster whose address is a file; it can be killed and started again."""

    def __init__(self, config: TrainConfig, folder: Path):
        self.config, self.file = config, folder / "roster.address"
        self.process = None
        self.start(False)

    def start(self, resume: bool) -> None:
        self.file.unlink(missing_ok=True)
        self.process = CONTEXT.Process(target=_serve, args=(self.config, self.file, resume))
        self.process.start()
        wait_for(self.file.exists, "the roster")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        if self.process.is_alive():
            self.kill()


def _serve(config: TrainConfig, file: Path, resume: bool) -> None:
    async def serve() -> None:
        roster = Roster(config, "127.0.0.1", resume)
        address = await roster.start()
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps([address.host, address.port, address.token]))
        temporary.rename(file)
        while True:
            await asyncio.sleep(3600)

    asyncio.run(serve())


def find(file: Path) -> Callable[[], Address]:
    return lambda: Address(*json.loads(file.read_text()))


def member_of(file: Path, uid: str, patience_s: float) -> Member:
    return Member(find(file), uid, {"node": uid, "cell": 0}, Ladder(patience_s), "127.0.0.1", "gloo")


def add_up(file: Path, uid: str, patience_s: float, out: Path, steps: int, trick: str = "") -> None:
    """A member whose step is a sum of ones over the group; a line per step in `out`, written by each member for itself."""
    torch.set_num_threads(1)
    member = member_of(file, uid, patience_s)
    step, origin = 0, "new"
    try:
        while step < steps:
            place = member.meet(step, origin)
            origin = "generation"
            if place.behind:
                told = torch.tensor([step])
                member.group.broadcast(told, place.source)
                step = max(step, int(told))
            try:
                while step < steps:
                    one = torch.tensor([1.0, float(member.pending)])
                    member.at(step, {"load_s": 0.0, "compute_s": 0.0, "micro_batches": 1})
                    member.group.all_reduce(one)
                    step += 1
                    with out.open("a") as file_out:
                        file_out.write(f"{time.monotonic()} {uid} {step} {place.generation} {int(one[0])}\n")
                    member.record(step - 1, {"cursor": step - 1, "by": uid}, send=place.rank == 0)
                    if trick == "hold the lock" and step == 20:
                        ctypes.PyDLL(None).sleep(int(3 * patience_s))  # C code that does not let Python run
                    if one[1]:
                        break
            except Interrupted:
                continue
        member.bye("done")
    except Over:
        pass
    member.close()


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def steps_of(out: Path) -> list[tuple[float, str, int, int, int]]:
    """(time, member, step, generation, size) of all lines so far; one that is being written does not count."""
    if not out.exists():
        return []
    rows = [line.split() for line in out.read_text().split("\n")[:-1]]
    return [(float(t), uid, int(step), int(generation), int(size)) for t, uid, step, generation, size in rows]


def kill(process: Any, number: int = signal.SIGKILL) -> float:
    """Send a signal; the moment of it."""
    os.kill(process.pid, number)
    return time.monotonic()

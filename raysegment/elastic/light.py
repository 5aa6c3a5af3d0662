"""Members that do everything but train: many in one process, to see what a roster is like with thousands of them.

They speak `wire` as `membership.Member` and its heart do, on two connections each, and plan their share of the tiles as a
stream does; they hold no network, build no group and import no torch, so that a process has room for hundreds.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray

from raysegment.elastic.ladder import Ladder
from raysegment.elastic.wire import BEAT, LIMIT, MEMBER, connect, pack
from raysegment.feed.ahead import missing, tasks_of
from raysegment.feed.order import Order

_TURNS = 10  # beats of a process's members are spread over so many moments
_GREETERS = 8  # connections that are opened at once
# A worker whose node holds no tile yet: planning costs most then
_NOTHING: Any = SimpleNamespace(here=lambda number: False, cache=None)


@dataclass(frozen=True)
class Address:
    """Where the roster is: `roster.Address` without what that module imports."""

    host: str
    port: int
    token: str


@dataclass(frozen=True)
class Plan:
    """What a member plans after each change: the tiles of `window` micro-batches of one tile, in tasks of `per_task`."""

    tiles: int = 121_266
    per_member: int = 2
    steps: int = 10_000
    window: int = 36
    per_task: int = 2

    def seconds(self, step: int, rank: int, size: int) -> float:
        """Time to plan, with what `feed.stream` and `feed.ahead` do in `replan`."""
        started = time.perf_counter()
        line = Order(self.tiles, self.per_member * size, 1).line(step, step + self.steps, rank, size)
        tasks_of(_NOTHING, missing(_NOTHING, line, 0, self.window), self.per_task)
        return time.perf_counter() - started


class LightMember:
    """One member: says that it is ready when it has come and whenever its generation ends; notes when it heard what."""

    def __init__(self, uid: str, facts: dict[str, Any], ladder: Ladder, greeters: ThreadPoolExecutor):
        self.uid, self.facts, self.ladder, self._greeters = uid, facts, ladder, greeters
        self.generation, self.rank, self.size, self.committed = 0, 0, 0, 0
        self.heard: dict[str, float] = {}  # monotonic seconds at which each kind of message came last
        self.lost = ""  # why the roster has let this member go
        self._line: asyncio.StreamWriter | None = None
        self._beats: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None

    async def enter(self, address: Address) -> None:
        """Connect, and ask for a place."""
        facts = {**self.facts, "generation": 0, "holds": False, "store": [address.host, 1], "pid": os.getpid()}
        self.lost, self.committed, self.generation = "", 0, 0
        reader, self._line = await self._connect(address, MEMBER, {"uid": self.uid, "facts": facts})
        self._listening = asyncio.create_task(self._listen(reader, self._line))
        self._say({"op": "ready", "committed": 0, "origin": "new"})
        _, self._beats = await self._connect(address, BEAT, {"uid": self.uid})

    async def _connect(
        self, address: Address, role: str, hello: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        greet = partial(connect, (address.host, address.port), address.token, role, hello, self.ladder.forming_s)
        line = await asyncio.get_running_loop().run_in_executor(self._greeters, greet)
        line.setblocking(False)
        return await asyncio.open_connection(sock=line, limit=LIMIT)

    async def _listen(self, reader: asyncio.StreamReader, line: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while text := await reader.readline():
                self._hear(json.loads(text))
        if self._line is line and not self.lost:
            self.lost = "the roster has closed the line"

    def _hear(self, message: dict[str, Any]) -> None:
        op = message["op"]
        self.heard[op] = time.monotonic()
        if op == "generation":
            self.generation, self.rank, self.size = message["generation"], message["rank"], message["size"]
            self.committed = max(self.committed, message["committed"])  # as brought up to date by the source
        elif op == "ejected":
            self.lost = message["why"]
        elif op in ("pending", "broken"):
            self._say({"op": "ready", "committed": self.committed, "origin": "generation"})

    def _say(self, message: dict[str, Any]) -> None:
        if self._line is not None:
            self._line.write(pack(message))

    def beat(self) -> None:
        if self._beats is not None:
            self._beats.write(pack({"op": "beat"}))

    def step(self, number: int, step_s: float) -> None:
        """What a step has a member say; the first one also writes the log."""
        pace = {"load_s": 0.0, "compute_s": step_s, "micro_batches": 1}
        self._say({"op": "at", "generation": self.generation, "step": number, "pace": pace})
        if self.rank == 0:
            line = {"loss": 1.0, "step_s": step_s, "time": time.time(), "world": self.size}
            self._say({"op": "record", "generation": self.generation, "step": number, "line": line})
        self.committed = number + 1

    async def leave(self) -> None:
        """As a process that dies: its connections close."""
        lines, self._line, self._beats = [self._line, self._beats], None, None
        for line in lines:
            if line is not None:
                line.close()
        if self._listening is not None:
            self._listening.cancel()


class LightHost:
    """Some of the members, in a process of their own. Times are the machine's monotonic clock, which processes share."""

    def __init__(self, patience_s: float, beat_s: float):
        self.ladder, self.beat_s = Ladder(patience_s), beat_s
        self.members: dict[str, LightMember] = {}
        self._greeters = ThreadPoolExecutor(_GREETERS, "greet")
        self._beating: asyncio.Task[None] | None = None
        self._sent = 0

    async def about(self) -> dict[str, Any]:
        """pid, MiB of memory at most so far, and whether torch has been imported."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"pid": os.getpid(), "mib": most, "torch": "torch" in sys.modules}

    async def enter(self, address: Address, who: dict[str, dict[str, Any]]) -> None:
        """Have members (uid: facts) connect and ask for places."""
        coming = [LightMember(uid, facts, self.ladder, self._greeters) for uid, facts in who.items()]
        self.members.update({member.uid: member for member in coming})
        await asyncio.gather(*(member.enter(address) for member in coming))

    async def await_generation(self, number: int, size: int, timeout_s: float) -> tuple[int, float]:
        """(generation, when the last of these members heard of it): the first one from `number` on that has `size` members."""
        deadline = time.monotonic() + timeout_s
        while not all(m.generation >= number and m.size == size for m in self.members.values()):
            if lost := [f"{m.uid}: {m.lost}" for m in self.members.values() if m.lost]:
                raise RuntimeError(f"{len(lost)} members were lost, the first is {lost[0]}")
            if time.monotonic() > deadline:
                here = sum(m.generation >= number and m.size == size for m in self.members.values())
                heard = f"{here} of {len(self.members)} members had heard of a generation of {size}"
                raise RuntimeError(f"after {timeout_s:g} s {heard}")
            await asyncio.sleep(0.002)
        last = max((member.heard["generation"] for member in self.members.values()), default=0.0)
        return max((member.generation for member in self.members.values()), default=0), last

    async def lose(self, uid: str) -> float:
        """When a member's connections were closed."""
        now = time.monotonic()
        await self.members.pop(uid).leave()
        return now

    async def leave(self) -> None:
        """All go."""
        for uid in list(self.members):
            await self.lose(uid)

    async def beat(self, on: bool) -> None:
        """Beat, or be silent."""
        if self._beating is not None:
            self._beating.cancel()
        self._beating = asyncio.create_task(self._beat()) if on else None

    async def _beat(self) -> None:
        turn = 0
        while True:
            for number, member in enumerate(list(self.members.values())):
                if number % _TURNS == turn:
                    member.beat()
                    self._sent += 1
            turn = (turn + 1) % _TURNS
            await asyncio.sleep(self.beat_s / _TURNS)

    async def beats(self) -> int:
        """How many beats have been sent so far: fewer than wished where the machine is busy."""
        return self._sent

    async def steps(self, first: int, last: int, begin: float, step_s: float) -> None:
        """Say what members say in the steps [first, last), one every `step_s` from the moment `begin` on."""
        for number in range(first, last):
            await asyncio.sleep(max(0.0, begin + (number - first) * step_s - time.monotonic()))
            for member in self.members.values():
                member.step(number, step_s)

    async def plan(self, plan: Plan, step: int) -> list[float]:
        """Seconds that each member needs to plan its share of what comes after `step`."""
        return [plan.seconds(step, member.rank, member.size) for member in self.members.values()]


Host: Any = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)(LightHost)  # pyright: ignore[reportCallIssue]


def facts_of(number: int, per_node: int) -> dict[str, Any]:
    """What the member number `number` says of itself, with so many on a node."""
    return {"node": f"n{number // per_node}", "cell": number // per_node, "worker": number % per_node}


def dealt(numbers: Iterable[int], hosts: int, per_node: int) -> list[dict[str, dict[str, Any]]]:
    """Members (uid, five figures: facts) for each of so many processes, in turn."""
    found: list[dict[str, dict[str, Any]]] = [{} for _ in range(hosts)]
    for number in numbers:
        found[number % hosts][f"{number:05d}"] = facts_of(number, per_node)
    return found

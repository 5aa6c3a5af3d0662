"""The roster: the one process that says who is a member, writes the log of steps and publishes checkpoints.

`Roster` serves an `Assembly` over TCP; `RosterActor` runs it in a Ray actor, which Ray starts again when it dies. Members
keep on training meanwhile and come back. Everything that counts as done is done here, by the one holder of the run's lock,
and only for members of the newest generation: a member that is cut off can compute, but not commit.

The journal (roster.json in the run's folder) is on the disk before a generation is announced, so numbers never go back.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from filelock import FileLock
from filelock import Timeout as LockTimeout

from raysegment.archive.files import committed
from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from raysegment.elastic.assembly import Assembly
from raysegment.elastic.chaos import Plan
from raysegment.elastic.checkpoints import Draft, prune, publish, read_facts, remove_orphans
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.runs import Run, StepLog
from raysegment.elastic.settings import TrainConfig
from raysegment.elastic.verdict import Verdict
from raysegment.elastic.wire import BEAT, LIMIT, MEMBER, ROSTER, answer, nonce, pack, proves

_TICK_S, _STRAGGLERS_EVERY_S = 0.05, 2.0
_BACKLOG = 4096  # connections that may wait while the roster is busy (Linux cuts it to net.core.somaxconn): all come at once


@dataclass(frozen=True)
class Address:
    """Where the roster listens, and what proves that somebody may speak to it."""

    host: str
    port: int
    token: str


def writer_tag(uid: str) -> str:
    """How a member's drafts of checkpoints are named."""
    return uid.replace(".", "-")


class _Heart(asyncio.Protocol):
    """A line on which somebody only shows that it lives: whatever comes calls `beat`. There are many, often: no task wakes
    up for each."""

    def __init__(self, beat: Callable[[], None]):
        self._beat, self.ended = beat, asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """A beat, or several."""
        self._beat()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        if not self.ended.done():
            self.ended.set_result(None)


class Roster:
    """The server. `news` holds all that happened since this process began, in order; the run's events file has it too."""

    def __init__(self, config: TrainConfig, host: str, resume: bool = False):
        elastic = config.elastic
        self.run, self.config, self.host, self.token = Run(config.out), config, host, secrets.token_hex(32)
        self.ladder = Ladder(elastic.patience_s)
        self.checkpoints = Place.of(config.checkpoint_place)
        self.lock = FileLock(self.run.folder / "roster.lock", thread_local=False)
        with suppress(LockTimeout):
            self.lock.acquire(timeout=self.ladder.absence_s)
        if not self.lock.is_locked:
            remedy = "Wait until it has ended, or end it; then run the same command again."
            raise BadInput(self.run.folder, "a run that nobody else writes", "another roster holds roster.lock", remedy)
        self.key = self.run.key
        self.log = StepLog(self.run.steps)
        self.verdict = Verdict(config.max_fruitless)
        least = elastic.cells[0] * config.workers_per_cell
        self.assembly = Assembly(
            self.ladder, least, config.members, logged=self.log.high_water + 1, eject_stragglers=elastic.eject_stragglers
        )
        before = self._journal()
        self.assembly.resume(before["generation"], before["members"] if resume else [], time.monotonic())
        self.lines: dict[str, asyncio.StreamWriter] = {}  # of members
        self.beats: dict[str, asyncio.StreamWriter] = {}
        self.news: list[dict[str, Any]] = []
        self.gave_up: dict[str, Any] | None = None
        self._commits: set[asyncio.Task[None]] = set()
        self._publishing = asyncio.Lock()
        chance = Plan.parse(config.chaos).random
        self._blows = iter(chance or ())
        self._blow, self._struck = next(self._blows, None), time.monotonic()

    async def start(self) -> Address:
        """Listen; the address for members."""
        server = await asyncio.start_server(self._client, self.host, 0, limit=LIMIT, backlog=_BACKLOG)
        self._server, self._ticking = server, asyncio.get_running_loop().create_task(self._tick())
        return Address(self.host, server.sockets[0].getsockname()[1], self.token)

    def stop(self, why: str) -> None:
        """Have everybody commit and end."""
        self.assembly.stop(why, time.monotonic())
        self._deliver()

    def status(self) -> dict[str, Any]:
        """generation, members (uid, node, pid, rank), steps logged, whether it is over and why."""
        assembly = self.assembly
        members = [{"uid": uid, **assembly.seats[uid].facts} for uid in assembly.members if uid in assembly.seats]
        return {
            "pid": os.getpid(), "generation": assembly.generation, "broken": assembly.broken, "members": members,
            "seats": list(assembly.seats), "logged": assembly.logged, "done": assembly.done, "stopping": assembly.stopping,
            "gave_up": self.gave_up,
        }  # fmt: skip

    def close(self) -> None:
        """The log is on the disk and the run's lock free."""
        self.log.close()
        self.lock.release()

    # ------------------------------------------------------------ connections

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid, role = "", ""
        try:
            hello = await asyncio.wait_for(self._greet(reader, writer), self.ladder.forming_s)
            if hello is None:
                return
            uid, role = str(hello["uid"]), hello["role"]
            await (self._beats(uid, reader, writer) if role == BEAT else self._member(uid, hello, reader, writer))
        except (TimeoutError, OSError, ValueError, KeyError, TypeError, asyncio.IncompleteReadError):
            pass  # a line that breaks off or makes no sense ends like one that is closed
        finally:
            held = self.beats if role == BEAT else self.lines
            if held.get(uid) is writer:
                del held[uid]
                if role == MEMBER:
                    self.assembly.exit(uid, "connection lost", time.monotonic())
                    self._deliver()
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any] | None:
        """The first message of somebody who knows the token; None for anybody else."""
        challenge = nonce()
        writer.write(pack({"nonce": challenge}))
        hello = json.loads(await reader.readline())
        role = hello.get("role")
        if role not in (MEMBER, BEAT) or not proves(self.token, role, challenge, hello.get("proof")):
            self.record({"event": "refused", "why": "wrong token", "from": str(writer.get_extra_info("peername"))})
            return None
        writer.write(pack({"proof": answer(self.token, ROSTER, str(hello.get("nonce")))}))
        return hello

    async def _beats(self, uid: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.beats[uid] = writer
        heart = _Heart(lambda: self.assembly.beat(uid, time.monotonic()))
        writer.transport.set_protocol(heart)
        if reader.at_eof():  # it has ended before (nothing else can have come: a heart waits for the roster's proof)
            heart.connection_lost(None)
        await heart.ended

    async def _member(self, uid: str, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        old = self.lines.get(uid)
        self.lines[uid] = writer
        if old is not None:
            old.close()
        self.assembly.enter(uid, hello["facts"], time.monotonic())
        self._deliver()
        while line := await reader.readline():
            if self.lines.get(uid) is not writer:
                return
            await self._hear(uid, json.loads(line))
            self._deliver()

    async def _hear(self, uid: str, message: dict[str, Any]) -> None:
        """What a member says."""
        now, op = time.monotonic(), message["op"]
        if op == "at":
            self.assembly.reached(uid, message["generation"], int(message["step"]), message["pace"], now)
        elif op == "record":
            self._log(uid, message)
        elif op == "ready":
            self.assembly.ready(uid, int(message["committed"]), message["origin"], now)
        elif op == "commit":
            self._commits.add(task := asyncio.create_task(self._commit(uid, message)))  # its member may say more meanwhile
            task.add_done_callback(self._commits.discard)
        elif op == "failed":
            self._failed(uid, message)
        elif op == "bye":
            self._bye(uid, message, now)
        else:
            raise ValueError(f"a member says {op!r}")

    # ------------------------------------------------------------ what counts

    def _log(self, uid: str, message: dict[str, Any]) -> None:
        """Write a step line of a current member."""
        if not self.assembly.is_current(uid, message["generation"]):
            self.record(
                {"event": "fenced", "member": uid, "what": f"step {message['step']}", "generation": message["generation"]}
            )
            return
        self.log.offer(int(message["step"]), message["line"])
        if self.log.high_water + 1 > self.assembly.logged:
            self.assembly.logged = self.log.high_water + 1
            self.verdict.progress()

    async def _commit(self, uid: str, message: dict[str, Any]) -> None:
        """Publish a checkpoint that a current member has drafted, and tell it whether that worked."""
        draft, why, generation = Draft(**message["draft"]), "", message["generation"]
        async with self._publishing:
            if not self.assembly.is_current(uid, generation):
                why = f"generation {generation} is over"
                self.record({"event": "fenced", "member": uid, "what": f"checkpoint {draft.step}", "generation": generation})
            elif not await asyncio.to_thread(self.run.is_still, self.key):
                why = self._displaced()
            else:
                writers = [writer_tag(other) for other in self.assembly.seats]
                why = await asyncio.to_thread(self._publish, draft, float(message["seconds"]), writers)
        self._send(uid, {"op": "committed", "step": draft.step, "why": why})

    def _publish(self, draft: Draft, seconds: float, writers: list[str]) -> str:
        """Make a draft official, in a thread; "" or why not."""
        try:
            self.log.sync()
            published = publish(self.checkpoints, draft)
            prune(self.checkpoints, self.config.checkpoint.keep)
            remove_orphans(self.checkpoints, writers)
            known = read_facts(published).provenance
        except (OSError, BadInput) as error:
            self.record({"event": "checkpoint_failed", "step": draft.step, "error": str(error)})
            return str(error)
        digests = {key: known[key] for key in ("state_sha256", "weights_sha256") if key in known}
        facts = {"step": draft.step, "path": Place.of(published).name, "seconds": seconds, **digests}
        self.record({"event": "checkpoint", **facts})
        return ""

    def _displaced(self) -> str:
        """End the run, whose folder is another's by now: what it would write there, that one would take for its own."""
        why = "one that was removed or replaced while this run went on"
        remedy = "Start it again with a folder of its own as `out`, and leave that in place until the command has ended."
        self.gave_up = {"error": why, "bad_input": (str(self.run.folder), "the folder that the run began in", why, remedy)}
        self.assembly.finish()
        self._deliver()
        return why

    def _failed(self, uid: str, message: dict[str, Any]) -> None:
        """An error that a member could not go on after."""
        cause = {key: message[key] for key in ("error", "lasting", "bad_input", "trace")}
        self.record({"event": "failure", "member": uid, **cause})
        self.verdict.failure(cause)
        self._judge()

    def _judge(self) -> None:
        if self.gave_up is None and not self.assembly.done and self.verdict.hopeless:
            self.gave_up = self.verdict.cause or {"error": "members die before they finish a step", "bad_input": None}
            self.record({"event": "gave_up", "cause": self.gave_up["error"], "losses": self.verdict.losses})
            self.assembly.finish()

    def _bye(self, uid: str, message: dict[str, Any], now: float) -> None:
        if message["why"] == "done" and self.assembly.is_current(uid, message["generation"]):
            self.assembly.finish()
        else:
            self.assembly.exit(uid, message["why"], now)

    # ------------------------------------------------------------ time, and what follows from it

    async def _tick(self) -> None:
        """Look at the clock. Time that this process itself has slept through is nobody's silence."""
        last = stragglers = time.monotonic()
        while not self.assembly.done:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            slept = now - last - _TICK_S
            last = now
            if slept > 2 * self.ladder.beat_s:
                for uid in list(self.assembly.seats):
                    self.assembly.beat(uid, now)
                continue
            self.assembly.tick(now)
            self._strike(now)
            if now - stragglers > _STRAGGLERS_EVERY_S:
                stragglers = now
                self.assembly.look_for_stragglers(now)
            self._deliver()

    def _strike(self, now: float) -> None:
        """Chaos: tell a member which fault to suffer next, when one of the random ones is due."""
        members = self.assembly.members
        if self._blow is None or now - self._struck < self._blow.after_s or self.assembly.broken or not members:
            return
        fault = self._blow.fault(self.assembly.logged, len(members))
        self._send(members[fault.member], {"op": "suffer", "fault": str(fault)})
        self._struck, self._blow = now, next(self._blows)

    def _deliver(self) -> None:
        """Write down what happened, then tell whom it concerns."""
        notes, self.assembly.notes = self.assembly.notes, []
        for note in notes:
            if note["event"] == "generation":
                self._write_journal()
            if note["event"] == "lost":
                self.verdict.loss()
            self.record(note)
        messages, self.assembly.out = self.assembly.out, []
        for uid, message in messages:
            self._send(uid, message)
        if notes:
            self._judge()
            if self.assembly.done and self.assembly.out:
                self._deliver()

    def _send(self, uid: str, message: dict[str, Any]) -> None:
        line = (self.beats if message["op"] == "replace" else self.lines).get(uid)
        if line is not None and not line.is_closing():
            line.write(pack(message))
        if message["op"] == "ejected" and uid in self.lines:
            self.lines.pop(uid).close()

    def record(self, note: Mapping[str, Any]) -> None:
        """Put an event down, for the run's file and for whoever asks for news."""
        facts = {key: value for key, value in note.items() if key != "event"}
        self.run.event(note["event"], **facts)
        self.news.append({"time": time.time(), **note})

    def _journal(self) -> dict[str, Any]:
        path = self.run.folder / "roster.json"
        if not path.exists():
            return {"generation": 0, "members": []}
        try:
            found = json.loads(path.read_text())
            return {"generation": int(found["generation"]), "members": [str(uid) for uid in found["members"]]}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(path, "the roster's journal", error, "Remove it if no training runs in this folder.") from None

    def _write_journal(self) -> None:
        with committed(self.run.folder / "roster.json") as temporary:
            temporary.write_text(json.dumps({"generation": self.assembly.generation, "members": self.assembly.members}))


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000)  # pyright: ignore[reportCallIssue]
class RosterActor:
    """The roster in a process of its own."""

    def __init__(self, config: TrainConfig):
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self.roster = Roster(config, ray.util.get_node_ip_address(), resume=bool(again))
        self.starting: asyncio.Task[Address] | None = None
        kind = "roster_restarted" if again else "roster"
        self.roster.record({"event": kind, "pid": os.getpid(), "generation": self.roster.assembly.generation})

    async def address(self) -> Address:
        """Where members find it; the first call makes it listen."""
        if self.starting is None:
            self.starting = asyncio.get_running_loop().create_task(self.roster.start())
        return await self.starting

    async def news(self, since: int) -> tuple[int, list[dict[str, Any]]]:
        """(pid, what happened since the first `since` news): numbers count within this process."""
        return os.getpid(), self.roster.news[since:]

    async def status(self) -> dict[str, Any]:
        """See `Roster.status`."""
        return self.roster.status()

    async def stop(self, why: str) -> None:
        """Have everybody commit and end."""
        self.roster.stop(why)

    async def close(self) -> None:
        """The log is on the disk and the run's lock free."""
        self.roster.close()

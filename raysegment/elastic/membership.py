"""A worker's membership: its line to the roster, its place in each generation, and the group it computes with.

    meet(…)     leave the old group, wait for a place, build the new group
    world       the group: rank, size, all-reduce; raises Interrupted as soon as the generation is broken
    at, record  what the roster hears of every step
    commit      ask the roster to publish a checkpoint

A lost line does not stop the group: a thread finds the roster again (Ray restarts it) while steps go on.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from raysegment.elastic import beat
from raysegment.elastic.group import Group, Setback, build_group
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.roster import Address
from raysegment.elastic.wire import MEMBER, connect, pack
from raysegment.learning.exchange import Interrupted

_log = logging.getLogger(__name__)
UNHEARD = "there is no roster, or it was lost before it answered"
_RECORDS = 256  # step lines kept for a roster that is away; after so many the member waits for it


class Over(Exception):
    """Training is over for everybody."""


class Lost(RuntimeError):
    """There has been no roster for longer than a member goes on without one."""


@dataclass(frozen=True)
class Generation:
    """A place in a generation: what the roster says when it appoints one."""

    generation: int
    rank: int
    size: int
    committed: int  # steps in the source's state
    logged: int
    source: int
    behind: tuple[int, ...]  # ranks that must be brought up to date
    store: tuple[str, int]
    keeps: bool  # whether this member keeps the state for its node

    @staticmethod
    def of(message: Mapping[str, Any]) -> Generation:
        """The roster's words as a place."""
        said: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in message.items()}
        del said["op"]
        return Generation(**said)


class Member:
    """This process as a member. `find` asks Ray for the roster's address, again after every loss."""

    def __init__(self, find: Callable[[], Address], uid: str, facts: Mapping[str, Any], ladder: Ladder, host: str, backend: str):
        self.uid, self.ladder, self.host, self.backend = uid, ladder, host, backend
        self._find, self._facts = find, dict(facts)
        timeout = datetime.timedelta(seconds=ladder.forming_s)
        self._store = TCPStore(host, 0, None, True, timeout, wait_for_workers=False)
        self.generation = 0  # the one this process has a place in, or had last
        self.pending = False  # somebody waits to be let in
        self.stopping = ""  # why everybody is asked to end
        self.over = False
        self.group: Group | None = None
        self.broken = threading.Event()
        self.records: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_RECORDS)
        self.faults: deque[str] = deque()  # chaos: what the roster has this member suffer
        self.logged = 0
        self.away_since: float | None = None
        self._change = threading.Condition()
        self._appointed: Generation | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._line: socket.socket | None = None
        self._sending = threading.Lock()
        self._wish: dict[str, Any] | None = None  # to be repeated on a new line: a seat that waits, waits there too
        self._heart = subprocess.Popen([sys.executable, str(Path(beat.__file__))], stdin=subprocess.PIPE)
        self._reconnect()
        threading.Thread(target=self._listen, name="roster", daemon=True).start()

    # ------------------------------------------------------------ the line

    @property
    def away(self) -> bool:
        """Whether there is no line to the roster now."""
        return self._line is None

    def _reconnect(self) -> None:
        """A line to the roster, wherever it is now."""
        address = self._find()
        holds = not self.broken.is_set()
        facts = {
            **self._facts,
            "generation": self.generation,
            "holds": holds,
            "store": [self.host, self._store.port],
            "pid": os.getpid(),
        }
        line = connect(
            (address.host, address.port), address.token, MEMBER, {"uid": self.uid, "facts": facts}, self.ladder.forming_s
        )
        self._tell_heart(address)
        with self._change:
            self._line, self.away_since = line, None
            if self._wish is not None:
                self._send(self._wish)
            self._change.notify_all()

    def _tell_heart(self, address: Address) -> None:
        ladder = self.ladder
        orders = {
            "address": [address.host, address.port], "token": address.token, "uid": self.uid, "beat_s": ladder.beat_s,
            "stopped_s": 3 * ladder.silence_s + ladder.return_s,  # after the roster would have said so
        }  # fmt: skip
        assert self._heart.stdin is not None
        with suppress(OSError):
            self._heart.stdin.write(pack(orders))
            self._heart.stdin.flush()

    def _listen(self) -> None:
        """Hear the roster, for ever; find it again when it is gone."""
        while not self.over:
            line = self._line
            if line is not None:
                with suppress(OSError, ValueError), line.makefile("rb") as lines:
                    for text in lines:
                        self._hear(json.loads(text))
                with self._change:
                    self._line, self.away_since = None, time.monotonic()
            self._seek()

    def _seek(self) -> None:
        while self._line is None and not self.over:
            try:
                self._reconnect()
            except Exception as error:  # it is being restarted, or the whole job is ending
                _log.debug("roster: %s", error)
                with self._change:
                    self._change.notify_all()
                time.sleep(self.ladder.beat_s)

    def _hear(self, message: dict[str, Any]) -> None:
        op = message["op"]
        with self._change:
            if op == "generation":
                self._take_place(Generation.of(message))
            elif (op == "broken" and message["generation"] == self.generation) or op == "ejected":
                self.broken.set()
            elif op == "suffer":
                self.faults.append(message["fault"])
            elif op == "pending":
                self.pending = True
            elif op == "stop":
                self.stopping = message["why"]
            elif op == "done":
                self.over = True
                self.broken.set()
            elif op == "welcome":
                self._welcomed(message)
            elif op == "committed":
                self._answers[message["step"]] = message
            self._change.notify_all()
        if self.group is not None and self.broken.is_set():
            self.group.wake()

    def _take_place(self, appointed: Generation) -> None:
        """Here and now, since the next message may already say that this generation is broken."""
        self._appointed, self._wish = appointed, None
        self.generation, self.pending, self.logged = appointed.generation, False, appointed.logged
        self.broken.clear()

    def _welcomed(self, message: dict[str, Any]) -> None:
        """A new line: does the roster still know the place this process has? Then it gets the step lines it has missed."""
        self.logged = message["logged"]
        if message["generation"] != self.generation and self._wish is None:
            self.broken.set()
        elif self.generation:
            self._send_records(self.logged)

    def _send(self, message: dict[str, Any]) -> bool:
        """False when the line is gone."""
        line = self._line
        if line is None:
            return False
        try:
            with self._sending:
                line.sendall(pack(message))
        except OSError:
            return False
        return True

    # ------------------------------------------------------------ generations

    def meet(self, committed: int, origin: str) -> Generation:
        """A place in the next generation and its group, with a state of `committed` steps from `origin` on offer.

        Raises Over when training is over, Lost when there has been no roster for too long.
        """
        while True:
            self.leave()
            appointed = self._await_place({"op": "ready", "committed": committed, "origin": origin})
            try:
                self.group = build_group(
                    appointed.rank, appointed.size, appointed.generation, self.store_of(appointed), self.host, self.backend,
                    self.broken, self.ladder,
                )  # fmt: skip
            except Setback as error:
                _log.info("generation %d: %s", appointed.generation, error)
                continue
            return appointed

    def leave(self) -> None:
        """Let the old group go."""
        if self.group is not None:
            self.group.close()
            self.group = None

    def _await_place(self, wish: dict[str, Any]) -> Generation:
        with self._change:
            self._appointed, self._wish = None, wish
            self._send(wish)
            while self._appointed is None:
                if self.over:
                    raise Over
                self._check_presence()
                self._change.wait(self.ladder.silence_s)
            return self._appointed

    def _check_presence(self) -> None:
        since = self.away_since
        if since is not None and time.monotonic() - since > self.ladder.absence_s:
            raise Lost(f"no roster for {self.ladder.absence_s:g} s")

    def store_of(self, appointed: Generation) -> TCPStore:
        """The store over which a generation's groups are made: that of its first member. Setback when that is gone."""
        if appointed.rank == 0:
            return self._store
        timeout = datetime.timedelta(seconds=self.ladder.forming_s)
        try:
            return TCPStore(appointed.store[0], appointed.store[1], None, False, timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise Setback(f"the first member's store does not answer: {error}") from None

    # ------------------------------------------------------------ what the roster hears

    def at(self, step: int, pace: Mapping[str, float]) -> None:
        """This member has done its part and waits for the others."""
        self._send({"op": "at", "generation": self.generation, "step": step, "pace": dict(pace)})

    def record(self, step: int, line: dict[str, Any], send: bool) -> None:
        """Keep a committed step's line, and send it if this member writes the log."""
        self.records.append((step, line))
        if send:
            self._send({"op": "record", "generation": self.generation, "step": step, "line": line})
        if self.away and len(self.records) == _RECORDS:
            self.wait_for_roster()  # nothing more can be remembered for it

    def wait_for_roster(self) -> None:
        """Until there is a line to it; Lost after too long."""
        with self._change:
            while self.away and not self.over:
                self._check_presence()
                self._change.wait(self.ladder.beat_s)

    def send_records(self) -> None:
        """The lines of steps that the log lacked when this generation began."""
        self._send_records(self.logged)

    def _send_records(self, first: int) -> None:
        for step, line in list(self.records):
            if step >= first:
                self._send({"op": "record", "generation": self.generation, "step": step, "line": line})

    def commit(self, draft: Any, seconds: float) -> str:
        """Have the roster publish a draft; "" when that is done, else why not: UNHEARD when the line was lost meanwhile."""
        message = {"op": "commit", "generation": self.generation, "draft": asdict(draft), "seconds": seconds}
        with self._change:
            self._answers.pop(draft.step, None)
            line = self._line
            if not self._send(message):
                return UNHEARD
            while draft.step not in self._answers:
                if self._line is not line:
                    return UNHEARD
                self._change.wait(self.ladder.beat_s)
            return self._answers.pop(draft.step)["why"]

    def failed(self, error: str, lasting: bool, bad_input: Any, trace: str) -> None:
        """Tell why this process cannot go on."""
        self._send({"op": "failed", "error": error, "lasting": lasting, "bad_input": bad_input, "trace": trace})

    def bye(self, why: str) -> None:
        """Take leave: "done" when training is."""
        self._send({"op": "bye", "why": why, "generation": self.generation})

    def wait_for_change(self, seconds: float) -> None:
        """Until the roster says something, or so long."""
        with self._change:
            self._change.wait(seconds)

    def wait_until_over(self) -> bool:
        """True once training is over, False when the generation was broken before that."""
        with self._change:
            while not self.over:
                if self.broken.is_set():
                    return False
                self._check_presence()
                self._change.wait(self.ladder.beat_s)
            return True

    def check(self) -> None:
        """Raise Interrupted when the generation is broken: to be asked where a lot is about to be computed."""
        if self.broken.is_set():
            raise Interrupted(f"generation {self.generation} is broken")

    def close(self) -> None:
        """End the threads and the heart."""
        self.over = True
        self.leave()
        with suppress(OSError):
            self._heart.kill()
            self._heart.wait()
        if self._line is not None:
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)

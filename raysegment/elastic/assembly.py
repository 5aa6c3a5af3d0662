"""Who is a member: the rules of membership, pure (no clock, no sockets), as a machine that hears and answers.

    seat      somebody connected; ready when it waits for a place in the next generation
    member    a seat with a rank in the current generation
    broken    a generation that has lost a member, or must let one in; its members stop at once and meet again

A generation is formed from all who are ready as soon as nobody is missing who still belongs to it. It goes on from the state
of one of them, the source: a member of the generation before it, of those the one with most steps committed; without any,
whoever brought most (from memory kept on its node, from a file). Everybody else whose state may differ is given the source's.
Numbers of generations only grow.

Whatever a member says costs the same however many there are; only what all must hear, or a meeting, costs once for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from raysegment.elastic.ladder import Ladder
from raysegment.elastic.paces import Pace, Straggler, find_stragglers

Message = dict[str, Any]


@dataclass
class Seat:
    """Somebody connected: who and where it is, what it has, when it was last heard."""

    uid: str
    facts: Mapping[str, Any]  # node, host, cell, pid, store: as the member says
    seen: float
    entered: float = 0.0
    ready: bool = False
    committed: int = 0  # steps in its state
    origin: str = "new"  # where its state is from: "new", "file", "kept", or "generation" (it was a member)
    lineage: int = 0  # the generation in which it was last a member
    mark: int = -1  # the step whose exchange it has reached in this generation
    marked: float = 0.0
    pace: Pace = field(default_factory=Pace)


@dataclass
class Assembly:
    """The machine. Calls tell it what happened and when; `out` collects (uid, message) to send, `notes` what to record.

    `least` and `most` members make a generation; the first one waits a moment for more than the least.
    """

    ladder: Ladder
    least: int = 1
    most: int = 1
    generation: int = 0
    logged: int = 0  # steps in the log
    members: list[str] = field(default_factory=list)  # of the current generation, by rank
    seats: dict[str, Seat] = field(default_factory=dict)
    broken: bool = True
    stopping: str = ""
    done: bool = False
    eject_stragglers: bool = False
    out: list[tuple[str, Message]] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    _broken_at: float = 0.0
    _arrived: float | None = None  # when the last of those who wait for a first generation arrived
    _gone: dict[str, float] = field(default_factory=dict)  # let go while their processes live, since when
    _waits: str = ""
    _parted: set[str] = field(default_factory=set)  # members that have left the broken generation, back or not
    _ranks: dict[str, int] = field(default_factory=dict)  # of `members`
    _heard: OrderedDict[str, None] = field(default_factory=OrderedDict)  # seats, those that were not heard for longest first
    _waiting: set[str] = field(default_factory=set)  # seats that are ready
    _staying: set[str] = field(default_factory=set)  # of a broken generation: members that belong to the next one …
    _unready: set[str] = field(default_factory=set)  # … and of them, those that it waits for
    _absent: set[str] = field(default_factory=set)  # members that have not yet come to a new arbiter
    _reported: float = 0.0  # when a member last said which step it has reached
    _resumed: float = 0.0
    _stopped: float = 0.0
    _appointed: bool = False  # whether this machine has ever appointed anybody

    def resume(self, generation: int, members: list[str], now: float) -> None:
        """Take up a generation that another arbiter appointed; its members have a moment to come back, then it is broken."""
        self.generation, self.broken, self._resumed, self._absent = generation, not members, now, set(members)
        self._enlist(members)

    def _enlist(self, members: list[str]) -> None:
        self.members, self._ranks = list(members), {uid: rank for rank, uid in enumerate(members)}

    # ------------------------------------------------------------ what members say

    def enter(self, uid: str, facts: Mapping[str, Any], now: float) -> None:
        """Somebody has connected; a member that had lost its connection keeps its place when it names the generation."""
        self._gone.pop(uid, None)
        seat = Seat(uid, facts, now, now, lineage=int(facts.get("generation", 0)))
        self.seats[uid] = seat
        self._absent.discard(uid)
        self._waiting.discard(uid)
        self._hear(uid, now)
        if self.broken and uid in self._ranks and uid not in self._parted:
            self._staying.add(uid)
            self._unready.add(uid)
        kept = bool(facts.get("holds")) and uid in self._ranks and seat.lineage == self.generation and not self.broken
        seat.marked = now
        self._send(uid, "welcome", logged=self.logged, generation=self.generation if kept else 0)
        if self.done:
            self._send(uid, "done")
        elif self.stopping:
            self._send(uid, "stop", why=self.stopping)

    def exit(self, uid: str, why: str, now: float) -> None:
        """A connection is gone, or a member takes its leave."""
        if self.seats.pop(uid, None) is None:
            return
        for group in (self._waiting, self._staying, self._unready):
            group.discard(uid)
        self._heard.pop(uid, None)
        if not self.done:
            rank = self._ranks.get(uid)
            self._note("lost", member=uid, rank=rank, why=why)
            if rank is not None:
                self._break(f"{uid}: {why}", now)
                self._parted.add(uid)
        self._form(now)

    def beat(self, uid: str, now: float) -> None:
        """A sign of life of a member's process."""
        if uid in self.seats:
            self._hear(uid, now)

    def _hear(self, uid: str, now: float) -> None:
        self.seats[uid].seen = now
        self._heard[uid] = None
        self._heard.move_to_end(uid)

    def ready(self, uid: str, committed: int, origin: str, now: float) -> None:
        """A seat waits for a place in the next generation, with a state of so many steps."""
        seat = self.seats.get(uid)
        if seat is None:
            return
        seat.ready, seat.committed, seat.origin, self._arrived = True, committed, origin, now
        self._waiting.add(uid)
        self._unready.discard(uid)
        self._hear(uid, now)
        if uid in self._ranks:
            self._break(f"{uid} asks for a new generation", now)
        elif not self.broken:
            for member in self.members:
                self._send(member, "pending")
        self._form(now)

    def reached(self, uid: str, generation: int, step: int, pace: Mapping[str, float], now: float) -> None:
        """A member has done its own part of a step and waits for the others; `pace` says what took its time."""
        seat = self.seats.get(uid)
        if seat is None or generation != self.generation or uid not in self._ranks:
            return
        seat.mark, seat.marked, self._reported = step, now, now
        self._hear(uid, now)
        if pace:
            seat.pace.add(pace)

    def is_current(self, uid: str, generation: int) -> bool:
        """Whether a member may still commit: it has a place in the generation it names, and that one is the newest."""
        return generation == self.generation and uid in self._ranks and uid in self.seats

    # ------------------------------------------------------------ what the fleet says

    def stop(self, why: str, now: float) -> None:
        """Everybody commits what there is and ends: a group of any size, and nobody is waited for for long."""
        if not self.stopping:
            self.stopping, self._stopped = why, now
            self._note("stop", why=why)
            for uid in self.seats:
                self._send(uid, "stop", why=why)

    def finish(self) -> None:
        """Training is done: nobody is waited for any more."""
        if not self.done:
            self.done = True
            for uid in self.seats:
                self._send(uid, "done")

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Whatever has become due: silence, lateness, those who do not come to a meeting or do not return."""
        if self.done:
            return
        for uid, why in list(self._overdue(now)):
            self._let_go(uid, why, now)
        if not self.broken and self._absent and now - self._resumed > self.ladder.meeting_s:
            missing = min(self._absent, key=self._ranks.__getitem__)
            self._note("lost", member=missing, rank=self._ranks[missing], why="did not come back to the new roster")
            self._break(f"{missing}: did not come back", now)
        for uid, since in list(self._gone.items()):
            if now - since > self.ladder.return_s:
                del self._gone[uid]
                self._note("replace", member=uid)
                self._send(uid, "replace")
        self._form(now)
        if self.stopping and not self.seats and now - self._stopped > self.ladder.meeting_s:
            self.finish()  # what there is to keep is in memory and in files

    def look_for_stragglers(self, now: float) -> None:
        """Name members that need more than three times as long as is usual, and let them go if that is wished."""
        paces = {uid: self.seats[uid].pace for uid in self.members if uid in self.seats}
        for found in find_stragglers(paces):
            self._name(found, now)

    def _name(self, found: Straggler, now: float) -> None:
        seat = self.seats[found.uid]
        rank, node = self._ranks[found.uid], seat.facts.get("node")
        shares = {"load_share": found.load_share, "compute_share": 1 - found.load_share}
        ejected = self.eject_stragglers and len(self.members) > self.least
        self._note(
            "straggler", member=found.uid, rank=rank, node=node, factor=found.factor, cause=found.cause, ejected=ejected, **shares
        )
        if ejected:
            self._let_go(found.uid, f"{found.factor:.1f} times slower than the median", now)
            self._gone.pop(found.uid, None)
            self._send(found.uid, "replace")

    def _overdue(self, now: float) -> Iterator[tuple[str, str]]:
        for uid in self._heard:
            silent_s = now - self.seats[uid].seen
            if silent_s <= self.ladder.silence_s:
                break  # and all that follow were heard later
            yield uid, f"silent for {silent_s:.1f} s"
        if self.broken:
            yield from self._missed(now)
        elif now - self._reported > self.ladder.lateness_s:
            yield from self._late(now)

    def _missed(self, now: float) -> Iterator[tuple[str, str]]:
        """Members that do not come to the meeting."""
        if not self._unready or now - self._broken_at <= self.ladder.meeting_s:
            return
        limit = self.ladder.meeting_s + 3 * self._usual_s()
        for uid in sorted(self._unready, key=self._ranks.__getitem__):
            since = max(self._broken_at, self.seats[uid].entered)
            if now - since > limit:
                yield uid, f"not at the meeting after {now - since:.1f} s"

    def _late(self, now: float) -> Iterator[tuple[str, str]]:
        """Members that all others have been waiting for too long."""
        living = [uid for uid in self.members if uid in self.seats]
        newest = max((self.seats[uid].mark for uid in living), default=-1)
        late = [uid for uid in living if self.seats[uid].mark < newest]
        if not late:
            return
        since = max(self.seats[uid].marked for uid in living if self.seats[uid].mark == newest)  # the others wait since then
        if now - since > max(self.ladder.lateness_s, 10 * self._usual_s()):
            for uid in late:
                yield uid, f"{now - since:.1f} s late at step {newest}"

    def _usual_s(self) -> float:
        """The usual seconds of a member's own part of a step, 0 as long as nobody has said."""
        times = [seat.pace.step_s for seat in self.seats.values() if seat.pace.count]
        return median(times) if times else 0.0

    # ------------------------------------------------------------ generations

    def _let_go(self, uid: str, why: str, now: float) -> None:
        """Go on without somebody who is connected; it may come back, as one who must be brought up to date."""
        self._send(uid, "ejected", why=why)
        self._gone[uid] = now
        self.exit(uid, why, now)

    def _break(self, why: str, now: float) -> None:
        if self.broken:
            return
        self.broken, self._broken_at = True, now
        # Who has left and is back comes as somebody new
        self._staying = {uid for uid in self.members if uid in self.seats and uid not in self._parted}
        self._unready = self._staying - self._waiting
        self._note("broken", generation=self.generation, why=why)
        for uid in self.members:
            self._send(uid, "broken", generation=self.generation)

    def _form(self, now: float) -> None:
        """The next generation, if the time has come."""
        if self.done or not self.broken or self._unready:
            return
        there = len(self._waiting)
        if there < (1 if self.stopping else self.least):
            if there or self._appointed:
                self._say_waiting(there)
            return
        fresh = not self._staying and there < self.most  # nobody is held up: a moment for those who start together
        if fresh and self._arrived is not None and now - self._arrived < self.ladder.silence_s:
            return
        self._appoint(sorted(self._staying, key=self._ranks.__getitem__) + sorted(self._waiting - self._staying))

    def _say_waiting(self, there: int) -> None:
        waits = f"{there} of at least {self.least} members are there"
        if waits != self._waits:
            self._waits = waits
            self._note("waits", why=waits, there=there, least=self.least)

    def _appoint(self, order: list[str]) -> None:
        source, behind = self._source(order)
        self.generation, self._waits = self.generation + 1, ""
        joined = [uid for uid in order if uid not in self._ranks]
        self._enlist(order)
        self.broken, self._appointed = False, True
        for group in (self._parted, self._waiting, self._staying, self._unready, self._absent):
            group.clear()
        top = self.seats[source]
        who = {key: [self.seats[uid].facts.get(key) for uid in order] for key in ("node", "cell", "pid")}
        self._note(
            "generation", generation=self.generation, members=order, committed=top.committed, origin=top.origin, source=source,
            brought_up=behind, joined=joined, repeated=max(0, self.logged - top.committed), **who,
        )  # fmt: skip
        nodes = [self.seats[uid].facts.get("node") for uid in order]
        keepers = {node: rank for rank, node in reversed(list(enumerate(nodes)))}  # the first of each node
        common = {
            "generation": self.generation, "size": len(order), "committed": top.committed, "logged": self.logged,
            "source": self._ranks[source], "behind": [self._ranks[uid] for uid in behind],
            "store": self.seats[order[0]].facts.get("store"),
        }  # fmt: skip
        for rank, uid in enumerate(order):
            seat = self.seats[uid]
            seat.ready, seat.lineage, seat.mark, seat.marked = False, self.generation, -1, seat.seen
            self._send(uid, "generation", rank=rank, keeps=keepers[nodes[rank]] == rank, **common)

    def _source(self, order: list[str]) -> tuple[str, list[str]]:
        """Whose state counts, and whose may differ from it."""
        seats = [self.seats[uid] for uid in order]
        heirs = [seat for seat in seats if seat.origin == "generation" and seat.lineage == self.generation and self.generation]
        source = max(heirs or seats, key=lambda seat: seat.committed)
        same = {seat.uid for seat in heirs if seat.committed == source.committed}
        if not heirs and source.origin == "new":
            same = set(order)  # everybody begins with the same weights
        return source.uid, [uid for uid in order if uid != source.uid and uid not in same]

    def _send(self, uid: str, op: str, **facts: Any) -> None:
        self.out.append((uid, {"op": op, **facts}))

    def _note(self, event: str, **facts: Any) -> None:
        self.notes.append({"event": event, **facts})

"""Faults injected on purpose: what happens to whom, when, once, and on record.

    kill      the process ends at once (SIGKILL)
    stop      it stands still (SIGSTOP), for ever or `for` seconds
    term      it is asked to end (SIGTERM), as when a job's time is over
    node      the node's raylet and everything below it ends at once
    slow      the member needs `factor` times as long, for `steps` steps or (0) to the end
    enospc    the next checkpoint meets a full disk
    roster    the roster's process ends
    driver    the process that drives the member's cell ends
    keeper    the states kept in the memory of the member's node are gone

`stop@step=200,member=2,for=3; node@step=300; seed=7,every=5s`: each fault waits for the member to come to step `step` or a
later one, at the place `at`; the random part is an endless sequence that the same seed repeats. A fault fires once in a run,
whatever restarts: a mark, a file that only one process can make, stands for it.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

OPTIONS: dict[str, tuple[str, ...]] = {  # what may be said of a fault besides step and member
    "kill": ("at",), "stop": ("at", "for"), "term": ("at",), "node": ("at",), "slow": ("factor", "steps"), "enospc": (),
    "roster": ("at",), "driver": ("at",), "keeper": ("at",),
}  # fmt: skip
KINDS = tuple(OPTIONS)
OWN = ("kill", "stop", "term", "node")  # what a process can do to itself
PLACES = ("step", "exchange", "commit", "checkpoint", "join", "validation")
_NAMES = {"for": "for_s", "every": "every_s"}  # keys of the text whose fields have other names
_EXAMPLE = "faults like kill@step=12,member=1 separated by `;`"
_RANDOM_DETAILS: dict[str, dict[str, float]] = {"slow": {"factor": 5.0, "steps": 20}}  # of faults that end some time


@dataclass(frozen=True)
class Fault:
    """`kind` happens to member `member` when it comes to step `step`; its text is canonical and can be parsed.

    `at`: "step" before the step is computed, "exchange" within it, between computing and exchanging; "commit" between two
    steps; "checkpoint" while state is written, "join" while a member is given the others' state, "validation" during one.
    """

    kind: str
    step: int
    member: int = 0
    at: str = "step"
    factor: float = 0.0
    steps: int = 0
    for_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a kind among {', '.join(KINDS)}, got {self.kind!r}")
        if self.at not in PLACES:
            raise ValueError(f"`at` among {', '.join(PLACES)}, got {self.at!r}")
        if min(self.step, self.member, self.steps) < 0 or not 0 <= self.for_s < math.inf:
            raise ValueError(f"no negative number, got {self._text()!r}")
        if (self.kind == "slow") != (self.factor != 0) or (self.factor and not 1 < self.factor < math.inf):
            raise ValueError(f"a factor above 1 for slow and for nothing else, got {self._text()!r}")
        for key in self._given():
            if key not in OPTIONS[self.kind]:
                raise ValueError(f"of {self.kind} {' and '.join(('step', 'member', *OPTIONS[self.kind]))}, got {key!r}")

    def _given(self) -> dict[str, str]:
        """The options that are not at their defaults, as text."""
        keys = {name: key for key, name in _NAMES.items()}
        options = [option for option in fields(self) if option.name not in ("kind", "step", "member")]
        values = {keys.get(option.name, option.name): (getattr(self, option.name), option.default) for option in options}
        return {key: _written(value) for key, (value, default) in values.items() if value != default}

    def _text(self) -> str:
        given = {"step": self.step, "member": self.member, **self._given()}
        return f"{self.kind}@" + ",".join(f"{key}={value}" for key, value in given.items())

    def __str__(self) -> str:
        return self._text()

    @property
    def mark(self) -> str:
        """Name of the file that says it has fired."""
        return str(self).replace("@", "-")


@dataclass(frozen=True)
class Blow:
    """One of the random faults: `after_s` seconds after the one before; `victim` in [0, 1) says who, of those there are."""

    after_s: float
    kind: str
    victim: float

    def member(self, members: int) -> int:
        """Whom it hits of so many members."""
        return int(self.victim * members)

    def fault(self, step: int, members: int) -> Fault:
        """The fault it is for a group that is at step `step`."""
        return Fault(self.kind, step, self.member(members), **_RANDOM_DETAILS.get(self.kind, {}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Random:
    """An endless sequence of blows, the same for the same seed: `every_s` seconds apart on average (half to one and a half)."""

    seed: int
    every_s: float
    kinds: tuple[str, ...] = ("kill", "stop", "node")

    def __post_init__(self) -> None:
        if self.seed < 0 or not 0 < self.every_s < math.inf:
            raise ValueError(f"a seed of 0 or more and `every` above 0 s, got {str(self)!r}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not {*self.kinds} <= {*KINDS}:
            raise ValueError(f"kinds, each once, among {', '.join(KINDS)}, got {'+'.join(self.kinds)!r}")

    def __str__(self) -> str:
        return f"seed={self.seed},every={_written(self.every_s)}s,kinds={'+'.join(self.kinds)}"

    def __iter__(self) -> Iterator[Blow]:
        draw = random.Random(self.seed).random
        while True:
            yield Blow(self.every_s * (0.5 + draw()), self.kinds[int(draw() * len(self.kinds))], draw())


@dataclass(frozen=True)
class Plan:
    """All faults of a run: those with a place, and the random ones."""

    faults: tuple[Fault, ...] = ()
    random: Random | None = None

    def __post_init__(self) -> None:
        twice = [fault for fault in set(self.faults) if self.faults.count(fault) > 1]
        if twice:
            raise ValueError(f"chaos: expected {_EXAMPLE}, each once, got {str(twice[0])!r} twice")

    @staticmethod
    def parse(text: str) -> Plan:
        """`"kill@step=12,member=1; seed=7,every=5s"` → the plan; ValueError where it cannot be read."""
        parts = [part.strip() for part in text.split(";") if part.strip()]
        chance = [part for part in parts if "@" not in part and part.startswith(("seed", "every", "kinds"))]
        if len(chance) > 1:
            raise ValueError(f"chaos: expected one random part, got {'; '.join(chance)!r}")
        faults = tuple(_fault(part) for part in parts if part not in chance)
        return Plan(faults, _random(chance[0]) if chance else None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the random faults."""
        return self.random.kinds if self.random else ()

    def __str__(self) -> str:
        return "; ".join(str(part) for part in (*self.faults, self.random) if part is not None)

    def due(self, step: int, member: int, at: str = "step") -> list[Fault]:
        """The faults whose time has come (or has been: see `claim`) for a member that is at a step and a place."""
        return [fault for fault in self.faults if (fault.member, fault.at) == (member, at) and fault.step <= step]

    def fire(self, step: int, member: int, folder: Path, record: Callable[[Fault], None], at: str = "step") -> list[Fault]:
        """Let happen to this process what is due, and return what is due but for others to do; all of it claimed.

        The end of a node that must not end (see `kill_node`) is neither: it counts as a fault that has not fired.
        """
        possible = [fault for fault in self.due(step, member, at) if fault.kind != "node" or mortal_raylet(os.getpid())]
        claimed = [fault for fault in possible if claim(folder, fault)]
        for fault in claimed:
            record(fault)
            strike(fault)
        return [fault for fault in claimed if fault.kind not in OWN]


@dataclass
class Injector:
    """A member's faults as it goes through a run: like `Plan.fire`, without a look at the folder for what is long done."""

    plan: Plan
    folder: Path
    record: Callable[[Fault], None]
    _done: set[Fault] = field(default_factory=set)

    def fire(self, step: int, member: int, at: str = "step") -> list[Fault]:
        """Let happen to this process what is due here; what is due but for others to do (slow, enospc, …) is returned."""
        due = [fault for fault in self.plan.due(step, member, at) if fault not in self._done]
        self._done.update(due)
        return Plan(tuple(due)).fire(step, member, self.folder, self.record, at) if due else []

    def suffer(self, text: str) -> list[Fault]:
        """The same for faults that somebody else has chosen for this process: here and now."""
        plan = Plan.parse(text)
        return [left for fault in plan.faults for left in plan.fire(fault.step, fault.member, self.folder, self.record)]


# ---------------------------------------------------------------- marks


def claim(folder: Path, fault: Fault) -> bool:
    """True once in a run: for the process that makes the fault's mark in `folder`, and for no other ever after."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(folder / fault.mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.close(file)
    return True


def unfired(folder: Path, plan: Plan) -> list[Fault]:
    """The faults of a plan that have left no mark."""
    return [fault for fault in plan.faults if not (folder / fault.mark).exists()]


# ---------------------------------------------------------------- deeds


def strike(fault: Fault, pid: int | None = None) -> None:
    """Do to a process (this one) what a fault of one of the kinds in `OWN` says; nothing for the others."""
    pid = os.getpid() if pid is None else pid
    if fault.kind == "stop" and fault.for_s:
        continue_later(pid, fault.for_s)
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
    if fault.kind in signals:
        os.kill(pid, signals[fault.kind])
    if fault.kind == "node":
        kill_node(pid)


def continue_later(pid: int, seconds: float) -> subprocess.Popen[bytes]:
    """Have a process continued after some seconds by another one, since it cannot do so itself."""
    return subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {pid}"], start_new_session=True)


def kill_node(pid: int | None = None) -> bool:
    """End a process's (this one's) Ray node as a power cut would: raylet first, whatever is below it, this process last.

    False, and nothing is done, for a process of no node, or of the session's head node, with which the session would end.
    """
    raylet = mortal_raylet(os.getpid() if pid is None else pid)
    if raylet is None:
        return False
    victims = [raylet, *descendants(raylet)]  # all known before the first dies: orphans have lost their parent
    for victim in sorted(victims, key=lambda victim: victim == os.getpid()):
        end(victim)
    return True


def mortal_raylet(pid: int) -> int | None:
    """The raylet above a process, unless it is that of its session's head node.

    Ray starts that one with `--head`, also where several nodes share a machine and an address.
    """
    raylet = find_raylet(pid)
    return None if raylet is None or "--head" in command(raylet) else raylet


def end(pid: int) -> None:
    """SIGKILL a process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def find_raylet(pid: int) -> int | None:
    """The raylet among a process and those above it."""
    above = parents()
    while pid > 1:
        if _name(pid) == "raylet":
            return pid
        pid = above.get(pid, 0)
    return None


def descendants(pid: int) -> list[int]:
    """All processes below one, nearest first."""
    children = defaultdict(list)
    for child, parent in parents().items():
        children[parent].append(child)
    found = list(children[pid])
    for child in found:  # grows as it goes
        found += children[child]
    return found


def parents() -> dict[int, int]:
    """Every process of this machine that can be seen, with its parent."""
    found = ((int(entry.name), _status(entry)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid: int(status["PPid"]) for pid, status in found if "PPid" in status}


def command(pid: int) -> list[str]:
    """The words a process was started with; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _name(pid: int) -> str:
    return _status(Path(f"/proc/{pid}")).get("Name", "")


def _status(process: Path) -> dict[str, str]:
    try:
        lines = (process / "status").read_text(errors="replace").splitlines()
    except OSError:  # it has ended since it was listed
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


# ---------------------------------------------------------------- grammar


def _fault(text: str) -> Fault:
    kind, at, rest = text.partition("@")
    try:
        if not at:
            raise ValueError(f"kind@step=NUMBER, got {text!r}")
        given = _options(rest, {"step": int, "member": int, "at": str, "factor": float, "steps": int, "for": _seconds})
        if "step" not in given:
            raise ValueError(f"a step, got {rest!r}")
        return Fault(kind.strip(), **given)
    except ValueError as error:
        raise ValueError(f"chaos: expected {_EXAMPLE}; expected {error} in {text!r}") from None


def _random(text: str) -> Random:
    try:
        given = _options(text, {"seed": int, "every": _seconds, "kinds": _kinds})
        if not {"seed", "every_s"} <= {*given}:
            raise ValueError(f"seed and every, got {text!r}")
        return Random(**given)
    except ValueError as error:
        raise ValueError(f"chaos: expected random faults like seed=7,every=5s; expected {error} in {text!r}") from None


def _options(text: str, readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """`key=value,key=value` as arguments, each value read by its key's reader."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        name = _NAMES.get(key, key)
        if not equals or key not in readers or name in found:
            raise ValueError(f"key=value, each key once, of {', '.join(readers)}, got {part.strip()!r}")
        found[name] = _read(key, value, readers[key])
    return found


def _read(key: str, value: str, reader: Callable[[str], Any]) -> Any:
    try:
        return reader(value)
    except ValueError:
        raise ValueError(f"a number as `{key}`, got {value!r}") from None


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def _kinds(text: str) -> tuple[str, ...]:
    return tuple(kind.strip() for kind in text.split("+"))


def _written(value: object) -> str:
    """A value as the grammar has it: whole numbers without a point."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)

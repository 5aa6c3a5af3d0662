"""`scale control`: what roster, keepers and planning of streams cost, measured with more and more light members.

The roster is training's own, over its own wire; members are those of `elastic.light`. For each number of members and each
round (upwards and downwards in turn, so that a machine that gets busier does not look like a cost per member):

    all come  →  silence  →  heartbeats  →  steps  →  one is lost  →  one comes  →  all plan their tiles  →  all go
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysegment.applications.scaling import control
from raysegment.applications.scaling.control import LOOK_S, ControlPlane
from raysegment.applications.scaling.pictures import draw_control
from raysegment.climate.checks import BadInput
from raysegment.elastic.keeper import Keeper, newest
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.light import Address, Host, Plan, dealt, facts_of
from raysegment.elastic.paces import STEPS, Pace, find_stragglers
from raysegment.elastic.roster import Roster
from raysegment.elastic.settings import ElasticConfig, TrainConfig
from raysegment.feed import placement
from raysegment.feed.session import ensure_ray

Progress = Callable[..., None]
Rounds = dict[str, list[tuple[float, float]]]  # of each cost: (members, seconds)
_SHARDS = 1000  # to be placed on nodes: DeepCAM's tiles, 121 to a shard
_SPARE_GIB = 1.5  # of memory, without which no larger number is tried
_CALM, _LOOK_CPU_S = 0.5, 0.1  # a roster that takes less of a processor than that has heard everything
_STEPS = 10


@dataclass(frozen=True)
class ControlConfig:
    """`members` "2:512": 2, 4, 8, … 512, in `rounds` rounds each, dealt to at most `processes` actors, `per_node` on a node.

    `patience_s` is the roster's; members beat every `beat_s`; `window_s` is how long each state is watched, `step_s` how long
    steps take. Keepers keep states of `state_kib`. `beyond`: then twice as many each time, one round, until something
    stops it or it takes longer than `limit_s`.
    """

    members: str = "2:512"
    rounds: int = 3
    processes: int = 8
    per_node: int = 4
    patience_s: float = 10.0
    beat_s: float = 0.25
    window_s: float = 1.0
    step_s: float = 0.1
    state_kib: int = 64
    beyond: bool = True
    limit_s: float = 60.0

    def __post_init__(self) -> None:
        if len(self.sizes) < 2:
            raise ValueError(f"members: expected FROM:TO like 2:512, at least 2 and at least twice as many, got {self.members!r}")
        if min(self.rounds, self.processes, self.per_node, self.state_kib) < 1:
            raise ValueError(f"expected at least 1 of rounds, processes, per_node and state_kib, got {self}")
        if min(self.beat_s, self.window_s, self.step_s, self.limit_s) <= 0:
            raise ValueError(f"expected beat_s, window_s, step_s and limit_s above 0, got {self}")
        Ladder(self.patience_s)

    @property
    def sizes(self) -> list[int]:
        """Numbers of members, doubling; empty where `members` does not say."""
        least, _, most = self.members.partition(":")
        if not (least.isdigit() and most.isdigit()) or int(least) < 2:
            return []
        found = [int(least)]
        while found[-1] * 2 <= int(most):
            found.append(found[-1] * 2)
        return found


def scale_control(
    config: ControlConfig, out: Path, pictures: Path | None = None, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Measure, write the control plane into `out`; slopes with intervals, the largest number, what stopped a larger one.

    With `pictures`, a folder: the costs against the number of members.
    """
    ensure_ray()
    rounds: Rounds = defaultdict(list)
    order = [size for number in range(config.rounds) for size in config.sizes[:: -1 if number % 2 else 1]]
    load, total = os.getloadavg()[0], len(order) + 1
    with TemporaryDirectory(prefix="raysegment-control-") as folder:
        hosts = Hosts(config)
        try:
            for done, size in enumerate(order):
                progress(done, total, f"{size} members")
                _add(rounds, size, hosts.round(size, Path(folder)))
            progress(total - 1, total, "more members")
            largest, stopped = _beyond(config, hosts, Path(folder), rounds)
            about = hosts.about()
        finally:
            hosts.close()
    sizes = [*config.sizes, *(size for size in (2 * config.sizes[-1], 4 * config.sizes[-1]) if size <= largest)]
    _planning(config, sizes, rounds)
    _keeping(config, sizes, rounds)
    progress(total, total)
    plane = ControlPlane(
        {name: control.cost_of(name, rounds[name]) for name in control.COSTS if name in rounds}, largest, config.patience_s,
        f"{datetime.date.today().isoformat()} on {os.cpu_count()} cores ({_processor()}), load {load:.1f} before",
    )  # fmt: skip
    control.write(plane, out)
    drawn = draw_control(plane, pictures) if pictures is not None else []
    return {**_result(config, plane, out, stopped, about, load), "pictures": drawn}


def _result(
    config: ControlConfig, plane: ControlPlane, out: Path, stopped: str, about: dict[str, Any], load: float
) -> dict[str, Any]:
    return {
        "control": str(out), "members": config.sizes, "largest": plane.largest, "stopped": stopped, "load": load,
        "costs": {name: control.summary(cost) for name, cost in plane.costs.items()},
        "idle_share_at_largest": plane.idle_share(plane.largest),
        "most_at_steps_of_1_s": plane.most(1.0), "processes": about, "measured": plane.measured,
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[list[Any]]:
    """Rows of a table: cost, fixed, per member with its interval, with so many members, the square's share there."""
    return [_line(cost) for cost in found["costs"].values()]


def _line(cost: dict[str, Any]) -> list[Any]:
    each = f"{_time(cost['per_member_s'])} ({_time(cost['low'])} … {_time(cost['high'])})"
    square = f"{100 * cost['squared_share']:.0f} % ({100 * cost['squared_share_low']:.0f} …)"
    return [cost["what"], _time(cost["fixed_s"]), each, f"{_time(cost['at_largest_s'])} ({cost['largest']})", square]


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.2g} ns" if seconds >= 1e-9 else "0"


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def _add(rounds: Rounds, size: int, found: dict[str, float]) -> None:
    for name, seconds in found.items():
        rounds[name].append((size, max(0.0, seconds)))


# ---------------------------------------------------------------- as many as run here


def _beyond(config: ControlConfig, hosts: Hosts, folder: Path, rounds: Rounds) -> tuple[int, str]:
    """The largest number of members that worked, and what stopped a larger one: doubled, at last half-way up."""
    largest = config.sizes[-1]
    if not config.beyond:
        return largest, "not tried (beyond=false)"
    while not (stopped := _stops(config, hosts, folder, rounds, 2 * largest)):
        largest *= 2
    half = _stops(config, hosts, folder, rounds, 3 * largest // 2)
    return (largest, half) if half else (3 * largest // 2, stopped)


def _stops(config: ControlConfig, hosts: Hosts, folder: Path, rounds: Rounds, size: int) -> str:
    """Why so many members do not work, or nothing; what was measured is added."""
    if (free := _free_gib()) < _SPARE_GIB:
        return f"{size} members: {free:.1f} GiB of memory are left"
    started = time.monotonic()
    try:
        found = hosts.round(size, folder)
    except (RuntimeError, RayError, OSError) as error:
        hosts.restart()
        return f"{size} members: {_cause(error)}"
    took_s = time.monotonic() - started
    if took_s > 3 * config.limit_s:
        return f"{size} members: a round took {took_s:.0f} s"
    _add(rounds, size, found)
    return ""


def _cause(error: BaseException) -> str:
    while isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


# ---------------------------------------------------------------- members and their roster


class _RosterHost:
    """Rosters, one after the other, in one process: what `elastic.roster.RosterActor` is for one of them, and a clock."""

    async def open(self, config: TrainConfig) -> Any:
        """A new one's address."""
        self.roster = Roster(config, ray.util.get_node_ip_address())
        return await self.roster.start()

    async def close(self) -> None:
        """It ends."""
        self.roster.assembly.finish()
        self.roster.close()

    async def status(self) -> dict[str, Any]:
        """See `Roster.status`."""
        return self.roster.status()

    async def clock(self) -> tuple[float, float]:
        """Monotonic seconds, and seconds that this process has used of processors."""
        return time.monotonic(), time.process_time()


RosterHost: Any = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=100)(_RosterHost)  # pyright: ignore[reportCallIssue]


class Hosts:
    """The actors that hold light members, and the one that holds their roster."""

    def __init__(self, config: ControlConfig):
        self.config = config
        # As the fleet does: roster and command on one node, whose clock all of them read
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._hosts: list[Any] = []
        self._start()

    def _start(self) -> None:
        started = time.monotonic()
        beat_ladder = self.config.patience_s, self.config.beat_s
        self._hosts = [Host.options(scheduling_strategy=self._here).remote(*beat_ladder) for _ in range(self.config.processes)]
        self.roster = RosterHost.options(scheduling_strategy=self._here).remote()
        self._told = ray.get([host.about.remote() for host in self._hosts], timeout=self.config.limit_s * 2)
        self.start_s = time.monotonic() - started

    def about(self) -> dict[str, Any]:
        """How many processes, seconds until they were there, MiB of the largest, whether any has imported torch."""
        told = ray.get([host.about.remote() for host in self._hosts])
        return {"count": len(told), "start_s": self.start_s, "most_mib": max(one["mib"] for one in told),
                "torch": any(one["torch"] for one in told)}  # fmt: skip

    def restart(self) -> None:
        """New, empty ones."""
        self.close()
        self._start()

    def close(self) -> None:
        for host in (*self._hosts, self.roster):
            ray.kill(host)
        self._hosts = []

    def call(self, method: str, *arguments: Any, timeout_s: float = 0.0) -> list[Any]:
        """What each of them answers."""
        calls = [getattr(host, method).remote(*arguments) for host in self._hosts]
        return ray.get(calls, timeout=timeout_s or 2 * self.config.limit_s)

    def round(self, size: int, folder: Path) -> dict[str, float]:
        """The costs of one round with so many members and a roster of their own."""
        address: Any = ray.get(self.roster.open.remote(_training(self.config, size, folder)), timeout=self.config.limit_s)
        try:
            return Round(self, self.roster, Address(address.host, address.port, address.token), size).run()
        finally:
            ray.get(self.roster.close.remote(), timeout=self.config.limit_s)

    def send(self, address: Address, who: Sequence[dict[str, dict[str, Any]]]) -> None:
        """Members come, each into its process."""
        ray.get([host.enter.remote(address, part) for host, part in zip(self._hosts, who, strict=True) if part],
                timeout=2 * self.config.limit_s)  # fmt: skip

    def one(self, number: int, method: str, *arguments: Any) -> Any:
        """What the process of the member so numbered answers."""
        return ray.get(getattr(self._hosts[number % len(self._hosts)], method).remote(*arguments), timeout=self.config.limit_s)

    def await_generation(self, number: int, size: int) -> tuple[int, float]:
        """(generation, when the last member heard of it)."""
        said = self.call("await_generation", number, size, self.config.limit_s)
        return max(generation for generation, _ in said), max(heard for _, heard in said)


def _training(config: ControlConfig, size: int, folder: Path) -> TrainConfig:
    """A run that goes on with one member less than it may have, and is never given up."""
    elastic = ElasticConfig(cells=(max(1, size - 1), size), workers_per_cell=1, patience_s=config.patience_s)
    out = folder / f"with-{size}-{time.monotonic_ns()}"
    out.mkdir()
    return TrainConfig(out=str(out), elastic=elastic, max_fruitless=1 << 40)


@dataclass(frozen=True)
class Usage:
    """Seconds, of them the roster's processor's, and heartbeats that were sent: so far, or over a time."""

    time_s: float
    used_s: float
    beats: int

    def since(self, before: Usage) -> Usage:
        return Usage(self.time_s - before.time_s, self.used_s - before.used_s, self.beats - before.beats)

    @property
    def share(self) -> float:
        """Of a processor."""
        return self.used_s / self.time_s


@dataclass
class Round:
    """One round of one number of members."""

    hosts: Hosts
    roster: Any
    address: Address
    size: int

    def __post_init__(self) -> None:
        self.config, self.found = self.hosts.config, dict[str, float]()
        status = self._status()
        self.generation, self.logged = status["generation"], status["logged"]

    def run(self) -> dict[str, float]:
        """Seconds of each cost."""
        self._join()
        self._watch()
        self._lose_and_grow()
        planned = sorted(seconds for host in self.hosts.call("plan", Plan(), self.logged) for seconds in host)
        self.found["plan_s"] = planned[len(planned) // 2]
        self.hosts.call("beat", False)
        self.hosts.call("leave")
        self._wait(lambda: not self._status()["seats"], "all members to be gone")
        return self.found

    def _join(self) -> None:
        who = dealt(range(self.size), self.config.processes, self.config.per_node)
        self.hosts.call("beat", True)
        before, started = self._clock(), time.monotonic()
        self.hosts.send(self.address, who)
        self._take("join", started, before, self.size)

    def _take(self, name: str, started: float, before: Usage, size: int) -> None:
        """Wait for the next generation; what it took."""
        self.generation, heard = self.hosts.await_generation(self.generation + 1, size)
        self.found[f"{name}_s"], self.found[f"{name}_cpu_s"] = heard - started, self._clock().since(before).used_s

    def _watch(self) -> None:
        """The roster's processor: while members are silent, while they beat, while they do steps."""
        self.hosts.call("beat", False)
        silent = self._while(lambda: time.sleep(self.config.window_s))
        self.hosts.call("beat", True)
        beating = self._while(lambda: time.sleep(self.config.window_s))
        beat_s = max(0.0, beating.used_s - silent.share * beating.time_s) / max(1, beating.beats)
        stepping = self._while(self._steps)
        self.found["look_cpu_s"] = silent.share * LOOK_S
        self.found["beat_cpu_s"] = beat_s * self.size
        self.found["step_cpu_s"] = (stepping.used_s - silent.share * stepping.time_s - beat_s * stepping.beats) / _STEPS

    def _steps(self) -> None:
        """So many steps, until the roster has heard of all."""
        first, self.logged = self.logged, self.logged + _STEPS
        self.hosts.call("steps", first, self.logged, time.monotonic() + 0.05, self.config.step_s)
        self._wait(lambda: self._status()["logged"] >= self.logged, "steps to be logged")
        self._drain()

    def _while(self, what: Callable[[], None]) -> Usage:
        """What the roster uses meanwhile, begun when it has heard everything."""
        self._drain()
        before = self._clock()
        what()
        return self._clock().since(before)

    def _drain(self) -> None:
        """Until the roster has heard what was said; RuntimeError when it cannot follow."""
        deadline = time.monotonic() + self.config.limit_s
        while True:
            before = self._clock()
            time.sleep(_LOOK_CPU_S)
            if self._clock().since(before).share < _CALM:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"the roster is busy with {self.size} members for more than {self.config.limit_s:g} s")

    def _lose_and_grow(self) -> None:
        lost = self.size // 2
        before = self._clock()
        at = self.hosts.one(lost, "lose", f"{lost:05d}")
        self._take("loss", at, before, self.size - 1)
        before, started = self._clock(), time.monotonic()
        self.hosts.one(lost, "enter", self.address, {f"{lost:05d}+": facts_of(lost, self.config.per_node)})
        self._take("grow", started, before, self.size)

    def _clock(self) -> Usage:
        time_s, used_s = ray.get(self.roster.clock.remote(), timeout=self.config.limit_s)
        return Usage(time_s, used_s, sum(self.hosts.call("beats")))

    def _status(self) -> dict[str, Any]:
        return ray.get(self.roster.status.remote(), timeout=self.config.limit_s)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.config.limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {self.config.limit_s:g} s for {what}")
            time.sleep(0.01)


# ---------------------------------------------------------------- planning, keeping


def _planning(config: ControlConfig, sizes: Sequence[int], rounds: Rounds) -> None:
    """Shards are placed on the members' nodes, none of which holds any yet; the roster looks for stragglers."""
    shards, each = [f"part-{number:05d}.arrow" for number in range(_SHARDS)], [1 << 30] * _SHARDS
    for size in sizes:
        nodes = [f"n{number}" for number in range(-(-size // config.per_node))]
        steps = [{"load_s": 0.0, "compute_s": 1 + member / (10 * size), "micro_batches": 1} for member in range(size)]
        paces = {f"{member}": _pace(step) for member, step in enumerate(steps)}
        for _ in range(config.rounds):
            started = time.perf_counter()
            placement.plan(placement.wanted(shards, nodes, 1), {node: frozenset() for node in nodes}, each)
            placed = time.perf_counter()
            found = list(find_stragglers(paces))
            rounds["straggler_cpu_s"].append((size, time.perf_counter() - placed))
            rounds["placement_s"].append((size, placed - started))
            assert not found


def _pace(step: dict[str, float]) -> Pace:
    """A member's who has needed the same for as many steps as are remembered."""
    pace = Pace()
    for _ in range(STEPS):
        pace.add(step)
    return pace


def _keeping(config: ControlConfig, sizes: Sequence[int], rounds: Rounds) -> None:
    """A keeper for each member's node; all keep one after the other, then one looks for the newest of what is kept."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(prefix="raysegment-control-", dir=memory if memory.is_dir() else None) as folder:
        for size in sizes:
            keepers = [Keeper(folder, f"run-{size}", f"n{number}") for number in range(size)]
            if off := next((keeper.off for keeper in keepers if keeper.off), ""):
                raise BadInput(folder, "a folder of memory", off, "Ask for fewer members, or state_kib=8.")
            state = {"weights": torch.zeros(config.state_kib << 8)}
            for number in range(config.rounds):
                kept_s = [keeper.keep(number, state, {"records": []}) for keeper in keepers]
                rounds["keep_s"].append((size, fmean(kept_s)))
                started = time.perf_counter()
                kept = newest(folder, f"run-{size}")
                rounds["find_s"].append((size, time.perf_counter() - started))
                assert kept is not None
                assert kept.step == number, (kept.step, number)

"""`chaos`: a small training job under strikes, against the same job left alone, on a cluster of fake nodes on this machine.

    reference   the job in one undisturbed worker; its final state is what every other run must end with, bit for bit
    rounds      the job in as many cells as it may have, hurt from outside (`strikes`); when it is finished and there are
                strikes left, or time, it begins again in a new folder
    vanilla     the same kind of job on plain Ray Train (`vanilla`), for comparison

A counted strike waits until the one before has been felt and all members are there again; with `minutes`, strikes come
when their time has come, those that break a generation as long as two members are there. Nothing is ever helped: a run
that makes no step for `patience_s` is a failure.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raysegment.applications.fake_cluster import FakeCluster, fake_cluster
from raysegment.applications.strikes import GENTLE, KINDS, Job, Striker, mixture, sequence
from raysegment.applications.strikes_account import Effect, account, effect
from raysegment.applications.vanilla import VanillaConfig, vanilla
from raysegment.archive.files import committed
from raysegment.archive.manifest import Manifest
from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import Run, jsonable, read_lines
from raysegment.elastic.settings import TrainConfig

Say = Callable[[str], None]
_LOOK_EVERY_S = 0.02
_STEPS_BETWEEN = 5  # a counted strike comes at least so many steps after everybody is there
_LAST_SHARE = 0.85  # and none after this share of the job: its effect would not be seen
_INSIDE = "slow+enospc"  # faults that only a member can do to itself, added to a mixture


@dataclass(frozen=True)
class ChaosConfig:
    """How many strikes of which kind (`counts`), or for how many `minutes` a mixture, one every `every_s` on average.

    `seed` repeats their order. `patience_s` bounds how long a run may make no step. `vanilla`: also measure plain Ray Train.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    minutes: float = 0.0
    every_s: float = 3.0
    seed: int = 0
    patience_s: float = 180.0
    vanilla: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", {kind: number for kind, number in self.counts.items() if number})
        strange = sorted({*self.counts} - {*KINDS})
        if strange or any(number < 0 for number in self.counts.values()):
            raise ValueError(f"faults: expected numbers of {', '.join(KINDS)}, got {dict(self.counts)}")
        if bool(self.counts) == bool(self.minutes) or self.minutes < 0:
            raise ValueError("expected either numbers of faults (--kills, --nodes, --faults) or --minutes above 0")
        if self.every_s <= 0 or self.patience_s <= 0 or self.seed < 0:
            raise ValueError(f"expected every_s and patience_s above 0 and a seed of 0 or more, got {self}")


def chaos(config: TrainConfig, settings: ChaosConfig, folder: Path, say: Say = print) -> dict[str, Any]:
    """Run all of it in `folder` (new or empty); the report, which report.json and report.md there have, too.

    `faults` injected and `fired`; `recovery_s`, `join_s`, `steps_lost_max`, `kinds`: see `strikes_account`; `state_equal`: every
    run ended with the reference's bits; `tiles_repeated`, `tiles_missing`, `steps_repeated` over all runs; `vanilla_recovery_s`
    of plain Ray Train with its defaults, details in `vanilla`. Raises BadInput; RuntimeError when a run ends otherwise.
    """
    config = _checked(config, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise BadInput(folder, "a new or empty folder", "one with files", "Choose another one with --out.")
    with fake_cluster(config.elastic.cells[1], math.ceil(config.workers_per_cell * config.cpus_per_worker)) as cluster:
        campaign = Campaign(cluster, config, settings, folder.absolute(), say)
        campaign.run()
    plain = vanilla(config, _vanilla_settings(config), folder / "vanilla") if settings.vanilla else {}
    report = campaign.report() | _compared(plain)
    report = jsonable({**report, "kept": _kept(report)})
    with committed(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with committed(folder / "report.md") as temporary:
        temporary.write_text("\n".join(lines(report)) + "\n")
    return report


def _checked(config: TrainConfig, settings: ChaosConfig) -> TrainConfig:
    if not config.shards:
        raise BadInput("shards", "the folder of a shard set", "nothing", "Write shards=DIR; `raysegment stage` makes one.")
    if "driver" in settings.counts and config.elastic.cells[1] == 1:
        raise BadInput("--faults", "no `driver` where there is one cell", settings.counts, "Set elastic.cells to [1, 3].")
    config.resolved(Manifest.load(config.shards))
    return replace(config, shards=Place.of(config.shards).text)


@dataclass
class Campaign:
    """Reference and rounds."""

    cluster: FakeCluster
    config: TrainConfig
    settings: ChaosConfig
    folder: Path
    say: Say
    effects: list[Effect] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0

    def run(self) -> None:
        """The reference, then rounds until nothing is left to do."""
        alone = replace(self.config.elastic, cells=(1, 1), workers_per_cell=0)
        self.reference = self._finish(replace(self.config, elastic=alone, workers=1, chaos="", out=f"{self.folder}/reference"))
        self.say(f"reference: {self.reference['steps']} steps, {self.reference['seconds']:.1f} s")
        self.started = time.monotonic()
        kinds = Kinds(self.settings, self.config.elastic.cells[1], self.started)
        while kinds or not self.summaries:
            self._round(len(self.summaries), kinds)

    def _finish(self, config: TrainConfig) -> dict[str, Any]:
        """Train without strikes."""
        job = Job(config, self.cluster.address)
        try:
            watch = Watch(job, Striker(self.cluster, job, -1, random.Random()), self.settings.patience_s)
            while watch.goes_on():
                time.sleep(_LOOK_EVERY_S)
        finally:
            job.end()
        return _summary(job)

    def _round(self, number: int, kinds: Kinds) -> None:
        """One run of the job, struck as long as it lasts."""
        inside = f"; seed={self.settings.seed + number},every=6s,kinds={_INSIDE}" if self.settings.minutes else ""
        chaos_text = (self.config.chaos + inside).removeprefix("; ")
        job = Job(replace(self.config, chaos=chaos_text, out=f"{self.folder}/round-{number:03d}"), self.cluster.address)
        striker = Striker(self.cluster, job, number, random.Random(f"{self.settings.seed}-{number}"))
        try:
            self._hurt(job, striker, kinds)
        finally:
            job.end()
            self.effects += self._told(striker)
        summary = _summary(job)
        self.summaries.append(summary)
        if kinds and not striker.strikes:
            raise RuntimeError(f"{job.run.folder}: the run ended before it could be struck ({kinds.coming}); give it more steps")
        same = summary["state_sha256"] == self.reference["state_sha256"]
        self.say(f"round {number}: {len(striker.strikes)} strikes, {summary['generations']} generations, same bits: {same}")

    def _hurt(self, job: Job, striker: Striker, kinds: Kinds) -> None:
        watch = Watch(job, striker, self.settings.patience_s)
        full = self.config.members
        ready = Ready(full, self.reference["steps"], not self.settings.minutes)
        while watch.goes_on():
            striker.mend()
            if self.settings.minutes and striker.scene.living and not striker.possible(kinds.coming):
                kinds.draw_next()
            if kinds and kinds.due() and ready.for_strike(striker, kinds.coming):
                strike = striker.strike(kinds.take())
                self.say(
                    f"  step {strike.step}: {strike.kind} {' '.join(strike.members)}{'' if strike.fired else ' (not fired)'}"
                )
            time.sleep(_LOOK_EVERY_S)

    def _told(self, striker: Striker) -> list[Effect]:
        run = striker.job.run
        steps, events = read_lines(run.steps)[0], run.read_events()
        return [effect(strike, steps, events) for strike in striker.strikes]

    def report(self) -> dict[str, Any]:
        """All that is known."""
        inside = sum(summary["faults_injected"] for summary in self.summaries)
        total = {key: sum(s[key] for s in self.summaries) for key in ("tiles_repeated", "tiles_missing", "steps_repeated")}
        return {
            "faults": len(self.effects) + inside,
            "fired": sum(one.strike.fired for one in self.effects) + inside,
            **account(self.effects),
            "state_equal": all(s["state_sha256"] == self.reference["state_sha256"] for s in self.summaries),
            "state_sha256": self.reference["state_sha256"],
            "losses_equal": all(_losses(s) == _losses(self.reference) for s in self.summaries),
            **total,
            "members_lost": sum(s["faults"] for s in self.summaries),
            "generations": sum(s["generations"] for s in self.summaries),
            "rounds": len(self.summaries),
            "steps": self.reference["steps"],
            "step_s": statistics.median(s["step_s"]["median"] for s in self.summaries),
            "seconds": time.monotonic() - self.started,
            "strikes": [asdict(one) for one in self.effects],
        }


class Kinds:
    """What comes next, and when: a fixed number, or a mixture until the time is over. False when nothing is left."""

    def __init__(self, settings: ChaosConfig, cells: int, started: float):
        self.settings, self._draw = settings, random.Random(settings.seed)
        self._left = deque(sequence(settings.counts, settings.seed))
        self._endless: Iterator[str] = mixture(settings.seed, cells)
        self._until = started + 60 * settings.minutes
        self._next = started
        self.coming = ""  # the kind that `take` will give
        self.draw_next()

    def draw_next(self) -> None:
        """Another kind instead of the one that was coming."""
        self.coming = next(self._endless) if self.settings.minutes else self._left.popleft() if self._left else ""

    def __bool__(self) -> bool:
        return time.monotonic() < self._until if self.settings.minutes else bool(self.coming)

    def due(self) -> bool:
        """Whether its time has come (that of a counted one always has)."""
        return time.monotonic() >= self._next or not self.settings.minutes

    def take(self) -> str:
        self._next = time.monotonic() + self.settings.every_s * (0.5 + self._draw.random())
        kind = self.coming
        self.draw_next()
        return kind


@dataclass
class Ready:
    """Whether a run can be struck: by counted strikes with `full` members, else with two (or the only one); by those of a
    mixture that break no generation, whenever there is a member."""

    full: int
    steps: int
    counted: bool
    _whole_since: int | None = None

    def for_strike(self, striker: Striker, kind: str) -> bool:
        scene = striker.scene
        if kind in GENTLE and not self.counted:
            return striker.possible(kind)
        there, needed = len(scene.living), self.full if self.counted else min(2, self.full)
        late = scene.step > _LAST_SHARE * self.steps or not striker.felt
        if not scene.going or there < needed or (self.counted and late) or not striker.possible(kind):
            self._whole_since = None
            return False
        since = self._whole_since = scene.step if self._whole_since is None else self._whole_since
        return not self.counted or scene.step >= since + _STEPS_BETWEEN


class Watch:
    """Whether a job still runs; RuntimeError when it has failed, or made no step for too long."""

    def __init__(self, job: Job, striker: Striker, patience_s: float):
        self.job, self.scene, self.patience_s = job, striker.scene, patience_s
        self._step, self._since = -1, time.monotonic()

    def goes_on(self) -> bool:
        now, step = time.monotonic(), self.scene.look().step
        if step != self._step:
            self._step, self._since = step, now
        if now - self._since > self.patience_s:
            raise RuntimeError(f"{self.job.run.folder}: no step in {self.patience_s:g} s after step {step}; see {self.job.log}")
        if self.job.code not in (None, 0):
            raise RuntimeError(f"{self.job.run.folder}: exit code {self.job.code}: {self.job.last_words()}")
        return self.job.code is None


def _summary(job: Job) -> dict[str, Any]:
    found = job.run.finished()
    assert found is not None, f"{job.run.folder} ended without a summary"
    return found | {"out": str(job.run.folder)}


def _losses(summary: Mapping[str, Any]) -> list[tuple[int, Any, Any]]:
    """What every step learnt from and its loss: they must agree as well."""
    return [(line["step"], line["loss"], line.get("tiles")) for line in read_lines(Run(summary["out"]).steps)[0]]


def _kept(report: Mapping[str, Any]) -> bool:
    """Whether the promise was: nothing changed, lost or repeated, by faults that all happened."""
    same = report["state_equal"] and report["losses_equal"] and report["faults"] == report["fired"]
    return same and not report["tiles_repeated"] and not report["tiles_missing"]


def _vanilla_settings(config: TrainConfig) -> VanillaConfig:
    return VanillaConfig(workers=(1, max(1, config.elastic.cells[1])))


def _compared(plain: Mapping[str, Any]) -> dict[str, Any]:
    worker = plain.get("defaults", {}).get("trials", {}).get("worker", {})
    return {"vanilla_recovery_s": worker.get("recovery_s"), "vanilla": dict(plain)}


# ---------------------------------------------------------------- words


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    yield f"# Chaos: {report['fired']} of {report['faults']} faults fired, {report['rounds']} rounds of {report['steps']} steps"
    yield ""
    yield f"Same bits as the undisturbed run: {report['state_equal']}; losses and tiles of all steps: {report['losses_equal']}."
    yield f"Tiles repeated {report['tiles_repeated']}, missing {report['tiles_missing']}; "
    yield f"steps computed again {report['steps_repeated']}. Median step {report['step_s']:.3f} s."
    yield ""
    columns = ["fault", "fired", *("next step s: p50", "p95", "max"), *("back s: p50", "p95"), *("joining costs s: p50", "p95")]
    columns += ["gone after s: max", "steps lost, most"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for kind, one in report["kinds"].items():
        recovery, join, cost = one["recovery_s"], one["join_s"], one["join_cost_s"]
        cells = [recovery["p50"], recovery["p95"], recovery["max"], join["p50"], join["p95"], cost["p50"], cost["p95"]]
        cells.append(one["exit_s"]["max"])
        yield f"| {kind} | {one['fired']} / {one['faults']} | {' | '.join(map(_number, cells))} | {one['steps_lost_max']} |"
    if report["vanilla"]:
        yield ""
        yield "| plain Ray Train | killed | next new step s | steps repeated |"
        yield "|---|---|---|---|"
    for variant, found in report["vanilla"].items():
        for kill, trial in found.get("trials", {}).items():
            yield f"| {variant} | {kill} | {_number(trial.get('recovery_s'))} | {trial.get('repeated_steps')} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

"""A run's metrics, made from its log while it trains: read by the command's own process, so that no step waits for them.

The log says everything (`runs`): members send their lines to the roster anyway, the roster writes them, and a thread beside
the fleet reads what is new a few times a second and tells Ray (`ray.util.metrics`), whose agents export it.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray
from ray.util import metrics

from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.telemetry import CAUSES, COUNTER, GAUGE, METRICS, Metric
from raysegment.feed.quarantine import FILE, Quarantine

_RECENT = 20  # steps that "now" means
_NODES_EVERY = 20  # looks at the log between two at the nodes
_TOLD_EVERY = 20  # … and at which all is told again: agents forget what nobody says, and a run may be stuck
_COUNTED = {  # event → the metric that counts it
    "generation": "generations",
    "node_lost": "node_losses",
    "straggler": "stragglers",
    "failure": "failures",
    "save_failed": "save_failures",
    "checkpoint_failed": "save_failures",
}


@dataclass(frozen=True)
class Reading:
    """A metric's value now: a gauge's level, a counter's total since the run began."""

    name: str
    value: float
    tags: tuple[tuple[str, str], ...] = ()


class Tally:
    """What a run's log adds up to, fed line by line. `classes` as in IoUs, `tiles` of the shard set, FLOP of a sample."""

    def __init__(self, steps: int, batch: int, tiles: int, classes: Sequence[str], flops_per_sample: float):
        self.planned, self.batch, self.tiles, self.classes, self.flops = steps, batch, tiles, classes, flops_per_sample
        self.quarantined = 0
        self._last: Mapping[str, Any] = {}
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=_RECENT)
        self._paces: list[float] = []  # seconds per sample, in order
        self._counts: Counter[str] = Counter(dict.fromkeys(_COUNTED.values(), 0))
        self._seen: set[str] = set()  # places of workers (cell.rank)
        self._nodes: set[str] = set()
        self._iou: Mapping[str, Any] = {}
        self._saved = 0.0

    @property
    def nodes(self) -> set[str]:
        """The nodes that workers of this command have been on, and that have not been lost."""
        return set(self._nodes)

    def step(self, line: Mapping[str, Any]) -> None:
        """A line of steps.jsonl."""
        self._last = line
        self._recent.append(line)
        if line["samples"]:
            insort(self._paces, line["step_s"] / line["samples"])
        self._counts["samples_total"] += line["samples"]
        self._counts["steps_total"] += 1
        self._counts["steps_skipped"] += bool(line["skipped"])

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of events.jsonl."""
        kind = event["event"]
        if kind in _COUNTED:
            self._counts[_COUNTED[kind]] += 1
        if kind == "generation":
            self._counts["steps_repeated"] += event["repeated"]
        elif kind == "lost":
            self._counts["members_lost"] += event["rank"] is not None
        elif kind == "worker" and "node" in event:
            self._worker(event)
        elif kind == "node_lost":
            self._nodes.discard(event["node"])
        elif kind == "validation":
            self._iou = event
        elif kind in ("checkpoint", "start"):
            self._begin(event)

    def _worker(self, event: Mapping[str, Any]) -> None:
        place = str(event["member"]).rpartition("-")[0]
        self._counts["restarts"] += place in self._seen
        self._seen.add(place)
        self._nodes.add(event["node"])

    def _begin(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "checkpoint" or not self._saved:
            self._saved = event["time"]
        if event["event"] == "start":
            self._nodes.clear()  # of a cluster that may be another

    def readings(self) -> Iterator[Reading]:
        """All that is known; nothing of steps before there is one."""
        for name in ("restarts", "members_lost", "steps_repeated", "steps_skipped", *dict.fromkeys(_COUNTED.values())):
            yield Reading(name, self._counts[name])
        yield Reading("tiles_quarantined", self.quarantined)
        if self._saved:
            yield Reading("last_checkpoint_timestamp_seconds", self._saved)
        yield from self._validation()
        if self._last:
            yield from self._learning()
            yield from self._speed()

    def _learning(self) -> Iterator[Reading]:
        line = self._last
        cursor = line["cursor"] + self.batch
        yield Reading("cursor", cursor)
        yield Reading("epoch", cursor / self.tiles)
        yield Reading("progress", (line["step"] + 1) / self.planned)
        yield Reading("last_step_timestamp_seconds", line["time"])
        for name, key in (("loss", "loss"), ("gradient_norm", "grad_norm"), ("learning_rate", "lr")):
            if line[key] is not None:
                yield Reading(name, line[key])

    def _validation(self) -> Iterator[Reading]:
        for name, value in zip(self.classes, self._iou.get("iou", ()), strict=False):
            if value is not None:
                yield Reading("iou", value, (("class", name),))
        if self._iou.get("mean_iou") is not None:
            yield Reading("mean_iou", self._iou["mean_iou"])

    def _speed(self) -> Iterator[Reading]:
        seconds = sum(line["step_s"] for line in self._recent)
        pace = sum(line["samples"] for line in self._recent) / seconds
        yield Reading("samples_total", self._counts["samples_total"])
        yield Reading("steps_total", self._counts["steps_total"])
        yield Reading("world_size", self._last["world"])
        yield Reading("samples_per_second", pace)
        figures = {"now": pace * self.flops}
        if self._paces:
            usual, best = self._paces[round(0.5 * (len(self._paces) - 1))], self._paces[0]
            figures |= {"sustained": self.flops / usual, "peak": self.flops / best}
        yield from (Reading("flops_per_second", value, (("figure", name),)) for name, value in figures.items())
        shares = {cause: sum(line[key] for line in self._recent) / seconds for cause, key in CAUSES.items()}
        for cause, share in {**shares, "other": max(0.0, 1 - sum(shares.values()))}.items():
            yield Reading("time_share", share, (("cause", cause),))


class Exporter:
    """Ray's side: readings become metrics under the tag `run`."""

    def __init__(self, run: str):
        self._run = run
        self._told: dict[str, float] = {}  # counters: how much of their total has been

    def tell(self, readings: Iterable[Reading]) -> None:
        """Gauges as they are, counters by what is new."""
        for reading in readings:
            metric, tags = self._metrics[reading.name], {"run": self._run, **dict(reading.tags)}
            if isinstance(metric, metrics.Gauge):
                metric.set(reading.value, tags)
            elif isinstance(metric, metrics.Counter) and (new := reading.value - self._told.get(reading.name, 0.0)) > 0:
                metric.inc(new, tags)
                self._told[reading.name] = reading.value

    def observe(self, name: str, value: float) -> None:
        """A value for a histogram."""
        metric = self._metrics[name]
        assert isinstance(metric, metrics.Histogram), name
        metric.observe(value, {"run": self._run})

    @cached_property
    def _metrics(self) -> dict[str, metrics.Metric]:
        return {metric.name: _made(metric) for metric in METRICS}


def _made(metric: Metric) -> metrics.Metric:
    tags = ("run", *metric.tags)
    if metric.kind == GAUGE:
        return metrics.Gauge(metric.full_name, metric.description, tags)
    if metric.kind == COUNTER:
        return metrics.Counter(metric.full_name, metric.description, tags)
    return metrics.Histogram(metric.full_name, metric.description, list(metric.boundaries), tags)


class Watch:
    """Follows a run's files and tells Ray. `look` may be called from any one thread, as often as wished."""

    def __init__(self, run: Run, name: str, tally: Tally, dead: Callable[[], set[str]] | None = None):
        self.run, self.tally = run, tally
        self._exporter = Exporter(name)
        self._dead = dead or _dead_nodes
        self._damaged = Quarantine(tally.tiles, tally.tiles, run.folder / FILE)
        self._at = {"steps": 0, "events": 0}
        self._looks = 0
        self._old = True  # what is read first may have been there before

    def look(self) -> list[dict[str, Any]]:
        """Take in what is new in the log and export; the new lines of steps."""
        steps, self._at["steps"] = read_lines(self.run.steps, self._at["steps"])
        events, self._at["events"] = read_lines(self.run.events, self._at["events"])
        for event in events:
            self.tally.event(event)
        for line in steps:
            self.tally.step(line)
            if not self._old:
                self._exporter.observe("step_seconds", line["step_s"])
        self._damaged.refresh()
        self.tally.quarantined = self._damaged.count
        self._look_at_nodes()
        if steps or events or self._old or self._looks % _TOLD_EVERY == 0:
            self._exporter.tell(self.tally.readings())
        self._old = False
        return steps

    def _look_at_nodes(self) -> None:
        """Nodes with our workers that Ray has given up are put down in the log, once each."""
        self._looks += 1
        if self._looks % _NODES_EVERY:
            return
        for node in sorted(self.tally.nodes & self._dead()):
            self.run.event("node_lost", node=node)


def _dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}

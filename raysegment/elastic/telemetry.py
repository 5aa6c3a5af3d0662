"""The metrics of a training run: what each is, in which unit, which question of the person on call it answers, and how.

The definitions are all there is: `watch` exports exactly these through Ray, and the Grafana dashboard is made of them
(`raysegment cluster dashboards`). Ray puts `ray_` before each name; every series has the tag `run`.

What happened to a run (restarts, losses, …) is exported as gauges that hold the number since the run began, read from the
run's own log: they survive the command's own restarts, and 0 is a value, not an absent series.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "raysegment_"
GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
LEARNING, FAST, HELD_UP, FAILED = "Is it learning?", "Is it fast?", "What holds it up?", "What failed?"
QUESTIONS = (LEARNING, FAST, HELD_UP, FAILED)
CAUSES = {  # share of time → the key of a step's line
    "data": "load_s",
    "compute": "compute_s",
    "exchange": "exchange_s",
    "snapshot": "checkpoint_s",
    "commit": "optimizer_s",
}
_SERIES = "{series}"


@dataclass(frozen=True)
class Metric:
    """A metric: `name` without the prefix, `unit` as Grafana knows it, `tags` besides `run`, the `question` it answers.

    `query` is PromQL with `{series}` for the metric's own series of the runs that are looked at, and `legend` names a line
    of its answer. `boundaries` are a histogram's.
    """

    name: str
    kind: str
    unit: str
    question: str
    title: str
    description: str
    query: str = ""
    legend: str = "{{run}}"
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (GAUGE, COUNTER, HISTOGRAM) or self.question not in QUESTIONS:
            raise ValueError(f"metric {self.name}: expected a known kind and question, got {self.kind!r}, {self.question!r}")
        if (self.kind == HISTOGRAM) != bool(self.boundaries) or (self.kind == COUNTER) != self.name.endswith("_total"):
            raise ValueError(f"metric {self.name}: expected boundaries for a histogram, _total for a counter, and only there")
        if self.kind != GAUGE and not self.query:
            raise ValueError(f"metric {self.name}: expected a query, as for every {self.kind}")
        if self.query and _SERIES not in self.query:
            raise ValueError(f"metric {self.name}: expected {_SERIES} in its query, got {self.query!r}")

    @property
    def full_name(self) -> str:
        """As Ray is told."""
        return PREFIX + self.name

    @property
    def exported_name(self) -> str:
        """As Prometheus finds it."""
        return f"ray_{self.full_name}" + ("_bucket" if self.kind == HISTOGRAM else "")

    def promql(self, selector: str) -> str:
        """The query for the series that `selector` (PromQL's label matchers) chooses; without a query of its own, the value."""
        grouped = ", ".join(("run", *self.tags))
        return (self.query or f"max by ({grouped}) ({_SERIES})").replace(_SERIES, f"{self.exported_name}{{{selector}}}")


def _gauge(name: str, unit: str, question: str, title: str, description: str) -> Metric:
    return Metric(name, GAUGE, unit, question, title, description)


def _number(name: str, title: str, description: str) -> Metric:
    """How often something that should not happen has, since the run began."""
    return Metric(name, GAUGE, "short", FAILED, title, f"{description}, since the run began")


def _age(name: str, question: str, title: str, description: str) -> Metric:
    """A moment (Unix time); the panel shows how long ago it was."""
    return Metric(name, GAUGE, "s", question, title, description, "time() - max by (run) ({series})")


METRICS = (
    _gauge("loss", "short", LEARNING, "Loss", "mean over the usable tiles of the newest step"),
    Metric("iou", GAUGE, "percentunit", LEARNING, "IoU by class", "intersection over union on held-out tiles, newest validation",
           legend="{{run}} {{class}}", tags=("class",)),
    _gauge("mean_iou", "percentunit", LEARNING, "Mean IoU", "mean over the classes, newest validation"),
    _gauge("learning_rate", "sci", LEARNING, "Learning rate", "of the newest step"),
    _gauge("gradient_norm", "sci", LEARNING, "Gradient norm", "of the mean gradient before clipping, newest step"),
    _gauge("epoch", "short", LEARNING, "Epoch", "passes over the shard set, as a fraction"),
    _gauge("cursor", "short", LEARNING, "Cursor", "the next position of the order of tiles: the whole data state"),
    _gauge("progress", "percentunit", LEARNING, "Progress", "committed steps as a share of those that the run is to take"),
    _gauge("samples_per_second", "short", FAST, "Samples per second", "tiles learnt from, over the newest steps"),
    Metric("flops_per_second", GAUGE, "flops", FAST, "FLOP/s now, sustained, peak",
           "of all members together, counted as in Kurth et al. 2018: over the newest steps, at the median step, at the best",
           legend="{{run}} {{figure}}", tags=("figure",)),
    _gauge("world_size", "short", FAST, "World size", "members of the newest step"),
    Metric("samples_total", COUNTER, "short", FAST, "Samples per second, from the counter", "tiles learnt from",
           "sum by (run) (rate({series}[2m]))"),
    Metric("steps_total", COUNTER, "short", FAST, "Steps per minute", "steps that have been committed",
           "60 * sum by (run) (rate({series}[2m]))"),
    Metric("step_seconds", HISTOGRAM, "s", HELD_UP, "Seconds of a step, 95th percentile", "from one committed step to the next",
           "histogram_quantile(0.95, sum by (run, le) (rate({series}[5m])))",
           boundaries=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)),
    Metric("time_share", GAUGE, "percentunit", HELD_UP, "Share of time by cause",
           "of the newest steps: waiting for data, computing, waiting for the exchange, copying a snapshot of the state, "
           "committing (clip, optimizer, statistics), and the rest", legend="{{run}} {{cause}}", tags=("cause",)),
    _age("last_step_timestamp_seconds", HELD_UP, "Since the last step", "when the newest step was committed: is it stuck?"),
    _gauge("stragglers", "short", HELD_UP, "Stragglers", "times that a member was named as much slower than the others"),
    _number("restarts", "Restarts", "workers started in the place of one that had ended"),
    _number("members_lost", "Members lost", "members that died, fell silent or were let go"),
    _number("node_losses", "Node losses", "nodes with workers of the run that Ray has declared dead"),
    _number("generations", "Generations", "groups that members have formed"),
    _number("steps_repeated", "Steps repeated", "committed steps that were computed once more"),
    _number("steps_skipped", "Steps skipped", "steps whose gradient was not finite, or that had no usable tile"),
    _number("tiles_quarantined", "Tiles quarantined", "tiles that are damaged and left out"),
    _number("failures", "Failures", "errors that a worker could not go on after"),
    _number("save_failures", "Failed saves", "states that were not kept in memory or as a file"),
    _age("last_checkpoint_timestamp_seconds", FAILED, "Since the last checkpoint", "when the newest checkpoint was published; "
         "until there is one, when the command began"),
)  # fmt: skip
BY_NAME = {metric.name: metric for metric in METRICS}

"""A campaign: many short training runs that differ in a few keys, searched by Ray Tune, ending in a table and a best.yaml.

Every trial is an ordinary run (`elastic.train`) in a folder of its own under `trials/`, named by its values: the search
may be interrupted and started again, what is finished is not computed twice. The process that drives a trial reserves
memory and no CPU, so that trial drivers never take the CPUs that their own workers wait for.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.optuna import OptunaSearch

from raysegment import config as configuration
from raysegment.archive.files import committed
from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import Run, jsonable, read_lines
from raysegment.elastic.settings import plain
from raysegment.elastic.train import TrainConfig, train, use_gpu
from raysegment.feed.session import ensure_ray

SEARCHERS, SCHEDULERS = ("random", "grid", "optuna"), ("asha", "fifo")
KINDS = ("choice", "uniform", "log", "integer")
_DRIVER_BYTES = 600 * 2**20  # a TrainController takes about 380 MB and its placement-group cleaner 200
_REPORTS = 20  # a trial reports so often over its length

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Dimension:
    """One key's values: `choice` of a list, `uniform` or `log`-uniform or `integer` between two bounds (both included)."""

    key: str
    kind: str
    values: tuple[Any, ...]

    @staticmethod
    def parse(key: str, spec: Any) -> Dimension:
        """From `{log: [1e-4, 1e-1]}`, or a plain list of choices."""
        spec = {"choice": spec} if isinstance(spec, list) else spec
        if not isinstance(spec, Mapping) or len(spec) != 1 or next(iter(spec)) not in KINDS:
            raise BadInput(f"search.{key}", f"one of {', '.join(KINDS)} with its values", spec, "Write `log: [1e-4, 1e-1]`.")
        kind, values = next(iter(spec.items()))
        if not isinstance(values, list) or not values or (kind != "choice" and len(values) != 2):
            raise BadInput(f"search.{key}", "a list" if kind == "choice" else "two bounds", values, "Write `[1e-4, 1e-1]`.")
        values = tuple(configuration.scalar(value) if isinstance(value, str) else value for value in values)
        if kind != "choice" and not (all(isinstance(value, int | float) for value in values) and values[0] < values[1]):
            raise BadInput(f"search.{key}", "a lower and a higher bound", values, "Write the lower bound first.")
        if kind == "log" and values[0] <= 0:
            raise BadInput(f"search.{key}", "bounds above 0", values, "Use `uniform` for ranges that hold 0.")
        return Dimension(key, kind, values)

    @property
    def space(self) -> Any:
        """As Ray Tune wants it."""
        if self.kind == "choice":
            return tune.choice(list(self.values))
        if self.kind == "integer":
            return tune.randint(int(self.values[0]), int(self.values[1]) + 1)
        return (tune.loguniform if self.kind == "log" else tune.uniform)(*self.values)


@dataclass(frozen=True)
class CampaignConfig:
    """`train` holds the keys that all trials share, `search` the keys that differ, each with its values.

    `searcher`: "grid" tries all combinations of choices, "random" and "optuna" draw `trials` points. `scheduler`: "asha"
    stops the worse trials early, not before `grace` of their steps (Li et al. 2020), "fifo" lets all finish. The score is
    the mean loss over the last tenth of a trial's steps. `at_once` bounds trials at the same time (0: what fits).
    """

    out: str = "runs/campaign"
    train: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    searcher: str = "random"
    scheduler: str = "asha"
    trials: int = 8
    at_once: int = 0
    grace: float = 0.2
    reduction: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.searcher not in SEARCHERS:
            raise ValueError(f"searcher: expected one of {', '.join(SEARCHERS)}, got {self.searcher!r}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler: expected one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        if self.trials < 1 or self.at_once < 0 or not 0 < self.grace <= 1 or self.reduction < 2:
            raise ValueError(f"expected trials >= 1, at_once >= 0, grace in (0, 1] and reduction >= 2, got {self}")
        if not self.search:
            raise ValueError("search: expected at least one key with its values, got none")
        if self.searcher == "grid" and any(dimension.kind != "choice" for dimension in self.dimensions):
            raise ValueError("search: expected choices only with the grid searcher, got a range")
        for key in ("out", "name"):
            if key in self.train:
                raise ValueError(f"train.{key}: expected none, every trial has its own, got {self.train[key]!r}")

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return tuple(Dimension.parse(key, spec) for key, spec in self.search.items())

    @property
    def count(self) -> int:
        """How many trials there will be."""
        return math.prod(len(d.values) for d in self.dimensions) if self.searcher == "grid" else self.trials

    def trial(self, point: Mapping[str, Any]) -> TrainConfig:
        """The run of one point of the search; BadInput when a key is no key of `train`."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in sorted(point.items())]
        name = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:12]
        mapping = configuration.apply_overrides(self.train, overrides)
        mapping |= {"out": f"{self.out}/trials/{name}", "name": name}
        return configuration.load(TrainConfig, mapping, "campaign")

    def corners(self) -> Iterator[dict[str, Any]]:
        """Points with every first and every last value: enough to tell whether the keys and bounds are possible."""
        for pick in (0, -1):
            yield {dimension.key: dimension.values[pick] for dimension in self.dimensions}


def run_campaign(config: CampaignConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Search; then results.csv, best.yaml, curves.png and report.md in the campaign's folder. Run again to go on."""
    config = _absolute(config)
    manifest = _check(config)
    out = Path(config.out)
    _claim(out, config)
    ensure_ray()
    with _watch(out, config.count, progress):
        results = _tuner(config, out).fit()
    rows = _rows(config, results, manifest)
    return _publish(config, out, rows)


def _absolute(config: CampaignConfig) -> CampaignConfig:
    """Paths as the trials, each in a working directory of its own, can use them."""
    shards = config.train.get("shards")
    shared = {**config.train, **({"shards": os.path.abspath(shards)} if shards else {})}
    return replace(config, out=os.path.abspath(config.out), train=shared)


def _check(config: CampaignConfig) -> Manifest:
    """All that can be known to be wrong before anything starts."""
    corners = [config.trial(point) for point in config.corners()]
    if not corners[0].shards:
        raise BadInput("train.shards", "the folder of a shard set", "nothing", "Write train.shards=DIR.")
    manifest = Manifest.load(corners[0].shards)
    for corner in corners:
        corner.resolved(manifest)
    return manifest


def _claim(out: Path, config: CampaignConfig) -> None:
    """Make the campaign's folder, or check that it is of the same campaign."""
    path, now = out / "campaign.yaml", plain(config)
    if path.exists():
        before = yaml.safe_load(path.read_text())
        differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key != "at_once"]
        if differing:
            raise BadInput(out, "a new folder or the same campaign", f"other values of {', '.join(differing)}",
                           "Give the same campaign to go on, or another folder as `out`.")  # fmt: skip
    with committed(path) as temporary:
        temporary.write_text(yaml.safe_dump(now, sort_keys=False))


def _tuner(config: CampaignConfig, out: Path) -> tune.Tuner:
    """A new search, or the one that was interrupted."""
    trainable = tune.with_resources(tune.with_parameters(_trial, campaign=config), {"memory": _DRIVER_BYTES})
    path = out / "search"
    if tune.Tuner.can_restore(str(path)):
        return tune.Tuner.restore(str(path), trainable, resume_errored=True, resume_unfinished=True)
    grid = config.searcher == "grid"
    space = {d.key: tune.grid_search(list(d.values)) if grid else d.space for d in config.dimensions}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", num_samples=1 if grid else config.trials, search_alg=_searcher(config),
            scheduler=_scheduler(config), reuse_actors=False,
            max_concurrent_trials=_at_once(config) if config.searcher == "optuna" else None,  # the others bring their own
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(out), verbose=0),
    )  # fmt: skip


def _searcher(config: CampaignConfig) -> Searcher | BasicVariantGenerator:
    if config.searcher == "optuna":
        return OptunaSearch(seed=config.seed)
    return BasicVariantGenerator(random_state=config.seed, max_concurrent=_at_once(config))


def _scheduler(config: CampaignConfig) -> TrialScheduler:
    """Time is the share of a trial's steps, in percent, so that trials of any length compare."""
    if config.scheduler == "fifo":
        return FIFOScheduler()
    grace = max(1, round(100 * config.grace))
    return ASHAScheduler(time_attr="percent", max_t=100, grace_period=grace, reduction_factor=config.reduction)


def _at_once(config: CampaignConfig) -> int:
    """Trials that fit beside each other: whole groups of workers, or the first would wait for the second's CPUs for ever."""
    trial, have = config.trial(next(config.corners())), ray.cluster_resources()
    fits = int(have.get("CPU", 1) / (trial.workers * trial.cpus_per_worker))
    if use_gpu(trial):
        fits = min(fits, int(have.get("GPU", 0) / trial.workers))
    return max(1, min(fits, config.at_once or fits))


def _trial(point: dict[str, Any], campaign: CampaignConfig) -> None:
    """In the trial's own process: train, and tell Tune how it goes."""
    trial = campaign.trial(point)
    run, told = Run(trial.out), 0

    def tell(done: int, total: int, _: str) -> None:
        nonlocal told
        percent = 100 * done // total
        if percent // (100 // _REPORTS) > told and done < total:
            told = percent // (100 // _REPORTS)
            tune.report({"percent": percent, "step": done, "loss": recent_loss(run)})

    summary = train(trial, tell)
    tune.report({"percent": 100, "step": summary["steps"], "loss": recent_loss(run)})


def recent_loss(run: Run) -> float:
    """Mean loss of the last tenth of the steps so far, at least one; infinite when none was finite."""
    steps = read_lines(run.steps)[0]
    losses = [step["loss"] for step in steps[-max(1, len(steps) // 10) :]]
    return sum(losses) / len(losses) if losses and None not in losses else math.inf


@contextmanager
def _watch(out: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """While inside, tell `progress` how many trials have finished."""
    done = threading.Event()

    def follow() -> None:
        while progress is not None and not done.wait(1.0):
            begun, finished = (len(list(out.glob(f"trials/*/{name}"))) for name in ("config.yaml", "summary.json"))
            progress(finished, total, f"{begun} begun")

    thread = threading.Thread(target=follow, name="watch-trials", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _rows(config: CampaignConfig, results: tune.ResultGrid, manifest: Manifest) -> list[dict[str, Any]]:
    """One row per trial, the best first: its values, how it ended, its score."""
    rows = []
    for result in results:
        point = dict(result.config or {})
        trial, metrics = config.trial(point), result.metrics or {}
        run = Run(trial.out)
        finished = run.finished()
        status = "failed" if result.error else "finished" if finished else "stopped"
        loss = metrics.get("loss", math.inf)
        rows.append({
            "trial": trial.name, **point, "status": status, "steps": metrics.get("step", 0),
            "of": trial.resolved(manifest).steps, "loss": loss if math.isfinite(loss) else math.inf,
            "samples_per_s": (finished or {}).get("samples_per_s"), "checkpoint": (finished or {}).get("checkpoint"),
        })  # fmt: skip
    order = {"finished": 0, "stopped": 1, "failed": 2}
    return sorted(rows, key=lambda row: (order[row["status"]], row["loss"]))


def _publish(config: CampaignConfig, out: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The campaign's results as files, and as a dict."""
    with committed(out / "results.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    best = rows[0]
    if best["status"] != "finished":
        raise RuntimeError(f"{out}: no trial finished; see {out / 'results.csv'} and the folders in {out / 'trials'}")
    keys = [dimension.key for dimension in config.dimensions]
    with committed(out / "best.yaml") as temporary:
        mapping = plain(config.trial({key: best[key] for key in keys}))
        temporary.write_text(yaml.safe_dump({**mapping, "out": "runs/best", "name": "best"}, sort_keys=False))
    draw_curves(out / "curves.png", out, rows, keys)
    (out / "report.md").write_text(report(config, rows))
    counts = {status: sum(row["status"] == status for row in rows) for status in ("finished", "stopped", "failed")}
    return jsonable({
        "trials": len(rows), **counts, "best": {key: best[key] for key in keys}, "loss": best["loss"],
        "checkpoint": best["checkpoint"], "results": out / "results.csv", "best_config": out / "best.yaml",
        "pictures": [out / "curves.png"], "report": out / "report.md",
    })  # fmt: skip


def draw_curves(path: Path, out: Path, rows: list[dict[str, Any]], keys: list[str]) -> None:
    """Loss by step of every trial, smoothed over a twentieth of its steps; the best one drawn bold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        steps = read_lines(out / "trials" / row["trial"] / "steps.jsonl")[0]
        known = [(step["step"], step["loss"]) for step in steps if step["loss"] is not None]
        label = ", ".join(f"{key.rsplit('.', 1)[-1]} {_short(row[key])}" for key in keys)
        if known:
            x, y = zip(*known, strict=True)
            axes.plot(x, smooth(list(y), max(1, len(y) // 20)), lw=2.4 if number == 0 else 0.9, label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    with committed(path) as temporary, temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last `width` values."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[k + 1] - sums[max(0, k + 1 - width)]) / min(k + 1, width) for k in range(len(values))]


def report(config: CampaignConfig, rows: list[dict[str, Any]]) -> str:
    """The campaign in Markdown: what was searched, the table, the best."""
    keys = [dimension.key for dimension in config.dimensions]
    columns = [*keys, "status", "steps", "loss", "samples_per_s"]
    lines = [
        f"# Campaign {Path(config.out).name}",
        "",
        f"{len(rows)} trials, {config.searcher} search, {config.scheduler} scheduler, seed {config.seed}.",
        "Loss: mean over the last tenth of a trial's steps.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_short(row[column]) for column in columns) + " |" for row in rows),
        "",
        "Best: " + ", ".join(f"`{key}={_short(rows[0][key])}`" for key in keys) + ". `raysegment train best.yaml` repeats it.",
        "",
        "![Loss by step](curves.png)",
        "",
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

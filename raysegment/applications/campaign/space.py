"""A campaign's file: its question, what all trials share, what differs, how it is searched and judged."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from raysegment import config as configuration
from raysegment.applications.campaign.measures import check_metric, is_validated
from raysegment.applications.worlds import ArchiveConfig
from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.elastic.settings import TrainConfig, ValidationConfig, flat, plain

SEARCHERS = ("random", "grid", "optuna")
SCHEDULERS = ("asha", "median", "hyperband", "pbt", "fifo")
KINDS = ("choice", "uniform", "log", "integer")
CONFIGS = Path(__file__).parents[2] / "configs"
_REPORTS = 20  # a trial reports about so often over its length
_OWN = ("out", "name")  # every trial has its own
_FREE = ("at_once", "budget_s", "question", "confirm_seeds", "exhaustive")  # may change when a campaign goes on
# What may change in the middle of training without making the state of another's optimizer useless
_MUTABLE = ("learn.optim.", "learn.loss.", "learn.augment.")
_FIXED = ("learn.optim.optimizer", "learn.optim.ema", "learn.optim.momentum", "learn.optim.total_steps")

Point = dict[str, Any]


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

    def draw(self, random: np.random.Generator) -> Any:
        """A value by chance."""
        if self.kind == "choice":
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "integer":
            return int(random.integers(int(low), int(high) + 1))
        if self.kind == "log":
            return float(np.exp(random.uniform(np.log(low), np.log(high))))
        return float(random.uniform(low, high))

    def holds(self, value: Any) -> bool:
        """Whether the value lies in this dimension."""
        return value in self.values if self.kind == "choice" else self.values[0] <= value <= self.values[1]

    @property
    def mutation(self) -> Any:
        """As Ray's population-based training wants it: a list is perturbed to a neighbour, a range by a factor."""
        if self.kind == "choice":
            return list(self.values)
        if self.kind == "integer":
            return tune.randint(int(self.values[0]), int(self.values[1]) + 1)
        return (tune.loguniform if self.kind == "log" else tune.uniform)(*self.values)

    def clipped(self, value: Any) -> Any:
        """The value, or the bound that it is beyond (a perturbation may leave the range)."""
        if self.kind == "choice":
            return value
        bounded = min(max(value, self.values[0]), self.values[1])
        return round(bounded) if self.kind == "integer" else bounded


@dataclass(frozen=True)
class CampaignConfig:
    """A `question`, the runs that answer it, and what they may cost.

    Runs: `base` names a shipped configuration of `train` (or a YAML file), `train` sets keys over it that all trials share,
    `search` the keys that differ, each with its values. With `archive`, synthetic weather is made and staged in `out`, its
    held-out part as validation; without, `train.shards` names a shard set.

    Search: `searcher` "grid" tries all combinations of choices, "random" and "optuna" (TPE) propose `trials` points.
    `scheduler`: "asha" stops the worse trials early, not before `grace` of their steps, and lets the best 1/`reduction` go
    on (Li et al. 2020); "hyperband" pauses and promotes in brackets (Li et al. 2018); "median" stops what is worse than the
    median of the others' running means (Golovin et al. 2017); "pbt" lets the worst `quantile` take weights and, perturbed,
    values of the best, every `interval` of the steps (Jaderberg et al. 2017); "fifo" lets all finish.

    Judgement: `metric` "loss" (mean over the last tenth of a trial's steps), "mean_iou", "mlperf_iou", "iou_<class>" on
    validation tiles, or "seconds_to_iou" (training seconds until the mean IoU reaches `target`). A trial whose loss is not
    finite, or `diverged` times its first, ends. The best three are trained again with `confirm_seeds` further seeds.
    `exhaustive` then lets every stopped trial finish, to tell what stopping early saved and cost.

    Cost: `at_once` trials beside each other (0: what fits); none begins after `budget_s` seconds (0: no limit). `scales`
    holds keys to be set over all this, by name; `scale` chooses.
    """

    question: str = ""
    out: str = "runs/campaign"
    base: str = ""
    train: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    archive: ArchiveConfig | None = None
    searcher: str = "random"
    scheduler: str = "asha"
    metric: str = "loss"
    target: float = 0.0
    trials: int = 8
    at_once: int = 0
    budget_s: float = 0.0
    grace: float = 0.2
    reduction: int = 3
    interval: float = 0.2
    quantile: float = 0.25
    diverged: float = 10.0
    confirm_seeds: int = 0
    exhaustive: bool = False
    seed: int = 0
    scale: str = ""
    scales: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choose("searcher", self.searcher, SEARCHERS)
        _choose("scheduler", self.scheduler, SCHEDULERS)
        if self.trials < 1 or self.at_once < 0 or not 0 < self.grace <= 1 or self.reduction < 2 or self.budget_s < 0:
            raise ValueError(f"expected trials >= 1, at_once, budget_s >= 0, grace in (0, 1] and reduction >= 2, got {self}")
        if not 0 < self.interval < 1 or not 0 < self.quantile <= 0.5 or self.diverged <= 1 or self.confirm_seeds < 0:
            raise ValueError(
                f"expected interval in (0, 1), quantile in (0, 0.5], diverged > 1 and confirm_seeds >= 0, got {self.interval}, "
                f"{self.quantile}, {self.diverged} and {self.confirm_seeds}"
            )
        if not self.search:
            raise ValueError("search: expected at least one key with its values, got none")
        if self.searcher == "grid" and any(dimension.kind != "choice" for dimension in self.dimensions):
            raise ValueError("search: expected choices only with the grid searcher, got a range")
        for key in _OWN:
            if key in self.train:
                raise ValueError(f"train.{key}: expected none, every trial has its own, got {self.train[key]!r}")
        if self.archive is not None and self.train.get("shards"):
            raise ValueError("train.shards: expected none beside `archive`, which makes them; leave one of them out")
        check_metric(self.metric, self.target)
        self._check_validation()
        if self.scheduler == "pbt":
            self._check_population()

    def _check_validation(self) -> None:
        if is_validated(self.metric) and self.archive is None and not self._train().get("validation", {}).get("shards"):
            raise BadInput("metric", "one that the trainer reports", f"{self.metric}, and no tiles to validate on",
                           "Write train.validation.shards=DIR, or take `loss`.")  # fmt: skip

    def _check_population(self) -> None:
        if self.searcher == "optuna":
            raise ValueError("searcher: expected random or grid with the pbt scheduler, which proposes by itself, got optuna")
        if self.exhaustive:
            raise ValueError("exhaustive: expected false with the pbt scheduler, whose trials all finish, got true")
        for key in self.search:
            if not key.startswith(_MUTABLE) or key in _FIXED:
                raise BadInput(f"search.{key}", f"keys below {', '.join(_MUTABLE)} that may change in mid-training with pbt", key,
                               "Use another scheduler for this key.")  # fmt: skip

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        return tuple(Dimension.parse(key, spec) for key, spec in self.search.items())

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def count(self) -> int:
        """How many trials the search has."""
        return math.prod(len(d.values) for d in self.dimensions) if self.searcher == "grid" else self.trials

    @property
    def grid(self) -> Iterator[Point]:
        """All combinations of choices, the first key changing slowest."""
        keys = [dimension.key for dimension in self.dimensions]
        for values in itertools.product(*(dimension.values for dimension in self.dimensions)):
            yield dict(zip(keys, values, strict=True))

    @property
    def reports(self) -> int:
        """How often a trial reports over its length; the rungs of the scheduler are among these."""
        least = round(1 / (self.interval if self.scheduler == "pbt" else self.grace))
        return least if self.scheduler in ("hyperband", "pbt") else least * max(1, _REPORTS // least)

    def trial(self, point: Mapping[str, Any]) -> TrainConfig:
        """The run of one point of the search; BadInput when a key is no key of `train`."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in sorted(point.items())]
        name = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:12]
        mapping = configuration.apply_overrides(self._train(), overrides)
        mapping |= {"out": f"{self.out}/trials/{name}", "name": name}
        return configuration.load(TrainConfig, mapping, "campaign")

    def _train(self) -> dict[str, Any]:
        """What all trials share, as nested mappings."""
        shared = {} if self.archive is None else {
            "shards": f"{self.out}/data/shards", "validation": {"shards": f"{self.out}/data/heldout-shards"}
        }  # fmt: skip
        words = [f"{key}={json.dumps(value)}" for key, value in (*flat(shared), *flat(self.train))]
        return configuration.apply_overrides(self._base(), words)

    def _base(self) -> dict[str, Any]:
        if not self.base:
            return {}
        shipped = CONFIGS / f"{self.base}.yaml"
        return configuration.read_yaml(shipped if shipped.exists() else self.base)

    def corners(self) -> Iterator[Point]:
        """Points with every first and every last value, and each choice once: enough to tell whether they are possible."""
        first = {dimension.key: dimension.values[0] for dimension in self.dimensions}
        yield first
        yield {dimension.key: dimension.values[-1] for dimension in self.dimensions}
        for dimension in self.dimensions:
            for value in dimension.values[1:-1] if dimension.kind == "choice" else ():
                yield {**first, dimension.key: value}


def _choose(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}: expected one of {', '.join(known)}, got {value!r}")


# ---------------------------------------------------------------- from a file


def load_campaign(path: str | Path, overrides: list[str] | None = None) -> CampaignConfig:
    """The campaign of a YAML file with key=value over it; `scale` sets the keys of `scales.NAME` in between."""
    words = overrides or []
    mapping = configuration.apply_overrides(configuration.read_yaml(path), words)
    scale, scales = mapping.get("scale", ""), mapping.get("scales", {})
    if scale and (not isinstance(scales, Mapping) or scale not in scales):
        raise BadInput(f"{path}: scale", f"one of {', '.join(scales) or 'none'}", scale, "Choose one that `scales` has.")
    if scale:
        mapping = configuration.apply_overrides(_over(mapping, scales[scale]), words)
    return configuration.load(CampaignConfig, mapping, path)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The one mapping with the other's keys set, group by group; a key of `search` is taken whole."""
    result = dict(below)
    for key, value in above.items():
        if key == "search":
            result[key] = {**result.get(key, {}), **value}
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _over(result[key], value)
        else:
            result[key] = value
    return result


# ---------------------------------------------------------------- taken up again


def changes(before: Mapping[str, Any], now: CampaignConfig) -> list[str]:
    """What differs between a campaign's record and a campaign, in words; keys that change no trial are left out."""
    was, new = _dotted(before), _dotted(plain(now))
    return [f"{key} ({was.get(key)} there, {new.get(key)} now)" for key in sorted({*was, *new}) if was.get(key) != new.get(key)]


def _dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if key not in (*_FREE, "search", "scale", "scales")}
    return {**dict(flat(kept)), **{f"search.{key}": value for key, value in tree.get("search", {}).items()}}


def check_extends(before: Mapping[str, Any], now: CampaignConfig) -> None:
    """BadInput unless the campaign only adds to its record: more trials, further values, wider ranges."""
    was = {key: Dimension.parse(key, spec) for key, spec in before.get("search", {}).items()}
    is_ = {dimension.key: dimension for dimension in now.dimensions}
    lost = [key for key in was if key not in is_] + [key for key in is_ if key not in was]
    lost += [key for key, old in was.items() if key in is_ and not all(is_[key].holds(value) for value in old.values)]
    other = [text for text in changes(before, now) if not text.startswith(("search.", "trials "))]
    if lost or other or now.trials < before.get("trials", 0):
        searched = [f"search.{key} ({before['search'].get(key)} there, {now.search.get(key)} now)" for key in lost]
        got = "; ".join([*searched, *other]) or f"trials {now.trials} instead of {before.get('trials')}"
        expected = "the same keys with more trials, further values or wider ranges"
        raise BadInput("--extend", expected, got, "Give another folder as `out`.")


# ---------------------------------------------------------------- trials with their shards


@dataclass(frozen=True)
class Trials:
    """The campaign's runs, fitted to the shards: their steps, when they validate, when they report."""

    config: CampaignConfig
    manifest: Manifest

    def run(self, point: Mapping[str, Any]) -> TrainConfig:
        """A point's run; IoU is taken as often as the trial reports, unless the campaign says how often."""
        run = self.config.trial(point).resolved(self.manifest)
        if not run.validation.shards or run.validation.every_steps != ValidationConfig().every_steps:
            return run
        every = max(1, run.steps // self.config.reports)
        return replace(run, validation=replace(run.validation, every_steps=every))

    def milestones(self, run: TrainConfig) -> dict[int, int]:
        """After how many steps a trial reports, by the report's number k of R: about k/R of its length.

        A run of fewer steps than R leaves some out. Populations report after equally many steps, when their states are filed.
        """
        count = self.config.reports
        if self.config.scheduler == "pbt":
            return {k: min(run.steps, k * math.ceil(run.steps / count)) for k in range(1, count + 1)}
        ends = {math.ceil(run.steps * k / count): k for k in range(1, count + 1)}
        return {k: step for step, k in ends.items()}

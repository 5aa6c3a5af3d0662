"""Which point is tried next: a pure function of the campaign, the trial's number and what is known by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from raysegment.applications.campaign.journal import FINISHED, Record
from raysegment.applications.campaign.measures import mode
from raysegment.applications.campaign.space import CampaignConfig, Dimension, Point

_BY_CHANCE = 8  # points before TPE begins to model


def propose(config: CampaignConfig, number: int, known: Sequence[Record]) -> Point:
    """The point of trial `number`, where `known` are the trials proposed before it."""
    if config.searcher == "grid":
        tried, points = [record.asked for record in known], list(config.grid)
        order = np.random.default_rng(config.seed).permutation(len(points))  # the poor ones first would all look good at first
        return next(points[k] for k in order if points[k] not in tried)
    if config.searcher == "optuna":
        return _tpe(config, number, known)
    random = np.random.default_rng([config.seed, number])
    return {dimension.key: dimension.draw(random) for dimension in config.dimensions}


def _tpe(config: CampaignConfig, number: int, known: Sequence[Record]) -> Point:
    """By the tree of Parzen estimators (Bergstra et al. 2011) of a study that has seen the known trials; those still under way
    count as poor (constant liar), those stopped by what they had reached."""
    study = make_study(config, known, optuna.samplers.TPESampler(
        seed=config.seed * 100003 + number, n_startup_trials=_BY_CHANCE, constant_liar=True
    ))  # fmt: skip
    asked = study.ask({dimension.key: distribution(dimension) for dimension in config.dimensions})
    return {dimension.key: _value(dimension, asked.params[dimension.key]) for dimension in config.dimensions}


def distribution(dimension: Dimension) -> BaseDistribution:
    """As Optuna wants it; of choices it knows the numbers, so that a choice may be a list."""
    if dimension.kind == "choice":
        return CategoricalDistribution(tuple(range(len(dimension.values))))
    if dimension.kind == "integer":
        return IntDistribution(int(dimension.values[0]), int(dimension.values[1]))
    return FloatDistribution(float(dimension.values[0]), float(dimension.values[1]), log=dimension.kind == "log")


def _value(dimension: Dimension, asked: Any) -> Any:
    return dimension.values[asked] if dimension.kind == "choice" else asked


def make_study(
    config: CampaignConfig, known: Sequence[Record], sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    """The trials as an Optuna study."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, direction="minimize" if mode(config.metric) == "min" else "maximize")
    study.add_trials([_as_trial(config, record) for record in known])
    return study


def _as_trial(config: CampaignConfig, record: Record) -> optuna.trial.FrozenTrial:
    values = {report["k"]: float(report["value"]) for report in record.reports}
    if record.status == FINISHED:
        return make_trial(config, record.asked, TrialState.COMPLETE, values[max(values)], values)
    return make_trial(config, record.asked, TrialState.PRUNED if record.status else TrialState.RUNNING, None, values)


def make_trial(
    config: CampaignConfig, point: Point, state: TrialState, value: float | None, values: dict[int, float] | None = None
) -> optuna.trial.FrozenTrial:
    """A point as a trial of an Optuna study."""
    params = {d.key: d.values.index(point[d.key]) if d.kind == "choice" else point[d.key] for d in config.dimensions}
    distributions = {dimension.key: distribution(dimension) for dimension in config.dimensions}
    return create_trial(state=state, params=params, distributions=distributions, value=value, intermediate_values=values or {})


class Proposals(Searcher):
    """Gives Tune first the trials that wait, then new ones as `more` makes them (None: no more)."""

    def __init__(self, waiting: Sequence[Record], more: Callable[[], Record | None]):
        super().__init__()
        self._waiting, self._more = list(waiting), more

    def suggest(self, trial_id: str) -> Any:
        record = self._waiting.pop(0) if self._waiting else self._more()
        if record is None:
            return Searcher.FINISHED
        return {"trial": record.trial, "number": record.number, "point": record.point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The journal has heard of it through the scheduler."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a campaign goes on from its journal."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_more": None}

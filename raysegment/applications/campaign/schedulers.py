"""Ray Tune's schedulers, each of whose decisions is in the journal before it takes effect, and which recall earlier sessions.

Tune's own restored experiment has a scheduler that has forgotten everything: it is not part of Tune's state (`TuneController`
leaves it out; Ray 2.60). A campaign therefore begins a new experiment each time and tells the scheduler what is on record.
HyperBand's brackets cannot be told, so there every trial enters again and reads its log aloud, which trains nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from raysegment.applications.campaign.journal import DIVERGED, FAILED, FINISHED, STOPPED, Journal, Record
from raysegment.applications.campaign.measures import mode
from raysegment.applications.campaign.space import CampaignConfig

_SHOWN = ("k", "step", "value", "loss", "iou", "segment", "ends")


class StandIn:
    """A trial of an earlier session, for schedulers that only ask its name."""

    def __init__(self, record: Record):
        self.trial_id = record.trial


class Watched:
    """In front of one of Tune's schedulers: writes down what it is told and what it decides."""

    journal: Journal
    last: int  # the number of a trial's last report
    left: Callable[[Record], None]

    def watch(self, journal: Journal, last: int, left: Callable[[Record], None]) -> Any:
        """`left` is called when a trial's process is about to end by a decision."""
        self.journal, self.last, self.left = journal, last, left
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "left": None}

    def recall(self, record: Record, trial: Any) -> None:
        """Know an earlier session's readings of a trial; its decisions stand."""

    def told(self, record: Record) -> int:
        """Up to which report the trial need not report again."""
        return record.told

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)  # pyright: ignore[reportAttributeAccessIssue]
        name = self.journal.names.get(trial.trial_id) or trial.config["trial"]
        record = self.journal.records[name]
        self.journal.write("added", trial=name, tune=trial.trial_id, told=self.told(record))
        self.recall(record, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = self._decide(tune_controller, trial, result)
        if decision != TrialScheduler.CONTINUE:
            self.left(self._record(trial))
        return decision

    def _decide(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        record = self._record(trial)
        if result["ends"]:
            self._end(record, result, DIVERGED if result["diverged"] else FAILED, result["ends"])
            return TrialScheduler.STOP
        decision = super().on_trial_result(tune_controller, trial, result)  # pyright: ignore[reportAttributeAccessIssue]
        if result["k"] >= self.last:
            self._end(record, result, FINISHED)
            return TrialScheduler.STOP
        if decision == TrialScheduler.STOP:
            self._end(record, result, STOPPED, "worse than others after as many steps")
        else:
            self._report(record, result)
        return decision

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_remove(tune_controller, trial)  # pyright: ignore[reportAttributeAccessIssue]
        record = self._record(trial)
        if not record.status:  # stopped while it was paused
            step = record.last.get("step", 0)
            self.journal.write("ended", trial=record.trial, status=STOPPED, reason="not promoted", step=step)

    def _record(self, trial: Trial) -> Record:
        return self.journal.records[self.journal.names[trial.trial_id]]

    def _report(self, record: Record, result: Mapping[str, Any]) -> None:
        shown = {key: result.get(key) for key in _SHOWN}
        self.journal.write("report", trial=record.trial, **shown, point=json.loads(result["point"]))

    def _end(self, record: Record, result: Mapping[str, Any], status: str, reason: str = "") -> None:
        """Reading and end, unless it had ended before and only reads its log aloud."""
        if not record.status:
            self._report(record, result)
            self.journal.write("ended", trial=record.trial, status=status, reason=reason, step=result["step"])


class Fifo(Watched, FIFOScheduler):
    """Every trial finishes."""


class Asha(Watched, ASHAScheduler):
    """Asynchronous successive halving."""

    def recall(self, record: Record, trial: Any) -> None:
        if isinstance(trial, StandIn):
            ASHAScheduler.on_trial_add(self, None, trial)  # pyright: ignore[reportArgumentType]
        for report in record.reports:
            ASHAScheduler.on_trial_result(self, None, trial, report)  # pyright: ignore[reportArgumentType]


class Median(Watched, MedianStoppingRule):
    """The median stopping rule."""

    def recall(self, record: Record, trial: Any) -> None:
        self._results[trial].extend(record.reports)  # its on_trial_result may decide anew, and does not bear a second decision


class HyperBand(Watched, HyperBandScheduler):
    """Brackets of successive halving; trials wait, paused, for the others of their bracket."""

    def told(self, record: Record) -> int:
        return 0


class Population(Watched, PopulationBasedTraining):
    """Population-based training."""


def make_scheduler(
    config: CampaignConfig, journal: Journal, name: str = "", left: Callable[[Record], None] = lambda _: None
) -> Any:
    """The scheduler `name` (that of the campaign unless given), knowing the ended trials of the search."""
    name, last = name or config.scheduler, config.reports
    judged: dict[str, Any] = {"time_attr": "k", "metric": "value", "mode": mode(config.metric)}
    if name == "fifo":
        scheduler = Fifo()
    elif name == "asha":
        scheduler = Asha(max_t=last, grace_period=_grace(config), reduction_factor=config.reduction, **judged)
    elif name == "median":  # the rule pauses trials while it has too few samples, unless a time slice never ends
        scheduler = Median(grace_period=_grace(config), min_time_slice=math.inf, **judged)  # pyright: ignore[reportArgumentType]
    elif name == "hyperband":
        scheduler = HyperBand(max_t=last, reduction_factor=config.reduction, **judged)
    else:
        scheduler = _population(config, judged)
    scheduler.watch(journal, last, left)
    for record in journal.of("search") if name in ("asha", "median") else ():
        if record.status:
            scheduler.recall(record, StandIn(record))
    return scheduler


def _grace(config: CampaignConfig) -> int:
    return max(1, round(config.reports * config.grace))


def _population(config: CampaignConfig, judged: dict[str, Any]) -> Population:
    bounds = {dimension.key: dimension for dimension in config.dimensions}

    def keep_inside(values: dict[str, Any]) -> dict[str, Any]:
        return {key: bounds[key].clipped(value) if key in bounds else value for key, value in values.items()}

    return Population(
        perturbation_interval=1, quantile_fraction=config.quantile, log_config=False, custom_explore_fn=keep_inside,
        hyperparam_mutations={key: dimension.mutation for key, dimension in bounds.items()}, **judged,
    )  # fmt: skip


class Failures(Callback):
    """Tells the journal of trials whose process ended otherwise than by a decision."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record = self._record(trial)
        self.journal.write("resumed", trial=record.trial, step=record.last.get("step", 0), why="its driver ended")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        record, error = self._record(trial), str(trial.get_error() or "its driver ended again and again")
        if not record.status:
            reason = error.strip().splitlines()[-1][:500]
            self.journal.write("ended", trial=record.trial, status=FAILED, reason=reason, step=record.last.get("step", 0))

    def _record(self, trial: Trial) -> Record:
        return self.journal.records[self.journal.names[trial.trial_id]]

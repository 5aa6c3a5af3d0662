"""What runs in a trial's own process: train, and tell Tune at fixed numbers of steps how it goes.

A reading is a pure function of the trial's log, so that it is the same whenever it is made: a trial that is started again
reads aloud what its log already holds, and trains only when the scheduler wants more.
"""

from __future__ import annotations

import json
import threading
from typing import Any

from filelock import FileLock
from ray import tune

from raysegment.applications.campaign.journal import find_trial
from raysegment.applications.campaign.measures import WORST, Reading, is_validated, mode, read
from raysegment.applications.campaign.population import Bridge, Segment, filed, segment_run, send, take_segment
from raysegment.applications.campaign.space import CampaignConfig, Trials
from raysegment.applications.campaign.sweeper import remove
from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import step_name
from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.settings import TrainConfig
from raysegment.elastic.train import train

JOURNAL = "journal.jsonl"
_HANDOVER_S = 120.0  # the driver of an earlier life of the trial ends within this


def run_trial(settings: dict[str, Any], campaign: CampaignConfig) -> None:
    """`settings` are Tune's; who the trial is, the journal knows (an exploit copies the donor's settings, name and all)."""
    proposed, added = find_trial(campaign.folder / JOURNAL, str(tune.get_context().get_trial_id()))
    bridge = Bridge.of(tune.get_checkpoint())
    reporter = _reporter(campaign, settings, proposed, added["told"], bridge)
    _await_predecessor(reporter.run)
    try:
        reporter.look()
        train(reporter.run, lambda *_: reporter.look())
        reporter.look(last=True)
    except (BadInput, RuntimeError) as error:  # what trying again does not mend
        reporter.fail(f"{type(error).__name__}: {error}")


def _reporter(
    campaign: CampaignConfig, settings: dict[str, Any], proposed: dict[str, Any], told: int, bridge: Bridge | None
) -> Reporter:
    trial, point = proposed["trial"], proposed["point"]
    seed = {} if proposed["seed"] is None else {"learn.seed": proposed["seed"]}
    trials = Trials(campaign, Manifest.load(campaign.trial({**point, **seed}).shards))
    own = bridge.k if bridge is not None and bridge.trial == trial else 0
    if campaign.scheduler == "pbt" and proposed["phase"] == "search":
        mine = {key: settings[key] for key in campaign.search}
        segment = take_segment(trials, trial, mine, bridge)
        return Reporter(campaign, trials, trial, segment, segment_run(trials, trial, segment), max(own, segment.k))
    return Reporter(campaign, trials, trial, Segment(point=point), trials.run({**point, **seed}), max(told, own))


def _await_predecessor(run: TrainConfig) -> None:
    """Until nobody else works on the run (a driver that was paused or killed may still be ending); its room is given back."""
    folder = Run(run.out).folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "fleet.lock", timeout=_HANDOVER_S):
        remove(folder)


class Reporter:
    """Reads the log of a run and reports the milestones that it has passed, in order, each once."""

    def __init__(self, campaign: CampaignConfig, trials: Trials, trial: str, segment: Segment, run: TrainConfig, told: int):
        self.campaign, self.trial, self.segment, self.run = campaign, trial, segment, run
        self._due = [(k, step) for k, step in trials.milestones(run).items() if k > told]
        self._k = told
        self._steps: list[dict[str, Any]] = []
        self._offset = 0
        self._lock = threading.Lock()

    def look(self, last: bool = False) -> None:
        """Report what has been passed; `last`: training is over, nothing more will come."""
        with self._lock:
            lines, self._offset = read_lines(Run(self.run.out).steps, self._offset)
            self._steps += lines
            while self._due and self._passed(self._due[0][1], last):
                k, step = self._due.pop(0)
                self._report(k, self._read(step))

    def fail(self, reason: str) -> None:
        """Tell Tune that the trial cannot go on."""
        with self._lock:
            worst = WORST if mode(self.campaign.metric) == "min" else -WORST
            done = self._steps[-1]["step"] + 1 if self._steps else 0
            self._tell(max(1, self._k), Reading(done, worst, float("inf"), float("nan"), reason), diverged=False)

    def _passed(self, step: int, last: bool) -> bool:
        done = self._steps[-1]["step"] + 1 if self._steps else 0
        if done < step or (step == self.run.steps and not last):  # a decision on the last reading ends the trial's process:
            return False  # its final checkpoint and summary come first
        if last:
            return True
        if self.run.validation.shards and is_validated(self.campaign.metric) and not self._validated(step):
            return False
        every = self.run.checkpoint.every_steps  # a population's states are filed before others may want them
        if self.campaign.scheduler != "pbt" or done >= min(self.run.steps, step + every):
            return True
        return filed(self.run, step).endswith(step_name(step))

    def _validated(self, step: int) -> bool:
        every = self.run.validation.every_steps
        due = step // every * every
        return not due or any(e["event"] == "validation" and e["step"] == due for e in Run(self.run.out).read_events())

    def _read(self, step: int) -> Reading:
        config = self.campaign
        return read(config.metric, config.target, config.diverged, step, self._steps, Run(self.run.out).read_events())

    def _report(self, k: int, reading: Reading) -> None:
        self._k = k
        self._tell(k, reading, diverged=bool(reading.ends))

    def _tell(self, k: int, reading: Reading, diverged: bool) -> None:
        metrics = {
            "k": k, "value": reading.value, "step": reading.step, "loss": reading.loss, "iou": reading.iou,
            "ends": reading.ends, "diverged": diverged, "segment": self.segment.number,
            "point": json.dumps(self.segment.point),  # as text: Tune would flatten it
        }  # fmt: skip
        file = filed(self.run, reading.step) if self.campaign.scheduler == "pbt" else ""
        send(metrics, Bridge(self.trial, k, file))

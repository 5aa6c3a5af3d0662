"""How a trial goes on from another's weights: a new segment of its life, in a run folder of its own.

    trials/NAME/segment-00/     as the trial was proposed
    trials/NAME/segment-01/     begins with the donor's checkpoint and log up to there, and perturbed values; origin.json is
                                written last and makes the segment official

Between Tune and training passes a small Tune checkpoint, the bridge: it names the trial's own committed checkpoint file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune

from raysegment.applications.campaign.space import Point, Trials
from raysegment.archive.files import committed
from raysegment.elastic.checkpoints import list_checkpoints, read_checkpoint, write_checkpoint
from raysegment.elastic.runs import Run, read_lines
from raysegment.elastic.safe import step_of
from raysegment.elastic.settings import TrainConfig, plain

_ORIGIN, _BRIDGE = "origin.json", "bridge.json"


@dataclass(frozen=True)
class Bridge:
    """What a Tune checkpoint says: the trial, how many reports it had made, the checkpoint file of its state ("" none)."""

    trial: str
    k: int
    checkpoint: str = ""

    def save(self, folder: str | Path) -> Any:
        (Path(folder) / _BRIDGE).write_text(json.dumps(asdict(self)))
        return tune.Checkpoint.from_directory(str(folder))

    @staticmethod
    def of(checkpoint: Any) -> Bridge | None:
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return Bridge(**json.loads((Path(folder) / _BRIDGE).read_text()))


@dataclass(frozen=True)
class Segment:
    """A stretch of a trial's life with one set of values; begun from `donor`'s `checkpoint` at `step`, after its report `k`."""

    number: int = 0
    point: Point = field(default_factory=dict)
    donor: str = ""
    checkpoint: str = ""
    step: int = 0
    k: int = 0


def segment_run(trials: Trials, trial: str, segment: Segment) -> TrainConfig:
    """The segment's run: its state is filed whenever it reports, and no file is deleted (another trial may want it)."""
    run = trials.run(segment.point)
    every = trials.milestones(run)[1]
    checkpoint = replace(run.checkpoint, every_steps=every, every_s=0.0, keep=trials.config.reports + 1, place="")
    out = f"{trials.config.out}/trials/{trial}/segment-{segment.number:02d}"
    return replace(run, out=out, name=f"{trial}-{segment.number}", checkpoint=checkpoint)


def segments(folder: Path) -> list[Segment]:
    """A trial's segments, oldest first."""
    return [Segment(**json.loads(path.read_text())) for path in sorted(folder.glob(f"segment-*/{_ORIGIN}"))]


def take_segment(trials: Trials, trial: str, point: Mapping[str, Any], bridge: Bridge | None) -> Segment:
    """The segment to work on: the newest, or a new one where the bridge comes from another trial and is not crossed yet."""
    known = segments(trials.config.folder / "trials" / trial)
    if not known:
        known = [_commit(trials, trial, Segment(0, dict(point)))]
    newest = known[-1]
    if bridge is None or bridge.trial == trial or not bridge.checkpoint:
        return newest
    if (newest.checkpoint, newest.point) == (bridge.checkpoint, dict(point)):
        return newest
    step = step_of(bridge.checkpoint)
    return _graft(trials, trial, Segment(newest.number + 1, dict(point), bridge.trial, bridge.checkpoint, step, bridge.k))


def _graft(trials: Trials, trial: str, segment: Segment) -> Segment:
    """A segment whose first checkpoint is the donor's: the same tensors, this trial's configuration."""
    run = segment_run(trials, trial, segment)
    shutil.rmtree(run.out, ignore_errors=True)  # one that was begun and is not official
    found = read_checkpoint(segment.checkpoint)
    provenance = {**found.facts.provenance, "config": plain(run), "run": run.name, "taken_from": segment.checkpoint}
    write_checkpoint(run.checkpoint_place, replace(found.facts, provenance=provenance), found.weights, found.state)
    _copy_log(Run(Path(segment.checkpoint).parents[1]), Run(run.out), segment.step)
    return _commit(trials, trial, segment)


def _copy_log(donor: Run, own: Run, step: int) -> None:
    """The lines of the steps that led to the donor's state: they led to this trial's as well."""
    lines = [line for line in read_lines(donor.steps)[0] if line["step"] < step]
    with committed(own.steps) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for event in donor.read_events():
        if event["event"] == "validation" and event["step"] <= step:
            own.event("validation", **{key: value for key, value in event.items() if key not in ("time", "event")})


def _commit(trials: Trials, trial: str, segment: Segment) -> Segment:
    with committed(Path(segment_run(trials, trial, segment).out) / _ORIGIN) as temporary:
        temporary.write_text(json.dumps(asdict(segment)))
    return segment


def filed(run: TrainConfig, step: int) -> str:
    """The newest published checkpoint of at most `step` steps, "" where there is none."""
    paths = [str(path) for path in list_checkpoints(run.checkpoint_place) if step_of(path) <= step]
    return paths[-1] if paths else ""


def send(metrics: dict[str, Any], bridge: Bridge) -> None:
    """Report to Tune, with the bridge as checkpoint; returns when the scheduler has decided to go on."""
    with TemporaryDirectory() as folder:
        tune.report(metrics, checkpoint=bridge.save(folder))

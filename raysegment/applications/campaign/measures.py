"""What a trial's own files say about it after so many steps: a pure function of the log, whenever it is asked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysegment.climate.channels import CLASSES
from raysegment.climate.checks import BadInput

VALIDATED = ("mean_iou", "mlperf_iou", *(f"iou_{name}" for name in CLASSES))
METRICS = ("loss", *VALIDATED, "seconds_to_iou")
WORST = 1e9  # schedulers compare numbers: what is not finite, or never comes, is this bad

Lines = Sequence[Mapping[str, Any]]


def check_metric(metric: str, target: float) -> None:
    """BadInput unless the trainer can report it."""
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, 1)
        remedy = f"Did you mean `{close[0]}`?" if close else "Choose one of those."
        raise BadInput("metric", f"one that the trainer reports: {', '.join(METRICS)}", metric, remedy)
    if metric == "seconds_to_iou" and not 0 < target < 1:
        raise BadInput("target", "a mean IoU between 0 and 1 with metric seconds_to_iou", target, "Write `target: 0.5`.")


def is_validated(metric: str) -> bool:
    """Whether the metric needs tiles to validate on."""
    return metric != "loss"


def mode(metric: str) -> str:
    """Whether less is better ("min") or more ("max")."""
    return "min" if metric in ("loss", "seconds_to_iou") else "max"


@dataclass(frozen=True)
class Reading:
    """A trial after `step` steps: the metric's `value`, `loss`, validation's mean `iou` (NaN without), why it `ends` or ""."""

    step: int
    value: float
    loss: float
    iou: float
    ends: str = ""


def read(metric: str, target: float, factor: float, step: int, steps: Lines, events: Lines) -> Reading:
    """The reading after `step` steps; what lies later in the log is not looked at. `factor` is that of divergence."""
    steps = [line for line in steps if line["step"] < step]
    tests = [event for event in events if event["event"] == "validation" and event["step"] <= step]
    loss, first = recent_loss(steps), first_loss(steps)
    iou = tests[-1]["mean_iou"] if tests and tests[-1]["mean_iou"] is not None else math.nan
    ends = ""
    if not math.isfinite(loss):
        ends = f"the loss is not finite after {step} steps"
    elif loss > factor * first:
        ends = f"the loss diverged: {loss:.3g} after {step} steps, {first:.3g} at first"
    return Reading(step, _value(metric, target, loss, steps, tests), loss, iou, ends)


def _value(metric: str, target: float, loss: float, steps: Lines, tests: Lines) -> float:
    if metric == "loss":
        return loss if math.isfinite(loss) else WORST
    if metric == "seconds_to_iou":
        reached = next((test["step"] for test in tests if (test["mean_iou"] or 0) >= target), None)
        return WORST if reached is None else sum(line["step_s"] for line in steps if line["step"] < reached)
    if not tests:
        return -WORST
    if metric.startswith("iou_"):
        found = tests[-1]["iou"][CLASSES.index(metric.removeprefix("iou_"))]
    else:
        found = tests[-1]["mean_iou" if metric == "mean_iou" else "mlperf"]
    return -WORST if found is None else float(found)


def recent_loss(steps: Lines) -> float:
    """Mean loss of the last tenth of the steps, at least one; infinite when one of them was not finite, or there is none."""
    losses = [step["loss"] for step in steps[-max(1, len(steps) // 10) :]]
    return sum(losses) / len(losses) if losses and None not in losses else math.inf


def first_loss(steps: Lines) -> float:
    """The first finite loss, that of fresh weights (a mean over more steps may hold the divergence); infinite without one."""
    return next((step["loss"] for step in steps if step["loss"] is not None), math.inf)

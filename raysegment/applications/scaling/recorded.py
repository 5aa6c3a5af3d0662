"""What failures and saving cost in runs that have been: figures of `goodput.Faults`, told from the runs' own files alone. Pure.

Step lines say when a step was certain and in which generation; events when somebody was lost, came, or was found again. With
u the usual time between steps of a generation (the median), and a generation that follows upon another

    loss     some are lost, others go on: detection_s = gap − u − redone_steps · u, gap from its last step to the next one's
    growth   somebody joins: joining_s = gap − u;  back_s from the loss until somebody of the same cell has a place
    all      nobody of the old generation goes on: all_back_s = gap − u

Gaps in which the command itself was started again are left out: how long nobody did that, no model can tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from raysegment.applications.scaling.goodput import Faults

Line = Mapping[str, Any]
HALF = 0.5  # of a step is lost, on average, when one is broken off
_MANY = 10  # failures, from which on the share that took all members is theirs
_DEFAULTS = Faults()
FIGURES = (*(field.name for field in fields(Faults)), "checkpoint_s")


@dataclass(frozen=True)
class Recorded:
    """`values` of figures that runs could tell, of each in `sources` what it comes from in words."""

    values: dict[str, float]
    sources: dict[str, str]

    def source(self, figure: str, given: Iterable[str] = ()) -> str:
        """Where a figure is from: given, the run, or the default."""
        return "given" if figure in given else self.sources.get(figure, "default")


NOTHING = Recorded({}, {})


@dataclass(frozen=True)
class History:
    """A run's events and step lines, in order."""

    events: Sequence[Line]
    steps: Sequence[Line]

    @property
    def generations(self) -> list[Line]:
        return [event for event in self.events if event["event"] == "generation"]

    @property
    def injected(self) -> int:
        """Faults that were inflicted on purpose, as far as the run knows."""
        return sum(event["event"] == "fault" for event in self.events)

    @property
    def member_hours(self) -> float:
        """Hours of training, of each member."""
        return sum(step["step_s"] * step["world"] for step in self.steps) / 3600

    def steps_of(self, generation: int) -> list[Line]:
        return [step for step in self.steps if step["generation"] == generation]

    def between(self, kind: str, since: float, until: float) -> list[Line]:
        """Events of a kind in a stretch of time."""
        return [event for event in self.events if event["event"] == kind and since < event["time"] <= until]


def read(histories: Sequence[History]) -> Recorded:
    """The figures of one or several runs together."""
    samples: dict[str, list[float]] = defaultdict(list)
    for history in histories:
        for name, value in _changes(history):
            samples[name].append(value)
    samples["checkpoint_s"] = [stall for one in histories for stall in _stalls(one)]
    values = {name: fmean(found) for name, found in samples.items() if found}
    sources = {name: f"run: mean of {len(samples[name])}" for name in values}
    for found in (_capture(histories), _rate(histories, samples), _all_share(samples)):
        values |= {name: value for name, (value, _) in found.items()}
        sources |= {name: source for name, (_, source) in found.items()}
    return Recorded({name: values[name] for name in FIGURES if name in values}, sources)


# ---------------------------------------------------------------- one change of generation after the other


def _changes(history: History) -> Iterable[tuple[str, float]]:
    """(figure, value) of whatever happened between one generation with steps and the next one."""
    stepped = [one for one in history.generations if history.steps_of(one["generation"])]
    for old, new in pairwise(stepped):
        last, first = history.steps_of(old["generation"])[-1], history.steps_of(new["generation"])[0]
        if history.between("start", last["time"], first["time"]):
            continue
        before_s, after_s = _usual_s(history, old), _usual_s(history, new)
        yield from _change(history, old, new, first["time"] - last["time"], before_s, after_s)


def _change(
    history: History, old: Line, new: Line, gap_s: float, before_s: float, after_s: float
) -> Iterable[tuple[str, float]]:
    """What one gap of `gap_s` between steps cost, whose usual time was `before_s` and is `after_s`."""
    lost = [event for event in history.between("lost", old["time"], new["time"]) if event["rank"] is not None]
    if not set(old["members"]) & set(new["members"]):
        yield "all_back_s", max(0.0, gap_s - after_s)
    elif lost:
        redone = HALF + new["repeated"]
        yield "redone_steps", redone
        yield "detection_s", max(0.0, gap_s - after_s - redone * before_s)
        yield from (("back_s", back_s) for event in lost if (back_s := _back_s(history, event)) is not None)
    elif new["joined"]:
        yield "joining_s", max(0.0, gap_s - after_s)


def _back_s(history: History, lost: Line) -> float | None:
    """Seconds until somebody of a lost member's cell had a place again."""
    cell = str(lost["member"]).partition(".")[0]
    for one in history.generations:
        if one["time"] > lost["time"] and cell in {str(uid).partition(".")[0] for uid in one["joined"]}:
            return float(one["time"] - lost["time"])
    return None


def _usual_s(history: History, generation: Line) -> float:
    """Median seconds of a generation's steps after its first; of all steps where it has no other."""
    times = [step["step_s"] for step in history.steps_of(generation["generation"])[1:]]
    return median(times or [step["step_s"] for step in history.steps])


# ---------------------------------------------------------------- over whole runs


def _stalls(history: History) -> list[float]:
    """Seconds that training stood still for copies of its state, each time."""
    return [step["checkpoint_s"] for step in history.steps if step["checkpoint_s"] > 0]


def _capture(histories: Sequence[History]) -> dict[str, tuple[float, str]]:
    steps = [step for one in histories for step in one.steps]
    whole = sum(step["step_s"] for step in steps)
    if not whole:
        return {}
    share = sum(step["checkpoint_s"] for step in steps) / whole
    return {"capture_share": (share, f"run: copies of state in {len(steps)} steps")}


def _rate(histories: Sequence[History], samples: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, str]]:
    """Failures of an hour: of those counted, and the usual rate as if one had been seen at it (a Gamma prior of shape 1)."""
    hours = sum(one.member_hours for one in histories)
    if any(one.injected for one in histories) or not hours:
        return {}
    failures = len(samples.get("detection_s", ())) + len(samples.get("all_back_s", ()))
    rate = (1 + failures) / (1 / _DEFAULTS.per_gpu_hour + hours)
    return {"per_gpu_hour": (rate, f"run: {failures} failures in {hours:.3g} hours of members, with the default as prior")}


def _all_share(samples: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, str]]:
    one, everybody = len(samples.get("detection_s", ())), len(samples.get("all_back_s", ()))
    if one + everybody < _MANY:
        return {}
    return {"all_share": (everybody / (one + everybody), f"run: {everybody} of {one + everybody} failures")}

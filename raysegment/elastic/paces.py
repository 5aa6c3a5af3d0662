"""How long members need for their own part of a step, and which of them need much longer than is usual."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median

STEPS, FACTOR = 20, 3.0  # over so many steps, a straggler needs more than so many times the median


@dataclass
class Pace:
    """A member's newest steps: seconds of waiting for tiles and of computing, per micro-batch."""

    load_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    compute_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS))

    def add(self, step: Mapping[str, float]) -> None:
        """Take note of a step: `load_s`, `compute_s` and the number of `micro_batches` they were for."""
        self.steps_s.append(step["load_s"] + step["compute_s"])
        if step["micro_batches"]:  # a member without a share has no pace
            self.load_s.append(step["load_s"] / step["micro_batches"])
            self.compute_s.append(step["compute_s"] / step["micro_batches"])

    @property
    def count(self) -> int:
        return len(self.steps_s)

    @property
    def step_s(self) -> float:
        """Median seconds of its part of a step."""
        return median(self.steps_s)

    @property
    def full(self) -> bool:
        return len(self.compute_s) == STEPS

    def clear(self) -> None:
        for times in (self.load_s, self.compute_s, self.steps_s):
            times.clear()


@dataclass(frozen=True)
class Straggler:
    """A member that needed `factor` times the median of all over the last steps; `cause`: "load" or "compute"."""

    uid: str
    factor: float
    load_share: float
    cause: str


def find_stragglers(paces: Mapping[str, Pace]) -> Iterator[Straggler]:
    """Members more than `FACTOR` times slower per micro-batch than the median of the others; found ones are counted anew."""
    full = {uid: fmean(pace.load_s) + fmean(pace.compute_s) for uid, pace in paces.items() if pace.full}
    ordered = sorted(full.values())
    for uid, seconds in full.items():
        usual = _median_without(ordered, seconds)
        if usual > 0 and seconds > FACTOR * usual:
            yield _straggler(uid, paces[uid], seconds / usual, [paces[other] for other in full if other != uid])
            paces[uid].clear()


def _median_without(ordered: list[float], value: float) -> float:
    """Median of all but one value of an ordered list, which need not be gone through for it; the value where it is alone."""
    rest, left_out = len(ordered) - 1, bisect_left(ordered, value)
    if not rest:
        return value

    def at(place: int) -> float:
        return ordered[place + (place >= left_out)]

    return (at((rest - 1) // 2) + at(rest // 2)) / 2


def _straggler(uid: str, pace: Pace, factor: float, others: list[Pace]) -> Straggler:
    load, compute = fmean(pace.load_s), fmean(pace.compute_s)
    usual_load, usual_compute = (median(fmean(times) for times in kind) for kind in
                                 ([p.load_s for p in others], [p.compute_s for p in others]))  # fmt: skip
    cause = "load" if load - usual_load > compute - usual_compute else "compute"
    return Straggler(uid, factor, load / (load + compute), cause)

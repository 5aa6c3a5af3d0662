"""What strikes did to runs, told from the runs' own files alone: pure, so that it can be tested with written histories.

Steps carry the time at which they were certain and the generation that did them. For a strike at time t in generation g

    recovery_s    from t to the first step of a generation after g; for kinds that break no generation, to the next step
    join_s        from t (for a node: from when it was there again) to the first step of a generation that somebody from the
                  same cell has joined
    join_cost_s   how much longer than usual that step took to come after the one before it
    exit_s        of `term`: from t until the command had ended; of `drain`: until training went on without the node
    lost          steps that had been logged and were computed again by generations formed until the recovery
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from raysegment.applications.strikes import DEADLY, GENTLE, Strike

_USUAL_OVER = 20  # steps

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Effect:
    """What came of a strike; None for what did not happen before the run ended."""

    strike: Strike
    recovery_s: float | None
    join_s: float | None
    join_cost_s: float | None
    exit_s: float | None
    lost: int


def effect(strike: Strike, steps: Sequence[Line], events: Iterable[Line]) -> Effect:
    """See the top of this module. `steps` and `events` of the strike's round, in order."""
    generations = [event for event in events if event["event"] == "generation"]
    after = [step for step in steps if step["time"] > strike.time]
    new = (lambda _: True) if strike.kind in GENTLE else (lambda step: step["generation"] > strike.generation)
    recovered = next((step["time"] for step in after if new(step)), None)
    until = float("inf") if recovered is None else recovered
    lost = sum(one["repeated"] for one in generations if strike.time < one["time"] <= until)
    joined = _joined(strike, generations)
    first = None if joined is None else next((i for i, step in enumerate(steps) if step["generation"] == joined), None)
    since = strike.back if strike.kind in ("node", "drain") else strike.time
    ended = {"term": strike.back, "drain": recovered}.get(strike.kind)
    return Effect(
        strike,
        None if recovered is None else recovered - strike.time,
        None if first is None or since is None else steps[first]["time"] - since,
        None if not first else _cost(steps, first),
        None if ended is None else ended - strike.time,
        lost,
    )


def _joined(strike: Strike, generations: Sequence[Line]) -> int | None:
    """The first generation after a strike that somebody from the same cell has joined."""
    if strike.kind not in DEADLY:
        return None
    cells = {str(cell) for cell in strike.cells}
    for one in generations:
        if one["time"] > strike.time and cells & {uid.partition(".")[0] for uid in one["joined"]}:
            return int(one["generation"])
    return None


def _cost(steps: Sequence[Line], index: int) -> float:
    """How much later than usual a step came after the one before."""
    times = [step["time"] for step in steps[max(0, index - _USUAL_OVER) : index + 1]]
    gaps = [later - sooner for sooner, later in pairwise(times)]
    return gaps[-1] - median(gaps[:-1] or gaps)


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p95, max of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return {"p50": None, "p95": None, "max": None}
    return {"p50": float(np.percentile(known, 50)), "p95": float(np.percentile(known, 95)), "max": max(known)}


def account(effects: Sequence[Effect]) -> dict[str, Any]:
    """`recovery_s` and `join_s` of killed members and lost nodes; all kinds in `kinds`; `steps_lost_max`."""
    main = [one for one in effects if one.strike.kind in ("kill", "node")]
    kinds = dict.fromkeys(one.strike.kind for one in effects)
    return {
        "recovery_s": spread(one.recovery_s for one in main),
        "join_s": spread(one.join_s for one in main),
        "steps_lost_max": max((one.lost for one in effects), default=0),
        "kinds": {kind: _of_kind([one for one in effects if one.strike.kind == kind]) for kind in kinds},
    }


def _of_kind(effects: Sequence[Effect]) -> dict[str, Any]:
    return {
        "faults": len(effects),
        "fired": sum(one.strike.fired for one in effects),
        "recovery_s": spread(one.recovery_s for one in effects),
        "join_s": spread(one.join_s for one in effects),
        "join_cost_s": spread(one.join_cost_s for one in effects),
        "exit_s": spread(one.exit_s for one in effects),
        "steps_lost_max": max(one.lost for one in effects),
    }

"""What the control plane costs, from measured rounds with so many light members: a cost per member, and what it grows to.

    seconds(P) = fixed + per_member · P + per_square · P²         all three at least 0

fitted to relative errors; uncertainty by a bootstrap of the residuals (Efron 1979), which holds noise and misfit. The square
is there to be found: a coordinator that looks at all members for each of them is fine with hundreds and not with thousands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raysegment import config
from raysegment.archive.files import committed
from raysegment.climate.checks import BadInput
from raysegment.elastic.ladder import Ladder

# What is measured, each in seconds for all members together unless said
COSTS = {
    "join_s": "all come: from the first connection until all know their places",
    "loss_s": "one is lost: until all others know their new places",
    "grow_s": "one comes: until all know their new places",
    "join_cpu_s": "of that, the roster's processor",
    "loss_cpu_s": "the same",
    "grow_cpu_s": "the same",
    "beat_cpu_s": "roster's processor for one heartbeat of each member",
    "look_cpu_s": "roster's processor for one look at the clock",
    "step_cpu_s": "roster's processor for what all members say of one step",
    "straggler_cpu_s": "roster's processor for one look for stragglers",
    "plan_s": "one member plans its share of the tiles anew (nobody plans for others)",
    "placement_s": "the command decides which node holds which shards",
    "keep_s": "one node's keeper keeps a state, so many keeping on one machine",
    "find_s": "one member looks for the newest state among those that so many have kept on one machine",
}
LOOK_S, STRAGGLERS_S = 0.05, 2.0  # between a roster's looks at the clock, and for stragglers (elastic.roster)
_SEED, DRAWS = 0, 500
_FEW = 3  # members with which elastic figures were measured: goodput.Faults holds what those cost
_FULL = 0.95  # of a processor, at most


@dataclass(frozen=True)
class Cost:
    """Rounds of one measurement: `members` and `seconds` of each."""

    name: str
    members: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "seconds", tuple(self.seconds))
        good = len(self.members) == len(self.seconds) and all(0 <= s < math.inf for s in self.seconds)
        if self.name not in COSTS or not good or len(set(self.members)) < 2 or min(self.members) < 1:
            raise ValueError(f"expected a cost of {', '.join(COSTS)}, two numbers of members, seconds of each, got {self}")

    @property
    def rounds(self) -> list[tuple[float, float]]:
        """(members, seconds) of each round."""
        return list(zip(self.members, self.seconds, strict=True))

    @cached_property
    def terms(self) -> np.ndarray:
        """(fixed, per_member, per_square)."""
        return _fit(self._design, np.array(self.seconds)[None], self._scale)[0]

    @cached_property
    def draws(self) -> np.ndarray:
        """The same for DRAWS sets of resampled residuals, (draws, 3)."""
        fitted = self._design @ self.terms
        free = max(1, len(fitted) - np.count_nonzero(self.terms))
        relative = (np.array(self.seconds) - fitted) / self._scale * math.sqrt(len(fitted) / free)
        chosen = np.random.default_rng(_SEED).integers(len(fitted), size=(DRAWS, len(fitted)))
        return _fit(self._design, fitted + self._scale * relative[chosen], self._scale)

    def at(self, members: float) -> tuple[float, float, float]:
        """Seconds with so many members, and their 90 % interval."""
        powers = np.array([1.0, members, members**2])
        low, high = np.quantile(self.draws @ powers, (0.05, 0.95))
        middle = float(self.terms @ powers)
        return middle, min(middle, float(low)), max(middle, float(high))

    def slope(self, members: float) -> tuple[float, float, float]:
        """What one more member costs when there are so many, and its 90 % interval."""
        powers = np.array([0.0, 1.0, 2 * members])
        low, high = np.quantile(self.draws @ powers, (0.05, 0.95))
        middle = float(self.terms @ powers)
        return middle, min(middle, float(low)), max(middle, float(high))

    def squared_share(self, members: float) -> tuple[float, float, float]:
        """Share of the square in the seconds with so many members, and its 90 % interval: 0 where growth is linear."""
        powers = np.array([1.0, members, members**2])

        def share(terms: np.ndarray) -> np.ndarray:
            return terms[..., 2] * members**2 / np.maximum(1e-30, terms @ powers)

        low, high = np.quantile(share(self.draws), (0.05, 0.95))
        return float(share(self.terms)), float(low), float(high)

    def growth(self, members: float) -> float:
        """Seconds more than with the three members of docs/notes/2026-11-elastic.md."""
        return max(0.0, self.at(members)[0] - self.at(_FEW)[0])

    @property
    def _design(self) -> np.ndarray:
        members = np.array(self.members)
        return np.stack([np.ones_like(members), members, members**2], axis=1)

    @property
    def _scale(self) -> np.ndarray:
        """The usual seconds with so many members: errors are relative to it."""
        members, seconds = np.array(self.members), np.array(self.seconds)
        usual = {number: np.median(seconds[members == number]) for number in set(self.members)}
        return np.maximum(1e-9, np.array([usual[number] for number in self.members]))


def _fit(design: np.ndarray, seconds: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Least squares of relative errors, terms of at least 0, for each row of seconds: (rows, terms).

    The best of all choices of terms that are 0 whose other terms are not negative, which is what scipy.optimize.nnls finds;
    with three terms there are seven, each solved for all rows at once.
    """
    units = np.abs(design).max(axis=0)  # squares of thousands beside ones
    scaled, aims, terms = design / scale[:, None] / units, (seconds / scale).T, design.shape[1]
    best, least = np.zeros((len(seconds), terms)), (aims**2).sum(axis=0)
    for kept in (list(one) for count in range(1, terms + 1) for one in combinations(range(terms), count)):
        found = np.linalg.pinv(scaled[:, kept]) @ aims
        left = ((scaled[:, kept] @ found - aims) ** 2).sum(axis=0)
        better = (found >= 0).all(axis=0) & (left < least)
        least[better], best[better] = left[better], 0.0
        best[np.ix_(better, kept)] = found[:, better].T
    return best / units


@dataclass(frozen=True)
class ControlPlane:
    """A measured control plane: `largest` members that it was measured with, how patient it was, on what and when."""

    costs: Mapping[str, Cost]
    largest: int
    patience_s: float
    measured: str

    def extra_s(self, name: str, members: float) -> float:
        """Seconds that so many members add to what elastic figures say, 0 where that was not measured."""
        return self.costs[name].growth(members) if name in self.costs else 0.0

    def idle_share(self, members: float, patience_s: float | None = None) -> float:
        """Share of a processor that the roster takes while nothing happens: heartbeats, looks at the clock, at paces."""
        beats_s = self._cpu_s("beat_cpu_s", members) / Ladder(patience_s or self.patience_s).beat_s
        looks_s = self._cpu_s("look_cpu_s", members) / LOOK_S + self._cpu_s("straggler_cpu_s", members) / STRAGGLERS_S
        return beats_s + looks_s

    def step_s(self, members: float) -> float:
        """Seconds of a step below which the roster cannot follow, since all that members say goes through it."""
        return self._cpu_s("step_cpu_s", members) / max(1 - _FULL, 1 - self.idle_share(members))

    def exposed_s(self, members: int, busy_s: Any) -> Any:
        """Seconds by which the roster makes a step longer that otherwise takes `busy_s`: 0 as long as it can follow."""
        return np.maximum(0.0, self.step_s(members) - busy_s) if members > 1 else 0.0 * busy_s

    def most(self, step_s: float, limit: int = 1 << 20) -> int:
        """The largest power of two of members whom the roster can follow in steps of `step_s`, `limit` at most."""
        members = 1
        while members < limit and self._load(2 * members, step_s) < _FULL:
            members *= 2
        return members

    def _load(self, members: int, step_s: float) -> float:
        return self.idle_share(members) + self._cpu_s("step_cpu_s", members) / step_s

    def warnings(self, members: int) -> list[str]:
        """What to know of an answer about so many members."""
        found = []
        if members > self.largest:
            more = f"{members / self.largest:.3g} times the most that it was measured with ({self.largest})"
            found.append(f"control plane: {members} members are {more}; its costs are extrapolated")
        if (share := self.idle_share(members)) > _FULL:
            found.append(f"control plane: heartbeats of {members} members take {share:.2g} processors of the roster's one")
        return found

    def _cpu_s(self, name: str, members: float) -> float:
        return self.costs[name].at(members)[0] if name in self.costs else 0.0


# ---------------------------------------------------------------- files


def summary(cost: Cost) -> dict[str, Any]:
    """A cost in numbers: fixed seconds, those of one member more among the most it was measured with, and their interval; the
    square's share there."""
    largest = max(cost.members)
    slope, low, high = cost.slope(largest)
    return {
        "largest": int(largest),
        "what": COSTS[cost.name], "fixed_s": float(cost.terms[0]), "per_member_s": slope, "low": low, "high": high,
        "at_largest_s": cost.at(largest)[0], "squared_share": cost.squared_share(largest)[0],
        "squared_share_low": cost.squared_share(largest)[1],
    }  # fmt: skip


def write(plane: ControlPlane, path: Path) -> None:
    """The measurement as YAML: every round, and what the fit makes of them."""
    costs = {name: {**summary(cost), "rounds": [list(pair) for pair in cost.rounds]}
             for name, cost in plane.costs.items()}  # fmt: skip
    content = {"format": 1, "control": "measured", "measured": plane.measured, "largest": plane.largest,
               "patience_s": plane.patience_s, "costs": costs}  # fmt: skip
    with committed(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=128))


def read(path: str | Path) -> ControlPlane:
    """The control plane in a file that `write` wrote, fitted again from its rounds; BadInput says what is missing."""
    content = config.read_yaml(path)
    try:
        costs = {name: cost_of(name, entry["rounds"]) for name, entry in content["costs"].items()}
        return ControlPlane(costs, int(content["largest"]), float(content["patience_s"]), str(content["measured"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = "costs of the control plane, each with its rounds"
        raise BadInput(path, expected, repr(error), "Make one: `raysegment scale control`.") from None


def cost_of(name: str, rounds: Sequence[Sequence[float]]) -> Cost:
    """A cost from its rounds: (members, seconds) of each."""
    return Cost(name, tuple(float(pair[0]) for pair in rounds), tuple(float(pair[1]) for pair in rounds))

"""How long everybody waits for what: one number, and all limits derived from it, each longer than what must end before it."""

from __future__ import annotations

from dataclasses import dataclass

from raysegment.climate.checks import BadInput

# (name, times the patience, what it bounds)
_RUNGS = (
    ("beat_s", 1 / 8, "a member's process shows that it is not stopped this often"),
    ("silence_s", 1.0, "without a sign of life for so long, a member is let go"),
    ("forming_s", 2.0, "a new group connects all its members (or meets again)"),
    ("meeting_s", 3.0, "after a break, living members come to the next meeting (besides a step's time)"),
    ("lateness_s", 5.0, "a member that all others wait for is let go (or after ten usual steps, if longer)"),
    ("return_s", 8.0, "a member let go may come back; then its process is replaced"),
    ("absence_s", 20.0, "members go on without the roster, then end themselves"),
    ("collective_s", 40.0, "a collective that nobody broke off fails by itself"),
)
_SHORTEST, _LONGEST = 0.4, 300.0


@dataclass(frozen=True)
class Ladder:
    """All time limits of a fleet in seconds, from `patience_s`: how long a member may be silent before others go on alone.

    Clocks are monotonic, so that a wall clock that jumps changes nothing.
    """

    patience_s: float = 2.0

    def __post_init__(self) -> None:
        if not _SHORTEST <= self.patience_s <= _LONGEST:
            raise ValueError(f"elastic.patience_s: expected {_SHORTEST:g} to {_LONGEST:g} seconds, got {self.patience_s}")

    def __getattr__(self, name: str) -> float:
        for rung, factor, _ in _RUNGS:
            if rung == name:
                return factor * self.patience_s
        raise AttributeError(name)

    def lines(self) -> list[str]:
        """The ladder as it is printed at the start of a run, shortest first."""
        return [f"{factor * self.patience_s:8.2f} s  {name.removesuffix('_s'):10s} {what}" for name, factor, what in _RUNGS]

    def check(self, poll_s: float, start_s: float) -> None:
        """BadInput unless the limits agree with Ray Train's: how often it polls, how long a group may take to start.

        Ray must see a dead worker before the roster has it replaced, and a group that starts must not be given up for
        want of time while members still wait for it.
        """
        times = [factor for _, factor, _ in _RUNGS]
        assert times == sorted(times), "every rung is longer than the one before"
        if poll_s >= self.return_s:
            raise BadInput(
                "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", f"less than the {self.return_s:g} s in which a member may return",
                f"{poll_s:g}", "Lower it, or raise elastic.patience_s.",
            )  # fmt: skip
        if start_s <= self.return_s:
            raise BadInput(
                "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"more than the {self.return_s:g} s in which a member may return",
                f"{start_s:g}", "Raise it, or lower elastic.patience_s.",
            )  # fmt: skip

"""How often state is kept: as often as costs little, from what it costs and how often things fail. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SHARE = 0.01  # of the time, for states in memory
_ROOM, _WIDE = 1.25, 2.0  # an interval is chosen so much longer than needed, and left alone up to so much longer


def snapshot_every(cost_s: float, step_s: float, share: float = SHARE, before: int = 0) -> int:
    """Every how many steps state may be captured, so that a pause of `cost_s` is at most `share` of the time.

    `before`, the interval so far (0: none), stays while it is long enough and less than twice as long as needed: times that
    vary by a tenth do not change it.
    """
    if cost_s < 0 or step_s <= 0 or not 0 < share <= 1:
        raise ValueError(f"expected cost_s >= 0, step_s > 0 and a share in (0, 1], got {cost_s}, {step_s}, {share}")
    needed = cost_s / (share * step_s)
    if before >= 1 and needed <= before <= max(1.0, _WIDE * needed):
        return before
    return max(1, math.ceil(_ROOM * needed))


def checkpoint_every_s(cost_s: float, mtbf_s: float, least_s: float = 30.0, most_s: float = 3600.0) -> float:
    """Seconds between checkpoint files that lose least: √(2 · cost · mean time between failures), within bounds.

    Young (1974), A first order approximation to the optimum checkpoint interval; Daly (2006) refines it by terms of the
    order √(cost / mtbf), which are below what is known of either.
    """
    if cost_s < 0 or mtbf_s <= 0 or not 0 < least_s <= most_s:
        raise ValueError(f"expected cost_s >= 0, mtbf_s > 0, 0 < least_s <= most_s, got {cost_s}, {mtbf_s}, {least_s}, {most_s}")
    return min(most_s, max(least_s, math.sqrt(2 * cost_s * mtbf_s)))


@dataclass(frozen=True)
class Mtbf:
    """Mean time between failures, from those seen in `elapsed_s` and a prior.

    Failures come as a Poisson process; its rate has the prior Gamma(shape 1, rate `prior_s`): as if there had been one
    failure in `prior_s`, a day unless something better is known. The estimate is 1 / E[rate].
    """

    failures: int = 0
    elapsed_s: float = 0.0
    prior_s: float = 86400.0

    def __post_init__(self) -> None:
        if self.failures < 0 or self.elapsed_s < 0 or self.prior_s <= 0:
            raise ValueError(f"mtbf: expected failures >= 0, elapsed_s >= 0, prior_s > 0, got {self}")

    @property
    def seconds(self) -> float:
        return (self.prior_s + self.elapsed_s) / (1 + self.failures)

    def after(self, elapsed_s: float, failures: int = 0) -> Mtbf:
        """The estimator when `elapsed_s` more have passed, with so many failures in them."""
        return replace(self, failures=self.failures + failures, elapsed_s=self.elapsed_s + elapsed_s)

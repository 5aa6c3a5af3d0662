"""What failures and saving cost: effective share of the time, and the best interval between checkpoint files.

Two ways to live with a failure: `elastic` (survivors go on at once with fewer ranks, redo a step, and grow when the lost
ranks return; files matter only if all die at once) and `wait` (all stop, restart, and repeat what the last file has not).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from raysegment.elastic.intervals import checkpoint_every_s

POLICIES = ("elastic", "wait")
LEAST_S, MOST_S = 1.0, 86400.0  # bounds of an interval between files


@dataclass(frozen=True)
class Faults:
    """How often things fail and what that takes, in seconds; `elastic` figures from docs/notes/2026-11-elastic.md.

    per_gpu_hour   419 unexpected interruptions in 54 days of 16,384 GPUs (Llama 3, 2024)
    detection_s    a killed worker or node: next step after 0.2 to 0.4 s (a stopped one: 2.2)
    redone_steps   of the interrupted step, on average half is lost
    back_s         until a lost worker (6 to 8 s) or node (7.5) is back
    joining_s      its joining costs the others: at most 0.06 on an idle machine, up to 0.3
    all_share      of failures that take all members at once (power, head node): assumed
    all_back_s     then, to the first new step: 13.4 to 18.3
    capture_share  of the time for states in memory and the roster: 0.6 % at steps of 1 s
    wait_s         detection and restart without elasticity: Ray Train's defaults 82 to 88 s after a lost node
    """

    per_gpu_hour: float = 419 / (54 * 24 * 16384)
    detection_s: float = 0.4
    redone_steps: float = 0.5
    back_s: float = 8.0
    joining_s: float = 0.3
    all_share: float = 0.02
    all_back_s: float = 15.0
    capture_share: float = 0.006
    wait_s: float = 85.0

    def __post_init__(self) -> None:
        low = {f.name: getattr(self, f.name) for f in fields(self) if not 0 <= getattr(self, f.name) < math.inf}
        if low or self.all_share > 1 or self.capture_share >= 1:
            raise ValueError(f"expected figures of at least 0 and shares of at most 1, got {low or self}")

    def mtbf_s(self, gpus: int) -> float:
        """Seconds between failures of any of the GPUs; infinite when nothing fails."""
        rate = self.per_gpu_hour * gpus / 3600
        return 1 / rate if rate else math.inf


@dataclass(frozen=True)
class Job:
    """What runs: `gpus`, of which one failure takes `lost` (a node's); seconds of a step and of a checkpoint's stall."""

    gpus: int
    lost: int
    step_s: float
    checkpoint_s: float
    policy: str = "elastic"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES or not (1 <= self.lost <= self.gpus and self.step_s > 0 and self.checkpoint_s >= 0):
            raise ValueError(f"expected a policy of {POLICIES}, 1 <= lost <= gpus, step_s > 0, checkpoint_s >= 0, got {self}")


def file_mtbf_s(job: Job, faults: Faults) -> float:
    """Seconds between failures that need a file: all of them without elasticity."""
    share = file_share(job, faults)
    return faults.mtbf_s(job.gpus) / share if share else math.inf


def file_share(job: Job, faults: Faults) -> float:
    """Share of failures after which training goes on from a file; a failure of the only node takes all."""
    return 1.0 if job.policy == "wait" or job.lost == job.gpus else faults.all_share


def best_interval_s(job: Job, faults: Faults) -> float:
    """√(2 · cost · time between failures that need a file) (Young 1974), within LEAST_S and MOST_S."""
    mtbf_s = file_mtbf_s(job, faults)
    return MOST_S if math.isinf(mtbf_s) else checkpoint_every_s(job.checkpoint_s, mtbf_s, LEAST_S, MOST_S)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Daly (2006), eq. 37: √(2cM)·(1 + √(c/2M)/3 + (c/2M)/9) − c, and M where cost is above 2M."""
    ratio = cost_s / (2 * mtbf_s)
    return mtbf_s if ratio >= 1 else math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def lost_per_failure_s(job: Job, faults: Faults, interval_s: float) -> float:
    """Expected seconds of full speed that one failure costs."""
    if job.policy == "wait":
        return faults.wait_s + interval_s / 2
    share = file_share(job, faults)
    away = faults.back_s * job.lost / job.gpus  # the others go on
    one = faults.detection_s + faults.redone_steps * job.step_s + away + faults.joining_s
    return (1 - share) * one + share * (faults.detection_s + faults.all_back_s + interval_s / 2)


def goodput(job: Job, faults: Faults, interval_s: float) -> float:
    """Share of the time that is undisturbed training: (1 − capture) / (1 + C/τ) · 1 / (1 + loss / M).

    To first order 1 − C/τ − τ/2M − R/M, the usual formula; `simulate` is what it is checked against.
    """
    captured = faults.capture_share if job.policy == "elastic" else 0.0
    files = 1 + job.checkpoint_s / interval_s
    return (1 - captured) / files / (1 + lost_per_failure_s(job, faults, interval_s) / faults.mtbf_s(job.gpus))


# ---------------------------------------------------------------- the same by discrete events


def simulate(job: Job, faults: Faults, interval_s: float, work_s: float, seed: int = 0) -> float:
    """Goodput of one simulated run of `work_s` seconds of undisturbed work: events in the order in which they happen."""
    random = np.random.default_rng(seed)
    mtbf_s, captured = faults.mtbf_s(job.gpus), faults.capture_share if job.policy == "elastic" else 0.0
    now = done = saved = 0.0
    save_at = interval_s
    fails_at = random.exponential(mtbf_s) if math.isfinite(mtbf_s) else math.inf
    returns: list[float] = []  # when lost nodes come back
    while done < work_s:
        speed = (1 - captured) * max(0.0, 1 - len(returns) * job.lost / job.gpus)
        ends_at = now + (work_s - done) / speed if speed else math.inf
        back_at = min(returns, default=math.inf)
        then = max(now, min(ends_at, save_at, fails_at, back_at))
        done += (then - now) * speed
        now = then
        if now == ends_at:
            break
        if now >= fails_at:
            fails_at = now + random.exponential(mtbf_s)
            if random.random() < file_share(job, faults):
                now += faults.wait_s if job.policy == "wait" else faults.detection_s + faults.all_back_s
                done, returns, save_at = saved, [], now + interval_s
            else:
                done = max(saved, done - faults.redone_steps * job.step_s)
                returns.append(now + faults.detection_s + faults.back_s)
                now += faults.detection_s
        elif now >= back_at:
            returns.remove(back_at)
            now += faults.joining_s
        else:
            now += job.checkpoint_s
            saved, save_at = done, now + interval_s
    return work_s / now

"""What has happened in a campaign, one JSON line each, on the disk before anything follows from it.

It lies beside Tune's own state and is the truth: Tune's, restored, has forgotten what its schedulers knew, and a kill may
leave it behind what had been decided. A campaign that goes on reads this alone, and the trials' run folders.

    session   {}                                   the command was started
    added     {trial, tune, told}                  Tune has the trial, under its own name; reports up to `told` are known
    proposed  {trial, phase, number, point, seed}  a trial exists
    resumed   {trial, step}                        it goes on from what an earlier session left
    report    {trial, k, step, value, loss, iou, …}   its k-th reading, and what the scheduler decided
    ended     {trial, status, reason, step}        finished, stopped, diverged or failed
    phase     {phase, samples}                     all trials of a phase have ended, with what they had computed by then
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysegment.elastic.runs import jsonable, mend, read_lines

FINISHED, STOPPED, DIVERGED, FAILED = ENDINGS = ("finished", "stopped", "diverged", "failed")


@dataclass
class Record:
    """What is known of a trial; `status` is "" while it is unfinished, `sessions` those in which it ran."""

    trial: str
    phase: str
    number: int
    point: dict[str, Any]
    seed: int | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    status: str = ""
    reason: str = ""
    resumed: int = 0
    sessions: list[int] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)  # the point as it was proposed; `point` is the newest, perturbed

    def __post_init__(self) -> None:
        self.asked = self.asked or dict(self.point)

    def take(self, report: Mapping[str, Any]) -> None:
        """Add a reading, unless it is known."""
        if not any(known["k"] == report["k"] and known["segment"] == report["segment"] for known in self.reports):
            self.reports.append(dict(report))
            self.point = report.get("point") or self.point

    @property
    def told(self) -> int:
        """How many readings are on record."""
        return self.reports[-1]["k"] if self.reports else 0

    @property
    def last(self) -> Mapping[str, Any]:
        return self.reports[-1] if self.reports else {}


class Journal:
    """Reads what there is and appends. For the one process that drives the campaign; others use `read_journal`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mend(self.path)
        self.records: dict[str, Record] = {}
        self.names: dict[str, str] = {}  # Tune's name of a trial → ours
        self.phases: dict[str, dict[str, Any]] = {}
        self.session = 0
        self.times: dict[int, list[float]] = {}  # of each session's first and last line
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        for line in read_lines(self.path)[0]:
            self._take(line)
        self._file = self.path.open("ab", buffering=0)

    def write(self, event: str, **facts: Any) -> None:
        """Append one line; it is on the disk when this returns."""
        line = {"time": time.time(), "event": event, **jsonable(facts)}
        self._file.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())
        self._take(line)
        for listener in self.listeners:
            listener(line)

    def of(self, phase: str) -> list[Record]:
        """A phase's trials, by number."""
        return sorted((record for record in self.records.values() if record.phase == phase), key=lambda record: record.number)

    @property
    def seconds(self) -> float:
        """Time spent in all sessions, from the first to the last line of each."""
        return sum(last - first for first, last in self.times.values())

    def close(self) -> None:
        self._file.close()

    def __deepcopy__(self, memo: Any) -> Journal:
        return self

    def __reduce__(self) -> Any:
        return Journal, (self.path,)  # Tune pickles its schedulers, and what they hold, beside its state

    def _take(self, line: Mapping[str, Any]) -> None:
        event = line["event"]
        if event == "session":
            self.session += 1
            self.times[self.session] = [line["time"], line["time"]]
        elif self.session:
            self.times[self.session][1] = line["time"]
        if event == "proposed":
            facts = {key: line[key] for key in ("trial", "phase", "number", "point", "seed")}
            self.records[line["trial"]] = Record(**facts)
        elif event == "phase":
            self.phases[line["phase"]] = dict(line)
        elif "trial" in line:
            self._take_trial(event, self.records[line["trial"]], line)

    def _take_trial(self, event: str, record: Record, line: Mapping[str, Any]) -> None:
        if event == "added":
            self.names[line["tune"]] = record.trial
            if self.session not in record.sessions:
                record.sessions.append(self.session)
        elif event == "resumed":
            record.resumed += 1
        elif event == "report":
            record.take(line)
        elif event == "ended" and not record.status:
            record.status, record.reason = line["status"], line["reason"]


def find_trial(path: Path, tune_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `proposed` and the newest `added` line of the trial that Tune calls so; for the trial's own process."""
    proposed, added = {}, {}
    for line in read_lines(path)[0]:
        if line["event"] == "proposed":
            proposed[line["trial"]] = line
        elif line["event"] == "added" and line["tune"] == tune_id:
            added = line
    return proposed[added["trial"]], added

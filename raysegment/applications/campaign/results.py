"""A campaign's rows and its answer, from the journal and the trials' folders; as csv, Parquet and best.yaml."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raysegment.applications.campaign.journal import DIVERGED, FAILED, FINISHED, STOPPED, Journal, Record
from raysegment.applications.campaign.measures import WORST, mode
from raysegment.applications.campaign.population import segments
from raysegment.applications.campaign.space import CampaignConfig, Point, Trials
from raysegment.archive.files import committed
from raysegment.elastic.runs import Run, last_step
from raysegment.elastic.settings import TrainConfig, plain

SEARCH, REST, CONFIRM = PHASES = ("search", "exhaustive", "confirm")
TOP = 3  # so many are trained again with further seeds
_ORDER = {FINISHED: 0, STOPPED: 1, DIVERGED: 2, FAILED: 3, "": 4}


@dataclass(frozen=True)
class Row:
    """A trial's outcome: `value` of the metric, mean `iou`, how far it came, what it computed (`samples`, of the
    `samples_whole` to its end)."""

    trial: str
    phase: str
    point: Point
    seed: int
    status: str
    reason: str
    value: float
    loss: float
    iou: float
    steps: int
    of: int
    samples: int
    samples_whole: int
    samples_per_s: float
    resumed: int
    segments: int
    folder: str
    checkpoint: str

    def flat(self) -> dict[str, Any]:
        """As a line of a table."""
        own = {key: value for key, value in self.__dict__.items() if key != "point"}
        return {"trial": own.pop("trial"), **self.point, **own}


def rows_of(config: CampaignConfig, journal: Journal, trials: Trials, phase: str) -> list[Row]:
    """A phase's trials, the best first: finished ones by the metric, then stopped ones, then those that failed."""
    found = [_row(config, journal, trials, record) for record in journal.of(phase)]
    sign = 1.0 if mode(config.metric) == "min" else -1.0
    return sorted(found, key=lambda row: (_ORDER[row.status], sign * row.value if math.isfinite(row.value) else WORST, row.trial))


def _row(config: CampaignConfig, journal: Journal, trials: Trials, record: Record) -> Row:
    run, pieces = _run(config, trials, record)
    summary, last, length = Run(run.out).finished() or {}, record.last, run.steps
    computed = journal.phases.get(record.phase, {}).get("samples", {}).get(record.trial)
    return Row(
        trial=record.trial, phase=record.phase, point=record.point, seed=run.learn.seed, status=record.status,
        reason=record.reason, value=_number(last.get("value")), loss=_number(last.get("loss")), iou=_number(last.get("iou")),
        steps=last.get("step", 0), of=length, samples=samples(config, trials, record) if computed is None else computed,
        samples_whole=length * run.learn.global_batch, samples_per_s=_number(summary.get("samples_per_s")),
        resumed=record.resumed, segments=len(pieces) or 1,
        folder=str(Path(run.out).relative_to(config.folder)), checkpoint=summary.get("checkpoint") or "",
    )  # fmt: skip


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _run(config: CampaignConfig, trials: Trials, record: Record) -> tuple[TrainConfig, list[Path]]:
    """The run of a trial (of its newest segment), and its segments' folders."""
    seed = {} if record.seed is None else {"learn.seed": record.seed}
    run = trials.run({**record.point, **seed})
    pieces = sorted((config.folder / "trials" / record.trial).glob("segment-*"))
    return (TrainConfig(**{**run.__dict__, "out": str(pieces[-1])}) if pieces else run), pieces


def samples(config: CampaignConfig, trials: Trials, record: Record) -> int:
    """Samples that a trial has computed, to the end of its log: also what it did until a decision reached it."""
    run, pieces = _run(config, trials, record)
    if not pieces:
        return run.learn.global_batch * (last_step(Run(run.out).steps) + 1)
    begun = {segment.number: segment.step for segment in segments(config.folder / "trials" / record.trial)}
    steps = sum(max(0, last_step(Run(piece).steps) + 1 - begun.get(int(piece.name[-2:]), 0)) for piece in pieces)
    return run.learn.global_batch * steps


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class Confirmed:
    """A point trained with several seeds: the metric's values, mean and standard deviation (n − 1)."""

    point: Point
    values: tuple[float, ...]
    ious: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


def confirmed(config: CampaignConfig, search: Sequence[Row], again: Iterable[Row]) -> list[Confirmed]:
    """The best few with the values of all their seeds, the best mean first; empty where nothing was trained again."""
    values: dict[str, list[Row]] = defaultdict(list)
    for row in again:
        if row.status == FINISHED:
            values[_key(row.point)].append(row)
    found = []
    for row in top(search):
        others = values.get(_key(row.point), [])
        if others:
            all_ = [row, *others]
            found.append(Confirmed(row.point, tuple(r.value for r in all_), tuple(r.iou for r in all_)))
    return sorted(found, key=lambda each: each.mean if mode(config.metric) == "min" else -each.mean)


def top(search: Sequence[Row]) -> list[Row]:
    """The best finished trials, each point once."""
    known: dict[str, Row] = {}
    for row in search:
        if row.status == FINISHED:
            known.setdefault(_key(row.point), row)
    return list(known.values())[:TOP]


def _key(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


@dataclass(frozen=True)
class Saving:
    """What stopping early saved and cost: samples of the search against those of letting all finish, and both answers."""

    samples: int
    all_samples: int
    found: Row
    best: Row

    @property
    def share(self) -> float:
        return self.samples / self.all_samples

    @property
    def iou_loss(self) -> float:
        """How much lower the found configuration's IoU is, as a share of the best one's."""
        return (self.best.iou - self.found.iou) / self.best.iou


def saving(config: CampaignConfig, search: Sequence[Row], rest: Sequence[Row]) -> Saving | None:
    """None where the stopped trials were not let finish."""
    whole = [row for row in (*search, *rest) if row.status == FINISHED]
    if not rest or not whole or not all(row.status for row in rest):
        return None
    best = min(whole, key=lambda row: row.value if mode(config.metric) == "min" else -row.value)
    return Saving(sum(row.samples for row in search), sum(row.samples_whole for row in search), search[0], best)


# ---------------------------------------------------------------- files


def write_tables(out: Path, config: CampaignConfig, rows: Sequence[Row]) -> None:
    """results.csv and results.parquet; checkpoints in the campaign's folder as seen from there, as folders are."""
    lines = [{**row.flat(), "checkpoint": row.checkpoint.removeprefix(f"{config.folder}/")} for row in rows]
    with committed(out / "results.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    columns = {name: _column([line[name] for line in lines]) for name in lines[0]}
    with committed(out / "results.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)


def _column(values: list[Any]) -> pa.Array:
    """Values of one type as they are, mixed ones and lists as JSON text."""
    kinds = {type(value) for value in values}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return pa.array([float(value) for value in values] if float in kinds else values)
    return pa.array([value if isinstance(value, str) else json.dumps(value) for value in values])


def write_best(out: Path, config: CampaignConfig, point: Point) -> Path:
    """best.yaml, ready for `raysegment train`."""
    mapping = plain(config.trial(point))
    with committed(out / "best.yaml") as temporary:
        temporary.write_text(yaml.safe_dump({**mapping, "out": "runs/best", "name": "best"}, sort_keys=False))
    return out / "best.yaml"

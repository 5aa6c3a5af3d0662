"""A campaign from its file to its answer: search; let the stopped finish, if asked; train the best again; publish.

It may be killed at any time: the same command goes on from the journal, and trains nothing twice that is in the trials'
folders. Each start is a new experiment for Tune, which is given the trials that wait and then new ones.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml
from filelock import FileLock
from filelock import Timeout as LockTimeout
from ray import tune

from raysegment.applications.campaign.admission import Admission, Node, admit, demands
from raysegment.applications.campaign.journal import FINISHED, STOPPED, Journal, Record
from raysegment.applications.campaign.live import watching
from raysegment.applications.campaign.mlflow import log_to_mlflow
from raysegment.applications.campaign.pictures import draw_all, importances
from raysegment.applications.campaign.proposals import Proposals, propose
from raysegment.applications.campaign.report import report
from raysegment.applications.campaign.results import (
    CONFIRM,
    PHASES,
    REST,
    SEARCH,
    confirmed,
    rows_of,
    samples,
    saving,
    top,
    write_best,
    write_tables,
)
from raysegment.applications.campaign.schedulers import Failures, make_scheduler
from raysegment.applications.campaign.space import CampaignConfig, Trials, changes, check_extends
from raysegment.applications.campaign.sweeper import Sweeper
from raysegment.applications.campaign.trial import JOURNAL, run_trial
from raysegment.applications.synthesize import synthesize
from raysegment.archive.files import committed
from raysegment.archive.manifest import Manifest
from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from raysegment.console import Console
from raysegment.elastic.keeper import memory_folder
from raysegment.elastic.runs import Run, jsonable, last_step
from raysegment.elastic.settings import plain
from raysegment.elastic.train import use_gpu
from raysegment.feed.session import ensure_ray
from raysegment.feed.stage import StageConfig, stage

More = Callable[[], Record | None]  # the next trial, made; None: no more

_RETRIES = 3  # a trial's driver that dies is started again so often
# Tune's own tables, and its loggers: what they would say is in the journal, in TensorBoard's files and on the terminal
_QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


def run_campaign(config: CampaignConfig, console: Console | None = None, extend: bool = False) -> dict[str, Any]:
    """The answer as files in the campaign's folder, and as a dict: `trials`, `finished`, `stopped_early`, `failed`, `resumed`,
    `best` {config, iou}, `samples_total`, `seconds`, and where the files are.

    Run again, it goes on where it was, or returns what there is; `extend` allows a larger space. Raises BadInput for what
    cannot work, RuntimeError when no trial finished.
    """
    config, console = _absolute(config), console or Console()
    _check_keys(config)
    known = None if config.archive is not None else _fit(config)
    with _alone(config.folder):
        _claim(config, extend)
        trials = known or Trials(config, _archive(config, console))
        journal = Journal(config.folder / JOURNAL)
        try:
            if list(_left(config, journal)):
                _work(config, journal, trials, console)
            return _publish(config, journal, trials)
        finally:
            journal.close()


# ---------------------------------------------------------------- before anything starts


def _absolute(config: CampaignConfig) -> CampaignConfig:
    """Paths as the trials, each in a working directory of its own, can use them."""
    shared = dict(config.train)
    if shared.get("shards"):
        shared["shards"] = Place.of(shared["shards"]).text
    held_out = shared.get("validation")
    if isinstance(held_out, Mapping) and held_out.get("shards"):
        shared["validation"] = {**held_out, "shards": Place.of(held_out["shards"]).text}
    if shared.get("validation.shards"):
        shared["validation.shards"] = Place.of(shared["validation.shards"]).text
    base = os.path.abspath(config.base) if config.base and os.path.exists(config.base) else config.base
    return replace(config, out=os.path.abspath(config.out), train=shared, base=base)


def _check_keys(config: CampaignConfig) -> None:
    """Keys and values that no run can have are found before a folder is made."""
    for point in config.corners():
        run = config.trial(point)
        if not run.shards:
            raise BadInput("train.shards", "the folder of a shard set", "nothing", "Write train.shards=DIR, or an `archive`.")


def _fit(config: CampaignConfig) -> Trials:
    """The campaign's runs on their shards; BadInput where they do not fit, or would never report the metric."""
    trials = Trials(config, Manifest.load(config.trial(next(config.corners())).shards))
    for point in config.corners():
        run = trials.run(point)
        if run.validation.shards and run.validation.every_steps > next(iter(trials.milestones(run).values())):
            raise BadInput("train.validation.every_steps", "validation at least as often as a trial reports",
                           f"every {run.validation.every_steps} of {run.steps} steps", "Leave it out.")  # fmt: skip
    return trials


def _claim(config: CampaignConfig, extend: bool) -> None:
    """Make the campaign's folder, or check that it is of the same campaign (or of one that this one extends)."""
    path = config.folder / "campaign.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text())
        differing = changes(before, config)
        if differing and extend:
            check_extends(before, config)
        elif differing:
            raise BadInput(config.folder, "a new folder or the same campaign", f"other values of {'; '.join(differing)}",
                           "Give the same campaign to go on, --extend to add trials or values, or another `out`.")  # fmt: skip
    with committed(path) as temporary:
        temporary.write_text(yaml.safe_dump(plain(config), sort_keys=False))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While inside, no other command works on the campaign."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "campaign.lock")
    try:
        lock.acquire(timeout=0)
    except LockTimeout:
        raise BadInput(folder, "a campaign that no other command works on", "one that is locked (campaign.lock)",
                       "Wait for it or stop it; or choose another folder as `out`.") from None  # fmt: skip
    try:
        yield
    finally:
        lock.release()


def _archive(config: CampaignConfig, console: Console) -> Manifest:
    """Synthetic weather to learn from and to validate on, made and staged once; the manifest of the first."""
    assert config.archive is not None
    data = config.folder / "data"
    shards = {"archive": data / "shards", "heldout": data / "heldout-shards"}
    for name, synthetic in config.archive.parts().items():
        if not (shards[name] / "manifest.json").exists():
            with console.phase(f"synthesize {synthetic.snapshots} snapshots into {data / name}") as progress:
                synthesize(data / name, synthetic, progress=progress)
            with console.phase(f"stage into {shards[name]}") as progress:
                stage([data / name], None, shards[name], StageConfig(), progress=progress)
    _fit(config)
    return Manifest.load(shards["archive"])


# ---------------------------------------------------------------- the work


def _left(config: CampaignConfig, journal: Journal) -> Iterator[str]:
    """The phases that are not complete."""
    wanted = {SEARCH: True, CONFIRM: config.confirm_seeds > 0, REST: config.exhaustive}
    for phase in PHASES:
        complete = phase in journal.phases and all(record.status for record in journal.of(phase))
        if phase == SEARCH:
            complete = complete and (len(journal.of(SEARCH)) >= config.count or bool(config.budget_s))
        if wanted[phase] and not complete:
            yield phase


def _work(config: CampaignConfig, journal: Journal, trials: Trials, console: Console) -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # misses the files of those loggers
    ensure_ray()
    runs = [trials.run(point) for point in config.corners()]
    nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    room = admit(demands(runs, use_gpu), nodes, config.at_once)
    journal.write("session", at_once=room.at_once, pid=os.getpid())
    console.say(f"at most {room.at_once} trials at a time; {len(journal.of(SEARCH))} of {config.count} known")
    begin = {SEARCH: _search, CONFIRM: _confirm, REST: _rest}
    with watching(config, journal, console):
        for phase in list(_left(config, journal)):
            more = begin[phase](config, journal, trials)
            _run_phase(config, journal, phase, more, room)
            _close_phase(config, journal, trials, phase)
            _publish(config, journal, trials)  # whoever waits for the answer need not wait for how sure it is


def _search(config: CampaignConfig, journal: Journal, trials: Trials) -> More:
    """One new trial after the other, until there are as many as asked for, or the time is over."""
    started, spent = time.monotonic(), journal.seconds

    def more() -> Record | None:
        known = journal.of(SEARCH)
        late = config.budget_s and spent + time.monotonic() - started > config.budget_s
        if len(known) >= config.count or (late and known):
            return None
        point = propose(config, len(known), known)
        return _propose(journal, SEARCH, len(known), point, None)

    return more


def _confirm(config: CampaignConfig, journal: Journal, trials: Trials) -> More:
    """The best few, each with further seeds."""
    best = top(rows_of(config, journal, trials, SEARCH))
    wanted = [(row.point, row.seed + k) for k in range(1, config.confirm_seeds + 1) for row in best]
    return _each(journal, CONFIRM, wanted)


def _rest(config: CampaignConfig, journal: Journal, trials: Trials) -> More:
    """Those that were stopped early, to their end; they go on where they are."""
    return _each(journal, REST, [(record.point, record.seed) for record in journal.of(SEARCH) if record.status == STOPPED])


def _each(journal: Journal, phase: str, wanted: Sequence[tuple[dict[str, Any], int | None]]) -> More:
    have = [(record.point, record.seed) for record in journal.of(phase)]
    new = [each for each in wanted if each not in have]

    def more() -> Record | None:
        if not new:
            return None
        point, seed = new.pop(0)
        return _propose(journal, phase, len(journal.of(phase)), point, seed)

    return more


def _propose(journal: Journal, phase: str, number: int, point: dict[str, Any], seed: int | None) -> Record:
    trial = f"{phase}-{number:03d}"
    journal.write("proposed", trial=trial, phase=phase, number=number, point=point, seed=seed)
    return journal.records[trial]


def _run_phase(config: CampaignConfig, journal: Journal, phase: str, more: More, room: Admission) -> None:
    """A Tune experiment with the phase's waiting trials and then new ones; each trial ends in the journal."""
    scheduler = config.scheduler if phase == SEARCH else "fifo"
    waiting = [record for record in journal.of(phase) if not record.status or scheduler == "hyperband"]
    _mark_resumed(config, journal, waiting)
    waiting = waiting or [record for record in (more(),) if record is not None]
    if not waiting:
        return
    sweeper = Sweeper(memory_folder(config.trial(next(config.corners())).checkpoint.memory))
    left = lambda record: sweeper.give(_folder(config, record), over=bool(record.status) and not config.exhaustive)
    random.seed(config.seed * 1000 + journal.session)  # population-based training draws from Python's generator
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, campaign=config), {"memory": room.driver_bytes}),
        tune_config=_tune_config(config, journal, scheduler, waiting, more, room, left),
        run_config=tune.RunConfig(
            name=f"{phase}-{journal.session:03d}", storage_path=str(config.folder / "tune"), verbose=0,
            failure_config=tune.FailureConfig(max_failures=_RETRIES), callbacks=[Failures(journal)],
        ),
        **_param_space(scheduler, waiting, more),
    )  # fmt: skip
    try:
        tuner.fit()
    finally:
        sweeper.close()


def _tune_config(
    config: CampaignConfig, journal: Journal, scheduler: str, waiting: list[Record], more: More, room: Admission,
    left: Callable[[Record], None],
) -> tune.TuneConfig:  # fmt: skip
    known = make_scheduler(config, journal, scheduler, left)
    if scheduler == "pbt":
        return tune.TuneConfig(scheduler=known, num_samples=1, reuse_actors=False)
    pauses = scheduler == "hyperband"  # there the memory that drivers reserve is the bound: what pauses is alive
    return tune.TuneConfig(
        scheduler=known, search_alg=Proposals(waiting, more), num_samples=config.count + len(waiting) + 1000,
        max_concurrent_trials=None if pauses else room.at_once, reuse_actors=False,
    )  # fmt: skip


def _param_space(scheduler: str, waiting: list[Record], more: More) -> dict[str, Any]:
    """A population exists from the start, and Tune takes no searcher beside it."""
    if scheduler != "pbt":
        return {}
    waiting += list(iter(more, None))
    points = {record.trial: record.point for record in waiting}
    keys = waiting[0].point
    values = {key: tune.sample_from(partial(_of_population, points, key)) for key in keys}
    return {"param_space": {"trial": tune.grid_search(list(points)), **values}}


def _of_population(points: dict[str, dict[str, Any]], key: str, config: dict[str, Any]) -> Any:
    return points[config["trial"]][key]


def _mark_resumed(config: CampaignConfig, journal: Journal, waiting: Sequence[Record]) -> None:
    """Those that an earlier session began, with the steps that are in their logs."""
    for record in waiting:
        if record.sessions and not record.status:
            journal.write("resumed", trial=record.trial, step=_logged(config, record), why="the campaign was interrupted")


def _logged(config: CampaignConfig, record: Record) -> int:
    return last_step(Run(_folder(config, record)).steps) + 1


def _folder(config: CampaignConfig, record: Record) -> Path:
    """The run folder that a trial works in."""
    seed = {} if record.seed is None else {"learn.seed": record.seed}
    pieces = sorted((config.folder / "trials" / record.trial).glob("segment-*"))
    return pieces[-1] if pieces else Path(config.trial({**record.point, **seed}).out)


def _close_phase(config: CampaignConfig, journal: Journal, trials: Trials, phase: str) -> None:
    """What all had computed when the phase ended: later phases may go on in the same folders."""
    open_ = [record.trial for record in journal.of(phase) if not record.status]
    if open_:
        raise RuntimeError(f"{config.folder}: Tune ended before {', '.join(open_)}; the same command goes on")
    spent = {record.trial: samples(config, trials, record) for record in journal.of(phase)}
    before = journal.phases.get(phase, {}).get("samples", {})  # of a phase that is extended
    journal.write("phase", phase=phase, samples={**spent, **before})


# ---------------------------------------------------------------- publish


def _publish(config: CampaignConfig, journal: Journal, trials: Trials) -> dict[str, Any]:
    """The campaign's results as files, and as a dict."""
    out = config.folder
    search, rest, again = (rows_of(config, journal, trials, phase) for phase in PHASES)
    write_tables(out, config, [*search, *rest, *again])
    best = search[0]
    if best.status != FINISHED:
        raise RuntimeError(f"{out}: no trial finished; see {out / 'results.csv'} and the folders in {out / 'trials'}")
    pictures = draw_all(out, config, journal, search)
    spread, saved = confirmed(config, search, again), saving(config, search, rest)
    text = report(config, search, rest, again, spread, saved, importances(config, journal), journal.seconds, pictures)
    with committed(out / "report.md") as temporary:
        temporary.write_text(text)
    log_to_mlflow(out, config, journal)
    counts = {status: sum(row.status == status for row in search) for status in (FINISHED, STOPPED)}
    return jsonable({
        "trials": len(search), "finished": counts[FINISHED], "stopped_early": counts[STOPPED],
        "failed": len(search) - counts[FINISHED] - counts[STOPPED], "resumed": sum(row.resumed > 0 for row in search),
        "best": {"config": best.point, "iou": best.iou}, "samples_total": sum(row.samples for row in (*search, *rest, *again)),
        "seconds": journal.seconds, "metric": config.metric, "value": best.value, "checkpoint": best.checkpoint,
        "results": out / "results.csv", "parquet": out / "results.parquet", "best_config": write_best(out, config, best.point),
        "pictures": pictures, "report": out / "report.md",
        **({"exhaustive": {"samples_share": saved.share, "iou_loss": saved.iou_loss, "best": saved.best.point}} if saved else {}),
    })  # fmt: skip

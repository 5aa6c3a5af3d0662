"""`train`: a fleet of cells whose members may die and come back; it ends with a complete run folder, or says why not.

The same command continues a run that was interrupted, and returns the summary of one that is complete.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from filelock import FileLock
from filelock import Timeout as LockTimeout

from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.archive.places import Place
from raysegment.archive.shards import ShardSet
from raysegment.climate.checks import BadInput
from raysegment.elastic.cells import Room
from raysegment.elastic.chaos import Plan, unfired
from raysegment.elastic.checkpoints import newest_valid, read_checkpoint
from raysegment.elastic.fleet import Fleet
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.runs import Run, read_lines, summarise
from raysegment.elastic.safe import check_same
from raysegment.elastic.settings import CheckpointConfig, TrainConfig
from raysegment.elastic.watch import Tally, Watch
from raysegment.feed.quarantine import allowed
from raysegment.feed.session import ensure_ray
from raysegment.learning.flops import training_flops
from raysegment.learning.step import initialise

__all__ = ["CheckpointConfig", "Stopped", "TrainConfig", "train", "use_gpu"]

Progress = Callable[[int, int, str], None]
_LOOK_EVERY_S = 0.25


class Stopped(Exception):
    """Training was asked to end (SIGTERM, a draining cluster) and has, with its state on record; the same command goes on."""


def train(config: TrainConfig, progress: Progress | None = None, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train as configured; the run's summary: steps, samples, samples_per_s, loss_first, loss_last, checkpoint, ….

    `progress(done, total, note)` hears of finished steps, from another thread; `say` of what happens to the fleet.
    Raises BadInput, Stopped after SIGTERM, RuntimeError when trying again does not help.
    """
    if not config.shards:
        raise BadInput("shards", "the folder of a shard set", "nothing", "Write shards=DIR; `raysegment stage` makes one.")
    manifest = _present(config)
    config = _absolute(config.resolved(manifest))
    run = Run(config.out)
    with _alone(run):
        run.prepare(config)
        _check_checkpoint(config)
        if (finished := run.finished()) is not None:
            return finished
        return _train(config, run, manifest, progress, say or (lambda _: None))


def _train(
    config: TrainConfig, run: Run, manifest: Manifest, progress: Progress | None, say: Callable[[str], None]
) -> dict[str, Any]:
    ensure_ray()
    room = _room(config)
    ladder = _ladder(config)
    for line in (*ladder.lines(), *idle(config)):
        say(line)
    resumed_from = newest_valid(config.checkpoint_place)
    run.event(
        "start",
        pid=os.getpid(),
        workers=room.workers,
        cells=list(config.elastic.cells),
        steps=config.steps,
        seed=config.learn.seed,
        manifest_sha256=set_id(manifest_bytes(config.shards)),
        device="cuda" if room.gpu else "cpu",
        threads=config.threads,
        ladder=ladder.lines(),
    )
    started = time.monotonic()
    fleet = Fleet(config, run, room, say)
    flops = training_flops(initialise(config.network, 0), manifest.tile, config.network.channels)
    tally = Tally(config.steps, config.learn.global_batch, manifest.tiles, manifest.classes, flops)
    with _following(Watch(run, config.name, tally), config.steps, progress, say), _ending_well(fleet):
        status = fleet.run()
    _check_complete(run, config, status)
    summary = _summary(run, config, flops)
    summary |= {"seconds": time.monotonic() - started, "resumed_from": str(resumed_from) if resumed_from else None}
    run.event("end", steps=config.steps)
    run.finish(summary)
    return summary


def idle(config: TrainConfig) -> list[str]:
    """What is said where some members have nothing to do: a micro-batch is computed by one of them."""
    busy = config.learn.micro_batches
    if config.members <= busy:
        return []
    return [f"learn.global_batch: {busy} micro-batches a step keep {busy} members busy, and there may be {config.members}"]


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """While inside, no other fleet works on the run's folder; BadInput when one does."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / "fleet.lock")
    try:
        lock.acquire(timeout=0)
    except LockTimeout:
        remedy = "Wait for it or stop it; or choose another folder as `out`."
        raise BadInput(
            run.folder, "a run folder that no other fleet works on", "one that is locked (fleet.lock)", remedy
        ) from None
    try:
        yield
    finally:
        lock.release()
        if run.untouched():
            _remove_empty(run)


def _remove_empty(run: Run) -> None:
    """A folder in which nothing was begun leaves no trace."""
    with suppress(OSError):
        (run.folder / "fleet.lock").unlink(missing_ok=True)
        run.folder.rmdir()


@contextmanager
def _ending_well(fleet: Fleet) -> Iterator[None]:
    """While inside, SIGTERM ends training with a committed state instead of ending this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: fleet.stop("SIGTERM"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ladder(config: TrainConfig) -> Ladder:
    """All time limits, checked against Ray Train's."""
    ladder = Ladder(config.elastic.patience_s)
    poll = float(os.environ.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", 2.0))
    ladder.check(poll, float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60.0)))
    return ladder


def _present(config: TrainConfig) -> Manifest:
    """The shards' manifest; BadInput at once where more tiles are missing from its files than the run bears."""
    place = Place.of(config.shards)
    for key, held in (("shards", place), ("checkpoint.place", Place.of(config.checkpoint_place))):
        if str(held) != held.text:
            remedy = "Give credentials through the environment (AWS_ACCESS_KEY_ID, …): a run's configuration is written down"
            raise BadInput(key, "a URI without credentials", held, remedy)
    shards = ShardSet(place)
    lost = shards.lost()
    tiles, bearable = sum(lost.values()), allowed(config.feed.max_damaged, len(shards))
    if tiles > bearable:
        first = next(iter(lost))
        remedy = f"Restore it or stage again ({tiles} of {len(shards)} tiles are missing, feed.max_damaged allows {bearable})"
        raise BadInput(first.where, first.expected, first.got, remedy)
    return shards.manifest


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths as the workers, elsewhere on the machine, can use them."""
    held, out = config.checkpoint.place, config.validation.shards
    checkpoint = replace(config.checkpoint, place=Place.of(held).text if held else "")
    validation = replace(config.validation, shards=Place.of(out).text if out else "")
    shards = Place.of(config.shards).text
    return replace(config, shards=shards, out=os.path.abspath(config.out), checkpoint=checkpoint, validation=validation)


def _check_checkpoint(config: TrainConfig) -> None:
    newest = newest_valid(config.checkpoint_place)
    if newest is not None:
        check_same(read_checkpoint(newest, training=False).facts, config, newest)


def use_gpu(config: TrainConfig) -> bool:
    """Whether the run's workers compute on GPUs, one each, of the cluster that this process is connected to."""
    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= config.workers_per_cell
    return config.device == "cuda"


def _room(config: TrainConfig) -> Room:
    """What a cell needs; BadInput where no cluster as it is could ever hold the least of them (one that grows may)."""
    gpu = use_gpu(config)
    room = Room(config.workers_per_cell, {"CPU": config.cpus_per_worker, **({"GPU": 1} if gpu else {})}, gpu)
    if not os.environ.get("RAY_ADDRESS"):
        _check_room(config, room)
    return room


def _check_room(config: TrainConfig, room: Room) -> None:
    total = ray.cluster_resources()
    for kind, each in room.per_worker.items():
        needed = each * room.workers
        largest = max((node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]), default=0)
        held, where = (largest, "on a node") if config.elastic.cells[1] > 1 else (total.get(kind, 0), "in the cluster")
        if needed > held:
            key = "elastic.workers_per_cell" if config.elastic.workers_per_cell else "workers"
            expected = f"at most the {held:g} {kind} there are {where}"
            raise BadInput(key, expected, f"{room.workers} x {each:g}", "Ask for fewer workers, or cpus_per_worker=0.5.")


@contextmanager
def _following(watch: Watch, total: int, progress: Progress | None, say: Callable[[str], None]) -> Iterator[None]:
    """While inside, a thread reads the run's log as it grows, exports its metrics and tells `progress` of its steps."""
    done = threading.Event()
    asked = (watch, total, progress or (lambda *_: None), done)
    thread = threading.Thread(target=_follow, args=(*asked, say), name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _follow(watch: Watch, total: int, progress: Progress, done: threading.Event, say: Callable[[str], None]) -> None:
    last = False
    while not last:
        last = done.wait(_LOOK_EVERY_S)  # once more after the end
        try:
            lines = watch.look()
        except Exception as error:  # whatever it is, training goes on
            say(f"no more metrics and progress: {type(error).__name__}: {error}")
            return
        if lines:
            loss = lines[-1]["loss"]
            progress(lines[-1]["step"] + 1, total, "" if loss is None else f"loss {loss:.4f}")


def _check_complete(run: Run, config: TrainConfig, status: dict[str, Any]) -> None:
    """Raise what ended training before its last step."""
    cause = status["gave_up"]
    if cause is not None and cause["bad_input"]:
        raise BadInput(*cause["bad_input"])
    newest = newest_valid(config.checkpoint_place)
    step = read_checkpoint(newest, training=False).facts.step if newest is not None else 0
    if step >= config.steps:
        return
    if cause is None and status["stopping"]:
        raise Stopped(
            f"{run.folder}: stopped ({status['stopping']}) after {step} of {config.steps} steps; the same command goes on"
        )
    reason = cause["error"] if cause is not None else "none on record"
    raise RuntimeError(f"{run.folder}: gave up, starting again did not lead to a new step. Last failure: {reason}. "
                       f"See {run.events}; the same command tries again.")  # fmt: skip


def _summary(run: Run, config: TrainConfig, flops: float) -> dict[str, Any]:
    """What the run's own files say about it."""
    checkpoint = newest_valid(config.checkpoint_place)
    assert checkpoint is not None
    provenance = read_checkpoint(checkpoint, training=False).facts.provenance
    return {
        **summarise(read_lines(run.steps)[0], flops),
        **run.account(config.steps, config.learn.global_batch),
        "faults_not_fired": [str(fault) for fault in unfired(run.folder / "chaos", Plan.parse(config.chaos))],
        "workers": config.workers_per_cell,
        "checkpoint": str(checkpoint),
        "state_sha256": provenance["state_sha256"],
        "weights_sha256": provenance["weights_sha256"],
    }

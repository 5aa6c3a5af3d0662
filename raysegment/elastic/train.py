"""`train`: one TorchTrainer whose workers may die; it ends with a complete run folder, or says why not.

Ray Train restarts the group when a worker or node is lost; every group takes up the run from the newest whole checkpoint.
The same command continues a run that was interrupted, and returns the summary of one that is complete.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raysegment.archive.manifest import Manifest
from raysegment.archive.places import Place
from raysegment.archive.shards import ShardSet
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import newest_valid, read_checkpoint
from raysegment.elastic.runs import Run, read_lines, summarise
from raysegment.elastic.settings import CheckpointConfig, TrainConfig
from raysegment.elastic.worker import check_shards, work
from raysegment.feed.quarantine import allowed
from raysegment.feed.session import ensure_ray
from raysegment.learning.flops import training_flops
from raysegment.learning.step import initialise

__all__ = ["CheckpointConfig", "TrainConfig", "train", "use_gpu"]

Progress = Callable[[int, int, str], None]
_TAIL_EVERY_S = 0.25


def train(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Train as configured; the run's summary: steps, samples, samples_per_s, loss_first, loss_last, checkpoint, ….

    `progress(done, total, note)` hears of finished steps, from another thread.
    """
    if not config.shards:
        raise BadInput("shards", "the folder of a shard set", "nothing", "Write shards=DIR; `raysegment stage` makes one.")
    manifest = _present(config)
    config = _absolute(config.resolved(manifest))
    run = Run(config.out)
    run.prepare(config)
    _check_shards(run, config)
    if (finished := run.finished()) is not None:
        return finished
    ensure_ray()
    trainer = _trainer(config, run)
    resumed_from = newest_valid(run.checkpoints)
    run.event("start", pid=os.getpid(), workers=config.workers, steps=config.steps)
    started = time.monotonic()
    with _tail(run, config.steps, progress):
        trainer.fit()
    _check_complete(run, config)
    summary = _summary(run, config, manifest)
    summary |= {"seconds": time.monotonic() - started, "resumed_from": str(resumed_from) if resumed_from else None}
    run.event("end", steps=config.steps)
    run.finish(summary)
    return summary


def _present(config: TrainConfig) -> Manifest:
    """The shards' manifest; BadInput at once where more tiles are missing from its files than the run bears."""
    place = Place.of(config.shards)
    if str(place) != place.text:
        remedy = "Give credentials through the environment (AWS_ACCESS_KEY_ID, …): a run's configuration is written down"
        raise BadInput("shards", "a URI without credentials", place, remedy)
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
    return replace(config, shards=Place.of(config.shards).text, out=os.path.abspath(config.out))


def _check_shards(run: Run, config: TrainConfig) -> None:
    newest = newest_valid(run.checkpoints)
    if newest is not None:
        check_shards(read_checkpoint(newest, training=False).facts, config)


def _trainer(config: TrainConfig, run: Run) -> TorchTrainer:
    """Ray Train's part. Its own bookkeeping is new for every call: what a run has reached is in our checkpoints alone."""
    gpu = use_gpu(config)
    per_worker = {"CPU": config.cpus_per_worker, **({"GPU": 1} if gpu else {})}
    _check_room(config, per_worker)
    return TorchTrainer(
        work,
        train_loop_config={"config": config},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=max(1, round(config.timeout_s))),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=gpu, resources_per_worker=per_worker),
        run_config=RunConfig(
            name=f"{config.name}-{time.time_ns():x}",
            storage_path=str(run.folder / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def use_gpu(config: TrainConfig) -> bool:
    """Whether the run's workers compute on GPUs, one each, of the cluster that this process is connected to."""
    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= config.workers
    return config.device == "cuda"


def _check_room(config: TrainConfig, per_worker: dict[str, float]) -> None:
    """A cluster that can never hold the workers would wait for ever; one that grows (RAY_ADDRESS set) may."""
    total = ray.cluster_resources()
    for kind, each in per_worker.items():
        if each * config.workers > total.get(kind, 0) and not os.environ.get("RAY_ADDRESS"):
            expected = f"at most the {total.get(kind, 0):g} {kind} there are"
            raise BadInput("workers", expected, f"{config.workers} x {each:g}", "Ask for fewer workers, or cpus_per_worker=0.5.")


@contextmanager
def _tail(run: Run, total: int, progress: Progress | None) -> Iterator[None]:
    """While inside, tell `progress` of every step line that appears."""
    if progress is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, total, progress, done), name="tail-steps", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _follow(run: Run, total: int, progress: Progress, done: threading.Event) -> None:
    offset, last = 0, False
    while not last:
        last = done.wait(_TAIL_EVERY_S)  # once more after the end
        lines, offset = read_lines(run.steps, offset)
        if lines:
            loss = lines[-1]["loss"]
            progress(lines[-1]["step"] + 1, total, "" if loss is None else f"loss {loss:.4f}")


def _check_complete(run: Run, config: TrainConfig) -> None:
    """Workers that gave up return quietly; say what stopped them."""
    newest = newest_valid(run.checkpoints)
    if newest is not None and read_checkpoint(newest, training=False).facts.step >= config.steps:
        return
    cause = run.fruitless().cause
    if cause is not None and cause["bad_input"]:
        raise BadInput(*cause["bad_input"])
    reason = cause["error"] if cause is not None else "none on record"
    raise RuntimeError(f"{run.folder}: gave up, starting again did not lead to a new step. Last failure: {reason}. "
                       f"See {run.events}; the same command tries again.")  # fmt: skip


def _summary(run: Run, config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What the run's own files say about it."""
    events, checkpoint = run.read_events(), newest_valid(run.checkpoints)
    assert checkpoint is not None
    count = {kind: sum(event["event"] == kind for event in events) for kind in ("start", "group", "fault")}
    flops = training_flops(initialise(config.network, 0), manifest.tile, config.network.channels)
    provenance = read_checkpoint(checkpoint, training=False).facts.provenance
    return {
        **summarise(read_lines(run.steps)[0], flops),
        "workers": config.workers,
        "checkpoint": str(checkpoint),
        "faults_survived": count["group"] - min(count["group"], count["start"]),
        "faults_injected": count["fault"],
        "state_sha256": provenance["state_sha256"],
        "weights_sha256": provenance["weights_sha256"],
    }

"""What each Ray Train worker does: take up the run where it stands, step by step to the end, leave a trace of it.

    resume → [wait for tiles → compute → exchange → commit → log → (checkpoint, report)] … → last checkpoint

State is the same on all members, so the first member alone writes; that it wants to write after a step travels with the
step's own exchange (`signal`), so that all members meet in `ray.train.report` without another message.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.climate.checks import BadInput
from raysegment.elastic.chaos import Fault, Plan
from raysegment.elastic.checkpoints import Checkpoint, Facts, newest_valid, read_checkpoint, remove_orphans, write_checkpoint
from raysegment.elastic.runs import Run, StepLog, last_step, mend
from raysegment.elastic.settings import TrainConfig, plain
from raysegment.feed.quarantine import FILE, Quarantine
from raysegment.feed.stream import open_stream
from raysegment.learning.exchange import Distributed
from raysegment.learning.losses import class_weights
from raysegment.learning.normalise import Normaliser
from raysegment.learning.state import TrainState, capture, restore
from raysegment.learning.step import Learner, StepInfo, initialise

CHECKPOINT, REPORT = 1, 2  # what the first member may signal with a step
_REPORT_EVERY_S = 10.0  # Ray Train takes one report per 2 s; more would make the step wait


def work(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs in every worker; `settings["config"]` is a resolved TrainConfig."""
    config: TrainConfig = settings["config"]
    run, rank = Run(config.out), ray.train.get_context().get_world_rank()
    try:
        _work(config, run, rank)
    except Exception as error:
        bad = error.__reduce__()[1] if isinstance(error, BadInput) else None
        what, trace = f"{type(error).__name__}: {error}", traceback.format_exc()[-4000:]
        lasting = not isinstance(error, RuntimeError | OSError)  # those are also what survivors of a lost member get
        run.event("failure", member=rank, error=what, lasting=lasting, bad_input=bad, trace=trace)
        raise


def _work(config: TrainConfig, run: Run, rank: int) -> None:
    started = time.perf_counter()
    device = _device(config)
    manifest = Manifest.load(config.shards)
    if not _may_start(config, run, rank):
        return
    checkpoint = _newest_checkpoint(config, run, rank)
    first, world = checkpoint.facts.step if checkpoint else 0, dist.get_world_size()
    quarantine = Quarantine(manifest.tiles, config.feed.max_damaged, run.folder / FILE)
    order = config.order(manifest)
    stream = open_stream(config.shards, order, first, config.steps, rank, world, config.feed, quarantine)
    learner = make_learner(config, manifest, device)
    if checkpoint:
        restore(learner, TrainState(checkpoint.weights, checkpoint.state, checkpoint.facts.training))
    scribe = Scribe(config, run, manifest) if rank == 0 else None
    if rank == 0:
        name = checkpoint.path.name if checkpoint else None
        run.event("ready", world=world, step=first, resumed_from=name, seconds=time.perf_counter() - started)
    plan, before = Plan.parse(config.chaos), time.perf_counter()
    for item in stream:
        plan.fire(item.step, rank, run.folder / "chaos", lambda fault: _record(run, fault))
        info = learner.run(item, signal=scribe.wishes(item.step) if scribe else 0)
        now = time.perf_counter()
        if scribe:
            scribe.after(info, learner, now - before)
        before = now
        if info.signals & REPORT:
            news = {"loss": info.loss, "lr": info.lr, "samples": info.samples, "quarantined": info.quarantined}
            ray.train.report({"step": info.step, **news})
    if scribe:
        scribe.close(learner)


def make_learner(config: TrainConfig, manifest: Manifest, device: torch.device | str) -> Learner:
    """A fresh learner in the process group of this worker."""
    network = initialise(config.network, config.learn.seed)
    normaliser = Normaliser.of(manifest.mean, [max(std, 1e-30) for std in manifest.std], config.channel_names)
    weights = class_weights(manifest.class_counts, config.learn.loss.weights)
    return Learner(network, config.learn, normaliser, weights, Distributed(), device)


def _device(config: TrainConfig) -> torch.device:
    """The worker's device, prepared: as many threads as CPUs were asked for, kernels that give the same bits each time."""
    torch.set_num_threads(config.threads)
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.learn.exchange != "fast":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A debugging aid that writes every new tensor twice; no result depends on it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False
    return device


def _may_start(config: TrainConfig, run: Run, rank: int) -> bool:
    """False (everywhere) when groups of this run keep failing without a new step: trying again would not help."""
    verdict: list[bool] = [True]
    if rank == 0:
        verdict[0] = not run.fruitless().hopeless(config.max_fruitless)
        mend(run.steps)
        run.event("group" if verdict[0] else "gave_up", world=dist.get_world_size(), high_water=last_step(run.steps))
    dist.broadcast_object_list(verdict, src=0)
    return verdict[0]


def _newest_checkpoint(config: TrainConfig, run: Run, rank: int) -> Checkpoint | None:
    """The newest whole checkpoint, the one that the first member sees; None at the beginning."""
    name: list[str | None] = [None]
    if rank == 0:
        remove_orphans(run.checkpoints)
        newest = newest_valid(run.checkpoints)
        name[0] = newest.name if newest else None
    dist.broadcast_object_list(name, src=0)
    if name[0] is None:
        return None
    checkpoint = read_checkpoint(run.checkpoints / name[0])
    check_shards(checkpoint.facts, config)
    return checkpoint


def check_shards(facts: Facts, config: TrainConfig) -> None:
    was, now = facts.provenance.get("manifest_sha256"), manifest_sha256(config.shards)
    if was != now:
        expected, remedy = f"the shards that the run began with (manifest {was})", "Continue with those, or start a new run."
        raise BadInput(config.shards, expected, f"manifest {now}", remedy)


def manifest_sha256(shards: str) -> str:
    """Identity of the shard set in a folder or below a URI."""
    return set_id(manifest_bytes(shards))


def state_sha256(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors: equal exactly when the states are."""
    digest = hashlib.sha256()
    for kind, tensors in (("weights", weights), ("state", state)):
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{kind}/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _record(run: Run, fault: Fault) -> None:
    run.event("fault", fault=str(fault), step=fault.step, member=fault.member)


@dataclass
class Scribe:
    """The first member's hand: logs steps, decides when to write state, writes it."""

    config: TrainConfig
    run: Run
    manifest: Manifest
    written: float = field(default_factory=time.monotonic)  # when state was last written
    reported: float = field(default_factory=time.monotonic)
    pause_s: float = 0.0  # seconds of writing since the last step

    def __post_init__(self) -> None:
        self.log = StepLog(self.run.steps)
        self.manifest_sha256 = manifest_sha256(self.config.shards)

    def wishes(self, step: int) -> int:
        """What should happen after a step: CHECKPOINT, REPORT, both or nothing."""
        when, now = self.config.checkpoint, time.monotonic()
        last = step + 1 == self.config.steps
        due = (step + 1) % when.every_steps == 0 if when.every_steps else now - self.written >= when.every_s
        report = now - self.reported >= _REPORT_EVERY_S
        if report:
            self.reported = now
        return (CHECKPOINT if due and not last else 0) + (REPORT if report else 0)

    def after(self, info: StepInfo, learner: Learner, step_s: float) -> None:
        """Log a step that is committed; write state if that was wished. That pause is part of the next step's seconds."""
        times = {"step_s": step_s, "checkpoint_s": self.pause_s, "time": time.time()}
        cursor = info.step * self.config.learn.global_batch
        self.log.write(info.step, {**asdict(info), "cursor": cursor, "world": learner.world.size, **times})
        self.pause_s = 0.0
        if info.signals & CHECKPOINT:
            started = time.perf_counter()
            self.checkpoint(learner)
            self.pause_s = time.perf_counter() - started

    def checkpoint(self, learner: Learner) -> None:
        """Write the learner's state as it is between two steps; the log of its steps is on the disk before."""
        self.log.sync()
        started, state, held = time.perf_counter(), capture(learner), self.manifest
        provenance = {
            "run": self.config.name,
            "manifest_sha256": self.manifest_sha256,
            "labels": held.labels,
            "class_weights": learner.weights.tolist(),
            "weights_sha256": state_sha256(state.weights, {}),
            "state_sha256": state_sha256(state.weights, state.tensors),
            "config": plain(self.config),
            "torch": torch.__version__,
        }
        facts = Facts(
            step=state.facts["step"], cursor=state.facts["cursor"], network=self.config.network,
            channels=learner.normaliser.names, mean=learner.normaliser.mean, std=learner.normaliser.std,
            spacing_deg=held.spacing_deg, classes=held.classes, provenance=provenance, training=state.facts,
        )  # fmt: skip
        path = write_checkpoint(self.run.checkpoints, facts, state.weights, state.tensors, self.config.checkpoint.keep)
        self.written = time.monotonic()
        self.run.event("checkpoint", step=facts.step, path=path.name, seconds=time.perf_counter() - started)

    def close(self, learner: Learner) -> None:
        """The last state, and the end of the log."""
        self.checkpoint(learner)
        self.log.close()

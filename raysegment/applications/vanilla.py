"""What the same job costs on plain Ray Train when a worker or a node dies: the measure that `chaos` is held against.

One `TorchTrainer(num_workers=(least, most))` as an experienced user writes it: the process group that Ray sets up, a report
with a checkpoint every so many steps, `get_checkpoint` at the start, restarts without a bound. Network, loss, optimizer,
exchange and stream are those of our own runs. A worker is killed, later a node, on a cluster of fake nodes, twice:

    defaults    all of Ray's own figures
    tuned       health checks at 0.5 s, placement groups given up after 5 s, nodes that do not answer dead after 3 s, and the
                reservations asked for anew at each failure (`Kick`); without that, Ray waits for nodes that are gone

Ray reads its figures when it starts, so each of the two is a process of its own, `python -m raysegment.applications.vanilla
JOB`, which prints one JSON object. Whatever Ray the caller is connected to is left alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raysegment import config as configurations
from raysegment.applications.fake_cluster import fake_cluster
from raysegment.archive.manifest import Manifest
from raysegment.elastic import chaos
from raysegment.elastic.settings import TrainConfig, plain
from raysegment.elastic.worker import make_learner
from raysegment.feed.session import worker_environment
from raysegment.feed.stream import open_stream
from raysegment.learning.exchange import Distributed
from raysegment.learning.optim import OptimConfig
from raysegment.learning.state import TrainState, capture, restore

try:  # neither is part of Ray's public interface
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
    from ray.train.v2._internal.execution.callback import ControllerCallback
except ImportError:
    get_or_create_autoscaling_coordinator, ControllerCallback = None, object

VARIANTS = ("defaults", "tuned")
KILLS = ("worker", "node")
_TUNED = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
_TUNED_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
_KEPT = ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # not figures of Ray's, but where and who
_ENDLESS = 1_000_000  # steps: the job is ended when all is measured
_LOG, _STOP = "steps.jsonl", "stop"  # files of a variant: the workers' steps; that all has been measured
_LOOK_EVERY_S = 0.05
_STOP_S = 20.0  # for workers and controller to end themselves
_GRACE_S = 60.0  # for a variant's process to end itself after its deadline


@dataclass(frozen=True)
class VanillaConfig:
    """On `workers` (least, most) fake nodes: what is killed, each `after_steps` steps after the start or the last recovery.

    A checkpoint is written every `checkpoint_steps` steps. `deadline_s` bounds each variant, its start included.
    """

    workers: tuple[int, int] = (1, 3)
    kills: tuple[str, ...] = KILLS
    after_steps: int = 25
    checkpoint_steps: int = 20
    deadline_s: float = 240.0
    variants: tuple[str, ...] = VARIANTS

    def __post_init__(self) -> None:
        for name in ("workers", "kills", "variants"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not {*self.kills} <= {*KILLS} or not {*self.variants} <= {*VARIANTS}:
            raise ValueError(f"expected kills of {', '.join(KILLS)} and variants of {', '.join(VARIANTS)}, got {self}")
        if not 1 <= self.workers[0] <= self.workers[1]:
            raise ValueError(f"workers: expected [least, most] with 1 <= least <= most, got {list(self.workers)}")
        if self.after_steps < 1 or self.checkpoint_steps < 1 or self.deadline_s <= 0:
            raise ValueError(f"expected after_steps, checkpoint_steps and deadline_s above 0, got {self}")


# ---------------------------------------------------------------- the caller's side


def vanilla(config: TrainConfig, settings: VanillaConfig, folder: str | Path | None = None) -> dict[str, Any]:
    """{variant: {start_s, kick, trials}, …}; see `measure`. A variant that failed has an `error` in their place.

    `folder` gets each variant's job, log and checkpoints; without one nothing is kept.
    """
    resolved = configurations.load(TrainConfig, plain(config))  # a copy that is certain to survive being written
    with tempfile.TemporaryDirectory(prefix="vanilla-") as temporary:
        place = Path(folder or temporary).absolute()
        return {variant: _in_a_process(resolved, settings, variant, place / variant) for variant in settings.variants}


def _in_a_process(config: TrainConfig, settings: VanillaConfig, variant: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    job.write_text(json.dumps({"config": plain(config), "settings": asdict(settings), "variant": variant}))
    words = [sys.executable, "-m", "raysegment.applications.vanilla", str(job)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, env=_environment(variant), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            said, _ = process.communicate(timeout=settings.deadline_s + _GRACE_S)
        finally:
            _end(process)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"error": f"exit code {process.returncode}, see {folder / 'log.txt'}"}


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing behind of a variant that did not end itself."""
    if process.poll() is None:
        for pid in (*chaos.descendants(process.pid), process.pid):
            chaos.end(pid)
        process.wait()


def _environment(variant: str) -> dict[str, str]:
    """This process's variables without anything that would tell Ray another figure than the variant's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key in _KEPT}
    own = {key: value for key, value in worker_environment().items() if not key.startswith(("RAY_TRAIN_", "RAY_worker_"))}
    return kept | own | (_TUNED if variant == "tuned" else {})


# ---------------------------------------------------------------- the job, in Ray Train's workers


def train_as_usual(settings: Mapping[str, Any]) -> None:
    """What Ray Train runs in each worker. `settings`: a resolved TrainConfig, `every` steps per checkpoint, the `folder`."""
    config, every, folder = settings["config"], settings["every"], Path(settings["folder"])
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    manifest = Manifest.load(config.shards)
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    learner = make_learner(config, manifest, device)
    learner.world = Distributed()
    if (kept := ray.train.get_checkpoint()) is not None:
        with kept.as_directory() as directory:
            restore(learner, TrainState(**torch.load(Path(directory) / "state.pt", weights_only=True)))
    for item in open_stream(config.shards, config.order(manifest), learner.step, config.steps, rank, world, config.feed):
        info = learner.run(item, signal=int((folder / _STOP).exists()))
        if info is not None and info.signals:  # known to all in the same step
            return
        _append(folder / _LOG, {"time": time.time(), "step": item.step, "rank": rank, "world": world, "pid": os.getpid()})
        if (item.step + 1) % every == 0:
            learner.settle()
            _report(item.step, capture(learner) if rank == 0 else None)


def _report(step: int, state: TrainState | None) -> None:
    """All workers meet here; the first one brings the state."""
    with tempfile.TemporaryDirectory() as folder:
        if state is not None:
            torch.save(vars(state), Path(folder) / "state.pt")
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder) if state is not None else None)


def _append(log: Path, line: Mapping[str, Any]) -> None:
    with log.open("ab", buffering=0) as file:  # one write, so that several processes may
        file.write(json.dumps(line).encode() + b"\n")


class Kick(ControllerCallback):  # pyright: ignore[reportGeneralTypeIssues]
    """At every failure, make Ray look at which nodes there are now, not at most 20 s ago, before it decides on a new size."""

    def after_controller_start(self, train_run_context: Any) -> None:
        self._requester = f"train-{train_run_context.run_id}"

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        if get_or_create_autoscaling_coordinator is not None:
            coordinator: Any = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote(self._requester, True), timeout=5)


# ---------------------------------------------------------------- one variant, measured


def measure(
    config: TrainConfig, settings: VanillaConfig, variant: str, folder: Path, tell: Callable[[dict[str, Any]], None]
) -> None:
    """`tell` `start_s` from here to the first step; `kick`, whether that was possible; `trials`, see `_trial`.

    Needs this process's environment as `_environment` makes it. Told before the cluster ends: a `fit` that still runs then
    takes the process with it.
    """
    deadline = time.monotonic() + settings.deadline_s
    config = _endless(config)
    tuned, log = variant == "tuned", Steps(folder / _LOG)
    (folder / _STOP).unlink(missing_ok=True)
    with fake_cluster(settings.workers[1], 1, health=_TUNED_HEALTH if tuned else {}, environment={}):
        started = time.monotonic()
        trainer = _trainer(config, settings, tuned, folder)
        fitting = threading.Thread(target=_fit, args=(trainer, folder / "error.txt"), daemon=True)
        fitting.start()
        trials, start_s = {}, None
        if log.wait(lambda line: True, deadline) is not None:
            start_s = time.monotonic() - started
            trials = {kill: _trial(log, kill, settings, deadline) for kill in settings.kills}
        kick = tuned and ControllerCallback is not object
        tell({"variant": variant, "start_s": start_s, "kick": kick, "trials": trials})
        (folder / _STOP).touch()
        fitting.join(_STOP_S)


def _endless(config: TrainConfig) -> TrainConfig:
    tree = plain(config) | {"steps": _ENDLESS, "chaos": ""}
    tree["learn"]["optim"]["total_steps"] = OptimConfig().total_steps  # follows from `steps`
    return configurations.load(TrainConfig, tree).resolved(Manifest.load(config.shards))


def _trainer(config: TrainConfig, settings: VanillaConfig, tuned: bool, folder: Path) -> TorchTrainer:
    return TorchTrainer(
        train_as_usual,
        train_loop_config={"config": config, "every": settings.checkpoint_steps, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=settings.workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=f"vanilla-{time.time_ns():x}",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Kick()] if tuned and ControllerCallback is not object else None,
        ),
    )


def _fit(trainer: TorchTrainer, errors: Path) -> None:
    """Train until told to stop; what came instead is in the file `errors`."""
    try:
        trainer.fit()
    except Exception as error:
        errors.write_text(repr(error))


class Steps:
    """The log of steps that all workers write."""

    def __init__(self, path: Path):
        self.path = path
        path.unlink(missing_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        whole = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in whole]

    def wait(self, condition: Any, deadline: float) -> dict[str, Any] | None:
        """The first line that meets the condition, as soon as there is one; None if there is none until the deadline."""
        while time.monotonic() < deadline:
            found = next((line for line in self.lines() if condition(line)), None)
            if found is not None:
                return found
            time.sleep(_LOOK_EVERY_S)
        return None


def _trial(log: Steps, kill: str, settings: VanillaConfig, deadline: float) -> dict[str, Any]:
    """`recovery_s` from the kill to the first step that nobody had done before; None where the deadline came first.

    `resumed_s`: to the first step at all; `repeated_steps`: how many were done again; `workers` before and after.
    """
    begun = log.lines()[-1]
    ready = log.wait(lambda line: line["pid"] == begun["pid"] and line["step"] >= begun["step"] + settings.after_steps, deadline)
    if ready is None:
        return {"recovery_s": None, "error": f"no {settings.after_steps} steps before the deadline"}
    victim = max(_group(log, ready), key=lambda line: line["rank"])
    killed = time.time()
    done = chaos.kill_node(victim["pid"]) if kill == "node" else chaos.end(victim["pid"]) is None
    assert done, f"{kill} of process {victim['pid']}"
    return _recovery(log, {line["pid"] for line in log.lines()}, killed, deadline) | {"workers_before": victim["world"]}


def _group(log: Steps, ready: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The newest line of each worker of the group that has written a line."""
    newest = {line["pid"]: line for line in log.lines()}
    recent = sorted(newest.values(), key=lambda line: line["time"])[-ready["world"] :]
    return [line for line in recent if line["world"] == ready["world"]]


def _recovery(log: Steps, old: set[int], killed: float, deadline: float) -> dict[str, Any]:
    """What the processes that are not of the old group did. (A survivor may finish the step it is in.)"""
    first = log.wait(lambda line: line["pid"] not in old, deadline)
    highest = max(line["step"] for line in log.lines() if line["pid"] in old)
    newer = log.wait(lambda line: line["pid"] not in old and line["step"] > highest, deadline)
    return {
        "recovery_s": newer["time"] - killed if newer else None,
        "resumed_s": first["time"] - killed if first else None,
        "repeated_steps": max(0, highest - first["step"] + 1) if first else None,
        "step": highest,
        "workers_after": first["world"] if first else None,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure what a job file asks for; the result is the last line of standard output."""
    job = json.loads(Path(arguments[0]).read_text())
    config = configurations.load(TrainConfig, job["config"])
    settings = configurations.load(VanillaConfig, job["settings"])
    measure(config, settings, job["variant"], Path(arguments[0]).parent, lambda result: print(json.dumps(result), flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A training job before it runs: hours, GPU-hours, files, memory, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysegment.applications.scaling import accuracy
from raysegment.applications.scaling.fit import Model
from raysegment.applications.scaling.goodput import Faults, Job, best_interval_s, goodput
from raysegment.applications.scaling.predict import Prediction, Query, complete, predict, where
from raysegment.applications.scaling.step import Where, read_bytes
from raysegment.climate.checks import BadInput

STATE_BYTES = 16  # a parameter: weight, gradient, Adam's two moments, float32
COPY_BYTES_PER_S = 2e9  # of state out of a GPU into memory while training stands still; assumed
_WORTH_NAMING = 0.002


@dataclass(frozen=True)
class Plan:
    """Hours and GPU-hours with faults (`hours_without_faults`: none, nothing saved), and what they are made of."""

    prediction: Prediction
    epochs: float
    hours: float
    hours_low: float
    hours_high: float
    hours_without_faults: float
    hours_waiting: float
    gpu_hours: float
    goodput: float
    goodput_waiting: float
    checkpoint_interval_s: float
    checkpoint_s: float
    mtbf_hours: float
    memory_gib: float
    shared_read_bytes_per_s: float
    staged_bytes: float
    staging_s: float
    limits: tuple[str, ...]
    lost: dict[str, float]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key != "prediction"}
        return {**self.prediction.as_dict(), **plain, "limits": list(self.limits), "warnings": list(self.warnings)}


def plan(model: Model, query: Query, epochs: float | None, faults: Faults, checkpoint_s: float | None = None) -> Plan:
    """The plan of a job; epochs None: as many as the global batch needs by the measured curve."""
    query = complete(model, query)
    if epochs is not None and not epochs > 0:
        raise BadInput("--epochs", "a number above 0", epochs, "Leave it out to have it from the global batch.")
    curve = accuracy.epochs_curve(accuracy.measured())
    here, speed = where(model, query), predict(model, query)
    batch = query.gpus * here.local_batch
    needed = epochs if epochs is not None else curve.at(batch)
    job, faults = job_of(here, speed.step_s, checkpoint_s), with_control(faults, query)
    interval_s = best_interval_s(job, faults)
    share = goodput(job, faults, interval_s)
    waiting = replace(job, policy="wait")
    share_waiting = goodput(waiting, faults, best_interval_s(waiting, faults))
    samples = needed * here.workload.epoch_samples(query.gpus)
    pure = samples / speed.samples_per_s / 3600
    lost = _lost(model, here, speed, share, curve)
    return Plan(
        speed, needed, pure / share, samples / speed.high / share / 3600, samples / speed.low / share / 3600, pure,
        pure / share_waiting, pure / share * query.gpus, share, share_waiting, interval_s, job.checkpoint_s,
        faults.mtbf_s(query.gpus) / 3600, memory_gib(here), shared_read(here, speed.step_s),
        staged_bytes(here), staging_s(here),
        tuple(sorted((name for name in lost if lost[name] > _WORTH_NAMING), key=lambda name: -lost[name])), lost,
        (*speed.warnings, *_pays(model, query, here, curve), *_fits(here)),
    )  # fmt: skip


def job_of(here: Where, step_s: float, checkpoint_s: float | None) -> Job:
    """What failures meet: one takes a node's GPUs; a checkpoint's stall is what copying the state out takes, if not given."""
    cost_s = checkpoint_s if checkpoint_s is not None else STATE_BYTES * here.workload.parameters / COPY_BYTES_PER_S
    return Job(here.gpus, here.members, step_s, cost_s)


def with_control(faults: Faults, query: Query) -> Faults:
    """Faults whose figures, measured with three members, hold what the measured control plane takes for so many more."""
    if query.plane is None:
        return faults
    extra = {name: query.plane.extra_s(f"{name}_s", query.gpus) for name in ("loss", "grow", "join")}
    return replace(
        faults, detection_s=faults.detection_s + extra["loss"], joining_s=faults.joining_s + extra["grow"],
        all_back_s=faults.all_back_s + extra["join"],
    )  # fmt: skip


def memory_gib(here: Where) -> float:
    """GiB of one GPU: state (one more gradient with lag 1) and what a batch keeps for backward."""
    state = (STATE_BYTES + 4 * here.lag) * here.workload.parameters / 2**30
    return state + here.local_batch * here.workload.activation_gib * (1.0 if here.precision == "fp32" else 0.5)


def shared_read(here: Where, step_s: float) -> float:
    """Bytes/s that all nodes together ask of the shared file system when training runs; 0 where nodes have disks."""
    return 0.0 if here.machine.disk_bytes_per_s else here.nodes * read_bytes(here) / step_s


def staged_bytes(here: Where) -> float:
    """Bytes that are read from the shared file system before training, or in its first epoch: each sample once in all."""
    return here.workload.epoch_samples(here.gpus) * here.workload.sample_bytes


def staging_s(here: Where) -> float:
    """Seconds that this takes at least: at what the file system gives, or the nodes' links take. Not part of the hours."""
    machine = here.machine
    return staged_bytes(here) / min(machine.shared_bytes_per_s, here.nodes * machine.node_bytes_per_s)


def _lost(model: Model, here: Where, speed: Prediction, share: float, curve: accuracy.Epochs) -> dict[str, float]:
    """Share of the time that each cause takes beyond what work there is."""
    best = model.rates(model.best[None], speed.system, speed.precision)
    t1 = 1e12 * here.workload.tflop / (here.machine.peak_flops(here.precision) * float(best.utilisation[0]))
    fixed = float(best.launch_s[0]) + float(best.fill[0]) * t1
    small_batch = speed.shares["compute"] * fixed / (fixed + here.local_batch * t1)
    causes = {cause: part for cause, part in speed.shares.items() if cause != "compute"}
    statistical = 1 - curve.at(1) / curve.at(here.gpus * here.local_batch) if here.workload.samples else 0.0
    return {**causes, "small_local_batch": small_batch, "faults_and_saving": 1 - share, "large_global_batch": statistical}


def _pays(model: Model, query: Query, here: Where, curve: accuracy.Epochs) -> Sequence[str]:
    """Warnings about the global batch: beyond what was measured; or half of the GPUs were nearly as fast to the target."""
    batch, found = query.gpus * here.local_batch, []
    if not here.workload.samples:
        return [f"epochs against global batch were measured for DeepCAM only, not {query.network}"]
    if batch > curve.largest:
        found.append(f"global batch {batch} is larger than any with known epochs ({curve.largest}): these are extrapolated")
    if query.gpus >= 2:
        half = query.gpus // 2
        gain = accuracy.speedup_of_doubling(
            curve, half, here.local_batch, lambda gpus: predict(model, replace(query, gpus=gpus)).samples_per_s
        )
        if gain < accuracy.PAYS:
            needs = f"{curve.at(batch):.1f} epochs instead of {curve.at(batch / 2):.1f}"
            found.append(f"a global batch of {batch} no longer pays: it needs {needs}; {half} GPUs take {gain:.2f} times as long")
    return found


def _fits(here: Where) -> Sequence[str]:
    need, there = memory_gib(here), here.machine.gpu_memory_gib
    return [f"about {need:.0f} GiB are needed on GPUs of {there:g}"] if need > there else []

"""The time of one training step on P GPUs, cause by cause, in seconds. Pure arithmetic on numbers or arrays of them.

    step = compute + exposed exchange + straggling + exposed input + control

Every cause can be left out (`without`). Arguments broadcast: rows of measurements against draws of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from raysegment.applications.scaling.control import ControlPlane
from raysegment.applications.scaling.machines import Machine
from raysegment.applications.scaling.workloads import Workload

CAUSES = ("compute", "input", "exchange", "straggling", "control")
ALGORITHMS = ("best", "ring", "tree", "flat_ring")
BACKWARD = 2 / 3  # of compute: two of the three passes that are counted
BUCKETS = 8  # of about 25 MB, torch's DistributedDataParallel
RADIX = 2  # of the control tree; HOROVOD_CONTROL_RADIX's default
MESSAGE_S = 1e-6  # a small message at rank 0: "millions a second" (Kurth et al. 2018, recalled)
TICK_S = 2e-3  # HOROVOD_SLEEP_INTERVAL on Summit
USABLE = 0.5  # of a node's memory holds samples; the rest is for processes; assumed
_SOFT = 0.05  # how sharp the border between hidden and seen input is, as a share of what hides it

Array = Any  # a number or an array; everything broadcasts


@dataclass(frozen=True)
class Where:
    """One configuration: which machine and workload, on how many GPUs, with which local batch, precision and lag; `plane` is
    the control plane where it has been measured."""

    machine: Machine
    workload: Workload
    gpus: int
    local_batch: int
    precision: str
    lag: int = 0
    algorithm: str = "best"
    control: str | None = None  # flat, tree, none or measured; None: the workload's, unless there is a `plane`
    plane: ControlPlane | None = None

    @property
    def nodes(self) -> int:
        return self.machine.nodes(self.gpus)

    @property
    def members(self) -> int:
        """GPUs of one node that take part."""
        return min(self.gpus, self.machine.gpus_per_node)

    @property
    def steps_per_epoch(self) -> float:
        return max(1.0, self.workload.epoch_samples(self.gpus) / (self.gpus * self.local_batch))


@dataclass(frozen=True)
class Rates:
    """What is fitted: numbers or arrays.

    utilisation   of the matrix units, as the local batch grows
    launch_s      time of a step that no batch size changes (kernel launches, optimizer)
    fill          time of a step that grows with the work of a sample but not with the batch, in samples
    efficiency    of the exchange library on the links
    overlap       share of backward during which the exchange makes progress
    jitter        spread of a rank's compute time, relative
    persistent    share of the jitter's variance that stays with the rank (slow GPUs)
    epoch_s       at each epoch's border
    disk          how fast files are read, over what the machine's file says
    """

    utilisation: Array
    launch_s: Array
    fill: Array
    efficiency: Array
    overlap: Array
    jitter: Array
    persistent: Array
    epoch_s: Array
    disk: Array


def times(where: Where, rates: Rates, without: Collection[str] = ()) -> dict[str, Array]:
    """Seconds of a step for each of CAUSES; those named in `without` are 0 (so is what they would have hidden or exposed)."""
    found = {"compute": compute(where, rates)}
    found["exchange"] = 0.0 if "exchange" in without else exchange(where, rates, found["compute"], "overlap" in without)
    found["straggling"] = 0.0 if "straggling" in without else straggling(where, rates, found["compute"])
    busy = found["compute"] + found["exchange"] + found["straggling"]
    found["input"] = 0.0 if "input" in without else exposed_input(where, rates, busy)
    busy = busy + found["input"]
    found["control"] = 0.0 if "control" in without else control(where, rates, found["compute"], busy)
    return {cause: found[cause] for cause in CAUSES}


def compute(where: Where, rates: Rates) -> Array:
    """t0 + b·t1: t1 = operations / (peak · utilisation), t0 = launch_s + fill · t1."""
    t1 = 1e12 * where.workload.tflop / (where.machine.peak_flops(where.precision) * rates.utilisation)
    return rates.launch_s + (rates.fill + where.local_batch) * t1


# ---------------------------------------------------------------- exchange


def exchange(where: Where, rates: Rates, compute_s: Array, no_overlap: bool = False) -> Array:
    """Seconds of the gradient exchange that a step waits for.

    Buckets are ready one after the other during backward and are sent one after the other: the last one is always seen,
    all of them but for what backward hides otherwise. With lag 1 all are ready when the step begins: the whole step hides.
    """
    if where.gpus <= 1:
        return 0.0
    bucket_s = all_reduce_s(where, rates.efficiency, where.workload.gradient_bytes() / BUCKETS)
    total_s = BUCKETS * bucket_s
    if no_overlap:
        return total_s
    if where.lag:
        return np.maximum(0.0, total_s - rates.overlap * compute_s)
    hidden_s = rates.overlap * BACKWARD * compute_s * (BUCKETS - 1) / BUCKETS
    return np.maximum(bucket_s, total_s - hidden_s)


def all_reduce_s(where: Where, efficiency: Array, size: float) -> Array:
    """Seconds of one all-reduce of `size` bytes; `best`: the fastest of hierarchical ring and tree, as NCCL chooses."""
    if where.algorithm == "best":
        return np.minimum(_hierarchical(where, efficiency, size, ring_s), _hierarchical(where, efficiency, size, tree_s))
    if where.algorithm == "flat_ring":
        machine = where.machine
        share = machine.node_bytes_per_s if where.nodes > 1 else machine.intra_bytes_per_s
        return machine.launch_s + ring_s(where.gpus, size, share * efficiency, machine.inter_latency_s)
    return _hierarchical(where, efficiency, size, ring_s if where.algorithm == "ring" else tree_s)


def ring_s(ranks: int, size: Array, bytes_per_s: Array, latency_s: float) -> Array:
    """2(P−1)·a + 2(P−1)/P · n/B (Thakur et al. 2005)."""
    return 2 * (ranks - 1) * latency_s + 2 * (ranks - 1) / ranks * size / bytes_per_s


def tree_s(ranks: int, size: Array, bytes_per_s: Array, latency_s: float) -> Array:
    """2⌈log2 P⌉·a + 2n/B: the double binary tree (Sanders et al. 2009)."""
    if ranks <= 1:
        return 0.0
    return 2 * np.ceil(np.log2(ranks)) * latency_s + 2 * size / bytes_per_s


def _hierarchical(where: Where, efficiency: Array, size: float, between: Callable[..., Array]) -> Array:
    """Reduce-scatter in the node, all-reduce between nodes by `carriers` ranks a node, all-gather in the node.

    With fewer carriers than ranks (2018: four of six) the node's sum must reach every carrier first and all ranks
    afterwards: an all-reduce and a broadcast in the node instead of a reduce-scatter and an all-gather.
    """
    machine, members = where.machine, where.members
    inside = machine.intra_bytes_per_s * efficiency
    within_s = ring_s(members, size, inside, machine.intra_latency_s) if members > 1 else 0.0
    if where.nodes <= 1:
        return machine.launch_s + within_s
    if 0 < machine.carriers < members:
        within_s = within_s + size / inside + members * machine.intra_latency_s
    return (
        machine.launch_s + within_s + between(where.nodes, size, machine.node_bytes_per_s * efficiency, machine.inter_latency_s)
    )


# ---------------------------------------------------------------- straggling


def straggling(where: Where, rates: Rates, compute_s: Array) -> Array:
    """Seconds that the slowest of P ranks makes the others wait: jitter · compute · E[largest of P standard normals].

    With lag 1 a rank may be a whole step ahead, which hides all jitter that changes from step to step (a simulation in
    the tests: less than a twentieth is left); what stays with a rank remains.
    """
    spread = rates.jitter * np.sqrt(rates.persistent) if where.lag else rates.jitter
    return spread * compute_s * largest_of(where.gpus)


@lru_cache(maxsize=4096)
def largest_of(count: int) -> float:
    """E[largest of `count` standard normals] = ∫₀ (1 − Φⁿ) dx − ∫⁰ Φⁿ dx, by the trapezium rule."""
    x = np.arange(-1800, 1801) / 200
    below = np.exp(count * log_ndtr(x))
    return float(np.trapezoid(np.heaviside(x, 0.5) - below, x)) if count > 1 else 0.0


# ---------------------------------------------------------------- input, control


def exposed_input(where: Where, rates: Rates, busy_s: Array) -> Array:
    """Seconds a step waits for samples: reading hides behind `busy_s`, with a soft border as both vary."""
    read_s = read_bytes(where) / read_rate(where, rates.disk)
    width = _SOFT * busy_s
    return width * np.logaddexp(0.0, (read_s - busy_s) / width)


def read_bytes(where: Where) -> float:
    """Bytes that a node reads from disk in a step: its samples, but for those that its memory still holds."""
    share = where.workload.epoch_samples(where.gpus) * where.workload.sample_bytes / where.nodes
    kept = min(1.0, USABLE * where.machine.host_memory_gib * 2**30 / share)
    return where.members * where.local_batch * where.workload.sample_bytes * (1 - kept)


def read_rate(where: Where, disk: Array) -> Array:
    """Bytes/s of one node: its own disk, or else its share of the shared file system, its links at most."""
    machine = where.machine
    shared = min(machine.node_bytes_per_s, machine.shared_bytes_per_s / where.nodes)
    return disk * (machine.disk_bytes_per_s or shared)


def control(where: Where, rates: Rates, compute_s: Array, busy_s: Array) -> Array:
    """Seconds of negotiation that a step (otherwise of `busy_s`) waits for, and its share of an epoch's border.

    flat: rank 0 reads and writes 2(P−1) messages for each tensor (Horovod before 2018); tree: a rank handles r + 1, and
    the last tensor goes up and down ⌈log_r P⌉ levels and waits for a tick. Hidden behind backward but for the last tensor.
    measured: nobody waits for the roster, which hears of every step, as long as it can follow.
    """
    border_s = rates.epoch_s / where.steps_per_epoch
    plane = where.control or ("measured" if where.plane is not None else where.workload.control)
    if plane == "none" or where.gpus <= 1:
        return border_s
    if plane == "measured":
        assert where.plane is not None, "a measured control plane comes with its measurement"
        return border_s + where.plane.exposed_s(where.gpus, busy_s)
    if plane == "flat":
        each_s = 2 * (where.gpus - 1) * MESSAGE_S
        last_s = each_s + TICK_S
    else:
        each_s = (RADIX + 1) * MESSAGE_S
        last_s = 2 * np.ceil(np.log(where.gpus) / np.log(RADIX)) * (where.machine.inter_latency_s + each_s) + TICK_S
    return border_s + np.maximum(last_s, where.workload.tensors * each_s - BACKWARD * compute_s)

"""`scale calibrate`: the cluster at hand, measured by Ray actors with real collectives and a short training run.

What is measured goes into a machine file with its date as source; what could not be (links between nodes on a single node,
disks) is taken from the generic machine, and says so.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from raysegment.applications.bench_step import WEIGHTS, peaks
from raysegment.applications.scaling import machines
from raysegment.applications.scaling.machines import Machine
from raysegment.archive.files import committed
from raysegment.climate.channels import BY_NAME, NAMES
from raysegment.climate.checks import BadInput
from raysegment.feed.batches import MicroBatch, StepInput
from raysegment.feed.session import ensure_ray
from raysegment.learning.exchange import Distributed
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import LearnConfig, Learner, initialise
from raysegment.networks import NetworkConfig, TiramisuConfig

SIZES = (4, 64 << 10, 1 << 20, 8 << 20)  # bytes of an all-reduce
_PATIENCE = datetime.timedelta(seconds=120)
_TILE = (48, 72)  # of the short training run
_GENERIC_REASON = "not measured: typical value of the generic machine"


@dataclass(frozen=True)
class CalibrateConfig:
    """`members` actors; `repeats` all-reduces of each size, `steps` of training."""

    name: str = "here"
    members: int = 2
    repeats: int = 20
    steps: int = 12

    def __post_init__(self) -> None:
        if self.members < 2 or self.repeats < 3 or self.steps < 4:
            raise ValueError(f"expected at least 2 members, 3 repeats, 4 steps, got {self}")


@dataclass(frozen=True)
class Collective:
    """All-reduces among `ranks`: seconds (median) for each of SIZES, and what a ring's formula makes of them."""

    ranks: int
    seconds: tuple[float, ...]
    latency_s: float
    bytes_per_s: float


def calibrate(config: CalibrateConfig, out: Path, progress: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Measure and write the machine file `out`; returns what was measured."""
    ensure_ray()
    room = int(ray.cluster_resources().get("CPU", 0))
    if config.members > room:
        raise BadInput("members", f"at most {room}, the cluster's processors", config.members, "Ask for fewer: members=2.")
    gpus = int(ray.cluster_resources().get("GPU", 0)) >= config.members
    actor = Member.options(num_cpus=1, num_gpus=1 if gpus else 0, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
    members = [actor.remote() for _ in range(config.members)]
    try:
        measured = _measure(config, members, "nccl" if gpus else "gloo", progress)
    finally:
        for member in members:
            ray.kill(member)  # pyright: ignore[reportArgumentType]
    machine = machine_of(config.name, measured)
    with committed(out) as temporary:
        temporary.write_text(machines.as_text(machine))
    return {"machine": str(out), **measured}


def _measure(config: CalibrateConfig, members: Sequence[Any], backend: str, progress: Callable[..., None]) -> dict[str, Any]:
    """Inside a node, between nodes (where there are several), and training of all."""
    nodes: dict[str, list[Any]] = defaultdict(list)
    for member, node in zip(members, ray.get([member.node.remote() for member in members]), strict=True):
        nodes[node].append(member)
    inside = max(nodes.values(), key=len)
    heads = [group[0] for group in nodes.values()]
    found: dict[str, Any] = {"members": len(members), "nodes": len(nodes), "per_node": len(inside), "backend": backend}
    progress(0, 4, "peaks")
    found["peaks"] = ray.get(members[0].peaks.remote())
    for number, (name, group) in enumerate((("inside", inside), ("between", heads)), 1):
        progress(number, 4, f"collectives {name}")
        found[name] = _collectives(group, backend, config.repeats) if len(group) > 1 else None
    progress(3, 4, "training")
    found |= training(_together(members, backend, "train", config.steps))
    progress(4, 4)
    return found


def _together(group: Sequence[Any], backend: str, method: str, *arguments: Any) -> list[Any]:
    """What each member of a process group of its own answers to one call."""
    address = ray.get(group[0].address.remote())
    calls = [member.call.remote(method, address, rank, len(group), backend, arguments) for rank, member in enumerate(group)]
    return ray.get(calls)


def _collectives(group: Sequence[Any], backend: str, repeats: int) -> Collective:
    said = np.array(_together(group, backend, "all_reduce", repeats))  # (members, sizes, repeats)
    return ring_of(len(group), np.median(said.max(axis=0), axis=1))


def ring_of(ranks: int, seconds: Sequence[float] | np.ndarray) -> Collective:
    """Latency and rate of 2(P−1)·a + 2(P−1)/P · n/B: a from the smallest message, B from the largest."""
    seconds = [float(value) for value in seconds]
    latency_s = seconds[0] / (2 * (ranks - 1))
    moving_s = max(seconds[-1] - seconds[0], 1e-9)
    return Collective(ranks, tuple(seconds), latency_s, 2 * (ranks - 1) / ranks * SIZES[-1] / moving_s)


def training(said: Sequence[Sequence[tuple[float, float]]]) -> dict[str, float]:
    """Of (compute, exchange) seconds by member and step: medians, and the relative spread of compute."""
    compute, exchange = np.array(said).transpose(2, 0, 1)[:, :, 2:]  # the first steps warm up
    low, high = np.quantile(np.log(compute), (0.16, 0.84))  # a busy machine's outliers are no property of it
    spread = float(high - low) / 2
    return {"compute_s": float(np.median(compute)), "exchange_s": float(np.median(exchange)), "jitter": spread}


def machine_of(name: str, found: dict[str, Any]) -> Machine:
    """The machine that was measured; what was not is generic."""
    generic = machines.read(machines.FOLDER / "generic.yaml", name=name)
    date = datetime.date.today().isoformat()
    how = f"measured {date} with {found['members']} members on {found['nodes']} nodes over {found['backend']}"
    inside, between = found["inside"] or found["between"], found["between"] or found["inside"]
    values: dict[str, tuple[float, str]] = {
        "gpus": (found["members"], how), "gpus_per_node": (found["per_node"], how),
        "peak_fp32_tflops": (found["peaks"]["fp32"] / 1e12, f"{how}: best of a product of matrices and a convolution"),
        "peak_fp16_tflops": (found["peaks"]["bf16"] / 1e12, f"{how}: the same in bf16"),
        "intra_bytes_per_s": (inside.bytes_per_s, f"{how}: all-reduce of {SIZES[-1]} bytes"),
        "intra_latency_s": (inside.latency_s, f"{how}: all-reduce of {SIZES[0]} bytes"),
        "node_bytes_per_s": (between.bytes_per_s, _between(found, how)),
        "inter_latency_s": (between.latency_s, _between(found, how)),
        "launch_s": (0.0, "part of the measured latency"),
        "host_memory_gib": (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, f"{how}: this node's memory"),
        "carriers": (found["per_node"], "one for each rank"),
        "jitter": (found["jitter"], f"{how}: spread of a short training run's compute time"),
    }  # fmt: skip
    sources = dict.fromkeys(generic.sources, _GENERIC_REASON) | {key: source for key, (_, source) in values.items()}
    return replace(generic, sources=sources, **{key: value for key, (value, _) in values.items()})  # type: ignore[arg-type]


def _between(found: dict[str, Any], how: str) -> str:
    return how if found["between"] else "not measured: one node; as inside it"


@ray.remote
class Member:
    """One process of the measurement."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def address(self) -> str:
        """Where a group may meet: this node and a free port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def peaks(self) -> dict[str, float]:
        found = peaks(repeats=2)
        return {name: found.best(name) for name in ("bf16", "fp32")}

    def call(self, method: str, address: str, rank: int, size: int, backend: str, arguments: tuple[Any, ...]) -> Any:
        """Join a group, do what is asked, and leave it."""
        torch.set_num_threads(1)
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=_PATIENCE)
        try:
            return {"all_reduce": all_reduce_times, "train": train_times}[method](*arguments)
        finally:
            dist.destroy_process_group()


def all_reduce_times(repeats: int) -> list[list[float]]:
    """Seconds of all-reduces of SIZES in the group that this process is in, (sizes, repeats)."""
    return [_times(torch.zeros(size // 4, device=_device()), repeats) for size in SIZES]


def _times(tensor: torch.Tensor, repeats: int) -> list[float]:
    dist.all_reduce(tensor)
    found = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def train_times(steps: int) -> list[tuple[float, float]]:
    """(compute, exchange) seconds of so many steps of a small network, one tile for each member."""
    rank, world = dist.get_rank(), dist.get_world_size()
    network = NetworkConfig(tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1, 1)))
    normaliser = Normaliser.of([c.reference for c in BY_NAME.values()], [c.scale for c in BY_NAME.values()], NAMES)
    config = LearnConfig(global_batch=world, micro_batch=1, precision="fp32", exchange="fast", overlap=False,
                         optim=OptimConfig(optimizer="sgd", schedule="constant", lr=1e-3))  # fmt: skip
    learner = Learner(initialise(network, 0).to(_device()), config, normaliser, WEIGHTS, Distributed())
    fields = torch.randn(1, len(NAMES), *_TILE, generator=torch.Generator().manual_seed(rank)).half()
    mask = torch.zeros(1, *_TILE, dtype=torch.uint8)
    found = []
    for step in range(steps):
        position = step * world + rank
        info = learner.run(StepInput(step, [MicroBatch(torch.tensor([position]), fields, mask)]))
        assert info is not None, "with lag 0 every step tells what happened in it"
        found.append((info.compute_s, info.exchange_s))
    return found


def lines(found: dict[str, Any]) -> list[list[Any]]:
    """Rows of a table of what was measured."""
    rows: list[list[Any]] = [[f"{name} peak, TFLOP/s", value / 1e12] for name, value in found["peaks"].items()]
    for name in ("inside", "between"):
        if group := found[name]:
            rows.append([f"{name} a node, {group.ranks} ranks: latency, µs", 1e6 * group.latency_s])
            rows.append([f"{name} a node, {group.ranks} ranks: GB/s", group.bytes_per_s / 1e9])
    return [*rows, *([key, found[key]] for key in ("compute_s", "exchange_s", "jitter"))]

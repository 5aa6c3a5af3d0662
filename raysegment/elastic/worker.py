"""What Ray Train runs in every worker of a cell: make everything ready, become a member, live (`loop`), say what went wrong.

Everything that takes time (imports, the network, a first pass through it, the newest state from memory or file) happens
before the member asks for a place, so that those who train hardly notice.
"""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.elastic.chaos import Fault, Injector, Plan
from raysegment.elastic.companion import Companion
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.loop import Loop
from raysegment.elastic.membership import Member, Over
from raysegment.elastic.priority import step_back
from raysegment.elastic.roster import Address
from raysegment.elastic.runs import Run
from raysegment.elastic.safe import Safe
from raysegment.elastic.settings import TrainConfig
from raysegment.feed.quarantine import FILE, Quarantine
from raysegment.feed.store import open_store
from raysegment.feed.stream import make_stream
from raysegment.learning.losses import class_weights
from raysegment.learning.normalise import Normaliser
from raysegment.learning.step import Learner, initialise


def work(settings: Mapping[str, Any]) -> None:
    """`settings`: the resolved TrainConfig as "config", the roster's actor handle, the cell's number and its driver's handle."""
    config: TrainConfig = settings["config"]
    started = time.perf_counter()
    since_fork_s = _age_s()
    device = prepare_device(config)
    member = _member(config, settings["roster"], settings["cell"], device)  # first: whatever fails now is told
    try:
        Run(config.out).event(
            "worker", member=member.uid, node=_node_id(), pid=os.getpid(), process_s=since_fork_s, group=_group_id()
        )
        _live(config, settings, member, device, started)
    except Exception as error:
        bad = error.__reduce__()[1] if isinstance(error, BadInput) else None
        lasting = not isinstance(error, RuntimeError | OSError)  # those may be the machine's, and gone with the next try
        member.failed(f"{type(error).__name__}: {error}", lasting, bad, traceback.format_exc()[-4000:])
        if not _given_up(member):
            raise
    finally:
        member.close()


def _given_up(member: Member) -> bool:
    """Whether the roster, told of a failure, has ended the run: then this worker ends quietly, for Ray not to try again."""
    deadline = time.monotonic() + member.ladder.silence_s
    while time.monotonic() < deadline and not member.over and not member.away:
        member.wait_for_change(0.1)
    return member.over


def _live(config: TrainConfig, settings: Mapping[str, Any], member: Member, device: torch.device, started: float) -> None:
    manifest, run = Manifest.load(config.shards), Run(config.out)
    learner = make_learner(config, manifest, device)
    learner.warm_up(*manifest.tile)
    quarantine = Quarantine(manifest.tiles, config.feed.max_damaged, run.folder / FILE)
    order = config.order(manifest)
    stream = make_stream(config.shards, order, config.steps, config.feed, quarantine)
    safe = Safe(config, run, manifest, member, _node_id())
    held_out = open_store(config.feed.source(config.validation.shards)) if config.validation.shards else None
    injector = Injector(Plan.parse(config.chaos), run.folder / "chaos", lambda fault: _record(run, fault))
    companion = Companion()
    loop = Loop(config, run, member, learner, stream, order, safe, companion, injector, held_out, started=started)
    loop.cell_fault = _elsewhere(settings)
    safe.on_write = loop.at_checkpoint
    loop.on_place = partial(step_back, os.getpriority(os.PRIO_PROCESS, 0))
    run.event("worker", member=member.uid, process_s=_age_s())
    try:
        loop.run()
    except Over:
        pass  # the others have finished
    finally:
        stream.close()
        safe.stop()
    _last_report(companion, learner, config, member.ladder.meeting_s)


def _member(config: TrainConfig, roster: Any, cell: int, device: torch.device) -> Member:
    def find() -> Address:
        return ray.get(roster.address.remote())

    rank = ray.train.get_context().get_world_rank()
    facts = {"node": _node_id(), "cell": cell, "worker": rank}
    host, ladder = ray.util.get_node_ip_address(), Ladder(config.elastic.patience_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    return Member(find, f"{cell}.{rank}-{uuid.uuid4().hex[:8]}", facts, ladder, host, backend)


def _age_s() -> float:
    """Seconds since this process was started, as the kernel knows; 0 where there is no /proc."""
    try:
        since_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _group_id() -> str:
    """The placement group this worker lives in, "" for none."""
    group = ray.util.get_current_placement_group()
    return group.id.hex() if group is not None else ""


def make_learner(config: TrainConfig, manifest: Manifest, device: torch.device | str) -> Learner:
    """A fresh learner, of a world of one as long as no generation says otherwise."""
    network = initialise(config.network, config.learn.seed)
    normaliser = Normaliser.of(manifest.mean, [max(std, 1e-30) for std in manifest.std], config.channel_names)
    weights = class_weights(manifest.class_counts, config.learn.loss.weights)
    return Learner(network, config.learn, normaliser, weights, None, device)


def prepare_device(config: TrainConfig) -> torch.device:
    """The worker's device, made ready."""
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    ensure_equal_bits(config, device)
    return device


def ensure_equal_bits(config: TrainConfig, device: torch.device) -> None:
    """In this process from now on: a fixed number of threads (as many as CPUs were asked for, whatever the machine has), and
    with an exact exchange kernels that give the same result each time (cuDNN's and cuBLAS's on GPUs), no search for the fastest.
    """
    torch.set_num_threads(config.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.learn.exchange != "fast":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms also loads the compiler: a second of imports
        # A debugging aid that writes every new tensor twice; no result depends on it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.backends.cudnn.benchmark = False


def _last_report(companion: Companion, learner: Learner, config: TrainConfig, timeout_s: float) -> None:
    """Give Ray Train the final weights as its checkpoint: `Result.checkpoint` and `Result.metrics` are what users expect."""
    complete = learner.committed == config.steps
    news = {**companion.news, "step": learner.committed - 1, "complete": complete}

    def write(folder: Path) -> None:
        torch.save(learner.network.state_dict(), folder / "weights.pt")

    companion.end(news, write if complete else None, timeout_s)


def _record(run: Run, fault: Fault) -> None:
    run.event("fault", fault=str(fault), step=fault.step, member=fault.member)


def _elsewhere(settings: Mapping[str, Any]) -> Callable[[Fault], None]:
    """Faults of other processes: the roster's, the cell's driver's."""

    def inflict(fault: Fault) -> None:
        if fault.kind == "roster":
            ray.kill(settings["roster"], no_restart=False)
        else:
            ray.kill(settings["driver"])

    return inflict

"""The process group of one generation: collectives that end as soon as the generation does.

Groups are made outside torch.distributed's default one (Ray Train's own group of a cell lives there), over the first
member's store, with the generation's number as prefix. A group that is broken is let go, not reused: on gloo its
connections close with it, which also frees the peers that still wait; on NCCL it is aborted.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, PrefixStore, ReduceOp, Store

from raysegment.elastic.ladder import Ladder
from raysegment.learning.exchange import Interrupted

_OPERATIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}
_POLL_S = 2e-4  # between looks at a collective that runs on a GPU
_BUILD_LOOK_S = 0.005  # between looks at `broken` while a group is being built
_LOOK_S = 0.1  # between looks at `broken` while nobody wakes the waiting (a group that is being built)


class Setback(RuntimeError):
    """A group could not be built: somebody died meanwhile. Meet again."""


class Group:
    """A world (see `learning.exchange.World`) whose collectives raise Interrupted when `broken` is set or a peer is gone."""

    def __init__(
        self, backend: Any, rank: int, size: int, broken: threading.Event, polls: bool, limit: datetime.timedelta
    ):  # fmt: skip
        self.rank, self.size, self.limit = rank, size, limit
        self._broken, self._polls = broken, polls
        self._backend: Any = backend
        self._event = threading.Event()  # something ended: a collective, or the generation
        self._open: list[Collective] = []  # under way, as far as is known
        self.on_wait = lambda: None  # called when this member begins to wait for the others

    def wake(self) -> None:
        """Look at `broken` now."""
        self._event.set()

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> None:
        """Sum (or maximum) over the members, in place."""
        self.start_all_reduce(tensor, op).wait()

    def start_all_reduce(self, tensor: Tensor, op: str = "sum") -> Collective:
        """The same, under way."""
        options = AllreduceOptions()
        options.timeout = self.limit
        options.reduceOp = ReduceOp(_OPERATIONS[op])
        return self._start(lambda: self._backend.allreduce([tensor], options), tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """One member's tensor on all, in place."""
        options = BroadcastOptions()
        options.timeout = self.limit
        options.rootRank, options.rootTensor = source, 0
        self._start(lambda: self._backend.broadcast([tensor], options), tensor).wait()

    def _start(self, begin: Any, tensor: Tensor) -> Collective:
        if self._broken.is_set():
            raise Interrupted("the generation is broken")
        try:
            work = begin()
        except RuntimeError as error:
            raise Interrupted(str(error)[:200]) from None
        if self._polls:
            ended = work.is_completed
        else:
            future = work.get_future()  # done before its callback runs, which `work.is_completed` may not be
            future.add_done_callback(lambda _: self._event.set())
            ended = future.done
        self._open = [other for other in self._open if not other.ended()]
        self._open.append(Collective(self, work, ended, tensor))
        return self._open[-1]

    def await_(self, work: Any, ended: Callable[[], bool]) -> None:
        """Until a collective has ended well; Interrupted when it has not, or the generation ends before it."""
        while not ended():
            if self._broken.is_set():
                raise Interrupted("the generation is broken")
            if self._polls:
                time.sleep(_POLL_S)
            else:
                self._event.wait(_LOOK_S)
                self._event.clear()
        try:
            work.wait()
        except RuntimeError as error:
            raise Interrupted(str(error)[:200]) from None

    def close(self) -> None:
        """Let the group go, without waiting for anything that is under way."""
        backend, self._backend = self._backend, None
        if backend is not None:
            grave = [backend, self._open]
            self._open = []
            threading.Thread(target=_bury, args=(grave,), name="bury-group", daemon=True).start()


@dataclass
class Collective:
    """A collective under way. Holds its tensor: the transport writes into it until it ends, also when nobody waits any more."""

    group: Group
    work: Any
    ended: Callable[[], bool]
    tensor: Tensor

    def wait(self) -> None:
        """Block until it has ended; Interrupted when the generation ends before it."""
        self.group.on_wait()
        self.group.await_(self.work, self.ended)


def build_group(
    rank: int, size: int, generation: int, store: Store, host: str, backend: str, broken: threading.Event, ladder: Ladder,
    label: str = "g",
) -> Group:  # fmt: skip
    """The group of a generation, all connections made and tried; Setback when they cannot be within `forming_s`."""
    prefix = PrefixStore(f"{label}{generation}", store)
    prefix.set_timeout(datetime.timedelta(seconds=ladder.forming_s))
    make = partial(_nccl, prefix, rank, size, ladder) if backend == "nccl" else partial(_gloo, prefix, rank, size, host, ladder)
    try:
        group = Group(
            _unless(broken, make), rank, size, broken, backend == "nccl", datetime.timedelta(seconds=ladder.collective_s)
        )
        probe = torch.zeros(1, device="cuda" if backend == "nccl" else "cpu")
        group.all_reduce(probe)
    except (Interrupted, RuntimeError) as error:
        raise Setback(str(error)[:300]) from None
    return group


def _unless(broken: threading.Event, make: Callable[[], Any]) -> Any:
    """What `make` returns; Setback as soon as `broken` is set, though making, which nothing can interrupt, goes on.

    Whoever makes connections waits for peers that may have died meanwhile.
    """
    made: list[Any] = []
    done = threading.Event()

    def run() -> None:
        try:
            made.append(make())
        except RuntimeError as error:
            made.append(error)
        done.set()

    threading.Thread(target=run, name="build-group", daemon=True).start()
    while not done.wait(_BUILD_LOOK_S):
        if broken.is_set():
            raise Setback("the generation was broken while its group was built")
    if isinstance(made[0], RuntimeError):
        raise Setback(str(made[0])[:300])
    return made[0]


def _gloo(store: Store, rank: int, size: int, host: str, ladder: Ladder) -> Any:
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = datetime.timedelta(seconds=ladder.forming_s)  # for connecting; collectives are given their own
    options._threads = 2
    return dist.ProcessGroupGloo(store, rank, size, options)  # pyright: ignore[reportAttributeAccessIssue]


def _nccl(store: Store, rank: int, size: int, ladder: Ladder) -> Any:
    options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = datetime.timedelta(seconds=ladder.collective_s)
    return dist.ProcessGroupNCCL(store, rank, size, options)  # pyright: ignore[reportAttributeAccessIssue]


def _bury(grave: list[Any]) -> None:
    """Abort a group (NCCL), and forget it only when nothing of it is under way any more.

    Gloo's destructor waits for what is under way, and holds Python's lock meanwhile: with a peer that stands still the whole
    process would too, until the collective's own time limit.
    """
    backend, under_way = grave
    with suppress(RuntimeError, AttributeError):  # a backend that cannot abort ends with its last reference
        backend.abort()
    while not all(collective.ended() for collective in under_way):
        time.sleep(_LOOK_S)
    del backend
    grave.clear()

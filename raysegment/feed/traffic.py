"""Transfers of shards between depots, several at once within what the nodes' object stores take, every byte counted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from raysegment.climate.checks import BadInput
from raysegment.feed.depots import AT_ONCE, Depots, first_line
from raysegment.feed.nodes import Node
from raysegment.feed.placement import Transfer

_SHARE_OF_STORE = 4
_LOOK_AHEAD = 64  # waiting transfers that are looked at for one whose nodes are free

Progress = Callable[[int, int, str], None]


def room(node: Node) -> int:
    """Bytes of shards in flight that a node's object store may hold: a quarter of it, the rest is Ray Data's and others'."""
    return node.store_bytes // _SHARE_OF_STORE


@dataclass
class _Flight:
    """A transfer under way: the bytes in the object store once they are sent, and how many nodes are still at it."""

    transfer: Transfer
    data: Any
    left: int = 1


class Traffic:
    """Carries transfers out; counts bytes read from the source, passed to other nodes (each receiver) and written.

    In flight are at most `AT_ONCE` shards per node, and on no node more than `room` allows. `failed` says of the last plan
    which copies (shard, node) did not come about, and why.
    """

    def __init__(self, depots: Depots, sizes: Sequence[int], progress: Progress):
        self._depots, self._sizes, self._progress = depots, sizes, progress
        self._flights: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._under_way: dict[Any, tuple[_Flight, str]] = {}
        self._refused: BadInput | None = None
        self.bytes_read = self.passed_bytes = self.written_bytes = self._done = self._total = 0
        self.failed: dict[tuple[int, str], str] = {}

    def carry_out(self, transfers: Sequence[Transfer]) -> None:
        """All of them; BadInput, once those under way have ended, when the source turns out to be damaged."""
        self.failed, waiting = {}, deque(transfers)
        self._total = self._done + sum(len(transfer.writers) for transfer in transfers)
        while waiting or self._under_way:
            self._start(waiting)
            if self._under_way:
                ready, _ = ray.wait(list(self._under_way), num_returns=1)
                self._arrived(ready[0])
            if self._refused is not None:
                waiting.clear()
        if self._refused is not None:
            raise self._refused

    def _start(self, waiting: deque[Transfer]) -> None:
        """Start those of the next transfers whose nodes are free, let go those whose sender is lost."""
        for transfer in [waiting[place] for place in range(min(_LOOK_AHEAD, len(waiting)))]:
            lost = self._depots.lost.get(transfer.sender)
            if lost is not None:
                waiting.remove(transfer)
                self._give_up(transfer.shard, transfer.writers, lost)
            elif self._fits(transfer):
                waiting.remove(transfer)
                self._send(transfer)

    def _fits(self, transfer: Transfer) -> bool:
        size = self._sizes[transfer.shard]
        return all(
            self._flights[name] < AT_ONCE and self._bytes[name] + size <= room(self._depots.nodes[name])
            for name in transfer.nodes
        )

    def _send(self, transfer: Transfer) -> None:
        self._count(transfer, 1)
        actor = self._depots.actors[transfer.sender]
        work = (actor.read if transfer.read else actor.lend).options(num_returns=2)
        count, data = work.remote(transfer.shard, bool(transfer.receivers))
        self._under_way[count] = _Flight(transfer, data), transfer.sender

    def _arrived(self, ref: Any) -> None:
        """One node has done its part of a flight, or failed to."""
        flight, name = self._under_way.pop(ref)
        try:
            count: Any = ray.get(ref)
        except RayError as error:
            self._failed(flight, name, error)
        else:
            self._succeeded(flight, name, count)
        flight.left -= 1
        if not flight.left:
            self._count(flight.transfer, -1)
        self._progress(self._done, self._total, f"{mib(self.bytes_read)} read, {mib(self.passed_bytes)} passed on")

    def _succeeded(self, flight: _Flight, name: str, count: int) -> None:
        self.written_bytes += count
        self._done += count > 0
        if name == flight.transfer.sender:
            self.bytes_read += count
            self._pass_on(flight)
        else:
            self.passed_bytes += count

    def _pass_on(self, flight: _Flight) -> None:
        """Have every receiver fetch the bytes from the object store."""
        shard = flight.transfer.shard
        for name in flight.transfer.receivers:
            if name in self._depots.lost:
                self._give_up(shard, (name,), self._depots.lost[name])
                continue
            ref = self._depots.actors[name].receive.remote(shard, flight.data)
            self._under_way[ref] = flight, name
            flight.left += 1

    def _failed(self, flight: _Flight, name: str, error: RayError) -> None:
        cause, transfer = getattr(error, "cause", None), flight.transfer
        if isinstance(cause, BadInput):
            self._refused = self._refused or cause
        elif isinstance(error, RayActorError):
            self._depots.lose(name, error)
        self._give_up(transfer.shard, transfer.writers if name == transfer.sender else (name,), first_line(cause or error))

    def _give_up(self, shard: int, names: Sequence[str], reason: str) -> None:
        self.failed.update({(shard, name): reason for name in names})

    def _count(self, transfer: Transfer, sign: int) -> None:
        for name in transfer.nodes:
            self._flights[name] += sign
            self._bytes[name] += sign * self._sizes[transfer.shard]


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB"

"""A learner's state copied out of the way, into memory that is used again: the only moment that saving makes a step wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from raysegment.learning.state import TrainState

_WEIGHTS, _STATE = "weights/", "state/"

Pool = dict[str, Tensor]


@dataclass
class Capture:
    """A state in memory of its own, for whoever holds it; `seconds` the step waited for it.

    Made with one holder. The last to `release` gives the memory back for another state.
    """

    state: TrainState
    seconds: float
    buffers: Buffers
    pool: Pool
    holders: int = 1

    def hold(self) -> Capture:
        """The same, with a holder more."""
        with self.buffers.lock:
            assert self.holders > 0, "the memory has been given back"
            self.holders += 1
        return self

    def release(self) -> None:
        """A holder less."""
        with self.buffers.lock:
            assert self.holders > 0, "the memory has been given back"
            self.holders -= 1
            if not self.holders:
                self.buffers.free.append(self.pool)


@dataclass
class Buffers:
    """Host memory for `count` states at most, taken when it is first needed: then it costs three times as much as later.

    Three are enough for a state that is being kept, one that is being written to a file and one that comes in meanwhile.
    """

    count: int = 3
    free: list[Pool] = field(default_factory=list)
    made: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, state: TrainState) -> Capture | None:
        """A copy of a state, each tensor in its own memory format; None while all memory is in use: try after the next step."""
        started, pool = time.perf_counter(), self._pool()
        if pool is None:
            return None
        try:
            _fill(pool, joined(state))
        except BaseException:
            with self.lock:
                self.free.append(pool)
            raise
        weights, rest = parted(pool)
        return Capture(TrainState(weights, rest, dict(state.facts)), time.perf_counter() - started, self, pool)

    def _pool(self) -> Pool | None:
        with self.lock:
            if self.free:
                return self.free.pop()
            if self.made == self.count:
                return None
            self.made += 1
            return {}


def joined(state: TrainState) -> dict[str, Tensor]:
    """Weights and the rest in one mapping."""
    return {_WEIGHTS + name: t for name, t in state.weights.items()} | {_STATE + name: t for name, t in state.tensors.items()}


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, the rest) of what was joined."""
    weights = {name.removeprefix(_WEIGHTS): tensor for name, tensor in tensors.items() if name.startswith(_WEIGHTS)}
    return weights, {name.removeprefix(_STATE): tensor for name, tensor in tensors.items() if name.startswith(_STATE)}


def _fill(pool: Pool, tensors: Mapping[str, Tensor]) -> None:
    """Make `pool` a copy of the tensors."""
    for name in [name for name in pool if name not in tensors]:
        del pool[name]
    for name, tensor in tensors.items():
        pool[name] = _copied(tensor, pool.get(name))
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()


def _copied(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """A copy on the host, in `buffer` where that fits; from a GPU it is complete when the stream is."""
    source = tensor.detach()
    fits = buffer is not None and (buffer.shape, buffer.dtype, buffer.stride()) == (source.shape, source.dtype, source.stride())
    if buffer is None or not fits:
        buffer = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
    return buffer.copy_(source, non_blocking=source.is_cuda)

"""Bringing members up to date: the source's state, from its memory into theirs, in a group of their own."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from raysegment.elastic.group import Group, build_group
from raysegment.elastic.ladder import Ladder
from raysegment.learning.state import adopt, facts, live
from raysegment.learning.step import Learner


def synchronise(
    learner: Learner, source: int, behind: tuple[int, ...], rank: int, generation: int, store: Store, host: str, backend: str,
    broken: threading.Event, ladder: Ladder,
) -> int:  # fmt: skip
    """Make the learners of the ranks `behind` the same, bit for bit, as that of `source`; bytes passed to this member.

    Only these ranks take part: the others go on to the step, where they wait. Interrupted or Setback when somebody dies.
    """
    ranks = [source, *(other for other in behind if other != source)]
    if rank not in ranks:
        return 0
    group = build_group(ranks.index(rank), len(ranks), generation, store, host, backend, broken, ladder, label="sync")
    try:
        return _pass_on(learner, group, rank == source)
    finally:
        group.close()


def _pass_on(learner: Learner, group: Group, giver: bool) -> int:
    """Facts first, then the tensors as they lie. A receiver changes only when all has arrived: half a state is none."""
    device = learner.flat.values.device
    if giver:
        own = live(learner)
        shapes = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in own.items()]
        _broadcast_json({"facts": facts(learner), "tensors": shapes}, group, device)
        _broadcast_all(own, group)
        return 0
    told = _broadcast_json(None, group, device)
    received = {name: torch.empty(shape, dtype=getattr(torch, kind), device=device) for name, kind, shape in told["tensors"]}
    _broadcast_all(received, group)
    adopt(learner, told["facts"])
    for name, tensor in live(learner).items():
        tensor.copy_(received[name])
    return sum(tensor.nbytes for tensor in received.values())


def _broadcast_all(tensors: dict[str, Tensor], group: Group) -> None:
    for tensor in tensors.values():
        if tensor.numel():
            group.broadcast(tensor, 0)


def _broadcast_json(value: Any, group: Group, device: torch.device) -> Any:
    """What the first member of a group says."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if group.rank == 0 else torch.empty(0)
    size = torch.tensor([text.numel()], dtype=torch.int64, device=device)
    group.broadcast(size, 0)
    held = text.to(device) if group.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    group.broadcast(held, 0)
    return json.loads(held.cpu().numpy().tobytes())

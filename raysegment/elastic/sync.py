"""Bringing members up to date: the source's state, from its memory into theirs, in a group of their own."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
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
    """Facts first, which say what tensors there are; then the tensors as they lie."""
    device = learner.flat.values.device
    told = _broadcast_json(facts(learner) if giver else None, group, device)
    if not giver:
        adopt(learner, told)
    passed = 0
    for tensor in live(learner).values():
        if tensor.numel():
            passed += tensor.numel() * tensor.element_size()
            group.broadcast(tensor, 0)
    return 0 if giver else passed


def _broadcast_json(value: Any, group: Group, device: torch.device) -> Any:
    """What the first member of a group says."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if group.rank == 0 else torch.empty(0)
    size = torch.tensor([text.numel()], dtype=torch.int64, device=device)
    group.broadcast(size, 0)
    held = text.to(device) if group.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    group.broadcast(held, 0)
    return json.loads(held.cpu().numpy().tobytes())

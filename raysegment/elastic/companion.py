"""What a worker has to do with Ray Train while it trains, in a thread of its own: reports, and warnings about its node.

Both are barriers over the workers of a cell, and those come and go with Ray's pace, not with the steps'; a step never waits
for them. Worker 0 of the cell says what is next, so that all take part in the same calls in the same order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray.train
from ray.train.collective import broadcast_from_rank_zero

_TURN_S, _REPORT_EVERY_S = 1.0, 10.0  # Ray Train takes one report per poll; more would queue up
LOOK, REPORT, END = "look", "report", "end"


class Companion:
    """`news` are the newest metrics, `warned` says whether the node is about to go. Exceptions end the thread, not training."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.news: dict[str, Any] = {}
        self.warned = False
        self._write_last: Callable[[Path], None] | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="companion", daemon=True)
        self._thread.start()

    def end(self, news: Mapping[str, Any], write: Callable[[Path], None] | None, timeout_s: float) -> None:
        """The last report, with what `write` puts into a folder as Ray's checkpoint (on worker 0); waits for it so long."""
        self.news, self._write_last = dict(news), write
        self._ending.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        reported, turn = time.monotonic(), ""
        while turn != END:
            self._ending.wait(_TURN_S)
            mine = END if self._ending.is_set() else REPORT if time.monotonic() - reported >= _REPORT_EVERY_S else LOOK
            turn = mine if self.size == 1 else broadcast_from_rank_zero(mine)
            if turn == LOOK:
                self.warned = ray.train.get_preemption_info() is not None
            else:
                reported = time.monotonic()
                self._report(last=turn == END)

    def _report(self, last: bool) -> None:
        if not last or self.rank or self._write_last is None:
            ray.train.report(dict(self.news))
            return
        with TemporaryDirectory() as folder:
            self._write_last(Path(folder))
            ray.train.report(dict(self.news), checkpoint=ray.train.Checkpoint.from_directory(folder))

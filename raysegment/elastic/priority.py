"""Who computes first when there are more processes than cores: those that are on their way in, not those that train."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_LAST = 19  # Ray starts workers at 15, or at what RAY_worker_niceness says when a node is started


def step_back() -> None:
    """Let all other processes of this machine go first, from now on: newcomers then start in half the time.

    Where every member has cores of its own, nothing changes. Linux keeps the value per thread; threads started later
    have it from those that start them.
    """
    threads = Path("/proc/self/task")
    for thread in sorted(threads.iterdir()) if threads.exists() else []:
        with suppress(OSError):  # it has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, int(thread.name), _LAST)

"""Who computes first when there are more processes than cores: those that are on their way in, not those that train."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_BACK, _LAST = 5, 19  # a third of the weight that processes in front have, enough beside the work of others not to starve


def step_back(niceness: int) -> None:
    """Let processes of `niceness`, this one's when it was started, go first from now on: newcomers then start much sooner.

    Where every member has cores of its own, nothing changes. Linux keeps the value per thread; threads started later
    have it from those that start them.
    """
    threads = Path("/proc/self/task")
    for thread in sorted(threads.iterdir()) if threads.exists() else []:
        with suppress(OSError):  # it has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, int(thread.name), min(_LAST, niceness + _BACK))

"""Those who train let newcomers go first, with every thread they have, and no further each time."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import os, threading
from raysegment.elastic.priority import step_back
began = os.getpriority(os.PRIO_PROCESS, 0)
done = threading.Event()
threads = [threading.Thread(target=done.wait) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(3): step_back(began)
own = [os.getpriority(os.PRIO_PROCESS, 0), *(os.getpriority(os.PRIO_PROCESS, thread.native_id) for thread in threads)]
done.set()
print(began, *own)
"""


def test_every_thread_steps_back_once() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    began, *own = map(int, said.stdout.split())
    assert began == os.getpriority(os.PRIO_PROCESS, 0)
    assert own == [min(19, began + 5)] * 3

"""Keep what a step has freed for the next step, instead of giving it back to the system and faulting it in again.

glibc maps every large tensor anew and unmaps it when freed: at 4 tiles of 72×144 a small Tiramisu took 12,700 page faults
per step, a tenth of its time, and after `keep_freed_memory` 86. The process stays as large as its largest step was.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Serve large tensors of this process from the heap, and never shrink it; True where the C library can (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, 1 << 30) and library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))

"""How many threads the CPU may use: one setting for kernels and matrix products. Imports nothing heavy."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path


def threads() -> int:
    """Threads a kernel may use: `OPENTQ_THREADS`, or the physical cores this process may run on. Raises ValueError."""
    wanted = os.environ.get("OPENTQ_THREADS", "")
    if not wanted:
        return physical_cores()
    if not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"OPENTQ_THREADS={wanted!r} is not a number of threads: use 1 or more, or leave it unset")
    return min(int(wanted), 256)


@functools.cache
def physical_cores() -> int:
    """Physical cores among the CPUs that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 2) // (1 if sys.platform == "darwin" else 2))
    usable = os.sched_getaffinity(0)
    cores = set()
    for cpu in usable:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(usable)
    return max(1, len(cores))

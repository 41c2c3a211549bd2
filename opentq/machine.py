"""What this machine is: its name, its cores, and how many threads may be used. Imports nothing heavy at the top."""

from __future__ import annotations

import functools
import os
import platform
import re
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


def ram() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def device() -> tuple[str, str]:
    """The device that MLX uses: `mac` (a GPU with the machine's own memory), `gpu` or `cpu`, and its name."""
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu", _cpu_name()
    info = mx.device_info()
    kind = "mac" if "max_recommended_working_set_size" in info else "gpu"
    return kind, str(info.get("device_name", "GPU"))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return f"{found[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"

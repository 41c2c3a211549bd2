"""What a file from someone's machine says of that machine, and nothing of its owner: chip, GPU cores, memory, system.

Only what is named here is asked, so that no serial number, host name or user name can come along.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import mlx.core as mx

from ..kernels.metal import launch as metal

TOLD = ("architecture", "device_name", "memory_size", "total_memory", "max_recommended_working_set_size")
"""What is told of MLX's `device_info`: some drivers also give identifiers of the very card."""


def facts() -> dict[str, Any]:
    """`device_info`, `os`, and of a Mac `gpu_cores` and `virtual` (0 and False where they are not known)."""
    info = {name: value for name, value in mx.device_info().items() if name in TOLD}
    found: dict[str, Any] = {"device_info": info, "os": system()}
    if metal.architecture():
        found |= {"gpu_cores": gpu_cores(), "virtual": virtual()}
    return found


def system() -> str:
    """`macOS 26.1` or the kernel's name and release, without the name of the machine."""
    mac = platform.mac_ver()[0]
    return f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"


def gpu_cores() -> int:
    """Cores of this Mac's GPU, 0 where the system does not say."""
    try:
        displays = json.loads(_ask("system_profiler", "SPDisplaysDataType", "-json"))["SPDisplaysDataType"]
        return max(int(d.get("sppci_cores", 0)) for d in displays)
    except (KeyError, TypeError, ValueError):
        return 0


def virtual() -> bool:
    """Whether this is a virtual machine, such as a hosted runner: its GPU is paravirtual and its times its own."""
    return _ask("sysctl", "-n", "kern.hv_vmm_present").strip() == "1"


def _ask(*command: str) -> str:
    if sys.platform != "darwin":
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""

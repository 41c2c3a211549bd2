"""What a machine gives: its memory, and how much of it a process may really use.

On Apple Silicon the GPU may by default use two thirds to three quarters of the memory (48 GB of 64); weights above that
are paged and decode slows down tenfold. `sysctl iogpu.wired_limit_mb` raises the limit until the next restart.
"""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass, replace

import mlx.core as mx

from .. import machine
from ..errors import UserError

KINDS = ("mac", "gpu", "cpu")
GIB = 1 << 30
MARGIN = 512 << 20
"""Bytes wired beyond what the plan says: MLX's own buffers and rounding."""


@dataclass(frozen=True)
class Device:
    """A machine to plan for.

    Attributes:
        kind: `mac` (unified memory), `gpu` (memory of its own) or `cpu`.
        name: for people.
        memory: bytes of memory in all.
        usable: bytes that one process can use as the machine comes: the recommended working set on a Mac.
        float_bytes: bytes of a weight or activation that is not quantised (models run in float32 on the CPU).
    """

    kind: str
    name: str
    memory: int
    usable: int
    float_bytes: int = 2

    @property
    def ceiling(self) -> int:
        """Bytes usable once the wired limit is raised: all but what the system itself needs."""
        return max(self.usable, self.memory - reserve(self.memory)) if self.kind == "mac" else self.usable

    def sysctl(self, needed: int) -> str:
        """The command that lets a Mac's GPU use `needed` bytes, rounded up to whole GiB; lost at the next restart."""
        megabytes = min(math.ceil(needed / GIB) * 1024, self.ceiling >> 20)
        return f"sudo sysctl iogpu.wired_limit_mb={megabytes}"


def reserve(memory: int) -> int:
    """Bytes to leave to the system: a tenth, at least 2 GiB."""
    return max(2 * GIB, memory // 10)


def working_set(memory: int) -> int:
    """The working set that Metal recommends by default: two thirds up to 32 GB, three quarters above."""
    return memory * 3 // 4 if memory > 32 * GIB else memory * 2 // 3


def assumed(memory: int, kind: str = "mac") -> Device:
    """A machine that is not this one, known by its memory."""
    if kind not in KINDS:
        raise UserError(f"--device {kind!r} is not known: use {', '.join(KINDS)}")
    if kind == "mac":
        return Device("mac", f"{memory / GIB:g} GB Mac", memory, working_set(memory))
    if kind == "gpu":
        return Device("gpu", f"{memory / GIB:g} GB GPU", memory, memory - GIB)
    return Device("cpu", f"CPU, {memory / GIB:g} GB", memory, memory - reserve(memory), float_bytes=4)


def here() -> Device:
    """The machine this runs on, on the device that MLX uses."""
    kind, name = machine.device()
    if kind == "cpu":
        return replace(assumed(machine.ram(), kind), name=name)
    info = mx.device_info()
    found = replace(assumed(int(info.get("memory_size") or info.get("total_memory") or 0), kind), name=name)
    return replace(found, usable=int(info["max_recommended_working_set_size"])) if kind == "mac" else found


def raised_limit() -> int:
    """`iogpu.wired_limit_mb`: MB that the owner of this Mac lets the GPU wire; 0 where nobody set it, or no Mac."""
    try:
        done = subprocess.run(["sysctl", "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else 0


def parse_memory(text: str) -> int:
    """`64GB`, `64GiB`, `512MB` or `64` (GB) in bytes; memory is sold in binary units, so 64GB is 64 * 2^30."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(T|G|M|)i?B?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UserError(f"memory {text!r} is not a size: write it like 64GB or 512MB")
    unit = {"T": 1 << 40, "G": GIB, "": GIB, "M": 1 << 20}[found[2].upper()]
    return int(float(found[1]) * unit)

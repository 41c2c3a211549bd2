"""How things are timed here: warm by time, windows long enough to trust, arms interleaved, medians with their spread.

Arms take turns window by window, forwards and then backwards, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..kernels.cpu import library as cpu
from ..memory.device import here

WINDOWS = 7
WARM_SECONDS = 1.0
WINDOW_SECONDS = 0.25

PACKAGES = ("opentq", "mlx", "mlx-lm", "numpy", "llama-cpp-python", "onnxruntime")


TRIES = 12
"""How often a window is taken again when the hypervisor gave more than `CALM` of the machine to others meanwhile."""
CALM = 0.01


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value per window; `stolen` is the largest share of the machine that one went without."""

    windows: tuple[float, ...]
    stolen: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.windows)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.windows)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.windows) if len(self.windows) > 1 else 0.0


def interleave(
    arms: Sequence[Callable[[], Any]],
    windows: int = WINDOWS,
    warm: float = WARM_SECONDS,
    window: float = WINDOW_SECONDS,
) -> list[Timing]:
    """Time every arm: each call must have finished its work when it returns.

    Args:
        arms: what to call.
        windows: timed windows per arm.
        warm: seconds of calls before timing, per arm.
        window: least seconds per window; short calls are repeated to fill it.
    """
    repeats = []
    for arm in arms:
        count, start = 0, time.perf_counter()
        while not count or time.perf_counter() - start < warm:
            arm()
            count += 1
        repeats.append(max(1, round(window * count / (time.perf_counter() - start))))
    samples: list[list[tuple[float, float]]] = [[] for _ in arms]
    for turn in range(windows):
        order = range(len(arms)) if turn % 2 == 0 else reversed(range(len(arms)))
        for i in order:
            samples[i].append(undisturbed(lambda i=i: seconds(arms[i], repeats[i])))  # type: ignore[misc]
    return [Timing(tuple(t for t, _ in taken), max(share for _, share in taken)) for taken in samples]


def undisturbed(measure: Callable[[], float], tries: int = TRIES) -> tuple[float, float]:
    """What `measure` returns, and the share of the machine's time stolen meanwhile: the calmest of up to `tries`."""
    best = 0.0, math.inf
    for _ in range(tries):
        before, start = stolen(), time.perf_counter()
        value = measure()
        share = (stolen() - before) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        if share < best[1]:
            best = value, share
        if share <= CALM:
            break
    return best


def stolen() -> float:
    """Seconds that the hypervisor has kept this machine's cores waiting, all together; 0 where nobody counts them."""
    try:
        with open("/proc/stat") as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


@functools.cache
def read_bandwidth(mebibytes: int = 512, rounds: int = 5) -> float:
    """Bytes per second that this machine reads: the best of several passes over a large array, all threads together."""
    if mx.default_device() == mx.Device(mx.gpu):
        x = mx.ones((mebibytes << 18,), mx.float32)
        mx.eval(x, x.max())
        best = min(seconds(lambda: mx.eval([x.max() for _ in range(8)])) / 8 for _ in range(rounds))
        return x.nbytes / best
    data = np.ones(mebibytes << 18, np.float32)
    parts = np.array_split(data, cpu.threads())

    def one_pass() -> None:
        threads = [threading.Thread(target=np.maximum.reduce, args=(p,)) for p in parts]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    one_pass()
    return data.nbytes / min(seconds(one_pass) for _ in range(rounds))


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Wall-clock seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


# ---- records


@functools.cache
def environment() -> dict[str, Any]:
    """What every record says about where it comes from: device, versions, command, date, commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": here().name,
        "backend": here().kind,
        "threads": cpu.threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
        "command": shlex.join(["opentq", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "kernels": os.environ.get("OPENTQ_KERNELS", ""),
    }


def _commit() -> str:
    """The commit of the source tree that runs, with `+` when it is changed; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "opentq") else "")


def record(kind: str, **fields: Any) -> dict[str, Any]:
    """One result as it is stored: `kind`, the figures, and the environment."""
    return {"kind": kind, **fields, **environment()}


def append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to a JSONL file, each line whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in records)
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"can't write records to {path}: {error.strerror}") from error


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """All records of JSONL files, in order. A last line that was cut off is skipped; damage elsewhere is an error."""
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no file {path}")
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise UserError(f"{path}, line {number} is damaged: {error}") from error
    return found

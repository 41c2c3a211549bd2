"""How things are timed here: warm by time, windows long enough to trust, arms interleaved, medians with their spread.

Arms take turns window by window, forwards and then backwards, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..machine import threads


class Windows(NamedTuple):
    """How long each arm is timed: so many windows of at least `seconds`, after `warm` seconds of calls."""

    number: int = 7
    warm: float = 1.0
    seconds: float = 0.25


WINDOWS = Windows()

TRIES = 12
"""How often a window is taken again when the hypervisor gave more than `CALM` of the machine to others meanwhile."""
CALM = 0.01
PATIENCE = 6.0
"""Seconds that the tries of one window may take: windows of seconds are taken two or three times at most."""


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


def interleave(arms: Sequence[Callable[[], Any]], windows: Windows = WINDOWS) -> list[Timing]:
    """Time every arm: each call must have finished its work when it returns; short ones are repeated."""
    repeats = []
    for arm in arms:
        count, start = 0, time.perf_counter()
        while not count or time.perf_counter() - start < windows.warm:
            arm()
            count += 1
        repeats.append(max(1, round(windows.seconds * count / (time.perf_counter() - start))))
    samples: list[list[tuple[float, float]]] = [[] for _ in arms]
    for turn in range(windows.number):
        order = range(len(arms)) if turn % 2 == 0 else reversed(range(len(arms)))
        for i in order:
            samples[i].append(undisturbed(lambda i=i: seconds(arms[i], repeats[i])))  # type: ignore[misc]
    return [Timing(tuple(t for t, _ in taken), max(share for _, share in taken)) for taken in samples]


def undisturbed(measure: Callable[[], float], tries: int = TRIES) -> tuple[float, float]:
    """What `measure` returns, and the share of the machine's time stolen meanwhile: the calmest of up to `tries`.

    No try begins that would end after `PATIENCE`.
    """
    best, began = (0.0, math.inf), time.perf_counter()
    for _ in range(tries):
        before, start = stolen(), time.perf_counter()
        value = measure()
        end = time.perf_counter()
        share = (stolen() - before) / (end - start) / (os.cpu_count() or 1)
        if share < best[1]:
            best = value, share
        if share <= CALM or end - began + end - start > PATIENCE:
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
        # Far beyond any cache, and whole numbers: GPUs' reductions of floats don't keep up with their memory.
        x = mx.ones((2 * mebibytes << 18,), mx.int32)
        mx.eval(x, x.sum())
        best = min(seconds(lambda: mx.eval([x.sum() for _ in range(4)])) / 4 for _ in range(rounds))
        return x.nbytes / best
    data = np.ones(mebibytes << 18, np.float32)
    parts = np.array_split(data, threads())

    def one_pass() -> None:
        readers = [threading.Thread(target=np.maximum.reduce, args=(p,)) for p in parts]
        for t in readers:
            t.start()
        for t in readers:
            t.join()

    one_pass()
    return data.nbytes / min(seconds(one_pass) for _ in range(rounds))


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Wall-clock seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats

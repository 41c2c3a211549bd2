"""Calls of custom kernels that are made again for every layer, without MLX's work for a new one (repeat.cpp)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..contracts.check import Check
from . import extension

Call = Callable[[list[mx.array]], list[mx.array]]
"""Inputs to outputs."""


def repeated(kernel: Callable[..., list[mx.array]], given: dict[str, Any]) -> Call:
    """`kernel(inputs=..., **given)` as a function of its inputs."""
    call = functools.partial(kernel, **given)
    found = extension.module("repeat")
    return (lambda inputs: call(inputs=inputs)) if found is None else found.Repeated(call)


def check() -> Check:
    """What `opentq doctor` says about it."""
    if why := extension.missing("repeat"):
        hint = "install a C++ compiler and Python's headers"
        return Check("decode steps", "slow", f"every kernel call is a new one: {why.splitlines()[0]}", hint)
    return Check("decode steps", "ok", "kernel calls are made again for every layer")

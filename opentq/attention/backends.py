"""The fused kernels of this machine, if there are any: one back end per dialect, found once.

A back end is an attention function, the storage layouts that it wants, and what `opentq doctor` should say about it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..contracts.attention import AttnArgs
from ..contracts.codec import Codec
from ..contracts.layout import CANONICAL, Layout
from ..kernels import build
from ..kernels.cpu import blas
from ..kernels.cpu import library as cpu

Pair = tuple[Any, Any]
"""Something of keys and the same of values."""


@dataclass(frozen=True)
class Finding:
    """One line of `opentq doctor`: state is `ok`, `slow` (works, could be faster) or `wrong`."""

    name: str
    state: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Backend:
    """Fused kernels: `attend` returns None for calls that they do not serve, `layouts` the storage that they want.

    `extend(codecs, dense, fresh)`, where there is one, puts new keys and values behind the fp16 columns in one launch,
    rotated; None for codecs that it does not serve.
    """

    name: str
    attend: Callable[[AttnArgs], mx.array | None]
    layouts: Callable[[Codec, Codec, tuple[int, int]], tuple[Layout, Layout]]
    extend: Callable[[Pair, Pair, Pair], Pair | None] = lambda codecs, dense, fresh: None


def active() -> Backend | None:
    """The back end of the default device, or None where only the portable path runs."""
    dialect = build.active_dialect()
    return _backend(dialect) if dialect else None


@functools.cache
def _backend(dialect: str) -> Backend | None:
    if dialect == "cpu":
        from ..kernels.cpu import attention as fused_cpu

        return Backend("cpu", fused_cpu.attend, fused_cpu.layouts) if cpu.available() else None
    if dialect == "cuda":
        from ..kernels.cuda import attention as fused_cuda

        return Backend("cuda", fused_cuda.attend, _cuda_layouts, fused_cuda.extend)
    from ..kernels.metal import attention as fused_metal

    return Backend("metal", fused_metal.attend, fused_metal.layouts)


PLAIN = (CANONICAL, CANONICAL)


def _cuda_layouts(k: Codec, v: Codec, dims: tuple[int, int]) -> tuple[Layout, Layout]:
    from ..kernels.cuda import layout as cuda_layout

    return cuda_layout.layouts(k, v, dims) or PLAIN


def layout_named(name: str) -> Layout:
    """The layout that wrote a saved cache: every layout can be read on every machine. Raises ValueError."""
    if name == CANONICAL.name:
        return CANONICAL
    from ..kernels.cpu import layout as cpu_layout
    from ..kernels.cuda import layout as cuda_layout

    layout = cpu_layout.layout_named(name) or cuda_layout.layout_named(name)
    if layout is None:
        raise ValueError(f"storage layout {name!r} is not known to this version of opentq")
    return layout


def findings() -> list[Finding]:
    """What `opentq doctor` says about kernels and matrix products."""
    dialect = build.active_dialect()
    if dialect != "cpu":
        return [
            Finding(
                "kernels", "ok" if dialect else "slow", f"{dialect or 'none for this device'}, compiled on first use"
            )
        ]
    status = cpu.status()
    if status.error:
        found = Finding("kernels", "slow", f"portable path only: {status.error}", "install g++ or clang++, or set CXX")
    else:
        found = Finding("kernels", "ok", f"CPU, {status.isa}, {cpu.threads()} threads, by {status.compiler}")
    product = blas.status()
    slow = product.kind == "reference"
    return [found, Finding("matrix product", "slow" if slow else "ok", f"{product.kind}: {product.detail}")]

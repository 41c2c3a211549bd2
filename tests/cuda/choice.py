"""The choice of pages by sketches as the CUDA kernels make it, without a GPU."""

from __future__ import annotations

import mlx.core as mx

from opentq.kernels.cuda import pages
from opentq.kernels.sketches import shape_of

from . import emulator


def emulated_choose(sketches, rows, packed, count):
    """The CUDA kernels' choice, by the emulator."""
    (batch, heads, length, width), whole = rows.shape, max(packed) // 64
    channels, dim = shape_of(sketches.shape[3], width)
    (weights,), _ = emulator.run(
        pages.weigh_source(channels, dim),
        (-(-whole // 4), batch * heads, 1),
        [sketches, rows],
        [((batch * heads, length, whole), mx.float32)],
        (whole, sketches.shape[2], length),
    )
    outputs = [((batch * heads, whole), mx.float32), ((batch, heads, count), mx.int32)]
    given = [weights, mx.array(packed, dtype=mx.int32)]
    (_, found), _ = emulator.run(
        pages.pick_source(64), (batch * heads, 1, 1), given, outputs, (whole, length, heads, count)
    )
    return found

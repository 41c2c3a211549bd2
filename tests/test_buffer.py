"""Packed buffers: a block that a trim left half full is filled up by whoever packs whole blocks, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import pytest

from opentq.caches.buffer import Buffer
from opentq.contracts.layout import FLUSH
from opentq.kernels.cpu import attention as cpu
from opentq.kernels.cuda import layout as cuda
from opentq.spec.kv import KVSpec

SPECS = (
    *("int2", "int3", "int4:g64", "int8", "tq1", "tq2", "tq3", "tq4", "tq5/tq3:nc", "tq6", "tq2.5", "tq3p/tq3"),
    *("qjl2/int4", "polar4", "int4:out=8"),
)


class Packs:
    """A layout that packs with a codec of its own, as a kernel does: what is given in its place can't encode."""

    def __init__(self, layout, codec):
        self.layout, self.codec, self.packed = layout, codec, []

    def encode(self, codec, y):
        self.packed.append(y.shape[2])
        return self.layout.encode(self.codec, y)

    def __getattr__(self, name):
        return getattr(self.layout, name)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [cuda.layouts, cpu.layouts], ids=["cuda", "cpu"])
def test_a_reopened_block_is_packed_like_any_other(make, spec):
    if make is cpu.layouts and not cpu.BACKEND.available():
        pytest.skip("no C++ compiler")
    codecs, dim = KVSpec.parse(spec).codecs(), 128
    for codec, layout, inside in zip(codecs, make(*codecs, (dim, dim)), (5, 60)):
        if layout.block == 1:
            assert spec in ("int4:out=8", "tq6", "polar4"), "a row for each token"
            continue
        y, z = (mx.random.normal((2, 3, 3 * FLUSH, dim), key=mx.random.key(i)).astype(mx.float16) for i in (0, 1))
        kept = FLUSH + inside
        buffer, packs = Buffer(layout.block), Packs(layout, codec)
        buffer.append(codec, layout, 0, y)
        buffer.append(None, packs, kept, z[:, :, kept:])
        assert packs.packed == [2 * FLUSH], "one call, whole blocks"
        wanted = [
            mx.concatenate([a[:, :, :kept], b[:, :, kept:]], axis=2) for a, b in zip(codec.encode(y), codec.encode(z))
        ]
        for mine, theirs in zip(buffer.canonical(layout, 3 * FLUSH), wanted, strict=True):
            assert mx.array_equal(mine.view(mx.uint8), theirs.view(mx.uint8))

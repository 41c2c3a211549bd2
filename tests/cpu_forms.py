"""What the CPU kernels read, by short names: widths of affine codes, codebooks, two of them, sketches of keys, raw
storage, angles, and codes with outlier channels apart.
"""

from __future__ import annotations

from opentq.codecs import Affine, Codec, make
from opentq.codecs.outliers import Outliers
from opentq.kernels.cpu.layout import CpuLayout, layout_for

BITS = (2, 3, 4, 8)
BOOKS = tuple(f"tq{bits}" for bits in range(1, 7))
HALVES = ("tq1.5", "tq2.5", "tq3.5")
SKETCHES = ("tq2p", "tq3p", "tq4p", "qjl1", "qjl4")
V_FORMS = (*BITS, *BOOKS, *HALVES, "f16", "polar4", "int4:out=2", "polar4:out=1")
K_FORMS = (*V_FORMS, *SKETCHES, "tq3p:out=3")


def codec_of(form: int | str, group: int = 32) -> Codec:
    if isinstance(form, str) and ":out" in form:
        return Outliers(codec_of(form.split(":")[0]), int(form[-1]))
    return Affine(form, group) if isinstance(form, int) else make(form)


def layout_of(kind: str, codec: Codec, dim: int) -> CpuLayout:
    layout = layout_for(kind, codec, dim)
    assert layout is not None
    return layout

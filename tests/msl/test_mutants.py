"""Deleting any barrier of any Metal kernel, or bending a stride, must make the conformance tests fail."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from opentq.kernels import metal

from .. import oracle
from ..matrix import Shape
from ..test_metal import test_pack_is_the_codec_bit_for_bit as pack_is_the_codec
from . import launch, tally
from .harness import LANES, MATRIX, gpu, needs_emulator, no_trouble_since, step  # noqa: F401

pytestmark = needs_emulator

# ---- mutations: deleting any barrier or bending any stride must be noticed

BARRIERS = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\(mem_flags::mem_threadgroup\);")
STRIDES = {
    "decode_lanes": [
        ("safe * KW", "safe * (KW + 1)"),
        ("size_t(head) * capacity * VW", "size_t(head) * capacity * (VW - 1)"),
        ("size_t(head) * capacity * (GK * otq", "size_t(head) * capacity * ((GK + 1) * otq"),
        ("min(key[k], limit - 1) * GV + g)", "min(key[k], limit - 1) * GV)"),
        ("q[q0 + r * DK + d]", "q[q0 + r * DK + (d ^ 1)]"),
        ("size_t(head) * Td * (DK / 2)", "size_t(head) * Td * (DV / 4)"),
        ("lens[3 * b + 2]", "lens[3 * b + 1]"),
    ],
    "matrix": [
        ("rows + at * W", "rows + at * (W + 1)"),
        ("at * G + d0 / GROUP)", "at * G)"),
        ("tile + t * 8 * (DV + 8) + d * 8, DV + 8", "tile + t * 8 * (DV + 8) + d * 8, DV"),
        ("size_t(head) * capacity * (GV * otq", "size_t(head) * capacity * ((GV + 1) * otq"),
    ],
    "merge": [
        ("partial[(first + s) * DV + d]", "partial[(first + s) * DV + d / 2]"),
        ("(first + s) + 1]", "(first + s)]"),
    ],
    "pack": [
        ("codes[size_t(token) * W + w]", "codes[size_t(token) * W + (w ^ 1)]"),
        ("* G + g) * 2 + 1]", "* G + g) * 2]"),
    ],
}


def mutants() -> list[tuple[str, str, object]]:
    found: list[tuple[str, str, object]] = []
    for name in ("decode_lanes", "matrix", "merge", "pack"):
        body = metal.source(metal.KERNELS[name].file)[1]
        found += [(name, f"barrier {i}", i) for i in range(len(BARRIERS.findall(body)))]
        found += [(name, f"{a} -> {b}", (a, b)) for a, b in STRIDES[name]]
    return found


def exercise(name: str) -> None:
    """A few calls that between them reach every line of a kernel; raises when something is wrong."""
    if name == "pack":
        pack_is_the_codec(4, 80, 32)
        return
    long = 20 if name == "matrix" else 1
    args = step("int4:sink=4", Shape(batch=2), 220, long, causal=long > 1)
    (packed, sink, start), (_, columns) = args.lens[0], (0, args.dense_k.shape[2])
    oracle.judge(replace(args, lens=((packed, sink, start), (packed - 30, sink - 1, columns - long))))
    if name == "decode_lanes":
        oracle.judge(step("int4", Shape(q_heads=2, kv_heads=1, key_dim=192, value_dim=192), 220, 1))
    if name == "matrix":
        metal.tuning = lambda: MATRIX
        oracle.judge(step("int4", Shape(batch=2), 220, 1))


@pytest.mark.parametrize("name", ["decode_lanes", "matrix", "merge", "pack"])
def test_the_unchanged_kernel_passes(name):
    exercise(name)


@pytest.mark.parametrize("name, what, mutation", mutants(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_mutant_does_not_survive(name, what, mutation, monkeypatch, request):
    monkeypatch.setattr(metal, "tuning", lambda: LANES)

    def change(text: str) -> str:
        start = text.index("[[kernel]]")
        if isinstance(mutation, int):
            at = list(BARRIERS.finditer(text, start))[mutation]
            return text[: at.start()] + ";" + text[at.end() :]
        assert mutation[0] in text
        return text.replace(*mutation)

    before = len(launch.launches)
    metal.kernel(name).change = change
    with pytest.raises((launch.KernelError, AssertionError)):
        exercise(name)
        no_trouble_since(before)
    del launch.launches[before:]
    request.node.user_properties.append((tally.MUTANT, what))

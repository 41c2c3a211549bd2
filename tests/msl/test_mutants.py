"""Deleting any barrier of any Metal kernel, or bending a stride, must make the conformance tests fail.

Mutants are made from the text: every barrier is deleted, and every factor by which a kernel multiplies an index or a
pointer is made one too large. All barriers and every fifteenth stride are tried each time, all strides in the long run.
"""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import pytest

from opentq.kernels.metal import launch as metal
from opentq.kernels.metal.decode import append

from .. import oracle
from ..matrix import Shape
from ..test_metal import test_a_codebook_packs_bit_for_bit as codebook_packs
from ..test_metal import test_pack_is_the_codec_bit_for_bit as pack_is_the_codec
from ..test_metal_pages import chosen
from ..test_metal_pages import ragged_sequences as weights_in_ragged_sequences
from ..test_metal_pages import test_weights_of_shapes_and_rows as weights_of_rows
from ..test_metal_step import decode_step
from ..test_metal_step import test_columns_are_appended_as_the_cache_does as columns_are_appended
from . import launch, tally
from .harness import LANES, MATRIX, gpu, needs_emulator, no_trouble_since, step  # noqa: F401

pytestmark = needs_emulator

BARRIER = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\(mem_flags::mem_threadgroup\);")
FACTOR = re.compile(
    r"(?<= \* )(?:\((?:\w+ [*/+] (?:\w+|\w+<\w+>\(\)))\)"
    r"|(?:W[2]?|[KV][WMHS]|[QK]E|[KV]N|K?Q|G[KV]?|D[KV]?|R|RUNS|TK|SPAN|SUB|STRIDE|KP|N|L|DS|KG|8|splits|capacity|Td|n_rows|rows|count|pages|PAGE|columns|E)\b)"
)
NOT_A_STRIDE = re.compile(
    r"^\s*(?:(?:static constant )?constexpr|threadgroup \w+ \w+\[|for \(|return |int c = |zero\.add|#)|\? ts\[|sizeof"
)
"""Lines whose numbers are sizes, bounds or steps of loops over threads: most are only waste when they are larger."""
EVERY = 15
NAMES = ("merge", "append", "pack", "pack_book", "decode_whole", "weigh", "sketches", "pick", "matrix")
"""Kernels that between them have all text."""


def code(name: str) -> str:
    """Header and body of a kernel, comments blanked out, with a zero character between the two."""
    text = "\0".join(metal.source.__wrapped__(*metal.KERNELS[name].files))
    return re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)


def mutants() -> list:
    found = []
    for name in NAMES:
        text = code(name)
        # Shared text is mutated with the kernel that uses all of it.
        own = {"decode_whole": 0, "weigh": text.index("\0")}
        first = own.get(name, len((metal.HERE / "common.metal").read_text()))
        edits = [(m.start(), m.end(), ";", "no barrier") for m in BARRIER.finditer(text, first)]
        strides = []
        for m in FACTOR.finditer(text, first):
            line = text[text.rfind("\n", 0, m.start()) + 1 : text.find("\n", m.start())]
            if not NOT_A_STRIDE.search(line):
                strides.append((m.start(), m.end(), f"({m[0]} + 1)", f"{m[0]} + 1 in {line.strip()}"))
        for number, (start, end, new, what) in enumerate(edits + strides):
            long_run = number >= len(edits) and number % EVERY
            marks = [pytest.mark.slow] if long_run else []
            found.append(pytest.param(name, start, end, new, id=f"{name} {number}: {what}", marks=marks))
    return found


def runs_and_polar_blocks(shape: Shape, length: int) -> None:
    """Second arrays of keys and of values, and a query that is longer than a key."""
    for spec in ("tq2.5/polar4", "polar4/tq1.5", "qjl2/tq3.5", "tq3p/int4"):
        oracle.judge(step(spec, shape, 150, length, mx.float32, causal=True))


def exercise(name: str) -> None:
    """A few calls that between them reach every line of a kernel; raises when something is wrong."""
    if name == "pack":
        pack_is_the_codec(4, 80, 32)
        pack_is_the_codec(3, 112, 32)
        return
    if name == "pack_book":
        codebook_packs(2.5, "norm")
        codebook_packs(5, "length")
        return
    if name == "append":
        columns_are_appended((64, 128), mx.float32, 5, 2, True)
        one = [mx.ones((1, 1, n, 64), mx.float16) for n in (1, 3)]  # no multiple of what a threadgroup takes
        mx.eval(append(one[0], (True, True), (one[1], one[1]), (one[0], one[0]), None))
        return
    if name == "weigh":
        weights_in_ragged_sequences()
        weights_of_rows(Shape(q_heads=8, kv_heads=1), 5, mx.float16)
        return
    if name in ("sketches", "pick"):
        for found, expected in (chosen((830, 700), 4, 40, 2, 19, 4), chosen((64 * 280,), 1, 8, 1, 1, 5)):
            assert mx.array_equal(found, expected)
        return
    if name == "merge":
        metal.tuning = lambda: metal.Tuning(teams=1)
        decode_step("int4", 1)
    shape = Shape(batch=2)
    long = 20 if name == "matrix" else 1
    args = step("int4:sink=4", shape, 220, long, causal=long > 1, sinks=mx.array([0.3, 5.0, -2.0, 1.0]))
    (packed, sink, start), (_, columns) = args.lens[0], (0, args.dense_k.shape[2])
    oracle.judge(replace(args, lens=((packed, sink, start), (packed - 30, sink - 1, columns - long))))
    if name == "decode_whole":
        decode_step("int4", 1)
        oracle.judge(step("tq3/tq5", Shape(q_heads=2, kv_heads=1, key_dim=192, value_dim=192), 220, 1))
        oracle.judge(step("int4", Shape(q_heads=16, kv_heads=1, key_dim=128, value_dim=128), 150, 1))
        oracle.judge(step("int3/int8", Shape(q_heads=4, kv_heads=1, key_dim=80, value_dim=80), 203, 2, window=70))
        runs_and_polar_blocks(shape, 1)
    if name == "matrix":
        oracle.judge(step("tq5/int3", Shape(key_dim=80, value_dim=112), 220, 16, window=45))
        metal.tuning = lambda: MATRIX
        oracle.judge(step("int4", shape, 220, 1))
        runs_and_polar_blocks(shape, 17)


@pytest.mark.parametrize("name", NAMES)
def test_the_unchanged_kernel_passes(name):
    exercise(name)


@pytest.mark.parametrize("name, start, end, new", mutants())
def test_a_mutant_does_not_survive(name, start, end, new, monkeypatch, request):
    monkeypatch.setattr(metal, "tuning", lambda: LANES)
    text, whole = code(name), metal.source
    broken = tuple((text[:start] + new + text[end:]).split("\0"))
    files = metal.KERNELS[name].files
    monkeypatch.setattr(metal, "source", lambda *asked: broken if asked == files else whole(*asked))
    before = len(launch.launches)
    with pytest.raises((launch.KernelError, AssertionError)):
        exercise(name)
        no_trouble_since(before)
    del launch.launches[before:]
    request.node.user_properties.append((tally.MUTANT, name))

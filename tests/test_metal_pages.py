"""The choice of pages on Metal: weights by packed keys, executed in the emulator."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from opentq.attention import dispatch, guard, pages
from opentq.contracts.attention import AttnArgs
from opentq.kernels.metal import launch as metal
from opentq.kernels.metal import pages as metal_pages

from .matrix import Shape
from .msl import cost
from .msl.harness import LANES, MATRIX, gpu, needs_emulator, reports, step  # noqa: F401

pytestmark = needs_emulator


def weighed(args: AttnArgs) -> mx.array:
    """The kernel's weights, held to the portable path's."""
    before = len(reports("weigh"))
    found, expected = metal_pages.weigh(args), pages.weigh(args)
    assert found is not None and found.shape == expected.shape and len(reports("weigh")) == before + 1
    assert mx.allclose(found, expected, rtol=1e-4, atol=2e-4), mx.abs(found - expected).max().item()
    return found


def chosen(
    packed: tuple[int, ...], channels: int, dim: int, heads: int, rows: int, count: int, held: int = 0
) -> tuple[mx.array, mx.array]:
    """What the kernels choose of random keys, and the portable path."""
    rng, held = np.random.default_rng(0), held or max(packed) // 64 + 3
    keys = mx.array(rng.standard_normal((len(packed), heads, 64 * held, dim), dtype=np.float32))
    index = mx.broadcast_to(mx.arange(1, channels + 1, dtype=mx.int32), (len(packed), heads, channels))
    selector = pages.Selector(pages.encode(keys, index), index, 64 * count, sums=True)
    q = mx.array(rng.standard_normal((len(packed), heads * rows, 1, dim), dtype=np.float32))
    queries = selector.queries(q, 3 * dim**-0.5)
    return metal_pages.choose(selector.sketches, queries, packed, count), selector.choose(queries, packed, count)


def listed(args: AttnArgs, *lists: list[int]) -> AttnArgs:
    return replace(args, pages=mx.array([[one] * args.kv_heads for one in lists], dtype=mx.int32))


@pytest.mark.parametrize("spec", ["int3", "k8v4:g64", "f16", "tq4", "tq5:nc", "tq6:haar"])
def test_weights_of_one_run(spec):
    weighed(step(spec, Shape(), 330, 1))


@pytest.mark.parametrize("spec", ["tq1.5:nc", "tq3p/int4", "qjl2/int4", "polar4"])
def test_weights_of_two_runs_of_sketches_and_of_angles(spec):
    args = step(spec, Shape(q_heads=2, kv_heads=1), 330, 1)
    weighed(listed(args, [0, 2, 3]))


@pytest.mark.parametrize(
    "shape, length, dtype",
    [
        (Shape(q_heads=2), 1, mx.float16),
        (Shape(q_heads=8, kv_heads=1, key_dim=128, value_dim=64), 1, mx.bfloat16),
        (Shape(q_heads=5, kv_heads=1, key_dim=80, value_dim=112), 3, mx.float32),
        (Shape(q_heads=8, kv_heads=1), 5, mx.float16),  # three tiles of rows, the last one not full
        (Shape(q_heads=2, kv_heads=1, key_dim=256, value_dim=128), 8, mx.float16),
        (Shape(q_heads=1, kv_heads=1, key_dim=512, value_dim=512), 1, mx.float16),
    ],
    ids=str,
)
def test_weights_of_shapes_and_rows(shape, length, dtype):
    weighed(listed(step("int4", shape, 203, length, dtype, causal=length > 1), [1, 2]))


@pytest.mark.parametrize("variant", [LANES, MATRIX, replace(LANES, teams=1)], ids=str)
def test_weights_in_ragged_sequences(variant, monkeypatch):
    monkeypatch.setattr(metal, "tuning", lambda: variant)
    ragged_sequences()


def ragged_sequences() -> None:
    """The newest page may be a part of one, a sequence may have fewer pages than its list, or none."""
    args = step("tq2.5:sink=4", Shape(batch=3), 460, 2, causal=True, softcap=3.0)
    (packed, sink, start), args.lens = args.lens[0], ()
    args.lens = (packed - 20, sink, start), (130, sink, start), (0, sink, start)
    found = weighed(args)
    assert (found[1, :, :, 3:] == -mx.inf).all() and (found[2] == -mx.inf).all() and mx.isfinite(found[0]).all()
    some = weighed(listed(args, [0, 3, 4, 6], [0, 1, 2, 0], [0, 0, 0, 0]))
    assert mx.allclose(some[0], found[0][..., mx.array([0, 3, 4, 6])]) and mx.allclose(some[1], found[1][..., :4])


def test_keys_of_listed_pages_are_read_once_and_nothing_else():
    args = step("int4", Shape(q_heads=8, kv_heads=1, key_dim=128, value_dim=128), 513, 1)
    weighed(listed(args, [1, 4, 5]))
    report = reports("weigh")[-1]
    assert sum(report.unique_bytes[1:4]) == sum(report.fetched_bytes[1:4]) == 3 * 64 * (64 + 16)
    assert report.reductions == 3 * 8 * 2 and report.shuffles == 0


def test_what_is_not_weighed():
    args = step("int4:out=2", Shape(), 140, 1)
    assert metal_pages.weigh(args) is None
    assert metal_pages.weigh(replace(step("int4", Shape(), 140, 1), window=70)) is None
    assert metal_pages.weigh(step("int4", Shape(), 40, 1)) is None


@pytest.mark.parametrize(
    "packed, channels, dim, heads, rows, count",
    [
        ((1300, 700), 6, 64, 2, 4, 4),
        ((1300,), 4, 128, 1, 1, 1),
        ((64 * 40, 64 * 21), 5, 40, 1, 19, 9),  # two tiles of rows, the last one not full
        ((64 * 12,), 4, 512, 1, 9, 11),
    ],
)
def test_sketches_choose_what_the_portable_path_chooses(packed, channels, dim, heads, rows, count):
    before = len(reports("pick"))
    found, expected = chosen(packed, channels, dim, heads, rows, count)
    assert mx.array_equal(found, expected) and len(reports("pick")) == before + 1


def test_sketches_of_more_pages_than_threads_and_of_few():
    found, expected = chosen((64 * 300 + 7, 200), 2, 16, 1, 1, 7)
    assert mx.array_equal(found[0], expected[0]) and found[1].tolist() == [[0, 1, 2, 3, 0, 0, 0]]


def test_pages_that_tie_are_taken_in_order():
    sketches = pages.encode(mx.ones((1, 1, 64 * 300, 16)), mx.zeros((1, 1, 1), mx.int32))
    for tokens, count, last in ((64 * 300, 290, 299), (64 * 300 - 1, 4, 299)):
        found = metal_pages.choose(sketches, mx.ones((1, 1, 2, 17)), (tokens,), count)
        assert found.tolist() == [[[*range(count - 1), last]]]


def test_the_heaviest_of_weights_by_keys_are_listed():
    """The newest page is a part of one in one sequence, a whole one in the other."""
    weights = mx.random.normal((2, 3, 5, 21), key=mx.random.key(0)) * 4
    for packed, count in (((64 * 21, 64 * 17), 4), ((64 * 20 + 9, 64 * 21), 19)):
        before = len(reports("pick"))
        assert mx.array_equal(metal_pages.top(weights, packed, count), pages.top(weights, packed, count))
        assert len(reports("pick")) == before + 1


def test_a_row_that_is_not_finite_has_no_say():
    sketches = pages.encode(mx.random.normal((1, 1, 640, 16), key=mx.random.key(0)), mx.zeros((1, 1, 1), mx.int32))
    rows = mx.random.normal((1, 1, 1, 17), key=mx.random.key(1)) * 3
    alone = metal_pages.choose(sketches, rows, (640,), 3)
    for wrong in (mx.nan, mx.inf):
        both = mx.concatenate([mx.full(rows.shape, wrong), rows], axis=2)
        assert mx.array_equal(metal_pages.choose(sketches, both, (640,), 3), alone)


def test_a_step_by_pages_has_a_quarter_of_the_work(monkeypatch):
    """Of 128K tokens, 4,096 of which are read, GQA 8: lane operations of all launches, beside those of reading all."""
    monkeypatch.setattr(cost, "TOKENS", (256, 512))
    whole, budget = 1 << 17, 4096
    by_sketches, by_list, by_keys = cost.page_kernels("int4", 8, 128)
    exact = cost.ours("int4", 8, 128, "lanes").issue
    work = (by_sketches.issue + by_list.issue) * whole + (by_keys.issue + by_list.issue) * 4 * budget + exact * budget
    assert by_keys.fetched == by_keys.unique == 80 and work < exact * whole / 4


def test_sketches_are_read_once():
    chosen((64 * 24,), 4, 128, 1, 8, 5)
    report = reports("sketches")[-1]
    assert report.unique_bytes[0] == report.fetched_bytes[0] == 24 * pages.row_bytes(4, 128)


def test_the_judge_of_weights_knows_this_kernel(monkeypatch):
    """A back end that is judged at first use: right weights serve, and wrong ones under `native` are an error."""
    monkeypatch.setattr(guard, "judging", True)
    monkeypatch.setattr(guard, "trusted", {})
    monkeypatch.setattr(guard.verdicts, "kept", lambda name, known={}: known)
    monkeypatch.setattr(guard.verdicts, "keep", lambda name, what, why: guard.verdicts.kept(name).update({what: why}))
    backend = dispatch.backends.active()
    args = step("tq3/int4", Shape(batch=2), 203, 1)
    assert mx.allclose(guard.weigh(backend, args), pages.weigh(args), atol=2e-4)
    source = metal.source

    def wrong(*files):
        return tuple(text.replace("lane + 32 * k", "lane") for text in source(*files))

    monkeypatch.setattr(metal, "source", wrong)
    metal.forget()
    guard.trusted.clear()
    guard.verdicts.kept("metal").clear()
    with pytest.raises(guard.SetAside, match=r"the metal kernel for weights of pages .* differs"):
        guard.weigh(backend, args)

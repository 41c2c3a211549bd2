"""The choice of pages on Metal: weights by packed keys, executed in the emulator."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from opentq.attention import dispatch, guard, pages
from opentq.contracts.attention import AttnArgs
from opentq.kernels.metal import attention as fused_metal
from opentq.kernels.metal import launch as metal

from .matrix import Shape
from .msl.harness import LANES, MATRIX, gpu, needs_emulator, reports, step  # noqa: F401

pytestmark = needs_emulator


def weighed(args: AttnArgs) -> mx.array:
    """The kernel's weights, held to the portable path's."""
    before = len(reports("weigh"))
    found, expected = fused_metal.weigh(args), pages.weigh(args)
    assert found is not None and found.shape == expected.shape and len(reports("weigh")) == before + 1
    assert mx.allclose(found, expected, rtol=1e-4, atol=2e-4), mx.abs(found - expected).max().item()
    return found


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
    assert fused_metal.weigh(args) is None
    assert fused_metal.weigh(replace(step("int4", Shape(), 140, 1), window=70)) is None
    assert fused_metal.weigh(step("int4", Shape(), 40, 1)) is None


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

"""A kernel is believed after it was judged: planted wrong ones, on every back end, cost speed and never a token."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from opentq.attention import backends, dispatch, guard, judge, pages, tiled, verdicts
from opentq.attention.pages import PAGE, Selector, encode
from opentq.caches import sketches
from opentq.caches.single import OpenTQCache
from opentq.codecs import rotation
from opentq.contracts.layout import CANONICAL
from opentq.errors import UserError
from opentq.hosts import hooks
from opentq.kernels import build
from opentq.kernels.metal import launch as metal
from opentq.kernels.sketches import shape_of

from . import oracle
from .conftest import random_llama
from .matrix import Shape
from .msl import launch
from .msl.harness import needs_emulator

PROMPT = list(range(1, 150))
ROOT = Path(__file__).parents[1]


def wrong(function):
    """A kernel that is off by a few percent, which nobody sees in a text."""
    return lambda args: None if (out := function(args)) is None else out * 1.03


def refused(function):
    def attend(args):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: no such thing")

    return attend


def late(function):
    """A kernel whose pipeline can't be made once there are more than 128 packed tokens."""

    def attend(args):
        if args.max_packed > 128:
            raise RuntimeError("[metal::Device] Unable to load kernel: too many registers")
        return function(args)

    return attend


@pytest.fixture(params=["cpu", "cuda", "metal"])
def plant(request, monkeypatch, tmp_path):
    """Judge on a machine of its own, whose back end (of that name) a test can break. The kernels behind it are this
    machine's CPU kernels under `cpu`; under the others the portable path takes their place, which a test then breaks.
    """
    real = backends.backend(request.param)
    if request.param == "cpu":
        if not real.available():
            pytest.skip("no C++ compiler")
    else:
        real = replace(real, attend=lambda args: None if args.mask is not None else tiled.attend(args))
        real = replace(real, layouts=lambda k, v, dims: (CANONICAL, CANONICAL), available=lambda: True)
        real = replace(real, extend=lambda codecs, dense, fresh: None, step=None, rotate=lambda x: None)
        real = replace(real, choose=lambda *_: None, sums=False, weigh=lambda args: None, top=lambda *_: None)
    monkeypatch.setattr(guard, "judging", True)
    monkeypatch.setattr(guard, "trusted", {})
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(guard, "_said", set())
    monkeypatch.setattr(verdicts, "file", lambda name: tmp_path / f"{name}.jsonl")
    monkeypatch.delenv("OPENTQ_KERNELS", raising=False)

    def planted(**changes):
        whole = replace(real, step=None) if "attend" in changes else real  # a step's kernel is another one
        broken = replace(whole, **{name: change(getattr(whole, name)) for name, change in changes.items()})
        monkeypatch.setattr(backends, "active", lambda: broken)
        return broken

    return planted


def text(model) -> list[int]:
    """A prompt and 50 tokens, greedily, with who served."""
    from mlx_lm.generate import generate_step

    cache = model.make_cache()
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=50, prompt_cache=cache)]


@functools.cache
def portable(spec: str = "int4") -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENTQ_KERNELS", "tiled")
        model = random_llama()
        hooks.compress(model, spec)
        return text(model)


def lines(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("kernel", [wrong, refused, late], ids=lambda f: f.__name__)
def test_generation_goes_on_with_the_portable_path(plant, monkeypatch, caplog, kernel):
    expected = portable()
    backend = plant(attend=kernel)
    model = random_llama()
    hooks.compress(model, "int4")
    assert text(model) == expected
    assert {s.served_by for s in hooks.installed(model).stats.values()} == {"tiled"}
    said = lines(caplog)
    words = {wrong: "differs", refused: "Unable to build metal library", late: "too many registers"}[kernel]
    assert len(said) == 1 and f"the {backend.name} kernel for attention int4:g32/int4:g32 D=64/64" in said[0]
    assert words in said[0] and "opentq doctor --bench" in said[0]


@pytest.mark.parametrize("kernel", [wrong, refused, late], ids=lambda f: f.__name__)
def test_native_makes_it_an_error(plant, monkeypatch, kernel):
    plant(attend=kernel)
    monkeypatch.setenv("OPENTQ_KERNELS", "native")
    model = random_llama()
    with pytest.raises(guard.SetAside, match="unset OPENTQ_KERNELS=native"):
        hooks.compress(model, "int4")
        text(model)
    assert issubclass(guard.SetAside, UserError)


def test_a_right_kernel_serves_and_is_judged_once(plant, monkeypatch, caplog):
    backend = plant()
    model = random_llama()
    hooks.compress(model, "int4")
    text(model)
    assert {s.served_by for s in hooks.installed(model).stats.values()} == {backend.name} and not lines(caplog)
    kept = verdicts.file(backend.name).read_text()
    assert all(json.loads(line)["why"] == "" for line in kept.splitlines())
    # Another process on this machine reads the verdicts.
    monkeypatch.setattr(guard, "trusted", {})
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(judge, "attention", lambda function, args: pytest.fail("judged again"))
    text(model)
    assert verdicts.file(backend.name).read_text() == kept


def test_doctor_shows_the_verdict(plant, monkeypatch):
    backend = plant(attend=wrong)
    step = args()
    assert dispatch.attend(step)[1] == "tiled"
    found = verdicts.checks(backend.name)
    assert [f.state for f in found] == ["ok", "slow"]
    assert "differs from the portable path by 3.0e-02" in found[1].detail and "delete" in found[1].remedy


def args(tokens: int = 200, length: int = 1, **options):
    cache = OpenTQCache("int4")
    handles = oracle.fill(cache, *oracle.vectors(Shape(), tokens), [tokens - length, length])
    return oracle.args_of(handles, oracle.queries(Shape(), length), **options)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 20.0}, {"sinks": mx.zeros((4,))}], ids=str)
@pytest.mark.parametrize("length", [1, 3, 30])
def test_every_kind_is_judged_apart(plant, length, options):
    """Wrong for this kind of call only; other kinds are served."""
    options = {"causal": length > 1, **options}

    def wrong_here(function):
        return lambda a: out * 1.03 if (out := function(a)) is not None and hit(a) else out

    def hit(a):
        same = (a.window > 0, a.softcap > 0, a.sinks is not None)
        return (a.q.shape[2] == 1) == (length == 1) and same == (
            "window" in options,
            "softcap" in options,
            "sinks" in options,
        )

    backend = plant(attend=wrong_here)
    assert dispatch.attend(args(length=length, **options))[1] == "tiled"
    other = 1 if length > 1 else 5
    assert dispatch.attend(args(length=other, causal=other > 1))[1] == backend.name


def test_what_is_packed_wrong_is_not_written(plant, monkeypatch, caplog):
    """A wrong pack kernel is found before the first block is written."""

    class Wrong(type(CANONICAL)):
        name = "wrong"

        def encode(self, codec, y):
            codes, scales = codec.encode(y)
            return codes ^ 1, scales

    plant(layouts=lambda real: lambda k, v, dims: (Wrong(), Wrong()))
    cache = OpenTQCache("int4")
    oracle.fill(cache, *oracle.vectors(Shape(), 200), [200])
    assert cache.k_layout is CANONICAL and cache.v_layout is CANONICAL
    assert len(lines(caplog)) == 1 and "packing of keys int4:g32" in lines(caplog)[0]
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    right = OpenTQCache("int4")
    oracle.fill(right, *oracle.vectors(Shape(), 200), [200])
    assert oracle.same_state(cache, right)


def test_a_wrong_append_is_not_used(plant, caplog):
    plant(extend=lambda real: lambda codecs, dense, fresh: tuple(mx.concatenate(p, axis=2) for p in zip(dense, fresh)))
    cache = OpenTQCache("int4")
    oracle.fill(cache, *oracle.vectors(Shape(), 30, dtype=mx.float16), [30])
    assert "appending int4:g32/int4:g32" in lines(caplog)[0]
    plain = OpenTQCache("int4")
    plant()
    oracle.fill(plain, *oracle.vectors(Shape(), 30, dtype=mx.float16), [30])
    assert oracle.same_state(cache, plain)


def one_step(a, fresh, center):
    """A decode step in one launch, by the portable path."""
    new = [c.rotate(x.astype(mx.float32)) for c, x in zip((a.k.codec, a.v.codec), fresh)]
    new[0] = new[0] if center is None else new[0] - center
    dense = [mx.concatenate([d, n.astype(mx.float16)], axis=2) for d, n in zip((a.dense_k, a.dense_v), new)]
    whole = replace(a, q=a.k.codec.rotate(a.q), dense_k=dense[0], dense_v=dense[1])
    return a.v.codec.unrotate(tiled.attend(whole)), *dense


@pytest.mark.parametrize("wrong_part", [0, 1, 2, None])
@pytest.mark.parametrize("center", [None, mx.ones((1, 2, 1, 64), mx.float16)], ids=["", "centred"])
def test_a_wrong_step_is_not_used(plant, caplog, wrong_part, center):
    """A decode step in one launch: its output, and either of the columns, may be wrong."""

    def launch(a, fresh, center):
        return tuple(x * 1.03 if i == wrong_part else x for i, x in enumerate(one_step(a, fresh, center)))

    backend = plant(step=lambda real: lambda *_: launch)
    a = args()
    fresh = tuple(mx.random.normal((1, 2, 1, 64)) for _ in range(2))
    a = replace(a, dense_k=a.dense_k[:, :, :-1], dense_v=a.dense_v[:, :, :-1])
    for _ in range(2):
        done = guard.step(backend, a, fresh, center)
        assert (done is None) == (wrong_part is not None)
    assert len(lines(caplog)) == (wrong_part is not None)


def test_a_step_that_gives_another_one_again_is_not_used(plant, caplog):
    def made(*_):
        first = []

        def launch(a, fresh, center):
            first.append(one_step(a, fresh, center))
            return first[0]

        return launch

    backend = plant(step=lambda real: made)
    a = args()
    a = replace(a, dense_k=a.dense_k[:, :, :-1], dense_v=a.dense_v[:, :, :-1])
    fresh = tuple(mx.random.normal((1, 2, 1, 64)) for _ in range(2))
    assert guard.step(backend, a, fresh, None) is None and len(lines(caplog)) == 1


def test_a_wrong_rotation_is_not_used(plant, caplog):
    backend = plant(rotate=lambda real: lambda x: x)
    rotate = guard.rotation(backend)
    assert rotate(mx.ones((2, 64))) is None and rotate(mx.ones((2, 64))) is None
    assert len(lines(caplog)) == 1 and "rotation D=64" in lines(caplog)[0]


@pytest.mark.parametrize("sign", [1, -1], ids=["right", "wrong"])
def test_a_wrong_choice_of_pages_is_not_used(plant, caplog, sign):
    """The pages of least weight: ascending, too, and the newest among them."""
    backend = plant(choose=lambda real: lambda sketches, rows, *rest: by_sketch(sketches, sign * rows, *rest))
    made = pages_of_a_cache()
    for _ in range(2):
        assert (guard.choose(backend, *made) is None) == (sign < 0)
    assert len(lines(caplog)) == (sign < 0)
    assert all(f"the {backend.name} kernel for pages by 8 of 64 channels" in line for line in lines(caplog))


@pytest.mark.parametrize("factor", [1, 1.1], ids=["right", "wrong"])
def test_wrong_weights_of_pages_are_not_used(plant, caplog, factor):
    backend = plant(weigh=lambda real: lambda args: factor * pages.weigh(args))
    cache = OpenTQCache("int4")
    oracle.fill(cache, *oracle.vectors(Shape(q_heads=4, kv_heads=2), 400), [300])
    handles = cache.update_and_fetch(*oracle.vectors(Shape(q_heads=4, kv_heads=2), 1))
    args = oracle.args_of(handles, mx.random.normal((1, 4, 1, 64)))
    for _ in range(2):
        assert (guard.weigh(backend, args) is None) == (factor > 1)
    assert len(lines(caplog)) == (factor > 1)
    assert all(f"the {backend.name} kernel for weights of pages int4" in line for line in lines(caplog))


@pytest.mark.parametrize("sign", [1, -1], ids=["right", "wrong"])
def test_a_wrong_list_of_the_heaviest_pages_is_not_used(plant, caplog, sign):
    backend = plant(top=lambda real: lambda weights, *rest: pages.top(sign * weights, *rest))
    weights = mx.random.normal((1, 2, 4, 6))
    for _ in range(2):
        assert (guard.top(backend, weights, (6 * PAGE,), 2) is None) == (sign < 0)
    assert len(lines(caplog)) == (sign < 0)
    assert all(f"the {backend.name} kernel for the pages of most weight of 2 heads" in line for line in lines(caplog))


@pytest.mark.parametrize("sign", [1, -1], ids=["right", "wrong"])
@pytest.mark.parametrize("plant", ["cpu"], indirect=True)
def test_a_wrong_selection_of_pages_is_not_used(plant, caplog, sign):
    backend = plant(
        select=lambda real: (
            lambda made, channels, args, plain, *rest: by_both(
                made, channels, replace(args, q=sign * args.q), sign * plain, *rest
            )
        )
    )
    cache = OpenTQCache("int4")
    oracle.fill(cache, *oracle.vectors(Shape(q_heads=4, kv_heads=2), 400), [300])
    handles = cache.update_and_fetch(*oracle.vectors(Shape(q_heads=4, kv_heads=2), 1))
    args = oracle.args_of(handles, mx.random.normal((1, 4, 1, 64)))
    selector = pages_of_a_cache()[0]
    for _ in range(2):
        assert (guard.select(backend, selector, args, args.q, 3, 2) is None) == (sign < 0)
    assert len(lines(caplog)) == (sign < 0)
    assert all("the cpu kernel for pages by 8 channels, then by keys, int4" in line for line in lines(caplog))


def by_both(made, channels, args, plain, many, count):
    return pages.select(Selector(made, channels, count * PAGE), args, plain, many, count)


def by_sketch(sketches, rows, packed, count):
    """The portable path as a back end's function."""
    channels, _ = shape_of(sketches.shape[3], rows.shape[3])
    return Selector(sketches, mx.zeros((*sketches.shape[:2], channels), mx.int32), count * PAGE).choose(
        rows, packed, count
    )


def pages_of_a_cache():
    """Arguments of `guard.choose`."""
    channels = mx.broadcast_to(mx.arange(8, dtype=mx.int32), (1, 2, 8))
    selector = Selector(encode(mx.random.normal((1, 2, 4 * PAGE, 64)), channels), channels, 2 * PAGE)
    return selector, selector.queries(mx.random.normal((1, 4, 1, 64)), 0.125), (4 * PAGE,), 2


def failing(after: int):
    """A function of a back end that fails from its call number `after` on."""
    calls = itertools.count()

    def change(function):
        def changed(*args):
            if next(calls) >= after:
                raise RuntimeError("[metal::Device] Unable to load function: no more registers")
            return function(*args)

        return changed

    return change


@pytest.mark.parametrize("name", ["attend", "step", "extend", "choose", "weigh", "top", "select"])
@pytest.mark.parametrize("plant", ["metal"], indirect=True)
def test_what_fails_in_a_generation_is_done_again_by_the_portable_path(plant, monkeypatch, caplog, name):
    """The call that fails is computed again, once, and nobody asks that function again."""
    spec = "int4" if name in ("attend", "step") else "int4:pages=64"  # which a step in one launch does not serve
    monkeypatch.setattr(sketches, "WARM", 64)  # or the prompt would be too short to choose channels,
    for times in ("WHOLE", "CANDIDATES"):  # and pages
        monkeypatch.setattr(pages, times, 1)
    expected = portable(spec)
    portably = {
        "attend": lambda real: lambda args: None if args.mask is not None else tiled.attend(args),
        "step": lambda real: one_step,
        "extend": lambda real: (
            lambda codecs, dense, fresh: tuple(
                mx.concatenate([d, c.rotate(x.astype(mx.float32)).astype(mx.float16)], axis=2)
                for c, d, x in zip(codecs, dense, fresh)
            )
        ),
        "choose": lambda real: by_sketch,
        "weigh": lambda real: pages.weigh,
        "top": lambda real: pages.top,
        "select": lambda real: by_both,
    }

    def fails(real):
        function = failing(60)(portably[name](real))
        return (lambda *_: function) if name == "step" else function

    backend = plant(**{name: fails})
    model = random_llama()
    hooks.compress(model, spec)
    assert text(model) == expected
    said = lines(caplog)
    assert len(said) == 1 and "no more registers" in said[0] and "set aside" in said[0]
    aside = [f.detail for f in verdicts.checks(backend.name) if f.name == "set aside"]
    assert len(aside) == 1 and "in a generation" in aside[0]


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("plant", ["metal"], indirect=True)
def test_a_rotation_that_fails_is_not_asked_again(plant, caplog, after):
    backend = plant(rotate=lambda real: failing(after * 2)(rotation.plain))
    rotate, x = guard.rotation(backend), mx.ones((2, 64))
    assert [rotate(x) is None for _ in range(3)] == ([True] * 3 if not after else [False, True, True])
    assert len(lines(caplog)) == 1 and "rotation D=64" in lines(caplog)[0]


def test_verdicts_of_old_kernels_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    other = tmp_path / "verdicts-metal-0123abcd-5.jsonl"
    other.write_text("")
    for text in range(6):
        monkeypatch.setattr(verdicts, "_known", {})
        monkeypatch.setattr(verdicts, "identity", lambda name: str(text))  # noqa: B023
        verdicts.keep("metal", "attention", "")
        os.utime(verdicts.file("metal"), (text, text))
    left = sorted(int(p.stem.rpartition("-")[2]) for p in tmp_path.glob("*.jsonl") if p != other)
    assert left == [2, 3, 4, 5] and other.exists()  # the newest of this device, and another device's


def test_damaged_verdicts_are_judged_again(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "_known", {})
    monkeypatch.setattr(verdicts, "file", lambda name: tmp_path / name)
    (tmp_path / "metal").write_text("{\nno\n")
    assert verdicts.kept("metal") == {}
    verdicts.keep("metal", "attention", "")
    assert [f.detail for f in verdicts.checks("metal")] == ["1 variants right on this machine"]


@pytest.mark.parametrize(
    "words",
    [
        "[METAL] Command buffer execution failed: Insufficient Memory",
        "[malloc] Unable to allocate 1024 bytes.",
        "[ring] connection to a peer was lost",
    ],
)
def test_what_is_no_fault_of_a_kernel_is_no_verdict(plant, words):
    """Memory that ran out, and a process that is gone."""

    def failing(function):
        def attend(args):
            raise RuntimeError(words)

        return attend

    backend = plant(attend=failing)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        dispatch.attend(args())
    assert all(finding.state == "ok" for finding in verdicts.checks(backend.name))


def test_what_a_verdict_depends_on(monkeypatch):
    before = [verdicts.file(name).name for name in ("cpu", "cuda", "metal")]
    assert len({verdicts.identity(name) for name in ("cpu", "cuda", "metal")}) == 3
    monkeypatch.setattr(verdicts.machine, "device", lambda: ("mac", "Apple M9"))
    assert verdicts.file("metal").name != before[2]
    verdicts.identity.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(verdicts.platform, "platform", lambda: "macOS 27")
    assert verdicts.file("metal").name != before[2]
    verdicts.identity.cache_clear()


@needs_emulator
@pytest.mark.parametrize("plant", ["metal"], indirect=True)
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace("fma(part[k][r], sz.x, base)", "fma(part[k][r], sz.y, base)"), "differs"),
        (lambda text: text.replace("simd_max(fresh[r])", "simd_maximum(fresh[r])"), "fails"),
    ],
    ids=["wrong", "does not compile"],
)
def test_a_broken_metal_kernel(plant, monkeypatch, caplog, change, words):
    """Its text is broken, as Apple's compiler would get it; this is the real back end in the emulator."""
    backend = backends.backend("metal")
    monkeypatch.setattr(metal, "make", lambda **creation: launch.MetalKernel(change=change, **creation))
    monkeypatch.setattr(metal, "cores", lambda: 1)
    metal.forget()
    monkeypatch.setattr(backends, "active", lambda: backend)
    step = args(length=1)
    out, name = dispatch.attend(step)
    metal.forget()
    assert name == "tiled" and words in lines(caplog)[0] and "the metal kernel" in lines(caplog)[0]
    oracle.judge(step, out)


def test_on_standard_error():
    """The command line: one line on stderr, the portable path's text, `opentq doctor`; native stops with an error."""
    if build.active_dialect() is None or backends.active() is None:
        pytest.skip("no kernels here")
    done = subprocess.run([sys.executable, "dev/planted.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

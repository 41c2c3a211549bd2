"""Calls of custom kernels that are made again: the arrays of a new call, and a new call whenever one is needed."""

from __future__ import annotations

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from opentq.kernels import extension, repeat


class Counted:
    """`split` as a kernel is called, with a count of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, inputs, parts):
        self.calls += 1
        return list(mx.split(inputs[0], parts, axis=-1))


@pytest.fixture
def kernel():
    if why := extension.missing("repeat"):
        pytest.skip(why)
    return Counted()


def arrays(seed, shape=(3, 4), dtype=mx.float32):
    return [mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)]


def same(call, inputs):
    return all(mx.array_equal(a, b).item() for a, b in zip(call(inputs), mx.split(inputs[0], 2, axis=-1), strict=True))


def test_other_arrays_of_the_same_shapes_take_no_new_call(kernel):
    call = repeat.repeated(kernel, {"parts": 2})
    assert all(same(call, arrays(seed)) for seed in range(5)) and kernel.calls == 1


def test_arrays_that_wait_to_be_computed_are_told_apart(kernel):
    call = repeat.repeated(kernel, {"parts": 2})
    given = [arrays(seed) for seed in range(5)]
    outs = [call(inputs) for inputs in given]  # none computed
    assert all(mx.array_equal(mx.concatenate(out, axis=-1), x).item() for out, (x,) in zip(outs, given))


@pytest.mark.parametrize("other", [arrays(1, (3, 6)), arrays(1, (4, 4)), arrays(1, dtype=mx.float16)])
def test_other_shapes_and_dtypes_take_a_new_call(kernel, other):
    call = repeat.repeated(kernel, {"parts": 2})
    assert same(call, arrays(0)) and same(call, other) and kernel.calls == 2
    assert same(call, arrays(2)) and kernel.calls == 3


def test_another_thread_or_stream_takes_a_new_call(kernel):
    call, found = repeat.repeated(kernel, {"parts": 2}), []
    assert same(call, arrays(0))
    with mx.stream(mx.new_stream(mx.default_device())):
        assert same(call, arrays(1)) and kernel.calls == 2
    worker = threading.Thread(target=lambda: found.append(same(call, arrays(2))))
    worker.start(), worker.join()
    assert found == [True] and kernel.calls == 3


def test_outputs_that_are_no_operation_on_these_inputs_are_not_made_again():
    if why := extension.missing("repeat"):
        pytest.skip(why)
    for kernel in (
        lambda inputs: [mx.array([float(inputs[0][0, 0])])],  # computed already
        lambda inputs: [inputs[0].astype(mx.float16) + 1],  # of something made of them
        lambda inputs: list(mx.split(inputs[0], 2, axis=-1))[:1],  # only one of two
        lambda inputs: [inputs[0] + inputs[0], inputs[0] * inputs[0]],  # two operations
    ):
        call = repeat.repeated(kernel, {})
        for seed in range(3):
            inputs = arrays(seed)
            pairs = zip(call(inputs), kernel(inputs=inputs), strict=True)
            assert all(mx.array_equal(a, b).item() for a, b in pairs)


def test_nothing_of_the_first_call_is_kept(kernel):
    call = repeat.repeated(kernel, {"parts": 2})
    big = [mx.zeros((1 << 20, 4))]
    mx.eval(big, call(big))
    held = mx.get_active_memory()
    del big
    assert held - mx.get_active_memory() >= 16 << 20


@pytest.mark.parametrize("name", extension.FILES)
def test_names_of_mlx_stay_its_own(name):
    """MLX's library has functions with the names of llama.cpp's, which must find its own."""
    script = f"""
import ctypes
from opentq.kernels import extension
found = extension.module({name!r})
print(found is not None, hasattr(ctypes.CDLL(None), "gguf_get_key"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    if done.stdout.startswith("False"):
        pytest.skip("no extension here")
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr


def test_without_the_extension_every_call_is_a_new_one(kernel, monkeypatch):
    monkeypatch.setattr(extension, "module", lambda name: None)
    call = repeat.repeated(kernel, {"parts": 2})
    assert same(call, arrays(0)) and same(call, arrays(1)) and kernel.calls == 2

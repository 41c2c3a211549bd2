"""Decode attention of other projects, where it is installed: FlashInfer's fa2 and XQA, and FlashAttention 3.

Each serves one new token over keys and values of 16 or 8 bits, laid out as it likes best: every way of a name is
timed, and the fastest counts. A way is first tried in a process of its own, because a kernel that reads where it may
not takes the whole process with it; and before it is timed its output is held against fp32 attention over the same
keys and values, so that a wrong call can't win. FlashInfer's fa3 is not here: it never splits the keys of a sequence.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opentq.codecs.affine import Affine

from . import graph
from .graph import Shape

Calls = list[Callable[[], object]]
ALLOWED = {16: 0.01, 8: 0.15}
"""Relative error to fp32 attention, by bits: e4m3 rounds queries and probabilities to 4 bits."""
WORKSPACE = 256 << 20
PATIENCE = 75.0  # seconds for a probe
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, KeyError, ImportError, OSError)
"""What a library that lacks a shape, a kernel or a symbol raises."""


@dataclass(frozen=True)
class Way:
    """One kernel over one layout of the cache: `layout` NHD has a token's heads together, HND a head's tokens."""

    name: str
    packages: tuple[str, ...]
    calls: Callable[..., Calls]
    dtype: str
    layout: str
    page: int = 0  # tokens; 0: the whole context

    @property
    def bits(self) -> int:
        return 8 if self.dtype.startswith("float8") else 16

    @property
    def setting(self) -> str:
        return f"{self.dtype}, {self.layout}" + (f", pages of {self.page}" if self.page else "")

    def package(self) -> str | None:
        return next((name for name in self.packages if importlib.util.find_spec(name)), None)

    def version(self) -> str:
        distribution = DISTRIBUTIONS[self.package() or self.packages[0]]
        return f"{distribution} {importlib.metadata.version(distribution)}"

    def cache(self, shape: Shape) -> tuple[int, ...]:
        """Shape of keys and of values in memory."""
        page = self.page or shape.n
        pages = shape.batch * shape.n // page
        rows = (page, shape.kv_heads) if self.layout == "NHD" else (shape.kv_heads, page)
        return (pages, *rows, shape.dim)

    def by_head(self, x, shape: Shape):
        """A cache's array as `[B, H, T, D]`."""
        if self.layout == "NHD":
            return x.reshape(shape.batch, shape.n, shape.kv_heads, shape.dim).swapaxes(1, 2)
        page = self.page or shape.n
        x = x.reshape(shape.batch, shape.n // page, shape.kv_heads, page, shape.dim).swapaxes(1, 2)
        return x.reshape(shape.batch, shape.kv_heads, shape.n, shape.dim)


def flashinfer_fa2(torch, way: Way, shape: Shape, q, sets) -> Calls:
    import flashinfer

    work = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, way.layout, use_tensor_cores=True, backend="fa2")
    pages = shape.n // way.page
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages
    indices = torch.arange(shape.batch * pages, dtype=torch.int32, device="cuda")
    last = torch.full((shape.batch,), way.page, dtype=torch.int32, device="cuda")
    heads = (shape.kv_heads * shape.gqa, shape.kv_heads, shape.dim)
    types = {"q_data_type": q.dtype, "kv_data_type": sets[0][0].dtype, "o_data_type": q.dtype}
    wrapper.plan(starts, indices, last, *heads, way.page, **types)
    return [functools.partial(wrapper.run, q, pair) for pair in sets]


def flashinfer_xqa(torch, way: Way, shape: Shape, q, sets) -> Calls:
    from flashinfer.decode import xqa_batch_decode_with_kv_cache as decode

    work = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
    pages = torch.arange(shape.batch * shape.n // way.page, dtype=torch.int32, device="cuda").view(shape.batch, -1)
    lengths = torch.full((shape.batch,), shape.n, dtype=torch.int32, device="cuda").view(torch.uint32)
    where = (work, pages, lengths, shape.n)
    return [
        functools.partial(decode, q, pair, *where, bmm1_scale=shape.dim**-0.5, kv_layout=way.layout) for pair in sets
    ]


def flash_attention_3(torch, way: Way, shape: Shape, q, sets) -> Calls:
    attend = importlib.import_module(way.package()).flash_attn_with_kvcache
    q = q.to(sets[0][0].dtype)[:, None]
    pairs = sets if way.layout == "NHD" else [tuple(x.swapaxes(1, 2) for x in pair) for pair in sets]
    return [functools.partial(attend, q, *pair, softmax_scale=shape.dim**-0.5) for pair in pairs]


DISTRIBUTIONS = {
    "flashinfer": "flashinfer-python",
    "flash_attn_interface": "flash-attn-3",
    "fa3_fwd_interface": "fa3-fwd",
}
FLASHINFER, *FLASH_ATTENTION_3 = DISTRIBUTIONS
WAYS = [
    Way(name + ("-fp8" if "8" in dtype else ""), (FLASHINFER,), calls, dtype, layout, page)
    for name, calls, pages in (
        ("flashinfer-fa2", flashinfer_fa2, (64,)),
        ("flashinfer-xqa", flashinfer_xqa, (64, 128)),
    )
    for dtype in ("float16", "float8_e4m3fn")
    for layout in ("HND", "NHD")
    for page in pages
] + [
    Way("flash-attn-3" + ("-fp8" if "8" in dtype else ""), tuple(FLASH_ATTENTION_3), flash_attention_3, dtype, layout)
    for dtype in ("bfloat16", "float8_e4m3fn")
    for layout in ("HND", "NHD")
]


def exact(torch, q, k, v, scale: float):
    """fp32 attention of queries `[B, H * G, D]` over `[B, H, T, D]`, a sequence at a time."""
    found = []
    for rows, keys, values in zip(q.float(), k, v):
        scores = rows.view(keys.shape[0], -1, rows.shape[-1]) @ keys.float().transpose(-1, -2) * scale
        found.append((torch.softmax(scores, -1) @ values.float()).view(rows.shape))
    return torch.stack(found)


def seconds(torch, way: Way, shape: Shape) -> float:
    """Seconds per call from a CUDA graph, in turn over sets that exceed the L2 cache; ValueError if it is wrong."""
    dtype = getattr(torch, way.dtype)
    size = shape.fp16_bytes * way.bits / 16
    sets = []
    for _ in range(shape.sets(size)):
        pair = (torch.randn(way.cache(shape), dtype=torch.float16, device="cuda") for _ in "kv")
        sets.append(tuple(x.to(dtype) for x in pair))
    query = torch.bfloat16 if way.dtype == "bfloat16" else torch.float16
    q = torch.randn(shape.batch, shape.kv_heads * shape.gqa, shape.dim, dtype=query, device="cuda")
    with torch.no_grad():
        calls = way.calls(torch, way, shape, q, sets)
        truth = exact(torch, q, *(way.by_head(x, shape) for x in sets[0]), shape.dim**-0.5)
        error = (torch.linalg.norm(calls[0]().view(truth.shape).float() - truth) / torch.linalg.norm(truth)).item()
        if not error <= ALLOWED[way.bits]:
            raise ValueError(f"wrong: relative error {error:.2g} to fp32 attention, {ALLOWED[way.bits]} allowed")
        del truth
        return graph.graph_seconds(torch, calls)


def fastest(torch, ways: list[Way], shape: Shape) -> dict[str, tuple[float, Way]]:
    """By name: seconds per call, and the way, of the fastest that serves the shape."""
    found: dict[str, tuple[float, Way]] = {}
    for way in ways:
        try:
            taken = seconds(torch, way, shape)
        except FAILURES as error:
            print(f"  {way.name} ({way.setting}) does not serve {shape.row()}: {said(error)}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        if way.name not in found or taken < found[way.name][0]:
            found[way.name] = taken, way
    return found


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- a process of its own


def probe(number: int) -> None:
    """Way `number` at a short, a batched and a long shape; an error ends the process."""
    import torch

    for batch, n in ((1, 1024), (8, 8192), (1, 131072)):
        shape = Shape(n, Affine(4), Affine(4), batch=batch)
        print(f"{1e6 * seconds(torch, WAYS[number], shape):.1f} us at {shape.batch} x {shape.n}", flush=True)


def usable(command: list[str]) -> list[Way]:
    """The installed ways that pass their probe; says in a line each what is not installed and what failed."""
    numbers = list(installed())
    with ThreadPoolExecutor(len(numbers) or 1) as pool:
        tried = list(pool.map(lambda n: attempt([*command, "--driver", f"rival {n}"]), numbers))
    for n, failure in zip(numbers, tried):
        if failure:
            print(f"  {WAYS[n].name} ({WAYS[n].setting}) is left out: {failure}", flush=True)
    return [WAYS[n] for n, failure in zip(numbers, tried) if not failure]


def installed() -> Iterator[int]:
    for packages in dict.fromkeys(way.packages for way in WAYS):
        numbers = [n for n, way in enumerate(WAYS) if way.packages == packages]
        if WAYS[numbers[0]].package():
            yield from numbers
        else:
            names = ", ".join(dict.fromkeys(WAYS[n].name for n in numbers))
            print(f"  {' or '.join(packages)} is not installed: no {names}", flush=True)


def attempt(command: list[str]) -> str:
    """What is wrong with a process: nothing, or the last lines of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer within {PATIENCE:g} s"
    last = " | ".join(done.stderr.strip().splitlines()[-3:])
    return f"status {done.returncode}: {last[-600:]}" if done.returncode else ""

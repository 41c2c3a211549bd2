"""Live a case: what is done to the cache is done to the plain model, and after every step both must say the same."""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from opentq.attention import channels, dispatch, pages
from opentq.caches import disk, sketches
from opentq.caches.batch import BatchOpenTQCache
from opentq.caches.latent import OpenTQLatentCache
from opentq.caches.single import OpenTQCache
from opentq.contracts.rotary import Rotary
from opentq.hosts import shim
from opentq.hosts.mlx_lm.host import HOST
from opentq.spec.kv import KVSpec

from ..oracle import args_of, held_arrays, judge
from . import lane as plain
from .case import Case
from .lane import Lane, Wrong

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
LANES = 5
WORK = 50_000
"""Numbers in the queries of an attention call."""


class Life:
    """A cache and the sequences that it must hold, under a choice of kernels: "" (any), "native" or "tiled"."""

    def __init__(self, case: Case, mode: str):
        shim.install(HOST)
        self.case, self.home = case, mode
        self.spec = KVSpec.parse(case.spec)
        if case.given and self.spec.pages:
            few = tuple(range(7, 7 + channels.count(case.dims[0])))
            self.spec = replace(self.spec, channels=(few,) * case.kv_heads)
        self.dtype = DTYPES[case.dtype]
        self.atol = 2e-5 * max(1.0, 6 * case.scale) ** 2
        self.served: Counter[str] = Counter()
        self.counter = 0
        self.cache = self._fresh()
        self.lanes = [self._lane()]
        self._use(mode)

    def run(self) -> None:
        """Do all that the case says. Raises whatever is wrong."""
        warm, sketches.WARM = sketches.WARM, 32  # channels are chosen early, so that short lives read pages
        try:
            for op in self.case.ops:
                getattr(self, op[0])(*op[1:])
                self.check_lengths()
            self.check()
        finally:
            sketches.WARM = warm

    @staticmethod
    def _use(mode: str) -> None:
        os.environ["OPENTQ_KERNELS"] = mode

    def _fresh(self) -> OpenTQCache:
        case = self.case
        cache = (OpenTQLatentCache if case.latent else OpenTQCache)(self.spec, window=case.window)
        cache.rotary = Rotary(case.dims[0] // 2) if self.spec.pages else cache.rotary
        return cache

    def _lane(self) -> Lane:
        key, value = self.case.dims
        return Lane.empty(self.case.kv_heads, (key + value, 0) if self.case.latent else (key, value))

    @property
    def batched(self) -> bool:
        return isinstance(self.cache, BatchOpenTQCache)

    def _extents(self) -> list[tuple[int, int, int, int]]:
        return list(self.cache.extents) if self.batched else [self.cache.extent]

    # ---- what is done

    def append(self, counts: list[int], chunk: int, attention: dict) -> None:
        """`counts` new tokens for each sequence, padded on the right, all at once or in chunks."""
        counts = [counts[i % len(counts)] for i in range(len(self.lanes))]
        width = max(counts, default=0)
        if not width:
            return
        if min(counts) < width:
            self.cache.prepare(lengths=counts, right_padding=[width - n for n in counts])
        for start in range(0, width, chunk or width):
            stop = min(start + (chunk or width), width)
            self._step([min(max(n - start, 0), stop - start) for n in counts], stop - start, attention)
            if attention.get("drop") and start == 0 and len(self.lanes) > 1:  # one goes while prompts are read
                self.filter(list(range(1, len(self.lanes))))
                counts = counts[1:]
        if self.batched:
            self.cache.finalize()

    def decode(self, steps: int, count: int, attention: dict) -> None:
        """Some steps of a few tokens, the same number for every sequence."""
        for _ in range(steps if self.lanes else 0):
            self._step([count] * len(self.lanes), count, attention)

    def trim(self, count: int) -> None:
        base = max((e[0] for e in self._extents()), default=0)
        if all(lane.may_trim(count, self.case.window, base) for lane in self.lanes):
            longest = max(map(len, self.lanes), default=0)
            dropped = self.cache.trim(count)
            if dropped != min(count, longest):
                raise Wrong(f"a trim of {count} of {longest} tokens says {dropped}")
            for one in self.lanes:
                one.trim(count, self.spec.sink)

    def store(self, way: str, to: str) -> None:
        """Save, and load on what may be another kind of machine; where kernels are forced, come back."""
        for mode in (to, self.home) if self.home else ("tiled" if to == "tiled" else "",):
            saved = self.cache
            if self.spec.channels and saved.sketches is None and way != "disk":
                way = "copy"  # before the first token a recipe's channels are in the object alone
            self._use(mode)
            self.cache = WAYS[way](saved, self._fresh)
        self.check_lengths()

    def fork(self, count: int) -> None:
        """A copy is a life of its own: whatever happens to one must not be seen in the other."""
        mine, lanes = self.cache, self.lanes
        self.cache, self.lanes = copy.deepcopy(mine), [one.copy() for one in lanes]
        self.decode(1, count, {"times": 1, "seed": count})
        self.check()
        self.cache, self.lanes = mine, lanes
        self.check()

    def merge(self, counts: list[int]) -> None:
        """New sequences beside those that there are, taken out one by one."""
        caches = [self.cache.extract(i) for i in range(len(self.lanes))] if self.batched else [self.cache]
        news = self._news(counts)
        self.lanes += [lane for _, lane in news]
        self.cache = type(self._fresh()).merge([*caches, *(cache for cache, _ in news)])

    def extend(self, counts: list[int]) -> None:
        """New sequences in a batch of their own, which joins this one."""
        if not self.batched:
            self.cache = type(self._fresh()).merge([self.cache])
        news = self._news(counts)
        if news:
            self.cache.extend(type(self.cache).merge([cache for cache, _ in news]))
            self.lanes += [lane for _, lane in news]

    def filter(self, keep: list[int]) -> None:
        if self.batched:
            keep = [i % len(self.lanes) for i in keep] if self.lanes else []
            self.cache.filter(keep)
            self.lanes = [self.lanes[i].copy() for i in keep]

    def take(self, which: list[int]) -> None:
        """One sequence goes on alone."""
        if self.batched and self.lanes and which:
            i = which[0] % len(self.lanes)
            self.cache, self.lanes = self.cache.extract(i), [self.lanes[i]]

    def _news(self, counts: list[int]) -> list[tuple[OpenTQCache, Lane]]:
        news, mine = [], (self.cache, self.lanes)
        for count in counts[: max(LANES - len(self.lanes), 0)]:
            self.cache, self.lanes = self._fresh(), [self._lane()]
            self.append([count], 0, {"times": 1, "seed": count})
            news.append((self.cache, self.lanes[0]))
        self.cache, self.lanes = mine
        return news

    # ---- one step, and what must be true of it

    def _vectors(self, batch: int, length: int) -> list[mx.array]:
        """Keys and values with a bias and channels that stand out, as real ones have; now and then a token of zeros."""
        case, out = self.case, []
        self.counter += 1
        for side, dim in enumerate(case.dims):
            rng = np.random.default_rng([case.seed, self.counter, side])
            x = rng.standard_normal((batch, case.kv_heads, length, dim), dtype=np.float32)
            x[..., 3] *= 6
            x[..., 5] += 2
            x[:, :, rng.random(length) < 0.02] = 0
            out.append(mx.array(x * case.scale).astype(self.dtype))
        return out

    def _step(self, counts: list[int], length: int, attention: dict) -> None:
        """Append `length` tokens, `counts` of which are real, and attend to them as often as the case says."""
        case, cache = self.case, self.cache
        keys, values = self._vectors(len(counts), length)
        extents, center = self._extents(), cache.center
        masks = [cache.make_mask(length)]
        if attention.get("array") and self.home != "native" and max(counts) == min(counts):
            masks.append(cache.make_mask(length, return_array=True))
        cache.lends = bool(attention.get("lend"))
        handles = cache.update_and_fetch(keys, values)
        if cache.lends:
            handles = cache.keys_and_values()
        given = (mx.concatenate([keys, values], axis=-1), values[..., :0]) if case.latent else (keys, values)
        rows = [np.array(x.astype(mx.float32)) for x in given]
        for i, (one, n) in enumerate(zip(self.lanes, counts)):
            one.append(*(x[i, :, :n] for x in rows), self.spec.sink, self.spec.recent)
        for turn in range(attention["times"]):
            self._attend(handles, length, masks[turn % len(masks)], {**attention, "seed": attention["seed"] + turn})
        if attention["seed"] % 4 == 0:
            self._check_step(handles[0].step, extents, center, counts, length)

    def _attend(self, handles, length: int, mask, attention: dict) -> None:
        """Attend as a model does, and let the reference judge over the values that the step's tokens decode to."""
        case, step = self.case, handles[0].step
        rng = np.random.default_rng(attention["seed"])
        heads, width = case.kv_heads * case.gqa, sum(case.dims) if case.latent else case.dims[0]
        if not self.spec.pages:  # which need all queries once
            length = min(length, max(8, WORK // (heads * width)))  # the newest rows, where all would take long
        if isinstance(mask, mx.array):
            mask = mask[..., -length:, :]
        shape = len(self.lanes), heads, length, width
        q = mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(self.dtype)
        more: dict = {"scale": width**-0.5}
        if attention.get("sinks") and not self.spec.center:
            more["sinks"] = mx.array(rng.standard_normal(heads), mx.float32)
        if attention.get("softcap") and not self.spec.center:
            more["softcap"] = 5.0
        out = step.attend(q, mask=mask, **more)
        native = step.stats.served_by != "tiled"
        self.served[step.stats.served_by] += 1
        if self.home and native != (self.home == "native"):
            raise Wrong(f"{step.stats.served_by} served under {self.home}")
        args = args_of(handles, q, causal=mask is not None, window=step.window, **more)
        asked = replace(args, q=q, mask=mask if isinstance(mask, mx.array) else None)
        if (selector := step._selector(asked)) is not None:
            args.pages = dispatch.choose(selector, asked, args.q)
        fp16 = mx.float16 if native and self.dtype == mx.float32 else None
        judge(args, out, atol=self.atol, dtype=fp16, model=True)
        singly = step.sketches is None and step.k.layout.block == step.v.layout.block == 1
        if attention.get("rows") and length == 1 and len(self.lanes) == 1 and singly:
            self._attend_rows(step, args, q, rng)

    @staticmethod
    def _attend_rows(step, args, q, rng) -> None:
        """Attention to chosen tokens, which is what a mask of them would give."""
        packed, sink, tail = args.lens[0]
        held = packed + sink + args.dense_k.shape[2] - tail
        chosen = rng.permutation(held)[: rng.integers(1, held + 1)].astype(np.int32)
        seen = mx.array(np.isin(np.arange(held), chosen))[None, None, None]
        out = step.attend_rows(q, mx.array(np.append(chosen, -1))[None], scale=args.scale, sinks=args.sinks)
        judge(replace(args, mask=seen, causal=False, window=0, softcap=0.0), out, model=True)

    # ---- what a cache holds

    def check_lengths(self) -> None:
        extents = self._extents()
        if len(extents) != len(self.lanes):
            raise Wrong(f"{len(extents)} sequences, not {len(self.lanes)}")
        for one, extent in zip(self.lanes, extents):
            plain.lengths(one, extent, self.spec.sink, self.case.window)
        offsets = self.cache.offset.tolist() if self.batched else [self.cache.offset]
        if offsets != [len(one) for one in self.lanes] or self.cache.size() != max(
            (sum(e[1:]) for e in extents), default=0
        ):
            raise Wrong(f"positions {offsets}, size {self.cache.size()}, of {[len(one) for one in self.lanes]} tokens")

    def check(self) -> None:
        """Lengths, bytes, and every token of every sequence."""
        self.check_lengths()
        reported = self.cache.nbytes  # asked first: a step's last tokens then join the columns
        held = sum(a.nbytes for a in held_arrays(self.cache).values())
        waiting = getattr(self.cache.sketches, "_keys", None)  # of a step that was not attended
        held -= 0 if waiting is None else waiting.nbytes
        if reported != held:
            raise Wrong(f"{reported} bytes are reported, {held} are held")
        for i, one in enumerate(self.lanes):
            cache = self.cache.extract(i) if self.batched else self.cache
            if not len(one):
                continue
            keys, values = (
                codec.decode(packed, mx.float32, dim) if packed else columns[:, :, :0]
                for codec, packed, dim, columns in zip(
                    (cache.k_codec, cache.v_codec), cache.canonical(), cache.dims, (cache.dense_k, cache.dense_v)
                )
            )
            sink = cache.extent.sink
            whole = [
                mx.concatenate(
                    [d[:, :, :sink].astype(mx.float32), y.astype(mx.float32), d[:, :, sink:].astype(mx.float32)], 2
                )
                for y, d in ((keys, cache.dense_k), (values, cache.dense_v))
            ]
            codecs = cache.k_codec, cache.v_codec
            plain.contents(one, codecs, (whole[0], whole[1]), cache.extent[:3], cache.center)
            if cache.sketches is not None:
                self._check_sketches(cache, keys)

    def _check_sketches(self, cache: OpenTQCache, keys: mx.array) -> None:
        """Sketches are of the packed keys, of all whole pages once the channels are chosen."""
        made = cache.sketches
        count = made.sketched[0]
        if count > cache.n_packed // pages.PAGE or made.budget != cache.spec.pages:
            raise Wrong(f"{count} pages of {cache.n_packed} tokens are sketched")
        if (
            self.spec.channels
            and made.channels is not None
            and made.channels[0].tolist() != [*map(list, self.spec.channels)]
        ):
            raise Wrong(f"pages are sketched by channels {made.channels[0].tolist()}, not those of the recipe")
        if count:
            want = pages.encode(cache.k_codec.unrotate(keys[:, :, : count * pages.PAGE]), made.channels)
            other = (made.buffer.arrays[0][:, :, :count] != want).astype(mx.float32).mean().item()
            if other > 0.02:  # a product over other tokens rounds some values to the next code
                raise Wrong(f"{other:.0%} of the sketches are not those of the packed keys")

    def _check_step(self, step, extents, center, counts: list[int], length: int) -> None:
        """A step sees the tokens that were there before it, and its own."""
        columns = step.dense_k.shape[2]
        for i, (one, extent, n) in enumerate(zip(self.lanes, extents, counts)):
            base, sink, packed, tail = extent
            lane = one.copy()
            if step.lens[i] != (packed, sink, columns - length - tail):
                raise Wrong(f"a step sees {step.lens[i]} of {extent}")
            sides = []
            for side, dense in ((step.k, step.dense_k), (step.v, step.dense_v)):
                middle = side.decode(0, packed, mx.float32)[i : i + 1] if packed else dense[i : i + 1, :, :0]
                parts = dense[i : i + 1, :, :sink], middle, dense[i : i + 1, :, columns - length - tail :]
                whole = mx.concatenate([p.astype(mx.float32) for p in parts], axis=2)
                sides.append(whole[:, :, : whole.shape[2] - length + n])
            shift = None if center is None else center[i : i + 1]
            plain.contents(lane, (step.k.codec, step.v.codec), (sides[0], sides[1]), (base, sink, packed), shift)


def _through_file(cache: OpenTQCache, fresh: Callable[[], OpenTQCache]) -> OpenTQCache:
    with tempfile.TemporaryDirectory() as folder:
        save_prompt_cache(f"{folder}/c.safetensors", [cache])
        found = load_prompt_cache(f"{folder}/c.safetensors")[0]
        mx.eval(found.state)  # files are read when their arrays are needed
    return found


def _through_disk(cache: OpenTQCache, fresh: Callable[[], OpenTQCache]) -> OpenTQCache:
    single = not isinstance(cache, BatchOpenTQCache)
    into = fresh() if single else type(cache).merge([fresh()])
    with tempfile.TemporaryDirectory() as folder:
        disk.save(Path(folder) / "c", [cache], [])
        return disk.load(Path(folder) / "c", into=[into]).caches[0]


WAYS: dict[str, Callable[[OpenTQCache, Callable[[], OpenTQCache]], OpenTQCache]] = {
    "state": lambda cache, fresh: type(cache).from_state(cache.state),
    "copy": lambda cache, fresh: copy.deepcopy(cache),
    "file": _through_file,
    "disk": _through_disk,
}
"""The ways that a cache can go."""

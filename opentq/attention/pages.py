"""Pages: which blocks of 64 packed tokens a step reads, chosen by sketches of all of them.

A token's sketch is a few channels of its key, as it is after RoPE and before the codec's rotation (`channels.py` says
which), in 4 bits with one scale per channel and page. Of the other channels a page has its mean key. The products of
both with a query are scores, and a page's weight is its largest one, or on GPUs the log of the sum of their
exponentials. Sketches leave out what a few heads look for, so they name `CANDIDATES` times as many pages as are read,
and the packed keys of these choose: there a page's weight is the log of the sum of the exponentials of its scores. Both
times the pages with the largest shares of the softmax of the weights, summed over the query heads (and rows) that share
the page, are taken, and always the newest. So a step reads a few bytes of every token, and the keys and values of a
number of tokens that does not grow.

One page of sketches, uint8 `[B, Hkv, pages, C * 34 + D + 2]`:

    C channels of 32 bytes: byte j holds the codes of tokens j (low bits) and j + 32 | C scales, float16
    | mean key, D signed bytes, 0 in the C channels | its scale, float16

and a code stands for `(code - 7.5) * scale`. The layout is the same on every machine and on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from ..contracts.attention import AttnArgs, lens_array
from ..contracts.layout import FLUSH
from . import tiled
from .channels import count

PAGE = FLUSH
"""Tokens of a page: the block that leaves the fp16 tail."""

ROWS = 8
"""Calls with more query rows than this read everything: prefill is exact."""

CANDIDATES = 4
"""How many times the budget sketches name, so that keys choose among them."""

WHOLE = 2
"""Up to so many times the budget everything is read: the keys of all and the values of some are no fewer bytes."""

LEVELS = 7.5
TILE = 4096
"""Pages whose scores exist at one time."""


def row_bytes(channels: int, dim: int) -> int:
    """Bytes of one page of sketches of one KV head."""
    return channels * (PAGE // 2 + 2) + dim + 2


def bytes_per_token(dim: int) -> float:
    """Bytes that sketches of keys of `dim` channels add to every packed token of one KV head."""
    return row_bytes(count(dim), dim) / PAGE


def encode(keys: mx.array, channels: mx.array) -> mx.array:
    """Sketches of whole pages: keys `[B, H, n * 64, D]`, int32 `[B, H, C]` -> uint8 `[B, H, n, C * 34 + D + 2]`."""
    batch, heads, tokens, dim = keys.shape
    number, half = channels.shape[2], PAGE // 2
    keys = keys.astype(mx.float32)
    few = mx.take_along_axis(keys, mx.broadcast_to(channels[:, :, None], (batch, heads, tokens, number)), axis=-1)
    x = few.reshape(batch, heads, tokens // PAGE, PAGE, number).swapaxes(-1, -2)
    scale, step = _scale(mx.abs(x).max(-1, keepdims=True) / LEVELS)
    codes = mx.clip(mx.floor(x / step + (LEVELS + 0.5)), 0, 15).astype(mx.uint8)
    packed = (codes[..., :half] | (codes[..., half:] << 4)).reshape(batch, heads, -1, number * half)
    known = (mx.arange(dim) == channels[..., None]).any(axis=2)
    mean = mx.where(known[:, :, None], 0, keys.reshape(batch, heads, tokens // PAGE, PAGE, dim).mean(3))
    width, unit = _scale(mx.abs(mean).max(-1, keepdims=True) / 127)
    rest = mx.round(mean / unit).astype(mx.int8).view(mx.uint8)
    return mx.concatenate([packed, scale.squeeze(-1).view(mx.uint8), rest, width.view(mx.uint8)], axis=-1)


def _scale(x: mx.array) -> tuple[mx.array, mx.array]:
    """A scale as it is kept, float16, and as what numbers are divided by."""
    kept = x.astype(mx.float16)
    return kept, mx.where(kept == 0, 1.0, kept.astype(mx.float32))


def decode(pages: mx.array, channels: int) -> tuple[mx.array, mx.array]:
    """uint8 `[B, H, n, C * 34 + D + 2]` -> float32 channels `[B, H, n, C, 64]` and mean keys `[B, H, n, D]`."""
    half = PAGE // 2
    parts = mx.split(pages, [channels * half, channels * (half + 2), pages.shape[-1] - 2], axis=-1)
    codes = parts[0].reshape(*pages.shape[:3], channels, half)
    scale, width = (mx.contiguous(p).view(mx.float16).astype(mx.float32) for p in parts[1::2])
    both = mx.concatenate([codes & 15, codes >> 4], axis=-1).astype(mx.float32)
    mean = mx.contiguous(parts[2]).view(mx.int8).astype(mx.float32) * width
    return (both - LEVELS) * scale[..., None], mean


@dataclass(frozen=True)
class Selector:
    """What a step needs to choose pages.

    Attributes:
        sketches: uint8 `[B, Hkv, pages (over-allocated), C * 34 + D + 2]`.
        channels: int32 `[B, Hkv, C]`.
        budget: packed tokens to read, a multiple of 64.
        sums: whether a page's weight is the logarithm of the sum of its scores' exponentials, not its largest score;
            a back end says which (`contracts.backend.Backend.sums`), and both name the same pages but for a few.
    """

    sketches: mx.array
    channels: mx.array
    budget: int
    sums: bool = False

    def queries(self, q: mx.array, scale: float) -> mx.array:
        """Queries `[B, Hq, L, D]`, scaled: their chosen channels, then all, float32 `[B, Hkv, G * L, C + D]`."""
        batch, heads, count = self.channels.shape
        rows = q.astype(mx.float32).reshape(batch, heads, -1, q.shape[-1]) * scale
        index = mx.broadcast_to(self.channels[:, :, None], (*rows.shape[:3], count))
        return mx.concatenate([mx.take_along_axis(rows, index, axis=-1), rows], axis=-1)

    def weights(self, rows: mx.array, pages: int) -> mx.array:
        """Every page's weight, float32 `[B, Hkv, G * L, pages]`."""
        parts, channels = [], self.channels.shape[2]
        few, whole = rows[..., :channels], rows[..., channels:]
        for start in range(0, pages, TILE):
            keys, mean = decode(self.sketches[:, :, start : min(start + TILE, pages)], channels)
            scores = few[:, :, None] @ keys  # [B, H, pages, rows, PAGE]
            scores = mx.logsumexp(scores, axis=-1) if self.sums else scores.max(-1)
            parts.append(scores.swapaxes(-1, -2) + whole @ mean.swapaxes(-1, -2))
            if pages > TILE:
                mx.eval(parts[-1])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def choose(self, rows: mx.array, packed: tuple[int, ...], count: int) -> mx.array:
        """The `count` pages of most weight for scaled `queries`: int32 `[B, Hkv, count]`, ascending.

        `packed` tokens are held of each sequence. Where a sequence has fewer pages than are asked for, all of them come
        first and what follows is to be left alone.
        """
        return top(self.weights(rows, max(packed) // PAGE), packed, count)


def weigh(args: AttnArgs) -> mx.array:
    """Log of the sum of exponentials of the scores that the keys of pages have, float32 `[B, Hkv, G * L, P]`.

    The pages are those of `args.pages`, or all. What stands for pages that a sequence does not have counts for nothing.
    """
    args = args.picked()
    lens = lens_array(args.lens)[:, 0].reshape(-1, 1, 1, 1)
    rows = args.q.astype(mx.float32).reshape(args.q.shape[0], args.kv_heads, -1, args.q.shape[3]) * args.scale
    pages, parts = -(-args.max_packed // PAGE), []
    step = max(1, tiled.tile_tokens(args, args.q.shape[2]) // PAGE)
    for start in range(0, pages, step):
        stop = min(start + step, pages)
        first, last = start * PAGE, min(stop * PAGE, args.max_packed)
        scores = rows @ args.k.decode(first, last, mx.float32).swapaxes(-1, -2)
        if args.softcap:
            scores = mx.tanh(scores / args.softcap) * args.softcap
        scores = mx.where(mx.arange(first, last) < lens, scores, -mx.inf)
        scores = mx.pad(scores, [(0, 0)] * 3 + [(0, stop * PAGE - last)], constant_values=-mx.inf)
        parts.append(mx.logsumexp(scores.reshape(*rows.shape[:3], -1, PAGE), axis=-1))
        if step < pages:
            mx.eval(parts[-1])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def top(weights: mx.array, packed: tuple[int, ...], count: int) -> mx.array:
    """The `count` pages of most weight from log weights of whole pages `[B, H, rows, pages]`, the newest among them."""
    pages = -(-max(packed) // PAGE)
    index = mx.arange(pages).reshape(1, 1, -1)
    whole = mx.array([n // PAGE for n in packed]).reshape(-1, 1, 1)
    newest = mx.array([-(-n // PAGE) - 1 for n in packed]).reshape(-1, 1, 1)
    if weights.shape[-1] < pages:  # the newest page may be a part of one, without a sketch
        weights = mx.pad(weights, [(0, 0)] * 3 + [(0, pages - weights.shape[-1])])
    weights = mx.where((index < whole)[:, :, None], weights, -mx.inf)
    share = mx.softmax(weights, axis=-1, precise=True).sum(axis=2)
    # Pages that are not there come last, the newest first.
    share = mx.where(index > newest, -1.0, mx.where(index == newest, mx.inf, share))
    chosen = mx.argpartition(-share, count - 1, axis=-1)[..., :count]
    return mx.sort(chosen.astype(mx.int32), axis=-1)


Stages = tuple[Callable[..., mx.array], Callable[[AttnArgs], mx.array], Callable[..., mx.array]]
"""What does as `Selector.choose`, `weigh` and `top` do."""


def select(
    selector: Selector, args: AttnArgs, plain: mx.array, many: int, count: int, stages: Stages | None = None
) -> mx.array:
    """The `count` pages that `args` is to read, int32 `[B, Hkv, count]`: `plain` are its queries, not rotated.

    Of more pages than `many`, sketches name so many; of these the ones with the most weight by their keys are read.
    """
    by_sketches, by_keys, heaviest = stages or (selector.choose, weigh, top)
    packed = tuple(n for n, _, _ in args.lens)
    listed = None
    if max(packed) > many * PAGE:
        listed = by_sketches(selector.queries(plain, args.scale), packed, many)
    args = replace(args, pages=listed)
    index = heaviest(by_keys(args), tuple(n for n, _, _ in args.picked_lens), count)
    return index if listed is None else mx.take_along_axis(listed, index, axis=-1)

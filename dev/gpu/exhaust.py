"""A full card: what does not fit must be an error that says so, and nothing read or written where it should not be.

Another owner (torch) holds the card but for a little. Caches grow, chunks are prefilled and tokens decoded until an
allocation fails; then everything is dropped, and a call must be as right as ever.
"""

from __future__ import annotations

import random

import mlx.core as mx

from opentq.caches.single import OpenTQCache

from . import conform

ROOM = 3 << 30
"""Bytes left for MLX."""
CHUNK = 2048


def run(rounds: int = 3) -> None:
    """Print a line per failure; raise where none came, it was another error, or a call is wrong after it."""
    import torch

    variant = conform.variants(quick=True)[0]
    data, rng = conform.Data(variant, 1), random.Random(1)
    judge(variant, data, rng)
    mx.clear_cache()
    free, _ = torch.cuda.mem_get_info()
    held = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range((free - ROOM) >> 30)]
    print(f"{len(held)} GiB held, {torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB left", flush=True)
    for spec in ("int4", "tq5/tq3:nc", "int4:center")[:rounds]:
        said = grow(spec)
        mx.clear_cache()
        print(f"  {spec}: {said}", flush=True)
        judge(variant, data, rng)
    torch.cuda.synchronize()


def grow(spec: str) -> str:
    """A cache that grows chunk by chunk and token by token until an error; what the error says."""
    cache, tokens = OpenTQCache(spec), 0
    try:
        while True:
            for length in (CHUNK, 1, 1):
                k, v, q = (mx.random.normal((16, heads, length, 128)).astype(mx.float16) for heads in (8, 8, 16))
                keys, _ = cache.update_and_fetch(k, v)
                out = keys.step.attend(q, scale=128**-0.5, mask="causal" if length > 1 else None)
                mx.eval(out, cache.state)
                if not mx.isfinite(out).all().item():
                    raise AssertionError(f"not finite after {tokens} tokens")
                tokens += length
            if tokens > 1 << 20:
                raise AssertionError("nothing failed")
    except (RuntimeError, MemoryError) as error:
        if not any(word in str(error).lower() for word in ("allocate", "memory")) or "illegal" in str(error):
            raise
        return f"after {tokens} tokens: {str(error).splitlines()[0][:160]}"


def judge(variant: conform.Variant, data: conform.Data, rng: random.Random) -> None:
    """A decode call, held to the rule."""
    args = conform.situation(variant, data, rng)
    out = conform.fused_cuda.attend(args)
    assert out is not None
    worst, allowed = conform.margin(args, out)
    mx.eval(worst, allowed)
    if not worst.item() <= allowed.item():
        raise AssertionError(f"wrong after an error: {worst.item():.2e} above {allowed.item():.2e}")

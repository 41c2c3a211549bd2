"""Caches of latents (MLA): one packed vector per token serves as key and value, alone and in batches."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest

from opentq.attention import reference
from opentq.caches.latent import LatentCodec, OpenTQLatentCache
from opentq.caches.single import OpenTQCache
from opentq.hosts.plan import LayerPlan
from opentq.spec.kv import KVSpec
from opentq.spec.latent import latent_spec

from .matrix import Shape
from .oracle import args_of, fill, judge, queries, same_state, vectors

LATENT, ROTARY = 128, 32
DATA = Shape(kv_heads=1, q_heads=8, key_dim=LATENT, value_dim=ROTARY)
QUERY = Shape(kv_heads=1, q_heads=8, key_dim=LATENT + ROTARY)
SPECS = ["int4", "int8:sink=4", "int3:g64:recent=33", "f16"]


def filled(spec: str, tokens: int, chunks: list[int], seed: int = 0) -> OpenTQLatentCache:
    cache = OpenTQLatentCache(spec)
    if tokens:
        fill(cache, *vectors(DATA, tokens, seed), chunks)
    return cache


@pytest.mark.parametrize("spec", SPECS)
def test_chunks_trims_and_copies(spec):
    whole = filled(spec, 300, [300])
    assert same_state(whole, filled(spec, 300, [1, 63, 65, 2, 169]))
    k, v = vectors(DATA, 300)
    for dropped in (3, 64, 100, 300):
        cache = copy.deepcopy(whole)
        cache.trim(dropped)
        fill(cache, k[:, :, 300 - dropped :], v[:, :, 300 - dropped :], [17])
        assert same_state(cache, whole), dropped
    assert same_state(OpenTQLatentCache.from_state(whole.state), whole)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1, 40])
def test_attention_is_that_of_keys_and_values(spec, length):
    k, v = vectors(DATA, 300 + length)
    cache = filled(spec, 300, [300])
    handles = cache.update_and_fetch(k[:, :, 300:], v[:, :, 300:])
    args = args_of(handles, queries(QUERY, length, dtype=mx.float16), causal=length > 1)
    judge(args)
    # With nothing quantised, the cache holds the latents themselves.
    if spec == "f16":
        whole = mx.concatenate([k, v], axis=-1).astype(mx.float16).astype(mx.float32)
        q = args.q.astype(mx.float32)
        mask = "causal" if length > 1 else None
        want = mx.fast.scaled_dot_product_attention(q, whole, whole[..., :LATENT], scale=args.scale, mask=mask)
        assert mx.allclose(reference.attend(args), want, atol=1e-4).item()


def test_the_latent_is_stored_once():
    cache = filled("int4", 4096, [4096])
    codec = LatentCodec(KVSpec.parse("int4").codecs()[0], LATENT)
    rate = codec.bits_per_value(LATENT + ROTARY) / 16
    assert rate == 5 / 16
    assert cache.nbytes <= 4096 * (LATENT + ROTARY) * 2 * rate * 1.04


@pytest.mark.parametrize("spec", SPECS)
def test_batches_are_their_sequences(spec):
    lengths = [1, 200, 0, 64]
    batch = OpenTQLatentCache.merge([filled(spec, n, [n], seed) for seed, n in enumerate(lengths)])
    truth = [filled(spec, n, [n], seed) for seed, n in enumerate(lengths)]
    data = [vectors(DATA, 70, 9 + i) for i in range(4)]
    batch.prepare(lengths=[70, 1, 3, 64], right_padding=[0, 69, 67, 6])
    batch.update_and_fetch(*(mx.concatenate(side) for side in zip(*data)))
    batch.finalize()
    for alone, (k, v), n in zip(truth, data, [70, 1, 3, 64]):
        alone.update_and_fetch(k[:, :, :n], v[:, :, :n])
    batch.filter([3, 1, 0])
    for i, alone in enumerate(truth[j] for j in (3, 1, 0)):
        assert type(batch.extract(i)) is OpenTQLatentCache and same_state(batch.extract(i), alone)


def test_latents_and_plain_caches_do_not_mix():
    with pytest.raises(ValueError, match="can't share a batch"):
        OpenTQLatentCache.merge([OpenTQLatentCache("int4"), OpenTQCache("int4")])


@pytest.mark.parametrize(("spec", "one"), [("k8v4", "int8"), ("k4v8", "int8"), ("int4", "int4"), ("tq3p/int4", "int4")])
def test_one_codec_serves_both(spec, one):
    assert str(latent_spec(KVSpec.parse(spec))) == one


@pytest.mark.parametrize("spec", ["int4", "tq5:nc", "int8", "f16"])
def test_a_small_rotary_part_stays_in_fp16(spec):
    """Eight rotary channels can't be cut into groups; the latent is packed all the same, and the plan says so."""
    small = Shape(kv_heads=1, q_heads=4, key_dim=LATENT, value_dim=8)
    cache = OpenTQLatentCache(spec)
    handles = fill(cache, *vectors(small, 200), [199, 1])
    q = queries(Shape(kv_heads=1, q_heads=4, key_dim=LATENT + 8), 1, dtype=mx.float16)
    judge(args_of(handles, q))
    packed, _ = cache.canonical()
    codec = KVSpec.parse(spec).codecs()[0]
    assert packed[-1].dtype == mx.float16 and packed[-1].shape[-1] == 8
    plan = LayerPlan(0, "KVCache", KVSpec.parse(spec), kv_heads=1, key_dim=LATENT, value_dim=8, latent=True)
    assert plan.bytes_per_token() == (codec.bits_per_value(LATENT) * LATENT + 8 * 16) / 8
    assert ("rotary part f16" in plan.codec) == (spec != "f16")
    assert sum(a.nbytes for a in packed) == cache.n_packed * plan.bytes_per_token()

"""Prompt caches on disk: they continue bit for bit, and a file that is not whole, not ours or not for us is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from typer.testing import CliRunner

from opentq.caches import disk
from opentq.caches.single import OpenTQCache
from opentq.caches.states import State
from opentq.cli.cache import JOIN, app, resume
from opentq.contracts.layout import CANONICAL
from opentq.hosts import shim
from opentq.hosts.generation import Request
from opentq.hosts.hooks import compress
from opentq.hosts.mlx_lm.generate import encode_prompt, run
from opentq.hosts.mlx_lm.host import HOST
from opentq.hosts.mlx_lm.load import load

from .architectures import build
from .conftest import random_llama
from .matrix import Shape
from .oracle import fill, same_state, vectors

SMALL = Shape()
SPECS = ["int4", "int3:g64:sink=5:recent=33", "k8v4", "f16"]
REFUSED = r"cut off|damaged|not a prompt cache"
TOKENS = [(7 * i + i * i) % 97 + 1 for i in range(150)]


def cached(spec: str, tokens: int = 210, window: int = 0) -> OpenTQCache:
    cache = OpenTQCache(spec, window=window)
    if tokens:
        fill(cache, *vectors(SMALL, tokens), [tokens])
    return cache


@pytest.fixture
def file(tmp_path):
    """A small cache file of two layers."""
    path = tmp_path / "c.safetensors"
    disk.save(path, [cached("int4"), cached("int4", 80)], TOKENS, model="m", revision="r", template="t", spec="int4")
    return path


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("window", [0, 100])
def test_saved_caches_continue(spec, window, tmp_path):
    k, v = vectors(SMALL, 300)
    caches = [cached(spec, window=window), cached(spec, 3), cached(spec, 0)]
    disk.save(tmp_path / "c", caches, TOKENS)
    loaded = disk.load(tmp_path / "c").caches
    assert loaded[2].empty()
    for mine, theirs in zip(caches[:2], loaded):
        assert same_state(mine, theirs) and mine.offset == theirs.offset
        for c in (mine, theirs):
            fill(c, k[:, :, 210:], v[:, :, 210:], [31])
        assert same_state(mine, theirs)


def test_the_file_is_canonical_and_no_larger_than_its_bytes(file):
    """Packed bytes on disk are the canonical ones, whatever layout this machine computes in."""
    arrays, metadata = mx.load(str(file), return_metadata=True)
    keys, values = cached("int4").canonical()
    for name, part in (("packed_k", keys), ("packed_v", values)):
        place = f"0.{State._fields.index(name)}"
        assert all(mx.array_equal(arrays[f"{place}.{i}"], a).item() for i, a in enumerate(part))
    assert file.stat().st_size <= sum(a.nbytes for a in arrays.values()) + 20_000
    assert json.loads(metadata["manifest"])["tokens"] == TOKENS


def test_every_layout_reads_it(file, monkeypatch):
    """A file written with fused kernels opens where there are none, and the other way round."""
    shim.install(HOST)
    native = disk.load(file).caches
    monkeypatch.setenv("OPENTQ_KERNELS", "tiled")
    portable = disk.load(file).caches
    assert portable[0].k_layout is CANONICAL
    assert all(same_state(a, b) for a, b in zip(native, portable))


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "falcon_h1", "gpt_oss"])
def test_models_with_other_caches_continue(name, tmp_path):
    """Recurrent states, windows and lists of caches travel in the same file."""
    model = build(name)
    compress(model, "int4")
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS[:100]]), cache=caches)
    disk.save(tmp_path / "c", caches, TOKENS[:100])
    loaded = disk.load(tmp_path / "c", into=make_prompt_cache(model))
    a, b = (model(mx.array([TOKENS[100:120]]), cache=c) for c in (caches, loaded.caches))
    assert mx.array_equal(a, b).item()


@pytest.mark.parametrize("leaf", [True, False, 0, -5, 2**40, "", "é", None], ids=repr)
def test_every_leaf_of_a_state_comes_back(leaf):
    array, kind = disk._to_array(leaf)
    back = disk._from_array(array, kind)
    assert isinstance(array, mx.array) and back == leaf and type(back) is type(leaf)
    array = mx.arange(3)
    assert disk._to_array(array) == (array, "") and disk._from_array(array, "") is array
    with pytest.raises(disk.CacheFileError, match="holds a float"):
        disk._to_array(0.5)


def test_what_a_file_says_of_itself(file):
    manifest, size = disk.read_manifest(file)
    assert (manifest.model, manifest.revision, manifest.template, manifest.spec) == ("m", "r", "t", "int4")
    assert manifest.tokens == tuple(TOKENS) and manifest.classes == ("OpenTQCache",) * 2 and manifest.prompt == {}
    assert size == sum(a.nbytes for a in mx.load(str(file), format="safetensors").values())
    assert [len(hold) for hold in (disk.template_hash(Template("x")), disk.template_hash(Template(None)))] == [64, 0]
    assert disk.template_hash(Template("x")) != disk.template_hash(Template("y"))


class Template:
    def __init__(self, text):
        self.chat_template = text


def test_caches_of_other_hosts_need_their_own_to_be_read_into(tmp_path, monkeypatch):
    monkeypatch.delitem(disk.CLASSES, "KVCache", raising=False)
    cache = KVCache()
    cache.update_and_fetch(*(mx.random.normal((1, 1, 5, 8)) for _ in range(2)))
    disk.save(tmp_path / "c", [cache], [1, 2, 3, 4, 5])
    with pytest.raises(disk.CacheFileError, match="holds a KVCache, which needs its model's own caches"):
        disk.load(tmp_path / "c")
    (back,) = disk.load(tmp_path / "c", into=[KVCache()]).caches
    assert back.offset == 5 and mx.array_equal(back.state[0], cache.state[0]).item()


@pytest.mark.parametrize("chunk", [1, 100, 4096])
def test_the_checksum_is_of_every_byte_whatever_is_read_at_once(file, chunk, monkeypatch):
    if chunk == 1:
        small = file.with_name("small")
        disk.save(small, [cached("int4", 0)], [])
        file = small
    monkeypatch.setattr(disk, "CHUNK", chunk)
    whole = file.read_bytes()
    at = whole.index(b'"checksum":"') + 12
    blank = whole[:at] + b"0" * 64 + whole[at + 64 :]
    assert whole[at : at + 64].decode() == hashlib.sha256(blank).hexdigest()
    assert disk.load(file).manifest.classes[0] == "OpenTQCache"
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    with pytest.raises(disk.CacheFileError, match=REFUSED):
        disk.load(file)


def test_every_cut_is_refused(file, tmp_path):
    whole = file.read_bytes()
    cut = tmp_path / "cut"
    ends = {0, 1, 7, 8, 9, 100, len(whole) - 1, *range(0, len(whole), 4096), *range(len(whole) - 200, len(whole), 7)}
    for end in sorted(ends):
        cut.write_bytes(whole[:end])
        with pytest.raises(disk.CacheFileError, match=REFUSED):
            disk.load(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(disk.CacheFileError, match="damaged"):
        disk.load(cut)


def test_every_flipped_bit_is_refused(file, tmp_path):
    whole = file.read_bytes()
    rng = random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    places = {*range(64), *(8 * (8 + rng.randrange(header)) + rng.randrange(8) for _ in range(300))}
    places |= {rng.randrange(8 * len(whole)) for _ in range(100)}
    bad = tmp_path / "bad"
    for place in places:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        bad.write_bytes(damaged)
        with pytest.raises(disk.CacheFileError, match=REFUSED):
            disk.load(bad)


def test_foreign_files_are_refused(file, tmp_path):
    for match, options in (
        ("another model: it was built with 'm'", {"revision": "x"}),
        ("another KV spec: use --kv int4", {"spec": "int8"}),
        ("another chat template", {"template": "x"}),
        ("a model with other caches", {"into": [KVCache(), KVCache()]}),
    ):
        with pytest.raises(disk.CacheFileError, match=match):
            disk.load(file, **options)
    assert disk.load(file, revision="r", spec="int4", template="t", into=[cached("int4", 0), cached("int4", 0)])
    other = tmp_path / "other.safetensors"
    for content in (b"", b"hello", b"\xff" * 100):
        other.write_bytes(content)
        with pytest.raises(disk.CacheFileError, match="not a prompt cache"):
            disk.load(other)
    save_prompt_cache(str(other), [KVCache()])
    with pytest.raises(disk.CacheFileError, match="opentq cache build"):
        disk.load(other)
    for mark in (b'"checksum":"', f'"format":"{disk.FORMAT}"'.encode()):
        other.write_bytes(file.read_bytes().replace(mark, mark.upper()))
        with pytest.raises(disk.CacheFileError, match="opentq cache build"):
            disk.load(other)
    with pytest.raises(disk.CacheFileError, match="No such file"):
        disk.load(tmp_path / "missing")


def test_a_newer_format_is_refused(file, monkeypatch):
    monkeypatch.setattr(disk, "VERSION", 2)
    with pytest.raises(disk.CacheFileError, match="format version 1, this opentq reads 2"):
        disk.load(file)


def test_writing_is_atomic(file, monkeypatch):
    """A write that fails leaves the old file and no debris."""
    before = file.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(disk.CacheFileError, match="disk full"):
        disk.save(file, [cached("int8")], [1])
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
    monkeypatch.undo()
    with pytest.raises(disk.CacheFileError, match="can't write"):
        disk.save(file.parent / "nowhere" / "c", [cached("int8")], [1])


def test_a_prompt_that_leaves_the_cached_text_is_trimmed_or_refused(tmp_path):
    model = random_llama()
    compress(model, "int4")
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS]), cache=caches)
    disk.save(tmp_path / "c", caches, TOKENS)
    caches, rest = disk.load(tmp_path / "c").fit([*TOKENS[:120], 0, *TOKENS[121:]])
    assert rest == [0, *TOKENS[121:]] and caches[0].offset == 120
    caches, rest = disk.load(tmp_path / "c").fit(TOKENS)
    assert rest == TOKENS[-1:] and caches[0].offset == len(TOKENS) - 1
    with pytest.raises(disk.CacheFileError, match="does not begin with"):
        disk.load(tmp_path / "c").fit([0, 1, 2])

    hybrid = build("qwen3_5")
    compress(hybrid, "int4")
    caches = make_prompt_cache(hybrid)
    hybrid(mx.array([TOKENS]), cache=caches)
    disk.save(tmp_path / "h", caches, TOKENS)
    assert disk.load(tmp_path / "h").fit([*TOKENS, 3])[1] == [3]
    with pytest.raises(disk.CacheFileError, match="after 120 of 150 tokens"):
        disk.load(tmp_path / "h").fit([*TOKENS[:120], 0, 5])


def test_mlx_lms_own_files_work_too(tmp_path):
    model = random_llama()
    compress(model, "int4:skip=last1")
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS[:100]]), cache=caches)
    save_prompt_cache(str(tmp_path / "c.safetensors"), caches, {"model": "m"})
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    copied = copy.deepcopy(caches)
    a, b, c = (model(mx.array([TOKENS[100:]]), cache=x) for x in (caches, loaded, copied))
    assert mx.array_equal(a, b).item() and mx.array_equal(a, c).item()


# ---- the command


def command(*arguments: str):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_build_info_use(tmp_path):
    """A document is processed once; a question about it is answered as if all had been processed."""
    model = Path(__file__).parent.parent / "models" / "tiny-llama"
    if not (model / "model.safetensors").exists():
        pytest.skip("models/tiny-llama is not trained yet")
    document = tmp_path / "text.txt"
    document.write_text("".join(f"The {i}th box holds {i * i % 89} red balls. " for i in range(30)))
    file = tmp_path / "box.cache"
    with pytest.raises(ValueError, match="the context is 20 tokens"):
        command("build", str(model), str(file), "--text-file", str(document), "--max-context", "20")
    assert not file.exists()
    command("build", str(model), str(file), "--text-file", str(document), "--kv", "int8")
    assert json.loads(command("info", str(file), "--json").stdout)["spec"] == "int8"
    used = command("use", str(file), "--prompt", "The 7th box holds", "--max-tokens", "12", "--json")
    answer = json.loads(used.stdout.splitlines()[-1])
    assert answer["prompt_tokens"] < 30 < answer["cached_tokens"]
    lm, tokenizer = load(str(model), kv="int8")
    whole = document.read_text() + JOIN + "The 7th box holds"
    assert run(lm, tokenizer, Request(encode_prompt(tokenizer, whole), max_tokens=12)).text == answer["text"]
    (_, rest), (_, same) = (resume(file, lm, tokenizer, str(model), q) for q in ("The 7th box holds", whole))
    assert rest == same, "a prompt that brings the text along is the same prompt"

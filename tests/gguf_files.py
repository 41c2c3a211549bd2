"""GGUF files for tests: mlx-lm models written as llama.cpp's converter would, names by the gguf package's own table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

PERMUTED = {"llama", "granite", "smollm3"}
PLUS_ONE = {"gemma", "gemma2", "gemma3"}


def write(
    path: Path,
    arch: str,
    model: Any,
    config: dict[str, Any],
    tokenizer: Any = None,
    types: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
    lists: dict[str, list] | None = None,
    split: int = 0,
    pre: str | None = "smollm",
    extra: dict[str, np.ndarray] | None = None,
    leave_out: Sequence[str] = (),
    tensors_arch: str = "",
) -> Path:
    """Write `model` to `path`.

    Args:
        tokenizer: path of a byte-level tokenizer.json.
        types: tensor types by the end of the name; float32 otherwise.
        metadata, lists: more keys.
        split: most tensors in a part; 0 writes one file.
        pre: the pre-tokenizer that the file names.
        extra, leave_out: tensors to add and to leave out, by llama.cpp's names.
        tensors_arch: architecture whose tensor names are used, if not `arch`.
    """
    import gguf

    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](key, value)
    if tokenizer:
        add_tokenizer(writer, tokenizer, pre)
    for key, value in (lists or {}).items():
        writer.add_array(key, value)
    for name, array in (tensors(tensors_arch or arch, model, config) | (extra or {})).items():
        if name in leave_out:
            continue
        kind = next((t for end, t in (types or {}).items() if name.endswith(end)), "F32")
        quantised = gguf.GGMLQuantizationType[kind]
        data = array if kind == "F32" else gguf.quants.quantize(array, quantised)
        writer.add_tensor(name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(arch: str, model: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The model's parameters under llama.cpp's names and in its conventions."""
    import gguf

    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    found = {}
    for key, value in tree_flatten(model.parameters()):
        array = np.array(value.astype(mx.float32))
        stem, _, kind = key.rpartition(".")
        if "block_sparse_moe" in stem:
            stem = stem.replace("gate_proj", "w1").replace("down_proj", "w2").replace("up_proj", "w3")
        stem = stem.replace("switch_mlp", "experts")
        place = names.get_name(stem)
        assert place, f"gguf knows no name for {key}"
        if arch in PERMUTED and stem.endswith(("q_proj", "k_proj")):
            count = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            split = array.reshape(count, 2, len(array) // count // 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        if arch in PLUS_ONE and stem.endswith("norm"):
            array = array + 1
        if stem.endswith("shared_expert_gate"):
            array = array.reshape(-1)
        found[f"{place}.{kind}"] = np.ascontiguousarray(array)
    return found


def byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of single bytes, `th`, `<|bos|>` and `<|end|>` to `folder`; returns its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "th"])}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    return folder / "tokenizer.json"


def add_tokenizer(writer: Any, file: Path, pre: str | None) -> None:
    """The vocabulary, merges, types, template and framing of a folder's tokenizer."""
    import gguf

    whole, settings = json.loads(file.read_text()), json.loads(file.with_name("tokenizer_config.json").read_text())
    added = {t["id"]: t for t in whole["added_tokens"]}
    ids = {number: token for token, number in whole["model"]["vocab"].items()}
    ids |= {i: t["content"] for i, t in added.items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([ids[i] for i in range(len(ids))])
    writer.add_token_types(
        [
            kinds.NORMAL if i not in added else kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
            for i in range(len(ids))
        ]
    )
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    writer.add_token_merges(merges)
    by_name = {token: i for i, token in ids.items()}
    if bos := settings.get("bos_token"):
        writer.add_bos_token_id(by_name[bos])
    writer.add_eos_token_id(by_name[settings["eos_token"]])
    writer.add_add_bos_token(bool(bos))
    if template := settings.get("chat_template"):
        writer.add_chat_template(template)


def decode(source: Path, path: Path) -> Path:
    """Write the file `source` to `path` with all tensors in float32: the same model without quantised arithmetic."""
    import gguf

    from opentq.hosts.mlx_lm.gguf import header, tensors

    head = header.read(source)
    writer = gguf.GGUFWriter(path, head.architecture)
    for key, value in head.metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
            add[type(value)](key, value)
    for name, tensor in head.tensors.items():
        raw = np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.size,))
        kind = gguf.GGMLQuantizationType[tensors.type_name(tensor)]
        array = raw.view(np.float32) if kind.name == "F32" else gguf.quants.dequantize(raw, kind)
        writer.add_tensor(name, np.ascontiguousarray(array.reshape(tensor.shape), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

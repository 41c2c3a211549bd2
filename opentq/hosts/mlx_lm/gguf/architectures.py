"""Architectures: a GGUF header as the config.json that mlx-lm reads, and tensor names as mlx-lm's parameters.

Keys and names are those of llama.cpp (gguf-py/gguf/constants.py and tensor_mapping.py). Three of its conventions are
undone here: Llama's query and key rows are stored in the order of interleaved rotary pairs, Gemma's norms with 1 added,
and a mixture's experts under other names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from .header import GGUFError, Header
from .tensors import read

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        model_type: mlx-lm's name.
        more: what its config has beyond the common fields.
        names: names of tensors that differ from the common ones.
        interleaved: query and key rows are stored for interleaved rotary pairs.
        norms_plus_one: norms are stored with 1 added, mlx-lm adds it itself.
        half: the 16-bit float in which its activations are safe.
    """

    model_type: str
    more: Callable[[Header], Config] = field(default=lambda header: {})
    names: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False
    norms_plus_one: bool = False
    half: mx.Dtype = mx.bfloat16


def find(header: Header) -> Architecture:
    """The architecture of a file. Raises GGUFError for one that is not known here."""
    name = header.architecture
    if name == "llama" and header.get("expert_count"):
        return MIXTRAL
    if name not in ARCHITECTURES:
        raise GGUFError(
            f"{header.path.name} has architecture {name!r}, which opentq can't read from GGUF "
            f"(known: {', '.join(sorted(ARCHITECTURES))}); use the model's safetensors from Hugging Face"
        )
    return ARCHITECTURES[name]


def config(header: Header) -> Config:
    """The config.json of a file. Raises GGUFError for missing keys and for what mlx-lm would compute otherwise."""
    arch = find(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(f"{header.path.name} has no token_embd.weight; convert the model again")
    hidden, heads = header.need("embedding_length"), header.need("attention.head_count")
    settings = {
        "model_type": arch.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": header.need("block_count"),
        "intermediate_size": header.get("feed_forward_length", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": header.get("attention.head_count_kv", heads),
        "rms_norm_eps": header.need("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": header.need("context_length"),
        "rope_theta": header.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    varied = [key for key, value in settings.items() if isinstance(value, list)]
    if varied:
        raise GGUFError(f"{header.path.name} has another {varied[0]} in every layer, which mlx-lm's class can't do")
    settings["head_dim"] = header.get("attention.key_length", hidden // heads)
    settings |= {"attention_bias": _has(header, "attn_q.bias"), "mlp_bias": _has(header, "ffn_up.bias")}
    return settings | arch.more(header)


def _has(header: Header, name: str) -> bool:
    return f"blk.0.{name}" in header.tensors


def _rope_scaling(header: Header) -> Config | None:
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(header)
    kind = header.get("rope.scaling.type", "none")
    factor = header.get("rope.scaling.factor") or header.get("rope.scale_linear")
    if kind == "linear" or (kind == "none" and factor not in (None, 0.0, 1.0)):
        return {"type": "linear", "rope_type": "linear", "factor": float(factor)}
    if kind == "yarn":
        return {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": header.need("rope.scaling.original_context_length"),
        }
    if kind in ("none", "longrope"):
        return None  # the tensors of longrope are read by Phi-3's own fields
    raise GGUFError(f"{header.path.name} scales its rotary positions by {kind!r}, which is not known here")


def _llama3_scaling(header: Header) -> Config:
    """Llama 3's scaling, whose parameters are not in the file but whose result is: the factor of each frequency."""
    stored = np.array(read(header.tensors["rope_freqs.weight"])["weight"], dtype=np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    base, dims = header.get("rope.freq_base", 10000.0), 2 * len(stored)
    turns = 8192 * base ** -(np.arange(0, dims, 2) / dims) / (2 * math.pi)  # of each frequency in the old context
    smooth = np.clip((turns - 1) / 3, 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise GGUFError(f"{header.path.name} scales its rotary positions otherwise than Llama 3; it can't be read")
    return scaling


def _granite(header: Header) -> Config:
    return {
        "logits_scaling": header.get("logit_scale", 1.0),
        "attention_multiplier": header.need("attention.scale"),
        "embedding_multiplier": header.get("embedding_scale", 1.0),
        "residual_multiplier": header.get("residual_scale", 1.0),
    }


def _mixture(header: Header) -> Config:
    experts, used = header.need("expert_count"), header.need("expert_used_count")
    return {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": used}


def _qwen2_moe(header: Header) -> Config:
    return _mixture(header) | {
        "moe_intermediate_size": header.need("expert_feed_forward_length"),
        "shared_expert_intermediate_size": header.need("expert_shared_feed_forward_length"),
    }


def _qwen3_moe(header: Header) -> Config:
    return _mixture(header) | {
        "moe_intermediate_size": header.need("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _gemma2(header: Header) -> Config:
    return {
        "attn_logit_softcapping": header.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(header, largest=46),
    }


def _gemma3(header: Header) -> Config:
    return {
        "sliding_window": header.need("attention.sliding_window"),
        "sliding_window_pattern": header.get("attention.sliding_window_pattern", 6),
        "rope_theta": header.get("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": header.get("rope.freq_base_swa", 10_000.0),
        "query_pre_attn_scalar": _query_scalar(header, largest=62),
    }


def _query_scalar(header: Header, largest: int) -> int:
    """Only the largest model of each generation, known by its layers, scales by hidden size over heads."""
    if header.need("block_count") == largest:
        return header.need("embedding_length") // header.need("attention.head_count")
    return header.need("attention.key_length")


def _phi3(header: Header) -> Config:
    hidden, heads = header.need("embedding_length"), header.need("attention.head_count")
    settings: Config = {
        "partial_rotary_factor": header.get("rope.dimension_count", hidden // heads) / (hidden // heads),
        "original_max_position_embeddings": header.get("rope.scaling.original_context_length")
        or header.need("context_length"),
    }
    if "rope_factors_long.weight" in header.tensors:
        factors = {
            f"{side}_factor": np.array(read(header.tensors[f"rope_factors_{side}.weight"])["weight"]).tolist()
            for side in ("long", "short")
        }
        settings["rope_scaling"] = {"type": "longrope", **factors}
    return settings


EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
SANDWICH = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
DERIVED = {"rope_freqs", "rope_factors_long", "rope_factors_short"}
"""Tensors that the config speaks for."""

MIXTRAL = Architecture(
    "mixtral",
    _mixture,
    {k: "block_sparse_moe" + v.removeprefix("mlp") for k, v in EXPERTS.items()},
    interleaved=True,
)
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, half=mx.float16),
    "granite": Architecture("granite", _granite, interleaved=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe", _qwen2_moe, EXPERTS),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, EXPERTS),
    "gemma": Architecture("gemma", norms_plus_one=True),
    "gemma2": Architecture("gemma2", _gemma2, SANDWICH, norms_plus_one=True),
    "gemma3": Architecture("gemma3_text", _gemma3, SANDWICH, norms_plus_one=True),
    "phi3": Architecture("phi3", _phi3, {"ffn_up": "mlp.gate_up_proj"}),
    "olmo2": Architecture("olmo2", names=SANDWICH),
}


def place(arch: Architecture, name: str) -> str | None:
    """mlx-lm's path, without `.weight` or `.bias`, of a tensor; None for one that the config speaks for.

    Raises GGUFError for a name that is not known.
    """
    stem = name.rpartition(".")[0]
    if stem in DERIVED:
        return None
    if stem in ENDS:
        return ENDS[stem]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    inner = (arch.names.get(match[2]) or NAMES.get(match[2])) if match else None
    if match is None or inner is None:
        raise GGUFError(
            f"tensor {name} is not part of a {arch.model_type} model as mlx-lm knows it; it can't be loaded"
        )
    return f"model.layers.{match[1]}.{inner}"


def undone(arch: Architecture, name: str, arrays: dict[str, mx.array], settings: Config) -> dict[str, mx.array]:
    """The arrays of one tensor with llama.cpp's conventions undone."""
    stem = name.rpartition(".")[0].rpartition(".")[2]
    if arch.interleaved and stem in ("attn_q", "attn_k"):
        heads = settings["num_attention_heads" if stem == "attn_q" else "num_key_value_heads"]
        return {key: _halves(array, heads) for key, array in arrays.items()}
    if arch.norms_plus_one and stem.endswith("norm"):
        return {key: array - 1 for key, array in arrays.items()}
    if stem == "ffn_gate_inp_shexp":
        return {key: array.reshape(1, -1) for key, array in arrays.items()}
    return arrays


def _halves(array: mx.array, heads: int) -> mx.array:
    """Rows of rotary pairs `(0, 1), (2, 3), ...` in each head -> all first, then all second members."""
    rows = array.reshape(heads, -1, 2, *array.shape[1:])
    return mx.contiguous(rows.swapaxes(1, 2)).reshape(array.shape)

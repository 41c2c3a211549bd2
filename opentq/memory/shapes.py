"""Named shapes: the configurations of well-known models, so that planning and benchmarks need no download.

Each entry is the part of the model's own config.json that decides sizes. `find` knows a model by its shape's name or by
a repository name that holds it, in any of the usual spellings (`meta-llama/Llama-3.1-70B-Instruct`,
`mlx-community/Meta-Llama-3.1-70B-Instruct-4bit`).
"""

from __future__ import annotations

import copy
import re
from typing import Any

Config = dict[str, Any]


def _llama(hidden: int, layers: int, inner: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _qwen(kind: str, hidden: int, layers: int, inner: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return {
        **_llama(hidden, layers, inner, heads, kv_heads),
        "model_type": kind,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        **more,
    }


def _gpt_oss(layers: int, experts: int) -> Config:
    return {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": layers,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "rope_theta": 150000,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        "max_position_embeddings": 131072,
    }


NAMED: dict[str, Config] = {
    "llama-3.1-8b": _llama(4096, 32, 14336, 32, 8, rope_scaling=LLAMA3_ROPE),
    "llama-3.1-70b": _llama(8192, 80, 28672, 64, 8, rope_scaling=LLAMA3_ROPE),
    "llama-3.3-70b": _llama(8192, 80, 28672, 64, 8, rope_scaling=LLAMA3_ROPE),
    "llama-3.2-1b": _llama(2048, 16, 8192, 32, 8, tie_word_embeddings=True, rope_scaling={**LLAMA3_ROPE, "factor": 32}),
    "llama-3.2-3b": _llama(3072, 28, 8192, 24, 8, tie_word_embeddings=True, rope_scaling={**LLAMA3_ROPE, "factor": 32}),
    "mistral-7b": _llama(4096, 32, 14336, 32, 8, vocab_size=32768, rope_theta=1e6, max_position_embeddings=32768),
    "qwen2.5-3b": _qwen("qwen2", 2048, 36, 11008, 16, 2, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen("qwen2", 3584, 28, 18944, 28, 4, vocab_size=152064),
    "qwen2.5-32b": _qwen("qwen2", 5120, 64, 27648, 40, 8, vocab_size=152064),
    "qwen3-8b": _qwen("qwen3", 4096, 36, 12288, 32, 8, head_dim=128, max_position_embeddings=40960),
    "qwen3-30b-a3b": _qwen(
        "qwen3_moe",
        2048,
        48,
        6144,
        32,
        4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        max_position_embeddings=40960,
    ),
    "qwen3-next-80b-a3b": _qwen(
        "qwen3_next",
        2048,
        48,
        5120,
        16,
        2,
        head_dim=256,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        linear_num_value_heads=32,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        full_attention_interval=4,
        partial_rotary_factor=0.25,
        norm_topk_prob=True,
        max_position_embeddings=262144,
    ),
    "gemma-3-27b": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "num_hidden_layers": 62,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
    "gemma-4-31b": {
        "model_type": "gemma4_text",
        "hidden_size": 5376,
        "num_hidden_layers": 60,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "num_global_key_value_heads": 4,
        "global_head_dim": 512,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
        "max_position_embeddings": 262144,
    },
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}


def find(name: str) -> tuple[str, Config] | None:
    """The shape that `name` (a shape, or a repository) stands for, as (shape name, config), or None."""
    base = _plain(name.rsplit("/", 1)[-1])
    # The longest name first, so that llama-3.1-70b is not taken for a shorter one.
    for shape in sorted(NAMED, key=len, reverse=True):
        if re.search(rf"(^|-){re.escape(_plain(shape))}($|-)", base):
            return shape, copy.deepcopy(NAMED[shape])
    return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("meta-", "").replace("llama3", "llama-3").replace("gemma4", "gemma-4")


def bits_in_name(name: str) -> int | None:
    """Weight bits that a repository name promises: `...-4bit` -> 4, `...-bf16` -> 16, else None."""
    found = re.search(r"(\d+)[-_]?bit|(bf16|fp16)", name.lower())
    if not found:
        return None
    return 16 if found[2] else int(found[1])

"""Tiny random models of every architecture in mlx-lm that has a KV cache: half a million parameters each, no files.

One table of small sizes serves every configuration class by field name; `SPECIAL` holds what an architecture has of its
own. `LEFT_OUT` says why a module of mlx-lm is not here.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

WINDOW = 16
"""Sliding windows are this small, so that short prompts leave them."""

LAYERS = 4
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
HYBRID = ["linear_attention", "full_attention"] * (LAYERS // 2)

COMMON: dict[str, Any] = {
    # width and depth, under the names that configurations use
    **dict.fromkeys(("hidden_size", "hidden_dim", "model_dim", "d_model", "n_embd"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("intermediate_size", "ff_intermediate_size", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), 100),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"), 1e-5),
    "head_dim": 32,
    "rope_theta": 10000.0,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size", "model_max_length"), 1024),
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "type": "default"},
    "sliding_window": WINDOW,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    # multi-head latent attention
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    # recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    **dict.fromkeys(("mamba_d_conv", "conv_kernel", "conv_L_cache", "conv_window", "conv1d_width"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_expand": 1,
    **dict.fromkeys(("mamba_proj_bias", "conv_bias", "mamba_conv_bias", "use_conv_bias"), False),
    # multipliers
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "attention_multiplier", "residual_multiplier"), 1.0),
    **dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base"), 1),
}

_MLA_TEXT = {"model_type": "deepseek_v3"}
_DSA = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 64}
_GEMMA4 = {
    "layer_types": MIXED,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "global_head_dim": 64,
    "rope_parameters": None,
}
_MAMBA2 = {"mamba_d_ssm": 128, "mamba_chunk_size": 32}

SPECIAL: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": MIXED, "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2, "partial_rotary_factor": 0.5},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": {"type": "default", "mscale": 1.0, "mscale_all_dim": 1.0, "factor": 1.0}},
    "deepseek_v32": _DSA,
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": MIXED, "is_moe_layer": [False, True, False, True]},
    "falcon_h1": {"mamba_n_heads": 4, **_MAMBA2},
    "gear": {"layer_types": MIXED},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3": {"text_config": {"model_type": "gemma3_text", "sliding_window_pattern": 2, "query_pre_attn_scalar": 32}},
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 32},
    "gemma3n": {
        "text_config": {
            "num_kv_shared_layers": 2,
            "layer_types": MIXED,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.5] * LAYERS,
            "intermediate_size": [64] * LAYERS,
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 16,
        }
    },
    "gemma4": {"text_config": {"model_type": "gemma4_text", **_GEMMA4}},
    "gemma4_text": _GEMMA4,
    "glm4_moe": {"use_qk_norm": True},
    "glm_moe_dsa": {
        **_DSA,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gpt_oss": {"layer_types": MIXED},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": {"text_config": _MLA_TEXT},
    "kimi_k3": {
        "text_config": {
            "linear_attn_config": {
                "kda_layers": [1, 3],
                "full_attn_layers": [2, 4],
                "num_heads": 4,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
            },
            "activation_situ_beta": 1.0,
            "activation_situ_linear_beta": 1.0,
            "attn_res_block_size": 2,
        }
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        }
    },
    "kimi_vl": {"text_config": _MLA_TEXT},
    "laguna": {"layer_types": MIXED},
    "lfm2": {
        "block_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
    "lfm2-vl": {
        "text_config": {
            "model_type": "lfm2",
            "block_dim": 128,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1, 3],
        }
    },
    "lfm2_moe": {"use_expert_bias": False, "num_dense_layers": 1, "full_attn_idxs": [1, 3]},
    "llama4": {
        "text_config": {
            "attention_chunk_size": WINDOW,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "use_qk_norm": True,
            "model_type": "llama4_text",
        }
    },
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True},
    "longcat_flash": {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "zero_expert_num": 1,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "longcat_flash_ngram": {
        "zero_expert_num": 1,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 2,
    },
    "mellum": {
        "layer_types": MIXED,
        "rope_parameters": {t: {"rope_theta": 10000.0, "rope_type": "default"} for t in set(MIXED)},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": True,
        "sliding_window_size": WINDOW,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "swa_v_head_dim": 16,
        "v_head_dim": 16,
        "partial_rotary_factor": 0.5,
    },
    "minicpm3": {"rope_scaling": {"short_factor": 1.0, "long_factor": 1.0}},
    "minimax": {"rotary_dim": 16},
    "minimax_m3_vl": {
        "text_config": {
            "dense_intermediate_size": 64,
            "rotary_dim": 16,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        }
    },
    "ministral3": {
        "layer_types": MIXED,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral3": {"text_config": {"model_type": "llama"}},
    "mistral4": {
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "muse_glimmer": {"layer_types": MIXED},
    "nemotron": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"replace_with_linear": True}},
        ]
    },
    "nemotron_h": {"hybrid_override_pattern": "M*-*E", "num_hidden_layers": 5},
    "olmo3": {"layer_types": MIXED},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": HYBRID},
    "openelm": {
        "num_transformer_layers": LAYERS,
        "num_query_heads": [4, 4, 8, 8],
        "num_kv_heads": [2, 2, 4, 4],
        "ffn_multipliers": [0.5, 1.0, 0.5, 1.0],
        "ffn_dim_divisor": 32,
    },
    "phixtral": {"rotary_dim": 16},
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 32, "mamba_num_heads": 4, "attention_window_size": WINDOW},
    "plamo3": {"sliding_window_pattern": 2},
    "qwen": {"kv_channels": 32},
    "qwen2_vl": {"text_config": {"model_type": "qwen2"}},
    "qwen3_5": {"text_config": {"model_type": "qwen3_5", "full_attention_interval": 2}},
    "qwen3_5_moe": {"text_config": {"model_type": "qwen3_5_moe", "full_attention_interval": 2}},
    "qwen3_next": {"full_attention_interval": 2, "partial_rotary_factor": 0.5},
    "qwen3_vl": {"text_config": {"model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {"model_type": "qwen3_moe"}},
    "recurrent_gemma": {
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
    },
    "spark2_5": {
        "layer_types": MIXED,
        "rope_parameters": {t: {"rope_theta": 10000.0, "rope_type": "default"} for t in set(MIXED)},
    },
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.5},
    "step3p5": {"layer_types": MIXED, "moe_layers_enum": "1,3"},
}

LEFT_OUT = {
    "bitnet": "its linear layers exist for Metal only",
    "deepseek_v41": "its cache is a class of its own: pooled latents, candidates and a window in one LayerCache",
    "mamba": "no KV cache",
    "mamba2": "no KV cache",
    "muse_spark": "its query and key norm is a Metal kernel",
    "olmo": "needs the package ai2-olmo",
    "phi3small": "block-sparse attention, which crashes on MLX's CPU back end",
    "prism_hadamard_qwen35": "a packed weight format of qwen3_5, which is here",
    "rwkv7": "no KV cache",
}

PLAIN = """
Klear bailing_moe cohere deepseek deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone gemma glm glm4 glm4_moe_lite gpt2
granite granitemoe helium hunyuan_v1_dense internlm2 internlm3 lille-130m llama mimo minicpm mixtral nanbeige nanochat
olmo2 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 talkie telechat3
youtu_llm
"""

NAMES = sorted({*SPECIAL, *PLAIN.split()})


def config(name: str) -> dict[str, Any]:
    """The configuration of architecture `name`, as a config.json would hold it."""
    special = dict(SPECIAL.get(name, {}))
    if "text_config" in special:
        special["text_config"] = {**COMMON, "model_type": name, **special["text_config"]}
    return {**COMMON, **special, "model_type": name}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of architecture `name`, weights evaluated; `changes` are made to its configuration."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    wanted = inspect.signature(module.ModelArgs).parameters
    mx.random.seed(seed)
    settings = config(name) | changes
    model = module.Model(module.ModelArgs.from_dict({k: v for k, v in settings.items() if k in wanted}))
    model.update(tree_map(_not_zero, model.parameters()))
    mx.eval(model.parameters())
    return model


def _not_zero(x: mx.array) -> mx.array:
    """Attention sinks, output heads and convolutions that begin as zeros would test nothing."""
    return mx.random.normal(x.shape, x.dtype) * 0.3 if mx.issubdtype(x.dtype, mx.floating) and not x.any() else x

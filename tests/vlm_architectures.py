"""Tiny random language models of every architecture in mlx-vlm that has a KV cache: no files, no encoder towers.

Most text models of mlx-vlm take the configurations of mlx-lm's models of the same name (`architectures.py`); `SPECIAL`
holds what differs. `LEFT_OUT` says why a module of mlx-vlm is not here.
"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from . import architectures as lm
from .architectures import MIXED, WINDOW

MODELS = "mlx_vlm.models."

MROPE = {
    "type": "default",
    "rope_type": "default",
    "mrope_section": [4, 6, 6],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
"""Multimodal rotary positions: time, height and width share the 16 pairs of a head of 32 channels."""

WHOLE = SimpleNamespace(
    vision_config=SimpleNamespace(
        spatial_merge_size=2, spatial_patch_size=14, temporal_patch_size=1, channel_size=3, image_size=28
    ),
    image_token_id=97,
    image_token_index=97,
    video_token_id=98,
    video_token_index=98,
    vision_start_token_id=96,
    image_cls_token_id=95,
    img_end_id=94,
    img_id=97,
    eos_id=1,
)
"""Stands for the configuration of a whole model, which some language models ask for the ids of image tokens."""

_QWEN35 = {
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
    "rope_scaling": {**MROPE, "partial_rotary_factor": 1.0},
    "full_attention_interval": 2,
}
_MROPE = {"rope_scaling": MROPE, "rope_parameters": MROPE}
_LLAMA = {"model_type": "llama"}
_LFM2 = {
    "block_dim": 128,
    "block_ff_dim": 64,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1, 3],
}
_LSA = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 64}
_M3 = {**lm.SPECIAL["minimax_m3_vl"]["text_config"], "shared_intermediate_size": 32, "num_local_experts": 4}

SPECIAL: dict[str, dict[str, Any]] = {
    "clef": _QWEN35,
    "d1": _LFM2,
    "ernie4_5_moe_vl": {"rope_scaling": {**MROPE, "mrope_section": [6, 6, 4]}},
    "gemma3": {"sliding_window_pattern": 2},
    "gemma4_unified": lm.SPECIAL["gemma4_text"],
    "glm4v": _MROPE,
    "glm4v_moe": {**_MROPE, "use_qk_norm": True},
    "glm5_next": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 0,
        "qk_head_dim": 32,
        "index_head_dim": 32,
        "index_n_heads": 2,
        "index_topk": 64,
        "linear_head_dim": 32,
        "linear_num_heads": 4,
        "layer_types": None,
        "hc_mult": 2,
    },
    "glm_ocr": _MROPE,
    "hunyuan_vl": {
        "attention_head_dim": 32,
        "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "xdrope", "xdrope_section": [4, 4, 4, 4]},
    },
    "indic_ocr": _QWEN35,
    "inkling": {
        "layer_types": ["hybrid_sliding", "hybrid_full"] * 2,
        "sliding_window_size": WINDOW,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "rel_extent": 32,
        "dense_intermediate_size": 64,
        "n_routed_experts": 4,
    },
    "jina_vlm": {"additional_vocab_size": 8},
    "kolibri1": {"layer_types": MIXED},
    "lfm2": _LFM2,
    "lfm2_vl": _LFM2,
    "llava": _LLAMA,
    "llava_next": _LLAMA,
    "llmjpvl": _LLAMA,
    "limite": {
        "rope_n_pairs": 8,
        "ve_dim": 32,
        "ve_layers": [1],
        "xsa_layers": [2],
        "global_layers": [1, 3],
        "softcap_logits": {"kind": "sigmoid", "a": 30.0, "b": 0.0, "c": 1.0},
    },
    "longcat_flash_sparse": {**lm.SPECIAL["longcat_flash"], **_LSA, "attention_method": "LSA", "zero_expert_num": 1},
    "mimo_v2": lm.SPECIAL["mimo_v2_flash"],
    "minimax_m3": _M3,
    "minimax_m3_vl": _M3,
    "molmo": {"mlp_hidden_size": 128, "embedding_size": 100, "weight_tying": False},
    "moondream3": {"num_key_value_heads": 4, "rope_dim": 16, "moe_start_layer": 1},
    "multi_modality": _LLAMA,
    "nemotron_h_nano_omni": lm.SPECIAL["nemotron_h"],
    "olmo": {"embedding_size": 100},
    "paddleocr_vl": _MROPE,
    "paligemma": {"query_pre_attn_scalar": 32, "model_type": "gemma"},
    "plamo2vl": {**lm.SPECIAL["plamo2"], "model_type": "plamo2"},
    "prism_hadamard_qwen35": _QWEN35,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_5": _QWEN35,
    "qwen3_5_moe": _QWEN35,
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_5_text": _QWEN35,
    "qwen3_omni_moe": _MROPE,
    "qwen3_vl": _MROPE,
    "qwen3_vl_moe": _MROPE,
    "qwen4_exp": {
        **_QWEN35,
        "hc_lowrank": 16,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "ngram_vocab_size_base": 64,
    },
}


def config(name: str) -> dict[str, Any]:
    """The text configuration of architecture `name`, as a config.json would hold it."""
    twin = {"klear": "Klear", "lille_130m": "lille-130m", "nemotron_nas": "nemotron-nas"}.get(name, name)
    base = lm.config(twin)
    base |= base.get("text_config", {})
    return {**base, "model_type": name, **SPECIAL.get(name, {})}


def build(name: str, seed: int = 0) -> Any:
    """A random language model of architecture `name`, weights evaluated."""
    package = importlib.import_module(MODELS + name)
    kind = (
        package.Model
        if name == "phi3_v"
        else getattr(package, "LanguageModel", None)
        or importlib.import_module(f"{MODELS}{name}.language").LanguageModel
    )
    settings = getattr(package, "TextConfig", None) or package.ModelConfig
    if "vocab_size" not in (wanted := inspect.signature(settings).parameters):
        settings = package.ModelConfig
        wanted = inspect.signature(settings).parameters
    text = settings(**{k: v for k, v in config(name).items() if k in wanted})
    mx.random.seed(seed)
    needs = list(inspect.signature(kind.__init__).parameters)[1:]
    if name == "phi3_v":  # its layers lie beside its encoder, which is of one size only
        with mock.patch(f"{MODELS}phi3_v.phi3_v.VisionModel", lambda config: nn.Identity()):
            model = kind(text)
    elif needs[0] == "config" and "text_config" in inspect.getsource(kind.__init__):
        model = kind(SimpleNamespace(**{**vars(WHOLE), "text_config": text}))
    else:
        model = kind(text, WHOLE) if len(needs) > 1 and needs[1] == "config" else kind(text)
    if name == "jina_vlm":  # the whole model puts the head there
        model.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    model.update(tree_map(lm._not_zero, model.parameters()))
    mx.eval(model.parameters())
    return model


LEFT_OUT = {
    "no decoder: encoders, detectors, rerankers, image, video and sound generation": """
    bert bonsai d1_omni decider2 dinov2 embedding_gemma2 ernie_image flux2 flux3 gemma3_embedding gliner2_5 ideogram4
    laya lfm2_colbert lfm2_embedding lfm2_encoder llada_image llama_bidirec llama_nemotron_vl_embedding mage_flow
    ming_image minimax_h3 ministral3_embedding modernbert moge3 moss_image openai_privacy_filter pp_doclayout_v3
    qwen3_embedding qwen_image rfdetr rt_detr_v2 sam3 sam3_1 sam3d_body sam3d_objects sapiens2 siglip
    video_depth_anything xlm_roberta yolo11 z_image
    """,
    "the language model of a module that is in the table": """
    colidefics3 colqwen2_5 gemma3_text got mistral4 mistral_large3 nemotron_voicechat qwen3_vl_embedding solar_open
    """,
    "generates blocks by diffusion, not token by token": "diffusion_gemma llada2_moe nemotron_labs_diffusion",
    "an encoder with a decoder that attends to it": "florence2 nemotron_parse",
    "its cache is a class of its own: pooled latents, candidates and a window in one": "deepseek_v4 deepseek_v41",
    "no KV cache": "mamba mamba2 rwkv7 z1t",
    "parts of it exist for Metal only": "bitnet muse_spark",
    "block-sparse attention, which crashes on MLX's CPU back end": "phi3small",
}
"""Modules of mlx-vlm that are not here, by reason."""

PLAIN = """
afm7 afmoe apertus aya_vision baichuan_m1 bailing_moe bailing_moe_linear cohere cohere2 cohere2_moe cohere_compass
dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_vl_v2 deepseekocr
deepseekocr_2 dots1 dots_ocr ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 falcon_ocr falcon_perception
fastvlm flint gemma gemma2 gemma3n gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite glm5_next glm_moe_dsa gpt2
gpt_bigcode gpt_neox gpt_oss granite granite4_vision granite_vision granitemoe granitemoehybrid helium hrm_text
hunyuan hunyuan_v1_dense hy_v4 idefics2 idefics3 internlm2 internlm3 internvl internvl_chat iquestloopcoder jamba
k2_horizon kimi_k25 kimi_k3 kimi_linear kimi_vl klear laguna lfm2_moe lille_130m llama llama4 llama4_text
llava_bunny llava_onevision locateanything longcat_flash longcat_flash_ngram mage_vl mellum mimo mimo_v2_flash
minicpm minicpm3 minicpmo minicpmv4_6 minicpmv4_7 minimax ministral3 mistral3 mixtral mllama molmo2 molmo_point
moondream2 muse_glimmer nanochat nemotron nemotron_h nemotron_nas olmo2 olmo3 olmoe openelm phi phi3 phi3_v
phi4_siglip phi4mm phimoe phixtral pixtral plamo plamo2 qwen qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next
recurrent_gemma seed_oss smollm3 smolvlm spark2_5 stablelm starcoder2 step3p5 step3p7 telechat3 unlimited_ocr
xing4_0 youtu_llm youtu_vl zaya1_vl
"""

NAMES = sorted({*SPECIAL, *PLAIN.split()})

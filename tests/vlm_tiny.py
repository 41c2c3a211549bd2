"""A tiny vision-language model with random weights: Qwen2-VL's layout, a tower of one layer, four decoder layers.

The tokenizer is that of `models/tiny-llama`, with the image's words added.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

SOURCE = Path(__file__).parent.parent / "models" / "tiny-llama"
IMAGE, START, END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
PATCH = 14
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}WHERE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
).replace("WHERE", START + IMAGE + END)


def config(vocabulary: int, image: int, start: int) -> dict[str, Any]:
    """config.json; `vocabulary` words, ids of the image's words."""
    return {
        "model_type": "qwen2_vl",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        "image_token_id": image,
        "video_token_id": vocabulary - 1,
        "vision_start_token_id": start,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
    }


def make(settings: dict[str, Any], seed: int = 0) -> Any:
    """The model, in float32."""
    from mlx_vlm.models import qwen2_vl as package
    from mlx_vlm.utils import update_module_configs

    whole = package.ModelConfig.from_dict(dict(settings))
    filled = {**settings, "text_config": {k: v for k, v in settings.items() if k != "vision_config"}}
    whole = update_module_configs(whole, package, filled, ["text", "vision"])
    mx.random.seed(seed)
    model = package.Model(whole)
    mx.eval(model.parameters())
    return model


def folder(path: Path, seed: int = 0) -> Path:
    """`path` as a folder that mlx-vlm loads."""
    from tokenizers import AddedToken, Tokenizer

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (START, END, IMAGE, "<|video_pad|>")])
    tokenizer.save(str(path / "tokenizer.json"))
    shutil.copy(SOURCE / "tokenizer_config.json", path / "tokenizer_config.json")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"patch_size": PATCH, "merge_size": 2, "min_pixels": 784, "max_pixels": 28 * 28 * 64})
    )
    ids = {t: tokenizer.token_to_id(t) for t in (IMAGE, START)}
    settings = config(tokenizer.get_vocab_size(), ids[IMAGE], ids[START])
    (path / "config.json").write_text(json.dumps(settings))
    weights = dict(tree_flatten(make(settings, seed).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "mlx"})
    return path

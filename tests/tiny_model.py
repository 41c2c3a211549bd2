"""A random Llama with a byte-level tokenizer in a folder, for what must go through files, templates and tools."""

from __future__ import annotations

import json
from pathlib import Path

CHAT = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('roles are system, user, assistant and tool') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% for tool_call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ tool_call.name or tool_call.function.name }}", '
    '"arguments": {{ (tool_call.arguments or tool_call.function.arguments) | tojson }}}'
    "</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}<think>{% endif %}{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>"]
PLAIN = ["<tool_call>", "</tool_call>"]


def write(
    folder: Path, kind: str = "llama", layers: int = 2, context: int = 4096, seed: int = 0, vocabulary: int = 0
) -> Path:
    """Write the model, a `llama` or a `gemma3_text` with sliding windows; its answers are random text that depends on
    every token of the prompt."""
    from importlib import import_module

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in PLAIN])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT)
    fast.save_pretrained(folder)
    config = {
        "model_type": kind,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary or len(fast),
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": fast.eos_token_id,
    }
    if kind == "gemma3_text":
        config |= {"sliding_window": 96, "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0}
        config |= {"query_pre_attn_scalar": 64}
    mx.random.seed(seed)
    arch = import_module(f"mlx_lm.models.{kind}")
    model = arch.Model(arch.ModelArgs.from_dict(config))
    # Larger weights than the default ones: random answers that vary, instead of one token for ever.
    weights = {k: 3 * v if v.ndim == 2 else v for k, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder

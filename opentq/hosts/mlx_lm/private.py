"""Names of mlx-lm that are not its public interface: the one place for them, each behind a check of its signature.

They may change in any release. What is asked for here is compared with what this project was written against, and an
mlx-lm that differs is refused by name and version before anything of it is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import Any

from ..host import HookError

SUPPORTED = ">=0.32.2,<0.33"

_EXPECTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "GenerationBatch": (
        "generate",
        (
            *("model", "uids", "inputs", "prompt_cache", "tokens", "samplers", "fallback_sampler"),
            *("logits_processors", "stop_sequences", "max_tokens"),
        ),
    ),
    "StopSequences": ("generate", ("stop_sequences",)),
    "TextStateMachine": ("generate", ("transitions",)),
    "_merge_caches": ("generate", ("caches",)),
    "make_text_state_machine": ("generate", ("tokenizer", "stop_words")),
    "apply_top_p": ("sample_utils", ("logprobs", "top_p")),
    "greedy_sampler": ("sample_utils", ("logprobs",)),
    "make_prompt_cache": ("models.cache", ("model", "max_kv_size")),
    "_download": ("utils", ("path_or_hf_repo", "revision", "allow_patterns")),
    "_get_classes": ("utils", ("config",)),
    "quantized_scaled_dot_product_attention": (
        "models.base",
        ("queries", "q_keys", "q_values", "scale", "mask", "group_size", "bits"),
    ),
    "scaled_dot_product_attention": (
        "models.base",
        ("queries", "keys", "values", "cache", "scale", "mask", "sinks"),
    ),
}
"""Module and parameters of every name."""


def __getattr__(name: str) -> Any:
    if name not in _EXPECTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, expected = _EXPECTED[name]
    found = getattr(importlib.import_module(f"mlx_lm.{module}"), name, None)
    parameters = None if found is None else tuple(inspect.signature(found).parameters)
    if parameters != expected:
        says = "does not exist" if found is None else f"has parameters {parameters}, expected {expected}"
        raise HookError(
            f"mlx_lm.{module}.{name} {says}: mlx-lm {importlib.metadata.version('mlx-lm')} is not supported; install "
            f"'mlx-lm{SUPPORTED}'"
        )
    return found

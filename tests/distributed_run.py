"""One rank of sharded generations, started by mlx.launch: `python distributed_run.py FOLDER`.

Every rank writes a JSON file for each way of cutting to FOLDER: tokens, log-probabilities, and what its caches are. A
process alone has all of the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from opentq.hosts.hooks import compress, installed
from tests.architectures import build

ARCHITECTURE = {"tensor": "llama", "pipeline": "qwen2"}
PROMPT = [(7 * i + i * i) % 97 + 1 for i in range(150)]


def generated(mode: str, group: mx.distributed.Group) -> dict:
    """What this rank of `group` finds."""
    model = build(ARCHITECTURE[mode])
    if group.size() > 1 and mode == "tensor":
        model.shard(group)
    elif group.size() > 1:
        model.model.pipeline(group)
    compress(model, "int4")
    caches = make_prompt_cache(model)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=12, prompt_cache=caches, prefill_step_size=64)
    tokens, scores = zip(*((int(token), round(p.max().item(), 4)) for token, p in steps))
    shape = installed(model).stats[0, 0].shape
    calls = [s.calls for s in installed(model).stats.values()]
    record = {"tokens": list(tokens), "scores": list(scores), "kv_heads": shape[0]}
    return {**record, "packed": [c.n_packed for c in caches], "calls": calls}


if __name__ == "__main__":
    ranks = mx.distributed.init()
    for way in ARCHITECTURE:
        Path(sys.argv[1], f"{way}-{ranks.rank()}.json").write_text(json.dumps(generated(way, ranks)))

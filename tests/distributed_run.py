"""One rank of a sharded generation, started by mlx.launch: `python distributed_run.py tensor|pipeline|alone FOLDER`.

Every rank writes one JSON file to FOLDER: tokens, log-probabilities, and what its caches are.
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


def main(mode: str, folder: Path) -> None:
    group = mx.distributed.init()
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
    record = {"tokens": tokens, "scores": scores, "kv_heads": shape[0], "packed": [c.n_packed for c in caches]}
    (folder / f"{group.rank()}.json").write_text(json.dumps({**record, "calls": calls}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""`opentq generate --image`, and models that mlx-vlm knows and mlx-lm does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..hosts.generation import Request
    from ..spec.text import Asked

Images = Annotated[
    list[Path] | None, typer.Option("--image", help="An image that the prompt is about; give it again for more.")
]


def wanted(path: str, images: list[Path] | None, *without: object) -> bool:
    """Whether mlx-vlm generates; raises UserError where one of the options `without` was given, too."""
    from ..hosts.mlx_lm.load import ranks
    from ..hosts.mlx_vlm.load import only_here

    if not images and not only_here(path):
        return False
    if any(without) or ranks() > 1:
        raise UserError(
            "--prompt-cache, --draft-model, --ignore-chat-template and several machines can't be used with images, nor "
            "with a model that only mlx-vlm knows"
        )
    return True


def generate(
    path: str,
    text: str,
    system: str | None,
    files: list[Path],
    spec: Asked,
    request: Request,
    wiring: Any,
    as_json: bool,
    verbose: bool,
) -> str:
    """Print the answer to a prompt about images, and what it cost; returns it."""
    from ..hosts.mlx_vlm.images import read
    from ..hosts.mlx_vlm.load import load
    from ..hosts.report import report
    from ..memory.wiring import needs, wired
    from ..spec.recommended import advice

    images = [read(file) for file in files]  # before the model, which takes longer to load than an error to say
    model, processor = load(path, kv=spec)
    from ..hosts.mlx_vlm.generate import prompt_of, run

    prompt = prompt_of(model, processor, text, len(images), system)
    if verbose and spec is not None:
        print(report(model), file=sys.stderr)
    if line := advice(model.language_model, spec):
        print(line, file=sys.stderr)
    with wired(lambda: needs([model], request.max_tokens, request.prefill_step_size), wiring):
        result = run(model, processor, prompt, images, request, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    print(result.summary(), file=sys.stderr)
    if as_json:
        print(json.dumps({"model": path, "kv": result.kv_spec, "images": len(images), **result.as_dict()}))
    return result.text

"""The `opentq chat` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import images, options
from .images import Images


def chat(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: options.KV = None,
    kv_bits: options.KVBits = None,
    kv_group_size: options.KVGroupSize = None,
    system_prompt: options.SystemPrompt = None,
    max_context: Annotated[int | None, typer.Option(help="Most tokens of the conversation.", min=2)] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Most tokens of one answer; 0: all that fit.", min=0)
    ] = 0,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    image: Images = None,
    wire: options.Wire = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Chat with a model in the terminal, on a compressed cache."""
    path = options.one_model(model, model_option)
    spec = options.spec_for(path, kv, kv_bits, kv_group_size)
    from pathlib import Path

    from ..chat.console import WORDS, Console
    from ..chat.conversation import Conversation, Settings
    from ..chat.editor import Editor, Pipe
    from ..hosts.mlx_lm.load import load
    from ..hosts.mlx_vlm.load import takes_images
    from ..memory.loaded import model_context
    from ..memory.wiring import needs, parse_wire, wired
    from ..spec.recommended import advice

    wiring = parse_wire(wire)
    seen = images.read(image) if image else []
    tokenizer_config = {"trust_remote_code": trust_remote_code or None}
    reader = Editor(WORDS) if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()
    with reader.aside():
        # Text stays with mlx-lm, which needs no mlx-vlm.
        lm, tokenizer = load(path, kv=spec, images=bool(seen) or takes_images(path), tokenizer_config=tokenizer_config)
    if line := advice(lm, spec):
        print(line, file=sys.stderr)
    context = max_context or model_context(lm) or 32768
    settings = Settings(temp, top_p, top_k, min_p, seed, max_tokens)
    with wired(lambda: needs([lm], context), wiring):
        talk = Conversation(lm, tokenizer, context, system_prompt or "", settings)
        Console(talk, Path(path).name, reader).run(seen)

"""The `opentq chat` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import UserError
from .options import KVBits, KVGroupSize, KVOrOff, ModelAgain, ModelArgument, TrustRemoteCode, Wire


def chat(
    model: ModelArgument = "",
    model_option: ModelAgain = "",
    kv: KVOrOff = None,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = None,
    system_prompt: Annotated[str, typer.Option(help="System message.")] = "",
    max_context: Annotated[int | None, typer.Option(help="Most tokens of the conversation.", min=2)] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Most tokens of one answer; 0: all that fit.", min=0)
    ] = 0,
    temp: Annotated[
        float, typer.Option("--temp", "--temperature", help="Sampling temperature; 0 is greedy.", min=0, max=2)
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.", min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely; 0 is off.", min=0)] = 0,
    min_p: Annotated[float, typer.Option(help="Least probability relative to the best; 0 is off.", min=0, max=1)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    wire: Wire = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a model in the terminal, on a compressed cache."""
    from pathlib import Path

    from ..chat.console import Console, use_history
    from ..chat.conversation import Conversation, Settings
    from ..hosts.mlx_lm.load import load
    from ..memory.loaded import model_context
    from ..memory.wiring import needs, parse_wire, wired
    from ..spec.kv import spec_from_flags
    from ..spec.recommended import AUTO, advice

    if bool(model) == bool(model_option):
        raise UserError("give the model once: opentq chat FOLDER, or org/name")
    path = model or model_option
    wiring = parse_wire(wire)
    off = kv == "off"
    spec = None if off else spec_from_flags(kv, kv_bits, kv_group_size)
    options = {"trust_remote_code": trust_remote_code or None}
    lm, tokenizer = load(path, kv=None if off else spec or AUTO, tokenizer_config=options)
    if not off and (line := advice(lm, spec)):
        print(line, file=sys.stderr)
    context = max_context or model_context(lm) or 32768
    settings = Settings(temp, top_p, top_k, min_p, seed, max_tokens)
    if sys.stdin.isatty():
        use_history()
    with wired(lambda: needs([lm], context), wiring):
        Console(Conversation(lm, tokenizer, context, system_prompt, settings), Path(path).name).run()

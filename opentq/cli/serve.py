"""The `opentq serve` command: options in, server running. Imports what is heavy only when called."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from . import options

REFUSED = {
    "--prompt-cache-size": "prompts are remembered by their bytes, see --prompt-cache-bytes",
    "--prompt-concurrency": "prompts take turns, a chunk each, see --prefill-step-size",
    "--quantized-kv-start": "caches are compressed from the first token on, see --kv",
}
Refused = Annotated[str | None, typer.Option(hidden=True)]
LEVELS = ("debug", "info", "warning", "error")


def serve(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: options.KV = None,
    kv_bits: options.KVBits = None,
    kv_group_size: options.KVGroupSize = None,
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind to; 0: any that is free.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENTQ_API_KEY", help="Key that clients must send; needed with any other --host."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Bind to any --host without a key.")] = False,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name in requests; may be repeated.")] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Another name in requests, NAME or NAME=MODEL, e.g. claude-sonnet-4-5; may be repeated."),
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Answer to every model name, as agents need.")] = False,
    keep_volatile: Annotated[
        bool,
        typer.Option("--keep-volatile", help="Keep agents' billing headers and token counts, which cost the prefix."),
    ] = False,
    lookup: Annotated[
        bool,
        typer.Option(help="Guess a single answer's next tokens from its prompt, several a step; the text is the same."),
    ] = True,
    draft_model: Annotated[
        str, typer.Option(help="A small model of the same vocabulary that guesses the next tokens of single answers.")
    ] = "",
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens that it guesses at once.", min=1)] = 3,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; longer requests get a 400.", min=1)
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Answer length when a request gives none.", min=1)
    ] = 4096,
    memory: Annotated[
        str | None, typer.Option(help="Memory for everything, e.g. 48GB; default: what the machine allows.")
    ] = None,
    prompt_cache_bytes: Annotated[
        str | None, typer.Option(help="Memory for remembered prompts, e.g. 4GB; 0 for none.")
    ] = None,
    prompt_cache_dir: Annotated[Path | None, typer.Option(help="Keep remembered prompts in this folder, too.")] = None,
    prompt_cache_dir_bytes: Annotated[str, typer.Option(help="Disk for remembered prompts.")] = "20GB",
    decode_concurrency: Annotated[int, typer.Option(help="Most requests that run at once.", min=1)] = 64,
    queue: Annotated[int, typer.Option(help="Most requests that wait for memory; further ones get a 503.", min=0)] = 64,
    prefill_step_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read between two decode steps; default: at most triples their time."),
    ] = None,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    adapter_path: Annotated[str | None, typer.Option(help="Folder of adapter weights (LoRA) for the model.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="Chat template in place of the model's own.")] = None,
    chat_template_args: Annotated[str, typer.Option(help="Variables for the chat template, as JSON.")] = "{}",
    allowed_origins: Annotated[
        str, typer.Option(help="Origins that browsers may send from, separated by commas; default: none.")
    ] = "",
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Name this server may be called by; may be repeated.")
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request body.")] = "32MB",
    keep_alive: Annotated[
        float, typer.Option(help="Seconds of silence before a keep-alive.", min=0.1, callback=options.finite)
    ] = 5.0,
    drain: Annotated[
        float,
        typer.Option(
            help="Seconds that running answers get when the server is stopped.", min=0, callback=options.finite
        ),
    ] = 30.0,
    allow_model_loading: Annotated[
        list[str] | None, typer.Option(help="Model folder that a request may have loaded by name; may be repeated.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    wire: options.Wire = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    prompt_cache_size: Refused = None,
    prompt_concurrency: Refused = None,
    quantized_kv_start: Refused = None,
) -> None:
    """Serve a model: OpenAI and Anthropic APIs, continuous batching, compressed KV cache."""
    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"opentq serve needs the extra: pip install 'opentq[serve]' ({error.name} is missing)"
        ) from error
    log_level = log_level.lower()
    given = (prompt_cache_size, prompt_concurrency, quantized_kv_start)
    for (name, why), value in zip(REFUSED.items(), given):
        if value is not None:
            raise UserError(f"{name} is an option of mlx-lm's server, not of this one: {why}")
    if log_level not in LEVELS:
        raise UserError(f"--log-level {log_level!r} is not known: use {', '.join(LEVELS)}")
    path = options.one_model(model, model_option)
    spec = options.spec_for(path, kv, kv_bits, kv_group_size)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    if log_level == "info":  # of uvicorn and the rest of opentq, only warnings
        for name in ("uvicorn", "opentq", "httpx"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("opentq.serve").setLevel(logging.INFO)

    from ..hosts.mlx_lm.load import is_first_rank
    from ..memory.device import parse_memory
    from ..memory.wiring import parse_wire, wired
    from ..server.launch import Server, bind, describe, follow, make_service
    from ..server.options import ServeOptions, aliases, check

    wiring = parse_wire(wire)

    def size(text: str | None) -> int | None:
        return None if text is None else 0 if text == "0" else parse_memory(text)

    chosen = ServeOptions(
        model=path,
        kv=spec,
        names=tuple(served_model_name or ()),
        host=host,
        port=port,
        api_key=api_key,
        insecure=insecure,
        hosts=tuple(allowed_host or ()),
        origins=tuple(o.strip() for o in allowed_origins.split(",") if o.strip()),
        max_body=size(max_body) or 1,
        max_context=max_context,
        max_tokens=max_tokens,
        memory=size(memory),
        prompt_cache_bytes=size(prompt_cache_bytes),
        prompt_cache_dir=prompt_cache_dir,
        prompt_cache_dir_bytes=size(prompt_cache_dir_bytes) or 0,
        concurrency=decode_concurrency,
        queue=queue,
        prefill_step=prefill_step_size,
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        adapter=adapter_path,
        chat_template=chat_template,
        template=_object(chat_template_args),
        keep_alive=keep_alive,
        drain=drain,
        trust_remote_code=trust_remote_code,
        loadable=tuple(allow_model_loading or ()),
        any_model=any_model,
        lookup=lookup,
        draft=draft_model,
        drafts=num_draft_tokens,
        keep_volatile=keep_volatile,
    )
    chosen.aliases = aliases(alias or [], chosen)
    check(chosen)
    if not is_first_rank():
        service, prices = make_service(chosen)
        with wired(lambda: prices.weights, wiring):
            follow(service)
        return
    listener = bind(chosen)
    chosen.port = listener.getsockname()[1]
    service, prices = make_service(chosen)
    print(describe(service, prices, chosen), flush=True)
    # Caches come and go: only what stays is worth wiring, and churn in wired memory is what has panicked Macs.
    with wired(lambda: prices.weights, wiring):
        Server(service, chosen).run([listener])
    if service.failure:
        raise UserError(service.failure)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"--chat-template-args is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError("--chat-template-args must be a JSON object")
    return value

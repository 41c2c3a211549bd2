"""`opentq generate`: one prompt in, one answer out, on a compressed cache; mlx-lm's flags plus `--kv`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from .. import text as texts
from ..errors import UserError
from . import images, options
from .images import Images


def generate(
    model: Annotated[str | None, options.ARGUMENT] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; '-' reads standard input.")
    ] = None,
    model_option: options.ModelOption = "",
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="The same, as an option.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    kv: options.KV = None,
    kv_bits: options.KVBits = None,
    kv_group_size: options.KVGroupSize = None,
    max_tokens: options.MaxTokens = 256,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 0.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    system_prompt: options.SystemPrompt = None,
    ignore_chat_template: Annotated[bool, typer.Option(help="Use the prompt as it is.")] = False,
    prefill_step_size: options.PrefillStep = 2048,
    max_context: options.MaxContext = None,
    draft_model: Annotated[str | None, typer.Option(help="Draft model for speculative decoding.")] = None,
    num_draft_tokens: Annotated[int, typer.Option(min=1, help="Tokens the draft model proposes per round.")] = 3,
    image: Images = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Begin after the text of this file, made by `opentq cache build`.")
    ] = None,
    wire: options.Wire = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the answer to this file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document as the last line.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the per-layer report first.")] = False,
) -> None:
    """Generate text from a prompt: opentq generate MODEL PROMPT."""
    if model_option and model is not None and prompt is None:
        model, prompt = None, model  # the only argument is the prompt where --model names the model
    path = options.one_model(model or "", model_option)
    text = read_prompt(prompt, prompt_option, prompt_file)
    options.check_output(output)
    spec = options.spec_for(path, kv, kv_bits, kv_group_size)
    from ..hosts.generation import Request
    from ..hosts.mlx_lm.generate import check_context, check_draft, encode_prompt, run
    from ..hosts.mlx_lm.load import is_first_rank, load
    from ..hosts.report import report
    from ..memory.loaded import model_context
    from ..memory.wiring import needs, parse_wire, wired
    from ..spec.recommended import advice

    wiring = parse_wire(wire)
    if image and (prompt_cache or draft_model or ignore_chat_template):
        raise UserError("--prompt-cache, --draft-model and --ignore-chat-template can't be used with images")
    if prompt_cache and (draft_model or system_prompt or ignore_chat_template):
        raise UserError("--prompt-cache decides the template and the system prompt, and works without a draft model")
    if prompt_cache:
        from ..caches.disk import read_manifest
        from ..spec.text import asked

        spec = asked(read_manifest(prompt_cache)[0].spec) if kv is None and kv_bits is None else spec
    seen = images.read(image) if image else []
    tokenizer_config = {"trust_remote_code": trust_remote_code or None}
    lm, tokenizer = load(path, kv=spec, images=bool(seen), tokenizer_config=tokenizer_config)
    draft = None
    if draft_model:
        draft, own = load(draft_model, kv=spec)
        check_draft(lm, tokenizer, draft, own)
    speaks = is_first_rank()
    if verbose and speaks:
        print(report(lm), file=sys.stderr)
    caches, cached, sight, started = None, 0, None, time.perf_counter()
    context = max_context or model_context(lm)
    if prompt_cache:
        from .cache import first_token, resume

        caches, tokens = resume(prompt_cache, lm, tokenizer, path, text, context)
        cached = max(c.size() for c in caches)
    elif seen:
        sight = images.prompt(lm, tokenizer, text, system_prompt, seen)
        tokens = sight.tokens
    else:
        tokens = encode_prompt(tokenizer, text, system_prompt, ignore_chat_template, context)
    ready = time.perf_counter() - started
    request = Request(
        tokens=tokens,
        caches=caches,
        cached=cached,
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        prefill_step_size=prefill_step_size,
        max_context=max_context,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        images=sight,
    )
    check_context(request, context)
    if speaks and (line := advice(lm, spec)):
        print(line, file=sys.stderr)
    on_text = (lambda text: print(text, end="", flush=True)) if speaks else None
    models, length = [m for m in (lm, draft) if m is not None], cached + len(tokens) + request.max_tokens
    with wired(lambda: needs(models, length, prefill_step_size), wiring):
        result = run(lm, tokenizer, request, on_text=on_text)
    if not speaks:
        return
    print(flush=True)
    if output:
        options.write(result.text, output)
    times: dict[str, float] = {"images": len(seen)} if seen else {}
    line = result.summary()
    if prompt_cache:
        line, times = first_token(result, ready, cached)
    print(line, file=sys.stderr)
    if as_json:
        print(json.dumps({"model": path, "kv": result.kv_spec, **times, **result.as_dict()}))


def read_prompt(argument: str | None, option: str | None, file: Path | None) -> str:
    """The prompt from the one place where it was given. Raises UserError for none, several, or an empty one."""
    given = [p for p in (argument, option, file) if p is not None]
    if len(given) > 1:
        raise UserError("give the prompt once: as an argument, with --prompt, or with --prompt-file")
    if file is not None:
        text = texts.read(file, "the prompt file")
    elif given == ["-"] or not given:
        if not given and sys.stdin.isatty():
            raise UserError("no prompt: give it as an argument, with --prompt-file FILE, or pipe it to standard input")
        text = texts.stdin()
    else:
        text = texts.check(str(given[0]), "the prompt")
    if not text.strip():
        raise UserError("the prompt is empty")
    return text

"""`opentq generate`: one prompt in, one answer out, on a compressed cache; mlx-lm's flags plus `--kv`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .options import KVBits, KVGroupSize, Model, Wire


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads standard input.")] = None,
    model: Model = "",
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; '-' reads stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="KV spec: f16, int4, k8v4, int4:g64, ... or a recipe; default: recommended for the model."),
    ] = None,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Most tokens to generate.")] = 256,
    temp: Annotated[float, typer.Option("--temp", "--temperature", help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 0 or 1 is off.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least probability relative to the best; 0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System message for the chat template.")] = None,
    ignore_chat_template: Annotated[bool, typer.Option(help="Use the prompt as it is.")] = False,
    prefill_step_size: Annotated[
        int, typer.Option(help="Tokens per prefill step; smaller steps need less memory.")
    ] = 2048,
    max_context: Annotated[int | None, typer.Option(help="Refuse prompts + answers longer than this.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="Draft model for speculative decoding.")] = None,
    num_draft_tokens: Annotated[int, typer.Option(help="Tokens the draft model proposes per round.")] = 3,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="Begin after the text of this file, made by `opentq cache build`.")
    ] = None,
    wire: Wire = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Allow code shipped with the tokenizer.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the answer to this file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document as the last line.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the per-layer report first.")] = False,
) -> None:
    """Generate text from a prompt."""
    from ..hosts.mlx_lm.generate import Request, check_context, check_trims, encode_prompt, run
    from ..hosts.mlx_lm.load import is_first_rank, load
    from ..hosts.report import report
    from ..memory.wiring import needs, parse_wire, wired
    from ..spec.kv import KVSpec, spec_from_flags
    from ..spec.recommended import AUTO, advice

    spec, wiring = spec_from_flags(kv, kv_bits, kv_group_size), parse_wire(wire)
    text = read_prompt(prompt, prompt_option, prompt_file)
    if not model:
        raise UserError("no model given: use --model FOLDER or --model org/name")
    if prompt_cache and (draft_model or system_prompt or ignore_chat_template):
        raise UserError("--prompt-cache decides the template and the system prompt, and works without a draft model")
    if prompt_cache:
        from ..caches.disk import read_manifest

        spec = spec or KVSpec.parse(read_manifest(prompt_cache)[0].spec)
    writer = open_output(output) if is_first_rank() else None
    lm, tokenizer = load(model, kv=spec or AUTO, tokenizer_config={"trust_remote_code": trust_remote_code or None})
    draft = load(draft_model, kv=spec or AUTO)[0] if draft_model else None
    if draft is not None:
        check_trims(lm, draft)
    speaks = is_first_rank()
    if verbose and speaks:
        print(report(lm), file=sys.stderr)
    caches, cached, started = None, 0, time.perf_counter()
    if prompt_cache:
        from .cache import first_token, resume

        caches, tokens = resume(prompt_cache, lm, tokenizer, model, text)
        cached = max(c.size() for c in caches)
    else:
        tokens = encode_prompt(tokenizer, text, system=system_prompt, raw=ignore_chat_template)
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
    )
    check_context(request)
    if speaks and (line := advice(lm, spec)):
        print(line, file=sys.stderr)
    on_text = (lambda piece: print(piece, end="", flush=True)) if speaks else None
    models, length = [m for m in (lm, draft) if m is not None], cached + len(tokens) + max_tokens
    with wired(lambda: needs(models, length, prefill_step_size), wiring):
        result = run(lm, tokenizer, request, on_text=on_text)
    if not speaks:
        return
    print(flush=True)
    if writer:
        with writer:
            writer.write(result.text)
    times: dict[str, float] = {}
    line = result.summary()
    if prompt_cache:
        line, times = first_token(result, ready, cached)
    print(line, file=sys.stderr)
    if as_json:
        print(json.dumps({"model": model, "kv": result.kv_spec, **times, **result.as_dict()}))


def read_prompt(argument: str | None, option: str | None, file: Path | None) -> str:
    """The prompt from the one place where it was given. Raises UserError for none, several, or an empty one."""
    given = [p for p in (argument, option, file) if p is not None]
    if len(given) > 1:
        raise UserError("give the prompt once: as an argument, with --prompt, or with --prompt-file")
    if file is not None:
        try:
            text = file.read_text()
        except OSError as error:
            raise UserError(f"can't read the prompt file {str(file)!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt file {str(file)!r} is not UTF-8 text ({error.reason})") from error
    elif given == ["-"] or not given:
        if not given and sys.stdin.isatty():
            raise UserError("no prompt: give it as an argument, with --prompt-file FILE, or pipe it to standard input")
        text = sys.stdin.read()
    else:
        text = str(given[0])
    if not text.strip():
        raise UserError("the prompt is empty")
    return text


def open_output(path: Path | None):
    """Open the output before any work is done, so that a bad path costs nothing."""
    if path is None:
        return None
    try:
        return path.open("w")
    except OSError as error:
        raise UserError(f"can't write the output {str(path)!r}: {error.strerror}") from error

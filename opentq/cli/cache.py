"""`opentq cache`: process a long text once, keep its compressed cache in a file, and begin after it from then on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import text as texts
from ..errors import UserError
from . import options

if TYPE_CHECKING:
    from ..caches.disk import Manifest
    from ..hosts.generation import Result

app = typer.Typer(
    name="cache",
    help="Prompt caches on disk: a long text is processed once, later prompts begin after it.",
    no_args_is_help=True,
)

JOIN = "\n\n"
"""What stands between the cached text and a question."""


@app.command()
def build(
    model: options.ModelArgument = "",
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to write the cache.")] = None,
    model_option: options.ModelOption = "",
    text_file: Annotated[Path | None, typer.Option("--text-file", help="The text; '-' reads standard input.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="The text itself.")] = None,
    kv: options.KV = None,
    system_prompt: options.SystemPrompt = None,
    ignore_chat_template: Annotated[bool, typer.Option(help="Take the text as it is, without the template.")] = False,
    prefill_step_size: options.PrefillStep = 2048,
    max_context: options.MaxContext = None,
) -> None:
    """Process a text with a model and write its cache to a file: opentq cache build MODEL FILE."""
    import time

    if model_option and model and file is None:
        model, file = "", Path(model)  # the only argument is the file where --model names the model
    path = options.one_model(model, model_option)
    if file is None:
        raise UserError("no file given: opentq cache build MODEL FILE")
    options.check_output(file, "FILE")
    content = _read(text, text_file)
    spec = options.spec_for(path, kv)
    import mlx.core as mx

    from ..caches import disk
    from ..evaluate.forward import prefill
    from ..hosts.hooks import installed
    from ..hosts.mlx_lm.load import load, make_cache
    from ..memory.loaded import model_context
    from ..spec.recommended import advice

    lm, tokenizer = load(path, kv=spec)
    record = installed(lm)
    prompt = {"text": content, "system": system_prompt, "raw": ignore_chat_template}
    tokens = shared_tokens(tokenizer, prompt, max_context or model_context(lm))
    if line := advice(lm, spec):
        print(line, file=sys.stderr)
    caches = make_cache(lm)
    start = time.perf_counter()
    prefill(lm, mx.array([tokens]), caches, prefill_step_size, lambda _: mx.clear_cache())
    seconds = time.perf_counter() - start
    manifest = disk.save(
        file,
        caches,
        tokens,
        model=path,
        revision=revision(path),
        template=disk.template_hash(tokenizer),
        spec=str(record.spec) if record else "off",
        prompt=prompt,
    )
    print(f"{describe(manifest, file)}; processed in {seconds:.2f} s", file=sys.stderr)


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `opentq cache build` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check a cache file and say what it holds."""
    from ..caches import disk

    manifest, size = disk.read_manifest(file)
    if as_json:
        record = {"file": str(file), "model": manifest.model, "revision": manifest.revision, "spec": manifest.spec}
        print(json.dumps({**record, "tokens": len(manifest.tokens), "bytes": size, "version": disk.VERSION}))
        return
    print(describe(manifest, file))
    print(f"  model     {manifest.model} ({manifest.revision[:12] or 'no fingerprint'})")
    print(f"  KV        {manifest.spec}, {size / max(1, len(manifest.tokens)):.0f} bytes per token")
    print(f"  begins    {manifest.prompt.get('text', '')[:60]!r}")


@app.command()
def use(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `opentq cache build` wrote.")],
    question: Annotated[str, typer.Option("--prompt", "-p", help="What follows the cached text.")] = "",
    model: Annotated[str, typer.Option("--model", help="The model, if it is not where it was.")] = "",
    max_tokens: options.MaxTokens = 256,
    max_context: options.MaxContext = None,
    temp: options.Temp = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document as the last line.")] = False,
) -> None:
    """Ask something about a cached text: only the question is processed."""
    import time

    from ..caches import disk
    from ..hosts.generation import Request
    from ..hosts.mlx_lm.generate import check_context, run
    from ..hosts.mlx_lm.load import load
    from ..memory.loaded import model_context

    manifest, _ = disk.read_manifest(file)
    lm, tokenizer = load(model or manifest.model, kv=manifest.spec)
    start = time.perf_counter()
    context = max_context or model_context(lm)
    caches, rest = resume(file, lm, tokenizer, model or manifest.model, question, context)
    ready = time.perf_counter() - start
    request = Request(rest, max_tokens=max_tokens, temp=temp, caches=caches, max_context=max_context)
    request.cached = max(c.size() for c in caches)
    check_context(request, context)
    result = run(lm, tokenizer, request, on_text=lambda text: print(text, end="", flush=True))
    print()
    line, times = first_token(result, ready, len(manifest.tokens))
    print(line, file=sys.stderr)
    if as_json:
        print(json.dumps({"model": manifest.model, **times, **result.as_dict()}))


def first_token(result: Result, ready: float, cached: int) -> tuple[str, dict[str, float]]:
    """A run that began after a file, as a line for people and as fields: `ready` seconds to read `cached` tokens."""
    first = ready + result.prompt_seconds
    line = f"{result.summary()} · {cached} tokens read from the file in {ready:.2f} s, first token after {first:.2f} s"
    times = {"cache_seconds": round(ready, 4), "first_token_seconds": round(first, 4)}
    return line, {"cached_tokens": cached, **times}


def resume(
    file: Path, model: Any, tokenizer: Any, path: str, question: str, limit: int = 0
) -> tuple[list[Any], list[int]]:
    """Caches filled from `file`, and the tokens of `cached text + question` that are left to process.

    Args:
        question: what follows the cached text; it may begin with the whole of that text.
        path: where `model` was loaded from, to check that the file belongs to it.
        limit: tokens that the context has room for; 0: any number.

    Raises CacheFileError when the file is not for this model, spec and template; UserError for too long a prompt.
    """
    from ..caches import disk
    from ..hosts.hooks import installed
    from ..hosts.mlx_lm.generate import encode_prompt
    from ..hosts.mlx_lm.load import make_cache

    record = installed(model)
    cached = disk.load(
        file,
        into=make_cache(model),
        revision=revision(path),
        template=disk.template_hash(tokenizer),
        spec=str(record.spec) if record else "off",
    )
    prompt = cached.manifest.prompt
    # A question may bring the text along, as in a run without the file.
    whole = question if question.startswith(prompt["text"]) else prompt["text"] + (question and JOIN + question)
    return cached.fit(encode_prompt(tokenizer, whole, prompt["system"], prompt["raw"], limit))


def shared_tokens(tokenizer: Any, prompt: dict[str, Any], limit: int) -> list[int]:
    """The tokens that every prompt beginning with this text has: the last ones may depend on what follows.

    Raises UserError for a text of more than `limit` tokens (0: any number).
    """
    from ..hosts.mlx_lm.generate import encode_prompt

    variants = [
        encode_prompt(tokenizer, prompt["text"] + JOIN + ending, prompt["system"], prompt["raw"], limit)
        for ending in ("What?", "7 names", "(and so on)")
    ]
    shared = []
    for column in zip(*variants):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    if not shared:
        raise UserError("the text has no tokens")
    return shared


def revision(model: str) -> str:
    """The fingerprint of a model folder, or of the local copy of a repository."""
    from ..hosts.mlx_lm.load import model_folder
    from ..records import fingerprint

    return fingerprint(model_folder(model))


def describe(manifest: Manifest, file: Path) -> str:
    size = file.stat().st_size
    return f"{file}: {len(manifest.tokens)} tokens as {manifest.spec}, {size / 1e6:.2f} MB"


def _read(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise UserError("give the text once: with --text-file FILE ('-' for standard input) or --text TEXT")
    text = texts.read(file, "the text") if file is not None else texts.check(text or "", "--text")
    if not text.strip():
        raise UserError("the text is empty")
    return text

"""`opentq demo`: a small trained model reads a real document of over 7,000 tokens and answers a question, twice.

Once with mlx-lm's own cache, once with a compressed one. The table says what each cost and how far they agree.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import ModelOption, one_model

if TYPE_CHECKING:
    from ..hosts.generation import Result

DOCUMENT = "statistics.py"  # kept from the small models in training
DOCUMENT_TOKENS = 7700
TEACHER_TOKENS = 256
NAME, CODE, DEPTH = "Babilu", "48213", 0.35
OTHERS = (("Tomige", "90317", 0.1), ("Kesora", "15562", 0.6), ("Rudani", "73048", 0.85))


def demo(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for `opentq generate`; default: models/tiny-llama.")
    ] = "",
    model_option: ModelOption = "",
    kv: Annotated[
        str, typer.Option("--kv", metavar="SPEC", help="KV spec or recipe to compare with mlx-lm's own cache.")
    ] = "int4",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document as the last line.")] = False,
) -> None:
    """Read a long document, find the fact in it, and compare the caches."""
    from rich.console import Console
    from rich.table import Table

    from ..hosts.generation import human_bytes
    from ..spec.text import asked

    spec = asked(kv)
    if spec is None:
        raise UserError("the demo compares a KV spec with mlx-lm's own cache: --kv off leaves nothing to compare")
    path = model if model == model_option else one_model(model, model_option)
    outcome = compare(path or str(find_model()), spec)
    table = Table(title=f"{outcome['document']} · {outcome['prompt_tokens']} tokens · {outcome['question']}")
    for column in ("KV cache", "answer", "KV held", "of fp16", "peak", "prefill t/s", "decode t/s"):
        table.add_column(column, justify="left" if column in ("KV cache", "answer") else "right", no_wrap=True)
    for row in outcome["rows"]:
        table.add_row(
            row["kv"],
            row["answer"],
            human_bytes(row["kv_bytes"]),
            f"{row['kv_bytes'] / row['fp16_bytes']:.3f}x",
            human_bytes(row["peak_bytes"]),
            f"{row['prompt_tps']:.0f}",
            f"{row['generation_tps']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"needle {'found' if outcome['found'] else 'NOT FOUND'} with {outcome['kv']} "
        f"(expected {outcome['expected']}) · "
        f"top-1 agreement {outcome['answer_agreement']:.1%} over the answer, {outcome['teacher_agreement']:.1%} over "
        f"{TEACHER_TOKENS} teacher-forced tokens"
    )
    if as_json:
        print(json.dumps(outcome))
    if not outcome["found"]:
        raise UserError(f"the fact was not found with --kv {outcome['kv']}")


def find_model() -> Path:
    """`models/tiny-llama` in this folder or beside the package. Raises UserError."""
    places = [Path.cwd(), Path(__file__).resolve().parents[2]]
    for place in places:
        folder = place / "models" / "tiny-llama"
        if folder.is_dir():
            return folder
    raise UserError("models/tiny-llama was not found: run `opentq demo` in a clone of the repository, or give --model")


def compare(path: str, spec: Any) -> dict[str, Any]:
    """Both runs and their agreement, as one record."""
    from ..hosts import hooks
    from ..hosts.mlx_lm.load import load

    model, tokenizer = load(path)
    tokens, question = build_prompt(tokenizer)
    native, native_logits = _run(model, tokenizer, tokens)
    hooks.compress(model, spec)
    record = hooks.installed(model)
    assert record is not None
    spec = str(record.spec)
    ours, our_logits = _run(model, tokenizer, tokens)
    fp16 = ours.kv_fp16_bytes
    agree = [int(a == b) for a, b in zip(native.tokens, ours.tokens)]
    length = max(len(native.tokens), len(ours.tokens), 1)
    return {
        "model": path,
        "kv": spec,
        "document": DOCUMENT,
        "prompt_tokens": len(tokens),
        "question": question,
        "expected": CODE,
        "found": CODE in ours.text,
        "answer_agreement": sum(agree) / length,
        "teacher_agreement": sum(a == b for a, b in zip(native_logits, our_logits)) / TEACHER_TOKENS,
        "rows": [_row("mlx-lm", native, fp16), _row(spec, ours, fp16)],
    }


def build_prompt(tokenizer: Any) -> tuple[list[int], str]:
    """The document with the fact planted and the question asked, as one user message."""
    from ..hosts.mlx_lm.generate import encode_prompt

    source = Path(sysconfig.get_paths()["stdlib"]) / DOCUMENT
    try:
        text = source.read_text()
    except OSError as error:
        raise UserError(f"the demo's document {source} can't be read: {error.strerror}") from error
    text = head(tokenizer, text, DOCUMENT_TOKENS)
    for name, code, depth in sorted([(NAME, CODE, DEPTH), *OTHERS], key=lambda fact: -fact[2]):
        cut = text.index("\n", int(len(text) * depth)) + 1
        text = f"{text[:cut]}# The secret code of {name} is {code}.\n{text[cut:]}"
    question = f"What is the secret code of {NAME}?"
    return encode_prompt(tokenizer, f"{text.rstrip()}\n\n{question}"), question


def head(tokenizer: Any, text: str, tokens: int) -> str:
    """The lines from the start of `text` that take at most `tokens` tokens."""
    kept: list[str] = []
    for line in text.splitlines(keepends=True):
        tokens -= len(tokenizer.encode(line, add_special_tokens=False))
        if tokens < 0:
            break
        kept.append(line)
    return "".join(kept)


def _run(model: Any, tokenizer: Any, tokens: list[int]) -> tuple[Result, list[int]]:
    """The answer, and the most likely next token at each of the document's last, teacher-forced tokens."""
    import mlx.core as mx

    from ..hosts.generation import Request
    from ..hosts.mlx_lm.generate import run
    from ..hosts.mlx_lm.load import make_cache

    caches = make_cache(model)
    result = run(model, tokenizer, Request(tokens, max_tokens=16, prefill_step_size=256, caches=caches))
    # Back to where 256 tokens of the document are left, and on from there with the true tokens.
    start = len(tokens) - 32 - TEACHER_TOKENS
    for cache in caches:
        cache.trim(cache.offset - start)
    follow = mx.array(tokens[start : start + TEACHER_TOKENS])
    choices: list[int] = []
    for step in range(0, TEACHER_TOKENS, 32):
        logits = model(follow[None, step : step + 32], cache=caches)
        choices += logits[0].argmax(-1).tolist()
    return result, choices


def _row(name: str, result: Result, fp16_bytes: int) -> dict[str, Any]:
    return {
        "kv": name,
        "answer": result.text.strip(),
        "kv_bytes": result.kv_bytes,
        "fp16_bytes": fp16_bytes,
        "peak_bytes": result.peak_bytes,
        "prompt_tps": result.prompt_tps,
        "generation_tps": result.generation_tps,
    }

"""`opentq calibrate`: where a model's queries look, as a recipe that `--kv` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .options import ModelArgument, ModelOption, PrefillStep, check_output, one_model
from .plan import parse_count


def calibrate(
    model: ModelArgument = "",
    model_option: ModelOption = "",
    kv: Annotated[
        str | None, typer.Option("--kv", metavar="SPEC", help="KV spec of the recipe; default: recommended.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Tokens to read, such as 8k.")] = "2k",
    context: Annotated[str, typer.Option(help="Tokens of each text.")] = "1k",
    text: Annotated[Path | None, typer.Option(help="Text file or folder to read instead of Python's library.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which texts.")] = 0,
    prefill_step_size: PrefillStep = 512,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe file.")] = Path("calibrated.toml"),
) -> None:
    """Find out in which channels a model's queries look, so that a long cache can be read page by page."""
    from ..spec.text import AUTO, asked

    name = one_model(model, model_option)
    spec = asked(kv)
    if spec is None:
        raise UserError("--kv off has nothing to calibrate: name the spec of the recipe, or leave --kv out")
    if output.suffix != ".toml":
        raise UserError(f"--output {str(output)!r} must end in .toml, because a recipe is written")
    check_output(output)
    from ..evaluate import corpus as corpora
    from ..hosts.mlx_lm.load import load
    from ..memory.loaded import check_length
    from ..spec.recommended import recommend
    from ..tuning.calibrate import Calibrator, Reading, texts
    from .evaluate import check_tokenizer, progress

    reading = Reading(parse_count(tokens), parse_count(context), prefill_step_size, seed)
    check_tokenizer(name)
    corpus = corpora.standard_library(corpora.CALIBRATION) if text is None else corpora.load(text)
    loaded, tokenizer = load(name)
    check_length(loaded, reading.context)
    rows = texts(corpus, tokenizer, reading)
    calibrator = Calibrator(
        loaded, recommend(loaded).spec if spec == AUTO else spec, reading, output.with_suffix(".partial")
    )
    with progress("calibrate", sum(map(len, rows))) as tick:
        calibrator.run(rows, f"{corpus.name} {corpus.digest}", tick)
    calibrator.save(
        output, {"model": name, "text": corpus.name, "text_digest": corpus.digest, "context": max(map(len, rows))}
    )
    calibrated = len(calibrator.places)
    typer.echo(
        f"recipe: {output}; {calibrator.tokens} tokens, {calibrated} of {len(calibrator.layers)} layers calibrated"
    )
    typer.echo(f"use it with --kv {output}")

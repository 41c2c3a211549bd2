"""`opentq plan`: what fits, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .options import ModelOption, PrefillStep, Specs, check_output, one_model


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a .gguf file, a config.json, a repository, or a shape such as llama-3.1-70b.",
        ),
    ] = "",
    model_option: ModelOption = "",
    kv: Specs = "off,k8v4,int4,tq5/tq3:nc",
    ctx: Annotated[
        str, typer.Option(help="Contexts such as 16k,128k; default: doublings up to the model's limit.")
    ] = "",
    memory: Annotated[str, typer.Option(help="Memory of another machine, such as 64GB; default: this one.")] = "",
    device: Annotated[str, typer.Option(help="With --memory: mac, gpu or cpu.")] = "mac",
    weights: Annotated[str, typer.Option(help="Weights as 4bit, 8bit or bf16; default: as the model says.")] = "",
    prefill_step_size: PrefillStep = 2048,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against context to this .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Plan memory: weights, cache, prefill and reserve for each KV spec and context, and the largest context that fits.

    Needs no weights and, for known shapes, no network.
    """
    from ..hosts.mlx_lm.deferred import defer_mlx_lm

    defer_mlx_lm()
    from ..memory.forecast import forecast
    from ..spec.text import specs

    check_output(plot, "--plot")
    result = forecast(
        one_model(model, model_option),
        specs(kv),
        contexts=counts(ctx) if ctx else [],
        memory=memory,
        device=device,
        weights=weights,
        step=prefill_step_size,
    )
    if plot:
        from ..memory.plot import draw

        draw(result, plot)
    typer.echo(json.dumps(result.record()) if as_json else result.table())


def counts(text: str) -> list[int]:
    """`8k,32k` -> [8192, 32768]."""
    return [parse_count(part) for part in text.split(",")]


def parse_count(text: str) -> int:
    """`128k` -> 131072, `1m` -> 1048576, `500` -> 500."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text.lower())
    if not found or float(found[1]) == 0:
        raise UserError(f"{text!r} is not a number of tokens: write it like 8192, 8k or 1m")
    return int(float(found[1]) * {"": 1, "k": 1024, "m": 1 << 20}[found[2]])

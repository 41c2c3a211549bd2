"""`opentq plan`: what fits, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..memory.answer import Answer


def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json, repository, or shape such as llama-3.1-70b.")],
    kv: Annotated[str, typer.Option(help="KV specs, comma-separated.")] = "f16,k8v4,int4,tq5/tq3:nc",
    ctx: Annotated[
        str, typer.Option(help="Contexts such as 16k,128k; default: doublings up to the model's limit.")
    ] = "",
    memory: Annotated[str, typer.Option(help="Memory of another machine, such as 64GB; default: this one.")] = "",
    device: Annotated[str, typer.Option(help="With --memory: mac, gpu or cpu.")] = "mac",
    weights: Annotated[str, typer.Option(help="Weights as 4bit, 8bit or bf16; default: as the model says.")] = "",
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Tokens per prefill chunk.")] = 2048,
    plot: Annotated[Path | None, typer.Option(help="Draw memory against context to this .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Plan memory: weights, cache, prefill and reserve for each KV spec and context, and the largest context that fits.

    Needs no weights and, for known shapes, no network.
    """
    from ..hosts.mlx_lm.deferred import defer_mlx_lm

    defer_mlx_lm()
    from ..memory.answer import answer

    result = answer(
        model,
        kv=split_list(kv),
        contexts=[parse_count(c) for c in ctx.split(",") if c],
        memory=memory,
        device=device,
        weights=weights,
        step=prefill_step_size,
    )
    if plot:
        _draw(result, plot)
    typer.echo(json.dumps(result.record()) if as_json else result.table())


def _draw(result: Answer, path: Path) -> None:
    from ..memory.plot import draw

    draw(result, path)


def split_list(text: str) -> list[str]:
    """Comma-separated specs; the comma inside `skip=first1,last1` separates nothing."""
    return [part for part in re.split(r",(?!(?:first|last)\d)", text) if part]


def parse_count(text: str) -> int:
    """`128k` -> 131072, `1m` -> 1048576, `500` -> 500."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text.lower())
    if not found or float(found[1]) == 0:
        raise UserError(f"{text!r} is not a number of tokens: write it like 8192, 8k or 1m")
    return int(float(found[1]) * {"": 1, "k": 1024, "m": 1 << 20}[found[2]])

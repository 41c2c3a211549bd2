"""`opentq bench kernel | model | long | report`: llama-bench's grammar with KV formats as the axis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .plan import parse_count, split_list

bench = typer.Typer(help="Measure attention kernels and whole models; every row is a record.", no_args_is_help=True)

Output = Annotated[str, typer.Option("--output", "-o", help="Standard output: md, csv, json or jsonl.")]
Results = Annotated[Path | None, typer.Option("--results", help="Append the records to this JSONL file.")]
KV = Annotated[str, typer.Option("--kv", help="KV specs, comma-separated; f16 in `model` is mlx-lm's own cache.")]


@bench.command()
def kernel(
    shape: Annotated[str, typer.Option(help="Query heads, KV heads, head dim.")] = "64,8,128",
    ctx: Annotated[str, typer.Option("--ctx", help="Contexts, such as 1k,8k,32k,128k.")] = "1k,8k,32k",
    kv: KV = "f16,int4,k8v4",
    against: Annotated[str, typer.Option(help="Rivals: mlx, mlx-lm, llama.cpp, ort.")] = "",
    windows: Annotated[int, typer.Option(min=2, help="Timed windows per arm.")] = 7,
    warm: Annotated[float, typer.Option(min=0, help="Seconds of warm-up per arm.")] = 1.0,
    window: Annotated[float, typer.Option(min=0, help="Least seconds per window.")] = 0.25,
    budget: Annotated[float, typer.Option(min=0, help="Seconds an arm may take; slower ones are timed once.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed of the random vectors.")] = 0,
    output: Output = "md",
    results: Results = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find the fastest Metal variant and keep it; no table.")] = False,
) -> None:
    """One layer's attention of one query token: time, bandwidth, error against float64, memory."""
    if tune:
        from ..bench import metal_tune

        for line in metal_tune.tune(windows, warm, window):
            typer.echo(line)
        return
    from ..bench import kernel as kernels

    sizes = _numbers(shape, "--shape")
    contexts = [parse_count(c) for c in ctx.split(",")]
    rivals = [a for a in against.split(",") if a]
    _emit(kernels.bench(sizes, contexts, split_list(kv), rivals, windows, warm, window, seed, budget), output, results)


@bench.command()
def model(
    model: Annotated[str, typer.Argument(help="Model folder or .gguf file, or a shape such as llama-3.1-8b.")],
    prompts: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt lengths; 0 skips.")] = "512",
    generates: Annotated[str, typer.Option("-n", "--n-gen", help="Generation lengths; 0 skips.")] = "128",
    depths: Annotated[str, typer.Option("-d", "--n-depth", help="Depths, such as 0,8k,32k.")] = "0",
    kv: KV = "f16,int4",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Timed repetitions.")] = 5,
    fill: Annotated[str, typer.Option(help="How caches get to a depth: prefill, or random vectors.")] = "",
    weights: Annotated[str, typer.Option(help="random-4bit or random-f16; for shapes.")] = "",
    layers: Annotated[int, typer.Option(min=0, help="With random weights: only so many layers; 0 is all.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Sequences generated as one batch; skips prompts.")] = 1,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Tokens per prefill chunk.")] = 2048,
    memory_limit: Annotated[str, typer.Option(help="Stop an arm that needs more, such as 64GB.")] = "",
    against: Annotated[str, typer.Option(help="llama.cpp: the same .gguf file there, f16, q8_0 and q4_0.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    output: Output = "md",
    results: Results = None,
) -> None:
    """A whole model: tokens per second of prompt and generation at depth, memory, ratio to f16."""
    from ..bench import model as models
    from ..bench.build import build
    from ..bench.rivals import llama_cpp_model
    from ..memory.device import parse_memory

    if against not in ("", "llama.cpp"):
        raise UserError(f"--against {against!r} is not known for whole models: llama.cpp is")
    if against and (parallel > 1 or weights):
        raise UserError("--against llama.cpp runs one sequence of a file: leave --parallel and --weights out")
    rival = llama_cpp_model.check(model) if against else None
    built = build(model, weights, layers, seed)
    limit = parse_memory(memory_limit) if memory_limit else 0
    records = models.bench(
        built,
        split_list(kv),
        _counts(depths),
        [n for n in _counts(prompts) if n],
        [n for n in _counts(generates) if n],
        repetitions,
        fill or ("prefill" if built.tokenizer else "random"),
        prefill_step_size,
        limit,
        parallel,
        rival,
    )
    _emit(records, output, results)


@bench.command("long")
def long_context(
    model: Annotated[str, typer.Argument(help="Model folder, or a shape such as llama-3.1-8b.")],
    arms: Annotated[str, typer.Option(help="native, mlx4 (mlx-lm --kv-bits 4), any KV spec.")] = "native,mlx4,int4",
    start: Annotated[str, typer.Option(help="First context; it doubles.")] = "1k",
    stop: Annotated[str, typer.Option(help="Last context; default: the model's limit.")] = "",
    memory_limit: Annotated[str, typer.Option(help="End an arm that needs more, such as 64GB.")] = "",
    max_seconds: Annotated[float, typer.Option(min=1, help="End an arm whose row takes longer.")] = 600.0,
    weights: Annotated[str, typer.Option(help="random-4bit or random-f16; for shapes.")] = "",
    layers: Annotated[int, typer.Option(min=0, help="With random weights: only so many layers; 0 is all.")] = 0,
    prefill_step_size: Annotated[int, typer.Option(min=1, help="Tokens per prefill chunk.")] = 2048,
    output: Output = "md",
    results: Results = None,
) -> None:
    """Double the context until memory, time or the model's limit ends it: speed, peak, and a needle at each length."""
    from ..bench import long
    from ..bench.build import build
    from ..memory.device import parse_memory

    built = build(model, weights, layers)
    limits = long.Limits(parse_memory(memory_limit) if memory_limit else 0, max_seconds, built.context_limit)
    last = parse_count(stop) if stop else built.context_limit or 1 << 20
    _emit(long.bench(built, split_list(arms), parse_count(start), last, limits, prefill_step_size), output, results)


@bench.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="JSONL files of records.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    export: Annotated[Path | None, typer.Option(help="Write every chart as PNG and SVG into this folder.")] = None,
) -> None:
    """One self-contained page from records: tables, charts, and the records behind each."""
    from .. import records as store
    from ..bench import report as reports

    records = store.read(files)
    output.write_text(reports.page(records))
    typer.echo(f"{output}: {len(records)} records")
    if export:
        typer.echo("\n".join(str(path) for path in reports.export(records, export)))


def _counts(text: str) -> list[int]:
    return [0 if part.strip() == "0" else parse_count(part) for part in text.split(",")]


def _emit(records: Iterable[dict[str, Any]], output: str, results: Path | None) -> None:
    """Store each record as it comes, and print the table at the end."""
    from .. import records as store
    from ..bench import table

    if output not in table.FORMATS:
        raise UserError(f"output format {output!r} is not known: use {', '.join(table.FORMATS)}")
    found = []
    for record in records:
        found.append(record)
        if results:
            store.append(results, [record])
        if output == "jsonl":
            typer.echo(table.render([record], "jsonl"))
    if output != "jsonl":
        typer.echo(table.render(found, output))


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text!r} must be whole numbers separated by commas") from error

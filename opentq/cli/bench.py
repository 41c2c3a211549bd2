"""`opentq bench kernel | model | long | report`: llama-bench's grammar with KV formats as the axis."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from . import options
from .plan import counts, parse_count

bench = typer.Typer(help="Measure attention kernels and whole models; every row is a record.", no_args_is_help=True)

Form = Annotated[str, typer.Option("--format", help="md, csv, json or jsonl.")]
BenchModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, or a shape such as llama-3.1-8b.")
]


@bench.command()
def kernel(
    shape: Annotated[str, typer.Option(help="Query heads, KV heads, head dim.")] = "64,8,128",
    ctx: Annotated[str, typer.Option("--ctx", help="Contexts, such as 1k,8k,32k,128k.")] = "1k,8k,32k",
    kv: Annotated[str, typer.Option("--kv", metavar="SPECS", help="KV specs, separated by commas.")] = "f16,int4,k8v4",
    against: Annotated[str, typer.Option(help="Rivals: mlx, mlx-lm, llama.cpp, ort.")] = "",
    windows: Annotated[int, typer.Option(min=2, help="Timed windows per arm.")] = 7,
    warm: Annotated[float, typer.Option(min=0, callback=options.finite, help="Seconds of warm-up per arm.")] = 1.0,
    window: Annotated[float, typer.Option(min=0, callback=options.finite, help="Least seconds per window.")] = 0.25,
    budget: Annotated[
        float, typer.Option(min=0, callback=options.finite, help="Seconds of an arm; slower ones run once.")
    ] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random vectors.")] = 0,
    form: Form = "md",
    output: options.Output = None,
    records: options.RecordsFile = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find the fastest Metal variant and keep it; no table.")] = False,
) -> None:
    """One layer's attention of one query token: time, bandwidth, error against float64, memory."""
    _check(form, output, records)
    from ..bench.timing import Windows

    timed = Windows(windows, warm, window)
    if tune:
        from ..bench import metal_tune

        for line in metal_tune.tune(timed):
            typer.echo(line)
        return
    from ..bench import kernel as kernels
    from ..spec.kv import KVSpec
    from ..spec.text import specs, split

    sizes = options.numbers(shape, "--shape", "whole numbers")
    contexts = counts(ctx)
    rivals = [a for a in against.split(",") if a]
    asked = [spec for spec in specs(kv) if isinstance(spec, KVSpec)]
    if len(asked) < len(split(kv)):
        raise UserError(
            "bench kernel times this package's kernels: --kv takes no 'off' and no recipe; see --against mlx"
        )
    found = kernels.bench(sizes, contexts, asked, rivals, timed, seed, budget)
    _emit(found, form, output, records)


@bench.command()
def model(
    model: BenchModel = "",
    model_option: options.ModelOption = "",
    prompts: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt lengths; 0 skips.")] = "512",
    generates: Annotated[str, typer.Option("-n", "--n-gen", help="Generation lengths; 0 skips.")] = "128",
    depths: Annotated[str, typer.Option("-d", "--n-depth", help="Depths, such as 0,8k,32k.")] = "0",
    kv: options.Specs = "off,int4",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="Timed repetitions.")] = 5,
    fill: Annotated[str, typer.Option(help="How caches get to a depth: prefill, or random vectors.")] = "",
    weights: Annotated[str, typer.Option(help="random-4bit or random-f16; for shapes.")] = "",
    layers: Annotated[int, typer.Option(min=0, help="With random weights: only so many layers; 0 is all.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Sequences generated as one batch; skips prompts.")] = 1,
    prefill_step_size: options.PrefillStep = 2048,
    memory_limit: Annotated[str, typer.Option(help="Stop an arm that needs more, such as 64GB.")] = "",
    against: Annotated[str, typer.Option(help="llama.cpp: the same .gguf file there, f16, q8_0 and q4_0.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
    form: Form = "md",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """A whole model: tokens per second of prompt and generation at depth, memory, ratio to mlx-lm's own cache."""
    from ..bench import model as models
    from ..bench.build import build
    from ..bench.rivals import llama_cpp_model
    from ..memory.device import parse_memory
    from ..spec.text import specs

    _check(form, output, records)
    asked = specs(kv)
    path = options.one_model(model, model_option)
    if against not in ("", "llama.cpp"):
        raise UserError(f"--against {against!r} is not known for whole models: llama.cpp is")
    if against and (parallel > 1 or weights):
        raise UserError("--against llama.cpp runs one sequence of a file: leave --parallel and --weights out")
    rival = llama_cpp_model.check(path) if against else None
    limit = parse_memory(memory_limit) if memory_limit else 0
    built = build(path, weights, layers, seed)
    found = models.bench(
        built,
        asked,
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
    _emit(found, form, output, records)


@bench.command("long")
def long_context(
    model: BenchModel = "",
    model_option: options.ModelOption = "",
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            "--arms",
            metavar="SPECS",
            help="KV specs, separated by commas; 'off' is mlx-lm's own cache, mlx4 its --kv-bits 4.",
        ),
    ] = "off,mlx4,int4",
    start: Annotated[str, typer.Option(help="First context; it doubles.")] = "1k",
    stop: Annotated[str, typer.Option(help="Last context; default: the model's limit.")] = "",
    memory_limit: Annotated[str, typer.Option(help="End an arm that needs more, such as 64GB.")] = "",
    max_seconds: Annotated[
        float, typer.Option(min=1, callback=options.finite, help="Most seconds of an arm's row.")
    ] = 600.0,
    weights: Annotated[str, typer.Option(help="random-4bit or random-f16; for shapes.")] = "",
    layers: Annotated[int, typer.Option(min=0, help="With random weights: only so many layers; 0 is all.")] = 0,
    prefill_step_size: options.PrefillStep = 2048,
    form: Form = "md",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """Double the context until memory, time or the model's limit ends it: speed, peak, and a needle at each length."""
    from ..bench import long
    from ..bench.build import build
    from ..evaluate.contenders import check
    from ..memory.device import parse_memory
    from ..spec.text import split

    _check(form, output, records)
    arms = [check(name) for name in split(kv)]
    built = build(options.one_model(model, model_option), weights, layers)
    limits = long.Bounds(parse_memory(memory_limit) if memory_limit else 0, max_seconds, built.context_limit)
    last = parse_count(stop) if stop else built.context_limit or 1 << 20
    found = long.bench(built, arms, parse_count(start), last, limits, prefill_step_size)
    _emit(found, form, output, records)


@bench.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="JSONL files of records.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    export: Annotated[Path | None, typer.Option(help="Write every chart as PNG and SVG into this folder.")] = None,
) -> None:
    """One self-contained page from records: tables, charts, and the records behind each."""
    from .. import records as store
    from ..bench import report as reports

    options.check_output(output)
    if export:
        store.make_folder(export, "--export")
    records = store.read(files)
    options.write(reports.page(records), output)
    typer.echo(f"{output}: {len(records)} records")
    if export:
        typer.echo("\n".join(str(path) for path in reports.export(records, export)))


def _counts(text: str) -> list[int]:
    return [0 if part.strip() == "0" else parse_count(part) for part in text.split(",")]


def _check(form: str, output: Path | None, records: Path | None) -> None:
    """Raise UserError, before any work, for a format or files that can't be."""
    from .. import records as store
    from ..bench import table

    if form not in table.FORMATS:
        raise UserError(f"--format {form!r} is not known: use {', '.join(table.FORMATS)}")
    options.check_output(output)
    if records:
        store.check(records)


def _emit(found: Iterable[dict[str, Any]], form: str, output: Path | None, records: Path | None) -> None:
    """Keep each record as it comes, and write the table at the end."""
    from .. import records as store
    from ..bench import table

    rows = []
    for record in found:
        rows.append(record)
        if records:
            store.append(records, [record])
        if form == "jsonl" and output is None:
            typer.echo(table.render([record], "jsonl"))
    if form != "jsonl" or output is not None:
        options.write(table.render(rows, form), output)

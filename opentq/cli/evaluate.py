"""`opentq eval`: what a compressed cache costs a model; tables out, records kept, runs resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options

if TYPE_CHECKING:
    from ..evaluate.evaluation import Evaluation
    from ..records import Record

app = typer.Typer(name="eval", help="Measure what a compressed KV cache costs a model.", no_args_is_help=True)

TOKENS = "numbers of tokens, such as 512,2048,"
SPECS = "int4,int4:norot,tq4,tq3,tq3p,polar4,qjl,k8v4"

Specs = Annotated[
    str,
    typer.Option(
        "--kv", metavar="SPECS", help="KV specs, separated by commas; also off, mlx4, mlx8 (mlx-lm's --kv-bits), q4_0."
    ),
]
Text = Annotated[
    Path | None, typer.Option("--text", help="Text to read: code or prose (Python's own), or a file or folder.")
]
Form = Annotated[str, typer.Option("--format", help="text, md or json.")]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="Keep decoded values in fp16: the same errors, fast without fused kernels.")
]
Texts = Annotated[int, typer.Option("--seed", min=0, help="Which texts.")]


@app.command()
def fidelity(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = SPECS,
    depths: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "512,2048,4096",
    window: Annotated[int, typer.Option(min=1, help="Tokens scored at each depth.")] = 128,
    step: Annotated[int, typer.Option(min=1, help="Tokens per teacher-forced step.")] = 16,
    sequences: Annotated[int, typer.Option(min=1, help="Texts, read as one batch.")] = 2,
    prefill_step_size: options.PrefillStep = 512,
    seed: Texts = 0,
    simulate: Simulate = False,
    text: Text = None,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """KL divergence, top-1 agreement and perplexity against the model's own cache."""
    from ..evaluate import contenders, show
    from ..evaluate import fidelity as task

    protocol = task.Protocol(
        options.numbers(depths, "--depths", TOKENS), window, step, sequences, prefill_step_size, seed, simulate
    )
    on = _prepare(options.one_model(model, model_option), kv, text, form, output, records, protocol.length)
    on = on._replace(simulated=contenders.slow(on.names, on.model))
    passes = len(on.names) + ("native" not in on.names)
    found = _run(on, task, protocol, passes * protocol.sequences * (protocol.length - 1))
    options.write(show.fidelity(found, form), output)


@app.command()
def needle(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = "off,int4,tq4,tq3",
    lengths: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "1024,4096",
    depths: Annotated[
        str, typer.Option(help="Depths of the fact from 0 to 1, separated by commas.")
    ] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(min=1, help="Needles per length and depth.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Needles read together.")] = 8,
    kind: Annotated[str, typer.Option(help="What is hidden: secret code, phone number or magic word.")] = "secret code",
    distractors: Annotated[int, typer.Option(min=0, help="Facts about other names in the text.")] = 0,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 24,
    plot: Annotated[Path | None, typer.Option(help="Draw the heat map to this PNG.")] = None,
    prefill_step_size: options.PrefillStep = 512,
    seed: Texts = 0,
    simulate: Simulate = False,
    text: Text = None,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """Find a planted fact in a long text, at every length and depth."""
    from ..evaluate import needle as task
    from ..evaluate import show
    from ..evaluate.plot import heat_map
    from ..plots import pyplot

    options.check_output(plot, "--plot")
    if plot is not None:
        pyplot()  # a missing matplotlib is reported now, not after the work
    whole = options.numbers(lengths, "--lengths", TOKENS)
    parts = options.numbers(depths, "--depths", "numbers from 0 to 1", float)
    grid = task.Grid(whole, parts, trials, kind, distractors, answer, prefill_step_size, seed, batch, simulate)
    on = _prepare(options.one_model(model, model_option), kv, text, form, output, records, max(whole))
    found = _run(on, task, grid, len(on.names) * sum(whole) * len(parts) * trials)
    options.write(show.needle(found, form), output)
    if plot is not None:
        heat_map(found, plot)


@app.command()
def generate(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = SPECS,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 2048,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, read as one batch.")] = 8,
    questions: Annotated[int, typer.Option(min=0, help="Exact-answer questions of each kind; 0 asks none.")] = 8,
    distractors: Annotated[int, typer.Option(min=0, help="Facts about other names in each question's text.")] = 8,
    prefill_step_size: options.PrefillStep = 512,
    seed: Texts = 0,
    text: Text = None,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """How long greedy generation agrees with the model's own cache, and exact answers."""
    from ..evaluate import agreement as task
    from ..evaluate import show

    job = task.Task(context, tokens, prompts, questions, distractors, prefill_step_size, seed)
    on = _prepare(options.one_model(model, model_option), kv, text, form, output, records, context + tokens)
    found = _run(on, task, job, (len(on.names) + 1) * prompts * (context + tokens))
    options.write(show.agreement(found, form), output)


@app.command()
def layers(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = "int4,tq4,tq3",
    context: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 2048,
    window: Annotated[int, typer.Option(min=1, help="Last tokens whose attention is looked at.")] = 32,
    sequences: Annotated[int, typer.Option(min=1, help="Texts, read as one batch.")] = 2,
    prefill_step_size: options.PrefillStep = 512,
    seed: Texts = 0,
    text: Text = None,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """Error of keys, values, logits and attention output per layer, and how it grows with depth."""
    from ..evaluate import layers as task
    from ..evaluate import show

    view = task.View(context, window, sequences, prefill_step_size, seed)
    on = _prepare(options.one_model(model, model_option), kv, text, form, output, records, context)
    rivals = [n for n in on.names if n in ("native", "q4_0", "q4_0:norot") or n.startswith("mlx")]
    if rivals:
        raise UserError(f"eval layers looks into this package's caches only: leave out {', '.join(rivals)}")
    found = _run(on, task, view, (len(on.names) + 1) * sequences * context)
    options.write(show.layers(found, form), output)


@app.command()
def use(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = SPECS,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 200,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 384,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts read together.")] = 8,
    seed: Texts = 0,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """Short prompts answered greedily: how many answers equal those with the model's own cache, and for how long."""
    from ..evaluate import show
    from ..evaluate import use as task

    job = task.Task(prompts, context, tokens, batch=batch, seed=seed)
    on = _prepare(options.one_model(model, model_option), kv, None, form, output, records, context + tokens)
    found = _run(on, task, job, (len(on.names) + 1) * prompts * (context + tokens))
    options.write(show.use(found, form), output)


@app.command()
def tasks(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = SPECS,
    questions: Annotated[int, typer.Option(min=1, help="Questions.")] = 200,
    context: Annotated[int, typer.Option(min=1, help="Tokens of documentation before each question.")] = 640,
    batch: Annotated[int, typer.Option(min=1, help="Questions read together.")] = 8,
    seed: Texts = 0,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """Multiple choice by log likelihood: accuracy, and the paired difference to the model's own cache."""
    from ..evaluate import show
    from ..evaluate import tasks as task

    job = task.Task(questions, context, batch=batch, seed=seed)
    on = _prepare(options.one_model(model, model_option), kv, None, form, output, records, context)
    found = _run(on, task, job, (len({*on.names, "native"})) * questions * context)
    options.write(show.tasks(found, form), output)


@app.command()
def harness(
    model: options.ModelArgument = "",
    model_option: options.ModelOption = "",
    kv: Specs = "off,int4",
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas.")] = "arc_easy",
    include: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Questions of each task; 0 is all.")] = 0,
    form: Form = "text",
    output: options.Output = None,
    records: options.RecordsFile = None,
) -> None:
    """Tasks of lm-evaluation-harness with a compressed cache (extra `eval`); their data is often downloaded."""
    from ..evaluate import harness as task
    from ..evaluate import show

    task.need()
    if include is not None and not include.is_dir():
        raise UserError(f"--include {str(include)!r} is not a folder")
    on = _prepare(options.one_model(model, model_option), kv, None, form, output, records, 1)
    found = task.run(on, [name.strip() for name in tasks.split(",")], limit, include)
    options.write(show.harness(found, form), output)


def _run(on: Evaluation, task: Any, job: Any, tokens: int) -> list[Record]:
    """The records of `task.run` for `job`, with a progress bar over about that many tokens."""
    with progress(task.__name__.rpartition(".")[2], tokens) as tick:
        return task.run(on._replace(tick=tick), job)


def _prepare(
    model: str, kv: str, text: Path | None, form: str, output: Path | None, records: Path | None, longest: int
) -> Evaluation:
    """Check everything that is cheap to check, then load the model, which must be made for `longest` tokens."""
    from ..evaluate.show import check_format

    check_format(form)
    options.check_output(output)
    check_tokenizer(model)
    from ..evaluate import contenders, corpus
    from ..evaluate.evaluation import Evaluation
    from ..memory.loaded import check_length
    from ..records import Records, model_name
    from ..spec.text import split

    names = [contenders.check(n) for n in split(kv)]
    if len(set(names)) < len(names):
        raise UserError(f"--kv {kv!r} names a spec twice")
    reading = corpus.load(text)
    kept = Records(records)
    from ..hosts.mlx_lm.load import load, model_folder

    loaded, tokenizer = load(model)
    check_length(loaded, longest)
    return Evaluation(loaded, model_name(model, model_folder(model)), tokenizer, reading, names, kept)


def check_tokenizer(model: str) -> None:
    """Raise UserError for a model folder that has no tokenizer: evaluation needs text."""
    folder = Path(model).expanduser()
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
    if folder.is_dir() and (folder / "config.json").exists() and not any((folder / n).exists() for n in names):
        raise UserError(
            f"model {model!r} has no tokenizer ({names[0]}), and evaluation needs text; add it to the folder"
        )


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` tokens on a terminal's stderr; silent elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)

"""`opentq lab run | ask | report`: sweeps that survive a kill, and what they taught."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Output, check_output, write

lab = typer.Typer(help="Run studies, ask their record, write their report.", no_args_is_help=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (TOML).")]
Folder = Annotated[Path, typer.Option("--folder", help="Where results and databases are.")]
RESULTS = Path("results/lab")


@lab.command("run")
def run_study(
    study: StudyFile,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes.")] = 2,
    folder: Folder = RESULTS,
) -> None:
    """Run what is left of a study; the same command goes on after a stop or a kill."""
    from ..lab import runner

    runner.run(study, workers, folder, typer.echo)


@lab.command("ask")
def ask_record(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Words, such as 'rotation on keys'.")],
    study: Annotated[Path, typer.Option("--study", help="Study file (TOML).")] = Path("dev/studies/seeds.toml"),
    limit: Annotated[int, typer.Option(min=1, help="Most answers.")] = 10,
    folder: Folder = RESULTS,
) -> None:
    """Search the record of a study: claims first, then insights, hypotheses and results."""
    from ..lab import record
    from ..lab.study import load

    name = load(study).name
    database = folder / f"{name}.record.db"
    record.index(folder / f"{name}.jsonl", database)
    for kind, entry, text in record.ask(database, question, limit):
        typer.echo(f"{kind:<10}  {entry}\n            {text}")


@lab.command("report")
def write_report(
    study: StudyFile,
    output: Output = None,
    folder: Folder = RESULTS,
) -> None:
    """A page with a verdict for every hypothesis, and the graph from hypotheses to claims."""
    from ..lab.page import markdown
    from ..lab.study import load

    check_output(output)
    read = load(study)
    text = markdown(read, folder / f"{read.name}.jsonl")
    write(text, output)
    if output is not None:
        typer.echo(f"{output}: {len(text.splitlines())} lines")

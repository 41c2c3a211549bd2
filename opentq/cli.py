"""The command line: one typer app. Commands import what they need inside, so that `opentq --help` answers at once."""

from __future__ import annotations

import sys

import typer

from .bench.command import bench
from .caches.command import app as cache
from .chat.command import chat
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.generate import generate
from .errors import UserError
from .evaluate.command import app as evaluate
from .lab.command import lab
from .memory.command import plan
from .server.command import serve
from .tuning.command import tune

app = typer.Typer(
    name="opentq",
    help="Long-context language models in the memory you have: attention on a compressed KV cache, inside mlx-lm.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, which costs a third of the start-up
)

for command in (generate, chat, serve, plan, tune, demo, doctor):
    app.command()(command)
for group, name in ((bench, "bench"), (evaluate, "eval"), (cache, "cache"), (lab, "lab")):
    app.add_typer(group, name=name)


@app.callback()
def _root() -> None:
    """Commands share nothing but the program's name."""


def main() -> None:
    """Entry point: errors meant for people are one line on stderr and a non-zero exit code, never a traceback."""
    try:
        app()
    except UserError as error:
        sys.exit(_say(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _say(error: UserError) -> int:
    print(f"opentq: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()

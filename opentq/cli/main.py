"""The command line: one typer app. Commands import what they need inside, so that `opentq --help` answers at once."""

from __future__ import annotations

import resource
import signal
import sys
from typing import Any

import typer

from ..errors import UserError, explained
from .bench import bench
from .cache import app as cache
from .calibrate import calibrate
from .chat import chat
from .demo import demo
from .doctor import doctor
from .evaluate import app as evaluate
from .generate import generate
from .lab import lab
from .launch import launch
from .plan import plan
from .serve import serve
from .tune import tune

# typer has a click of its own, or uses the package: its base class is the right one either way.
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="opentq",
    help="Long-context language models in the memory you have: attention on a compressed KV cache, inside mlx-lm.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, which costs a third of the start-up
)

for command in (generate, chat, serve, launch, plan, tune, calibrate, demo, doctor):
    app.command()(command)
for group, name in ((bench, "bench"), (evaluate, "eval"), (cache, "cache"), (lab, "lab")):
    app.add_typer(group, name=name)


@app.callback()
def _root() -> None:
    """Commands share nothing but the program's name."""


def main() -> None:
    """Entry point: errors meant for people are one line on stderr and a non-zero exit code, never a traceback."""
    heed_signals()
    try:
        _check_files()
        code = app(standalone_mode=False)
        sys.exit(code if code != 130 else _say("stopped", 130))  # what typer makes of Ctrl-C
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(error.exit_code)
        sys.exit(_say(error.format_message(), error.exit_code))
    except UserError as error:
        sys.exit(_say(str(error), error.exit_code))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_say("stopped", 130))
    except (RuntimeError, OSError) as error:
        known = explained(error)
        if known is None:
            raise
        sys.exit(_say(str(known), known.exit_code))


def heed_signals() -> None:
    """Let SIGTERM end this process at once, also where whoever started it ignores or blocks signals: children inherit
    that, and a benchmark would run on for minutes.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _check_files() -> None:
    """mlx-lm sets the limit of open files to 4096 when it is imported, and fails where it may not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        raise UserError(f"this process may open {hard} files, and mlx-lm needs 4096: raise the limit (ulimit -Hn)")


def _say(message: str, code: int) -> int:
    print(f"opentq: {message}", file=sys.stderr)
    return code

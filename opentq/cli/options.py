"""Options that several commands take, with one name, one meaning and one check each.

MODEL is an argument everywhere (`--model` is the same), `--kv off` the host's own cache, `--format` a format and
`-o` a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..text import check

if TYPE_CHECKING:
    from ..spec.text import Asked

ARGUMENT = typer.Argument(metavar="MODEL", help="A folder, a .gguf file, or a Hugging Face repository.")
ModelArgument = Annotated[str, ARGUMENT]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help="The same, as an option.")]
KV = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="SPEC",
        help="KV spec: int4, k8v4:g64, f16, ... or a recipe; 'off': mlx-lm's own cache; default: recommended.",
    ),
]
KVBits = Annotated[int | None, typer.Option(help="mlx-lm's name: same as --kv intN.")]
KVGroupSize = Annotated[int | None, typer.Option(help="mlx-lm's name: same as --kv ...:gN.")]
Specs = Annotated[
    str, typer.Option("--kv", metavar="SPECS", help="KV specs, separated by commas; 'off' is mlx-lm's own cache.")
]
PrefillStep = Annotated[
    int, typer.Option("--prefill-step-size", min=1, help="Tokens per prefill step; smaller steps need less memory.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens to generate.")]
MaxContext = Annotated[
    int | None,
    typer.Option("--max-context", min=2, help="Most tokens of prompt and answer; default: the model's own."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the tokenizer's own code.")]
Wire = Annotated[
    str,
    typer.Option(
        "--wire", help="Macs: keep the plan's bytes in memory (wired): auto where it needs it, off, or a size."
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file; default: standard output.")]
RecordsFile = Annotated[
    Path | None,
    typer.Option("--records", "--results", help="JSONL file that keeps the records; `eval` and `tune` resume from it."),
]


def finite(value: float) -> float:
    """A callback for every option that is a float: not-a-number is within all bounds."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _text(value: str | None) -> str | None:
    return value and check(value, "--system-prompt")


SystemPrompt = Annotated[
    str | None, typer.Option("--system-prompt", callback=_text, help="System message for the chat template.")
]
Temp = Annotated[
    float,
    typer.Option("--temp", "--temperature", min=0, max=2, callback=finite, help="Sampling temperature; 0 is greedy."),
]
TopP = Annotated[float, typer.Option("--top-p", min=0, max=1, callback=finite, help="Nucleus sampling; 0 or 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k most likely; 0 is off.")]
MinP = Annotated[
    float,
    typer.Option("--min-p", min=0, max=1, callback=finite, help="Least probability relative to the best; 0 is off."),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Random seed.")]


def one_model(argument: str, option: str) -> str:
    """The model, given once. Raises UserError."""
    if argument and option and argument != option:
        raise UserError(f"give one model, not {argument!r} and --model {option!r}")
    if not (argument or option):
        raise UserError("no model given: name a folder, or a repository such as org/name")
    return argument or option


def spec_for(model: str, kv: str | None, kv_bits: int | None = None, kv_group_size: int | None = None) -> Asked:
    """The spec that is asked for, once the model's files were looked at.

    Where none is given that happens before MLX is imported, which compiles on its first day. Raises UserError.
    """
    from ..hosts.mlx_lm.names import check_folder, resolve

    if (kv, kv_bits, kv_group_size) == (None, None, None):
        check_folder(resolve(model))
    from ..spec.text import asked

    spec = asked(kv, kv_bits, kv_group_size)
    check_folder(resolve(model))
    return spec


def numbers(text: str, option: str, what: str, kind: Callable[[str], Any] = int) -> tuple[Any, ...]:
    """The numbers of an option. Raises UserError, which says `what` they must be."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text!r} must be {what} separated by commas") from error


def check_output(path: Path | None, option: str = "--output") -> None:
    """Raise UserError, before any work, when `path` can't become a regular file."""
    if path is None:
        return
    reason = ""
    if path.is_dir():
        reason = "it is a folder"
    elif path.exists() and not path.is_file():
        reason = "it is not a regular file"
    elif not path.parent.is_dir():
        reason = f"the folder {str(path.parent)!r} does not exist"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "permission denied"
    if reason:
        raise UserError(f"{option} {str(path)!r} can't be written: {reason}")


def write(text: str, path: Path | None) -> None:
    """Print, or write to the file that `-o` names. Raises UserError."""
    if path is None:
        typer.echo(text)
        return
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"--output {str(path)!r} can't be written: {error.strerror}") from error

"""Options that several commands take: one name, one help text each."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="Model folder or Hugging Face repository.")]
ModelArgument = Annotated[str, typer.Argument(help="Model folder or Hugging Face repository.")]
ModelAgain = Annotated[str, typer.Option("--model", help="The same, as an option.")]
KVOrOff = Annotated[
    str | None,
    typer.Option(help="KV spec: f16, int4, k8v4, ...; 'off': mlx-lm's cache; default: recommended for the model."),
]
KVBits = Annotated[int | None, typer.Option(help="mlx-lm's name: same as --kv intN.")]
KVGroupSize = Annotated[int | None, typer.Option(help="mlx-lm's name: same as --kv ...:gN.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow the tokenizer's own code.")]
Wire = Annotated[
    str,
    typer.Option(
        "--wire", help="Macs: keep the plan's bytes in memory (wired): auto where it needs it, off, or a size."
    ),
]

"""`opentq tune`: the smallest KV recipe for one model within a bound on quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .evaluate import Simulate
from .options import ModelArgument, ModelOption, RecordsFile, check_output, finite, one_model
from .plan import counts, parse_count


def tune(
    model: ModelArgument = "",
    model_option: ModelOption = "",
    max_kl: Annotated[float, typer.Option(min=0, callback=finite, help="Largest mean KL, nats per token.")] = 0.02,
    memory: Annotated[str, typer.Option(help="Weights, cache and reserve must stay within this, such as 64GB.")] = "",
    context: Annotated[str, typer.Option(help="Context for --memory, such as 128k.")] = "",
    min_speed: Annotated[float, typer.Option(min=0, callback=finite, help="Least decode tokens per second.")] = 0.0,
    depths: Annotated[str, typer.Option(help="Tokens of context before what is measured.")] = "1k",
    sequences: Annotated[int, typer.Option(min=1, help="Texts read together.")] = 4,
    window: Annotated[str, typer.Option(help="Sliding-window layers: native or compress.")] = "native",
    generations: Annotated[int, typer.Option(min=1, help="Most generations of eight recipes.")] = 8,
    simulate: Simulate = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe file.")] = Path("recipe.toml"),
    records: RecordsFile = None,
) -> None:
    """Find the smallest KV recipe, layer by layer, that keeps the model's predictions; `--kv recipe.toml` uses it."""
    name = one_model(model, model_option)
    check_output(output)
    if bool(memory) != bool(context):
        raise UserError("--memory and --context go together: how much memory, at which context")
    if max_kl <= 0:
        raise UserError(f"--max-kl {max_kl:g} must be above 0; 0.02 is strict, 0.1 is loose")
    if window not in ("native", "compress"):
        raise UserError(f"--window {window!r} is not known: use native or compress")
    from ..evaluate import corpus
    from ..evaluate.evaluation import Evaluation
    from ..evaluate.fidelity import Protocol
    from ..hosts.mlx_lm.load import load, model_folder
    from ..lab.store import need_optuna
    from ..memory.device import parse_memory
    from ..records import Records, model_name
    from ..spec.recipe import text
    from ..tuning.tune import Goal, Tuner

    need_optuna()
    goal = Goal(max_kl, parse_memory(memory) if memory else 0, parse_count(context) if context else 0, min_speed)
    protocol = Protocol(tuple(counts(depths)), 64, 16, sequences, simulate=simulate)
    kept = Records(records or Path("results/tune") / f"{Path(name).name}.jsonl")
    loaded, tokenizer = load(name)
    on = Evaluation(loaded, model_name(name, model_folder(name)), tokenizer, corpus.load(None), [], kept)
    winner = Tuner(on, goal, protocol, window, typer.echo).run(generations)
    against = f"{100 * winner.saving:.1f} % smaller than {winner.uniform}, the smallest uniform spec within the bound"
    if winner.saving <= 0:
        against = f"no recipe is smaller than {winner.uniform}, which is uniform"
    summary = (
        f"{winner.bits:.3f} bits per value, KL {winner.kl:.4f}, {winner.held_out['kl']:.4f} on held-out text; "
        f"needles {winner.held_out['needles']} (own cache {winner.held_out['needles_native']}); {against}"
    )
    evidence = {
        "model": name,
        "max_kl": max_kl,
        "bits": round(winner.bits, 4),
        "kl": winner.kl,
        **{f"held_out_{k}": v for k, v in winner.held_out.items()},
        "uniform": winner.uniform,
        "uniform_bits": round(winner.uniform_bits, 4),
        "saving": round(winner.saving, 4),
        "records": str(kept.path),
    }
    output.write_text(
        text(winner.layers, f"Found by opentq tune for {name}. Use it with --kv {output}\n{summary}", evidence)
    )
    typer.echo("\n".join(f"layer {i:>3}  {layer}" for i, layer in enumerate(winner.layers)))
    typer.echo(summary)
    typer.echo(f"recipe: {output}; evidence: {kept.path}")

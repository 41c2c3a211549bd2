"""`opentq doctor`: what is installed, what will serve, whether it works, and what is slower than it need be."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..contracts.check import Check
from ..errors import UserError


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    bench: Annotated[
        bool,
        typer.Option("--bench", help="Compile, verify and time every kernel on this device (minutes); keep records."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --bench: small sizes, to see that it works.")] = False,
    kv: Annotated[
        str, typer.Option("--kv", metavar="SPECS", help="With --bench: only these KV specs, separated by commas.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --bench: the JSONL file; default: named after the device."),
    ] = None,
) -> None:
    """Check this machine. Exits with 1 when something is wrong."""
    if bench:
        if as_json:
            raise UserError("--bench writes its records to a file: use --output instead of --json")
        from ..spec.text import split

        if not _bench(quick, split(kv) if kv else [], output):
            raise typer.Exit(1)
        return
    if quick or output or kv:
        raise UserError("--quick, --kv and --output belong to --bench")
    checks = examine()
    if as_json:
        print(json.dumps([asdict(c) for c in checks]))
    else:
        marks = {"ok": "ok   ", "slow": "slow ", "wrong": "WRONG"}
        for check in checks:
            print(f"{marks[check.state]} {check.name:<18} {check.detail}")
            if check.remedy:
                print(f"      {'':<18} -> {check.remedy}")
    if any(c.state == "wrong" for c in checks):
        raise typer.Exit(1)


def _bench(quick: bool, specs: list[str], output: Path | None) -> bool:
    """Examine the device, write every record at once, and say what came of it; whether nothing failed."""
    from .. import records as store
    from ..bench import device, table

    plan = device.QUICK if quick else device.FULL
    if output:
        store.check(output)
    path = output
    records: list[dict[str, Any]] = []
    for record in device.examine(plan.only(specs) if specs else plan):
        if path is None:
            path = Path(f"opentq-{_slug(record['device'])}-{record['date'][:10]}.jsonl")
        if not records:
            path.unlink(missing_ok=True)
            print(f"{record['device']}, kernels: {record['backend_kernels']}; records go to {path}")
        store.append(path, [record])
        records.append(record)
        if device.failed(record):
            print(f"FAILED {_case(record)}")
    for kind in ("conformance", "pack", "pages"):
        tried = [r for r in records if r["kind"] == kind]
        spent = sum(r.get("first_seconds", 0) - r.get("again_seconds", 0) for r in tried)
        compiled = f", compiling took {spent:.0f} s" if kind == "conformance" else ""
        print(f"{kind}: {sum(not device.failed(r) for r in tried)} of {len(tried)} passed{compiled}")
    print(table.render([r for r in records if r["kind"] == "kernel"], "md"))
    for r in records:
        if r["kind"] == "call":
            print(f"{r['what']} of {r['tokens']} tokens at {r['context']}, {r['kv']}: {r['ms']:.2f} ms")
    print(
        f"\n{path}: {len(records)} lines say what machine this is, which versions ran, which cases passed and how\n"
        "long they took; no names, no paths, no text. Nothing was sent. `opentq bench report FILE` draws it. Please\n"
        "send it in: by a pull request that puts it into results/community/, or attached to an issue."
    )
    return not any(device.failed(r) for r in records)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _case(record: dict[str, Any]) -> str:
    """What a failed record tried, and what went wrong, in one line."""
    names = ("kind", "by", "served_by", "variant", "kv", "codec", "shape", "dim", "length", "dtype", "window")
    what = ", ".join(str(record[n]) for n in names if record.get(n))
    if "failure" in record:
        return f"{what}: {record['failure'].splitlines()[0]}"
    errors = {n: f"{record[n]:.1e}" for n in ("max_error", "naive_error", "error") if n in record}
    return f"{what}: {errors}"


def examine() -> list[Check]:
    """Every check, in the order of the way of a token."""
    from ..attention import backends

    return [*_versions(), _device(), *_wired(), *backends.checks(), _seam(), *_conformance()]


def _versions() -> list[Check]:
    from importlib.metadata import version  # slow to import, and --help is to be quick

    checks = [Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for name in ("opentq", "mlx", "mlx-lm"):
        checks.append(Check(name, "ok", version(name)))
    return checks


def _device() -> Check:
    import mlx.core as mx

    name = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    return Check("device", "ok", f"{mx.default_device().type.name}: {name}")


def _wired() -> list[Check]:
    """Of a Mac, how much the GPU may use and what opentq wires; of others nothing."""
    from ..memory import device, wiring

    machine = device.here()
    if machine.kind != "mac":
        return []
    return [Check("wired limit", "ok", wiring.explain(machine, device.raised_limit()))]


def _seam() -> Check:
    """A random two-layer model, compressed: `compress` runs one token and counts the calls."""
    from ..hosts import hooks

    model = _probe_model()
    try:
        plans = hooks.compress(model, "int4")
    except (hooks.HookError, ValueError) as error:
        return Check("seam with mlx-lm", "wrong", str(error), "install 'mlx-lm>=0.32.2,<0.33'")
    served = {s.served_by for s in hooks.installed(model).stats.values()}  # type: ignore[union-attr]
    return Check("seam with mlx-lm", "ok", f"{len(plans)} of 2 layers compressed, attention by {', '.join(served)}")


def _conformance() -> list[Check]:
    """Short form of the test suite: every attention function against the fp32 reference."""
    import mlx.core as mx

    from ..attention import dispatch, reference
    from ..bench.device import attention

    worst: dict[str, float] = {}
    mx.random.seed(0)
    for spec in ("int8", "int4", "int3", "int2", "k8v4"):
        for heads, dim, length in ((8, 128, 1), (1, 64, 1), (4, 80, 3), (2, 128, 40)):
            args = attention(333, spec, (2 * heads, 2, dim), (length, "float16", 0))
            judge = reference.attend(args)
            for name, function in dispatch.candidates():
                out = function(args)
                if out is not None:
                    error = mx.linalg.norm(out.astype(mx.float32) - judge) / mx.linalg.norm(judge)
                    worst[name] = max(worst.get(name, 0.0), float(error.item()))  # type: ignore[arg-type]
    return [
        Check(f"conformance {name}", "ok" if error < 1e-2 else "wrong", f"largest relative error to fp32 {error:.1e}")
        for name, error in worst.items()
    ]


def _probe_model() -> Any:
    from ..bench.build import random_model
    from ..memory.shapes import NAMED

    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 32, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return random_model({**NAMED["llama-3.1-8b"], **sizes, **heads}, "random-f16")

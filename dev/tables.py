"""Tables made from `results/*.jsonl`: `python dev/tables.py` rewrites them, `--check` fails on stale ones.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a function of this file.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import community
import page_tables
import study_tables as study
from gpu import goals

sys.path.insert(0, str(Path(__file__).parents[1]))
from opentq.records import read
from tests.msl.chips import CHIPS

ROOT = Path(__file__).parents[1]


def records(name: str) -> list[dict[str, Any]]:
    file = ROOT / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def models(name: str) -> list[dict[str, Any]]:
    """Records of `opentq bench model`; older ones call mlx-lm's own cache f16."""
    own = [r["kv"] == "f16" and r["served_by"] == "mlx-lm" for r in records(name)]
    return [r | {"kv": "native"} if mine else r for r, mine in zip(records(name), own)]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    TABLES[function.__name__] = function
    return function


def latest(rows: list[dict[str, Any]], *keys: str) -> dict[tuple, dict[str, Any]]:
    """The last record of every combination of `keys`."""
    return {tuple(r[k] for k in keys): r for r in rows}


def machine(rows: list[dict[str, Any]]) -> str:
    """Where and when, for the line under a table."""
    last = rows[-1]
    return f"{last['device']}, mlx {last['versions']['mlx']}, {last['date'][:10]}"


@table
def headline() -> str:
    """models/tiny-llama at 8K tokens: memory and speed of every cache, in one run."""
    rows = [r for r in models("model-cpu") if r["depth"] == 8192 and r["tokens_per_s"]]
    if not rows:
        return "No record yet."
    found = latest(rows, "kv", "test")
    names = list(dict.fromkeys(r["kv"] for r in rows))
    tests = sorted({r["test"] for r in rows}, key=lambda test: (test[:2], "x" in test))
    base = {t: found[names[0], t]["tokens_per_s"] for t in tests}
    body = []
    for kv in names:
        mine = {t: found[kv, t] for t in tests}
        speeds = [f"{mine[t]['tokens_per_s']:.0f} ({mine[t]['tokens_per_s'] / base[t]:.2f}x)" for t in tests]
        held = mine[tests[0]]
        label = "mlx-lm's own (float32 on the CPU)" if kv == "native" else f"opentq `{kv}`"
        body.append([label, f"{held['kv_bytes'] / 1e6:.1f} MB", f"{held['peak_bytes'] / 1e6:.0f} MB", *speeds])
    units = [words(t) for t in tests]
    text = markdown(["KV cache, `tiny-llama` at 8,192 tokens", "KV held", "peak with weights", *units], body)
    threads = ", ".join(f"{words(t)} on {found[names[0], t]['threads']} threads" for t in tests)
    return f"{text}\n\n{machine(rows)}; {threads}; `opentq bench model`."


def words(test: str) -> str:
    """`pp512`, `tg32`, `tg32x8` in words."""
    kind, parallel = test[:2], test.partition("x")[2]
    return f"{'prefill' if kind == 'pp' else 'decode'} tokens/s" + (f", {parallel} sequences" if parallel else "")


@table
def metal() -> str:
    """Macs, from the files in results/community."""
    return community.table([read([file]) for file in sorted(community.FOLDER.glob("*.jsonl"))])


def counted() -> dict[tuple, dict[str, Any]]:
    return latest([r for r in records("metal-counts") if r["kind"] == "metal-count"], "kv", "gqa", "variant")


@table
def metal_counts() -> str:
    """Operations per KV element of both Metal decode kernels, every spec and GQA ratio."""
    found = counted()
    ratios = sorted({gqa for _, gqa, _ in found})
    body = []
    for kv in dict.fromkeys(kv for kv, _, _ in found):
        cells = []
        for gqa in ratios:
            rows = [found.get((kv, gqa, v)) for v in (("",) if kv == "mlx f16" else ("lanes", "matrix"))]
            cells.append(" / ".join(f"{r['per_token']['operations'] / r['dim']:.1f}" for r in rows if r))
        eight = next(r for (name, gqa, _), r in found.items() if (name, gqa) == (kv, 8))["per_token"]
        name = "MLX fp16 (`sdpa_vector`)" if kv == "mlx f16" else f"`{kv}`"
        body.append([name, f"{eight['unique']:.0f}", f"{eight['fetched'] / eight['unique']:.2f}", *cells])
    head = ["D 128, lanes / matrix", "bytes a token", "fetched / unique, GQA 8", *(f"GQA {g}" for g in ratios)]
    return markdown(head, body)


@table
def metal_times() -> str:
    """What the counts bound: one layer of 64 query and 8 KV heads at 128K tokens, on every chip."""
    found = counted()
    arms = [("mlx f16", ""), ("int4", "lanes"), ("int4", "matrix"), ("tq5/tq3:nc", "lanes"), ("tq5/tq3:nc", "matrix")]
    body = []
    for chip in CHIPS:
        cells = []
        for kv, variant in arms:
            memory, lanes = chip.bounds(found[kv, 8, variant]["per_token"], 131072, 8)
            cells.append(f"{max(memory, lanes):.2f} ({'lanes' if lanes > memory else 'memory'})")
        body.append([chip.name, f"{chip.bandwidth}", f"{chip.lane_operations / 1e12:.1f}", *cells])
    names = ["MLX fp16" if kv == "mlx f16" else f"`{kv}` {variant}" for kv, variant in arms]
    return markdown(["lower bounds, ms", "GB/s", "T lane ops/s", *names], body)


@table
def peaks() -> str:
    """models/tiny-llama: peak memory of one prefill chunk of 512 tokens at growing depth, weights included."""
    rows = [r for r in models("model-cpu") if r["test"] == "pp512" and r["depth"] >= 2048 and r["peak_bytes"]]
    found = latest(rows, "kv", "depth")
    depths = sorted({r["depth"] for r in rows})
    names = [kv for kv in dict.fromkeys(r["kv"] for r in rows) if all((kv, d) in found for d in depths)]
    body = [
        ["mlx-lm's own" if kv == "native" else f"opentq `{kv}`"]
        + [f"{found[kv, d]['peak_bytes'] / 1e6:.0f} MB" for d in depths]
        for kv in names
    ]
    head = ["peak of 512 prompt tokens", *(f"at {d // 1024}K" for d in depths)]
    return f"{markdown(head, body)}\n\n{machine(rows)}; `opentq bench model`."


@table
def cpu_kernel() -> str:
    """One layer's attention for one new token on the CPU, every engine in one run; the last commit's rows only."""
    rows = [r for r in records("kernel-cpu") if r["shape"] == [64, 8, 128]]
    if not rows:
        return "No record yet."
    rows = [r for r in rows if r["commit"] == rows[-1]["commit"]]
    found = latest(rows, "engine", "kv", "context")
    contexts = sorted({r["context"] for r in rows})
    last = contexts[-1]
    ours = (found.get(("opentq", "int4", last)) or {}).get("ms")
    notes: list[str] = []
    body = []
    for engine, kv in dict.fromkeys((r["engine"], r["kv"]) for r in rows):
        cells = []
        for context in contexts:
            record = found.get((engine, kv, context))
            note = (record or {}).get("note", "")
            if note and (text := f"{engine} {kv} at {context // 1024}K: {note}") not in notes:
                notes.append(text)
            ms = (record or {}).get("ms")
            cells.append("" if ms is None else f"{ms:.3g}" + ("*" if note else ""))
        end = found.get((engine, kv, last)) or {}
        ratio = f"{end['ms'] / ours:.2g}x" if ours and end.get("ms") else ""
        errors = [found[engine, kv, c]["error"] for c in contexts if (found.get((engine, kv, c)) or {}).get("ms")]
        error = f"{max(errors):.1e}" if errors else ""
        body.append([f"{engine} `{kv}`" if engine == "opentq" else f"{engine} {kv}", *cells, ratio, error])
    head = [f"ms at {c // 1024}K" for c in contexts]
    text = markdown(["one layer, 64/8 heads, D 128", *head, f"to int4 at {last // 1024}K", "arithmetic error"], body)
    footnote = f" * {'; '.join(notes)}." if notes else ""
    threads = f"{rows[-1]['threads']} threads"
    return f"{text}\n\n{machine(rows)}, {threads}; `opentq bench kernel`, commit {rows[-1]['commit']}.{footnote}"


@table
def nvidia() -> str:
    """The decode kernel on Hopper beside the best fp16 and fp8 attention measured on the same device.

    Of the newest device, all that was timed since the last run that timed everything.
    """
    rows = [r for r in records("cuda") if r["what"] == "decode"]
    newest, kernels = rows[-1]["device"], rows[-1]["kernels"]
    since = [r["date"] for r in records("cuda") if r["what"] == "prefill" and r["device"] == newest][-1]
    mine = {key: r for key, r in latest(rows, "device", *DECODE, "harness", "engine").items() if key[-2:] == GRAPH}
    others = latest([r for r in rows if goals.bits(r["engine"])], "device", *SHAPE, "harness", "engine")
    with_fp8 = any(goals.bits(r["engine"]) == 8 for r in others.values())
    body = []
    older = False
    for r in sorted(mine.values(), key=lambda r: (r["device"] != newest, r["device"])):
        if r["device"] != newest and any(r[k] != v for k, v in HEADLINE.items()):
            continue
        if r["device"] == newest and r["date"] < since:
            continue
        if r["n"] not in (1024, 8192, 32768, 131072) or r["length"] > 1 or r["k"] == "int4:g64":
            continue
        same = tuple(r[k] for k in ("device", *SHAPE))
        times = {key[-1]: other["us"] for key, other in others.items() if key[: len(same)] == same}
        bests = [goals.fastest(times, engines) for engines in (goals.FP16, goals.FP8)[: 1 + with_fp8]]
        cells = [c for b in bests for c in ([f"{b[0]:.1f} ({b[1]})", f"{b[0] / r['us']:.2f}x"] if b else ["", ""])]
        codecs = r["k"] if r["k"] == r["v"] else f"{r['k']} / {r['v']}"
        device = r["device"].removeprefix("NVIDIA ").split()[0]
        mark = "*" if r["device"] == newest and r["kernels"] != kernels else ""
        older = older or bool(mark)
        body.append(
            [
                f"{device}, {r['q_heads']}/{r['kv_heads']} heads, D {r['dim']}, {codecs}",
                f"{r['batch']} x {r['n'] // 1024}K",
                f"{r['us']:.1f}{mark}",
                f"{r['gb_per_s'] / 1000:.2f}",
                f"{r['share_of_read']:.0%}" if r["device"] == newest else "",
                *cells,
            ]
        )
    head = ["one layer, one new token", "batch x context", "us", "TB/s", "of read", "best fp16, us", "faster"]
    head += ["best fp8, us", "faster"] if with_fp8 else []
    read = [r for r in records("cuda") if r["what"] == "read bandwidth"][-1]
    note = f"Read: {read['gb_per_s'] / 1000:.2f} TB/s, {read.get('by', 'a maximum')}, in the same process. "
    for what, engines in (("fp16", goals.FP16), ("fp8", goals.FP8)):
        names = [RIVALS[e] for e in engines if any(e == r["engine"] for r in others.values())]
        note += f"The best {what} is that of {', '.join(names[:-1])} and {names[-1]}. " if len(names) > 1 else ""
    note += "*: an earlier version of the kernels. " if older else ""
    versions = f"{machine(rows)}, torch {rows[-1]['versions']['torch']}"
    return f"{markdown(head, body)}\n\n{note}{versions}; `python dev/gpu_check.py`."


RIVALS = {
    "mlx_sdpa": "MLX",
    "torch-cudnn": "cuDNN",
    "torch-flash": "FlashAttention 2",
    "flashinfer-fa2": "FlashInfer's fa2",
    "flashinfer-xqa": "FlashInfer's XQA",
    "flash-attn-3": "FlashAttention 3",
}
RIVALS |= {f"{name}-fp8": what for name, what in RIVALS.items()}
SHAPE = ("n", "batch", "q_heads", "kv_heads", "dim", "length")
DECODE = (*SHAPE, "k", "v")
GRAPH = ("graph", "ours")
HEADLINE = {"n": 131072, "batch": 1, "q_heads": 64, "dim": 128, "k": "int4:g32", "v": "int4:g32"}


@table
def nvidia_model() -> str:
    """All of Llama-3.1-70B's shape on one card, KV cache filled to depth."""
    rows = [r for r in models("model-cuda") if r["model"].startswith("llama-3.1-70b")]
    found = latest(rows, "device", "kv", "depth", "test")
    body = []
    for (device, kv, depth, test), r in sorted(found.items()):
        if not test.startswith("tg"):
            continue
        speed = f"{r['tokens_per_s']:.1f}" if r["tokens_per_s"] else r["note"]
        held = [f"{r[k] / 1e9:.1f} GB" if r[k] else "" for k in ("kv_bytes", "peak_bytes")]
        label = "mlx-lm's own fp16" if kv == "native" else f"opentq `{kv}`"
        body.append([device.removeprefix("NVIDIA "), label, f"{depth // 1024}K" if depth else "0", speed, *held])
    head = ["Llama-3.1-70B's shape, random 4-bit weights", "KV cache", "depth", "tokens/s", "KV held", "peak"]
    command = "opentq bench model llama-3.1-70b --weights random-4bit -n 64 -r 2"
    return f"{markdown(head, body)}\n\n{machine(rows)}; `{command}`, in full in the records."


@table
def nvidia_step() -> str:
    """Tokens per second of smaller models beside mlx-lm's own cache in the same run, by depth."""
    rows = [
        r for r in models("model-cuda") if "commit" in r and r["commit"] and not r["model"].startswith("llama-3.1-70b")
    ]
    found = latest(rows, "model", "test", "kv", "depth")
    depths = sorted({depth for *_, depth in found})
    body = []
    for test in ("tg128", "pp2048"):
        for model, kv in sorted({(m, k) for m, t, k, _ in found if t == test}):
            cells = []
            for depth in depths:
                r = found.get((model, test, kv, depth))
                ratio = f" ({r['vs_native']:.2f}x)" if r and r["vs_native"] and kv != "native" else ""
                speed = f"{r['tokens_per_s']:,.0f} ± {r['tokens_per_s_sd']:,.0f}" if r and r["tokens_per_s"] else ""
                cells.append(speed + ratio)
            label = "mlx-lm's own fp16" if kv == "native" else f"`{kv}`"
            body.append([test, model.split(" (")[0], label, *cells])
    head = ["test", "shape, random 4-bit weights", "KV cache", *(f"{d // 1024}K" if d else "0" for d in depths)]
    command = "opentq bench model SHAPE --weights random-4bit --fill random -p 2048 -n 128 -r 3"
    return f"{markdown(head, body)}\n\n{machine(rows)}; `{command}`."


@table
def plan() -> str:
    """One plan, short."""
    return planned("meta-llama/Llama-3.1-70B", "64k,128k", "--kv", "off,int4,tq5/tq3:nc")


@table
def plan_llama() -> str:
    """What `opentq plan` answers for the 70B shape, word for word."""
    return planned("meta-llama/Llama-3.1-70B", "16k,64k,128k")


@table
def plan_gemma() -> str:
    return planned("gemma-4-31b", "64k,128k,256k")


def planned(model: str, contexts: str, *more: str) -> str:
    arguments = ["plan", model, "--ctx", contexts, "--memory", "64GB", *more]
    done = subprocess.run([sys.executable, "-m", "opentq", *arguments], capture_output=True, text=True, check=True)
    return f"```\n$ opentq {' '.join(arguments)}\n{done.stdout.strip()}\n```"


@table
def server() -> str:
    """The load test: last record of every part, for opentq's and mlx-lm's servers; the soak in words."""
    rows = [r for r in records("server") if r["part"] in ("throughput", "stall", "soak")]
    found = latest(rows, "part", "server")
    if ("throughput", "opentq") not in found:
        return "No record yet."
    body = []
    for name in dict.fromkeys(server for _, server in found):
        speed, stall = found.get(("throughput", name), {}), found.get(("stall", name), {})
        label = f"opentq `{speed.get('kv', '')}`" if name == "opentq" else f"{name}'s, float32 weights"
        speeds = [f"{speed['one']:.0f}", f"{speed['eight']:.0f} ({speed['ratio']:.1f}x)"] if speed else ["", ""]
        gaps = [""] * 4
        if stall:
            gaps = [f"{stall['idle_ms']:.0f} ms", f"{stall['busy_median_ms']:.0f} ms ({stall['ratio']:.1f}x)"]
            gaps += [f"{stall['mean_ratio']:.1f}x", f"{stall['busy_p99_ms']:.0f} ms"]
        body.append([label, *speeds, *gaps])
    head = ["server, `tiny-llama`", "one stream at 4K, tokens/s", "eight streams", "between tokens"]
    head += ["while 8K are read", "mean", "p99"]
    text = markdown(head, body)
    if soak := found.get(("soak", "opentq")):
        counts = ", ".join(f"{n} {what}" for what, n in sorted(soak["outcomes"].items()))
        text += (
            f"\n\n{soak['clients']} clients for {soak['seconds'] / 60:.0f} min: {counts}; "
            f"{soak['wrong']} answers other than alone, {soak['leaked']} sequences leaked, memory "
            f"{soak['active_growth']:+.1%} afterwards."
        )
    return f"{text}\n\n{machine(list(found.values()))}; `python dev/load_test.py`."


@table
def agents() -> str:
    """The load test's long conversation, in tokens that were read; and what guesses are worth in an edit."""
    found = latest(records("server"), "part")
    row, edit = found.get(("agents",)), found.get(("edit",))
    if not row:
        return "No record yet."
    head = [
        "turns",
        "tokens sent",
        "distinct",
        "read",
        "read besides new ones, at most in a turn",
        "known of a new session",
    ]
    body = [str(row["turns"]), f"{row['sent']:,}", f"{row['distinct']:,}", f"{row['read']:,} ({row['read_ratio']}x)"]
    body += [str(row["most_beside_new"]), f"{row['session_remembered']:.1%}"]
    text = f"{markdown(head, [body])}\n\n`{row['model']}`, `{row['kv']}`; {machine([row])}; `{row['command']}`."
    if edit:
        text += (
            f"\n\nAn answer of {edit['answer']} tokens that repeats {edit['repeated']:.0%} of a file is written "
            f"{edit['ratio']} times as fast with guesses as without: {edit['tokens_per_s']:.0f} tokens/s, not "
            f"{edit['plain_tokens_per_s']:.0f}. {machine([edit])}; `{edit['command']}`."
        )
    return text


@table
def long() -> str:
    """`opentq bench long` on the small model: every cache at every context."""
    rows = records("long-cpu")
    if not rows:
        return "No record yet."
    names = {"native": "mlx-lm's own", "mlx4": "mlx-lm `--kv-bits 4`"}
    body = [
        [
            f"{r['context'] // 1024}K",
            names.get(r["arm"], f"opentq `{r['arm']}`"),
            *(f"{r[k]:,.0f}" for k in ("prefill_per_s", "decode_per_s")),
            *(f"{r[k] / 1e6:.0f} MB" for k in ("kv_bytes", "peak_bytes")),
            "found" if r["needle"] else "missed",
        ]
        for r in latest(rows, "context", "arm").values()
        if not r["note"]
    ]
    head = ["context, `tiny-llama`", "KV cache", "prefill tokens/s", "decode tokens/s", "KV held", "peak", "needle"]
    return f"{markdown(head, body)}\n\n{machine(rows)}, {rows[-1]['threads']} threads; `{rows[-1]['command']}`."


REAL = {
    "headline": ("fidelity", study.headline),
    "codecs": ("fidelity", lambda rows, markdown: study.divergences(rows, study.CODECS, markdown)),
    "negative": ("fidelity", lambda rows, markdown: study.divergences(rows, study.NEGATIVE, markdown)),
    "command": ("fidelity", study.command),
    "goal": ("fidelity", study.goal),
    "tuned": ("fidelity", study.tuned),
    "recipes": ("fidelity", study.recipes),
    "needles": ("needle", study.needles),
    "use": ("use", study.use),
    "tasks": ("tasks", study.tasks),
    "depth": ("layers", study.depth),
    "scale": ("scale", study.scale),
    "cpu": ("real-cpu", study.cpu),
}
"""Tables of the study of a real network: what they are made from, and by what."""

for _name, (_file, _make) in {**{f"real_{n}": t for n, t in REAL.items()}, **page_tables.TABLES}.items():
    TABLES[_name] = lambda file=_file, make=_make: make(records(file), markdown)


def main() -> int:
    stale = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = file.read_text()
        new = re.sub(
            r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)",
            lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}",
            text,
            flags=re.S,
        )
        if new != text:
            stale.append(str(file.relative_to(ROOT)))
            if "--check" not in sys.argv:
                file.write_text(new)
    if stale and "--check" in sys.argv:
        print(f"stale tables in {', '.join(stale)}: run python dev/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

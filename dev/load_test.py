"""The server under load: many clients who come, go and change their minds, and what it costs the ones who stay.

    python dev/load_test.py                    # about 7 minutes, five of them the soak
    python dev/load_test.py --against-mlx-lm   # throughput and stall of mlx-lm's server, too
    python dev/load_test.py --agents           # what a long conversation costs (dev/agents_load.py)

`throughput`: one stream against eight, who ask different questions about one document of 4K tokens. `stall`: the time
between tokens of a running stream while prompts of up to 8K tokens come in. `soak`: clients with ragged prompts, a part
of whom disconnect, for some minutes; every finished answer must be the text that the same request got alone, no status
but 503 may refuse one, and memory and sequences must be back afterwards. Prints a table; appends a record per part.

mlx-lm's server gets float32 weights and this package's matrix product, as opentq does on CPUs (`floats.to_float32`,
`kernels/blas.py`): what is compared is the server and the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import agents_load
import httpx

from opentq import records as store

WORDS = ("river", "harbour", "engine", "garden", "window", "letter", "captain", "teacher", "bridge", "market", "winter")
SERVE = "import typer; from opentq.cli.serve import serve; typer.run(serve)"
OTHER = "import opentq; from mlx_lm.server import main; main()"


class Server:
    """A server process on a free port."""

    def __init__(self, code: str, *arguments: str):
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        command = [sys.executable, "-c", code, *arguments, "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(self.url + "/health", timeout=1).raise_for_status()
                return
            except httpx.HTTPError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.process.kill()
                    raise SystemExit(f"the server did not start: {self.output()}") from None
                time.sleep(0.2)

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-3000:]

    def rss(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def active(self) -> int:
        """Bytes of arrays that the server holds, without the prefixes that it remembers within its budget."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        values = {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
        return int(values["opentq_active_bytes"] - values["opentq_prefix_bytes"])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit("the server did not stop on SIGTERM") from None


def text(tokens: int, seed: int, question: str = "Lumo") -> str:
    """Prose of about `tokens` tokens: words with a number here and there, and a question about them."""
    rng = random.Random(seed)
    out = f"Note {seed}. "
    while len(out) < 2.2 * tokens:
        out += rng.choice(WORDS) + (f" {rng.randrange(1000)}. " if rng.random() < 0.1 else " ")
    return out + f"The secret code of Lumo is {rng.randrange(10000, 99999)}. What is the secret code of {question}?"


def request(content: str, max_tokens: int, **more: Any) -> dict:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0, **more}


class Reply:
    """One streamed answer: `status` 0 while it runs or when we left, its text, and the times of start and pieces."""

    def __init__(self) -> None:
        self.status, self.text = 0, ""
        self.times = [time.monotonic()]

    async def read(self, client: httpx.AsyncClient, url: str, body: dict) -> Reply:
        async with client.stream("POST", url + "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                self.status, self.text = response.status_code, (await response.aread()).decode()
                return self
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.status, self.text = 500, event["error"]["message"]
                    return self
                if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                    self.text += piece
                    self.times.append(time.monotonic())
        self.status = 200
        return self


def ask(client: httpx.AsyncClient, server: Server, body: dict):
    return Reply().read(client, server.url, body)


async def answer(client: httpx.AsyncClient, server: Server, body: dict) -> Reply:
    reply = await ask(client, server, body)
    if reply.status != 200:
        raise SystemExit(f"the server answered {reply.status}: {reply.text[:500]}")
    return reply


async def throughput(server: Server, args: argparse.Namespace) -> dict:
    """Tokens per second of one and of eight streams, while all of them write; medians of `repeats`."""
    rates: dict[int, float] = {}
    async with httpx.AsyncClient(timeout=900) as client:
        await answer(client, server, request(text(4000, 1), 2))  # the document, remembered by either server
        for streams in (1, 8):
            found = []
            for turn in range(args.repeats):
                bodies = [
                    request(text(4000, 1, f"number {turn}{n}"), args.answer, **args.endless) for n in range(streams)
                ]
                replies = await asyncio.gather(*(answer(client, server, b) for b in bodies))
                start = max(r.times[1] for r in replies)
                end = min(r.times[-1] for r in replies)
                count = sum(start < t <= end for r in replies for t in r.times[1:])
                if end <= start:
                    raise SystemExit("the streams did not run together: give a larger --answer")
                found.append(count / (end - start))
            rates[streams] = statistics.median(found)
    return {"one": round(rates[1], 1), "eight": round(rates[8], 1), "ratio": round(rates[8] / rates[1], 2)}


async def stall(server: Server, args: argparse.Namespace) -> dict:
    """Seconds between the tokens of one stream, alone and while prompts of `longest` tokens are read."""
    spans = []
    async with httpx.AsyncClient(timeout=900) as client:
        running = Reply()
        body = request(text(300, 900), 100_000, **args.endless)
        body["max_tokens"] = args.context - 1000
        task = asyncio.create_task(running.read(client, server.url, body))
        while len(running.times) < 100 and not task.done():
            await asyncio.sleep(0.05)
        for n in range(args.prompts):
            begun = time.monotonic()
            long = await answer(client, server, request(text(args.longest, 901 + n), 2, **args.endless))
            spans.append((begun, long.times[1]))
            await asyncio.sleep(1)
        if task.done():
            raise SystemExit(f"the running stream ended too early: {running.status} {running.text[:200]}")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    gaps = [(a, b) for a, b in pairwise(running.times[1:])]
    busy = [b - a for a, b in gaps if any(s < a and b < e for s, e in spans)]
    idle = [b - a for a, b in gaps if all(b < s or e + 0.2 < a for s, e in spans)]
    base = statistics.median(idle)
    return {
        "prompts": args.prompts,
        "prompt_seconds": round(statistics.mean(e - s for s, e in spans), 2),
        "idle_ms": round(1000 * base, 2),
        "idle_p99_ms": round(1000 * statistics.quantiles(idle, n=100)[98], 2),
        "busy_median_ms": round(1000 * statistics.median(busy), 2),
        "busy_mean_ms": round(1000 * statistics.mean(busy), 2),
        "busy_p99_ms": round(1000 * statistics.quantiles(busy, n=100)[98], 2),
        "ratio": round(statistics.median(busy) / base, 2),
        "mean_ratio": round(statistics.mean(busy) / statistics.mean(idle), 2),
    }


async def soak(server: Server, args: argparse.Namespace) -> dict:
    rng = random.Random(0)
    sizes = [args.longest, *(rng.choice((20, 100, 300, 800, 1500, 3000, 5000)) for _ in range(args.distinct - 1))]
    bodies = [request(text(size, n), rng.randint(4, 48)) for n, size in enumerate(sizes)]
    outcomes: Counter[str] = Counter()
    wrong, tokens = 0, 0
    first: list[float] = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        alone = [(await answer(client, server, body)).text for body in bodies]
        before, begun = server.active(), time.monotonic()
        end = begun + args.seconds

        async def visitor(number: int) -> None:
            nonlocal wrong, tokens
            own = random.Random(number)
            while (now := time.monotonic()) < end:
                which = own.randrange(len(bodies))
                patience = own.uniform(0.02, 4) if own.random() < args.disconnect else end + 5 - now
                reply = Reply()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(reply.read(client, server.url, bodies[which]), patience)
                outcomes[{200: "answered", 0: "left"}.get(reply.status, str(reply.status))] += 1
                tokens += len(reply.times) - 1
                if reply.status == 200:
                    wrong += reply.text != alone[which]
                    first.append(reply.times[1] - reply.times[0])
                elif reply.status:
                    await asyncio.sleep(own.uniform(0.5, 2))

        async def watch() -> list[int]:
            seen = []
            while time.monotonic() < end:
                await asyncio.sleep(1)
                seen.append(server.rss())
            return seen

        _, seen = await asyncio.gather(asyncio.gather(*map(visitor, range(args.clients))), watch())
        idle = time.monotonic() + 60
        while (health := (await client.get(server.url + "/health")).json())["running"] + health["waiting"]:
            if time.monotonic() > idle:
                break
            await asyncio.sleep(0.1)
    half = max(seen[: max(1, len(seen) // 2)])
    return {
        "clients": args.clients,
        "seconds": args.seconds,
        "outcomes": dict(outcomes),
        "wrong": wrong,
        "leaked": health["running"] + health["waiting"],
        "tokens_per_s": round(tokens / args.seconds, 1),
        "first_token_s": [round(x, 2) for x in statistics.quantiles(first, n=20)[9::9]],  # median and p95
        "active_growth": round(server.active() / before - 1, 4),
        "rss_peak": max(seen),
        "rss_growth": round(server.rss() / half - 1, 4),  # over the peak of the first half
    }


async def agents(server: Server, args: argparse.Namespace) -> dict:
    return await asyncio.to_thread(agents_load.conversation, server, args, text)


PARTS = {"throughput": throughput, "stall": stall, "soak": soak}
AGENTS = ("agents", "edit")


def float32(model: str, folder: Path) -> Path:
    """A copy of the model with float32 weights."""
    import mlx.core as mx

    for file in Path(model).iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    for file in Path(model).glob("*.safetensors"):
        weights = {name: x.astype(mx.float32) for name, x in mx.load(str(file)).items()}  # type: ignore[union-attr]
        mx.save_safetensors(str(folder / file.name), weights, {"format": "mlx"})
    return folder


def measure(part: str, server: Server, name: str, args: argparse.Namespace) -> dict:
    try:
        found = asyncio.run((PARTS | {"agents": agents})[part](server, args))
    finally:
        server.stop()
    return noted(part, name, args, found)


def noted(part: str, name: str, args: argparse.Namespace, found: dict) -> dict:
    """The record of what was found."""
    if args.no_times:
        found = {k: v for k, v in found.items() if not k.startswith("seconds") and "tokens_per_s" not in k}
    about = {"part": part, "server": name, "model": Path(args.model).name, "kv": args.kv if name == "opentq" else "f32"}
    found = store.record("server", **about, **found)
    found["command"] = shlex.join(["python", "dev/load_test.py", *sys.argv[1:]])
    print(json.dumps({k: v for k, v in found.items() if k in about or k not in store.environment()}), flush=True)
    return found


def failures(record: dict) -> list[str]:
    """What the soak found that must not be."""
    if record["part"] != "soak":
        return []
    found = [f"{n} answers of status {s}" for s, n in record["outcomes"].items() if s[0] == "5" and s != "503"]
    found += [f"{record[k]} {k}" for k in ("wrong", "leaked") if record[k]]
    return found + [f"{k} {record[k]:.1%}" for k in ("active_growth", "rss_growth") if record[k] > 0.05]


def table(records: list[dict]) -> str:
    rows = []
    for r in records:
        if r["part"] == "throughput":
            said = f"{r['one']} tok/s for one stream, {r['eight']} for eight ({r['ratio']}x)"
        elif r["part"] == "agents":
            said = f"{r['turns']} turns, {r['distinct']} distinct tokens, {r['read']} read ({r['read_ratio']}x), "
            said += (
                f"{r['sent']} sent; at most {r['most_beside_new']} of a turn read beside its new ones; a new session "
            )
            said += f"{r['session_remembered']:.0%} remembered; {r.get('seconds_median', '?')} s a turn"
        elif r["part"] == "edit":
            said = f"{r['ratio']}x the tok/s of plain steps ({r['processor_ratio']}x by processor time), "
            said += f"{r['repeated']:.0%} of the answer repeated; {r['right']} of {r['guessed']} guesses right"
        elif r["part"] == "stall":
            said = f"{r['idle_ms']} ms between tokens, {r['busy_median_ms']} while a prompt is read ({r['ratio']}x; "
            said += f"mean {r['mean_ratio']}x, p99 {r['busy_p99_ms']} ms); {r['prompt_seconds']} s per prompt"
        else:
            said = f"{r['clients']} clients, {r['seconds']:g} s: {r['outcomes']}, {r['wrong']} wrong, {r['leaked']} "
            said += (
                f"leaked, {r['tokens_per_s']} tok/s, memory {r['active_growth']:+.1%}, resident {r['rss_growth']:+.1%}"
            )
        rows.append(f"| {r['server']} {r['kv']} | {r['part']} | {said} |")
    return "\n".join(["| server | part | |", "| --- | --- | --- |", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-llama")
    parser.add_argument("--kv", default="int4")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300, help="length of the soak")
    parser.add_argument("--disconnect", type=float, default=0.2, help="share of requests that are left unfinished")
    parser.add_argument("--distinct", type=int, default=12, help="different requests of the soak")
    parser.add_argument("--longest", type=int, default=7500, help="tokens of the longest prompts, about")
    parser.add_argument("--answer", type=int, default=256, help="tokens per answer for throughput")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=2, help="long prompts for stall")
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--prompt-cache-bytes", default="16MB", help="for the soak: some prefixes are read again")
    parser.add_argument("--agents", action="store_true", help="a long conversation, and an edit")
    parser.add_argument(
        "--no-times", action="store_true", help="record what --agents counts, no seconds: beside others"
    )
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--agent-tokens", type=int, default=60_000, help="of the whole conversation, about")
    parser.add_argument("--agent-answer", type=int, default=100)
    parser.add_argument("--against-mlx-lm", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/server.jsonl"))
    args = parser.parse_args()
    config = json.loads((Path(args.model) / "config.json").read_text())
    args.context = config["max_position_embeddings"]
    end = config.get("eos_token_id")
    args.endless = {"logit_bias": {str(t): -100 for t in (end if isinstance(end, list) else [end])}}

    records = []
    options = ["--kv", args.kv, "--memory", args.memory, "--log-level", "warning", "--queue", "256"]
    parts = list(AGENTS) if args.agents else args.parts.split(",")
    parts = [part for part in parts if not (part == "edit" and args.no_times)]  # which is nothing but times
    own = {"agents": ["--max-context", str(args.agent_tokens * 5 // 4)]}
    own["soak"] = ["--prompt-cache-bytes", args.prompt_cache_bytes]
    for part in parts:
        if part == "edit":
            records.append(noted(part, "opentq", args, agents_load.edit(args)))
            continue
        more = own.get(part, [])
        records.append(measure(part, Server(SERVE, args.model, *options, *more), "opentq", args))
    if args.against_mlx_lm:
        with tempfile.TemporaryDirectory() as folder:
            copy = str(float32(args.model, Path(folder)))
            for part in [p for p in args.parts.split(",") if p != "soak"]:
                records.append(measure(part, Server(OTHER, "--model", copy), "mlx-lm", args))
    store.append(args.output, records)
    print(table(records))
    bad = [f"{r['part']}: {why}" for r in records for why in failures(r)]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

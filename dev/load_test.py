"""The server under load: many clients who come, go and change their minds, and what it costs the ones who stay.

    python dev/load_test.py --model models/tiny-llama --seconds 300

Three parts. `soak`: clients with ragged prompts, a part of whom disconnect, for some minutes; every finished answer
must be the text that the same request got alone, and memory and sequences must be back afterwards. `throughput`: one
stream against eight, at 4K of context; `--against-mlx-lm` runs mlx-lm's own server the same way. `stall`: time between
tokens of a running stream while a long prompt comes in. Prints a table; appends one JSON record per part to `--output`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx

WORDS = ("river", "harbour", "engine", "garden", "window", "letter", "captain", "teacher", "bridge", "market", "winter")


class Server:
    """A server process on a free port."""

    def __init__(self, command: list[str], health: str):
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(self.url + health, timeout=1).raise_for_status()
                return
            except httpx.HTTPError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start: {self.output()}") from None
                time.sleep(0.2)

    def output(self) -> str:
        self.process.kill()
        return self.process.communicate()[0].decode()[-3000:]

    def rss(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit("the server did not stop on SIGTERM") from None


def text(tokens: int, seed: int) -> str:
    """Prose of about `tokens` tokens: words with a number here and there."""
    rng = random.Random(seed)
    out = f"Note {seed}. "
    while len(out) < 2.2 * tokens:
        out += rng.choice(WORDS) + (f" {rng.randrange(1000)}. " if rng.random() < 0.1 else " ")
    return out + f"The secret code of Lumo is {rng.randrange(10000, 99999)}. What is the secret code of Lumo?"


def request(tokens: int, seed: int, max_tokens: int, **more) -> dict:
    return {
        "messages": [{"role": "user", "content": text(tokens, seed)}],
        "max_tokens": max_tokens,
        "temperature": 0,
        **more,
    }


async def stream(client: httpx.AsyncClient, url: str, body: dict, leave_after: float | None = None):
    """Send one request; returns (status, text, times of the request and its chunks); status 0 when we left."""
    try:
        return await asyncio.wait_for(_stream(client, url, body), leave_after)
    except asyncio.TimeoutError:
        return 0, "", []


async def _stream(client: httpx.AsyncClient, url: str, body: dict):
    times, answer = [time.monotonic()], ""
    async with client.stream("POST", url + "/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return response.status_code, (await response.aread()).decode(), times
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return 500, event["error"]["message"], times
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                answer += piece
                times.append(time.monotonic())
    return 200, answer, times


async def soak(server: Server, args: argparse.Namespace) -> dict:
    rng = random.Random(0)
    choices = [n for n in (20, 100, 300, 800, 1500, 3000, 5000) if n < args.longest] + [args.longest]
    sizes = [rng.choice(choices) for _ in range(args.distinct)]
    bodies = [request(size, n, rng.randint(4, 48)) for n, size in enumerate(sizes)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        alone = []
        for body in bodies:
            status, answer, _ = await stream(client, server.url, body)
            assert status == 200, (status, answer)
            alone.append(answer)
        before = server.metrics()["opentq_active_bytes"], server.rss()
        outcomes: Counter[str] = Counter()
        wrong: list[int] = []
        middle: list[int] = []
        deadline = time.monotonic() + args.seconds

        async def one(number: int) -> None:
            own = random.Random(number)
            while time.monotonic() < deadline:
                which = own.randrange(len(bodies))
                leave = own.uniform(0.02, 4) if own.random() < args.disconnect else None
                status, answer, _ = await stream(client, server.url, bodies[which], leave)
                outcomes[{200: "answered", 0: "left"}.get(status, str(status))] += 1
                if status == 200 and answer != alone[which]:
                    wrong.append(which)
                if status == 503:
                    await asyncio.sleep(own.uniform(0.5, 2))
                middle.append(server.rss())

        await asyncio.gather(*(one(n) for n in range(args.clients)))
        idle = time.monotonic() + 60
        while (health := (await client.get(server.url + "/health")).json())["running"] + health["waiting"]:
            assert time.monotonic() < idle, f"sequences leaked: {health}"
            await asyncio.sleep(0.1)
        after = server.metrics()["opentq_active_bytes"], server.rss()
    return {
        "part": "soak",
        "clients": args.clients,
        "seconds": args.seconds,
        **dict(outcomes),
        "wrong": len(wrong),
        "leaked": health["running"] + health["waiting"],
        "active_bytes_before": before[0],
        "active_bytes_after": after[0],
        "rss_before": before[1],
        "rss_peak": max(middle, default=0),
        "rss_after": after[1],
    }


async def throughput(server: Server, args: argparse.Namespace, name: str) -> dict:
    """Tokens per second of one and of eight streams, between the first and the last token of all."""
    rates = {}
    no_end = {"logit_bias": {str(t): -100 for t in args.end_tokens}}
    async with httpx.AsyncClient(timeout=600) as client:
        await stream(client, server.url, request(100, 1, 8))
        for streams in (1, 8):
            best = 0.0
            for _ in range(args.repeats):
                # The same prompts again: the first round has left their prefixes behind.
                bodies = [request(4000, 500 + n, args.answer, **no_end) for n in range(streams)]
                results = await asyncio.gather(*(stream(client, server.url, b) for b in bodies))
                times = [r[2][1:] for r in results]
                start = max(t[0] for t in times)
                end = min(t[-1] for t in times)
                count = sum(sum(start < x <= end for x in t) for t in times)
                best = max(best, count / (end - start) if end > start else 0.0)
            rates[streams] = best
    return {
        "part": "throughput",
        "server": name,
        "one": round(rates[1], 1),
        "eight": round(rates[8], 1),
        "ratio": round(rates[8] / rates[1], 2),
    }


async def stall(server: Server, args: argparse.Namespace) -> dict:
    """Gaps between the tokens of one stream, alone and while prompts of `longest` tokens are read."""
    no_end = {"logit_bias": {str(t): -100 for t in args.end_tokens}}
    async with httpx.AsyncClient(timeout=600) as client:
        running = asyncio.create_task(stream(client, server.url, request(500, 900, args.stall_tokens, **no_end)))
        await asyncio.sleep(args.stall_after)
        begun = time.monotonic()
        long = request(args.longest, 901 + os.getpid(), 2, **no_end)
        status, answer, other = await stream(client, server.url, long)
        assert status == 200, (status, answer)
        done = other[1] if len(other) > 1 else time.monotonic()
        _, _, times = await running
    times = times[1:]
    gaps = [(b, b - a) for a, b in pairwise(times)]
    idle = [g for t, g in gaps if t < begun or t > done + 0.2]
    busy = [g for t, g in gaps if begun + 0.05 < t < done]
    return {
        "part": "stall",
        "prompt_seconds": round(done - begun, 2),
        "idle_ms": round(1000 * statistics.median(idle), 2),
        "busy_ms": round(1000 * statistics.median(busy), 2),
        "busy_p99_ms": round(1000 * statistics.quantiles(busy, n=100)[98], 2),
        "ratio": round(statistics.median(busy) / statistics.median(idle), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/tiny-llama")
    parser.add_argument("--kv", default="int4")
    parser.add_argument("--parts", default="throughput,stall,soak")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--disconnect", type=float, default=0.2, help="share of requests that are left unfinished")
    parser.add_argument("--distinct", type=int, default=32, help="different requests")
    parser.add_argument("--longest", type=int, default=7500, help="tokens of the longest prompts, about")
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stall-tokens", type=int, default=1500)
    parser.add_argument("--stall-after", type=float, default=1.5)
    parser.add_argument("--memory", default="6GB")
    parser.add_argument("--against-mlx-lm", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/load.jsonl"))
    args = parser.parse_args()
    config = json.loads((Path(args.model) / "config.json").read_text())
    end = config.get("eos_token_id")
    args.end_tokens = end if isinstance(end, list) else [end]

    records = []
    serve = [
        sys.executable,
        "-c",
        "import typer; from opentq.server.command import serve; typer.run(serve)",
        args.model,
        "--kv",
        args.kv,
        "--memory",
        args.memory,
    ]
    server = Server([*serve, "--log-level", "warning", "--queue", "256"], "/health")
    try:
        for part in args.parts.split(","):
            work = {"soak": soak, "stall": stall, "throughput": lambda s, a: throughput(s, a, f"opentq {a.kv}")}[part]
            records.append(asyncio.run(work(server, args)))
            print(json.dumps(records[-1]), flush=True)
    finally:
        server.stop()
    if args.against_mlx_lm:
        other = Server([sys.executable, "-m", "mlx_lm", "server", "--model", args.model], "/health")
        try:
            records.append(asyncio.run(throughput(other, args, "mlx_lm.server")))
        finally:
            other.process.kill()
            other.process.communicate()
        print(json.dumps(records[-1]))

    import mlx.core as mx

    about = {
        "model": args.model,
        "kv": args.kv,
        "mlx": mx.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }
    args.output.parent.mkdir(exist_ok=True)
    with args.output.open("a") as file:
        for record in records:
            file.write(json.dumps({**record, **about, "command": " ".join(sys.argv), "time": int(time.time())}) + "\n")
    for record in records:
        print("| " + " | ".join(f"{k} {v}" for k, v in record.items()) + " |")
    failed = [
        r
        for r in records
        if r["part"] == "soak" and (r["wrong"] or r["leaked"] or any(k.startswith("5") and k != "503" for k in r))
    ]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

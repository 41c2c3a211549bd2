"""An agent's work on the server: a conversation of many turns, new sessions, and an edit that repeats its file.

`python dev/load_test.py --agents` runs these parts. `agents`: turns that each add a tool's output to a growing
prompt; what the model read in all (answers and remainders of blocks included) against the distinct tokens. `edit`:
tokens per second of one answer that repeats four fifths of a source file, with guesses from the prompt and without.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx

import opentq  # noqa: F401  (before mlx: it brings the matrix product of the CPU)

# isort: split
import mlx.core as mx

from opentq.caches.batch import BatchOpenTQCache
from opentq.dialogue.errors import ApiError
from opentq.dialogue.output import Parser
from opentq.dialogue.prompt import Prompt
from opentq.dialogue.request import Done, Generated, SamplingParams
from opentq.memory.device import parse_memory
from opentq.server.job import Job
from opentq.server.launch import make_service
from opentq.server.options import ServeOptions


def gauges(url: str) -> dict[str, float]:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def turn(url: str, messages: list[dict[str, str]], tokens: int, endless: dict[str, Any]) -> dict[str, Any]:
    """One answer; adds it to `messages`."""
    begun = time.monotonic()
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0, **endless}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=3600).raise_for_status().json()
    usage = answer["usage"]
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    return {
        "prompt": usage["prompt_tokens"],
        "remembered": usage["prompt_tokens_details"]["cached_tokens"],
        "written": usage["completion_tokens"],
        "seconds": round(time.monotonic() - begun, 2),
    }


def conversation(server: Any, args: argparse.Namespace, text: Any) -> dict[str, Any]:
    """Turns until about `args.agent_tokens`, then a new session with the same first message."""
    url, first = server.url, args.agent_tokens // 3
    system = {"role": "system", "content": text(first, 70)}
    messages, rows = [system], []
    before = gauges(url)["opentq_read_tokens"]
    each = (args.agent_tokens - first) // args.turns - args.agent_answer
    for n in range(args.turns):
        messages.append({"role": "user", "content": text(each, 71 + n)})
        rows.append(turn(url, messages, args.agent_answer, args.endless))
        print(f"| {n + 1} | {rows[-1]['prompt']} | {rows[-1]['remembered']} | {rows[-1]['seconds']} |", flush=True)
    after = gauges(url)
    session = turn(url, [system, {"role": "user", "content": text(200, 999)}], 4, args.endless)
    distinct = rows[-1]["prompt"] + rows[-1]["written"]
    worst = max(r["prompt"] - r["remembered"] - (r["prompt"] - p["prompt"] - p["written"]) for p, r in pairwise(rows))
    read = int(after["opentq_read_tokens"] - before)
    return {
        "turns": args.turns,
        "distinct": distinct,
        "read": read,
        "read_ratio": round(read / distinct, 3),
        "sent": sum(r["prompt"] for r in rows),
        "most_beside_new": worst,  # tokens of a prompt that were read though neither new nor the first turn's
        "session_remembered": round(session["remembered"] / session["prompt"], 3),
        "seconds_median": statistics.median(r["seconds"] for r in rows[1:]),
        "seconds_first": rows[0]["seconds"],
        "prefix_bytes": int(after["opentq_prefix_bytes"]),
        "committed_share": round(after["opentq_prefix_bytes"] / after["opentq_budget_bytes"], 4),
    }


class Held:
    """A model whose likeliest tokens are those of a text, whatever it would say; its work is the same."""

    def __init__(self, model: Any, begun: int, tokens: list[int], vocabulary: int):
        """`begun` tokens stand before the text."""
        self.model, self.begun = model, begun
        self.wanted = 1e4 * (mx.array([*tokens, 0])[:, None] == mx.arange(vocabulary))
        mx.eval(self.wanted)  # in this thread; the engine's is another

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        logits = self.model(inputs, cache=cache)
        if not isinstance(cache[0], BatchOpenTQCache):
            return logits  # a prompt's, which nobody looks at
        at = cache[0].extents[0].offset - self.begun - inputs.shape[1] + 1
        return logits + self.wanted[at : at + inputs.shape[1]]


def edited(share: float, characters: int) -> tuple[str, str, float]:
    """A prompt with a source file; the file again with about `share` of it from another one; what was not repeated."""
    rng, source = random.Random(0), Path(textwrap.__file__).read_text()[:8000]
    others = [line for line in Path(shlex.__file__).read_text().splitlines(keepends=True) if len(line) > 20]
    answer, fresh = "", 0
    for line in source.splitlines(keepends=True)[10:]:
        if fresh < share * len(answer) and rng.random() < 0.5:
            line = rng.choice(others)
            fresh += len(line)
        answer += line
        if len(answer) >= characters:
            break
    return f"{source}\nThe file again, with the changes:\n", answer, fresh / len(answer)


def edit(args: argparse.Namespace) -> dict[str, Any]:
    """One answer that repeats four fifths of its prompt, with guesses and without, in turns in one process.

    The model is held to the text: what is measured is the work for it, on caches and with steps as always.
    """
    service, _ = make_service(ServeOptions(args.model, kv=args.kv, memory=parse_memory(args.memory)))
    engine, tokenizer = service.engine, service.engine.tokenizer
    model, (prompt, answer, fresh) = engine.model, edited(0.2, 4 * args.answer)
    running = service.worker.submit(engine.run)

    def once(number: int, lookup: bool) -> tuple[float, float]:
        """Seconds of the answer, and seconds of processors. The number is in the prompt: nothing of it is known."""
        text = f"# Question {number}, {lookup}\n{prompt}"
        tokens = tokenizer.encode(text)
        script = tokenizer.encode(text + answer)[len(tokens) :][: args.answer]
        if len(script) < args.answer:
            raise SystemExit(f"--answer {args.answer} is more than the file has: at most {len(script)} tokens")
        engine.model, engine.lookup = Held(model, len(tokens), script, service.vocab), lookup
        parser, events = Parser(tokenizer, raw=True), SimpleQueue[Any]()
        job = Job(Prompt(tokens), len(script), SamplingParams(), parser, lambda job, event: events.put(event))
        engine.submit(job, 1 << 30)
        event: Any = None
        started = 0.0
        while not isinstance(event, Done):
            if not isinstance(event, Generated):  # the prompt is still being read
                started = time.process_time()
            while events.empty():
                if running.done():
                    raise SystemExit(f"the engine failed: {running.exception()}")
                time.sleep(0.001)
            event = events.get()
            if isinstance(event, ApiError):
                raise SystemExit(f"the engine failed: {event}")
        seconds = event.usage.generation_seconds, time.process_time() - started
        if job.answer != script:
            raise SystemExit("the answer is not what the model was held to")
        while engine.unread:
            time.sleep(0.01)
        return seconds

    once(0, True)
    guessed, right = engine.guessed, engine.guessed_right
    pairs = [(once(n, True), once(n, False)) for n in range(1, args.repeats + 1)]
    service.close()
    guessed, right = engine.guessed - guessed, engine.guessed_right - right
    return {
        "tokens_per_s": round(args.answer / statistics.median(a[0] for a, _ in pairs), 1),
        "plain_tokens_per_s": round(args.answer / statistics.median(b[0] for _, b in pairs), 1),
        "ratio": round(statistics.median(b[0] / a[0] for a, b in pairs), 2),
        "processor_ratio": round(statistics.median(b[1] / a[1] for a, b in pairs), 2),
        "answer": args.answer,
        "repeated": round(1 - fresh, 3),
        "guessed": guessed // args.repeats,
        "right": right // args.repeats,
    }

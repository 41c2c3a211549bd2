"""An agent's work on the server: a conversation of many turns, new sessions, and an edit that repeats its file.

`python dev/load_test.py --agents` runs these parts. `agents`: turns that each add a tool's output to a growing
prompt; what the model read in all (answers and remainders of blocks included) against the distinct tokens. `edit`:
tokens per second of one answer that goes on with a copy of a source file, with guesses from the prompt and without.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx


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


def edit(server: Any, args: argparse.Namespace, text: Any) -> dict[str, Any]:
    """The rate of one answer that goes on copying a file of source text, and the share of it that was guessed."""
    source = Path(textwrap.__file__).read_text()[:6000]
    prompt = f"{source}\n\n\n{source[:1200]}"
    body = {"prompt": prompt, "max_tokens": args.answer, "temperature": 0, **args.endless}
    rates = []
    for _ in range(args.repeats + 1):
        begun = gauges(server.url)
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=3600).raise_for_status().json()
        rates.append(answer["usage"]["completion_tokens"] / answer["opentq"]["generation_seconds"])
        now = gauges(server.url)
    right = now["opentq_guessed_right_tokens"] - begun["opentq_guessed_right_tokens"]
    guessed = now["opentq_guessed_tokens"] - begun["opentq_guessed_tokens"]
    return {
        "tokens_per_s": round(statistics.median(rates[1:]), 1),
        "guessed": int(guessed),
        "right": int(right),
        "answer": args.answer,
        "guessed_share": round(right / args.answer, 3),
    }

"""What the server counts, in Prometheus' text format. Labels are few and fixed: no names, no texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

GAUGES: tuple[tuple[str, str, Callable[[Service], float]], ...] = (
    ("read_tokens", "Tokens that the model read, answers included, since the start", lambda s: s.engine.tokens_read),
    ("guessed_tokens", "Tokens guessed, since the start", lambda s: s.engine.guessed),
    ("guessed_right_tokens", "Guesses that were right", lambda s: s.engine.guessed_right),
    ("running", "Requests being read or answered", lambda s: len(s.admission.running)),
    ("waiting", "Requests waiting for memory", lambda s: len(s.admission.waiting)),
    ("committed_bytes", "Bytes that running requests may come to hold", lambda s: s.admission.committed()),
    ("budget_bytes", "Bytes for running requests", lambda s: s.admission.budget),
    ("prefix_bytes", "Bytes of remembered prefixes", lambda s: s.engine.store.nbytes),
    ("active_bytes", "Bytes of arrays, weights included, as MLX counts them", lambda s: mx.get_active_memory()),
    ("decode_step_seconds", "Time of one decode step, running mean", lambda s: s.engine.pace.step),
    ("prompt_chunk_seconds", "Time to read one chunk of a prompt, running mean", lambda s: s.engine.pace.chunk),
)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("opentq_requests", "Requests for tokens, by how they ended", ["outcome"], registry=r)
        self.prompt = Counter("opentq_prompt_tokens", "Prompt tokens received", registry=r)
        self.cached = Counter("opentq_cached_tokens", "Prompt tokens that were remembered", registry=r)
        self.generated = Counter("opentq_generated_tokens", "Tokens generated", registry=r)
        self.first = Histogram(
            "opentq_first_token_seconds", "From the request to its first token", buckets=SECONDS, registry=r
        )
        self.whole = Histogram("opentq_request_seconds", "From the request to its end", buckets=SECONDS, registry=r)
        for name, meaning, value in GAUGES:
            Gauge(f"opentq_{name}", meaning, registry=r).set_function(partial(value, service))

    def text(self) -> bytes:
        return generate_latest(self.registry)

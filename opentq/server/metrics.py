"""What the server counts, in Prometheus' text format. Labels are few and fixed: no names, no texts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("opentq_requests", "Requests for tokens, by how they ended", ["outcome"], registry=r)
        self.prompt = Counter("opentq_prompt_tokens", "Prompt tokens received", registry=r)
        self.cached = Counter("opentq_cached_tokens", "Prompt tokens that were remembered", registry=r)
        self.read = Gauge(
            "opentq_read_tokens", "Tokens that the model read, answers included, since the start", registry=r
        )
        self.guessed = Gauge("opentq_guessed_tokens", "Tokens guessed, since the start", registry=r)
        self.guessed_right = Gauge("opentq_guessed_right_tokens", "Guesses that were right", registry=r)
        self.generated = Counter("opentq_generated_tokens", "Tokens generated", registry=r)
        self.running = Gauge("opentq_running", "Requests being read or answered", registry=r)
        self.waiting = Gauge("opentq_waiting", "Requests waiting for memory", registry=r)
        self.committed = Gauge("opentq_committed_bytes", "Bytes that running requests may come to hold", registry=r)
        self.budget = Gauge("opentq_budget_bytes", "Bytes for running requests", registry=r)
        self.prefixes = Gauge("opentq_prefix_bytes", "Bytes of remembered prefixes", registry=r)
        self.active = Gauge("opentq_active_bytes", "Bytes of arrays, weights included, as MLX counts them", registry=r)
        self.step = Gauge("opentq_decode_step_seconds", "Time of one decode step, running mean", registry=r)
        self.chunk = Gauge(
            "opentq_prompt_chunk_seconds", "Time to read one chunk of a prompt, running mean", registry=r
        )
        self.first = Histogram(
            "opentq_first_token_seconds", "From the request to its first token", buckets=SECONDS, registry=r
        )
        self.whole = Histogram("opentq_request_seconds", "From the request to its end", buckets=SECONDS, registry=r)

    def text(self) -> bytes:
        return generate_latest(self.registry)

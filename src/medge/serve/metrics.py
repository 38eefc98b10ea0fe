"""What a Prometheus server scrapes. Numbers alone: no label holds anything that a client wrote."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from medge.runtimes.generate import Tally
from medge.serve.models import Models

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's counters."""

    def __init__(self, models: Models) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("medge_requests", "Requests answered", ["path", "status"], registry=registry)
        self._tokens = Counter(
            "medge_tokens", "Tokens: of prompts, reused of an earlier one, generated", ["model", "kind"],
            registry=registry,
        )  # fmt: skip
        self._phases = Counter("medge_phase_seconds", "Seconds by phase", ["model", "phase"], registry=registry)
        self._images = Counter("medge_images_encoded", "Images encoded", ["model"], registry=registry)
        self._inputs = Counter("medge_inputs_embedded", "Texts and images embedded", ["model"], registry=registry)
        self._cancelled = Counter("medge_cancelled", "Answers that nobody waited for", ["model"], registry=registry)
        self._first = Histogram(
            "medge_first_token_seconds", "From a request's place in the line to its first token", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._watch_lines(models)

    def _watch_lines(self, models: Models) -> None:
        waiting = Gauge("medge_waiting", "Requests that wait", ["model"], registry=self._registry)
        running = Gauge("medge_running", "Requests that run", ["model"], registry=self._registry)
        for served in models:
            waiting.labels(served.id).set_function(partial(getattr, served.line, "waiting"))
            running.labels(served.id).set_function(partial(getattr, served.line, "running"))

    def answered(self, path: str, status: int) -> None:
        """A request is over."""
        self._requests.labels(path, str(status)).inc()

    def began(self, model: str, seconds: float) -> None:
        """An answer's first token is there."""
        self._first.labels(model).observe(seconds)

    def generated(self, model: str, tally: Tally, tokens: int, waited: float) -> None:
        """An answer is over."""
        counts = {"prompt": tally.prompt_tokens, "reused": tally.reused_tokens, "generated": tokens}
        for kind, count in counts.items():
            self._tokens.labels(model, kind).inc(count)
        for phase, seconds in {"queue": waited, **tally.seconds}.items():
            self._phases.labels(model, phase).inc(seconds)
        self._images.labels(model).inc(tally.images_encoded)
        self._cancelled.labels(model).inc(tally.finish in (None, "cancelled"))

    def embedded(self, model: str, inputs: int, waited: float, seconds: float) -> None:
        """Embeddings are made."""
        self._inputs.labels(model).inc(inputs)
        self._phases.labels(model, "queue").inc(waited)
        self._phases.labels(model, "embed").inc(seconds)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

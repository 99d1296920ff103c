"""What `/metrics` tells, in Prometheus' format. Each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .models import Piece, Work
from .scheduler import Scheduler
from .usage import Usage

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server.

    Args:
        scheduler: Whose load is shown.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, scheduler: Scheduler[Piece]) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ("path", "status")
        self._requests = Counter("edgekit_requests", "Requests, by their end.", labels, registry=registry)
        self._tokens = Counter("edgekit_tokens", "Tokens, by kind.", ("model", "kind"), registry=registry)
        self._first = Histogram(
            "edgekit_first_piece_seconds",
            "From a request's body to the first piece of its reply.",
            ("model",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._whole = Histogram(
            "edgekit_request_seconds",
            "From a request's body to the end of its reply.",
            ("model",),
            registry=registry,
            buckets=_SECONDS,
        )
        for name, text, value in (
            ("active", "Requests that generate.", lambda: scheduler.active),
            ("waiting", "Requests that wait for a slot.", lambda: scheduler.waiting),
        ):
            Gauge(f"edgekit_requests_{name}", text, registry=registry).set_function(value)

    def count(self, path: str, status: str) -> None:
        """Count a request that has ended: an HTTP status, or "gone" where the client did not wait."""
        self._requests.labels(path, status).inc()

    def first(self, work: Work, seconds: float) -> None:
        """Note the time to the first piece."""
        self._first.labels(work.model.name).observe(seconds)

    def done(self, work: Work, usage: Usage, seconds: float) -> None:
        """Note a whole reply."""
        name = work.model.name
        self._whole.labels(name).observe(seconds)
        for kind, count in (("prompt", usage.prompt), ("cached", usage.cached), ("generated", usage.new)):
            self._tokens.labels(name, kind).inc(count)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

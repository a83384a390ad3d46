"""What an operator chooses, and what the server counts for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


@dataclass(frozen=True)
class Settings:
    """Limits of a server; scripts/serve.py has an option for each."""

    max_batch: int = 32
    """Requests that are computed together at most."""
    threads: int = 1
    """Threads that compute a batch. More slow a small model down: they wait for each other in every operator."""
    max_wait_s: float = 0.002
    """A request waits this long for others at most, unless a batch is being computed."""
    max_waiting: int = 256
    """Requests that wait at most; more are answered with 429."""
    max_body_bytes: int = 1 << 20
    """Largest request."""
    poll_s: float = 5.0
    """Seconds between two looks for a newer export."""
    shutdown_s: int = 20
    """Requests that have begun get so long to end after SIGTERM."""


_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("hstu_requests", "Answered requests", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "hstu_request_seconds", "Time from a request to its answer", ["path"], buckets=_SECONDS, registry=registry
        )
        self.batch_sizes = Histogram(
            "hstu_batch_size", "Requests that were computed together", buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "hstu_batch_seconds", "Time to compute a batch", buckets=_SECONDS, registry=registry
        )
        self.waiting = Gauge("hstu_waiting_requests", "Requests that wait to be computed", registry=registry)
        self.swaps = Counter("hstu_model_swaps", "Newer exports that have replaced older ones", registry=registry)
        self.refused = Gauge("hstu_refused_exports", "Exports that could not be loaded", registry=registry)
        self.model = Gauge("hstu_model", "1 for the model in use", ["version", "task"], registry=registry)

    def text(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return generate_latest(self._registry)

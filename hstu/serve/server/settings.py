"""Settings of the server, and its Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


@dataclass(frozen=True)
class Settings:
    """Limits of a server. scripts/serve.py has an option for each."""

    max_batch: int = 32
    """Maximum requests per batch."""
    threads: int = 1
    """Threads per batch. More threads slow small models down, because every operator synchronizes them."""
    max_wait_s: float = 0.002
    """Maximum wait of a request for others, unless another batch is being computed."""
    max_waiting: int = 256
    """Maximum waiting requests. Further requests get status 429."""
    max_body_bytes: int = 1 << 20
    poll_s: float = 5.0
    """Seconds between searches for a newer export."""
    shutdown_s: int = 20
    """Seconds for running requests to finish after SIGTERM."""


_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Prometheus metrics of one server."""

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
        """Format all metrics in the Prometheus text format."""
        return generate_latest(self._registry)

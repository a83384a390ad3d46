"""What an operator chooses."""

from __future__ import annotations

from dataclasses import dataclass


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
    cache_bytes: int = 64 << 20
    """Vectors of users take so many bytes at most; 0 keeps none."""
    max_body_bytes: int = 1 << 20
    """Largest request."""
    poll_s: float = 5.0
    """Seconds between two looks for a newer export."""
    shutdown_s: int = 20
    """Requests that have begun get so long to end after SIGTERM."""

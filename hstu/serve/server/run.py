"""Start the server and shut it down gracefully."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from pathlib import Path

import torch
import uvicorn

from hstu.base.errors import ConfigError, PrintableFormatter

from .app import create_app
from .settings import Metrics, Settings
from .swap import LiveModel

_BACKLOG = 256
_SWITCH_INTERVAL_S = 1e-4
"""How long a thread may hold the GIL while others wait. PyTorch operators release it.
While another thread loads an export, requests take 3 times as long; with Python's default of 5 ms, 40 times.
"""
_log = logging.getLogger(__name__)


def serve(root: Path, host: str, port: int, settings: Settings) -> None:
    """Serve the newest export of ``root`` (see ``find_exports``) until SIGTERM or Ctrl-C; finish running requests then.

    ``port`` 0 chooses a free port. Raises ConfigError for an unusable address, DataError if no export can be served.
    """
    _set_up_logging()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    torch.set_num_threads(settings.threads)
    with _bound(host, port) as listener:
        metrics = Metrics()
        gc.freeze()  # exempts imported modules, so that collecting a replaced model pauses threads for less time
        live = LiveModel(root, metrics)
        shown = f"[{host}]" if ":" in host else host
        # uvicorn handles both signals, and raises them again after its graceful shutdown.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _log.info("listening url=http://%s:%d", shown, listener.getsockname()[1])
        uvicorn.Server(server_config(live, settings, metrics)).run(sockets=[listener])
    _log.info("stopped")


def server_config(live: LiveModel, settings: Settings, metrics: Metrics) -> uvicorn.Config:
    """Create the uvicorn configuration of the application."""
    return uvicorn.Config(
        create_app(live, settings, metrics),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=settings.shutdown_s,
        limit_concurrency=4 * settings.max_waiting + 64,
    )


def _bound(host: str, port: int) -> socket.socket:
    """Bind a socket. The caller does so before loading the model, which may take long."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}. Choose another with --port; 0 takes a free one"
        ) from None


def _set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name in ("hstu", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "hstu" else logging.WARNING)

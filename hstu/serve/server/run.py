"""Start the server and end it in order."""

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
"""How long a thread keeps the interpreter while others wait for it. Each operator of a program releases it.
With Python's 5 ms, a request takes 40 times as long while an export is loaded in another thread; so, 3 times.
"""
_log = logging.getLogger(__name__)


def serve(root: Path, host: str, port: int, settings: Settings) -> None:
    """Serve the newest export of ``root`` until SIGTERM or Ctrl-C; requests that have begun are answered then.

    Args:
        root: an export, or a folder with several (swap.find_exports).
        host: address to listen at.
        port: 0 takes a free one.
        settings: limits.

    Raises:
        ConfigError: the address cannot be used.
        DataError: no export can be served.
    """
    _set_up_logging()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    torch.set_num_threads(settings.threads)
    with _bound(host, port) as listener:
        metrics = Metrics()
        gc.freeze()  # what is imported stays; without it, collecting an earlier model stops all threads for longer
        live = LiveModel(root, metrics)
        shown = f"[{host}]" if ":" in host else host
        # uvicorn handles both and raises them again when it has ended in order.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _log.info("listening url=http://%s:%d", shown, listener.getsockname()[1])
        uvicorn.Server(server_config(live, settings, metrics)).run(sockets=[listener])
    _log.info("stopped")


def server_config(live: LiveModel, settings: Settings, metrics: Metrics) -> uvicorn.Config:
    """How uvicorn runs the application."""
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
    """A socket with the address. It is taken before the model is loaded, which may take long."""
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

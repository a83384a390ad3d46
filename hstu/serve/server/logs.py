"""Log lines, as text or as JSON, and the request that they are about."""

import json
import logging
import re
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

from hstu.base.errors import PrintableFormatter

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
# Version 00 of W3C trace context has exactly these fields, later ones may have more; ff and zeros are not valid.
_TRACE = re.compile(rb"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
CURRENT: ContextVar[Mapping[str, str]] = ContextVar("CURRENT", default=MappingProxyType({}))
"""What log lines say of the request that this task answers: request_id, trace_id and client, which has the key."""


def ids_of(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """The request_id of X-Request-Id, or a new one, and the trace_id of traceparent (W3C trace context), if valid."""
    given, trace = headers.get(b"x-request-id", b""), _TRACE.fullmatch(headers.get(b"traceparent", b""))
    request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    return {"request_id": request_id, **({"trace_id": trace[1].decode()} if trace else {})}


class _TextFormatter(PrintableFormatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join([super().formatMessage(record), *map("=".join, CURRENT.get().items())])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname.lower(), "message": record.getMessage(), **CURRENT.get()}
        return json.dumps({**line, "traceback": self.formatException(record.exc_info)} if record.exc_info else line)


def set_up_logging(log_format: str) -> None:
    """Write the lines of the server and of uvicorn to standard error. ``log_format``: "text" or "json"."""
    handler = logging.StreamHandler()
    as_text = _TextFormatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else as_text)
    for name in ("hstu", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "hstu" else logging.WARNING)

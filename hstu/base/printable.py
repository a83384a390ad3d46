"""Text from data, as a terminal, a log or a report can show it safely."""

from __future__ import annotations

import logging


def printable(text: str, keep: str = "\n\t") -> str:
    """Control, escape and other invisible characters as codes such as ``\\x1b``, except those in ``keep``.

    An id cannot then steer a terminal, turn the direction of writing or, without ``keep``, begin a line of its own.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


class PrintableFormatter(logging.Formatter):
    """A formatter whose messages are printable. Tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record without its traceback."""
        record.message = printable(record.message)
        return super().formatMessage(record)
